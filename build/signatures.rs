//! Parses `KERNEL void name(args)` in kernel sources and generates a typed Rust launch function for each.

use std::fmt::Write;

/// One entry point of a kernel file.
#[derive(Debug, PartialEq)]
pub struct Kernel {
    pub name: String,
    pub arguments: Vec<Argument>,
}

#[derive(Debug, PartialEq)]
pub struct Argument {
    pub name: String,
    pub kind: Kind,
}

/// The kind of an argument of the launch function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A pointer to elements of this Rust type that the kernel only reads.
    In(&'static str),
    /// A pointer to elements of this Rust type that the kernel writes, and may read.
    Out(&'static str),
    /// A value of this Rust type and size in bytes.
    Value(&'static str, usize),
}

impl Kind {
    pub fn size(self) -> usize {
        match self {
            Kind::In(_) | Kind::Out(_) => 8,
            Kind::Value(_, size) => size,
        }
    }

    fn rust(self) -> String {
        match self {
            Kind::In(element) => format!("In<'_, {element}>"),
            Kind::Out(element) => format!("Out<'_, {element}>"),
            Kind::Value(rust, _) => rust.to_owned(),
        }
    }
}

/// CUDA types, the Rust types they map to, and their sizes. A kernel's signature may use no others.
const TYPES: [(&str, &str, usize); 8] = [
    ("float", "f32", 4),
    ("double", "f64", 8),
    ("bf16", "half::bf16", 2),
    ("int", "i32", 4),
    ("unsigned", "u32", 4),
    ("uint8_t", "u8", 1),
    ("uint64_t", "u64", 8),
    ("int64_t", "i64", 8),
];

/// Returns the kernels of a source file, in order.
///
/// # Errors
/// If a signature has a form or a type that launch functions do not support.
pub fn parse(source: &str) -> Result<Vec<Kernel>, String> {
    let text = without_comments(source);
    // Without preprocessor lines, among them the definition of KERNEL.
    let code: String = text
        .lines()
        .map(|line| if line.trim_start().starts_with('#') { "\n" } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut kernels = Vec::new();
    let mut rest = code.as_str();
    while let Some(at) = word(rest, "KERNEL") {
        let (kernel, after) = signature(&rest[at + "KERNEL".len()..])?;
        kernels.push(kernel);
        rest = after;
    }
    Ok(kernels)
}

/// Parses `[BOUNDS(…)] void name(args)`; also returns the rest of the text.
fn signature(text: &str) -> Result<(Kernel, &str), String> {
    let shown = || text.chars().take(80).collect::<String>();
    let malformed = || format!("expected `KERNEL [BOUNDS(…)] void name(arguments)`: {}", shown());
    let mut rest = text.trim_start();
    if let Some(bounds) = rest.strip_prefix("BOUNDS") {
        rest = bounds.split_once(')').ok_or_else(malformed)?.1.trim_start();
    }
    let rest = rest.strip_prefix("void ").ok_or_else(malformed)?;
    let (name, rest) = rest.split_once('(').ok_or_else(malformed)?;
    let (list, after) = rest.split_once(')').ok_or_else(malformed)?;
    let name = name.trim().to_owned();
    if name.is_empty()
        || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    {
        return Err(format!("`{name}` is not a snake_case kernel name"));
    }
    let arguments = list.split(',').filter(|part| !part.trim().is_empty()).map(argument);
    let arguments =
        arguments.collect::<Result<_, _>>().map_err(|reason| format!("{name}: {reason}"))?;
    Ok((Kernel { name, arguments }, after))
}

fn argument(text: &str) -> Result<Argument, String> {
    let spaced = text.replace('*', " * ").replace("__restrict__", " ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let (&name, of) = words.split_last().ok_or("an empty argument")?;
    let (is_const, of) = match of {
        ["const", of @ ..] => (true, of),
        of => (false, of),
    };
    let known = |cuda: &str| TYPES.iter().find(|(c, ..)| *c == cuda);
    let kind = match of {
        [element, "*"] => known(element)
            .map(|&(_, rust, _)| if is_const { Kind::In(rust) } else { Kind::Out(rust) }),
        [value] if *value != "bf16" => known(value).map(|&(_, rust, size)| Kind::Value(rust, size)),
        _ => None,
    };
    let kind = kind.ok_or_else(|| format!("`{}` is not a supported argument type", text.trim()))?;
    Ok(Argument { name: name.to_owned(), kind })
}

/// Returns the position of `word` as an entire word of `text`.
fn word(text: &str, word: &str) -> Option<usize> {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).map(|(at, _)| at).find(|&at| {
        !text[..at].ends_with(part_of_name) && !text[at + word.len()..].starts_with(part_of_name)
    })
}

fn without_comments(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("/*").into_iter().chain(rest.find("//")).min() {
        code.push_str(&rest[..at]);
        let end = if rest[at..].starts_with("//") { "\n" } else { "*/" };
        rest = match rest[at + 2..].find(end) {
            // Keeps the end of the line: it may end a preprocessor line.
            Some(length) if end == "\n" => &rest[at + 2 + length..],
            Some(length) => &rest[at + 4 + length..],
            None => "",
        };
    }
    code + rest
}

/// Returns the launch function of the kernel with this `index` in the table of all kernels.
pub fn launch_function(kernel: &Kernel, index: usize, file: &str) -> String {
    let mut code = String::new();
    let _ = writeln!(code, "/// `{}` of `kernels/{file}.cu`.", kernel.name);
    let _ = writeln!(code, "///\n/// # Safety");
    let _ = writeln!(
        code,
        "/// With these sizes, the kernel must access memory only within the allocations that its pointers point to."
    );
    let _ = write!(code, "pub(crate) unsafe fn {}(launch: Launch<'_>", kernel.name);
    for Argument { name, kind } in &kernel.arguments {
        let _ = write!(code, ", {}: {}", identifier(name), kind.rust());
    }
    let _ = write!(code, ") {{\n    let arguments = [");
    for Argument { name, .. } in &kernel.arguments {
        let _ = write!(code, "argument(&{}), ", identifier(name));
    }
    let _ = writeln!(code, "];");
    let _ = writeln!(
        code,
        "    // SAFETY: required of the caller; the arguments have the kernel's types, as both come from its signature."
    );
    let _ = writeln!(code, "    unsafe {{ launch.run({index}, &arguments) }}\n}}");
    code
}

/// The name of an argument as a Rust identifier: `in` is a keyword in Rust.
fn identifier(name: &str) -> String {
    match name {
        "in" | "ref" | "move" | "type" | "use" | "fn" | "where" | "match" => format!("r#{name}"),
        _ if name.chars().any(char::is_uppercase) => name.to_ascii_lowercase(),
        _ => name.to_owned(),
    }
}

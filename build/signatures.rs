//! Reads `KERNEL void name(args)` out of kernel sources and writes a typed Rust launch function for each.

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

/// What an argument is to the launch function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A pointer that the kernel reads, to elements of this Rust type.
    In(&'static str),
    /// A pointer that the kernel writes, and perhaps reads.
    Out(&'static str),
    /// A value of this Rust type and number of bytes.
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

/// What CUDA's types are in Rust, with their sizes. A kernel's signature uses no others.
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

/// The kernels of a source file, in order.
///
/// # Errors
/// When a signature has a form or a type that launch functions do not know.
pub fn parse(source: &str) -> Result<Vec<Kernel>, String> {
    let text = without_comments(source);
    // The definition of KERNEL itself, and whatever else is the preprocessor's.
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

/// Parses `[BOUNDS(…)] void name(args)` and returns what follows.
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
        return Err(format!("`{name}` is no snake_case name of a kernel"));
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
    let kind = kind.ok_or_else(|| format!("`{}` is no type of a launch function", text.trim()))?;
    Ok(Argument { name: name.to_owned(), kind })
}

/// Where `text` holds `word` as a word of its own.
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
            // The end of the line stays: it may end a line of the preprocessor.
            Some(length) if end == "\n" => &rest[at + 2 + length..],
            Some(length) => &rest[at + 4 + length..],
            None => "",
        };
    }
    code + rest
}

/// The launch function of kernel number `index` of the whole program.
pub fn launch_function(kernel: &Kernel, index: usize, file: &str) -> String {
    let mut code = String::new();
    let _ = writeln!(code, "/// `{}` of `kernels/{file}.cu`.", kernel.name);
    let _ = writeln!(code, "///\n/// # Safety");
    let _ = writeln!(
        code,
        "/// The kernel reads and writes within what its pointers point to, given these sizes."
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
        "    // SAFETY: as this function's; the arguments have the kernel's types, for they came from its signature."
    );
    let _ = writeln!(code, "    unsafe {{ launch.run({index}, &arguments) }}\n}}");
    code
}

/// CUDA's name of an argument as Rust may have it: `in` is a keyword here.
fn identifier(name: &str) -> String {
    match name {
        "in" | "ref" | "move" | "type" | "use" | "fn" | "where" | "match" => format!("r#{name}"),
        _ if name.chars().any(char::is_uppercase) => name.to_ascii_lowercase(),
        _ => name.to_owned(),
    }
}

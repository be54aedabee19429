//! Reads the signatures of CUDA kernels from their sources, without a compiler.
//!
//! [`kernels`] returns names, arguments, launch bounds and lines. Types stay as they are written: what they mean is for the caller to
//! say. What is not understood is an error with its line ([`Unknown`]), so what is returned is complete.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod text;

use text::{blanked, closing, line_of, name_length, parts, words};

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name.
    pub name: String,
    /// The type of the value, or of what it points to, in single spaces and without `const`, `volatile`, `struct` and
    /// `__restrict__`: `float`, `unsigned long long`.
    pub base: String,
    /// How many `*` there are.
    pub pointers: usize,
    /// Whether what it points to is `const`.
    pub constant: bool,
    /// As it stands in the source.
    pub text: String,
}

/// A kernel's name and arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The function's name.
    pub name: String,
    /// Its arguments, in order.
    pub arguments: Vec<Argument>,
    /// The first launch bound, threads per block, as an expression of C++.
    pub bounds: Option<String>,
    /// The line of its name, counted from 1.
    pub line: usize,
}

/// Something in a source that is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The line, counted from 1.
    pub line: usize,
    /// A sentence, or the name of the thing.
    pub what: String,
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Unknown {}

/// The words by which kernels are known. The default has CUDA's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// What marks a kernel: `__global__`, and macros for it.
    pub kernel: Vec<String>,
    /// What launch bounds stand behind: `__launch_bounds__`, and macros for it.
    pub bounds: Vec<String>,
}

impl Default for Words {
    fn default() -> Self {
        Self { kernel: vec!["__global__".into()], bounds: vec!["__launch_bounds__".into()] }
    }
}

impl Words {
    /// Also a macro for `__global__`, and one for `__launch_bounds__`.
    pub fn also(mut self, kernel: &str, bounds: &str) -> Self {
        self.kernel.push(kernel.into());
        self.bounds.push(bounds.into());
        self
    }
}

/// Returns the kernels of a source, in order. A declaration without a body is not one.
///
/// # Errors
/// If a signature has a form that is not understood, or is a template, which has no name to launch by.
pub fn kernels(source: &str, known: &Words) -> Result<Vec<Signature>, Unknown> {
    let code = without_directives(&blanked(source));
    let mut at: Vec<usize> = known.kernel.iter().flat_map(|word| words(&code, word)).collect();
    at.sort_unstable();
    at.into_iter().filter_map(|at| signature(&code, at, known).transpose()).collect()
}

/// The code with preprocessor lines blanked, and the lines that they continue on.
fn without_directives(code: &str) -> String {
    let mut inside = false;
    let mut kept = String::with_capacity(code.len());
    for line in code.split_inclusive('\n') {
        inside |= line.trim_start().starts_with('#');
        if inside {
            // As many bytes: positions keep their meaning.
            kept.extend(line.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }));
        } else {
            kept.push_str(line);
        }
        inside &= line.trim_end_matches(['\n', '\r']).ends_with('\\');
    }
    kept
}

/// The kernel whose word is at `at`; `None` for a declaration without a body.
fn signature(code: &str, at: usize, known: &Words) -> Result<Option<Signature>, Unknown> {
    let unknown = |what: &str| Unknown { line: line_of(code, at), what: what.into() };
    let form = || unknown("a kernel's form is `__global__ void name(arguments)`");
    let before = code[..at].trim_end();
    let before = ["static", "inline", "void"]
        .iter()
        .fold(before, |before, word| before.strip_suffix(word).unwrap_or(before).trim_end());
    if before.ends_with('>') {
        return Err(unknown(
            "a kernel that is a template has no name to launch: add a kernel that calls it with its arguments",
        ));
    }
    let mut rest = at + name_length(&code[at..]);
    // `void __global__ f()` is allowed, too.
    let mut returns_nothing = words(code[..at].trim_end(), "void")
        .last()
        .is_some_and(|found| found + "void".len() == code[..at].trim_end().len());
    let mut bounds = None;
    let name = loop {
        rest += code[rest..].find(|c: char| !c.is_whitespace()).unwrap_or(0);
        let word = &code[rest..rest + name_length(&code[rest..])];
        rest += word.len();
        let open = rest + code[rest..].find(|c: char| !c.is_whitespace()).unwrap_or(0);
        let opens = code[open..].starts_with('(');
        let end = || closing(code, open).ok_or_else(|| unknown("an open bracket"));
        match word {
            "" => return Err(form()),
            "void" => returns_nothing = true,
            _ if opens && known.bounds.iter().any(|known| known == word) => {
                bounds = parts(&code[open + 1..end()? - 1]).first().map(|first| first.to_string());
                rest = end()?;
            }
            // Other attributes: `__cluster_dims__(2, 1, 1)`.
            _ if opens && word.starts_with("__") => rest = end()?,
            _ if opens => break word,
            _ => {}
        }
    };
    if !returns_nothing {
        return Err(form());
    }
    let open = rest + code[rest..].find('(').unwrap_or(0);
    let close = closing(code, open).ok_or_else(|| unknown("an open bracket"))?;
    if code[close..].trim_start().starts_with(';') {
        return Ok(None);
    }
    let list = parts(&code[open + 1..close - 1]);
    let arguments = list.into_iter().filter(|text| *text != "void").map(|text| {
        argument(text).ok_or_else(|| unknown(&format!("`{name}`: `{text}` is not an argument")))
    });
    let (name, line) = (name.to_owned(), line_of(code, rest));
    let arguments = arguments.collect::<Result<_, _>>()?;
    Ok(Some(Signature { name, arguments, bounds, line }))
}

/// `None` if there is no name after the type.
fn argument(text: &str) -> Option<Argument> {
    let spaced = text.replace('*', " * ");
    let kept =
        |word: &&str| !matches!(*word, "__restrict__" | "__restrict" | "volatile" | "struct");
    let all: Vec<&str> = spaced.split_whitespace().filter(kept).collect();
    let (&name, of) = all.split_last()?;
    if of.is_empty() || name == "*" {
        return None;
    }
    let pointers = of.iter().filter(|word| **word == "*").count();
    let constant = of.iter().take_while(|word| **word != "*").any(|word| *word == "const");
    let base: Vec<&str> =
        of.iter().copied().filter(|word| !matches!(*word, "*" | "const")).collect();
    Some(Argument {
        name: name.to_owned(),
        base: base.join(" "),
        pointers,
        constant: constant && pointers > 0,
        text: text.split_whitespace().collect::<Vec<_>>().join(" "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &str) -> Result<Vec<Signature>, Unknown> {
        kernels(source, &Words::default().also("KERNEL", "BOUNDS"))
    }

    #[test]
    fn signatures_are_read_in_the_styles_in_which_kernels_are_written() {
        let source = r#"
// __global__ void not_this(int x)
#define KERNEL extern "C" __global__
#define LONG __global__ void \
    nor_this(int x) {}
/* __global__ void nor_that() */ const char* text = "__global__ void nor_text() {}"; int KERNELS = 1;
extern "C" __global__ void __launch_bounds__(256, 2) first(float* __restrict__ y, const float* x, unsigned int n) {}
__global__ __launch_bounds__(128)
void second(
    const float4 *in, long long stride, // a comment, with a comma
    __nv_bfloat16* out) { }
KERNEL BOUNDS(N / (2 + 1)) void third(float const* x) {}
static void __global__ fourth(void) {}
__global__ void __cluster_dims__(2, 1, 1) fifth(float** rows, const int n) {}
__global__ void declared(int later);
"#;
        let found = read(source).unwrap();
        let shown: Vec<_> = found.iter().map(|k| (&*k.name, k.bounds.as_deref(), k.line)).collect();
        let want = [
            ("first", Some("256"), 7),
            ("second", Some("128"), 9),
            ("third", Some("N / (2 + 1)"), 12),
            ("fourth", None, 13),
            ("fifth", None, 14),
        ];
        assert_eq!(shown, want);
        let argument = |k: usize, i: usize| {
            let a = &found[k].arguments[i];
            (&*a.name, &*a.base, a.pointers, a.constant)
        };
        assert_eq!(argument(0, 0), ("y", "float", 1, false));
        assert_eq!(argument(0, 2), ("n", "unsigned int", 0, false));
        assert_eq!(argument(1, 0), ("in", "float4", 1, true));
        assert_eq!(argument(1, 1), ("stride", "long long", 0, false));
        assert_eq!(argument(2, 0), ("x", "float", 1, true));
        assert_eq!(found[3].arguments, []);
        assert_eq!(argument(4, 0), ("rows", "float", 2, false));
        assert_eq!(argument(4, 1), ("n", "int", 0, false));
        assert_eq!(found[0].arguments[0].text, "float* __restrict__ y");
    }

    #[test]
    fn what_has_no_name_to_launch_is_refused_with_its_line() {
        let refused = |source: &str, line: usize, what: &str| {
            let error = read(source).unwrap_err();
            assert!(error.line == line && error.what.contains(what), "{source}: {error}");
        };
        refused("template <int N>\n__global__ void t(float* y) {}", 2, "template");
        refused("template <int N>\nstatic __global__ void t(float* y) {}", 2, "template");
        refused("\n__global__ int t(float* y) {}", 2, "`__global__ void name(arguments)`");
        refused("__global__ void t", 1, "`__global__ void name(arguments)`");
        refused("__global__ void t(float* y", 1, "an open bracket");
        refused("__global__ void t(float*) {}", 1, "`t`: `float*` is not an argument");
        refused("__global__ void t(float) {}", 1, "`t`: `float` is not an argument");
    }

    #[test]
    fn nothing_is_read_where_nothing_is() {
        assert_eq!(read("").unwrap(), []);
        assert_eq!(read("KERNEL_OF_TRUTH void f() {} my__global__ void g() {}").unwrap(), []);
        // Without the macro's name its kernels are not known.
        assert_eq!(kernels("KERNEL void f() {}", &Words::default()).unwrap(), []);
    }
}

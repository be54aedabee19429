//! Reads CUDA sources: the signatures of kernels (by `cuda-signatures`), with the types that the host knows, and the few forms that
//! the host's compiler needs rewritten.
//!
//! Lines keep their numbers, so that reports name those of the file. What cannot be rewritten is named ([`Unknown`]).

use std::fmt::Write;

pub use cuda_signatures::Unknown;
use cuda_signatures::Words;
pub(crate) use cuda_signatures::text::{blanked, closing, line_of, parts, words};

/// The type of an argument's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// bfloat16.
    Bf16,
    /// Signed integer of this many bytes.
    Int(usize),
    /// Unsigned integer of this many bytes.
    Unsigned(usize),
}

impl Element {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
            Self::Bf16 => 2,
            Self::Int(size) | Self::Unsigned(size) => size,
        }
    }

    /// Whether it is a floating-point type.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::Bf16)
    }
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the signature.
    pub name: String,
    /// The type of the value, or of the elements that it points to; a vector type counts as its elements.
    pub element: Element,
    /// Whether it is a pointer.
    pub pointer: bool,
    /// Whether the kernel only reads through it.
    pub constant: bool,
}

/// A kernel's name and arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The function's name.
    pub name: String,
    /// Its arguments, in order.
    pub arguments: Vec<Argument>,
    /// Launch bounds, as an expression of C++: threads per block.
    pub bounds: String,
    /// The line of its name, counted from 1.
    pub line: usize,
}

/// CUDA's types and ours.
const TYPES: &[(&str, Element)] = &[
    ("float", Element::F32),
    ("float2", Element::F32),
    ("float4", Element::F32),
    ("double", Element::F64),
    ("double2", Element::F64),
    ("__nv_bfloat16", Element::Bf16),
    ("nv_bfloat16", Element::Bf16),
    ("bf16", Element::Bf16),
    ("int", Element::Int(4)),
    ("int2", Element::Int(4)),
    ("int4", Element::Int(4)),
    ("int32_t", Element::Int(4)),
    ("short", Element::Int(2)),
    ("int16_t", Element::Int(2)),
    ("char", Element::Int(1)),
    ("int8_t", Element::Int(1)),
    ("long long", Element::Int(8)),
    ("long", Element::Int(8)),
    ("int64_t", Element::Int(8)),
    ("ptrdiff_t", Element::Int(8)),
    ("unsigned", Element::Unsigned(4)),
    ("unsigned int", Element::Unsigned(4)),
    ("uint32_t", Element::Unsigned(4)),
    ("uint2", Element::Unsigned(4)),
    ("uint4", Element::Unsigned(4)),
    ("uint16_t", Element::Unsigned(2)),
    ("unsigned short", Element::Unsigned(2)),
    ("unsigned char", Element::Unsigned(1)),
    ("uint8_t", Element::Unsigned(1)),
    ("bool", Element::Unsigned(1)),
    ("uint64_t", Element::Unsigned(8)),
    ("unsigned long long", Element::Unsigned(8)),
    ("size_t", Element::Unsigned(8)),
];

/// Returns the kernels of a source, in order: functions marked `__global__`, or `KERNEL`, a macro for it.
///
/// # Errors
/// If a signature has a form or a type that a launch cannot pass.
pub fn kernels(source: &str) -> Result<Vec<Signature>, Unknown> {
    let found = cuda_signatures::kernels(source, &Words::default().also("KERNEL", "BOUNDS"))?;
    let signature = |found: cuda_signatures::Signature| {
        let line = found.line;
        let arguments = found.arguments.iter().map(|of| {
            argument(of).ok_or_else(|| Unknown {
                line,
                what: format!("`{}` of `{}` has a type that is not supported", of.text, found.name),
            })
        });
        let arguments = arguments.collect::<Result<_, _>>()?;
        let bounds = found.bounds.unwrap_or_else(|| "1024".into());
        Ok(Signature { name: found.name, arguments, bounds, line })
    };
    found.into_iter().map(signature).collect()
}

fn argument(of: &cuda_signatures::Argument) -> Option<Argument> {
    let pointer = match of.pointers {
        0 | 1 => of.pointers == 1,
        _ => return None,
    };
    let &(known, element) = TYPES.iter().find(|(known, _)| *known == of.base)?;
    // Values of vector types are not passed.
    let vector = known.ends_with(['2', '4']) && !known.contains("_t");
    let name = of.name.clone();
    (pointer || !vector).then_some(Argument { name, element, pointer, constant: of.constant })
}

/// A source rewritten for the host.
#[derive(Clone, Debug)]
pub struct Rewritten {
    /// The text, line for line.
    pub text: String,
    /// What the host does not know; the text does not compile if there is any.
    pub unknown: Vec<Unknown>,
}

/// Rewrites `extern __shared__` arrays and inline PTX.
pub fn for_the_host(source: &str) -> Rewritten {
    let code = blanked(source);
    let mut edits: Vec<(usize, usize, String)> = Vec::new();
    let mut unknown = Vec::new();
    for at in words(&code, "extern") {
        let Some(end) = code[at..].find(';').map(|length| at + length + 1) else { continue };
        let declaration = &code[at..end];
        if !declaration["extern".len()..].trim_start().starts_with("__shared__") {
            continue;
        }
        match dynamic_shared(&code, at, end) {
            Some(text) => edits.push((at, end, text)),
            None => {
                unknown.push(Unknown { line: line_of(&code, at), what: declaration.to_owned() })
            }
        }
    }
    if let Some(at) = code.find("<<<") {
        unknown.push(Unknown {
            line: line_of(&code, at),
            what: "a launch (`<<<`): the file may hold device code only".into(),
        });
    }
    let assembly = ["asm", "__asm__", "__asm"];
    for at in assembly.into_iter().flat_map(|word| words(&code, word)) {
        match assembly_at(source, &code, at) {
            Ok((end, text)) => edits.push((at, end, text)),
            Err(what) => unknown.push(Unknown { line: line_of(&code, at), what }),
        }
    }
    edits.sort_by_key(|edit| edit.0);
    let (mut text, mut from) = (String::new(), 0);
    for (at, end, new) in edits {
        text += &source[from..at];
        text += &new;
        // The lines that the rewritten text took.
        text += &"\n".repeat(
            source[at..end].matches('\n').count().saturating_sub(new.matches('\n').count()),
        );
        from = end;
    }
    text += &source[from..];
    unknown.sort_by_key(|unknown| unknown.line);
    Rewritten { text, unknown }
}

/// `extern __shared__ TYPE NAME[];` as a pointer, or as a macro outside of functions.
fn dynamic_shared(code: &str, at: usize, end: usize) -> Option<String> {
    let mut text = code[at..end - 1].replace("extern", " ").replace("__shared__", " ");
    for align in ["__align__", "alignas"] {
        while let Some(open) = text.find(align) {
            let bracket = open + text[open..].find('(')?;
            let close = closing(&text, bracket)?;
            text.replace_range(open..close, " ");
        }
    }
    let (declared, dimension) = text.trim().split_once('[')?;
    if !dimension.trim().starts_with(']') {
        return None;
    }
    let (kind, name) = declared.trim().rsplit_once(|c: char| c.is_whitespace())?;
    let (kind, name) = (kind.trim(), name.trim());
    let inside = code[..at].matches('{').count() > code[..at].matches('}').count();
    Some(match inside {
        true => format!("{kind}* {name} = static_cast<{kind}*>(standin::dynamic_shared());"),
        false => format!("#define {name} (static_cast<{kind}*>(standin::dynamic_shared()))"),
    })
}

/// Translates an `asm` statement; returns the position after it, and the calls.
fn assembly_at(source: &str, code: &str, at: usize) -> Result<(usize, String), String> {
    let open = at + code[at..].find('(').ok_or("asm without an operand list")?;
    let close = closing(code, open).ok_or("asm that does not end")?;
    let end = close + code[close..].find(';').ok_or("asm without a semicolon")? + 1;
    let mut sections = vec![(open + 1, open + 1)];
    let mut depth = 0;
    for (i, c) in code[open + 1..close - 1].bytes().enumerate() {
        let i = open + 1 + i;
        match c {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b':' if depth == 0 => {
                sections.last_mut().expect("one").1 = i;
                sections.push((i + 1, i + 1));
            }
            _ => {}
        }
    }
    sections.last_mut().expect("one").1 = close - 1;
    let template = strings(source, code, sections[0]);
    let operands: Vec<String> = sections[1..sections.len().min(3)]
        .iter()
        .flat_map(|&(from, to)| parts_at(code, from, to))
        .map(|(from, to)| {
            let open = from + code[from..to].find('(').unwrap_or(0);
            source[open..to].trim().to_owned()
        })
        .collect();
    let line = line_of(code, at);
    let mut calls = String::new();
    for instruction in template.split([';', '\n']).map(str::trim).filter(|text| !text.is_empty()) {
        let call = instruction_call(instruction, &operands, line).ok_or_else(|| {
            let name = instruction.split_whitespace().next().unwrap_or(instruction);
            format!("inline PTX `{name}`")
        })?;
        let _ = write!(calls, "{call} ");
    }
    Ok((end, calls.trim_end().to_owned()))
}

/// The operands of a section of an `asm` statement, as positions.
fn parts_at(code: &str, from: usize, to: usize) -> Vec<(usize, usize)> {
    let (mut all, mut depth, mut start) = (Vec::new(), 0, from);
    for (i, c) in code[from..to].bytes().enumerate() {
        match c {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b',' if depth == 0 => {
                all.push((start, from + i));
                start = from + i + 1;
            }
            _ => {}
        }
    }
    if !code[start..to].trim().is_empty() {
        all.push((start, to));
    }
    all
}

/// The concatenated string literals of a section.
fn strings(source: &str, code: &str, (from, to): (usize, usize)) -> String {
    let mut text = String::new();
    let mut open = None;
    for (i, c) in code[from..to].bytes().enumerate() {
        if c != b'"' {
            continue;
        }
        match open.take() {
            None => open = Some(from + i + 1),
            Some(start) => text += &source[start..from + i],
        }
    }
    text.replace("\\n", "\n").replace("\\t", " ").replace("%%", "%")
}

/// The C++ call for one instruction of PTX; `None` if the host does not know it.
fn instruction_call(text: &str, operands: &[String], line: usize) -> Option<String> {
    if text.contains('@') || text.starts_with("//") {
        return None; // predicated
    }
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    // Operands by number, numbers as they are.
    let operand = |text: &str| -> Option<String> {
        let text = text.trim().trim_start_matches('[').trim_end_matches(']').trim();
        match text.strip_prefix('%') {
            Some("laneid") => Some("standin::lane()".into()),
            Some(number) => operands.get(number.parse::<usize>().ok()?).cloned(),
            None => text.parse::<i64>().ok().map(|n| n.to_string()),
        }
    };
    let given = parts(rest);
    let flat: Vec<String> = given
        .iter()
        .flat_map(|part| match part.strip_prefix('{') {
            Some(list) => parts(list.trim_end_matches('}')),
            None => vec![*part],
        })
        .map(operand)
        .collect::<Option<_>>()?;
    let ptx = "standin::ptx::";
    let mut dotted = name.split('.');
    let words: Vec<&str> = dotted.by_ref().collect();
    Some(match words.as_slice() {
        ["cp", "async", "commit_group"] => format!("{ptx}cp_async_commit();"),
        ["cp", "async", "wait_group"] => format!("{ptx}cp_async_wait({});", flat.first()?),
        ["cp", "async", "wait_all"] => format!("{ptx}cp_async_wait_all();"),
        ["cp", "async", "ca" | "cg", "shared" | "shared::cta", "global", ..] => {
            let [to, from, bytes, used @ ..] = flat.as_slice() else { return None };
            let used = used.first().unwrap_or(bytes);
            format!("{ptx}cp_async({to}, {from}, {bytes}, {used});")
        }
        ["ldmatrix", "sync", "aligned", "m8n8", count @ ("x1" | "x2" | "x4"), rest @ ..]
            if rest.last() == Some(&"b16") =>
        {
            let (row, into) = flat.split_last()?;
            let transposed = rest.contains(&"trans");
            let count = &count[1..];
            format!(
                "{ptx}load_matrices<{count}, {transposed}>({line}, {row}, {});",
                into.join(", ")
            )
        }
        ["mma", "sync", "aligned", shape, "row", "col", "f32", a, b, "f32"]
            if a == b && flat.len() == 14 =>
        {
            let complete = match (*shape, *a) {
                ("m16n8k16", "bf16") => "standin::complete_mma_bf16",
                ("m16n8k8", "tf32") => "standin::complete_mma_tf32",
                _ => return None,
            };
            format!("{ptx}mma({complete}, {line}, {});", flat.join(", "))
        }
        [unary, "approx", .., "f32"] if flat.len() == 2 => {
            let (to, x) = (&flat[0], &flat[1]);
            match *unary {
                "ex2" => format!("{to} = std::exp2({x});"),
                "lg2" => format!("{to} = std::log2({x});"),
                "rcp" => format!("{to} = 1.0f / {x};"),
                "sqrt" => format!("{to} = std::sqrt({x});"),
                "rsqrt" => format!("{to} = 1.0f / std::sqrt({x});"),
                "tanh" => format!("{to} = std::tanh({x});"),
                _ => return None,
            }
        }
        ["fma", "rn", .., "f32"] if flat.len() == 4 => {
            format!("{} = std::fma({}, {}, {});", flat[0], flat[1], flat[2], flat[3])
        }
        ["mov", _] if flat.len() == 2 => format!("{} = {};", flat[0], flat[1]),
        ["bar", "sync"] if flat == ["0"] => format!("__syncthreads({line});"),
        ["bar", "warp", "sync"] => format!("__syncwarp({}, {line});", flat.first()?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_read_in_the_styles_in_which_kernels_are_written() {
        let source = r#"
// __global__ void not_this(int x)
#define KERNEL extern "C" __global__
extern "C" __global__ void __launch_bounds__(256, 2) first(float* __restrict__ y, const float* x, unsigned int n) {}
__global__ __launch_bounds__(128)
void second(
    const float4 *in, long long stride, __nv_bfloat16* out) { }
KERNEL BOUNDS(64) void third(float const* x) {}
"#;
        let found = kernels(source).unwrap();
        let names: Vec<(&str, &str, usize)> =
            found.iter().map(|k| (&*k.name, &*k.bounds, k.line)).collect();
        assert_eq!(names, [("first", "256", 4), ("second", "128", 6), ("third", "64", 8)]);
        let pointer = |k: usize, i: usize| {
            let a = &found[k].arguments[i];
            (&*a.name, a.element, a.pointer, a.constant)
        };
        assert_eq!(pointer(0, 0), ("y", Element::F32, true, false));
        assert_eq!(pointer(0, 2), ("n", Element::Unsigned(4), false, false));
        assert_eq!(pointer(1, 0), ("in", Element::F32, true, true));
        assert_eq!(pointer(1, 1), ("stride", Element::Int(8), false, false));
        assert_eq!(pointer(2, 0), ("x", Element::F32, true, true));
        let template = kernels("template <int N>\n__global__ void t(float* y) {}").unwrap_err();
        assert!(template.line == 2 && template.what.contains("template"), "{template:?}");
        let other = kernels("__global__ void t(Tensor<float> y) {}").unwrap_err();
        assert!(other.what.contains("`Tensor<float> y`"), "{other:?}");
    }

    #[test]
    fn shared_arrays_and_inline_ptx_are_rewritten_line_for_line() {
        let source = "__global__ void f() {\n  extern __shared__ __align__(16) float s[];\n  asm volatile(\"cp.async.ca.shared.global [%0], [%1], 16;\\n\"\n    :: \"r\"(a + 1), \"l\"(&x[f(2, 3)]));\n  asm(\"cp.async.wait_group %0;\" :: \"n\"(1));\n  asm volatile(\"wgmma.fence.sync.aligned;\");\n}\n";
        let found = for_the_host(source);
        assert_eq!(found.text.lines().count(), source.lines().count());
        assert!(found.text.contains("float* s = static_cast<float*>(standin::dynamic_shared());"));
        assert!(
            found.text.contains("standin::ptx::cp_async((a + 1), (&x[f(2, 3)]), 16, 16);"),
            "{}",
            found.text
        );
        assert!(found.text.contains("cp_async_wait((1));"), "{}", found.text);
        assert_eq!(
            found.unknown,
            [Unknown { line: 6, what: "inline PTX `wgmma.fence.sync.aligned`".into() }]
        );
    }
}

//! Kernels as launch functions see them: names, and arguments with their Rust types.

use cuda_signatures::{Signature, Unknown, Words};

/// One entry point of a kernel file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name, in the source and in the machine code.
    pub name: String,
    /// Its arguments, in order.
    pub arguments: Vec<Argument>,
    /// The line of its name, counted from 1.
    pub line: usize,
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the source.
    pub name: String,
    /// What is passed.
    pub kind: Kind,
}

/// What is passed as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pointer to elements of this Rust type that the kernel only reads.
    In(&'static str),
    /// A pointer to elements of this Rust type that the kernel writes, and may read.
    Out(&'static str),
    /// A value of this Rust type and size in bytes.
    Value(&'static str, usize),
}

impl Kind {
    /// Bytes of the argument.
    pub fn size(self) -> usize {
        match self {
            Kind::In(_) | Kind::Out(_) => 8,
            Kind::Value(_, size) => size,
        }
    }
}

/// How a CUDA type may be passed.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// As a value, and behind a pointer.
    Both,
    /// Behind a pointer alone: a vector counts as its elements, and no driver interface has values of half precision.
    Pointer,
}

/// CUDA types, the Rust types that they map to, and their sizes, on 64-bit Linux and Windows alike: `long`, which differs, is missing.
const TYPES: &[(&str, &str, usize, By)] = &[
    ("float", "f32", 4, By::Both),
    ("float2", "f32", 4, By::Pointer),
    ("float4", "f32", 4, By::Pointer),
    ("double", "f64", 8, By::Both),
    ("double2", "f64", 8, By::Pointer),
    ("__nv_bfloat16", "half::bf16", 2, By::Pointer),
    ("nv_bfloat16", "half::bf16", 2, By::Pointer),
    ("bf16", "half::bf16", 2, By::Pointer),
    ("__half", "half::f16", 2, By::Pointer),
    ("half", "half::f16", 2, By::Pointer),
    ("int", "i32", 4, By::Both),
    ("signed", "i32", 4, By::Both),
    ("signed int", "i32", 4, By::Both),
    ("int2", "i32", 4, By::Pointer),
    ("int4", "i32", 4, By::Pointer),
    ("unsigned", "u32", 4, By::Both),
    ("unsigned int", "u32", 4, By::Both),
    ("uint2", "u32", 4, By::Pointer),
    ("uint4", "u32", 4, By::Pointer),
    ("short", "i16", 2, By::Both),
    ("unsigned short", "u16", 2, By::Both),
    ("char", "i8", 1, By::Both),
    ("signed char", "i8", 1, By::Both),
    ("unsigned char", "u8", 1, By::Both),
    ("long long", "i64", 8, By::Both),
    ("unsigned long long", "u64", 8, By::Both),
    ("int8_t", "i8", 1, By::Both),
    ("int16_t", "i16", 2, By::Both),
    ("int32_t", "i32", 4, By::Both),
    ("int64_t", "i64", 8, By::Both),
    ("uint8_t", "u8", 1, By::Both),
    ("uint16_t", "u16", 2, By::Both),
    ("uint32_t", "u32", 4, By::Both),
    ("uint64_t", "u64", 8, By::Both),
    ("size_t", "usize", 8, By::Both),
    ("ptrdiff_t", "isize", 8, By::Both),
];

/// Returns the kernels of a source, in order.
///
/// # Errors
/// If a signature has a form or a type that launch functions do not support.
pub fn read(source: &str, words: &Words) -> Result<Vec<Kernel>, Unknown> {
    cuda_signatures::kernels(source, words)?.into_iter().map(kernel).collect()
}

fn kernel(Signature { name, arguments: all, line, .. }: Signature) -> Result<Kernel, Unknown> {
    let mut arguments: Vec<Argument> = Vec::new();
    for argument in all {
        let refused = |what: String| Unknown { line, what: format!("`{name}`: {what}") };
        let kind = kind(&argument).ok_or_else(|| {
            refused(format!("`{}` is not a supported argument type", argument.text))
        })?;
        if argument.name.chars().any(|c| !(c.is_alphanumeric() || c == '_')) {
            return Err(refused(format!("`{}` is not a supported argument", argument.text)));
        }
        let same = |other: &&Argument| other.name.eq_ignore_ascii_case(&argument.name);
        if let Some(other) = arguments.iter().find(same) {
            let both = format!("`{}` and `{}`", other.name, argument.name);
            return Err(refused(format!("{both} have the same name in Rust, which is lowercase")));
        }
        arguments.push(Argument { name: argument.name, kind });
    }
    Ok(Kernel { name, arguments, line })
}

fn kind(argument: &cuda_signatures::Argument) -> Option<Kind> {
    // Behind a pointer its bytes are not known to be 0 and 1, which Rust's `bool` demands.
    let bool_type = match argument.pointers {
        0 => ("bool", "bool", 1, By::Both),
        _ => ("bool", "u8", 1, By::Both),
    };
    let mut known = TYPES.iter().chain([&bool_type]);
    let &(_, rust, size, by) = known.find(|(cuda, ..)| *cuda == argument.base)?;
    match argument.pointers {
        0 if by == By::Both => Some(Kind::Value(rust, size)),
        1 if argument.constant => Some(Kind::In(rust)),
        1 => Some(Kind::Out(rust)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(source: &str) -> Result<Vec<Kernel>, Unknown> {
        read(source, &Words::default().also("KERNEL", "BOUNDS"))
    }

    fn argument(name: &str, kind: Kind) -> Argument {
        Argument { name: name.into(), kind }
    }

    #[test]
    fn a_signature_is_read_whatever_its_lines_and_comments() {
        let source = "#define KERNEL extern \"C\" __global__
        // KERNEL void not_this(int n)
        /* KERNEL void nor_this(int n) */ int KERNELS = 1;
        KERNEL BOUNDS(256, 2) void scale_bf16(bf16* y, // the output
            const bf16* __restrict__ x,
            float factor, int64_t n) {}
        KERNEL void none() {}";
        let kernels = parse(source).unwrap();
        let want = Kernel {
            name: "scale_bf16".into(),
            arguments: vec![
                argument("y", Kind::Out("half::bf16")),
                argument("x", Kind::In("half::bf16")),
                argument("factor", Kind::Value("f32", 4)),
                argument("n", Kind::Value("i64", 8)),
            ],
            line: 4,
        };
        assert_eq!(kernels, [want, Kernel { name: "none".into(), arguments: vec![], line: 7 }]);
    }

    #[test]
    fn unsupported_types_in_signatures_are_refused_by_name() {
        for (source, reason) in [
            ("KERNEL void f(long n) {}", "`f`: `long n` is not a supported argument type"),
            ("KERNEL void f(Tensor x) {}", "`f`: `Tensor x` is not a supported argument type"),
            ("KERNEL void f(bf16 x) {}", "`f`: `bf16 x` is not a supported argument type"),
            ("KERNEL void f(float4 x) {}", "`f`: `float4 x` is not a supported argument type"),
            ("KERNEL void f(float** x) {}", "`f`: `float** x` is not a supported argument type"),
            ("KERNEL void f(float x[4]) {}", "`f`: `float x[4]` is not a supported argument"),
            ("KERNEL void f(int n, float N) {}", "`f`: `n` and `N` have the same name in Rust"),
            ("KERNEL int f(int n) {}", "a kernel's form is `__global__ void name(arguments)`"),
        ] {
            let error = parse(source).unwrap_err();
            assert!(error.line == 1 && error.what.contains(reason), "{source}: {error}");
        }
    }

    #[test]
    fn bytes_behind_a_pointer_need_not_be_zero_or_one() {
        let kernels =
            parse("KERNEL void f(bool* y, const bool* x, bool all, size_t n) {}").unwrap();
        let kinds: Vec<Kind> = kernels[0].arguments.iter().map(|a| a.kind).collect();
        let want =
            [Kind::Out("u8"), Kind::In("u8"), Kind::Value("bool", 1), Kind::Value("usize", 8)];
        assert_eq!(kinds, want);
        assert_eq!(kinds.iter().map(|kind| kind.size()).collect::<Vec<_>>(), [8, 8, 1, 8]);
    }
}

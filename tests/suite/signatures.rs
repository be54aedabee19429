//! What the build makes of kernel signatures.

#[path = "../../build/signatures.rs"]
#[allow(clippy::module_inception, dead_code)]
mod signatures;

use signatures::{Argument, Kernel, Kind, launch_function, parse};

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
    };
    assert_eq!(kernels, [want, Kernel { name: "none".into(), arguments: vec![] }]);
}

#[test]
fn unsupported_types_in_signatures_are_refused_by_name() {
    for (source, reason) in [
        ("KERNEL void f(size_t n) {}", "f: `size_t n` is not a supported argument type"),
        ("KERNEL void f(bf16 x) {}", "f: `bf16 x` is not a supported argument type"),
        ("KERNEL void f(float** x) {}", "f: `float** x` is not a supported argument type"),
        ("KERNEL int f(int n) {}", "expected `KERNEL"),
        ("KERNEL void Relu(int n) {}", "`Relu` is not a snake_case kernel name"),
    ] {
        let error = parse(source).unwrap_err();
        assert!(error.contains(reason), "{source}: {error}");
    }
}

#[test]
fn a_launch_function_has_the_kernels_types() {
    let kernels = parse("KERNEL void copy_f32(float* y, const float* in, int n) {}").unwrap();
    let code = launch_function(&kernels[0], 7, "copy");
    let signature =
        "unsafe fn copy_f32(launch: Launch<'_>, y: Out<'_, f32>, r#in: In<'_, f32>, n: i32) {";
    assert!(code.contains(signature), "{code}");
    assert!(code.contains("launch.run(7, &arguments)"), "{code}");
}

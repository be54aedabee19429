//! Writes a launch function for each kernel, whose arguments have the types of the kernel's signature.

use std::fmt::Write;

use crate::kernel::{Argument, Kernel, Kind};

const SAFETY: &str = "// SAFETY: required of the caller; the arguments have the kernel's types, as both come from its signature.";

/// A free function over the types of the module that includes it; `index` is the kernel's in the table of all kernels.
pub(crate) fn own(kernel: &Kernel, index: usize, path: &str) -> String {
    let name =
        |argument: &Argument| identifier(&argument.name.to_lowercase(), &["launch", "arguments"]);
    let mut code = String::new();
    let _ = writeln!(code, "/// `{}` of `{path}`.", kernel.name);
    let _ = writeln!(code, "///\n/// # Safety");
    let _ = writeln!(
        code,
        "/// With these sizes, the kernel must access memory only within the allocations that its pointers point to."
    );
    let function = identifier(&kernel.name, &[]);
    let _ = write!(code, "pub(crate) unsafe fn {function}(launch: Launch<'_>");
    for argument in &kernel.arguments {
        let rust = match argument.kind {
            Kind::In(element) => format!("In<'_, {element}>"),
            Kind::Out(element) => format!("Out<'_, {element}>"),
            Kind::Value(rust, _) => rust.to_owned(),
        };
        let _ = write!(code, ", {}: {rust}", name(argument));
    }
    let _ = write!(code, ") {{\n    let arguments = [");
    for argument in &kernel.arguments {
        let _ = write!(code, "argument(&{}), ", name(argument));
    }
    let _ = writeln!(code, "];\n    {SAFETY}");
    let _ = writeln!(code, "    unsafe {{ launch.run({index}, &arguments) }}\n}}");
    code
}

/// A method over the types of the crate `cudarc`.
pub(crate) fn cudarc(kernel: &Kernel, index: usize, path: &str) -> String {
    const OURS: [&str; 5] = ["stream", "config", "function", "launch", "guard"];
    let name = |argument: &Argument| identifier(&argument.name.to_lowercase(), &OURS);
    // `load` and `function` are methods of their own.
    let function = identifier(&kernel.name, &["load", "function", "at"]);
    let mut code = String::new();
    let _ = writeln!(code, "        /// Queues `{}` of `{path}`.", kernel.name);
    let _ = writeln!(code, "        ///\n        /// # Safety");
    let _ = writeln!(
        code,
        "        /// With this `config` and these values, the kernel must access memory only within the slices that it is given."
    );
    let _ = writeln!(code, "        ///\n        /// # Errors");
    let _ = writeln!(
        code,
        "        /// If the driver refuses the launch, or has no code of this kernel for its GPU."
    );
    let _ = write!(
        code,
        "        pub unsafe fn {function}(&self, stream: &CudaStream, config: LaunchConfig"
    );
    for argument in &kernel.arguments {
        let rust = match argument.kind {
            Kind::In(element) => format!("&impl DevicePtr<{element}>"),
            Kind::Out(element) => format!("&mut impl DevicePtrMut<{element}>"),
            Kind::Value(rust, _) => rust.to_owned(),
        };
        let _ = write!(code, ", {}: {rust}", name(argument));
    }
    let _ = writeln!(code, ") -> Result<(), DriverError> {{");
    let _ = writeln!(code, "            let function = self.at({index})?;");
    for (i, argument) in kernel.arguments.iter().enumerate() {
        let name = name(argument);
        let how = match argument.kind {
            Kind::In(_) => "device_ptr",
            Kind::Out(_) => "device_ptr_mut",
            Kind::Value(..) => continue,
        };
        let _ = writeln!(code, "            let ({name}, _guard_{i}) = {name}.{how}(stream);");
    }
    let _ = writeln!(code, "            let mut launch = stream.launch_builder(function);");
    for argument in &kernel.arguments {
        let _ = writeln!(code, "            launch.arg(&{});", name(argument));
    }
    let _ = writeln!(code, "            {SAFETY}");
    let _ =
        writeln!(code, "            unsafe {{ launch.launch(config) }}.map(|_| ())\n        }}");
    code
}

/// Words that Rust keeps for itself and C++ does not.
const KEYWORDS: [&str; 33] = [
    "abstract", "as", "async", "await", "become", "box", "dyn", "final", "fn", "gen", "impl", "in",
    "let", "loop", "macro", "match", "mod", "move", "mut", "override", "priv", "pub", "ref",
    "trait", "type", "typeof", "unsafe", "unsized", "use", "virtual", "where", "yield", "try",
];

/// A name of CUDA as a Rust identifier that is none of `taken`.
fn identifier(name: &str, taken: &[&str]) -> String {
    match name {
        // Rust has no raw form of these.
        "self" | "Self" | "super" | "crate" => format!("{name}_"),
        _ if taken.contains(&name) => format!("{name}_"),
        _ if KEYWORDS.contains(&name) => format!("r#{name}"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Words;

    fn kernel(source: &str) -> Kernel {
        crate::kernel::read(source, &Words::default()).unwrap().remove(0)
    }

    #[test]
    fn a_launch_function_has_the_kernels_types() {
        let of = kernel("__global__ void copy_f32(float* y, const float* in, int N) {}");
        let code = own(&of, 7, "kernels/copy.cu");
        let signature =
            "unsafe fn copy_f32(launch: Launch<'_>, y: Out<'_, f32>, r#in: In<'_, f32>, n: i32) {";
        assert!(code.contains(signature), "{code}");
        assert!(code.contains("launch.run(7, &arguments)"), "{code}");
        assert!(code.starts_with("/// `copy_f32` of `kernels/copy.cu`."), "{code}");
    }

    #[test]
    fn a_method_over_cudarc_has_them_too() {
        let of = kernel("__global__ void copy(bool* y, const double* stream, uint64_t n) {}");
        let code = cudarc(&of, 3, "copy.cu");
        for part in [
            "unsafe fn copy(&self, stream: &CudaStream, config: LaunchConfig, y: &mut impl DevicePtrMut<u8>, stream_: &impl DevicePtr<f64>, n: u64)",
            "self.at(3)?",
            "let (y, _guard_0) = y.device_ptr_mut(stream);",
            "let (stream_, _guard_1) = stream_.device_ptr(stream);",
            "launch.arg(&n);",
        ] {
            assert!(code.contains(part), "{code}");
        }
    }

    #[test]
    fn names_that_rust_does_not_allow_are_changed() {
        for (name, rust) in [("in", "r#in"), ("self", "self_"), ("launch", "launch_"), ("n", "n")] {
            assert_eq!(identifier(name, &["launch"]), rust);
        }
    }
}

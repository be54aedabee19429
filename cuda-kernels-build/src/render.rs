//! Writes the generated Rust file.

use std::fmt::Write;

use crate::build::{File, Kernels, Launches};
use crate::launch;
use crate::ptxas::Resources;
use crate::sass::Code;

/// The module over `cudarc`, in which `TABLES` and `METHODS` stand for what follows from the kernels.
const CUDARC: &str = include_str!("cudarc.rs.in");

impl Kernels {
    /// The generated file, as Rust.
    pub fn rust(&self, launches: Launches) -> String {
        match launches {
            Launches::Own => self.tables("pub(crate)") + &self.functions(launch::own),
            Launches::Cudarc => CUDARC
                .replace("// TABLES\n", &self.tables("pub"))
                .replace("// METHODS\n", &self.functions(launch::cudarc)),
        }
    }

    fn tables(&self, visible: &str) -> String {
        let mut code = String::new();
        let version = &self.compiler;
        let _ = writeln!(code, "/// The compiler of the kernels; `None` in a build without nvcc.");
        let _ = writeln!(code, "{visible} static COMPILER: Option<&str> = {version:?};");
        let _ = writeln!(code, "/// The kernel files.");
        let _ = writeln!(code, "{visible} static FILES: &[File] = &[");
        for File { name, targets, fatbin, .. } in &self.files {
            let image = fatbin.as_ref().map_or("&[]".to_owned(), |fatbin| {
                format!("&Aligned(*include_bytes!({:?})).0", fatbin.display().to_string())
            });
            let _ = writeln!(
                code,
                "    File {{ name: {name:?}, targets: &{targets:?}, image: {image} }},"
            );
        }
        let _ = writeln!(code, "];\n/// All kernels, file by file.");
        let _ = writeln!(code, "{visible} static KERNELS: &[Kernel] = &[");
        for (i, file) in self.files.iter().enumerate() {
            for kernel in &file.kernels {
                let sizes: Vec<usize> = kernel.arguments.iter().map(|a| a.kind.size()).collect();
                let name = &kernel.name;
                let _ = writeln!(
                    code,
                    "    Kernel {{ name: {name:?}, file: {i}, sizes: &{sizes:?} }},"
                );
            }
        }
        let _ = writeln!(code, "];\n/// What each kernel uses on each chip.");
        let _ = writeln!(code, "{visible} static RESOURCES: &[Resources] = &[");
        for file in &self.files {
            for of in &file.resources {
                let same = |code: &&Code| code.kernel == of.kernel && code.chip == of.chip;
                code.push_str(&resources(of, file.code.iter().find(same)));
            }
        }
        code + "];\n"
    }

    fn functions(&self, one: fn(&crate::kernel::Kernel, usize, &str) -> String) -> String {
        let all = self.files.iter().flat_map(|file| file.kernels.iter().map(move |k| (file, k)));
        let function = |(i, (file, kernel)): (usize, (&File, _))| {
            one(kernel, i, &file.path.display().to_string())
        };
        all.enumerate().map(function).collect()
    }
}

fn resources(of: &Resources, code: Option<&Code>) -> String {
    let Resources { kernel, chip, registers, shared, stack, spill_stores, spill_loads } = of;
    let mix = code.map_or("None".to_owned(), |Code { whole, hot, epilogues, prologue, .. }| {
        format!(
            "Some(Mix {{ whole: {whole:?}, hot: {:?}, hot_cycles: {:?}, epilogues: {:?}, epilogue_cycles: {:?}, prologue: {prologue} }})",
            hot.counts,
            hot.cycles,
            epilogues.map(|epilogue| epilogue.counts),
            epilogues.map(|epilogue| epilogue.cycles),
        )
    });
    format!(
        "    Resources {{ kernel: {kernel:?}, chip: {chip:?}, registers: {registers}, shared: {shared}, stack: {stack}, spill_stores: {spill_stores}, spill_loads: {spill_loads}, mix: {mix} }},\n"
    )
}

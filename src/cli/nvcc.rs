//! What nvcc says about a kernel, where there is one: the estimate on paper of `selfsup judge`.

use std::path::Path;
use std::process::Command;

use cuda_kernels_build::nvcc::{self, Nvcc};
use cuda_kernels_build::ptxas;
use cuda_kernels_build::sass::{self, Counts};

/// The kernel's code for sm_90a.
#[derive(Debug)]
pub(super) struct Compiled {
    pub registers: usize,
    /// Bytes of static shared memory.
    pub shared: usize,
    /// Bytes of spill stores and loads.
    pub spilled: usize,
    /// Instructions of the hot loop, if there is a disassembler.
    pub mix: Option<Counts>,
}

/// Compiles a source for sm_90a and reads what ptxas prints about the kernel.
///
/// # Errors
/// A sentence, if there is no nvcc or it does not compile the source.
pub(super) fn compile(source: &Path, kernel: &str) -> Result<Compiled, String> {
    let here = std::env::current_dir().map_err(|e| format!("no current folder: {e}"))?;
    let found = nvcc::find(&here).map_err(|e| e.to_string())?;
    let nvcc = found.ok_or("there is none in NVCC, CUDA_HOME, PATH or .cuda")?;
    let nvcc = Nvcc::at(&nvcc).map_err(|e| e.to_string())?;
    let out = std::env::temp_dir().join(format!("selfsup-judge-{}.cubin", std::process::id()));
    let mut command = Command::new(&nvcc.path);
    command.args(["-cubin", "-std=c++20", "-O3", "-arch=sm_90a", "-Xptxas", "-v", "-o"]);
    let path = nvcc.path.display();
    let output = command.arg(&out).arg(source).output().map_err(|e| format!("{path}: {e}"))?;
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    let found = match output.status.success() {
        true => {
            parse(&printed, kernel).ok_or_else(|| format!("{path} says nothing about `{kernel}`"))
        }
        false => {
            let line =
                printed.lines().find(|line| line.contains("error")).unwrap_or("no reason given");
            Err(format!("it does not compile the source: {line}"))
        }
    };
    let mix = found.is_ok().then(|| mix(&nvcc, &out, kernel)).flatten();
    let _ = std::fs::remove_file(&out); // in the folder for temporary files
    found.map(|found| Compiled { mix, ..found })
}

/// Whether a name of machine code, which may be mangled (`_Z7row_sumPfPKfi`), is the kernel's.
fn is_named(name: &str, kernel: &str) -> bool {
    name == kernel || name.starts_with(&format!("_Z{}{kernel}", kernel.len()))
}

fn parse(printed: &str, kernel: &str) -> Option<Compiled> {
    let all = ptxas::parse(printed);
    let own = all.into_iter().find(|of| is_named(&of.kernel, kernel))?;
    let spilled = own.spill_stores + own.spill_loads;
    Some(Compiled { registers: own.registers, shared: own.shared, spilled, mix: None })
}

fn mix(nvcc: &Nvcc, cubin: &Path, kernel: &str) -> Option<Counts> {
    let listing = nvcc.disassemble(cubin).ok()??;
    let mut all = sass::parse(&listing).into_iter();
    all.find(|code| is_named(&code.kernel, kernel)).map(|code| code.hot.counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptxas_is_read_by_kernel_mangled_or_not() {
        let printed = "ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_90a'\n\
            ptxas info    : Used 9 registers\n\
            ptxas info    : Compiling entry function '_Z7row_sumPfPKfi' for 'sm_90a'\n\
            ptxas info    : Function properties for _Z7row_sumPfPKfi\n\
            \x20   8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
            ptxas info    : Used 32 registers, used 1 barriers, 16 bytes smem\n";
        let found = parse(printed, "row_sum").unwrap();
        assert_eq!([found.registers, found.shared, found.spilled], [32, 16, 28]);
        assert_eq!(parse(printed, "other").unwrap().registers, 9);
        assert!(parse(printed, "sum").is_none());
    }
}

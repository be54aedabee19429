//! What nvcc says about a kernel, where there is one: the estimate on paper of `selfsup judge`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::device::Counts;
use crate::device::cuda::parse_sass;

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
    let nvcc = find().ok_or("there is none in NVCC, CUDA_HOME, PATH or .cuda")?;
    let out = std::env::temp_dir().join(format!("selfsup-judge-{}.cubin", std::process::id()));
    let mut command = Command::new(&nvcc);
    command.args(["-cubin", "-std=c++20", "-O3", "-arch=sm_90a", "-Xptxas", "-v", "-o"]);
    let output =
        command.arg(&out).arg(source).output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    let found = match output.status.success() {
        true => parse(&printed, kernel)
            .ok_or_else(|| format!("{} says nothing about `{kernel}`", nvcc.display())),
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

fn find() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(nvcc) = variable("NVCC") {
        return Some(PathBuf::from(nvcc)).filter(|nvcc| nvcc.is_file());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let homes = homes.map(|home| Path::new(&home).join("bin"));
    let path = variable("PATH").unwrap_or_default();
    homes
        .chain(std::env::split_paths(&path))
        .chain(["/usr/local/cuda/bin", ".cuda/nvidia/cu13/bin", ".cuda/bin"].map(PathBuf::from))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

/// Whether a name of machine code, which may be mangled (`_Z7row_sumPfPKfi`), is the kernel's.
fn is_named(name: &str, kernel: &str) -> bool {
    name == kernel || name.starts_with(&format!("_Z{}{kernel}", kernel.len()))
}

fn parse(printed: &str, kernel: &str) -> Option<Compiled> {
    let before = |line: &str, what: &str| -> usize {
        let number = line.split(what).next().filter(|_| line.contains(what));
        number.and_then(|n| n.trim_end().rsplit([' ', ',']).next()?.parse().ok()).unwrap_or(0)
    };
    let (mut own, mut spilled) = (false, 0);
    for line in printed.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            own = is_named(rest.split('\'').next()?, kernel);
        } else if own && line.contains("bytes spill stores") {
            spilled = before(line, "bytes spill stores") + before(line, "bytes spill loads");
        } else if own && line.contains("Used ") {
            let [registers, shared] = ["registers", "bytes smem"].map(|what| before(line, what));
            return Some(Compiled { registers, shared, spilled, mix: None });
        }
    }
    None
}

fn mix(nvcc: &Path, cubin: &Path, kernel: &str) -> Option<Counts> {
    let folder = nvcc.canonicalize().ok()?.parent()?.to_owned();
    let tool = folder.join("cuobjdump");
    // cuobjdump searches for nvdisasm there.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = [folder].into_iter().chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).ok()?;
    let output = Command::new(tool)
        .args([OsStr::new("-sass"), cubin.as_os_str()])
        .env("PATH", path)
        .output()
        .ok()?;
    let all = parse_sass(&String::from_utf8_lossy(&output.stdout));
    all.into_iter().find(|code| is_named(&code.kernel, kernel)).map(|code| code.hot.counts)
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

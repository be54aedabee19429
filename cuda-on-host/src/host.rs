//! Compiles kernels for the host, instrumented, and the engine that runs them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io};

use crate::source::Signature;

macro_rules! sources {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../", $name)))),*] };
}

/// The C++ side, by path below the crate.
pub const SOURCES: &[(&str, &str)] = sources![
    "engine/engine.h",
    "engine/fiber.cpp",
    "engine/fiber.h",
    "engine/harness.cpp",
    "engine/library.cpp",
    "engine/schedule.cpp",
    "engine/shadow.cpp",
    "include/asm_on_host.h",
    "include/cuda/cuda.h",
    "include/cuda/cuda_bf16.h",
    "include/cuda/cuda_runtime.h",
    "include/cuda/cuda_runtime_api.h",
    "include/cuda/device_launch_parameters.h",
    "include/cuda_on_host.h",
    "include/ptx_on_host.h",
    "include/standin.h",
    "include/standin_library.h",
];

/// Flags of a kernel library in both builds.
pub const KERNEL_FLAGS: &[&str] = &[
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-march=native",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-psabi",
];

/// Further flags of the plain build.
pub const PLAIN_FLAGS: &[&str] = &["-O3"];

/// Further flags of the instrumented build: callbacks before every access, and no optimisation that merges or splits accesses, or
/// that hides a static's address from them.
pub const CHECKED_FLAGS: &[&str] = &[
    "-O1",
    "-g1", // for line numbers in reports
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-fno-store-merging",
    "-fno-tree-sra",
    "-fno-ipa-reference-addressable",
    "-fno-ipa-reference",
];

/// What links a kernel library: it defines the sanitizer's callbacks itself, so the runtime is left out.
pub const LINK_FLAGS: &[&str] = &["-nostdlib", "-lstdc++", "-lm", "-lc"];

/// The end of a kernel file: its table of kernels.
pub fn table(kernels: &[Signature]) -> String {
    let mut text =
        "\n#include \"standin_library.h\"\nstatic constexpr standin::Entry ENTRIES[] = {\n"
            .to_owned();
    for Signature { name, bounds, .. } in kernels {
        let _ = writeln!(text, "    standin::entry<{name}>(\"{name}\", {bounds}),");
    }
    text + "};\nSTANDIN_LIBRARY(ENTRIES)\n"
}

/// How a kernel file is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Build {
    /// Instrumented for the shadow memory.
    pub checked: bool,
    /// With CUDA's own names only; else with `SELFSUP_ON_HOST` defined, for sources that choose the host's functions by it.
    pub foreign: bool,
}

/// A compiler with the engine, compiled.
#[derive(Debug)]
pub struct Host {
    compiler: PathBuf,
    /// Holds the sources and the harness.
    folder: PathBuf,
}

impl Host {
    /// Finds the compiler (`CXX`, else g++), and compiles the engine unless a folder of `cache` has it already.
    ///
    /// # Errors
    /// A sentence, if there is no compiler, it is no GCC, or the folder cannot be written.
    pub fn new(cache: &Path) -> Result<Self, String> {
        let compiler = env::var_os("CXX").filter(|name| !name.is_empty());
        let compiler = PathBuf::from(compiler.unwrap_or_else(|| "g++".into()));
        let version = Command::new(&compiler).arg("--version").output().map_err(|e| {
            format!("kernels are compiled by GCC, and `{}` does not start ({e}): install g++, or set CXX", compiler.display())
        })?;
        let mut key = hash(&version.stdout, 0);
        for (name, text) in SOURCES {
            key = hash(text.as_bytes(), hash(name.as_bytes(), key));
        }
        let host = Self { compiler, folder: cache.join(format!("host-{key:032x}")) };
        if !host.harness().is_file() {
            host.compile_engine(cache)?;
        }
        Ok(host)
    }

    /// The folder that a user's cache belongs in: `XDG_CACHE_HOME`, `~/.cache`, or the folder for temporary files.
    pub fn default_cache() -> PathBuf {
        let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = || set("HOME").map(|home| home.join(".cache"));
        set("XDG_CACHE_HOME").or_else(home).unwrap_or_else(env::temp_dir).join("cuda-on-host")
    }

    /// The program that holds a device.
    pub fn harness(&self) -> PathBuf {
        self.folder.join("harness")
    }

    /// A new empty folder next to the engine; the caller removes it.
    ///
    /// # Errors
    /// A sentence, if it cannot be made.
    pub fn new_folder(&self) -> Result<PathBuf, String> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("run-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = self.folder.with_file_name(name);
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(folder)
    }

    fn compile_engine(&self, cache: &Path) -> Result<(), String> {
        let said = |path: &Path, e: io::Error| format!("{}: {e}", path.display());
        // Under another name first: another process may be compiling the same.
        let unfinished = cache.join(format!(
            "{}.{}",
            self.folder.file_name().unwrap_or_default().display(),
            std::process::id()
        ));
        for (name, text) in SOURCES {
            let path = unfinished.join(name);
            let folder = path.parent().unwrap_or(&unfinished);
            fs::create_dir_all(folder).map_err(|e| said(folder, e))?;
            fs::write(&path, text).map_err(|e| said(&path, e))?;
        }
        let mut command = Command::new(&self.compiler);
        command.args(["-std=c++20", "-O2", "-Iinclude", "-o", "harness"]);
        command.args(
            ["fiber", "harness", "library", "schedule", "shadow"]
                .map(|f| format!("engine/{f}.cpp")),
        );
        run(command.arg("-ldl").current_dir(&unfinished)).map_err(|text| {
            format!(
                "the engine does not compile (it needs GCC 12 or newer on x86-64 Linux): {}",
                first_error(&text)
            )
        })?;
        match fs::rename(&unfinished, &self.folder) {
            Ok(()) => Ok(()),
            Err(_) if self.harness().is_file() => {
                let _ = fs::remove_dir_all(&unfinished); // the other process was first
                Ok(())
            }
            Err(e) => Err(said(&self.folder, e)),
        }
    }

    /// Compiles a kernel file, rewritten for the host, to a library at `to`. `path` is its name in reports, and headers are looked
    /// for next to it.
    ///
    /// # Errors
    /// The compiler's first error.
    pub fn compile(
        &self,
        path: &Path,
        text: &str,
        kernels: &[Signature],
        build: Build,
        to: &Path,
    ) -> Result<(), String> {
        let folder = to.parent().unwrap_or(Path::new("."));
        let write = |path: &Path, text: &str| {
            fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
        };
        // A file of its own name, so that reports have it.
        let name = path.file_name().unwrap_or_default().display().to_string();
        let rewritten = folder.join("rewritten");
        fs::create_dir_all(&rewritten).map_err(|e| format!("{}: {e}", rewritten.display()))?;
        write(&rewritten.join(&name), text)?;
        let first = match build.foreign {
            true => "#define STANDIN_FOREIGN\n#include \"asm_on_host.h\"",
            false => "#define SELFSUP_ON_HOST\n#include \"asm_on_host.h\"",
        };
        let source = to.with_extension("cpp");
        write(&source, &format!("{first}\n#include \"rewritten/{name}\"\n{}", table(kernels)))?;
        let mut command = Command::new(&self.compiler);
        let own = if build.checked { CHECKED_FLAGS } else { PLAIN_FLAGS };
        command.args(KERNEL_FLAGS).args(own).arg("-w");
        let beside = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        command.arg("-I").arg(beside.unwrap_or(Path::new(".")));
        for folder in ["include", "include/cuda"] {
            command.arg("-I").arg(self.folder.join(folder));
        }
        command.arg("-o").arg(to).arg(&source).args(LINK_FLAGS);
        run(&mut command).map_err(|text| {
            // As if the file had been compiled where it is.
            let rewritten = format!("{}/", rewritten.display());
            first_error(&text.replace(
                &rewritten,
                &beside.map_or(String::new(), |b| format!("{}/", b.display())),
            ))
        })
    }
}

/// Runs a compiler; the error is what it printed.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The line with the first error of a compiler's output.
fn first_error(text: &str) -> String {
    let line = text.lines().find(|line| line.contains("error"));
    line.or_else(|| text.lines().next()).unwrap_or("the compiler says nothing").trim().to_owned()
}

/// FNV-1a in 128 bits, which names files by their content.
fn hash(bytes: &[u8], start: u128) -> u128 {
    let start = if start == 0 { 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d } else { start };
    bytes.iter().fold(start, |hash, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b)
    })
}

//! Compiles `kernels/*.cu` with nvcc, embeds the results and generates a Rust launch function for each kernel; embeds the
//! recipes and studies of `recipes/`.
//!
//! Searches for nvcc in `$NVCC`, `$CUDA_HOME`, `$CUDA_PATH`, `PATH`, `/usr/local/cuda` and `.cuda/` (`scripts/fetch-nvcc`).
//! Without nvcc the build succeeds, with a warning, and has no kernels to run. The launch functions come from the sources
//! alone, so the rest of the program is the same in both cases.

#[path = "build/sass.rs"]
mod sass;
#[path = "build/signatures.rs"]
mod signatures;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use signatures::Kernel;

/// One kernel source.
struct File {
    /// The file name without folder and extension.
    name: String,
    path: PathBuf,
    kernels: Vec<Kernel>,
}

impl File {
    /// Whether the file uses instructions that only Hopper has, and is compiled for Hopper alone.
    fn is_hopper_only(&self) -> bool {
        self.name.ends_with("_sm90")
    }

    fn targets(&self) -> &'static [&'static str] {
        const HOPPER: &str = "-gencode=arch=compute_90a,code=sm_90a";
        // SASS for every 8.x chip, and PTX from which the driver compiles for later chips.
        const AMPERE: &str = "-gencode=arch=compute_80,code=[sm_80,compute_80]";
        if self.is_hopper_only() { &[HOPPER] } else { &[HOPPER, AMPERE] }
    }
}

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rustc-check-cfg=cfg(no_kernels)");
    println!("cargo::rerun-if-changed=recipes");
    println!("cargo::rustc-check-cfg=cfg(no_mpi)");
    println!("cargo::rustc-check-cfg=cfg(no_peers)");
    if !std::path::Path::new(".peers/libdnnl.so.3").is_file() {
        // The same for comparisons with reference libraries.
        println!("cargo::rustc-cfg=no_peers");
    }
    if !std::path::Path::new(".mpi/bin/mpiexec").is_file() {
        // Tests of several processes carry `cfg_attr(no_mpi, ignore = ...)`, so that they are counted as ignored.
        println!("cargo::rustc-cfg=no_mpi");
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let files = sources();
    let compiled = match find_nvcc() {
        Some(nvcc) => {
            println!("cargo::rerun-if-changed={}", nvcc.display());
            if !nvcc.with_file_name("cuobjdump").is_file() {
                println!(
                    "cargo::warning=found no cuobjdump next to nvcc: machine code is not checked; run scripts/fetch-nvcc to install it"
                );
            }
            Some(compile(&nvcc, &files, &out))
        }
        None => {
            println!(
                "cargo::warning=nvcc was not found: this build has no CUDA kernels and ignores the tests that need them; run scripts/fetch-nvcc"
            );
            // Tests that need kernels carry `cfg_attr(no_kernels, ignore = ...)`, so that they are counted as ignored.
            println!("cargo::rustc-cfg=no_kernels");
            None
        }
    };
    fs::write(out.join("kernels.rs"), rust(&files, compiled.as_ref()))
        .expect("OUT_DIR is writable");
    let recipes = embedded("RECIPES", "recipes") + &embedded("STUDIES", "recipes/studies");
    fs::write(out.join("recipes.rs"), recipes).expect("OUT_DIR is writable");
}

/// The files of `folder` that end in `suffix`, sorted.
fn files_in(folder: &str, suffix: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{folder}/ belongs next to build.rs: {e}"))
        .map(|entry| entry.unwrap_or_else(|e| panic!("{folder}/ is unreadable: {e}")).path())
        .filter(|path| path.extension().is_some_and(|e| e == suffix))
        .collect();
    paths.sort();
    paths
}

/// A table of the names and texts of the TOML files in `folder`, as Rust.
fn embedded(table: &str, folder: &str) -> String {
    let root =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let row = |path: PathBuf| {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        format!("    ({name:?}, include_str!({:?})),\n", root.join(path))
    };
    // By name: with their suffix, `x-small.toml` would come before `x.toml`.
    let rows: BTreeSet<String> = files_in(folder, "toml").into_iter().map(row).collect();
    let rows: String = rows.into_iter().collect();
    format!("const {table}: &[(&str, &str)] = &[\n{rows}];\n")
}

fn sources() -> Vec<File> {
    let paths = files_in("kernels", "cu");
    let mut names = BTreeSet::new();
    let file = |path: PathBuf| {
        let source = fs::read_to_string(&path).expect("a readable kernel source");
        let kernels = signatures::parse(&source)
            .unwrap_or_else(|reason| panic!("{}: {reason}", path.display()));
        for Kernel { name, .. } in &kernels {
            assert!(names.insert(name.clone()), "{}: two kernels are named {name}", path.display());
        }
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        File { name, path, kernels }
    };
    paths.into_iter().map(file).collect()
}

fn find_nvcc() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = variable("NVCC") {
        // `NVCC=none` builds without kernels on purpose.
        assert!(nvcc.is_file() || nvcc.as_os_str() == "none", "NVCC: no file {}", nvcc.display());
        return nvcc.is_file().then_some(nvcc);
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|h| h.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .chain(["/usr/local/cuda/bin", ".cuda/nvidia/cu13/bin", ".cuda/bin"].map(PathBuf::from))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .and_then(|nvcc| nvcc.canonicalize().ok())
}

/// The output of nvcc for all files.
struct Compiled {
    /// The compiler version, as it prints it.
    version: String,
    /// One per source file, in order.
    files: Vec<CompiledFile>,
}

/// A compiled file.
struct CompiledFile {
    fatbin: PathBuf,
    /// What `ptxas -v` printed about its kernels.
    printed: String,
    /// The instruction counts of each kernel and chip, as Rust; empty without a disassembler.
    mixes: BTreeMap<(String, String), String>,
}

fn compile(nvcc: &Path, files: &[File], out: &Path) -> Compiled {
    let version = run(Command::new(nvcc).arg("--version")).0;
    let version = version.lines().last().unwrap_or_default().trim().to_owned();
    // Shared by all profiles: OUT_DIR is <target>/<profile>/build/<package>/out.
    let cache = out.ancestors().nth(4).unwrap_or(out).join("kernels");
    fs::create_dir_all(&cache).expect("the target folder is writable");
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((i, file)) = Some(next.fetch_add(1, Ordering::Relaxed))
            .and_then(|i| files.get(i).map(|file| (i, file)))
        {
            done.push((i, compile_one(nvcc, &version, file, &cache)));
        }
        done
    };
    let mut done: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        // A thread that panicked has already printed nvcc's message.
        threads.into_iter().flat_map(|t| t.join().expect("a kernel does not compile")).collect()
    });
    done.sort_by_key(|(i, _)| *i);
    Compiled { version, files: done.into_iter().map(|(_, file)| file).collect() }
}

fn compile_one(nvcc: &Path, version: &str, file: &File, cache: &Path) -> CompiledFile {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-Ikernels"]);
    command.args(file.targets()).arg(&file.path);
    let mut content = format!("{version}\n{:?}\n", command.get_args().collect::<Vec<_>>());
    let mut seen = BTreeSet::new();
    with_headers(&file.path, &mut seen, &mut content);
    let stem = cache.join(format!("{}-{:032x}", file.name, hash(content.as_bytes())));
    let (fatbin, log) = (stem.with_extension("fatbin"), stem.with_extension("log"));
    if let (true, Ok(printed)) = (fatbin.is_file(), fs::read_to_string(&log)) {
        let mixes = disassemble(nvcc, &fatbin);
        return CompiledFile { fatbin, printed, mixes };
    }
    // Written under a unique name first: another build may be writing the same file.
    let unfinished = stem.with_extension(format!("{}.new", std::process::id()));
    let printed = run(command.arg("-o").arg(&unfinished)).1;
    for line in printed.lines().filter(|l| l.contains("warning")) {
        println!("cargo::warning={}: {line}", file.path.display());
    }
    fs::write(&log, &printed).expect("the target folder is writable");
    fs::rename(&unfinished, &fatbin).expect("the target folder is writable");
    let mixes = disassemble(nvcc, &fatbin);
    CompiledFile { fatbin, printed, mixes }
}

/// Returns the instruction counts of a fatbin by kernel and chip; empty if there is no `cuobjdump` next to nvcc. Cached next
/// to the fatbin: a disassembly takes seconds.
fn disassemble(nvcc: &Path, fatbin: &Path) -> BTreeMap<(String, String), String> {
    let folder = nvcc.parent().unwrap_or(nvcc);
    let tool = folder.join("cuobjdump");
    if !tool.is_file() {
        return BTreeMap::new();
    }
    let model = [&include_bytes!("build/sass.rs")[..], include_bytes!("build/scoreboard.rs")];
    let cached = fatbin.with_extension(format!("{:x}.mix", hash(&model.concat())));
    let text = fs::read_to_string(&cached).unwrap_or_else(|_| {
        // cuobjdump searches for nvdisasm there.
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = [folder.to_owned()].into_iter().chain(env::split_paths(&path));
        let path = env::join_paths(folders).expect("folders of PATH");
        let listing = run(Command::new(&tool).arg("-sass").arg(fatbin).env("PATH", path)).0;
        let line = |code: &sass::Code| {
            let (whole, hot, epilogues) = (code.whole, code.hot, code.epilogues);
            format!(
                "{} {} Mix {{ whole: {whole:?}, hot: {:?}, hot_cycles: {:?}, epilogues: {:?}, epilogue_cycles: {:?}, prologue: {} }}\n",
                code.kernel,
                code.chip,
                hot.counts,
                hot.cycles,
                epilogues.map(|epilogue| epilogue.counts),
                epilogues.map(|epilogue| epilogue.cycles),
                code.prologue
            )
        };
        let text: String = sass::parse(&listing).iter().map(line).collect();
        fs::write(&cached, &text).expect("the target folder is writable");
        text
    });
    let parts = |line: &str| {
        let (kernel, rest) = line.split_once(' ')?;
        let (chip, mix) = rest.split_once(' ')?;
        Some(((kernel.to_owned(), chip.to_owned()), mix.to_owned()))
    };
    text.lines().filter_map(parts).collect()
}

/// Appends a source and the project's headers that it includes, each once.
fn with_headers(path: &Path, seen: &mut BTreeSet<PathBuf>, content: &mut String) {
    let Ok(source) = fs::read_to_string(path) else { return };
    if !seen.insert(path.to_owned()) {
        return;
    }
    for line in source.lines() {
        let included =
            line.trim_start().strip_prefix("#include \"").and_then(|l| l.split('"').next());
        if let (Some(name), Some(folder)) = (included, path.parent()) {
            with_headers(&folder.join(name), seen, content);
        }
    }
    content.push_str(&source);
}

/// FNV-1a in 128 bits, which names cached files by their content.
fn hash(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b)
    })
}

/// Runs a command that must succeed; returns its standard output and standard error.
fn run(command: &mut Command) -> (String, String) {
    let output =
        command.output().unwrap_or_else(|e| panic!("cannot run {:?}: {e}", command.get_program()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{}{}", printed.0, printed.1);
    printed
}

/// Returns the generated part of `device::cuda::kernels`.
fn rust(files: &[File], compiled: Option<&Compiled>) -> String {
    let mut code = String::new();
    let mut functions = String::new();
    let version = compiled.map(|c| c.version.as_str());
    let _ = writeln!(code, "/// The compiler of the kernels; `None` in a build without nvcc.");
    let _ = writeln!(code, "pub(crate) static COMPILER: Option<&str> = {version:?};");
    let _ = writeln!(code, "pub(crate) static FILES: &[File] = &[");
    for (i, file) in files.iter().enumerate() {
        let image = compiled.map_or("&[]".to_owned(), |c| {
            format!("&Aligned(*include_bytes!({:?})).0", c.files[i].fatbin.display().to_string())
        });
        let (name, hopper) = (&file.name, file.is_hopper_only());
        let _ =
            writeln!(code, "    File {{ name: {name:?}, hopper_only: {hopper}, image: {image} }},");
    }
    let _ = writeln!(code, "];\npub(crate) static KERNELS: &[Kernel] = &[");
    let mut index = 0;
    for (i, file) in files.iter().enumerate() {
        for kernel in &file.kernels {
            let sizes: Vec<usize> = kernel.arguments.iter().map(|a| a.kind.size()).collect();
            let name = &kernel.name;
            let _ =
                writeln!(code, "    Kernel {{ name: {name:?}, file: {i}, sizes: &{sizes:?} }},");
            functions.push_str(&signatures::launch_function(kernel, index, &file.name));
            index += 1;
        }
    }
    let _ = writeln!(code, "];\npub(crate) static RESOURCES: &[Resources] = &[");
    for file in compiled.iter().flat_map(|c| &c.files) {
        code.push_str(&resources(file));
    }
    let _ = writeln!(code, "];\n");
    code + &functions
}

/// Converts what `ptxas -v` printed about each kernel on each chip to Rust.
fn resources(CompiledFile { printed, mixes, .. }: &CompiledFile) -> String {
    let mut code = String::new();
    // "Compiling entry function 'name' for 'sm_80'", "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
    // "Used 10 registers, used 1 barriers, 1024 bytes smem"
    let before = |line: &str, what: &str| -> usize {
        let number = line.split(what).next().filter(|_| line.contains(what));
        number.and_then(|n| n.trim_end().rsplit([' ', ',']).next()?.parse().ok()).unwrap_or(0)
    };
    let (mut entry, mut memory) = (None, String::new());
    for line in printed.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut quoted = rest.split('\'');
            entry = quoted.next().zip(quoted.nth(1));
        } else if line.contains("bytes stack frame") && entry.is_some() {
            let [stack, stores, loads] =
                ["bytes stack frame", "bytes spill stores", "bytes spill loads"]
                    .map(|what| before(line, what));
            memory = format!("stack: {stack}, spill_stores: {stores}, spill_loads: {loads}");
        } else if line.contains("Used ")
            && let Some((kernel, chip)) = entry.take()
        {
            let [registers, shared] = ["registers", "bytes smem"].map(|what| before(line, what));
            let mix = mixes.get(&(kernel.to_owned(), chip.to_owned()));
            let mix = mix.map_or("None".to_owned(), |mix| format!("Some({mix})"));
            let _ = writeln!(
                code,
                "    Resources {{ kernel: {kernel:?}, chip: {chip:?}, registers: {registers}, shared: {shared}, {memory}, mix: {mix} }},"
            );
        }
    }
    code
}

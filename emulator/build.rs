//! Compiles the engine, and compiles every kernel file of the repository for the host twice: plain, and instrumented for the
//! shadow memory. Each result is a separate shared object, so that its thread-local segment is the static shared memory of its
//! kernels. The driver embeds all of them. In a package, without the repository around it, there are none: programs then name
//! their kernels in `SELFSUP_STAND_IN_SOURCES`.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use cuda_on_host::host::{CHECKED_FLAGS, KERNEL_FLAGS, LINK_FLAGS, PLAIN_FLAGS, SOURCES, table};
use cuda_on_host::source::{self, Signature};

/// A kernel file.
struct Source {
    path: PathBuf,
    /// Part of the product, not of the driver's own tests.
    shipped: bool,
    kernels: Vec<Signature>,
}

/// Where the build finds and leaves files.
struct Folders {
    here: PathBuf,
    out: PathBuf,
    /// The C++ side of `cuda-on-host`.
    host: PathBuf,
}

fn main() {
    println!("cargo::rerun-if-env-changed={MARCH}");
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let folders = Folders { host: out.join("host"), here, out };
    for path in ["../kernels", "broken", "build.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    let mut headers = DefaultHasher::new();
    for (name, text) in SOURCES {
        let path = folders.host.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("OUT_DIR is writable");
        fs::write(path, text).expect("OUT_DIR is writable");
        if name.starts_with("include/") {
            text.hash(&mut headers);
        }
    }
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .debug(false)
        .include(folders.host.join("include"))
        .files(
            ["fiber", "schedule", "shadow", "library"]
                .map(|f| folders.host.join(format!("engine/{f}.cpp"))),
        )
        .compile("standin_engine");

    let kernels = folders.here.join("../kernels");
    let mut sources = Vec::new();
    for (folder, shipped) in [(&kernels, true), (&folders.here.join("broken"), false)] {
        // Those for this driver's tests include headers of the repository's kernels.
        for path in files(folder, "cu").into_iter().filter(|_| kernels.is_dir()) {
            let text = fs::read_to_string(&path).expect("a readable kernel file");
            let kernels = source::kernels(&text);
            let kernels =
                kernels.unwrap_or_else(|e| panic!("{}:{}: {}", path.display(), e.line, e.what));
            sources.push(Source { kernels, path, shipped });
        }
        for path in files(folder, "cuh") {
            fs::read(path).expect("a readable header").hash(&mut headers);
        }
    }
    let headers = headers.finish();

    let compiler = cc::Build::new().cpp(true).get_compiler();
    let jobs: Vec<(&Source, bool)> = sources
        .iter()
        .flat_map(|s| [(s, false), (s, true)])
        .filter(|(s, _)| !s.kernels.is_empty())
        .collect();
    let (next, objects) = (AtomicUsize::new(0), Mutex::new(vec![PathBuf::new(); jobs.len()]));
    let workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some((source, checked)) = jobs.get(i) else { break };
                    let object = compile(compiler.path(), source, *checked, headers, &folders);
                    objects.lock().expect("no compiler panicked")[i] = object;
                }
            });
        }
    });

    let objects = objects.into_inner().expect("no compiler panicked");
    let mut table =
        format!("/// All kernel files.\npub(crate) static FILES: [File; {}] = [\n", jobs.len() / 2);
    for (pair, job) in objects.chunks(2).zip(jobs.iter().step_by(2)) {
        let names: Vec<&str> = job.0.kernels.iter().map(|k| k.name.as_str()).collect();
        writeln!(
            table,
            "    File {{ name: c{:?}, shipped: {}, kernels: &{names:?}, code: Code::Embedded([include_bytes!({:?}), include_bytes!({:?})]), loaded: [OnceLock::new(), OnceLock::new()] }},",
            stem(&job.0.path),
            job.0.shipped,
            pair[0],
            pair[1],
        )
        .expect("writing to a string succeeds");
    }
    table.push_str("];\n");
    fs::write(folders.out.join("files.rs"), table).expect("OUT_DIR is writable");
}

/// The processor that kernels are compiled for, in place of the one that builds: for a library that is carried to another machine.
const MARCH: &str = "SELFSUP_STAND_IN_MARCH";

fn stem(path: &Path) -> String {
    path.file_stem().expect("a file").to_string_lossy().into_owned()
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    all.sort();
    all
}

/// Compiles one kernel file to a shared object, or reuses the one built from the same text and flags.
fn compile(
    compiler: &Path,
    source: &Source,
    checked: bool,
    headers: u64,
    folders: &Folders,
) -> PathBuf {
    let path = source.path.canonicalize().expect("it was read");
    let wrapper = format!("#include \"{}\"\n{}", path.display(), table(&source.kernels));
    let own = if checked { CHECKED_FLAGS } else { PLAIN_FLAGS };
    let mut flags: Vec<&str> =
        KERNEL_FLAGS.iter().chain(own).chain(&["-DSELFSUP_ON_HOST"]).copied().collect();
    // Of two, the compiler takes the last.
    let march = env::var(MARCH).ok().map(|of| format!("-march={of}"));
    flags.extend(march.as_deref());

    let mut key = DefaultHasher::new();
    (headers, &wrapper, &flags, fs::read(&source.path).expect("a readable kernel file"))
        .hash(&mut key);
    let mode = if checked { "checked" } else { "plain" };
    let object =
        folders.out.join(format!("{}-{mode}-{:016x}.so", stem(&source.path), key.finish()));
    if object.exists() {
        return object;
    }
    let cpp = object.with_extension("cpp");
    fs::write(&cpp, wrapper).expect("OUT_DIR is writable");
    let unfinished = object.with_extension("part");
    let status = Command::new(compiler)
        .args(flags)
        .arg(format!("-I{}", source.path.parent().expect("a folder").display()))
        .arg(format!("-I{}", folders.here.join("../kernels").display()))
        .arg(format!("-I{}", folders.host.join("include").display()))
        .arg("-o")
        .arg(&unfinished)
        .arg(&cpp)
        .args(LINK_FLAGS)
        .status()
        .expect("the C++ compiler starts");
    assert!(status.success(), "{} does not compile for the host", source.path.display());
    fs::rename(&unfinished, &object).expect("OUT_DIR is writable");
    object
}

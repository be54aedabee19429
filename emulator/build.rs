//! Compiles the engine, and compiles every kernel file for the host twice: plain, and instrumented for the shadow memory.
//! Each result is a separate shared object, so that its thread-local segment is the static shared memory of its kernels.
//! The driver embeds all of them.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

const BOTH: &[&str] = &[
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-march=native",
    "-DSELFSUP_ON_HOST",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-psabi",
];

const PLAIN: &[&str] = &["-O3"];

/// Callbacks before every access, and no optimisation that merges or splits accesses, or that hides a static's address
/// from them.
const CHECKED: &[&str] = &[
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

/// A kernel file.
struct Source {
    path: PathBuf,
    /// Part of the product, not of the driver's own tests.
    shipped: bool,
    /// Name and launch bounds (threads per block) of each kernel.
    kernels: Vec<(String, String)>,
}

fn main() {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let kernels = here.join("../kernels").canonicalize().expect("the repository has kernels/");
    let watched = [
        kernels.clone(),
        here.join("broken"),
        here.join("include"),
        here.join("engine"),
        here.join("build.rs"),
    ];
    for path in &watched {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");

    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .debug(false)
        .include(here.join("include"))
        .files(
            ["fiber", "schedule", "shadow", "library"]
                .map(|f| here.join(format!("engine/{f}.cpp"))),
        )
        .compile("standin_engine");

    let mut sources = Vec::new();
    for (folder, shipped) in [(&kernels, true), (&here.join("broken"), false)] {
        for path in files(folder, "cu") {
            let text = fs::read_to_string(&path).expect("a readable kernel file");
            sources.push(Source { kernels: entry_points(&text), path, shipped });
        }
    }
    let mut headers = DefaultHasher::new();
    for folder in [&kernels, &here.join("include"), &here.join("broken")] {
        for path in files(folder, "h").into_iter().chain(files(folder, "cuh")) {
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
                    let object = compile(compiler.path(), source, *checked, headers, &here, &out);
                    objects.lock().expect("no compiler panicked")[i] = object;
                }
            });
        }
    });

    let objects = objects.into_inner().expect("no compiler panicked");
    let mut table =
        format!("/// All kernel files.\npub(crate) static FILES: [File; {}] = [\n", jobs.len() / 2);
    for (pair, job) in objects.chunks(2).zip(jobs.iter().step_by(2)) {
        let names: Vec<&str> = job.0.kernels.iter().map(|k| k.0.as_str()).collect();
        writeln!(
            table,
            "    File {{ name: c{:?}, shipped: {}, kernels: &{names:?}, plain: include_bytes!({:?}), checked: include_bytes!({:?}), loaded: [OnceLock::new(), OnceLock::new()] }},",
            stem(&job.0.path),
            job.0.shipped,
            pair[0],
            pair[1],
        )
        .expect("writing to a string succeeds");
    }
    table.push_str("];\n");
    fs::write(out.join("files.rs"), table).expect("OUT_DIR is writable");
}

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

/// Name and launch bounds of each `KERNEL [BOUNDS(threads)] void name(` line.
fn entry_points(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("KERNEL ")) {
        let (bounds, rest) = match line.strip_prefix("BOUNDS(") {
            Some(rest) => rest.split_once(") ").expect("KERNEL BOUNDS(threads) void name("),
            None => ("1024", line),
        };
        let name =
            rest.strip_prefix("void ").and_then(|r| r.split_once('(')).expect("KERNEL void name(");
        let threads = bounds.split(',').next().expect("at least one bound");
        found.push((name.0.trim().to_owned(), threads.trim().to_owned()));
    }
    found
}

/// Compiles one kernel file to a shared object, or reuses the one built from the same text and flags.
fn compile(
    compiler: &Path,
    source: &Source,
    checked: bool,
    headers: u64,
    here: &Path,
    out: &Path,
) -> PathBuf {
    let mut wrapper =
        format!("#include \"{}\"\n#include \"standin_library.h\"\n", source.path.display());
    wrapper.push_str("static constexpr standin::Entry ENTRIES[] = {\n");
    for (name, bounds) in &source.kernels {
        writeln!(wrapper, "    standin::entry<{name}>(\"{name}\", {bounds}),")
            .expect("writing to a string succeeds");
    }
    wrapper.push_str("};\nSTANDIN_LIBRARY(ENTRIES)\n");
    let flags: Vec<&str> =
        BOTH.iter().chain(if checked { CHECKED } else { PLAIN }).copied().collect();

    let mut key = DefaultHasher::new();
    (headers, &wrapper, &flags, fs::read(&source.path).expect("a readable kernel file"))
        .hash(&mut key);
    let mode = if checked { "checked" } else { "plain" };
    let object = out.join(format!("{}-{mode}-{:016x}.so", stem(&source.path), key.finish()));
    if object.exists() {
        return object;
    }
    let cpp = object.with_extension("cpp");
    fs::write(&cpp, wrapper).expect("OUT_DIR is writable");
    let unfinished = object.with_extension("part");
    let status = Command::new(compiler)
        .args(flags)
        .arg(format!("-I{}", source.path.parent().expect("a folder").display()))
        .arg(format!("-I{}", here.join("../kernels").display()))
        .arg(format!("-I{}", here.join("include").display()))
        .arg("-o")
        .arg(&unfinished)
        .arg(&cpp)
        // The library defines the callbacks itself, so the sanitizer's runtime is not linked.
        .args(["-nostdlib", "-lstdc++", "-lm", "-lc"])
        .status()
        .expect("the C++ compiler starts");
    assert!(status.success(), "{} does not compile for the host", source.path.display());
    fs::rename(&unfinished, &object).expect("OUT_DIR is writable");
    object
}

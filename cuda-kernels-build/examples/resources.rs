//! Compiles a folder of kernels and prints what each uses: `cargo run --example resources -- FOLDER [GENCODE…]`.

use std::path::Path;

use cuda_kernels_build::{Build, Error, nvcc};

fn main() -> Result<(), Error> {
    let mut words = std::env::args().skip(1);
    let Some(folder) = words.next() else {
        eprintln!("usage: resources FOLDER [arch=compute_80,code=sm_80 …]");
        std::process::exit(2);
    };
    let targets: Vec<String> = words.collect();
    let mut build = Build::new(&folder);
    if !targets.is_empty() {
        build = build.targets(targets.iter().map(String::as_str));
    }
    let root = Path::new(&folder).canonicalize().unwrap_or_default();
    let found = nvcc::find(&root)?;
    if found.is_none() {
        eprintln!("nvcc was not found: set NVCC to its path, or to `fetch`");
        std::process::exit(1);
    }
    let cache = std::env::temp_dir().join("cuda-kernels-build");
    let jobs = std::thread::available_parallelism().map_or(1, Into::into);
    let kernels = build.compile(found.as_deref(), &cache, jobs)?;
    for warning in &kernels.warnings {
        eprintln!("warning: {warning}");
    }
    println!(
        "{:32} {:8} {:>9} {:>7} {:>6} {:>6} {:>6} {:>9} {:>5} {:>9}",
        "kernel",
        "chip",
        "registers",
        "shared",
        "stack",
        "spills",
        "code",
        "hot loop",
        "mma",
        "16 bytes"
    );
    for file in &kernels.files {
        for of in &file.resources {
            let code = file.code.iter().find(|c| c.kernel == of.kernel && c.chip == of.chip);
            let count = |which: fn(&cuda_kernels_build::sass::Code) -> usize| {
                code.map_or("?".to_owned(), |code| which(code).to_string())
            };
            println!(
                "{:32} {:8} {:9} {:7} {:6} {:6} {:>6} {:>9} {:>5} {:>9}",
                of.kernel,
                of.chip,
                of.registers,
                of.shared,
                of.stack,
                of.spill_stores + of.spill_loads,
                count(|code| code.whole.all),
                count(|code| code.hot.counts.all),
                count(|code| code.hot.counts.mma),
                count(|code| code.hot.counts.global_16)
            );
        }
    }
    Ok(())
}

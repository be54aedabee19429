//! Compiles `kernels/*.cu` and generates a Rust launch function for each kernel, with `cuda-kernels-build`; embeds the recipes and studies
//! of `recipes/`.
//!
//! Without nvcc the build succeeds, with a warning, and has no kernels to run. The launch functions come from the sources alone, so the
//! rest of the program is the same in both cases.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{env, fs};

use cuda_kernels_build::{Build, Error, Launches};

const HOPPER: &str = "arch=compute_90a,code=sm_90a";
/// Machine code for further chips, such as `sm_100,sm_120`. Without it the driver compiles the PTX for them at the first use, which
/// takes some 20 seconds. Not in every build: these two need half a minute of nvcc's time, and make the program 29 MB larger.
const CHIPS: &str = "SELFSUP_CHIPS";

fn main() -> Result<(), Error> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=recipes");
    println!("cargo::rustc-check-cfg=cfg(no_mpi)");
    println!("cargo::rustc-check-cfg=cfg(no_peers)");
    if !Path::new(".peers/libdnnl.so.3").is_file() {
        // The same for comparisons with reference libraries.
        println!("cargo::rustc-cfg=no_peers");
    }
    if !Path::new(".mpi/bin/mpiexec").is_file() {
        // Tests of several processes carry `cfg_attr(no_mpi, ignore = ...)`, so that they are counted as ignored.
        println!("cargo::rustc-cfg=no_mpi");
    }
    println!("cargo::rerun-if-env-changed={CHIPS}");
    // SASS for every 8.x chip and those that are asked for, and PTX from which the driver compiles for later chips.
    let ampere = format!("arch=compute_80,code=[{}compute_80]", chips(&["sm_80"]));
    Build::new("kernels")
        .targets([HOPPER, &ampere])
        // These use instructions that only Hopper has.
        .targets_of("_sm90", [HOPPER])
        .flags(["-std=c++20", "-O3", "-lineinfo"])
        .macros("KERNEL", "BOUNDS")
        .launches(Launches::Own)
        // They carry `cfg_attr(no_kernels, ignore = ...)`, so that they are counted as ignored.
        .hint("it ignores the tests that need them; run scripts/fetch-nvcc")
        .emit()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let recipes = embedded("RECIPES", "recipes") + &embedded("STUDIES", "recipes/studies");
    fs::write(out.join("recipes.rs"), recipes).expect("OUT_DIR is writable");
    Ok(())
}

/// A list of `usual` chips and those that are asked for, for nvcc: each with a comma behind it.
fn chips(usual: &[&str]) -> String {
    let asked = env::var(CHIPS).unwrap_or_default();
    let asked = asked.split(',').map(str::trim).filter(|chip| !chip.is_empty());
    let mut list = String::new();
    for chip in usual.iter().copied().chain(asked) {
        let number = chip.strip_prefix("sm_").and_then(|number| number.parse::<u32>().ok());
        assert!(number.is_some(), "{CHIPS}: `{chip}` is no chip like sm_120");
        list += &format!("{chip},");
    }
    list
}

/// A table of the names and texts of the TOML files in `folder`, as Rust.
fn embedded(table: &str, folder: &str) -> String {
    let root =
        PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let entries =
        fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder}/ belongs next to build.rs: {e}"));
    let paths = entries
        .map(|entry| entry.unwrap_or_else(|e| panic!("{folder}/ is unreadable: {e}")).path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"));
    let row = |path: PathBuf| {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        format!("    ({name:?}, include_str!({:?})),\n", root.join(path))
    };
    // By name: with their suffix, `x-small.toml` would come before `x.toml`.
    let rows: BTreeSet<String> = paths.map(row).collect();
    let rows: String = rows.into_iter().collect();
    format!("const {table}: &[(&str, &str)] = &[\n{rows}];\n")
}

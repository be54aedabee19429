//! The part of a build that speaks with cargo.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::build::{Build, Kernels};
use crate::error::{Error, Result};
use crate::nvcc;

impl Build {
    /// Builds in a build script: finds nvcc, compiles, writes `kernels.rs` into `OUT_DIR`, and tells cargo when to do so again. In a
    /// build without nvcc, which is a warning, it sets the `cfg` `no_kernels`, for tests to be ignored by.
    ///
    /// # Errors
    /// As [`Build::compile`], without nvcc if one is [required](Build::required), and if `NVCC` names no file.
    pub fn emit(&self) -> Result<Kernels> {
        println!("cargo::rustc-check-cfg=cfg(no_kernels)");
        for folder in [&self.folder].into_iter().chain(&self.include) {
            println!("cargo::rerun-if-changed={}", folder.display());
        }
        for variable in nvcc::VARIABLES {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let variable = |name: &str| {
            let value = env::var_os(name).map(PathBuf::from);
            value.ok_or_else(|| {
                Error::new(format!("{name} is not set: this belongs into a build script"))
            })
        };
        let (out, root) = (variable("OUT_DIR")?, variable("CARGO_MANIFEST_DIR")?);
        let found = nvcc::find(&root)?;
        match &found {
            Some(nvcc) => println!("cargo::rerun-if-changed={}", nvcc.display()),
            None if self.required => {
                return Err(Error::new(format!("nvcc was not found: {}", self.hint)));
            }
            None => {
                println!("cargo::rustc-cfg=no_kernels");
                println!(
                    "cargo::warning=nvcc was not found: this build has no CUDA kernels; {}",
                    self.hint
                );
            }
        }
        let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
        let kernels = self.compile(found.as_deref(), &shared(&out), jobs)?;
        for warning in &kernels.warnings {
            println!("cargo::warning={warning}");
        }
        let path = out.join("kernels.rs");
        fs::write(&path, kernels.rust(self.launches))
            .map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
        Ok(kernels)
    }
}

/// The folder of compiled files: next to the profiles' folders, which share it, as `OUT_DIR` is TARGET/PROFILE/build/PACKAGE/out.
/// In another arrangement it is `OUT_DIR` itself.
fn shared(out: &Path) -> PathBuf {
    let above: Vec<&Path> = out.ancestors().take(5).collect();
    match above[..] {
        [_, _, build, _, target] if build.ends_with("build") => target.join("kernels"),
        _ => out.join("kernels"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_share_what_is_compiled() {
        let shared = |out: &str| shared(Path::new(out));
        assert_eq!(shared("/t/debug/build/a-1/out"), Path::new("/t/kernels"));
        assert_eq!(shared("/t/release/build/a-2/out"), Path::new("/t/kernels"));
        assert_eq!(shared("/elsewhere/out"), Path::new("/elsewhere/out/kernels"));
        assert_eq!(shared("/t/x/y/z/out"), Path::new("/t/x/y/z/out/kernels"));
    }
}

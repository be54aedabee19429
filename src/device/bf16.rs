//! The instructions of the CPU's bf16 kernels, chosen once per process.

use std::env::VarError;
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// How the processor multiplies bf16 matrices. All ways round operands and results alike; sums of products are in f32 and
/// differ in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bf16Path {
    /// The f32 kernels on widened operands: any processor. Correct, and slower than f32 itself.
    Portable,
    /// Intel's AMX tiles: x86-64 Linux on Sapphire Rapids or later.
    Amx,
}

impl Bf16Path {
    /// The way that this process uses: `SELFSUP_BF16` (`portable` or `amx`) if it is set, otherwise the fastest of the
    /// machine. The variable is read once.
    ///
    /// # Errors
    /// If `SELFSUP_BF16` names an unknown way, or one that the machine lacks.
    pub fn selected() -> Result<Bf16Path> {
        static SELECTED: OnceLock<Result<Bf16Path, String>> = OnceLock::new();
        let selected = SELECTED.get_or_init(|| match std::env::var("SELFSUP_BF16") {
            Ok(name) => Bf16Path::named(&name),
            Err(VarError::NotPresent) => Ok(Bf16Path::best()),
            Err(VarError::NotUnicode(name)) => Bf16Path::named(&name.to_string_lossy()),
        });
        selected.clone().map_err(Error::Config)
    }

    /// [`Bf16Path::selected`] for kernels, which return no errors. Making a CPU device in bf16 has reported the error before.
    ///
    /// # Panics
    /// If [`Bf16Path::selected`] fails.
    pub fn current() -> Bf16Path {
        Bf16Path::selected().unwrap_or_else(|e| panic!("{e}"))
    }

    /// The instructions that make bf16 faster than f32, by name; none where it is slower.
    pub fn instructions(self) -> Option<&'static str> {
        match self {
            Bf16Path::Portable => None,
            Bf16Path::Amx => Some("AMX"),
        }
    }

    fn named(name: &str) -> Result<Bf16Path, String> {
        let path = match name {
            "portable" => Bf16Path::Portable,
            "amx" => Bf16Path::Amx,
            _ => {
                return Err(format!(
                    "SELFSUP_BF16 is `{}`: set it to portable or amx, or unset it",
                    name.escape_debug()
                ));
            }
        };
        if path.is_available() {
            return Ok(path);
        }
        Err(format!("SELFSUP_BF16 is `{name}`, which this machine does not support: unset it"))
    }

    /// Whether this machine can compute in this way.
    pub fn is_available(self) -> bool {
        match self {
            Bf16Path::Portable => true,
            Bf16Path::Amx => has_tiles(),
        }
    }

    fn best() -> Bf16Path {
        if Bf16Path::Amx.is_available() { Bf16Path::Amx } else { Bf16Path::Portable }
    }
}

/// Whether the processor has tiles for bf16 and the kernel lets this process use them. Linux gives the permission to a process
/// that asks, and to all its threads, those that exist already too; it is asked for once. A refusal is no error.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_tiles() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and `XFEATURE_XTILEDATA` of Linux's `arch_prctl`.
    const REQUEST_PERMISSION: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        // The kernels around the tiles use AVX2 and FMA.
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return false;
        }
        // A leaf that a processor lacks reads as something else; every processor with AVX2 has this one.
        #[allow(unused_unsafe, reason = "safe since Rust 1.94")]
        // SAFETY: every x86-64 processor has the instruction.
        let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) }.edx;
        let (bf16, tiles) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
        // SAFETY: this call reads two integers and changes nothing but the process's permission.
        bf16 && tiles
            && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
    })
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn has_tiles() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_ways_are_checked() {
        assert_eq!(Bf16Path::named("portable"), Ok(Bf16Path::Portable));
        for name in ["AMX", "", "amx ", "\u{1b}[2J"] {
            let message = Bf16Path::named(name).unwrap_err();
            assert!(message.contains("set it to portable or amx"), "{message}");
            assert!(!message.contains('\u{1b}'));
        }
        let named = Bf16Path::named("amx");
        assert_eq!(named.is_ok(), Bf16Path::Amx.is_available(), "{named:?}");
    }
}

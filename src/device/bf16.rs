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
    /// Dot products of AVX512-BF16: x86-64 Linux on AMD's Zen 4 or later. Intel's processors have them, too, at half of the speed of
    /// f32.
    Avx512,
    /// Intel's AMX tiles: x86-64 Linux on Sapphire Rapids or later.
    Amx,
}

impl Bf16Path {
    /// The way that this process uses: `SELFSUP_BF16` (`portable`, `avx512` or `amx`) if it is set, otherwise the fastest of the
    /// machine. The variable is read once. Whether dot products are faster than f32 is measured, in less than a millisecond.
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
            Bf16Path::Avx512 => Some("AVX512-BF16"),
            Bf16Path::Amx => Some("AMX"),
        }
    }

    fn named(name: &str) -> Result<Bf16Path, String> {
        let path = match name {
            "portable" => Bf16Path::Portable,
            "avx512" => Bf16Path::Avx512,
            "amx" => Bf16Path::Amx,
            _ => {
                return Err(format!(
                    "SELFSUP_BF16 is `{}`: set it to portable, avx512 or amx, or unset it",
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
            Bf16Path::Avx512 => has_dots(),
            Bf16Path::Amx => has_tiles(),
        }
    }

    fn best() -> Bf16Path {
        match () {
            () if Bf16Path::Amx.is_available() => Bf16Path::Amx,
            () if Bf16Path::Avx512.is_available() && dots_pay() => Bf16Path::Avx512,
            () => Bf16Path::Portable,
        }
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

/// Whether the processor has dot products of bf16, and what the kernels around them use.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_dots() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
}

/// Whether dot products of bf16 do more products a second than f32 does: the same work is timed both ways, the best of several
/// runs. Zen 4 and 5 do twice as many, Sapphire Rapids half, so that the limit between them is never near.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn dots_pay() -> bool {
    use std::arch::x86_64::*;
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    /// Independent sums: more than the latency of either instruction.
    const SUMS: usize = 16;
    const REPEATS: usize = 1000;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dots(x: __m512i) -> [__m512; SUMS] {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..REPEATS {
            for sum in &mut sums {
                // SAFETY: both are vectors of 512 bits.
                let x: __m512bh = unsafe { std::mem::transmute(x) };
                *sum = _mm512_dpbf16_ps(*sum, x, x);
            }
        }
        sums
    }

    #[target_feature(enable = "avx512f")]
    fn products(x: __m512) -> [__m512; SUMS] {
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..REPEATS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(x, x, *sum);
            }
        }
        sums
    }

    let timed = |work: &dyn Fn()| {
        let begin = Instant::now();
        work();
        begin.elapsed()
    };
    let mut best = [Duration::MAX; 2];
    for _ in 0..5 {
        // SAFETY: the caller has found AVX-512F and AVX512-BF16.
        let [of_dots, of_products] = unsafe {
            [
                timed(&|| _ = black_box(dots(black_box(_mm512_set1_epi32(0x3f80_3f80))))),
                timed(&|| _ = black_box(products(black_box(_mm512_set1_ps(1.0))))),
            ]
        };
        best = [best[0].min(of_dots), best[1].min(of_products)];
    }
    // A dot product is of two pairs.
    best[0] < best[1].mul_f64(2.0 / 1.25)
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn has_tiles() -> bool {
    false
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn has_dots() -> bool {
    false
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn dots_pay() -> bool {
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
            assert!(message.contains("set it to portable, avx512 or amx"), "{message}");
            assert!(!message.contains('\u{1b}'));
        }
        for (name, path) in [("avx512", Bf16Path::Avx512), ("amx", Bf16Path::Amx)] {
            let named = Bf16Path::named(name);
            assert_eq!(named.is_ok(), path.is_available(), "{named:?}");
        }
    }
}

//! The instruction set of the CPU kernels, chosen once per process.
//!
//! The three sets run the same drivers and the same generic tile kernels; they differ in vector type
//! and tile size. One set always gives the same bits; different sets differ in rounding.

use std::sync::OnceLock;

/// An instruction set with its own tile kernels, from slowest to fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust on four-float arrays: any processor.
    Portable,
    /// x86-64 with AVX2 and FMA: 8 floats, 16 registers.
    Avx2,
    /// x86-64 with AVX-512F: 16 floats, 32 registers.
    Avx512,
}

impl Isa {
    /// The set this process uses: `SELFSUP_ISA` (`portable`, `avx2` or `avx512`) if set, else the
    /// best the machine has. Read once.
    ///
    /// # Panics
    /// If `SELFSUP_ISA` names an unknown set, or one that the machine lacks.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| match std::env::var("SELFSUP_ISA") {
            Err(_) => Isa::best(),
            Ok(name) => {
                let isa = match name.as_str() {
                    "portable" => Isa::Portable,
                    "avx2" => Isa::Avx2,
                    "avx512" => Isa::Avx512,
                    _ => panic!("SELFSUP_ISA is `{name}`, not one of portable, avx2, avx512"),
                };
                assert!(isa.is_available(), "SELFSUP_ISA is `{name}`, which this machine lacks");
                isa
            }
        })
    }

    /// Whether this machine can run the set.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    fn best() -> Isa {
        let fastest_first = [Isa::Avx512, Isa::Avx2];
        fastest_first.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Floats per vector.
    pub fn lanes(self) -> usize {
        match self {
            Isa::Portable => 4,
            Isa::Avx2 => 8,
            Isa::Avx512 => 16,
        }
    }

    /// The most rows of a tile whose rows are `vectors` (1 or 2) vectors wide: the accumulators,
    /// `vectors` operands and one broadcast have to fit into the registers.
    pub fn tile_rows(self, vectors: usize) -> usize {
        match self {
            Isa::Portable | Isa::Avx2 => 12 / vectors,
            Isa::Avx512 => 28 / vectors,
        }
    }
}

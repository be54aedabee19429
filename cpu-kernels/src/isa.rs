//! The instruction set of the CPU kernels, chosen once per process.
//!
//! The three sets run the same drivers and the same generic tile kernels; they differ in vector type
//! and tile size. One set always gives the same bits; different sets differ in rounding.

use std::env::VarError;
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
    /// The set that this process uses: `SELFSUP_ISA` (`portable`, `avx2` or `avx512`) if it is set,
    /// otherwise the best set of the machine. The variable is read once.
    ///
    /// # Errors
    /// If `SELFSUP_ISA` names an unknown set, or a set that the machine lacks: a sentence that says so.
    pub fn selected() -> Result<Isa, &'static str> {
        static SELECTED: OnceLock<Result<Isa, String>> = OnceLock::new();
        let selected = SELECTED.get_or_init(|| match std::env::var("SELFSUP_ISA") {
            Ok(name) => Isa::named(&name),
            Err(VarError::NotPresent) => Ok(Isa::best()),
            Err(VarError::NotUnicode(name)) => Isa::named(&name.to_string_lossy()),
        });
        selected.as_ref().copied().map_err(String::as_str)
    }

    /// [`Isa::selected`] for kernels, which return no errors. Making a CPU device has reported the error before.
    ///
    /// # Panics
    /// If [`Isa::selected`] fails.
    pub fn current() -> Isa {
        Isa::selected().unwrap_or_else(|e| panic!("{e}"))
    }

    fn named(name: &str) -> Result<Isa, String> {
        let isa = match name {
            "portable" => Isa::Portable,
            "avx2" => Isa::Avx2,
            "avx512" => Isa::Avx512,
            _ => {
                return Err(format!(
                    "SELFSUP_ISA is `{}`: set it to portable, avx2 or avx512, or unset it",
                    name.escape_debug()
                ));
            }
        };
        if isa.is_available() {
            return Ok(isa);
        }
        Err(format!("SELFSUP_ISA is `{name}`, which this machine does not support: unset it"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_instruction_sets_are_checked() {
        assert_eq!(Isa::named("portable"), Ok(Isa::Portable));
        for name in ["AVX2", "", "avx512 ", "\u{1b}[2J"] {
            let message = Isa::named(name).unwrap_err();
            assert!(message.contains("set it to portable, avx2 or avx512"), "{message}");
            assert!(!message.contains('\u{1b}'));
        }
    }
}

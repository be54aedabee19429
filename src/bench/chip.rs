//! Ceilings of machines, and how many blocks one holds.

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Tensor cores, or the widest multiply-add of a processor.
    Product,
    /// A GPU's f32 lanes; on a processor the same as [`Unit::Product`].
    Vector,
}

/// A machine's ceilings.
#[derive(Clone, Debug, PartialEq)]
pub struct Chip {
    /// What it is called.
    pub name: String,
    /// Where the two ceilings come from.
    pub source: String,
    /// Bytes a second of a copy, read and written together.
    pub copy: f64,
    /// Operations a second of a large product in the dtype of the bench.
    pub product: f64,
    /// Operations a second in f32 lanes.
    pub vector: f64,
    /// A GPU's multiprocessors; a processor's threads.
    pub processors: usize,
    /// Clock while it computes, in Hz.
    pub clock: f64,
    /// Bytes of shared memory of a multiprocessor; 0 on a processor.
    pub shared: usize,
    /// Bytes of its last cache.
    pub cache: usize,
}

/// Names, and what is known of GPUs: copy in TB/s, product in TFLOP/s (bf16, dense), multiprocessors, clock in GHz, KiB of shared
/// memory, MiB of cache. H200: copy and product as people measured them; H100 SXM and A100: 0.9 and 0.8 of the data sheet.
const CHIPS: [(&str, f64, f64, usize, f64, usize, usize); 3] = [
    ("H200", 4.3, 790.0, 132, 1.755, 228, 50),
    ("H100", 3.0, 790.0, 132, 1.755, 228, 50),
    ("A100", 1.83, 250.0, 108, 1.41, 164, 40),
];

/// Threads, registers and blocks of a multiprocessor of sm_80 and sm_90.
const THREADS: usize = 2048;
const REGISTERS: usize = 65_536;
const BLOCKS: usize = 32;

impl Chip {
    /// The GPUs of which something is known.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CHIPS.iter().map(|(name, ..)| *name)
    }

    /// The known GPU whose name is part of `name`.
    pub fn known(name: &str) -> Option<Self> {
        let found = CHIPS.iter().find(|(known, ..)| name.contains(known));
        let &(known, copy, product, processors, clock, shared, cache) = found?;
        let clock = clock * 1e9;
        Some(Self {
            name: name.to_owned(),
            source: if known == "H200" {
                "measured by others".into()
            } else {
                "0.9 and 0.8 of the data sheet".into()
            },
            copy: copy * 1e12,
            product: product * 1e12,
            vector: (processors * 128 * 2) as f64 * clock,
            processors,
            clock,
            shared: shared << 10,
            cache: cache << 20,
        })
    }

    /// Operations a second.
    pub fn rate(&self, unit: Unit) -> f64 {
        match unit {
            Unit::Product => self.product,
            Unit::Vector => self.vector,
        }
    }

    /// Blocks of so many threads, registers a thread and bytes of shared memory that a multiprocessor holds at once.
    pub fn blocks(&self, threads: usize, registers: usize, shared: usize) -> usize {
        // A warp gets registers in units of 256, a block 1 KiB of shared memory more than it asks for.
        let warps = threads.div_ceil(32).max(1);
        let of_warp = (registers * 32).next_multiple_of(256).max(1);
        let by_shared = self.shared / (shared + 1024);
        (THREADS / (warps * 32)).min(REGISTERS / of_warp / warps).min(by_shared).min(BLOCKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multiprocessor_holds_what_the_scarcest_of_its_resources_allows() {
        let chip = Chip::known("NVIDIA H200").unwrap();
        assert_eq!(chip.blocks(128, 32, 0), 16); // threads
        assert_eq!(chip.blocks(128, 168, 0), 3); // registers: 4 warps of 5376 of 65536
        assert_eq!(chip.blocks(128, 128, 49_152), 4); // shared memory: 228 KiB by 49
        assert_eq!(chip.blocks(32, 16, 0), 32); // blocks
        assert!(Chip::known("GeForce").is_none());
    }
}

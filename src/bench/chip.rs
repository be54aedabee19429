//! Ceilings of machines, and the number of blocks that a multiprocessor holds.

/// The unit that computes an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The matrix units: a GPU's tensor cores, a CPU's tiles in bf16; on a CPU in f32 the same as [`Unit::Vector`].
    Matrix,
    /// The vector units: a GPU's f32 lanes, or a CPU's widest multiply-add.
    Vector,
}

/// A machine's ceilings.
#[derive(Clone, Debug, PartialEq)]
pub struct Chip {
    /// Its name.
    pub name: String,
    /// The source of the two ceilings, for tables.
    pub source: String,
    /// Copy rate in bytes per second, reads and writes added.
    pub copy: f64,
    /// Operations per second of a large GEMM in the dtype of the benchmark; on a CPU in f32 the same as `vector`.
    pub gemm: f64,
    /// Operations per second in f32 lanes.
    pub vector: f64,
    /// Multiprocessors of a GPU; threads of a CPU.
    pub processors: usize,
    /// Clock under load, in Hz.
    pub clock: f64,
    /// Bytes of shared memory per multiprocessor; 0 on a CPU.
    pub shared: usize,
    /// Bytes of its last-level cache.
    pub cache: usize,
}

/// Known GPUs: name, copy in TB/s, GEMM in TFLOP/s (bf16, dense), multiprocessors, clock in GHz, KiB of shared memory, MiB of
/// cache. H200: copy and GEMM as published measurements have them; H100 SXM and A100: 0.9 and 0.8 of the data sheet.
const CHIPS: [(&str, f64, f64, usize, f64, usize, usize); 3] = [
    ("H200", 4.3, 790.0, 132, 1.755, 228, 50),
    ("H100", 3.0, 790.0, 132, 1.755, 228, 50),
    ("A100", 1.83, 250.0, 108, 1.41, 164, 40),
];

/// Threads, registers and blocks that a multiprocessor of sm_80 or sm_90 holds.
const THREADS: usize = 2048;
const REGISTERS: usize = 65_536;
const BLOCKS: usize = 32;

impl Chip {
    /// Returns the names of the known GPUs.
    pub fn names() -> impl Iterator<Item = &'static str> {
        CHIPS.iter().map(|(name, ..)| *name)
    }

    /// Returns the known GPU whose name is part of `name`, or `None`.
    pub fn known(name: &str) -> Option<Self> {
        let found = CHIPS.iter().find(|(known, ..)| name.contains(known));
        let &(known, copy, gemm, processors, clock, shared, cache) = found?;
        let clock = clock * 1e9;
        Some(Self {
            name: name.to_owned(),
            source: if known == "H200" {
                "measured by others".into()
            } else {
                "0.9 and 0.8 of the data sheet".into()
            },
            copy: copy * 1e12,
            gemm: gemm * 1e12,
            vector: (processors * 128 * 2) as f64 * clock,
            processors,
            clock,
            shared: shared << 10,
            cache: cache << 20,
        })
    }

    /// Operations per second of a unit.
    pub fn rate(&self, unit: Unit) -> f64 {
        match unit {
            Unit::Matrix => self.gemm,
            Unit::Vector => self.vector,
        }
    }

    /// Returns how many blocks a multiprocessor holds at once: blocks of `threads` threads, `registers` registers per thread and
    /// `shared` bytes of shared memory.
    pub fn blocks(&self, threads: usize, registers: usize, shared: usize) -> usize {
        // Registers are allocated per warp in units of 256; a block takes 1 KiB of shared memory more than it asks for.
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
    fn the_scarcest_resource_limits_the_blocks_of_a_multiprocessor() {
        let chip = Chip::known("NVIDIA H200").unwrap();
        assert_eq!(chip.blocks(128, 32, 0), 16); // threads
        assert_eq!(chip.blocks(128, 168, 0), 3); // registers: 4 warps of 5376 of 65536
        assert_eq!(chip.blocks(128, 128, 49_152), 4); // shared memory: 228 KiB by 49
        assert_eq!(chip.blocks(32, 16, 0), 32); // blocks
        assert!(Chip::known("GeForce").is_none());
    }
}

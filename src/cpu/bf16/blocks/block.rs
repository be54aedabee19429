//! A block of sums, 32 by 32, and what multiplies its operands: AMX tiles (`tile`) or dot products of AVX512-BF16 (`cpu-kernels`).

pub use selfsup_cpu_kernels::block::{Live, Operands, Run, SIDE, Sums, TILE, last_part};

use selfsup_cpu_kernels::block;

use super::tile::Tiles;
use crate::cpu::bf16::Bf16Path;

/// What multiplies blocks on this thread.
pub enum Multiplier {
    Tiles(Tiles),
    Dots,
}

impl Multiplier {
    /// # Safety
    /// The path is available on this machine.
    pub unsafe fn new(path: Bf16Path) -> Self {
        match path {
            // SAFETY: the caller vouches for the tiles.
            Bf16Path::Amx => Multiplier::Tiles(unsafe { Tiles::new() }),
            Bf16Path::Avx512 => Multiplier::Dots,
            Bf16Path::Portable => unreachable!("the portable path multiplies in f32"),
        }
    }

    /// Computes a block of sums: the products of all runs and steps, in order.
    ///
    /// # Safety
    /// All tiles that `operands` describes are readable: for each run and step 16 rows of 64 bytes at four addresses. The rows
    /// of `sums` are writable, and readable if it accumulates.
    #[inline]
    pub unsafe fn multiply(&self, operands: &Operands<'_>, sums: Sums) {
        // SAFETY: the caller vouches for the memory; the instructions are there, as whoever made this vouched.
        unsafe {
            match self {
                Multiplier::Tiles(tiles) => tiles.multiply(operands, sums),
                Multiplier::Dots => block::multiply(operands, sums),
            }
        }
    }
}

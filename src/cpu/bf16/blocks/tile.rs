//! AMX tiles: eight registers of 16 rows of 64 bytes, by inline assembly (Rust's intrinsics for them are not stable).
//!
//! `tdpbf16ps c, a, b` adds to `c` (16 x 16 f32) the product of `a` (16 rows of 32 bf16) and `b` (16 rows of 16 pairs: row `i`
//! holds the terms `2 i` and `2 i + 1` of 16 columns). It reads and writes numbers below 2^-126 as zero, and rounds to nearest.

use std::arch::asm;
use std::marker::PhantomData;

use super::block::{Operands, Run, Sums};

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles, configured. Threads have tiles of their own, which the kernel saves when it switches threads and
/// around signal handlers. Released when dropped: a thread whose tiles are in use costs 8 KiB at each switch.
pub struct Tiles(PhantomData<*const ()>);

/// What the assembly reads, by offset.
#[repr(C)]
struct Arguments {
    halves: [*mut f32; 2],
    line: usize,
    accumulate: usize,
    runs: *const Run,
    count: usize,
    steps: usize,
    a_line: usize,
    a_step: usize,
    b_step: usize,
}

impl Tiles {
    /// # Safety
    /// `Bf16Path::Amx` is available: the processor has tiles, and the process may use them.
    pub unsafe fn new() -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: the caller vouches for the instruction; it reads 64 bytes, a valid configuration. No compiled code uses the
        // tile registers that it clears.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Tiles(PhantomData)
    }

    /// Computes a block of sums: 32 x 32, the products of all runs and steps in order.
    ///
    /// # Safety
    /// As [`Multiplier::multiply`](super::block::Multiplier::multiply).
    #[inline]
    pub unsafe fn multiply(&self, operands: &Operands<'_>, sums: Sums) {
        let Operands { runs, steps, a_line, a_step, b_step, .. } = *operands;
        let Sums { halves, line, accumulate } = sums;
        let arguments = Arguments {
            halves,
            line,
            accumulate: accumulate.into(),
            runs: runs.as_ptr(),
            count: if steps == 0 { 0 } else { runs.len() },
            steps,
            a_line,
            a_step,
            b_step,
        };
        // SAFETY: the tiles are configured as long as `self` lives, on this thread alone. The caller vouches for the memory.
        // The block uses no stack, and all tiles that it writes are its own: no compiled code keeps values in them.
        unsafe {
            asm!(
                "mov {a0}, [{arguments}]",
                "mov {a1}, [{arguments} + 8]",
                "mov {a_line}, [{arguments} + 16]",
                "cmp qword ptr [{arguments} + 24], 0",
                "je 20f",
                "tileloadd tmm0, [{a0} + {a_line}*1]",
                "tileloadd tmm1, [{a0} + {a_line}*1 + 64]",
                "tileloadd tmm2, [{a1} + {a_line}*1]",
                "tileloadd tmm3, [{a1} + {a_line}*1 + 64]",
                "jmp 21f",
                "20:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "21:",
                "mov {runs}, [{arguments} + 32]",
                "mov {count}, [{arguments} + 40]",
                "mov {a_line}, [{arguments} + 56]",
                "mov {b_line:e}, 64",
                "test {count}, {count}",
                "jz 24f",
                // One run.
                "22:",
                "mov {a0}, [{runs}]",
                "mov {a1}, [{runs} + 8]",
                "mov {b0}, [{runs} + 16]",
                "mov {b1}, [{runs} + 24]",
                "mov {k}, [{arguments} + 48]",
                // One step: four loads for four products.
                "23:",
                "tileloadd tmm4, [{a0} + {a_line}*1]",
                "tileloadd tmm6, [{b0} + {b_line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {b_line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {a_line}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, [{arguments} + 64]",
                "add {a1}, [{arguments} + 64]",
                "add {b0}, [{arguments} + 72]",
                "add {b1}, [{arguments} + 72]",
                "dec {k}",
                "jnz 23b",
                "add {runs}, 32",
                "dec {count}",
                "jnz 22b",
                "24:",
                "mov {a0}, [{arguments}]",
                "mov {a1}, [{arguments} + 8]",
                "mov {a_line}, [{arguments} + 16]",
                "tilestored [{a0} + {a_line}*1], tmm0",
                "tilestored [{a0} + {a_line}*1 + 64], tmm1",
                "tilestored [{a1} + {a_line}*1], tmm2",
                "tilestored [{a1} + {a_line}*1 + 64], tmm3",
                arguments = in(reg) &raw const arguments,
                runs = out(reg) _,
                count = out(reg) _,
                k = out(reg) _,
                a0 = out(reg) _,
                a1 = out(reg) _,
                b0 = out(reg) _,
                b1 = out(reg) _,
                a_line = out(reg) _,
                b_line = out(reg) _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `new` has run on this thread, so that the instruction exists; nothing reads the tiles afterwards.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

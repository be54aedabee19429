//! A block of sums of bf16 products, 32 by 32, whose operands lie as AMX tiles want them; and its computation by `vdpbf16ps` of
//! AVX512-BF16.
//!
//! A tile of `a` is 16 rows of 32 bf16. One of `b` is 16 rows of 16 pairs: row `i` holds the terms `2 i` and `2 i + 1` of 16 columns.
//! The instruction adds to sixteen sums the products of two terms each: a pair of a row of `a`, broadcast, and a row of pairs of `b`.
//! Like tiles it reads and writes numbers below 2^-126 as zero, and rounds to nearest. Sums stay in registers: 8 rows of two vectors,
//! or up to 16 rows of one where the second vector's columns do not count.

/// Rows and columns of the block of sums that one run of products computes: two tiles by two.
pub const SIDE: usize = 32;
/// Bytes of a tile.
pub const TILE: usize = 1024;

/// The operands of some steps: addresses of their first tiles.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Run {
    /// Of two block rows of `a`.
    pub a: [usize; 2],
    /// Of two block columns of `b`.
    pub b: [usize; 2],
}

/// The operands of a block of sums. Strides are in bytes.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    /// Whose products are added, in this order.
    pub runs: &'a [Run],
    /// Tiles along the terms of each run, at least 1.
    pub steps: usize,
    /// From one row of a tile of `a` to the next; rows of `b` are 64 bytes apart.
    pub a_line: usize,
    /// From a tile of `a` to that of the next step.
    pub a_step: usize,
    /// From a tile of `b` to that of the next step.
    pub b_step: usize,
    /// What of the block counts.
    pub live: Live,
}

/// What of a block counts. The rest is readable, and its sums may be any numbers.
#[derive(Clone, Copy)]
pub struct Live {
    /// Rows of either half, at most 16.
    pub rows: [usize; 2],
    /// Columns, 1 to 32.
    pub columns: usize,
    /// Terms of the last step of each run, 1 to 32: the others are zero in both operands.
    pub terms: usize,
}

impl Live {
    /// All of it.
    pub const WHOLE: Self = Self { rows: [16; 2], columns: SIDE, terms: SIDE };
}

/// Of `count` terms or columns, cut into parts of 32, those of the last part.
pub fn last_part(count: usize) -> usize {
    match count % SIDE {
        0 => SIDE,
        rest => rest,
    }
}

/// Where a block of sums goes.
#[derive(Clone, Copy)]
pub struct Sums {
    /// The first rows of its two halves of 16 rows of 32 floats.
    pub halves: [*mut f32; 2],
    /// Bytes from a row to the next.
    pub line: usize,
    /// Whether the products are added to what is there.
    pub accumulate: bool,
}

#[cfg(target_arch = "x86_64")]
pub use dots::multiply;

#[cfg(target_arch = "x86_64")]
mod dots {
    use std::arch::x86_64::*;

    use super::{Operands, SIDE, Sums};

    /// Computes a block of sums; rows and columns that do not count keep what they hold.
    ///
    /// # Safety
    /// The processor has AVX-512F and AVX512-BF16. All tiles that `operands` describes are readable: for each run and step 16 rows of
    /// 64 bytes at four addresses. The rows of `sums` are writable, and readable if it accumulates.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn multiply(operands: &Operands<'_>, sums: Sums) {
        let live = operands.live;
        for (half, rows) in live.rows.into_iter().enumerate() {
            // SAFETY: rows of one half of the block, as the caller vouches.
            unsafe {
                if live.columns <= SIDE / 2 {
                    if rows > 8 {
                        part::<16, 1>(operands, sums, (half, 0));
                    } else if rows > 0 {
                        part::<8, 1>(operands, sums, (half, 0));
                    }
                    continue;
                }
                for first in (0..rows).step_by(8) {
                    part::<8, 2>(operands, sums, (half, first));
                }
            }
        }
    }

    /// `ROWS` rows of a half, from `first` on, and `VECTORS` times sixteen columns.
    ///
    /// # Safety
    /// As [`multiply`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn part<const ROWS: usize, const VECTORS: usize>(
        operands: &Operands<'_>,
        sums: Sums,
        (half, first): (usize, usize),
    ) {
        let Operands { runs, steps, a_line, a_step, b_step, live } = *operands;
        let to = |row: usize| sums.halves[half].wrapping_byte_add((first + row) * sums.line);
        let mut state = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if sums.accumulate {
            for (i, row) in state.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    // SAFETY: sixteen floats of a row of the sums.
                    *sum = unsafe { _mm512_loadu_ps(to(i).add(j * 16)) };
                }
            }
        }
        for run in runs {
            let mut a = std::ptr::with_exposed_provenance::<u8>(run.a[half] + first * a_line);
            let mut b = run.b.map(std::ptr::with_exposed_provenance::<__m512i>);
            for step in 0..steps {
                let terms = if step + 1 == steps { live.terms } else { SIDE };
                for pair in 0..terms.div_ceil(2) {
                    let mut right = [_mm512_setzero_si512(); VECTORS];
                    for (right, b) in right.iter_mut().zip(b) {
                        // SAFETY: a row of a tile of `b`.
                        *right = unsafe { _mm512_loadu_si512(b.add(pair)) };
                    }
                    for (i, row) in state.iter_mut().enumerate() {
                        let left = a.wrapping_add(i * a_line + pair * 4).cast::<i32>();
                        // SAFETY: a pair of a row of a tile of `a`.
                        let left = _mm512_set1_epi32(unsafe { left.read_unaligned() });
                        for (sum, right) in row.iter_mut().zip(right) {
                            // SAFETY: vectors of 512 bits, whose meaning the instruction gives them.
                            let [left, right] = [left, right]
                                .map(|x| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) });
                            *sum = _mm512_dpbf16_ps(*sum, left, right);
                        }
                    }
                }
                a = a.wrapping_add(a_step);
                b = b.map(|b| b.wrapping_byte_add(b_step));
            }
        }
        for (i, row) in state.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                // SAFETY: sixteen floats of a row of the sums.
                unsafe { _mm512_storeu_ps(to(i).add(j * 16), *sum) };
            }
        }
    }
}

//! Rearranges bf16 rows into tiles. Rows are given by address; a null address stands for a row of zeros, and columns past
//! `live` are zeros too.
//!
//! AVX2 throughout: two 256-bit shuffles a cycle do as much as one of 512 bits.

use std::arch::x86_64::*;

/// A row or nothing.
pub type Row = *const u16;

/// Rows that are packed together, many columns after another.
pub struct Rows<const N: usize> {
    rows: [Row; N],
    /// Whether none is missing.
    complete: bool,
}

impl<const N: usize> Rows<N> {
    /// Starts to load `len` elements of all rows, from `first` on.
    pub fn prefetch_from(&self, first: usize, len: usize) {
        for &row in &self.rows {
            for line in (first..first + len).step_by(32) {
                // SAFETY: a prefetch never faults, and SSE is part of x86-64.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(line).cast()) };
            }
        }
    }

    pub fn new(row: impl FnMut(usize) -> Row) -> Self {
        let rows: [Row; N] = std::array::from_fn(row);
        Self { rows, complete: rows.iter().all(|row| !row.is_null()) }
    }
}

/// Sixteen columns of a row from `first` on; if not `WHOLE`, the `live` of them that exist, if the row does.
///
/// # Safety
/// `row` is null, or `min(live, 16)` elements from `row + first` are readable; 16 if `WHOLE`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load<const WHOLE: bool>(row: Row, first: usize, live: usize) -> __m256i {
    let from = row.wrapping_add(first);
    if WHOLE {
        // SAFETY: the caller vouches for 16 elements.
        return unsafe { _mm256_loadu_si256(from.cast()) };
    }
    let mut columns = [0_u16; 16];
    if !row.is_null() {
        // SAFETY: the caller vouches for the first `live` elements.
        unsafe { from.copy_to_nonoverlapping(columns.as_mut_ptr(), live.min(16)) };
    }
    // SAFETY: an array of 32 bytes.
    unsafe { _mm256_loadu_si256(columns.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn transposed_8x8(r: [__m256i; 8]) -> [__m256i; 8] {
    let mut t = r;
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..2 {
        let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
        u[4 * i] = _mm256_unpacklo_epi64(a, c);
        u[4 * i + 1] = _mm256_unpackhi_epi64(a, c);
        u[4 * i + 2] = _mm256_unpacklo_epi64(b, d);
        u[4 * i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    let mut out = u;
    for i in 0..4 {
        out[i] = _mm256_permute2x128_si256::<0x20>(u[i], u[i + 4]);
        out[i + 4] = _mm256_permute2x128_si256::<0x31>(u[i], u[i + 4]);
    }
    out
}

/// 32 rows, sixteen columns of each, into sixteen rows of 32: the left operand of a sum over rows.
///
/// # Safety
/// Each row is null, or `min(live, 16)` elements from `row + first` are readable; 1 KiB at `to` is writable.
#[target_feature(enable = "avx2")]
pub unsafe fn transposed(to: *mut u16, rows: &Rows<32>, first: usize, live: usize) {
    // SAFETY: the caller's contract; whole rows if all are complete.
    unsafe {
        if rows.complete && live >= 16 {
            transposed_rows::<true>(to, &rows.rows, first, live);
        } else {
            transposed_rows::<false>(to, &rows.rows, first, live);
        }
    }
}

/// # Safety
/// As [`transposed`], and [`load`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transposed_rows<const WHOLE: bool>(
    to: *mut u16,
    rows: &[Row; 32],
    first: usize,
    live: usize,
) {
    for half in 0..2 {
        let (mut low, mut high) = ([_mm256_setzero_si256(); 8], [_mm256_setzero_si256(); 8]);
        for i in 0..8 {
            let pair = &rows[16 * half + 2 * i..][..2];
            // SAFETY: the caller vouches for the rows.
            let (a, b) = unsafe {
                (load::<WHOLE>(pair[0], first, live), load::<WHOLE>(pair[1], first, live))
            };
            // Columns 0 to 3 and 8 to 11, and the others.
            low[i] = _mm256_unpacklo_epi16(a, b);
            high[i] = _mm256_unpackhi_epi16(a, b);
        }
        for (columns, first) in [(transposed_8x8(low), 0), (transposed_8x8(high), 4)] {
            for (i, column) in columns.into_iter().enumerate() {
                let row = first + i % 4 + 8 * (i / 4);
                // SAFETY: half of one of the sixteen rows of 32 elements at `to`.
                unsafe { _mm256_storeu_si256(to.add(row * 32 + half * 16).cast(), column) };
            }
        }
    }
}

/// Pairs of rows into rows of sixteen pairs: the right operand of a sum over rows. For each sixteen columns from `first` on, of
/// which `live` exist, `N / 2` rows of 64 bytes; `blocks` such, `step` bytes apart. Reads row after row, as memory likes it.
///
/// # Safety
/// Each row is null, or `min(live, 16 * blocks)` elements from `row + first` are readable; the rows of all blocks are writable.
#[target_feature(enable = "avx2")]
pub unsafe fn pairs<const N: usize>(
    to: *mut u16,
    rows: &Rows<N>,
    (first, live): (usize, usize),
    blocks: usize,
    step: usize,
) {
    let whole = if rows.complete { blocks.min(live / 16) } else { 0 };
    for (i, pair) in rows.rows.chunks_exact(2).enumerate() {
        let to = to.wrapping_add(i * 32);
        for block in 0..whole {
            let first = first + block * 16;
            // SAFETY: the caller vouches for whole rows, and for 64 bytes of a block.
            unsafe {
                let (a, b) = (load::<true>(pair[0], first, 16), load::<true>(pair[1], first, 16));
                store_pairs(to.byte_add(block * step), a, b);
            }
        }
        for block in whole..blocks {
            let (first, live) = (first + block * 16, live.saturating_sub(block * 16));
            // SAFETY: the caller vouches for the rows, and for 64 bytes of a block.
            unsafe {
                let (a, b) =
                    (load::<false>(pair[0], first, live), load::<false>(pair[1], first, live));
                store_pairs(to.byte_add(block * step), a, b);
            }
        }
    }
}

/// # Safety
/// 64 bytes at `to` are writable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store_pairs(to: *mut u16, a: __m256i, b: __m256i) {
    let (low, high) = (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
    // SAFETY: two halves of 64 bytes.
    unsafe {
        _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
        _mm256_storeu_si256(to.add(16).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
    }
}

/// Sixteen rows, 32 columns of each, into sixteen rows of sixteen pairs: the right operand of a sum over columns.
///
/// # Safety
/// Each row is null, or `min(live, 32)` elements from `row + first` are readable; 1 KiB at `to` is writable.
#[target_feature(enable = "avx2")]
pub unsafe fn transposed_pairs(to: *mut u16, rows: &Rows<16>, first: usize, live: usize) {
    // SAFETY: the caller's contract; whole rows if all are complete.
    unsafe {
        if rows.complete && live >= 32 {
            transposed_pairs_of_rows::<true>(to, &rows.rows, first, live);
        } else {
            transposed_pairs_of_rows::<false>(to, &rows.rows, first, live);
        }
    }
}

/// # Safety
/// As [`transposed_pairs`], and [`load`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transposed_pairs_of_rows<const WHOLE: bool>(
    to: *mut u16,
    rows: &[Row; 16],
    first: usize,
    live: usize,
) {
    for half in 0..2 {
        let live = live.saturating_sub(half * 16);
        for eight in 0..2 {
            let mut columns = [_mm256_setzero_si256(); 8];
            for (i, column) in columns.iter_mut().enumerate() {
                // SAFETY: the caller vouches for the rows.
                *column = unsafe { load::<WHOLE>(rows[eight * 8 + i], first + half * 16, live) };
            }
            for (i, pair) in transposed_8x8(columns).into_iter().enumerate() {
                let to = to.wrapping_add((half * 8 + i) * 32 + eight * 16);
                // SAFETY: half of one of the sixteen rows of 64 bytes at `to`.
                unsafe { _mm256_storeu_si256(to.cast(), pair) };
            }
        }
    }
}

/// The first `live` elements of a row, then zeros, `blocks` times 32 in all, into lines `step` bytes apart.
///
/// # Safety
/// `row` is null, or `live <= 32 * blocks` elements are readable; 64 bytes at each of the lines are writable.
#[inline]
#[target_feature(enable = "avx2")]
pub unsafe fn lines(to: *mut u8, row: Row, live: usize, blocks: usize, step: usize) {
    let whole = if row.is_null() { 0 } else { live / 32 };
    for block in 0..blocks {
        for half in 0..2 {
            let first = block * 32 + half * 16;
            let to: *mut __m256i = to.wrapping_add(block * step + half * 32).cast();
            // SAFETY: the caller vouches for the row and for the line.
            unsafe {
                let line = if block < whole {
                    load::<true>(row, first, 16)
                } else {
                    load::<false>(row, first, live.saturating_sub(first))
                };
                _mm256_storeu_si256(to, line);
            }
        }
    }
}

//! Rearranges bf16 rows into tiles. Rows are given by address; a null address stands for a row of zeros, and columns past
//! `live` are zeros too.
//!
//! AVX2 throughout: two 256-bit shuffles a cycle do as much as one of 512 bits.

use std::arch::x86_64::*;

/// A row or nothing.
pub type Row = *const u16;

/// Sixteen columns of a row from `first` on, of which `live` exist.
///
/// # Safety
/// `row` is null, or `min(live, 16)` elements from `row + first` are readable.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(row: Row, first: usize, live: usize) -> __m256i {
    if row.is_null() {
        return _mm256_setzero_si256();
    }
    let from = row.wrapping_add(first);
    if live >= 16 {
        // SAFETY: the caller vouches for 16 elements.
        return unsafe { _mm256_loadu_si256(from.cast()) };
    }
    let mut columns = [0_u16; 16];
    for (i, column) in columns.iter_mut().enumerate().take(live) {
        // SAFETY: the caller vouches for the first `live` elements.
        *column = unsafe { *from.add(i) };
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
pub unsafe fn transposed(to: *mut u16, rows: &[Row; 32], first: usize, live: usize) {
    for half in 0..2 {
        let (mut low, mut high) = ([_mm256_setzero_si256(); 8], [_mm256_setzero_si256(); 8]);
        for i in 0..8 {
            let pair = &rows[16 * half + 2 * i..][..2];
            // SAFETY: the caller vouches for the rows.
            let (a, b) = unsafe { (load(pair[0], first, live), load(pair[1], first, live)) };
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

/// `N` pairs of rows, sixteen columns of each, into rows of sixteen pairs: the right operand of a sum over rows. 64 bytes a
/// pair.
///
/// # Safety
/// As [`transposed`]; `64 N` bytes at `to` are writable.
#[target_feature(enable = "avx2")]
pub unsafe fn pairs<const N: usize>(to: *mut u16, rows: &[[Row; 2]; N], first: usize, live: usize) {
    for (i, [a, b]) in rows.iter().enumerate() {
        // SAFETY: the caller vouches for the rows.
        let (a, b) = unsafe { (load(*a, first, live), load(*b, first, live)) };
        let (low, high) = (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
        let to = to.wrapping_add(i * 32);
        // SAFETY: row `i` of 64 bytes at `to`.
        unsafe {
            _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(to.add(16).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
        }
    }
}

/// Sixteen rows, 32 columns of each, into sixteen rows of sixteen pairs: the right operand of a sum over columns.
///
/// # Safety
/// Each row is null, or `min(live, 32)` elements from `row + first` are readable; 1 KiB at `to` is writable.
#[target_feature(enable = "avx2")]
pub unsafe fn transposed_pairs(to: *mut u16, rows: &[Row; 16], first: usize, live: usize) {
    for half in 0..2 {
        let live = live.saturating_sub(half * 16);
        for eight in 0..2 {
            let mut columns = [_mm256_setzero_si256(); 8];
            for (i, column) in columns.iter_mut().enumerate() {
                // SAFETY: the caller vouches for the rows.
                *column = unsafe { load(rows[eight * 8 + i], first + half * 16, live) };
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
    for block in 0..blocks {
        for half in 0..2 {
            let first = block * 32 + half * 16;
            let to = to.wrapping_add(block * step + half * 32);
            // SAFETY: the caller vouches for the row and for the line.
            unsafe { _mm256_storeu_si256(to.cast(), load(row, first, live.saturating_sub(first))) };
        }
    }
}

//! What happens to a block of sums on its way to memory: bias, addition to what is there, rounding, moments.

use std::arch::x86_64::*;

use crate::cpu::bf16::convert::{rounded, widened};
use crate::cpu::bf16::moments::LINES;

use super::block::SIDE;

/// Half a block of sums: sixteen rows of 32, and as a whole 4 KiB.
#[repr(C, align(64))]
pub struct Block(pub [f32; SIDE * SIDE]);

/// Where the rows of a result are.
#[derive(Clone, Copy)]
pub enum Target {
    F32(*mut f32),
    Bf16(*mut u16),
}

// SAFETY: tasks write different elements of the memory, which outlives them; the drivers see to both.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    pub fn offset(self, elements: usize) -> Self {
        match self {
            Target::F32(to) => Target::F32(to.wrapping_add(elements)),
            Target::Bf16(to) => Target::Bf16(to.wrapping_add(elements)),
        }
    }
}

/// Rows whose sums are in f32 only: longer sums would lose digits.
const SHORT: usize = 256;

/// Sums for moments of 32 columns; the shift is the first row's value.
pub struct ColumnSums {
    started: bool,
    /// Rows in the lines that are not in the totals yet.
    pending: usize,
    lines: [[f32; SIDE]; LINES],
    /// Of the values less the shift, and of their squares.
    totals: [[f64; SIDE]; LINES - 1],
}

impl ColumnSums {
    pub fn new() -> Self {
        let (lines, totals) = ([[0.0; SIDE]; LINES], [[0.0; SIDE]; LINES - 1]);
        Self { started: false, pending: 0, lines, totals }
    }

    /// Writes the sums of the first `live` columns to lines that are `columns` floats apart.
    ///
    /// # Safety
    /// `live` floats at each of the three lines are writable.
    pub unsafe fn write(mut self, to: *mut f32, columns: usize, live: usize) {
        self.fold();
        let [sum, squares] = self.totals.map(|totals| totals.map(|total| total as f32));
        for (i, line) in [self.lines[0], sum, squares].iter().enumerate() {
            // SAFETY: the caller vouches for the line.
            unsafe { to.add(i * columns).copy_from_nonoverlapping(line.as_ptr(), live) };
        }
    }

    /// Notes that the lines have so many more rows.
    fn count(&mut self, rows: usize) {
        self.pending += rows;
        if self.pending >= SHORT {
            self.fold();
        }
    }

    fn fold(&mut self) {
        for (totals, line) in self.totals.iter_mut().zip(&mut self.lines[1..]) {
            for (total, sum) in totals.iter_mut().zip(line) {
                *total += f64::from(std::mem::take(sum));
            }
        }
        self.pending = 0;
    }
}

/// How sums become results.
#[derive(Clone, Copy)]
pub struct Finish {
    /// Of the columns from the block's first on; null for none.
    pub bias: *const f32,
    pub accumulate: bool,
    /// Columns of the block that exist, at most 32.
    pub columns: usize,
}

impl Finish {
    /// Writes the first `rows` rows of `sums`, 32 apart, to rows that are `line` elements apart.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA. The rows of `to` are writable, and readable if they are added to, `self.columns`
    /// elements each; as many floats of a bias are readable.
    pub unsafe fn write(
        &self,
        sums: &[f32],
        to: Target,
        line: usize,
        rows: usize,
        moments: Option<&mut ColumnSums>,
    ) {
        let whole = self.columns == SIDE && self.bias.is_null();
        let wide = whole && is_x86_feature_detected!("avx512bf16");
        // SAFETY: the caller vouches for the memory and for AVX2; the other instructions are there if they are detected.
        unsafe {
            match to {
                Target::Bf16(to) if wide && !self.accumulate => {
                    rows_avx512(sums, to, line, rows, moments);
                }
                Target::Bf16(to) if wide && moments.is_none() => {
                    add_rows_avx512(sums, to, line, rows);
                }
                Target::Bf16(to) if whole && !self.accumulate => {
                    rows_avx2(sums, to, line, rows, moments);
                }
                _ => self.write_any(sums, to, line, rows, moments),
            }
        }
    }

    /// Element by element: edges, biases, and additions.
    ///
    /// # Safety
    /// As [`Finish::write`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn write_any(
        &self,
        sums: &[f32],
        to: Target,
        line: usize,
        rows: usize,
        mut moments: Option<&mut ColumnSums>,
    ) {
        for (i, sums) in sums.chunks_exact(SIDE).enumerate().take(rows) {
            let mut values = [0.0; SIDE];
            values.copy_from_slice(sums);
            if !self.bias.is_null() {
                for (j, value) in values.iter_mut().enumerate().take(self.columns) {
                    // SAFETY: the caller vouches for the bias.
                    *value += unsafe { *self.bias.add(j) };
                }
            }
            match to.offset(i * line) {
                Target::F32(to) => {
                    // SAFETY: the caller vouches for the row.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, self.columns) };
                    for (to, value) in to.iter_mut().zip(&mut values) {
                        *value += if self.accumulate { *to } else { 0.0 };
                        *to = *value;
                    }
                }
                Target::Bf16(to) => {
                    // SAFETY: the caller vouches for the row.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, self.columns) };
                    for (to, value) in to.iter_mut().zip(&mut values) {
                        let before = if self.accumulate { widened(*to) } else { 0.0 };
                        *to = rounded(*value + before);
                        *value = widened(*to);
                    }
                }
            }
            if let Some(moments) = moments.as_deref_mut() {
                moments.add(&values);
            }
        }
        if let Some(moments) = moments {
            moments.count(rows);
        }
    }
}

impl ColumnSums {
    fn add(&mut self, row: &[f32; SIDE]) {
        if !self.started {
            self.started = true;
            self.lines[0] = *row;
        }
        let [shift, sum, squares] = &mut self.lines;
        for (((value, shift), sum), squares) in row.iter().zip(shift).zip(sum).zip(squares) {
            let d = value - *shift;
            *sum += d;
            *squares = d.mul_add(d, *squares);
        }
    }
}

/// Rounds whole rows of 32, and sums the rounded values. Sixteen columns at a time, so that their sums stay in registers.
///
/// # Safety
/// The processor has AVX2 and FMA; 32 elements of each of the rows at `to` are writable.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2(
    sums: &[f32],
    to: *mut u16,
    line: usize,
    rows: usize,
    mut moments: Option<&mut ColumnSums>,
) {
    let sums = &sums[..rows * SIDE];
    for part in 0..2 {
        let column = part * 16;
        let mut values = [0.0_f32; 16];
        let [mut shift, mut sum, mut squares] = [[0.0_f32; 16]; LINES];
        if let Some(moments) = moments.as_deref_mut() {
            if !moments.started {
                for (shift, sum) in moments.lines[0][column..].iter_mut().zip(&sums[column..][..16])
                {
                    *shift = widened(rounded(*sum));
                }
            }
            shift.copy_from_slice(&moments.lines[0][column..][..16]);
            sum.copy_from_slice(&moments.lines[1][column..][..16]);
            squares.copy_from_slice(&moments.lines[2][column..][..16]);
        }
        for (i, row) in sums.chunks_exact(SIDE).enumerate() {
            // SAFETY: the caller vouches for 32 elements of each row.
            let to = unsafe { std::slice::from_raw_parts_mut(to.add(i * line + column), 16) };
            for ((to, value), x) in to.iter_mut().zip(&mut values).zip(&row[column..][..16]) {
                *to = rounded(*x);
                *value = widened(*to);
            }
            if moments.is_some() {
                for j in 0..16 {
                    let d = values[j] - shift[j];
                    sum[j] += d;
                    squares[j] = d.mul_add(d, squares[j]);
                }
            }
        }
        if let Some(moments) = moments.as_deref_mut() {
            moments.lines[1][column..][..16].copy_from_slice(&sum);
            moments.lines[2][column..][..16].copy_from_slice(&squares);
        }
    }
    if let Some(moments) = moments {
        moments.started |= rows > 0;
        moments.count(rows);
    }
}

/// [`rows_avx2`] with one conversion for 32 elements, which every processor with tiles has. It rounds alike, and writes numbers
/// below 2^-126 as zero, as the tiles do.
///
/// # Safety
/// The processor has AVX-512F, BW and BF16; 32 elements of each of the rows at `to` are writable.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma")]
unsafe fn rows_avx512(
    sums: &[f32],
    to: *mut u16,
    line: usize,
    rows: usize,
    moments: Option<&mut ColumnSums>,
) {
    let sums = &sums[..rows * SIDE];
    // SAFETY: the caller vouches for the instructions.
    let round = |row: &[f32]| unsafe { round_avx512(halves_avx512(row)) };
    let Some(moments) = moments else {
        for (i, row) in sums.chunks_exact(SIDE).enumerate() {
            // SAFETY: the caller vouches for the row.
            unsafe { _mm512_storeu_si512(to.add(i * line).cast(), round(row)) };
        }
        return;
    };
    // SAFETY: the caller vouches for the instructions.
    let widen = |x: __m512i| unsafe { widen_avx512(x) };
    let ColumnSums { started, lines, .. } = &mut *moments;
    if !*started && rows > 0 {
        *started = true;
        let first = widen(round(&sums[..SIDE]));
        for (part, first) in first.into_iter().enumerate() {
            // SAFETY: sixteen floats of a line.
            unsafe { _mm512_storeu_ps(lines[0][part * 16..].as_mut_ptr(), first) };
        }
    }
    // SAFETY: sixteen floats of a line.
    let mut state = lines.map(|line| unsafe {
        [_mm512_loadu_ps(line.as_ptr()), _mm512_loadu_ps(line[16..].as_ptr())]
    });
    for (i, row) in sums.chunks_exact(SIDE).enumerate() {
        let stored = round(row);
        // SAFETY: the caller vouches for the row.
        unsafe { _mm512_storeu_si512(to.add(i * line).cast(), stored) };
        for (part, value) in widen(stored).into_iter().enumerate() {
            let d = _mm512_sub_ps(value, state[0][part]);
            state[1][part] = _mm512_add_ps(state[1][part], d);
            state[2][part] = _mm512_fmadd_ps(d, d, state[2][part]);
        }
    }
    for (line, state) in lines.iter_mut().zip(state).skip(1) {
        for (part, state) in state.into_iter().enumerate() {
            // SAFETY: sixteen floats of a line.
            unsafe { _mm512_storeu_ps(line[part * 16..].as_mut_ptr(), state) };
        }
    }
    moments.count(rows);
}

/// Adds whole rows of 32 to what is there, and rounds the sums as [`rows_avx512`] does.
///
/// # Safety
/// As [`rows_avx512`]; the rows are readable, too.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add_rows_avx512(sums: &[f32], to: *mut u16, line: usize, rows: usize) {
    for (i, row) in sums[..rows * SIDE].chunks_exact(SIDE).enumerate() {
        // SAFETY: the caller vouches for the row.
        unsafe {
            let to = to.add(i * line).cast();
            let [low, high] = halves_avx512(row);
            let [low_before, high_before] = widen_avx512(_mm512_loadu_si512(to));
            let sums = [_mm512_add_ps(low, low_before), _mm512_add_ps(high, high_before)];
            _mm512_storeu_si512(to.cast(), round_avx512(sums));
        }
    }
}

/// The halves of a row of 32.
///
/// # Safety
/// The processor has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves_avx512(row: &[f32]) -> [__m512; 2] {
    let row = &row[..SIDE];
    // SAFETY: two halves of 32 floats.
    unsafe { [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row[16..].as_ptr())] }
}

/// # Safety
/// The processor has AVX-512F and BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn round_avx512([low, high]: [__m512; 2]) -> __m512i {
    // SAFETY: both vectors are 512 bits without a meaning of their own.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// # Safety
/// The processor has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn widen_avx512(x: __m512i) -> [__m512; 2] {
    let half =
        |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    [half(_mm512_castsi512_si256(x)), half(_mm512_extracti64x4_epi64::<1>(x))]
}

//! The two tile kernels: a few pixels times a few filters (`Correlate`), and a few channels times a
//! few filters (`Outer`).
//!
//! A tile keeps `M` rows of `NV` vectors in registers through a whole reduction. Each step loads
//! `NV` vectors of one operand, broadcasts `M` floats of the other, and issues `M * NV`
//! multiply-adds: on AVX-512 14 x 2 = 28 of them for 16 loads, which keeps both multiply-add ports
//! busy. The operands come packed (`slab.rs`, `filter.rs`), so that all `M` broadcast addresses are
//! one register plus constants.
//!
//! Generic over the vector; `kernel.rs` instantiates them inside functions that enable an
//! instruction set.

use crate::LINE;
use crate::vector::{Vector, prefetch};

/// The most rows of a tile, on any instruction set.
pub const MAX_ROWS: usize = 28;

/// Runs a block for every row below `$rows`, a constant, with the row as a literal. A loop that the
/// compiler does not unroll keeps the accumulators in memory (it happened from 12 rows of two vectors
/// on, at a third of the speed).
macro_rules! each_row {
    ($rows:expr, |$m:ident| $block:block) => {
        each_row!(@ $rows, $m, $block,
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27)
    };
    (@ $rows:expr, $m:ident, $block:block, $($row:literal)*) => {
        $(if $row < $rows {
            let $m: usize = $row;
            $block
        })*
    };
}

/// Prefetch distance of the filters, in channels. They stream from the second-level cache.
const AHEAD: usize = 16;

/// One tile of a correlation: `y[m] = sum over taps and channels of x[m + tap, channel] * w[tap,
/// channel]`.
pub struct Correlate<'a> {
    /// Address in the slab of the tile's first pixel at tap (0, 0), channel 0.
    pub x: *const f32,
    /// Packed filters of this block of outputs: `[c/block][r][s][block][NV * LANES]`.
    pub w: *const f32,
    /// First output of the tile's block of filters.
    pub y: *mut f32,
    /// Offset of pixel `m` of the tile from `y`, in floats.
    pub y_offsets: &'a [usize; MAX_ROWS],
    /// How many of the `NV * LANES` outputs exist; the others are packed as zeros and not stored.
    pub live: usize,
    /// Whether the sums are added to what `y` holds.
    pub accumulate: bool,
    /// Input channels.
    pub c: usize,
    /// Channels per block of the slab.
    pub block: usize,
    /// Tap rows and tap columns of the filter.
    pub taps: (usize, usize),
    /// The half-open range of the tap rows inside the image.
    pub tap_rows: (usize, usize),
    /// The half-open range of the tap columns inside the image.
    pub tap_columns: (usize, usize),
    /// Floats from one block of channels of the slab to the next.
    pub x_block: usize,
    /// Floats from one tap row to the next.
    pub x_row: usize,
    /// Floats from one column phase to the next.
    pub x_phase: usize,
    /// Floats from a column to the next of the same phase.
    pub x_column: usize,
    /// Column phases of the slab.
    pub stride: usize,
    /// What to prefetch meanwhile.
    pub ahead: Ahead,
}

/// What a tile prefetches while it computes.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// The first pair of cache lines. The address may be invalid.
    pub from: *const f32,
    /// Floats from a pair to the next.
    pub step: usize,
    /// Pairs per block of channels.
    pub pairs: usize,
}

impl Ahead {
    /// No prefetch.
    pub const NOTHING: Ahead = Ahead { from: std::ptr::null(), step: 0, pairs: 0 };
}

/// # Safety
/// `V`'s instruction set is enabled. `t.x` and `t.w` cover every tap in range for `M` pixels
/// `PITCH` floats apart and `t.c` channels; `t.live <= NV * LANES` floats at each of the first `M`
/// `t.y_offsets` are writable (readable too when accumulating).
#[inline(always)]
pub(crate) unsafe fn correlate<V: Vector, const M: usize, const NV: usize, const PITCH: usize>(
    t: &Correlate<'_>,
) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        let width = NV * V::LANES;
        let mut acc = [[V::zero(); NV]; M];
        // prefetch the outputs, so that the stores at the end hit the cache
        for offset in &t.y_offsets[..M] {
            for j in 0..NV {
                prefetch(t.y.wrapping_add(offset + j * V::LANES));
            }
        }
        let (first, last) = t.tap_columns;
        let first_column = (first % t.stride) * t.x_phase + (first / t.stride) * t.x_column;
        let wrap = (t.stride * t.x_phase).wrapping_sub(t.x_column);
        let (mut x_block, mut w_block) = (t.x, t.w);
        let mut ahead = t.ahead.from;
        let mut remaining = t.c;
        while remaining > 0 {
            let channels = remaining.min(t.block);
            for _ in 0..t.ahead.pairs {
                prefetch(ahead);
                prefetch(ahead.wrapping_add(LINE));
                ahead = ahead.wrapping_add(t.ahead.step);
            }
            for i in t.tap_rows.0..t.tap_rows.1 {
                let mut x_tap = x_block.add(i * t.x_row + first_column);
                let mut w = w_block.add((i * t.taps.1 + first) * channels * width);
                let mut phase = first % t.stride;
                for _ in first..last {
                    let mut x = x_tap;
                    for _ in 0..channels {
                        let mut filters = [V::zero(); NV];
                        for (j, f) in filters.iter_mut().enumerate() {
                            *f = V::load(w.add(j * V::LANES));
                            prefetch(w.wrapping_add(AHEAD * width + j * V::LANES));
                        }
                        for (m, row) in acc.iter_mut().enumerate() {
                            let pixel = V::splat(x.add(m * PITCH));
                            for (a, f) in row.iter_mut().zip(filters) {
                                *a = pixel.mul_add(f, *a);
                            }
                        }
                        w = w.add(width);
                        x = x.add(1);
                    }
                    phase += 1;
                    x_tap = x_tap.wrapping_add(t.x_phase);
                    if phase == t.stride {
                        phase = 0;
                        x_tap = x_tap.wrapping_sub(wrap);
                    }
                }
            }
            w_block = w_block.add(t.taps.0 * t.taps.1 * channels * width);
            x_block = x_block.wrapping_add(t.x_block);
            remaining -= channels;
        }
        each_row!(M, |m| {
            let y = t.y.add(t.y_offsets[m]);
            if t.live == width && !t.accumulate {
                for (j, &a) in acc[m].iter().enumerate() {
                    a.store(y.add(j * V::LANES));
                }
            } else {
                store_row(y, acc[m], t.live, t.accumulate);
            }
        });
    }
}

/// Writes or adds the first `live` floats of a row of accumulators.
///
/// # Safety
/// `V`'s instruction set is enabled; `live` floats at `y` are writable (readable too if
/// `accumulate`).
#[inline(always)]
unsafe fn store_row<V: Vector, const NV: usize>(
    y: *mut f32,
    row: [V; NV],
    live: usize,
    accumulate: bool,
) {
    for (j, a) in row.into_iter().enumerate() {
        let live = live.saturating_sub(j * V::LANES).min(V::LANES);
        let y = y.wrapping_add(j * V::LANES);
        // SAFETY: at most the first `live` floats of the row are accessed.
        unsafe {
            let sum = if accumulate { V::load_first(y, live).add(a) } else { a };
            sum.store_first(y, live);
        }
    }
}

/// One tile of a weight gradient: `dw[m] += sum over pixels of x[pixel, m] * dy[pixel]`.
pub struct Outer {
    /// First channel of the tile at the first pixel.
    pub x: *const f32,
    /// First filter of the tile at the first pixel.
    pub dy: *const f32,
    /// `[M][NV * LANES]`.
    pub dw: *mut f32,
    /// Runs of adjacent pixels.
    pub runs: usize,
    /// Pixels of a run.
    pub length: usize,
    /// Floats from a run of `x` to the next.
    pub x_run: usize,
    /// Floats from a run of `dy` to the next.
    pub dy_run: usize,
    /// Floats from a pixel of a run of `x` to the next.
    pub x_pixel: usize,
    /// Floats from a pixel of a run of `dy` to the next.
    pub dy_pixel: usize,
}

/// # Safety
/// `V`'s instruction set is enabled. `t.x` and `t.dy` cover `t.runs` runs of `t.length` pixels,
/// with `M` channels and `NV * LANES` filters at each; `t.dw` is `M * NV * LANES` readable and
/// writable floats.
#[inline(always)]
pub(crate) unsafe fn outer<V: Vector, const M: usize, const NV: usize>(t: &Outer) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        let width = NV * V::LANES;
        let mut acc = [[V::zero(); NV]; M];
        let (mut x_run, mut dy_run) = (t.x, t.dy);
        for _ in 0..t.runs {
            let (mut x, mut dy) = (x_run, dy_run);
            for _ in 0..t.length {
                let mut gradients = [V::zero(); NV];
                for (j, g) in gradients.iter_mut().enumerate() {
                    *g = V::load(dy.add(j * V::LANES));
                }
                for (m, row) in acc.iter_mut().enumerate() {
                    let channel = V::splat(x.add(m));
                    for (a, g) in row.iter_mut().zip(gradients) {
                        *a = channel.mul_add(g, *a);
                    }
                }
                x = x.wrapping_add(t.x_pixel);
                dy = dy.wrapping_add(t.dy_pixel);
            }
            x_run = x_run.wrapping_add(t.x_run);
            dy_run = dy_run.wrapping_add(t.dy_run);
        }
        for (m, row) in acc.iter().enumerate() {
            for (j, &a) in row.iter().enumerate() {
                let dw = t.dw.add(m * width + j * V::LANES);
                V::load(dw).add(a).store(dw);
            }
        }
    }
}

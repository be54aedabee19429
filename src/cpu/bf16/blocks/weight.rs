//! Sums over pixels: `dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] x[n, p t + r - pad, q t + s - pad, c]`, in f32. GEMMs
//! over rows too: their rows are pixels.
//!
//! A step of 32 terms is two columns of sixteen images, so that a tap is an offset into the packed `x` and no product is with
//! padding between images. Of a plain product sixteen pixels in a row stand for the images, and the next sixteen for the next
//! column. `dy` is the left operand (filters by terms), `x` the right one (pairs of terms by channels).
//!
//! The sum is cut into chunks and the filters into sets; chunks are added in order. With one chunk the tiles start from `dw`
//! and end there.

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::block::{Live, Multiplier, Operands, Run, SIDE, Sums, TILE};
use super::pack::{self, Row};
use super::rows::{Rows, gather};
use super::scratch::{Part, Scratch, Shared, Slots};
use crate::cpu::bf16::Bf16Path;
use crate::cpu::conv2d::Conv2dDims;

/// Tasks that a sum is cut into where its size allows it.
const TASKS: usize = 16;
/// Images, or pixels, of a step.
const IMAGES: usize = 16;
/// Columns that a row of a plain product has.
const COLUMNS: usize = 32;
/// Bytes of packed operands of a task at a time: they stay in the second-level cache.
const PACK_BYTES: usize = 1 << 20;
/// Bytes of the sums of all chunks together.
const CHUNK_BYTES: usize = 2 << 20;
/// A line between blocks of channels, so that they do not compete for the same sets of a cache.
const GAP: usize = 64;

/// The operands.
#[derive(Clone, Copy)]
pub struct Reduction {
    by: Bf16Path,
    /// Of a plain product those of its stand-in.
    d: Conv2dDims,
    /// Of a plain product: pixels, and which of them `x` has.
    plain: Option<(usize, Rows)>,
    x: Shared,
    dy: Shared,
}

impl Reduction {
    pub fn convolution(by: Bf16Path, d: &Conv2dDims, x: &[bf16], dy: &[bf16]) -> Self {
        if super::gathers(d) {
            let sizes = [d.k, d.r * d.s * d.c];
            return Self::plain(by, d.n * d.p * d.q, sizes, Rows::Taps(*d), x, dy);
        }
        let (x_start, dy_start) = (Shared::of(x), Shared::of(dy));
        if (d.r, d.s, d.pad) == (1, 1, 0) {
            return Self::plain(by, d.n * d.p * d.q, [d.k, d.c], Rows::met(d), x, dy);
        }
        Self { by, d: *d, plain: None, x: x_start, dy: dy_start }
    }

    /// `dw [k, c] = dyᵀ x` over `pixels` rows.
    pub fn plain(
        by: Bf16Path,
        pixels: usize,
        [k, c]: [usize; 2],
        rows: Rows,
        x: &[bf16],
        dy: &[bf16],
    ) -> Self {
        let q = pixels.div_ceil(IMAGES).clamp(1, COLUMNS);
        let p = pixels.div_ceil(IMAGES * q).max(1);
        let (n, r, s, stride, pad) = (IMAGES, 1, 1, 1, 0);
        let d = Conv2dDims { n, h: p, w: q, c, k, r, s, p, q, stride, pad };
        Self { by, d, plain: Some((pixels, rows)), x: Shared::of(x), dy: Shared::of(dy) }
    }

    /// The gradients of a pixel, or nothing.
    fn dy_row(&self, group: usize, row: usize, column: usize, image: usize) -> Row {
        let d = &self.d;
        let pixel = match self.plain {
            _ if column >= d.q => None,
            Some((pixels, _)) => {
                let i = (row * d.q + column) * IMAGES + image;
                (i < pixels).then_some(i)
            }
            None => {
                let n = group * IMAGES + image;
                (n < d.n).then_some((n * d.p + row) * d.q + column)
            }
        };
        pixel.map_or(std::ptr::null(), |pixel| self.dy.row().wrapping_add(pixel * d.k))
    }

    /// The channels of a pixel of the image, or nothing.
    fn x_row(&self, group: usize, row: usize, column: usize, image: usize) -> Row {
        let d = &self.d;
        let pixel = match self.plain {
            _ if column >= d.w || row >= d.h => None,
            Some((pixels, rows)) => {
                let i = (row * d.w + column) * IMAGES + image;
                (i < pixels).then(|| rows.at(i))
            }
            None => {
                let n = group * IMAGES + image;
                (n < d.n).then_some((n * d.h + row) * d.w + column)
            }
        };
        pixel.map_or(std::ptr::null(), |pixel| self.x.row().wrapping_add(pixel * d.c))
    }
}

/// The cut into tasks, from the shape alone.
#[derive(Debug)]
struct Cut {
    /// Rows of `dy` in a band, and bands of a group of sixteen images.
    rows: usize,
    bands: usize,
    /// Bands of all groups; bands packed together; such packs; packs of a chunk; chunks.
    units: usize,
    together: usize,
    packs: usize,
    packs_per_chunk: usize,
    chunks: usize,
    /// Blocks of 32 filters and of 32 channels; blocks of filters in a set; sets.
    k_blocks: usize,
    c_blocks: usize,
    set: usize,
    sets: usize,
    /// Steps of a row.
    steps: usize,
    /// Columns of a phase of a packed row of `x`, and its rows in a unit.
    phase: usize,
    x_rows: usize,
}

impl Cut {
    fn new(d: &Conv2dDims) -> Self {
        let (k_blocks, c_blocks) = (d.k.div_ceil(SIDE), d.c.div_ceil(SIDE));
        let steps = d.q.div_ceil(2);
        let groups = d.n.div_ceil(IMAGES);
        let sums_bytes = k_blocks * c_blocks * d.r * d.s * SIDE * SIDE * 4;
        let most_chunks = (CHUNK_BYTES / sums_bytes).clamp(1, TASKS);
        let most_sets = TASKS.div_ceil(most_chunks).min(k_blocks);
        let blocks = 2 * (c_blocks + k_blocks.div_ceil(most_sets));
        let most_steps = (PACK_BYTES / (blocks * TILE)).clamp(16, 64);
        let rows = (most_steps / steps).clamp(1, d.p);
        let bands = d.p.div_ceil(rows);
        let rows = d.p.div_ceil(bands);
        let units = groups * bands;
        let together = (most_steps / (rows * steps)).clamp(1, units);
        // As many packs as chunks can use, where there are enough bands.
        let together = together.min(units.div_ceil(most_chunks));
        let packs = units.div_ceil(together);
        let packs_per_chunk = packs.div_ceil(most_chunks.min(packs));
        let chunks = packs.div_ceil(packs_per_chunk);
        let set = k_blocks.div_ceil(TASKS.div_ceil(chunks).min(k_blocks));
        let sets = k_blocks.div_ceil(set);
        let phase = (2 * steps * d.stride + d.s).div_ceil(d.stride) + 1;
        let x_rows = (rows - 1) * d.stride + d.r;
        Self {
            rows,
            bands,
            units,
            together,
            packs,
            packs_per_chunk,
            chunks,
            k_blocks,
            c_blocks,
            set,
            sets,
            steps,
            phase,
            x_rows,
        }
    }

    /// Bytes of a packed row, of a unit and of a pack of sixteen channels of `x`.
    fn x_row(&self, d: &Conv2dDims) -> usize {
        d.stride * self.phase * TILE / 2
    }

    fn x_block(&self, d: &Conv2dDims) -> usize {
        self.together * self.x_rows * self.x_row(d) + GAP
    }

    fn x_pack(&self, d: &Conv2dDims) -> usize {
        2 * self.c_blocks * self.x_block(d)
    }

    /// Likewise of sixteen filters of `dy`.
    fn dy_unit(&self) -> usize {
        self.rows * self.steps * TILE
    }

    fn dy_block(&self) -> usize {
        self.together * self.dy_unit() + GAP
    }

    fn dy_pack(&self) -> usize {
        2 * self.set * self.dy_block()
    }

    /// The units of a pack.
    fn pack(&self, pack: usize) -> std::ops::Range<usize> {
        pack * self.together..((pack + 1) * self.together).min(self.units)
    }

    /// Rows of `dy` in a unit, and the first.
    fn rows_of(&self, unit: usize, d: &Conv2dDims) -> (usize, usize) {
        let first = unit % self.bands * self.rows;
        (first, self.rows.min(d.p.saturating_sub(first)))
    }

    /// Whether tiles start from `dw` and end there.
    fn direct(&self, d: &Conv2dDims) -> bool {
        self.chunks == 1 && d.k.is_multiple_of(SIDE) && d.c.is_multiple_of(SIDE)
    }
}

struct Parts {
    /// Packed `x` of all packs, where several sets read it.
    x: Part,
    /// A pack of a task: `dy`, then `x` if it is not shared.
    packs: Slots,
    /// `[chunks, filters, taps, channels]` in whole blocks.
    sums: Part,
    chunk: usize,
}

fn parts(scratch: &mut Scratch, cut: &Cut, d: &Conv2dDims) -> Parts {
    let chunk = cut.k_blocks * cut.c_blocks * d.r * d.s * SIDE * SIDE;
    let (shared, own) = if cut.sets > 1 { (cut.packs, 0) } else { (0, 1) };
    let pack = cut.dy_pack() + own * cut.x_pack(d);
    Parts {
        x: scratch.part(shared * cut.x_pack(d)),
        packs: Slots::new(scratch, cut.chunks * cut.sets, pack),
        sums: scratch.part(if cut.direct(d) { 0 } else { cut.chunks * chunk * 4 }),
        chunk,
    }
}

/// Bytes of scratch.
pub fn scratch_len(reduction: &Reduction) -> usize {
    let mut scratch = Scratch::counting();
    parts(&mut scratch, &Cut::new(&reduction.d), &reduction.d);
    scratch.len()
}

/// The start of `dw`, for tasks that write different filters of it.
#[derive(Clone, Copy)]
struct Gradient(*mut f32);
// SAFETY: the memory outlives the tasks, and each task accesses its own part only.
unsafe impl Send for Gradient {}
// SAFETY: as above.
unsafe impl Sync for Gradient {}

impl Gradient {
    fn start(self) -> *mut f32 {
        self.0
    }
}

/// Computes `dw [k, r, s, c]`, or adds to it.
///
/// # Safety
/// The reduction's path is available, and the slices of the reduction are still borrowed and of its sizes.
pub unsafe fn run(reduction: &Reduction, dw: &mut [f32], accumulate: bool, workspace: &mut [f32]) {
    let d = &reduction.d;
    let cut = Cut::new(d);
    let mut scratch = Scratch::new(workspace);
    let parts = parts(&mut scratch, &cut, d);
    if cut.sets > 1 {
        (0..cut.packs).into_par_iter().each(|pack| {
            // SAFETY: AVX2 comes with either path; each task writes a pack of its own.
            unsafe { pack_x(reduction, &cut, pack, parts.x.at(pack * cut.x_pack(d))) };
        });
    }
    let gradient = Gradient(dw.as_mut_ptr());
    (0..cut.chunks * cut.sets).into_par_iter().each(|task| {
        // SAFETY: the caller vouches for path and operands; tasks write different filters of different chunks, and have slots of
        // their own.
        parts.packs.lend(|pack| unsafe {
            chunk(reduction, &cut, &parts, (task, pack), gradient, accumulate);
        });
    });
    if cut.direct(d) {
        return;
    }
    let (taps, c) = (d.r * d.s, d.c);
    let line = cut.c_blocks * SIDE;
    let sums = parts.sums.floats(cut.chunks * parts.chunk);
    dw.par_chunks_mut(c).with_min_len((1 << 12) / c.min(1 << 12)).enumerate().each(|(i, dw)| {
        let at = (i / taps * taps + i % taps) * line;
        let chunk = |chunk: usize| &sums[chunk * parts.chunk + at..][..c];
        if accumulate {
            add(dw, chunk(0));
        } else {
            dw.copy_from_slice(chunk(0));
        }
        (1..cut.chunks).for_each(|i| add(dw, chunk(i)));
    });
}

#[multiversion::multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// Packs the rows of `x` that the units of a pack meet: of each block of sixteen channels `[unit][row][phase][column][8 pairs of
/// images][16][2]`.
///
/// # Safety
/// The slices are of the reduction's sizes; a pack at `to` is writable.
#[target_feature(enable = "avx2")]
unsafe fn pack_x(reduction: &Reduction, cut: &Cut, pack: usize, to: *mut u8) {
    let d = &reduction.d;
    let (x_row, x_block) = (cut.x_row(d), cut.x_block(d));
    let mut gathered = Vec::new();
    for (u, unit) in cut.pack(pack).enumerate() {
        let (group, (first, rows)) = (unit / cut.bands, cut.rows_of(unit, d));
        for i in 0..(rows.max(1) - 1) * d.stride + d.r {
            let row = (first * d.stride + i).wrapping_sub(d.pad);
            if row >= d.h {
                continue; // no tap meets it
            }
            let to = to.wrapping_add((u * cut.x_rows + i) * x_row);
            for place in 0..d.stride * cut.phase {
                let to = to.wrapping_add(place * TILE / 2);
                if let Some((pixels, Rows::Taps(taps))) = reduction.plain {
                    let images = gathered_rows(reduction, &taps, pixels, row, place, &mut gathered);
                    // SAFETY: as below, from the gathered rows.
                    unsafe { pack::pairs(to.cast(), &images, (0, d.c), 2 * cut.c_blocks, x_block) };
                    continue;
                }
                let column = (place % cut.phase * d.stride + place / cut.phase).wrapping_sub(d.pad);
                let pixel = |image| reduction.x_row(group, row, column, image);
                let images: pack::Rows<IMAGES> = pack::Rows::new(pixel);
                // SAFETY: channels of pixels that exist; half a tile in each block of the caller's pack.
                unsafe { pack::pairs(to.cast(), &images, (0, d.c), 2 * cut.c_blocks, x_block) };
            }
        }
    }
}

/// The rows of sixteen pixels, each with the pixels under its filter.
fn gathered_rows(
    reduction: &Reduction,
    taps: &Conv2dDims,
    pixels: usize,
    row: usize,
    column: usize,
    to: &mut Vec<u16>,
) -> pack::Rows<IMAGES> {
    let d = &reduction.d;
    to.resize(IMAGES * d.c, 0);
    // SAFETY: the reduction's slice is borrowed and of this size.
    let x =
        unsafe { std::slice::from_raw_parts(reduction.x.row(), taps.n * taps.h * taps.w * taps.c) };
    let exists = |image: usize| {
        let i = (row * d.w + column) * IMAGES + image;
        (column < d.w && i < pixels).then_some(i)
    };
    for (image, line) in to.chunks_exact_mut(d.c).enumerate() {
        if let Some(i) = exists(image) {
            gather(taps, x, i, line);
        }
    }
    pack::Rows::new(|image| match exists(image) {
        Some(_) => to[image * d.c..].as_ptr(),
        None => std::ptr::null(),
    })
}

/// Packs the gradients of the units of a pack, from filter `first_k` on: of each block of sixteen filters `[unit][row][step][16
/// filters][32 terms]`.
///
/// # Safety
/// As [`pack_x`], for `blocks` blocks.
#[target_feature(enable = "avx2")]
unsafe fn pack_dy(
    reduction: &Reduction,
    cut: &Cut,
    pack: usize,
    (first_k, blocks): (usize, usize),
    to: *mut u8,
) {
    let d = &reduction.d;
    for (u, unit) in cut.pack(pack).enumerate() {
        let (group, (first, rows)) = (unit / cut.bands, cut.rows_of(unit, d));
        for i in 0..rows {
            let terms = |step: usize| {
                pack::Rows::new(|j| {
                    let column = 2 * step + j / IMAGES;
                    reduction.dy_row(group, first + i, column, j % IMAGES)
                })
            };
            let mut next = terms(0);
            for step in 0..cut.steps {
                let terms = std::mem::replace(&mut next, terms(step + 1));
                next.prefetch_from(first_k, (d.k - first_k).min(blocks * 16).min(128));
                let to = to.wrapping_add(u * cut.dy_unit() + (i * cut.steps + step) * TILE);
                for block in 0..blocks {
                    let k = first_k + block * 16;
                    let to = to.wrapping_add(block * cut.dy_block());
                    // SAFETY: gradients of pixels that exist; a tile of the caller's memory.
                    unsafe { pack::transposed(to.cast(), &terms, k, d.k.saturating_sub(k)) };
                }
            }
        }
    }
}

/// One task: the filters of a set, summed over the pixels of a chunk.
///
/// # Safety
/// As [`run`]; no other task has the same set and chunk, or this slot.
#[target_feature(enable = "avx2")]
unsafe fn chunk(
    reduction: &Reduction,
    cut: &Cut,
    parts: &Parts,
    (task, dy): (usize, *mut u8),
    dw: Gradient,
    accumulate: bool,
) {
    let d = &reduction.d;
    let (chunk, set) = (task / cut.sets, task % cut.sets);
    let (first_block, taps) = (set * cut.set, d.r * d.s);
    let blocks = cut.set.min(cut.k_blocks - first_block);
    let direct = cut.direct(d);
    let (to, line) = if direct {
        (dw.start(), taps * d.c)
    } else {
        (parts.sums.at(chunk * parts.chunk * 4).cast(), taps * cut.c_blocks * SIDE)
    };
    let mut runs = Vec::with_capacity(cut.together * cut.rows);
    let mut started = direct && accumulate;
    let packs = chunk * cut.packs_per_chunk..((chunk + 1) * cut.packs_per_chunk).min(cut.packs);
    for pack in packs {
        let x = if cut.sets > 1 {
            parts.x.at(pack * cut.x_pack(d))
        } else {
            let x = dy.wrapping_add(cut.dy_pack());
            // SAFETY: the only set of this chunk.
            unsafe { pack_x(reduction, cut, pack, x) };
            x
        };
        // SAFETY: this task's memory.
        unsafe { pack_dy(reduction, cut, pack, (first_block * SIDE, 2 * blocks), dy) };
        // SAFETY: the caller vouches for the path.
        let multiplier = unsafe { Multiplier::new(reduction.by) };
        for block in 0..blocks {
            let filters = d.k - (first_block + block) * SIDE;
            for c_block in 0..cut.c_blocks {
                for tap in 0..taps {
                    runs.clear();
                    let left = dy as usize + 2 * block * cut.dy_block();
                    let right = x as usize + 2 * c_block * cut.x_block(d);
                    tap_runs(&mut runs, d, cut, pack, tap, (left, right));
                    let at = (first_block + block) * SIDE * line;
                    let at = at + tap * (line / taps) + c_block * SIDE;
                    let first: *mut f32 = to.wrapping_add(at);
                    let operands = Operands {
                        runs: &runs,
                        steps: cut.steps,
                        a_line: 64,
                        a_step: TILE,
                        b_step: TILE,
                        live: Live {
                            rows: [0, 16].map(|half| filters.saturating_sub(half).min(16)),
                            columns: (d.c - c_block * SIDE).min(SIDE),
                            ..Live::WHOLE
                        },
                    };
                    let halves = [first, first.wrapping_add(16 * line)];
                    let sums = Sums { halves, line: line * 4, accumulate: started };
                    // SAFETY: packed tiles of this pack; whole blocks of the sums, or of `dw`, of this task's filters.
                    unsafe { multiplier.multiply(&operands, sums) };
                }
            }
        }
        started = true;
    }
}

/// The runs of a tap: one for each row of `dy` that meets a row of the image.
fn tap_runs(
    runs: &mut Vec<Run>,
    d: &Conv2dDims,
    cut: &Cut,
    pack: usize,
    tap: usize,
    (left, right): (usize, usize),
) {
    let (r, s) = (tap / d.s, tap % d.s);
    let place = s % d.stride * cut.phase + s / d.stride;
    for (u, unit) in cut.pack(pack).enumerate() {
        let (first, rows) = cut.rows_of(unit, d);
        for i in 0..rows {
            if ((first + i) * d.stride + r).wrapping_sub(d.pad) >= d.h {
                continue;
            }
            let a = left + u * cut.dy_unit() + i * cut.steps * TILE;
            let row = (u * cut.x_rows + i * d.stride + r) * cut.x_row(d);
            let b = right + row + place * TILE / 2;
            runs.push(Run { a: [a, a + cut.dy_block()], b: [b, b + cut.x_block(d)] });
        }
    }
}

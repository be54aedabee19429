//! Convolution forward and its data gradient as sums over taps.
//!
//! A tile of the left operand is one pixel of sixteen images: the taps of an output pixel that lie outside the image are left
//! out, and strides and padding cost nothing. A task packs the rows of 16 or 32 images that a band of output rows meets, `[row][column]
//! [step][16 images][32 channels]`, and runs through the filters, 32 at a time.

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::block::{Live, Multiplier, Operands, Run, SIDE, Sums, TILE, last_part};
use super::finish::{Block, ColumnSums, Finish, Target};
use super::pack::{self, Row};
use super::rows::{Right, pack_right, right_len};
use super::scratch::{Part, Scratch, Shared, Slots};
use crate::cpu::bf16::moments::LINES;
use crate::cpu::bf16::{Bf16Path, Moments};
use crate::cpu::conv2d::Conv2dDims;

/// Images of a tile.
const IMAGES: usize = 16;
/// Bytes of the packed rows of a task: they stay in the second-level cache.
const SLAB_BYTES: usize = 768 << 10;
/// Tasks that a problem is cut into where its size allows it.
const TASKS: usize = 16;

/// Output pixels as sums over the taps that meet an input pixel.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    n: usize,
    /// Input `[n, h, w, c]`.
    h: usize,
    w: usize,
    c: usize,
    /// Output `[n, out_h, out_w, k]`.
    out_h: usize,
    out_w: usize,
    k: usize,
    r: usize,
    s: usize,
    stride: usize,
    pad: usize,
    gradient: bool,
    by: Bf16Path,
}

impl Problem {
    pub fn forward(by: Bf16Path, d: &Conv2dDims) -> Self {
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *d;
        Self { n, h, w, c, out_h: p, out_w: q, k, r, s, stride, pad, gradient: false, by }
    }

    pub fn data_gradient(by: Bf16Path, d: &Conv2dDims) -> Self {
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *d;
        Self {
            n,
            h: p,
            w: q,
            c: k,
            out_h: h,
            out_w: w,
            k: c,
            r,
            s,
            stride,
            pad,
            gradient: true,
            by,
        }
    }

    /// The input row (or column) of `len` that tap `tap` of output `o` meets, if any.
    #[inline]
    fn meets(&self, o: usize, tap: usize, len: usize) -> Option<usize> {
        let at = if self.gradient {
            let at = (o + self.pad).checked_sub(tap)?;
            if !at.is_multiple_of(self.stride) {
                return None;
            }
            at / self.stride
        } else {
            (o * self.stride + tap).checked_sub(self.pad)?
        };
        (at < len).then_some(at)
    }

    /// The input rows that some output rows meet.
    fn rows(&self, outputs: std::ops::Range<usize>) -> std::ops::Range<usize> {
        let met =
            outputs.flat_map(|o| (0..self.r).filter_map(move |tap| self.meets(o, tap, self.h)));
        met.fold(None, |range: Option<std::ops::Range<usize>>, row| {
            Some(range.map_or(row..row + 1, |range| range.start.min(row)..range.end.max(row + 1)))
        })
        .unwrap_or(0..0)
    }

    fn filters_len(&self) -> usize {
        self.r * self.s * right_len(self.c, self.k)
    }
}

/// The cut into tasks, from the shape alone.
struct Cut {
    /// Groups of images with moments of their own, images in each, and tasks of up to 32 images that they need.
    groups: usize,
    group_images: usize,
    batches: usize,
    /// Tiles of images in a task, 1 or 2. With one, blocks of sums are two pixels of it.
    tiles: usize,
    /// Output rows of a band, and bands.
    rows: usize,
    bands: usize,
    /// Input rows of the largest band.
    slab_rows: usize,
    /// Blocks of 32 filters in all, in a set, and sets.
    blocks: usize,
    set: usize,
    sets: usize,
    steps: usize,
}

impl Cut {
    fn new(p: &Problem, groups: usize) -> Self {
        let group_images = p.n / groups;
        let steps = p.c.div_ceil(SIDE);
        let largest = |rows: usize| {
            let band = |first: usize| p.rows(first..(first + rows).min(p.out_h)).len();
            (0..p.out_h).step_by(rows).map(band).max().unwrap_or(0)
        };
        // Batches and rows of a band with so many tiles of images.
        let cut = |tiles: usize| {
            let batches = group_images.div_ceil(tiles * IMAGES);
            let row_bytes = tiles * p.w * steps * TILE;
            let mut bands = 1;
            loop {
                let rows = p.out_h.div_ceil(bands);
                let enough = groups * batches * bands >= TASKS / 2;
                if rows <= 2 || (enough && largest(rows) * row_bytes <= SLAB_BYTES) {
                    return (batches, rows);
                }
                bands += 1;
            }
        };
        let mut tiles = group_images.div_ceil(IMAGES).min(2);
        let (mut batches, mut rows) = cut(tiles);
        // Low bands of wide images pack most rows twice. Neighbouring pixels of a strided gradient share few taps.
        let strided = p.gradient && p.stride > 1;
        if tiles == 2 && rows < 8 && p.w > 16 && !strided {
            tiles = 1;
            (batches, rows) = cut(tiles);
        }
        let all = groups * batches;
        let bands = p.out_h.div_ceil(rows);
        let blocks = p.k.div_ceil(SIDE);
        // Sets of filters pack the same rows again: only where there are too few tasks for any machine.
        let wanted = (TASKS / 2).div_ceil(all * bands).min(blocks);
        let set = blocks.div_ceil(wanted);
        let sets = blocks.div_ceil(set);
        let slab_rows = largest(rows);
        Self {
            groups,
            group_images,
            batches,
            tiles,
            rows,
            bands,
            slab_rows,
            blocks,
            set,
            sets,
            steps,
        }
    }

    fn tasks(&self) -> usize {
        self.groups * self.batches * self.bands * self.sets
    }

    /// Bytes of one tile's packed rows.
    fn slab(&self, p: &Problem) -> usize {
        self.slab_rows * p.w * self.steps * TILE
    }
}

struct Parts {
    filters: Part,
    slabs: Slots,
    zeros: Part,
    sums: Part,
}

fn parts(scratch: &mut Scratch, cut: &Cut, p: &Problem, moments: bool) -> Parts {
    let sums = cut.groups * cut.batches * cut.bands * LINES * p.k * 4;
    Parts {
        filters: scratch.part(p.filters_len()),
        slabs: Slots::new(scratch, cut.tasks(), cut.tiles * cut.slab(p)),
        zeros: scratch.part(cut.steps * TILE),
        sums: scratch.part(if moments { sums } else { 0 }),
    }
}

/// Bytes of scratch; with moments for `groups` groups unless it is 0.
pub fn scratch_len(p: &Problem, groups: usize) -> usize {
    let mut scratch = Scratch::counting();
    parts(&mut scratch, &Cut::new(p, groups.max(1)), p, groups > 0);
    scratch.len()
}

/// Computes the output, and its moments.
///
/// # Safety
/// The problem's path is available; the slices and `out` are of the problem's sizes.
pub unsafe fn run(
    p: &Problem,
    out: Target,
    x: &[bf16],
    w: &[bf16],
    accumulate: bool,
    moments: Option<Moments<'_>>,
    workspace: &mut [f32],
) {
    let cut = Cut::new(p, moments.as_ref().map_or(1, |moments| moments.groups));
    let mut scratch = Scratch::new(workspace);
    let parts = parts(&mut scratch, &cut, p, moments.is_some());
    let (x, w) = (Shared::of(x), Shared::of(w));
    let (taps, wanted) = (p.r * p.s, moments.is_some());
    // SAFETY: the part has these bytes.
    unsafe { parts.zeros.at(0).write_bytes(0, cut.steps * TILE) };
    (0..cut.blocks * taps).into_par_iter().each(|i| {
        let (block, tap) = (i / taps, i % taps);
        let to = parts.filters.at(i * cut.steps * 2 * TILE);
        let (right, tap, line) = if p.gradient {
            (Right::Plain, tap * p.k, taps * p.k)
        } else {
            (Right::Transposed, tap * p.c, taps * p.c)
        };
        // SAFETY: AVX2 comes with either path; the filters of a tap are a matrix with these lines.
        unsafe { pack_right(to, right, w.row().wrapping_add(tap), line, (p.c, p.k), block) };
    });
    (0..cut.tasks()).into_par_iter().each(|task| {
        // SAFETY: the caller vouches for the path and the memory; tasks write different outputs, and have slots of their own.
        parts.slabs.lend(|slab| unsafe {
            band(p, &cut, &parts, (task, slab), out, x, accumulate, wanted);
        });
    });
    if let Some(moments) = moments {
        let tasks = cut.batches * cut.bands;
        let sums = parts.sums.floats(cut.groups * tasks * LINES * p.k);
        moments.merge(sums, p.k, |i| {
            let (images, rows) = extent(p, &cut, i / cut.bands, i % cut.bands);
            images * rows.len() * p.out_w
        });
    }
}

/// Images of a batch, and output rows of a band.
fn extent(p: &Problem, cut: &Cut, batch: usize, band: usize) -> (usize, std::ops::Range<usize>) {
    let images = (cut.tiles * IMAGES).min(cut.group_images - batch * cut.tiles * IMAGES);
    (images, band * cut.rows..((band + 1) * cut.rows).min(p.out_h))
}

/// One task: a band of output rows of up to 32 images.
///
/// # Safety
/// As [`run`]; no other task writes these outputs or this slab.
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::too_many_arguments, reason = "one task of `run`, with its arguments")]
unsafe fn band(
    p: &Problem,
    cut: &Cut,
    parts: &Parts,
    (task, slab): (usize, *mut u8),
    out: Target,
    x: Shared,
    accumulate: bool,
    moments: bool,
) {
    let (set, rest) = (task % cut.sets, task / cut.sets);
    let (band, rest) = (rest % cut.bands, rest / cut.bands);
    let (batch, group) = (rest % cut.batches, rest / cut.batches);
    let (images, outputs) = extent(p, cut, batch, band);
    let first_image = group * cut.group_images + batch * cut.tiles * IMAGES;
    let rows = p.rows(outputs.clone());
    let pixel_len = cut.steps * TILE;
    for tile in 0..cut.tiles {
        let to = slab.wrapping_add(tile * cut.slab(p));
        let count = images.saturating_sub(tile * IMAGES).min(IMAGES);
        let from = x.row().wrapping_add((first_image + tile * IMAGES) * p.h * p.w * p.c);
        // SAFETY: rows of images that exist, into this task's slab.
        unsafe { pack_images(p, to, from, count, rows.clone(), cut.steps) };
    }
    // SAFETY: the caller vouches for the path.
    let multiplier = unsafe { Multiplier::new(p.by) };
    let mut sums = Block([0.0; SIDE * SIDE]);
    let start = sums.0.as_mut_ptr();
    let mut runs = Vec::with_capacity(p.r * p.s);
    let out_image = p.out_h * p.out_w * p.k;
    let at =
        |row: usize, column: usize| slab as usize + ((row - rows.start) * p.w + column) * pixel_len;
    let zeros = parts.zeros.at(0) as usize;
    for block in set * cut.set..((set + 1) * cut.set).min(cut.blocks) {
        let filters = parts.filters.at(block * p.r * p.s * cut.steps * 2 * TILE) as usize;
        let columns = (p.k - block * SIDE).min(SIDE);
        let finish = Finish { bias: std::ptr::null(), accumulate, columns };
        let mut column_sums = moments.then(ColumnSums::new);
        for o in outputs.clone() {
            // Two tiles of images, or two pixels of one.
            let step = if cut.tiles == 2 { 1 } else { 2 };
            for q in (0..p.out_w).step_by(step) {
                runs.clear();
                let count_of = |half: usize| match cut.tiles {
                    2 => images.saturating_sub(half * IMAGES).min(IMAGES),
                    _ if q + half < p.out_w => images.min(IMAGES),
                    _ => 0,
                };
                for r in 0..p.r {
                    let Some(row) = p.meets(o, r, p.h) else { continue };
                    for s in 0..p.s {
                        let first = p.meets(q, s, p.w).map(|column| at(row, column));
                        let second = if cut.tiles == 2 {
                            first.map(|first| first + cut.slab(p))
                        } else if q + 1 < p.out_w {
                            p.meets(q + 1, s, p.w).map(|column| at(row, column))
                        } else {
                            None
                        };
                        if first.is_none() && second.is_none() {
                            continue;
                        }
                        let b = filters + (r * p.s + s) * cut.steps * 2 * TILE;
                        let a = [first.unwrap_or(zeros), second.unwrap_or(zeros)];
                        runs.push(Run { a, b: [b, b + TILE] });
                    }
                }
                let operands = Operands {
                    runs: &runs,
                    steps: cut.steps,
                    a_line: 64,
                    a_step: TILE,
                    b_step: 2 * TILE,
                    live: Live { rows: [0, 1].map(count_of), columns, terms: last_part(p.c) },
                };
                let halves = [start, start.wrapping_add(16 * SIDE)];
                let block_sums = Sums { halves, line: 4 * SIDE, accumulate: false };
                // SAFETY: packed pixels, zeros and filters; the sums are a block of this task.
                unsafe { multiplier.multiply(&operands, block_sums) };
                let to = first_image * out_image + (o * p.out_w + q) * p.k + block * SIDE;
                for half in 0..2 {
                    let apart = if cut.tiles == 2 { IMAGES * out_image } else { p.k };
                    let sums = &sums.0[half * 16 * SIDE..][..16 * SIDE];
                    let (count, to) = (count_of(half), out.offset(to + half * apart));
                    if count > 0 {
                        // SAFETY: outputs of this task.
                        unsafe { finish.write(sums, to, out_image, count, column_sums.as_mut()) };
                    }
                }
            }
        }
        if let Some(column_sums) = column_sums {
            let block_of_rows = (group * cut.batches + batch) * cut.bands + band;
            let to = (block_of_rows * LINES * p.k + block * SIDE) * 4;
            // SAFETY: the lines of this band, in which this task alone writes these columns.
            unsafe { column_sums.write(parts.sums.at(to).cast(), p.k, columns) };
        }
    }
}

/// Packs rows of up to sixteen images: `[row][column][step][16 images][32 channels]`.
///
/// # Safety
/// `count` images at `from` are readable; the rows fit into the memory at `to`.
#[target_feature(enable = "avx2")]
unsafe fn pack_images(
    p: &Problem,
    to: *mut u8,
    from: Row,
    count: usize,
    rows: std::ops::Range<usize>,
    steps: usize,
) {
    let mut pixel = to;
    for row in rows {
        for column in 0..p.w {
            for image in 0..IMAGES {
                let row = if image < count {
                    from.wrapping_add(((image * p.h + row) * p.w + column) * p.c)
                } else {
                    std::ptr::null()
                };
                // SAFETY: a pixel of an image that exists, into a line of each of its tiles.
                unsafe { pack::lines(pixel.wrapping_add(image * 64), row, p.c, steps, TILE) };
            }
            pixel = pixel.wrapping_add(steps * TILE);
        }
    }
}

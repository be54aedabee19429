//! Weight gradient: `dw[k, r, s, c] = sum over n, p, q of x[n, p t + r - pad, q t + s - pad, c]
//! dy[n, p, q, k]`.
//!
//! For one tap it is a GEMM whose sum runs over pixels. The pixels are split into chunks and the
//! filters into sets; a task owns one set on one chunk and adds into its own partial sum, `[block of
//! k][r][s][c][width]`. The chunks are then summed in order. Chunks and sets depend on the shape
//! alone, so the order of the sum does not depend on the number of threads.
//!
//! A task packs a band of rows of `x` (`slab.rs`) and the same band of `dy`, then runs every tap
//! and block over them while they are in the cache. Taps outside the image are skipped.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::Conv2dDims;
use super::Isa;
use super::LINE;
use super::filter::Blocks;
use super::slab::Slab;
use super::slots::{self, Slots};
use selfsup_cpu_kernels::kernel;
use selfsup_cpu_kernels::tile::Outer;

/// Pixels in a band: enough that adding a tile to the partial sum is cheap, few enough that both
/// operands of a tile stay near the first-level cache.
const BAND_PIXELS: usize = 256;

/// The most floats of the slab of `x` (one row is always allowed).
const SLAB_FLOATS: usize = 160 * 1024;

/// The most floats of all partial sums (one chunk is always allowed).
const PARTIAL_FLOATS: usize = 4 * 1024 * 1024;

/// Target number of tasks, so that several threads finish together.
const TASKS_WANTED: usize = 32;

/// The most blocks of filters that share one packed band of `x`.
const BLOCKS_PER_SET: usize = 4;

/// How the sum is partitioned, from the shape and the instruction set.
#[derive(Clone, Copy, Debug)]
struct WeightGradientPlan {
    isa: Isa,
    blocks: Blocks,
    /// Blocks of filters in a set.
    set: usize,
    /// Images per group, output rows per band.
    group: usize,
    band: usize,
    /// Bands per chunk, and number of chunks.
    chunk: usize,
    chunks: usize,
    /// Channels of a tile.
    tile: usize,
    /// Floats of the packed band of `x` and of `dy`; 0 if the tiles read the tensor itself.
    slab_len: usize,
    dy_len: usize,
}

impl WeightGradientPlan {
    fn new(d: &Conv2dDims, isa: Isa) -> WeightGradientPlan {
        let blocks = Blocks { k: d.k, lanes: isa.lanes() };
        let widest = if d.k <= isa.lanes() { 1 } else { 2 };
        let (_, c) = taps(d);
        let tile = c.div_ceil(c.div_ceil(isa.tile_rows(widest)).max(1));
        let wanted = if merged(d) {
            1
        } else if (d.p, d.q) == (1, 1) {
            BAND_PIXELS
        } else {
            16usize.div_ceil(d.q.max(1))
        };
        let group = wanted.min(SLAB_FLOATS / d.c.max(1)).clamp(1, d.n.max(1));
        let slab = |band: usize| slab(d, tile, group, band);
        let mut band = 1;
        while band < d.p
            && (band + 1) * d.q * group <= BAND_PIXELS
            && slab(band + 1).len() <= SLAB_FLOATS
        {
            band += 1;
        }
        let bands = d.p.div_ceil(band);
        let units = d.n.div_ceil(group) * bands;
        let sums = blocks.padded() * d.r * d.s * d.c;
        // a chunk has several bands, or the partial sums cost more than they save
        let chunks_most = units.div_ceil(2).min(PARTIAL_FLOATS / sums.max(1)).max(1);
        let least = blocks.count().div_ceil(slots::MOST).max(1);
        let mut set = blocks.count().min(BLOCKS_PER_SET).max(least);
        while set > least && blocks.count().div_ceil(set) * chunks_most < TASKS_WANTED / 2 {
            set -= 1;
        }
        let sets = blocks.count().div_ceil(set).max(1);
        let chunk = units.div_ceil(TASKS_WANTED.div_ceil(sets).min(chunks_most)).max(1);
        // a single tile or block of a run has the same layout in the tensor as packed, unless images
        // are interleaved; in a GEMM the channels are read from the tensor, gradients are not (distant
        // lines share sets of the first-level cache, and tiles use two of each)
        let is_gemm = (d.r, d.s, d.stride, d.pad, d.h, d.w) == (1, 1, 1, 0, 1, 1);
        let x_in_order = is_gemm || group == 1 && d.c == tile && !merged(d);
        let slab_len = if x_in_order { 0 } else { slab(band).len() };
        let dy_in_order = (group == 1 || is_gemm) && blocks.count() == 1 && d.k == blocks.padded();
        let dy_len =
            if dy_in_order { 0 } else { gradient_slab(d, blocks, 0..set, group, band).len() };
        WeightGradientPlan {
            isa,
            blocks,
            set,
            group,
            band,
            chunk,
            chunks: units.div_ceil(chunk),
            tile,
            slab_len: slab_len.next_multiple_of(LINE),
            dy_len: dy_len.next_multiple_of(LINE),
        }
    }

    fn sums_len(&self, d: &Conv2dDims) -> usize {
        (self.blocks.padded() * d.r * d.s * d.c).next_multiple_of(LINE)
    }

    fn sets(&self) -> usize {
        self.blocks.count().div_ceil(self.set)
    }

    fn scratch_len(&self) -> usize {
        self.slab_len + self.dy_len
    }
}

fn slab(d: &Conv2dDims, tile: usize, images: usize, band: usize) -> Slab {
    let (c, r, stride_y, pad) = (d.c, d.r, d.stride, d.pad as isize);
    let (s, stride_x, q, block) =
        if merged(d) { (1, 1, (d.q - 1) * d.stride + d.s, c) } else { (d.s, d.stride, d.q, tile) };
    let pitch = block.next_power_of_two().max(4);
    Slab {
        c,
        of: c,
        block,
        pitch,
        images,
        r,
        s,
        stride_y,
        stride_x,
        pad_y: pad,
        pad_x: pad,
        band,
        q,
    }
}

/// Floats between pixels of a block of gradients.
fn gradient_pitch(blocks: Blocks) -> usize {
    blocks.full().min(blocks.padded())
}

/// The gradients of a set of blocks. Padding filters hold arbitrary values, which only affect
/// padding sums.
fn gradient_slab(
    d: &Conv2dDims,
    blocks: Blocks,
    set: std::ops::Range<usize>,
    images: usize,
    band: usize,
) -> Slab {
    let c = d.k.min(set.end * blocks.full()) - set.start * blocks.full();
    let pitch = gradient_pitch(blocks);
    let (r, s, stride_y, stride_x, pad_y, pad_x) = (1, 1, 1, 1, 0, 0);
    let (of, block, q) = (d.k, pitch, d.q);
    Slab { c, of, block, pitch, images, r, s, stride_y, stride_x, pad_y, pad_x, band, q }
}

/// Whether the taps of a filter row are read as one. A stem's four channels make tiles too small,
/// but its pixels are contiguous, so that `s` taps of 4 channels are one tap of `4 s`.
fn merged(d: &Conv2dDims) -> bool {
    d.c == 4 && d.s > 1
}

/// Taps per filter row and channels, for the tile kernels.
fn taps(d: &Conv2dDims) -> (usize, usize) {
    if merged(d) { (1, d.s * d.c) } else { (d.s, d.c) }
}

pub fn workspace_len(d: &Conv2dDims, isa: Isa) -> usize {
    let d = &d.flattened();
    let plan = WeightGradientPlan::new(d, isa);
    plan.chunks * (plan.sums_len(d) + plan.sets() * plan.scratch_len())
}

/// `dw` `[k, r, s, c]`; `dw +=` if `accumulate`.
pub fn run(
    d: &Conv2dDims,
    isa: Isa,
    dw: &mut [f32],
    x: &[f32],
    dy: &[f32],
    workspace: &mut [f32],
    accumulate: bool,
) {
    let d = &d.flattened();
    let plan = WeightGradientPlan::new(d, isa);
    let sums_len = plan.sums_len(d);
    let per_set = plan.set * plan.blocks.full() * d.r * d.s * d.c;
    let (sums, scratch) = workspace.split_at_mut(plan.chunks * sums_len);
    let slots = Slots::new(scratch, plan.scratch_len());
    sums.par_chunks_mut(sums_len).enumerate().each(|(chunk, sums)| {
        sums.par_chunks_mut(per_set).take(plan.sets()).enumerate().each(|(set, sums)| {
            let task = Task { d, plan: &plan, x, dy, first_block: set * plan.set };
            slots.lend(|scratch| task.run(sums, scratch, chunk));
        });
    });
    finish(d, &plan, dw, sums, accumulate);
}

/// Sums the chunks in order and stores the filters in their own layout.
fn finish(
    d: &Conv2dDims,
    plan: &WeightGradientPlan,
    dw: &mut [f32],
    sums: &mut [f32],
    accumulate: bool,
) {
    let (total, others) = sums.split_at_mut(plan.sums_len(d));
    let others = &*others;
    let stretch = 4096;
    total.par_chunks_mut(stretch).enumerate().each(|(i, total)| {
        for other in others.chunks_exact(plan.sums_len(d)) {
            let other = &other[i * stretch..][..total.len()];
            total.iter_mut().zip(other).for_each(|(t, o)| *t += o);
        }
    });
    let total = &*total;
    let per_filter = d.r * d.s * d.c;
    let full = plan.blocks.full();
    dw.par_chunks_mut(full * per_filter).enumerate().each(|(b, dw)| {
        let width = plan.blocks.width(b);
        let sums = &total[b * full * per_filter..][..width * per_filter];
        // square blocks, so that every line of both sides is used completely while it is in the cache
        for start in (0..per_filter).step_by(16) {
            let end = per_filter.min(start + 16);
            for (o, dw) in dw.chunks_exact_mut(per_filter).enumerate() {
                for (i, dw) in (start..end).zip(&mut dw[start..end]) {
                    let sum = sums[i * width + o];
                    *dw = if accumulate { *dw + sum } else { sum };
                }
            }
        }
    });
}

/// One set of filters on one chunk of pixels.
struct Task<'a> {
    d: &'a Conv2dDims,
    plan: &'a WeightGradientPlan,
    x: &'a [f32],
    dy: &'a [f32],
    first_block: usize,
}

impl Task<'_> {
    fn run(&self, sums: &mut [f32], scratch: &mut [f32], chunk: usize) {
        let (d, plan) = (self.d, self.plan);
        sums.fill(0.0);
        let (x_slab, dy_slab) = scratch.split_at_mut(plan.slab_len);
        let bands = d.p.div_ceil(plan.band);
        let units = d.n.div_ceil(plan.group) * bands;
        for unit in chunk * plan.chunk..units.min((chunk + 1) * plan.chunk) {
            let (first_image, first) = (unit / bands * plan.group, unit % bands * plan.band);
            let images = plan.group.min(d.n - first_image);
            let shape = slab(d, plan.tile, images, plan.band.min(d.p - first));
            if plan.slab_len > 0 {
                shape.pack(x_slab, &self.x[first_image * d.h * d.w * d.c..], d.h, d.w, first);
            }
            if plan.dy_len > 0 {
                let start = first_image * d.p * d.q * d.k + self.first_block * plan.blocks.full();
                let dy_shape = gradient_slab(d, plan.blocks, self.blocks(), images, shape.band);
                dy_shape.pack(dy_slab, &self.dy[start..], d.p, d.q, first);
            }
            self.run_band(sums, x_slab, dy_slab, &shape, first_image, first);
        }
    }

    fn blocks(&self) -> std::ops::Range<usize> {
        self.first_block..self.plan.blocks.count().min(self.first_block + self.plan.set)
    }

    fn run_band(
        &self,
        sums: &mut [f32],
        x_slab: &[f32],
        dy_slab: &[f32],
        shape: &Slab,
        first_image: usize,
        first: usize,
    ) {
        let (d, plan) = (self.d, self.plan);
        let images = shape.images;
        let row_pixels = d.q * images;
        let pitch = gradient_pitch(plan.blocks);
        let (columns, row_channels) = taps(d);
        let (x_run, x_pixel) = if merged(d) {
            (shape.output_row_len(), d.stride * shape.pitch)
        } else if plan.slab_len > 0 {
            (shape.output_row_len(), shape.pitch)
        } else {
            (d.stride * d.w * d.c, d.stride * d.c)
        };
        for c in (0..row_channels).step_by(plan.tile) {
            let channels = plan.tile.min(row_channels - c);
            for i in 0..d.r {
                let (from, to) = valid(first, shape.band, i, d.stride, d.pad, d.h);
                for j in 0..columns {
                    let (left, right) =
                        if merged(d) { (0, d.q) } else { valid(0, d.q, j, d.stride, d.pad, d.w) };
                    if from == to || left == right {
                        continue;
                    }
                    let x = if merged(d) {
                        &x_slab[from * shape.output_row_len() + i * shape.row_len() + c..]
                    } else if plan.slab_len > 0 {
                        let start = c / plan.tile * shape.block_len()
                            + from * shape.output_row_len()
                            + i * shape.row_len()
                            + j % d.stride * shape.phase_len()
                            + (j / d.stride + left) * shape.column_len();
                        &x_slab[start..]
                    } else {
                        let row = first_image * d.h + (first + from) * d.stride + i - d.pad;
                        &self.x[(row * d.w + left * d.stride + j - d.pad) * d.c + c..]
                    };
                    let (mut dy_start, mut sum_start) = (0, 0);
                    for b in self.blocks() {
                        let width = plan.blocks.width(b);
                        let pixel = from * row_pixels + left * images;
                        let (dy, dy_pixel) = if plan.dy_len > 0 {
                            (&dy_slab[dy_start + pixel * pitch..], pitch)
                        } else {
                            let pixel = (first_image * d.p + first) * d.q + pixel;
                            (&self.dy[pixel * d.k + b * plan.blocks.full()..], d.k)
                        };
                        let dw = sum_start + ((i * columns + j) * row_channels + c) * width;
                        let tile = Outer {
                            x: x.as_ptr(),
                            dy: dy.as_ptr(),
                            dw: sums[dw..dw + channels * width].as_mut_ptr(),
                            runs: to - from,
                            length: (right - left) * images,
                            x_run,
                            dy_run: row_pixels * dy_pixel,
                            x_pixel,
                            dy_pixel,
                        };
                        let kernel = kernel::outer(plan.isa, channels, plan.blocks.vectors(b));
                        // SAFETY: rows `from..to` and columns `left..right` are those whose tap
                        // lies inside the image, which tensor and slab hold; `dy` is packed for the
                        // whole band, or is read from the tensor if blocks have no padding; the tile
                        // of `sums` was sliced to its length. All sizes come from a `Conv2dDims`, whose
                        // fields agree, and `checked` has compared the slices' lengths with them.
                        unsafe { kernel(&tile) }
                        dy_start += shape.band * row_pixels * pitch;
                        sum_start += width * d.r * d.s * d.c;
                    }
                }
            }
        }
    }
}

/// The outputs `lo..hi`, counted from `first`, of the `count` outputs from `first` on whose tap lies
/// inside `len` inputs.
fn valid(
    first: usize,
    count: usize,
    tap: usize,
    stride: usize,
    pad: usize,
    len: usize,
) -> (usize, usize) {
    // first + o >= (pad - tap) / stride, and (first + o) * stride < len + pad - tap
    let lo = pad.saturating_sub(tap).div_ceil(stride).saturating_sub(first).min(count);
    let hi = (len + pad).saturating_sub(tap).div_ceil(stride).saturating_sub(first).min(count);
    (lo, hi.max(lo))
}

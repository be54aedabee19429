//! Forward pass and data gradient: both are correlations of an image with packed filters.
//!
//! Forward: `y[p, q, k] = sum over r, s, c of x[p t + r - pad, q t + s - pad, c] w[k, r, s, c]`,
//! stride `t`.
//!
//! A lane is a span of images, or some rows of one image. It packs a band of rows of a group of
//! images into its own part of the workspace, then loops over blocks of outputs, rows and tiles. The
//! partition depends on the shape alone.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::Isa;
use super::LINE;
use super::filter::Blocks;
use super::problem::{Phase, Problem};
use super::slab::Slab;
use super::slots::{self, Slots};
use selfsup_cpu_kernels::Coming;
use selfsup_cpu_kernels::kernel;
use selfsup_cpu_kernels::tile::{Ahead, Correlate, MAX_ROWS};

/// The most floats of a slab: together with the filters of one block it should stay in the
/// second-level cache.
const SLAB_FLOATS: usize = 96 * 1024;

/// Target number of lanes, so that several threads finish together; more lanes cost workspace.
const LANES_WANTED: usize = 16;

/// Images in a group from which a tile covers images instead of columns: such a tile can skip taps
/// that fall outside the image.
const IMAGES_PER_TILE: usize = 7;

/// How the work is partitioned, from the shape and the instruction set.
#[derive(Clone, Copy, Debug)]
struct CorrelationPlan {
    isa: Isa,
    blocks: Blocks,
    /// Images per group, and per lane.
    group: usize,
    span: usize,
    /// Output rows (of all phases) per part of an image, and parts per image. With one part, a lane
    /// covers its whole span.
    part_rows: usize,
    parts: usize,
    /// Floats of all packed filters, and of one lane's slab.
    filters_len: usize,
    slab_len: usize,
    /// No output depends on any tap.
    empty: bool,
}

impl CorrelationPlan {
    fn new(p: &Problem, isa: Isa) -> CorrelationPlan {
        let blocks = Blocks { k: p.k, lanes: isa.lanes() };
        let vectors = if p.k <= isa.lanes() { 1 } else { 2 };
        let group = group_images(p, isa.tile_rows(vectors));
        let groups = p.n.div_ceil(group);
        let span = groups.div_ceil(slots::MOST) * group;
        let rows = p.out_h.div_ceil(p.step()).max(1);
        let parts_wanted =
            if group == 1 { LANES_WANTED.div_ceil(groups.max(1)).min(rows) } else { 1 };
        let part_rows = rows.div_ceil(parts_wanted) * p.step();
        let parts = if parts_wanted == 1 { 1 } else { p.out_h.div_ceil(part_rows) };
        let slab_len = p.phases().map(|f| band_slab(p, &f, group, part_rows).len()).max();
        let slab_len = slab_len.unwrap_or(0);
        CorrelationPlan {
            isa,
            blocks,
            group,
            span: if parts > 1 { 1 } else { span },
            part_rows,
            parts,
            filters_len: (blocks.padded() * p.r * p.s * p.c).next_multiple_of(LINE),
            slab_len: if p.direct() { 0 } else { slab_len.next_multiple_of(LINE) },
            empty: slab_len == 0,
        }
    }

    fn lanes(&self, p: &Problem) -> usize {
        p.n.div_ceil(self.span) * self.parts
    }

    /// The number of runs in a row of block `b`, pixels per run and tiles per run. A run is a stretch of pixels whose tiles
    /// use the same taps.
    fn runs(&self, f: &Phase, s: &Slab, b: usize) -> (usize, usize, usize) {
        let over_images = s.images >= IMAGES_PER_TILE;
        let (runs, length) = if over_images { (f.q, s.images) } else { (1, f.q * s.images) };
        (runs, length, length.div_ceil(self.isa.tile_rows(self.blocks.vectors(b))))
    }

    /// Tiles of a band.
    fn tiles(&self, f: &Phase, s: &Slab) -> usize {
        let of_block = |b| {
            let (runs, _, tiles) = self.runs(f, s, b);
            s.band * runs * tiles
        };
        (0..self.blocks.count()).map(of_block).sum()
    }
}

/// Images packed and computed together.
fn group_images(p: &Problem, tile_rows: usize) -> usize {
    if p.merged() {
        return 1;
    }
    let quarter = (p.n / 4).max(1);
    if (p.out_h, p.out_w) == (1, 1) {
        // tiles share the filters of a block while these are in a close cache: as many tiles as the slab holds
        let most = (SLAB_FLOATS / p.c.max(1)).min(256) / tile_rows * tile_rows;
        let wanted = p.n.div_ceil(LANES_WANTED).next_multiple_of(tile_rows);
        return wanted.min(most.max(tile_rows));
    }
    let columns = p.out_w.div_ceil(p.step());
    if tile_rows > 14 && columns >= 16 {
        // one vector of filters: tall tiles over columns, no stores to distant images
        return quarter.min(2);
    }
    if quarter >= 8 && columns <= 32 {
        // an even number of groups, so that two threads finish together; a tile has an overhead of
        // about two rows
        let cost = |g: usize| p.n.div_ceil(g).next_multiple_of(2) * (g + 2);
        let least = tile_rows.min(8);
        return (least..=tile_rows).min_by_key(|&g| cost(g)).unwrap_or(least);
    }
    (tile_rows / columns.max(1)).clamp(1, quarter)
}

/// The largest slab that one band of a phase needs.
fn band_slab(p: &Problem, f: &Phase, images: usize, part_rows: usize) -> Slab {
    let Phase { r, s, stride: stride_y, stride_x, pad_y, pad_x, .. } = *f;
    // merged taps need the columns in their original order
    let (q, block) = if p.merged() { ((f.q - 1) * p.stride + p.s, p.c) } else { (f.q, p.block()) };
    let (c, pitch, band) = (p.c, block, 1);
    let mut slab =
        Slab { c, of: c, block, pitch, images, r, s, stride_y, stride_x, pad_y, pad_x, band, q };
    let rows = part_rows.div_ceil(p.step()).max(1);
    while slab.band < rows && (Slab { band: slab.band + 1, ..slab }).len() <= SLAB_FLOATS {
        slab.band += 1;
    }
    // bands of equal height
    slab.band = rows.div_ceil(rows.div_ceil(slab.band));
    slab
}

pub fn workspace_len(p: &Problem, isa: Isa) -> usize {
    let plan = CorrelationPlan::new(p, isa);
    plan.filters_len + plan.lanes(p) * plan.slab_len
}

/// `out` `[n, out_h, out_w, k]`, `x` `[n, h, w, c]`, `w` in the convolution's own layout; `out +=` if
/// `accumulate`.
pub fn run(
    p: &Problem,
    isa: Isa,
    out: &mut [f32],
    x: &[f32],
    w: &[f32],
    workspace: &mut [f32],
    accumulate: bool,
) {
    let plan = CorrelationPlan::new(p, isa);
    if plan.empty {
        if !accumulate {
            out.fill(0.0);
        }
        return;
    }
    let (filters, slabs) = workspace.split_at_mut(plan.filters_len);
    let mut rest = &mut *filters;
    for f in p.phases() {
        let (packed, tail) = rest.split_at_mut(plan.blocks.padded() * f.r * f.s * f.c);
        f.view.pack(packed, w, plan.blocks, p.block());
        rest = tail;
    }
    let filters = &*filters;
    let part_len =
        if plan.parts > 1 { plan.part_rows * p.out_w * p.k } else { plan.span * p.image_len() };
    let slots = Slots::new(slabs, plan.slab_len);
    out.par_chunks_mut(plan.span * p.image_len()).enumerate().each(|(span, out)| {
        let x = &x[span * plan.span * p.h * p.w * p.c..];
        let lane = Lane { p, plan: &plan, x, filters, accumulate };
        out.par_chunks_mut(part_len).enumerate().each(|(part, out)| {
            slots.lend(|slab| lane.run(out, slab, part * plan.part_rows));
        });
    });
}

struct Lane<'a> {
    p: &'a Problem,
    plan: &'a CorrelationPlan,
    /// Starts at the first image of the lane.
    x: &'a [f32],
    filters: &'a [f32],
    accumulate: bool,
}

impl Lane<'_> {
    /// Fills `out`: whole images, or the rows of one image from `first_row` on.
    fn run(&self, out: &mut [f32], slab: &mut [f32], first_row: usize) {
        let p = self.p;
        for (g, out) in out.chunks_mut(self.plan.group * p.image_len()).enumerate() {
            let x = &self.x[g * self.plan.group * p.h * p.w * p.c..];
            let images = if self.plan.parts > 1 { 1 } else { out.len() / p.image_len() };
            let rows = out.len() / images / (p.out_w * p.k);
            let mut filters = self.filters;
            for f in p.phases() {
                let (packed, rest) = filters.split_at(self.plan.blocks.padded() * f.r * f.s * f.c);
                filters = rest;
                if (f.r == 0 || f.s == 0) && self.accumulate {
                    continue;
                }
                self.run_phase(&f, out, x, packed, slab, images, first_row, rows);
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn run_phase(
        &self,
        f: &Phase,
        out: &mut [f32],
        x: &[f32],
        filters: &[f32],
        slab: &mut [f32],
        images: usize,
        first_row: usize,
        rows: usize,
    ) {
        let p = self.p;
        let step = p.step();
        // the band height of a full group: a smaller group would otherwise get a larger slab
        let shape = Slab { images, ..band_slab(p, f, self.plan.group, self.plan.part_rows) };
        if f.q == 0 {
            return;
        }
        let outputs = rows.saturating_sub(f.row0).div_ceil(step);
        for start in (0..outputs).step_by(shape.band) {
            let band = shape.band.min(outputs - start);
            let first = first_row / step + start;
            let shape = Slab { band, ..shape };
            let slab = if p.direct() {
                x
            } else {
                shape.pack(slab, x, p.h, p.w, first);
                &*slab
            };
            // the input of the next band, if it is contiguous
            let (from, len) = if (p.h, p.w) == (1, 1) {
                (images * p.c, images * p.c)
            } else if images == 1 {
                let row = f.stride * p.w * p.c;
                ((first + shape.band) * row, shape.band * row)
            } else {
                (0, 0)
            };
            let ahead = &x[from.min(x.len())..(from + len).min(x.len())];
            let row0 = start * step + f.row0;
            let coming = Coming::new(bytemuck::cast_slice(ahead), self.plan.tiles(f, &shape));
            let mut band = Band { lane: self, f, shape, slab, first, row0, rows, coming };
            let mut packed = filters;
            for b in 0..self.plan.blocks.count() {
                let (block, rest) = packed.split_at(self.plan.blocks.width(b) * f.r * f.s * f.c);
                packed = rest;
                band.run_block(out, block, b);
            }
        }
    }
}

/// A packed band of one phase.
struct Band<'a> {
    lane: &'a Lane<'a>,
    f: &'a Phase,
    shape: Slab,
    slab: &'a [f32],
    /// The band's first output row in its phase, and the index of that row in the lane's output of
    /// `rows` rows.
    first: usize,
    row0: usize,
    rows: usize,
    /// Input that will be packed next. The tiles prefetch it, a few lines each, so that it arrives
    /// while they compute.
    coming: Coming<'a>,
}

impl Band<'_> {
    /// Computes outputs `b * blocks.full()..` of every pixel of the band.
    fn run_block(&mut self, out: &mut [f32], filters: &[f32], b: usize) {
        let (p, f, s) = (self.lane.p, self.f, self.shape);
        let blocks = self.lane.plan.blocks;
        let over_images = s.images >= IMAGES_PER_TILE;
        let (runs, length, tiles) = self.lane.plan.runs(f, &s, b);
        for i in 0..s.band {
            let input_row = ((self.first + i) * f.stride) as isize;
            let tap_rows = clip(f.r, f.pad_y - input_row, p.h);
            let out_row = self.row0 + i * p.step();
            let slab_row = i * s.output_row_len();
            for run in 0..runs {
                let tap_columns = if over_images {
                    clip(f.s, f.pad_x - (run * f.stride_x) as isize, p.w)
                } else {
                    (0, f.s)
                };
                for t in 0..tiles {
                    let (from, to) = (t * length / tiles, (t + 1) * length / tiles);
                    let pixel = run * length + from;
                    let mut y_offsets = [0; MAX_ROWS];
                    let (mut column, mut image) = (pixel / s.images, pixel % s.images);
                    for offset in &mut y_offsets[..to - from] {
                        let row = image * self.rows + out_row;
                        *offset = (row * p.out_w + f.column0 + column * p.step()) * p.k;
                        image += 1;
                        if image == s.images {
                            (column, image) = (column + 1, 0);
                        }
                    }
                    let tile = Correlate {
                        x: self.slab.as_ptr().wrapping_add(slab_row + pixel * p.pixel_len()),
                        w: filters.as_ptr(),
                        y: out[b * blocks.full()..].as_mut_ptr(),
                        y_offsets: &y_offsets,
                        live: blocks.live(b),
                        accumulate: self.lane.accumulate,
                        c: f.c,
                        block: p.block(),
                        taps: (f.r, f.s),
                        tap_rows,
                        tap_columns,
                        x_block: s.block_len(),
                        x_row: s.row_len(),
                        x_phase: s.phase_len(),
                        x_column: s.column_len(),
                        stride: f.stride_x,
                        ahead: Ahead::NOTHING,
                    };
                    let kernel = kernel::correlate(
                        self.lane.plan.isa,
                        to - from,
                        blocks.vectors(b),
                        p.pixel_len(),
                    );
                    self.coming.prefetch_share();
                    // SAFETY: the slab holds every column that the tile's taps read and every row in
                    // `tap_rows`; all filters of the block are packed; the offsets are those of
                    // existing pixels of `out`, and `live` ends with the last output. All sizes come
                    // from a `Conv2dDims`, whose fields agree, and `checked` has compared the slices'
                    // lengths with them.
                    unsafe { kernel(&tile) }
                }
            }
        }
    }
}

/// The taps `lo..hi` of `taps` for which `tap - pad` lies in `0..len`.
fn clip(taps: usize, pad: isize, len: usize) -> (usize, usize) {
    let lo = pad.clamp(0, taps as isize) as usize;
    let hi = (len as isize + pad).clamp(lo as isize, taps as isize) as usize;
    (lo, hi)
}

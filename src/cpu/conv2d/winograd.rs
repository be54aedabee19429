//! Forward pass and data gradient of 3x3 convolutions of stride 1, padded by 1, with Winograd's
//! F(2x2, 3x3) or F(4x4, 3x3): 16 or 9 products for four outputs instead of the 36 of `correlation.rs`.
//!
//! `transform.rs` has the maths. The filters are transformed once per call. A group of tiles is
//! transformed into the workspace; then, for one block of outputs at a time, each of the
//! components is a GEMM (the tile kernel of a 1x1 convolution), and the block is transformed back
//! while it is in the caches.
//!
//! The error of F(2x2, 3x3) is similar to the direct sum's: the transforms add rounding errors, but the sums are a
//! ninth as long. That of F(4x4, 3x3) is a few times as large.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::Conv2dDims;
use super::Isa;
use super::LINE;
use super::element::{Element, Row};
use super::filter::{Blocks, FilterView};
use super::slots::{self, Slots};
use selfsup_cpu_kernels::Coming;
use selfsup_cpu_kernels::kernel;
use selfsup_cpu_kernels::tile::{Ahead, Correlate, MAX_ROWS};
use selfsup_cpu_kernels::transform::{BLOCK, Filters, Form, Input, MOST, Output};

/// Tiles in a group: the transformed tiles stay in the second-level cache together with the filters
/// of a component. Twice as many from `WIDE` channels on, whose filters have to be fetched from
/// beyond that cache for every group.
pub fn group_tiles(form: Form) -> usize {
    match form {
        Form::Two => 64,
        Form::Four => 32,
    }
}
const WIDE: usize = 512;

/// Channels from which the filters of a block no longer stay in the second-level cache from one
/// group to the next.
const STREAMED: usize = 256;

/// Target number of lanes, so that several threads finish together; more lanes cost workspace.
const LANES_WANTED: usize = 16;

/// Whether this algorithm supports the convolution.
pub fn fits(d: &Conv2dDims) -> bool {
    (d.r, d.s, d.stride, d.pad) == (3, 3, 1, 1)
        && d.c.is_multiple_of(BLOCK)
        && d.k.is_multiple_of(BLOCK)
}

/// The form that is the fastest, or `None` if the direct sum is.
pub fn fastest(d: &Conv2dDims) -> Option<Form> {
    let forms = Form::ALL.into_iter().filter(|&form| is_faster(d, form));
    forms.min_by_key(|&form| products(d, form))
}

/// Products for each pair of channels.
pub fn products(d: &Conv2dDims, form: Form) -> usize {
    d.n * form.components() * form.tiles(d.h) * form.tiles(d.w)
}

/// Products for each pair of channels of the direct sum, which skips taps outside the image.
pub fn direct_products(d: &Conv2dDims) -> usize {
    let taps = |len: usize| (3 * len).saturating_sub(2);
    d.n * taps(d.h) * taps(d.w)
}

/// Whether a form is faster than the direct sum. Measured, time of the direct sum over time of this, with 4,096 to 131,072 pixels:
/// F(2x2, 3x3) with AVX-512 1.2 with 16 channels, 1.6 to 1.8 with 64 and 128, 1.5 with 256, 1.1 to 1.3 with 512; F(4x4, 3x3) with
/// AVX2 (in brackets F(2x2, 3x3) there) 1.8 (1.2), 2.0 to 2.6 (1.4 to 1.7), 2.6 (1.7), 2.1 (1.6). No gain with 5x5 pixels, or if too few
/// tiles share the transformed filters.
pub fn is_faster(d: &Conv2dDims, form: Form) -> bool {
    let (direct, here) = (direct_products(d), products(d, form));
    fits(d) && 5 * direct >= 7 * here && 4096 * (direct - here) >= form.components() * d.c * d.k
}

/// A correlation of `[n, h, w, c]` with 3x3 filters to `[n, h, w, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    k: usize,
    view: FilterView,
    form: Form,
}

impl Problem {
    /// `d` must [fit](fits).
    pub fn forward(d: &Conv2dDims, form: Form) -> Problem {
        let Conv2dDims { n, h, w, c, k, .. } = *d;
        let (row, column) = (3 * c as isize, c as isize);
        let (r, s, output, input) = (3, 3, 9 * c as isize, 1);
        let view = FilterView { start: 0, output, row, column, input, r, s, c };
        Problem { n, h, w, c, k, view, form }
    }

    /// The flipped filters, from `k` channels to `c`. `d` must [fit](fits).
    pub fn data_gradient(d: &Conv2dDims, form: Form) -> Problem {
        let Conv2dDims { n, h, w, c, k, .. } = *d;
        let (row, column) = (3 * c as isize, c as isize);
        let (r, s, output, input) = (3, 3, 1, 9 * c as isize);
        let start = 2 * row + 2 * column;
        let view = FilterView { start, output, row: -row, column: -column, input, r, s, c: k };
        Problem { n, h, w, c: k, k: c, view, form }
    }

    /// Rows of tiles, and tiles in a row.
    fn tiles(&self) -> (usize, usize) {
        (self.form.tiles(self.h), self.form.tiles(self.w))
    }

    fn image_len(&self) -> usize {
        self.h * self.w * self.k
    }
}

/// How the work is partitioned, from the shape and the instruction set.
#[derive(Clone, Copy, Debug)]
struct WinogradPlan {
    isa: Isa,
    blocks: Blocks,
    /// Images per lane, and per group.
    span: usize,
    group: usize,
    /// Rows of tiles of an image per lane and per group; fewer than all only if a lane or a group
    /// covers one image.
    lane_rows: usize,
    group_rows: usize,
    /// Tiles in a full group.
    tiles: usize,
}

impl WinogradPlan {
    fn new(p: &Problem, isa: Isa) -> WinogradPlan {
        let blocks = Blocks { k: p.k, lanes: isa.lanes() };
        let most = if p.c < WIDE { group_tiles(p.form) } else { 2 * group_tiles(p.form) };
        let (rows, across) = p.tiles();
        let image = (rows * across).max(1);
        let (group, group_rows) = if 2 * image <= most {
            // an even number of groups, so that two threads finish together
            let groups = p.n.div_ceil(most / image).next_multiple_of(2).max(1);
            (p.n.div_ceil(groups).max(1), rows)
        } else {
            let parts = rows.div_ceil((most / across).max(1)).max(1);
            (1, rows.div_ceil(parts))
        };
        let groups = p.n.div_ceil(group);
        let lane_rows = if group == 1 && groups < LANES_WANTED {
            let parts = LANES_WANTED.div_ceil(groups.max(1));
            rows.div_ceil(parts).next_multiple_of(group_rows.max(1)).min(rows)
        } else {
            rows
        };
        let span = groups.div_ceil(slots::MOST).max(1) * group;
        let tiles = group * group_rows * across;
        WinogradPlan { isa, blocks, span, group, lane_rows, group_rows, tiles }
    }

    fn lanes(&self, p: &Problem) -> usize {
        p.n.div_ceil(self.span) * p.tiles().0.div_ceil(self.lane_rows.max(1))
    }

    fn filters_len(&self, p: &Problem) -> usize {
        p.form.components() * self.blocks.padded() * p.c
    }

    /// Floats from one component to the next, of the input and of a block of outputs. The extra
    /// cache line keeps the stores of a tile from mapping to the same cache set.
    fn components(&self, p: &Problem) -> (usize, usize) {
        (self.tiles * p.c + LINE, self.tiles * self.blocks.width(0) + LINE)
    }

    fn slot_len<E: Element>(&self, p: &Problem) -> usize {
        let (v, m) = self.components(p);
        p.form.components() * (v + m) + self.rows_len::<E>(p)
    }

    /// Floats of scratch for the rows of a row of tiles, of the input or of a block of outputs.
    fn rows_len<E: Element>(&self, p: &Problem) -> usize {
        let (input, output) = (p.form.inputs() * p.c, p.form.outputs() * self.blocks.width(0));
        E::scratch_len(p.w * input.max(output))
    }
}

/// Floats of scratch: the transformed filters, and one group of tiles per lane.
pub fn workspace_len<E: Element>(p: &Problem, isa: Isa) -> usize {
    let plan = WinogradPlan::new(p, isa);
    plan.filters_len(p) + plan.lanes(p) * plan.slot_len::<E>(p)
}

/// `out` `[n, h, w, k]`, `x` `[n, h, w, c]`, `w` in the convolution's own layout; `out +=` if
/// `accumulate`.
pub fn run<E: Element>(
    p: &Problem,
    isa: Isa,
    out: &mut [E],
    x: &[E],
    w: &[f32],
    workspace: &mut [f32],
    accumulate: bool,
) {
    let plan = WinogradPlan::new(p, isa);
    let (filters, slots) = workspace.split_at_mut(plan.filters_len(p));
    transform_filters(p, &plan, filters, w);
    let lane = Lane { p, plan: &plan, filters, accumulate };
    let slots = Slots::new(slots, plan.slot_len::<E>(p));
    let whole_images = plan.lane_rows == p.tiles().0;
    let span_len = plan.span * p.image_len();
    let lane_rows = p.form.outputs() * plan.lane_rows;
    let lane_len = if whole_images { span_len } else { lane_rows * p.w * p.k };
    out.par_chunks_mut(span_len).enumerate().each(|(span, out)| {
        let x = &x[span * plan.span * p.h * p.w * p.c..];
        out.par_chunks_mut(lane_len).enumerate().each(|(part, out)| {
            slots.lend(|slot| lane.run(out, x, slot, part * plan.lane_rows));
        });
    });
}

/// `w` into blocks of outputs, each `[component][c][width]`.
fn transform_filters(p: &Problem, plan: &WinogradPlan, filters: &mut [f32], w: &[f32]) {
    let blocks = plan.blocks;
    let transform = kernel::transforms(plan.isa, p.form).filters;
    filters.par_chunks_mut(p.form.components() * blocks.full() * p.c).enumerate().each(
        |(b, out)| {
            let width = blocks.width(b);
            let len = BLOCK * width;
            let mut taps = [0.0; 9 * BLOCK * 32];
            for c in (0..p.c).step_by(BLOCK) {
                let start = p.view.start + c as isize * p.view.input;
                let view = FilterView { start, c: BLOCK, ..p.view };
                let taps = &mut taps[..9 * len];
                view.pack_block(taps, w, b * blocks.full(), blocks.live(b), width, BLOCK);
                let component = p.c * width;
                let (g, u) = (taps.as_ptr(), out[c * width..].as_mut_ptr());
                // SAFETY: `taps` has nine times `len` floats; the last of the components of the
                // `BLOCK` channels from `c` on ends within `out`, because `p.c` is a multiple of `BLOCK`.
                unsafe { transform(&Filters { g, tap: len, u, component, len }) }
            }
        },
    );
}

struct Lane<'a> {
    p: &'a Problem,
    plan: &'a WinogradPlan,
    filters: &'a [f32],
    accumulate: bool,
}

impl Lane<'_> {
    /// Fills `out`: whole images, or the rows of one image that start at the tiles of row
    /// `first_row`. `x` starts with the first image.
    fn run<E: Element>(&self, out: &mut [E], x: &[E], slot: &mut [f32], first_row: usize) {
        let (p, images) = (self.p, self.plan.group);
        let (v_component, m_component) = self.plan.components(p);
        let components = p.form.components();
        let (v, m) = slot.split_at_mut(components * v_component);
        let (m, rows) = m.split_at_mut(components * m_component);
        let rows = &mut rows[..self.plan.rows_len::<E>(p)];
        for (g, out) in out.chunks_mut(images * p.image_len()).enumerate() {
            let x = &x[g * images * p.h * p.w * p.c..];
            let images = out.len().div_ceil(p.image_len());
            let group_rows = p.form.outputs() * self.plan.group_rows;
            let len = if images > 1 { out.len() } else { group_rows * p.w * p.k };
            for (i, out) in out.chunks_mut(len).enumerate() {
                let out_rows = out.len() / images / (p.w * p.k);
                let first_row = first_row + i * self.plan.group_rows;
                let coming = Coming::new(&[], 1);
                let mut group = Group { lane: self, images, first_row, out_rows, coming };
                group.transform_input(v, x, rows);
                group.look_ahead(x);
                let mut filters = self.filters;
                for b in 0..self.plan.blocks.count() {
                    let len = components * self.plan.blocks.width(b) * p.c;
                    let (block, rest) = filters.split_at(len);
                    filters = rest;
                    group.multiply(m, v, block, b, out);
                    group.transform_output(out, m, rows, b);
                }
            }
        }
    }
}

/// Some rows of tiles of some images.
#[derive(Clone, Copy)]
pub struct Tiles {
    pub form: Form,
    pub images: usize,
    /// First row of tiles in each image, and number of rows.
    pub first_row: usize,
    pub rows: usize,
    /// Tiles that the transformed input has room for.
    pub most: usize,
}

impl Tiles {
    /// Floats from one component of the transformed input to the next. The extra cache line keeps
    /// the stores of a tile from mapping to the same cache set.
    pub fn component(&self, c: usize) -> usize {
        self.most * c + LINE
    }

    /// `x` `[images, h, w, c]` into `[component][c / BLOCK][tile][BLOCK]`. `scratch` has room for the rows of a row of tiles.
    pub fn transform<E: Element>(
        &self,
        isa: Isa,
        v: &mut [f32],
        x: &[E],
        [h, w, c]: [usize; 3],
        scratch: &mut [f32],
    ) {
        let (transform, outputs) = (kernel::transforms(isa, self.form).input, self.form.outputs());
        let whole = Row { pixels: w, width: c, channels: c };
        for row in 0..self.images * self.rows {
            let (image, y) = (row / self.rows, outputs * (self.first_row + row % self.rows));
            let mut scratch = scratch.chunks_exact_mut(w * c);
            let rows: [_; MOST[0]] = std::array::from_fn(|i| match (y + i).checked_sub(1) {
                Some(y) if y < h && i < self.form.inputs() => {
                    let x = &x[(image * h + y) * w * c..];
                    E::read(x, whole, scratch.next().unwrap_or_default())
                }
                _ => std::ptr::null(),
            });
            let tile = row * self.form.tiles(w);
            let (component, block) = (self.component(c), self.most * BLOCK);
            let v = v[tile * BLOCK..].as_mut_ptr();
            // SAFETY: the rows are complete rows of `x`, or copies of them in `scratch`; a component of `v` holds `most` tiles of
            // every block of channels, including the tiles of this row.
            unsafe { transform(&Input { rows, w, c, v, component, block }) }
        }
    }
}

/// Tiles that are computed together.
struct Group<'a> {
    lane: &'a Lane<'a>,
    images: usize,
    /// First row of tiles in its image, and number of rows of outputs in each image.
    first_row: usize,
    out_rows: usize,
    /// Input of the next group, which the GEMMs prefetch, a few lines each.
    coming: Coming<'a>,
}

impl<'a> Group<'a> {
    fn rows(&self) -> usize {
        self.lane.p.form.tiles(self.out_rows)
    }

    fn tiles(&self) -> usize {
        self.images * self.rows() * self.lane.p.tiles().1
    }

    /// Transforms `x`, which starts at the group's first image, into `[component][c / BLOCK][tile][BLOCK]`.
    fn transform_input<E: Element>(&self, v: &mut [f32], x: &[E], scratch: &mut [f32]) {
        let (p, plan) = (self.lane.p, self.lane.plan);
        let tiles = Tiles {
            form: p.form,
            images: self.images,
            first_row: self.first_row,
            rows: self.rows(),
            most: plan.tiles,
        };
        tiles.transform(plan.isa, v, x, [p.h, p.w, p.c], scratch);
    }

    /// Tile kernel calls per component of block `b`.
    fn runs(&self, b: usize) -> usize {
        let plan = self.lane.plan;
        self.tiles().div_ceil(plan.isa.tile_rows(plan.blocks.vectors(b)))
    }

    fn look_ahead<E: Element>(&mut self, x: &'a [E]) {
        let p = self.lane.p;
        let last = (self.images - 1) * p.h + p.form.outputs() * self.first_row + self.out_rows;
        let (from, len) = (last * p.w * p.c, self.images * self.out_rows * p.w * p.c);
        let blocks = self.lane.plan.blocks;
        let calls = (0..blocks.count()).map(|b| p.form.components() * self.runs(b)).sum();
        let next = &x[from.min(x.len())..(from + len).min(x.len())];
        self.coming = Coming::new(bytemuck::cast_slice(next), calls);
    }

    /// Multiplies all components by the filters of block `b`, into `[component][tile][width]`.
    /// `out` is only prefetched.
    fn multiply<E: Element>(
        &mut self,
        m: &mut [f32],
        v: &[f32],
        filters: &[f32],
        b: usize,
        out: &[E],
    ) {
        let (p, plan) = (self.lane.p, self.lane.plan);
        let (v_component, m_component) = plan.components(p);
        let (width, vectors) = (plan.blocks.width(b), plan.blocks.vectors(b));
        let (tiles, runs) = (self.tiles(), self.runs(b));
        // prefetched during each call: a share of the next component's filters, or of the outputs that
        // the block will be stored to
        let steps = p.c / BLOCK;
        let filter_pairs = width.div_ceil(2 * runs);
        let pixels = (out.len() / p.k).div_ceil(p.form.components() * runs);
        let pixel_pairs = pixels.div_ceil(steps);
        let mut y_offsets = [0; MAX_ROWS];
        y_offsets.iter_mut().enumerate().for_each(|(i, offset)| *offset = i * width);
        // with few channels a call takes no longer than some divisions, so there are none in the loops below
        let (least, longer) = (tiles / runs, tiles % runs);
        for component in 0..p.form.components() {
            let filters = &filters[component * p.c * width..];
            let v = &v[component * v_component..][..v_component];
            let m = &mut m[component * m_component..][..m_component];
            let mut from = 0;
            for run in 0..runs {
                let rows = least + usize::from(run < longer);
                let ahead = if p.c >= STREAMED {
                    let next = p.c * width + run * steps * filter_pairs * 2 * LINE;
                    let from = filters.as_ptr().wrapping_add(next);
                    Ahead { from, step: 2 * LINE, pairs: filter_pairs }
                } else {
                    let first = (component * runs + run) * pixels * p.k + b * plan.blocks.full();
                    let from = out.as_ptr().wrapping_add(first).cast();
                    let step = p.k * size_of::<E>() / size_of::<f32>();
                    Ahead { from, step, pairs: pixel_pairs }
                };
                self.coming.prefetch_share();
                let tile = Correlate {
                    x: v[from * BLOCK..].as_ptr(),
                    w: filters.as_ptr(),
                    y: m[from * width..].as_mut_ptr(),
                    y_offsets: &y_offsets,
                    live: width,
                    accumulate: false,
                    c: p.c,
                    block: BLOCK,
                    taps: (1, 1),
                    tap_rows: (0, 1),
                    tap_columns: (0, 1),
                    x_block: plan.tiles * BLOCK,
                    x_row: 0,
                    x_phase: 0,
                    x_column: 0,
                    stride: 1,
                    ahead,
                };
                let kernel = kernel::correlate(plan.isa, rows, vectors, BLOCK);
                // SAFETY: every block of the component of `v`, and the component of `m`, holds the `rows` tiles from `from`
                // on; the component's filters are `c` rows of `width`, which is `live` (`k` is a multiple of a vector).
                unsafe { kernel(&tile) }
                from += rows;
            }
        }
    }

    /// Transforms block `b` of the group's outputs back.
    fn transform_output<E: Element>(
        &self,
        out: &mut [E],
        m: &[f32],
        scratch: &mut [f32],
        b: usize,
    ) {
        let (p, plan) = (self.lane.p, self.lane.plan);
        let (transform, outputs) = (kernel::transforms(plan.isa, p.form).output, p.form.outputs());
        let width = plan.blocks.width(b);
        let block = Row { pixels: p.w, width, channels: p.k };
        for row in 0..self.images * self.rows() {
            let (image, y) = (row / self.rows(), outputs * (row % self.rows()));
            let first = |i| {
                let pixel = (image * self.out_rows + y + i) * p.w;
                (i < outputs && y + i < self.out_rows)
                    .then_some(pixel * p.k + b * plan.blocks.full())
            };
            let mut floats = scratch.chunks_exact_mut(p.w * width);
            let rows: [_; MOST[1]] = std::array::from_fn(|i| {
                first(i).map_or(std::ptr::null_mut(), |first| {
                    E::place(&mut out[first..], block, floats.next().unwrap_or_default())
                })
            });
            let m = m[row * p.tiles().1 * width..].as_ptr();
            let (component, accumulate) = (plan.components(p).1, self.lane.accumulate);
            let (w, k, in_place) = (p.w, E::step(block), accumulate && E::IN_PLACE);
            // SAFETY: a component holds `width` floats of every tile of the group; the rows are rows
            // of `out`, or of `scratch`, whose pixels have `width` outputs from the block's first on and are `k` floats apart.
            unsafe { transform(&Output { m, component, width, rows, w, k, accumulate: in_place }) }
            for (i, floats) in scratch.chunks_exact(p.w * width).enumerate() {
                if let Some(first) = first(i) {
                    E::store(&mut out[first..], block, floats, accumulate);
                }
            }
        }
    }
}

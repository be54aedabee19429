//! Weight gradient of 3x3 convolutions of stride 1, padded by 1, with Winograd's F(2x2, 3x3) or F(4x4, 3x3): 16 or 9
//! products for four outputs instead of the 36 of `weight.rs`.
//!
//! `transform.rs` has the maths. Groups of tiles are split into chunks; a task owns a chunk and its
//! own sum, `[block of k][component][c][width]`. It transforms a group of both operands into the
//! workspace, then adds each component's GEMM over tiles. The chunks are summed in order and
//! transformed back once. Chunks depend on the shape alone, so the order of the sum does not depend
//! on the number of threads.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::Conv2dDims;
use super::Isa;
use super::LINE;
use super::element::{Element, Row};
use super::filter::Blocks;
use super::slots::{self, Slots};
use super::winograd::{self, Tiles, group_tiles};
use selfsup_cpu_kernels::kernel;
use selfsup_cpu_kernels::tile::Outer;
use selfsup_cpu_kernels::transform::{
    BACK, BACK_FIRST, BLOCK, Form, Gradient, MOST, MOST_COMPONENTS,
};

/// The most floats of a component in all sums (one chunk is always allowed).
const SUMS_FLOATS: usize = 256 * 1024;

/// The most filters of a block: two vectors of any instruction set.
const MOST_WIDE: usize = 32;

/// Target number of chunks, so that several threads finish together.
const CHUNKS_WANTED: usize = 16;

/// The form that is the fastest, or `None` if the sum of `weight.rs` is. Measured, time of that sum over time of this:
/// F(2x2, 3x3) with AVX-512 1.5 to 1.8 with 32 to 256 channels; 0.9 with 16, whose transforms are most of the work; 0.7 with 512,
/// whose sums no longer stay in the second-level cache; 0.6 if few tiles share the sums. F(4x4, 3x3) with AVX2 (in brackets
/// F(2x2, 3x3) there) 1.7 with 16 (1.3), 1.9 to 2.5 with 32 to 256 (1.4 to 1.7), 1.4 with 256 and 128 tiles (1.6), 1.4 with 512 (1.5).
pub fn fastest(d: &Conv2dDims) -> Option<Form> {
    let pays = |form: Form| {
        // The sums of F(4x4, 3x3) leave the second-level cache sooner: with 256 channels it needs twice as many groups.
        let (channels, groups) = match form {
            Form::Two => (2 * BLOCK, 4),
            Form::Four if d.c * d.k <= 128 * 128 => (BLOCK, 4),
            Form::Four => (BLOCK, 8),
        };
        winograd::is_faster(d, form)
            && d.c.min(d.k) >= channels
            && d.c * d.k <= 256 * 256
            && d.n * form.tiles(d.h) * form.tiles(d.w) >= groups * group_tiles(form)
    };
    let forms = Form::ALL.into_iter().filter(|&form| pays(form));
    forms.min_by_key(|&form| winograd::products(d, form))
}

/// How the sum is partitioned, from the shape and the instruction set.
#[derive(Clone, Copy, Debug)]
struct WinogradWeightPlan {
    isa: Isa,
    form: Form,
    blocks: Blocks,
    /// Images per group, rows of tiles of each, and groups per image.
    images: usize,
    rows: usize,
    parts: usize,
    /// Groups per chunk, and number of chunks.
    chunk: usize,
    chunks: usize,
}

impl WinogradWeightPlan {
    fn new(d: &Conv2dDims, form: Form, isa: Isa) -> WinogradWeightPlan {
        let blocks = Blocks { k: d.k, lanes: isa.lanes() };
        let (rows, across) = (form.tiles(d.h).max(1), form.tiles(d.w).max(1));
        let images = (group_tiles(form) / (rows * across)).clamp(1, d.n.max(1));
        let parts = if images > 1 { 1 } else { rows.div_ceil((group_tiles(form) / across).max(1)) };
        let groups = d.n.div_ceil(images) * parts;
        let chunks =
            CHUNKS_WANTED.min(SUMS_FLOATS / (d.c * blocks.padded()).max(1)).clamp(1, slots::MOST);
        // the sum of a chunk of one group would cost more than Winograd saves
        let chunk = groups.div_ceil(chunks).max(2);
        let (rows, chunks) = (rows.div_ceil(parts), groups.div_ceil(chunk));
        WinogradWeightPlan { isa, form, blocks, images, rows, parts, chunk, chunks }
    }

    /// Tiles that a group has room for.
    fn tiles(&self, d: &Conv2dDims) -> usize {
        self.images * self.rows * self.form.tiles(d.w)
    }

    /// Floats of the sum of a chunk, and of both operands of a group.
    fn sums_len(&self, d: &Conv2dDims) -> usize {
        self.form.components() * d.c * self.blocks.padded()
    }

    fn scratch_len<E: Element>(&self, d: &Conv2dDims) -> usize {
        self.form.components() * (self.tiles(d) * (d.c + self.blocks.width(0)) + 2 * LINE)
            + self.rows_len::<E>(d)
    }

    /// Floats of scratch for the rows of a row of tiles, of the input or of a block of the gradient.
    fn rows_len<E: Element>(&self, d: &Conv2dDims) -> usize {
        let (input, gradient) =
            (self.form.inputs() * d.c, self.form.outputs() * self.blocks.width(0));
        E::scratch_len(d.w * input.max(gradient))
    }
}

pub fn workspace_len<E: Element>(d: &Conv2dDims, form: Form, isa: Isa) -> usize {
    let plan = WinogradWeightPlan::new(d, form, isa);
    plan.chunks * (plan.sums_len(d) + plan.scratch_len::<E>(d))
}

/// `dw` `[k, 3, 3, c]`; `dw +=` if `accumulate`. `d` must [fit](winograd::fits).
pub fn run<E: Element>(
    d: &Conv2dDims,
    (form, isa): (Form, Isa),
    dw: &mut [f32],
    x: &[E],
    dy: &[E],
    workspace: &mut [f32],
    accumulate: bool,
) {
    let plan = WinogradWeightPlan::new(d, form, isa);
    let (sums, scratch) = workspace.split_at_mut(plan.chunks * plan.sums_len(d));
    let slots = Slots::new(scratch, plan.scratch_len::<E>(d));
    let task = Task { d, plan: &plan, x, dy };
    sums.par_chunks_mut(plan.sums_len(d)).enumerate().each(|(chunk, sums)| {
        slots.lend(|scratch| task.run(sums, scratch, chunk));
    });
    finish(d, &plan, dw, sums, accumulate);
}

struct Task<'a, E> {
    d: &'a Conv2dDims,
    plan: &'a WinogradWeightPlan,
    x: &'a [E],
    dy: &'a [E],
}

impl<E: Element> Task<'_, E> {
    /// Computes the sum over one chunk of groups.
    fn run(&self, sums: &mut [f32], scratch: &mut [f32], chunk: usize) {
        let (d, plan) = (self.d, self.plan);
        sums.fill(0.0);
        let groups = d.n.div_ceil(plan.images) * plan.parts;
        for group in chunk * plan.chunk..groups.min((chunk + 1) * plan.chunk) {
            let (first_image, first_row) =
                (group / plan.parts * plan.images, group % plan.parts * plan.rows);
            let tiles = Tiles {
                form: plan.form,
                images: plan.images.min(d.n - first_image),
                first_row,
                rows: plan.rows.min(plan.form.tiles(d.h).saturating_sub(first_row)),
                most: plan.tiles(d),
            };
            let (rows, rest) = scratch.split_at_mut(plan.rows_len::<E>(d));
            let (v, m) = rest.split_at_mut(plan.form.components() * tiles.component(d.c));
            let x = &self.x[first_image * d.h * d.w * d.c..];
            tiles.transform(plan.isa, v, x, [d.h, d.w, d.c], rows);
            let dy = &self.dy[first_image * d.h * d.w * d.k..];
            let mut rest = &mut *sums;
            for b in 0..plan.blocks.count() {
                let len = plan.form.components() * d.c * plan.blocks.width(b);
                let (sums, later) = rest.split_at_mut(len);
                rest = later;
                self.transform_gradient(m, dy, rows, &tiles, b);
                self.multiply(sums, v, m, &tiles, b);
            }
        }
    }

    /// Transforms block `b` of `dy`, which starts at the group's first image, into `[component][tile][width]`.
    fn transform_gradient(
        &self,
        m: &mut [f32],
        dy: &[E],
        scratch: &mut [f32],
        tiles: &Tiles,
        b: usize,
    ) {
        let (d, blocks) = (self.d, self.plan.blocks);
        let (transform, outputs) =
            (kernel::transforms(self.plan.isa, tiles.form).gradient, tiles.form.outputs());
        let width = blocks.width(b);
        let component = tiles.component(width);
        let block = Row { pixels: d.w, width, channels: d.k };
        for row in 0..tiles.images * tiles.rows {
            let (image, y) = (row / tiles.rows, outputs * (tiles.first_row + row % tiles.rows));
            let mut scratch = scratch.chunks_exact_mut(d.w * width);
            let rows: [_; MOST[1]] = std::array::from_fn(|i| {
                if i < outputs && y + i < d.h {
                    let first = (image * d.h + y + i) * d.w * d.k + b * blocks.full();
                    E::read(&dy[first..], block, scratch.next().unwrap_or_default())
                } else {
                    std::ptr::null()
                }
            });
            let m = m[row * tiles.form.tiles(d.w) * width..].as_mut_ptr();
            let (w, k) = (d.w, E::step(block));
            // SAFETY: the rows are rows of `dy`, or copies in `scratch`, whose pixels have `width` outputs from the block's first on (`k`
            // is a multiple of a vector) and are `k` floats apart; a component holds the tiles of the group.
            unsafe { transform(&Gradient { rows, w, k, m, component, width }) }
        }
    }

    /// `sums[component][c][width] +=` the GEMMs of all components over the group's tiles.
    fn multiply(&self, sums: &mut [f32], v: &[f32], m: &[f32], tiles: &Tiles, b: usize) {
        let (d, plan) = (self.d, self.plan);
        let (width, vectors) = (plan.blocks.width(b), plan.blocks.vectors(b));
        let length = tiles.images * tiles.rows * tiles.form.tiles(d.w);
        let pieces = BLOCK.div_ceil(plan.isa.tile_rows(vectors));
        for component in 0..tiles.form.components() {
            let v = &v[component * tiles.component(d.c)..];
            let m = &m[component * tiles.component(width)..];
            let sums = &mut sums[component * d.c * width..][..d.c * width];
            for (block, sums) in sums.chunks_exact_mut(BLOCK * width).enumerate() {
                let v = &v[block * tiles.most * BLOCK..][..length * BLOCK];
                for piece in 0..pieces {
                    let (from, to) = (piece * BLOCK / pieces, (piece + 1) * BLOCK / pieces);
                    let tile = Outer {
                        x: v[from..].as_ptr(),
                        dy: m[..length * width].as_ptr(),
                        dw: sums[from * width..to * width].as_mut_ptr(),
                        runs: 1,
                        length,
                        x_run: 0,
                        dy_run: 0,
                        x_pixel: BLOCK,
                        dy_pixel: width,
                    };
                    let kernel = kernel::outer(plan.isa, to - from, vectors);
                    // SAFETY: both operands are sliced to `length` tiles: `v` with `BLOCK` channels
                    // per tile, of which the kernel reads `from..to`, and `m` with `width` filters. The
                    // sum is sliced to `to - from` rows of `width`.
                    unsafe { kernel(&tile) }
                }
            }
        }
    }
}

/// Sums the chunks in order, transforms back, and stores the filters in their own layout.
fn finish(
    d: &Conv2dDims,
    plan: &WinogradWeightPlan,
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
    let (per_filter, full) = (9 * d.c, plan.blocks.full());
    dw.par_chunks_mut(full * per_filter).enumerate().each(|(b, dw)| {
        let width = plan.blocks.width(b);
        let components = plan.form.components();
        let sums = &total[b * full * components * d.c..][..components * d.c * width];
        let mut taps = [[[0.0; MOST_WIDE]; 9]; BLOCK];
        // one block of channels at a time, so that complete cache lines of `dw` are written
        for c in (0..d.c).step_by(BLOCK) {
            for (i, taps) in taps.iter_mut().enumerate() {
                let line = |component| &sums[(component * d.c + c + i) * width..][..width];
                match plan.form {
                    Form::Two => back_two(taps, std::array::from_fn(line)),
                    Form::Four => back_four(taps, std::array::from_fn(line)),
                }
            }
            for (o, dw) in dw.chunks_exact_mut(per_filter).enumerate() {
                for (tap, dw) in dw.chunks_exact_mut(d.c).enumerate() {
                    for (dw, taps) in dw[c..c + BLOCK].iter_mut().zip(&taps) {
                        let gradient = taps[tap][o];
                        *dw = if accumulate { *dw + gradient } else { gradient };
                    }
                }
            }
        }
    });
}

/// `G' u G` for each filter of a block, of F(2x2, 3x3).
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn back_two(taps: &mut [[f32; MOST_WIDE]; 9], u: [&[f32]; Form::Two.components()]) {
    let line = |u: [f32; 4]| {
        let (sum, difference) = (0.5 * (u[1] + u[2]), 0.5 * (u[1] - u[2]));
        [u[0] + sum, difference, sum + u[3]]
    };
    for o in 0..u[0].len().min(MOST_WIDE) {
        let row = |i: usize| line([u[4 * i][o], u[4 * i + 1][o], u[4 * i + 2][o], u[4 * i + 3][o]]);
        let rows = [row(0), row(1), row(2), row(3)];
        for j in 0..3 {
            let column = line([rows[0][j], rows[1][j], rows[2][j], rows[3][j]]);
            for i in 0..3 {
                taps[3 * i + j][o] = column[i];
            }
        }
    }
}

/// `G' u G` for each filter of a block, of F(4x4, 3x3).
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn back_four(taps: &mut [[f32; MOST_WIDE]; 9], u: [&[f32]; MOST_COMPONENTS]) {
    let line = |u: [f32; 6]| {
        let [n, o] = BACK;
        let ([sum_a, sum_b], [odd_a, odd_b]) =
            ([u[1] + u[2], u[3] + u[4]], [u[1] - u[2], u[3] - u[4]]);
        [
            BACK_FIRST * u[0] + (n[0] * sum_a + o[0] * sum_b),
            n[1] * odd_a + o[1] * odd_b,
            n[2] * sum_a + o[2] * sum_b + u[5],
        ]
    };
    for o in 0..u[0].len().min(MOST_WIDE) {
        let mut rows = [[0.0; 3]; 6];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = line(std::array::from_fn(|j| u[6 * i + j][o]));
        }
        for j in 0..3 {
            let column = line(rows.map(|row| row[j]));
            for i in 0..3 {
                taps[3 * i + j][o] = column[i];
            }
        }
    }
}

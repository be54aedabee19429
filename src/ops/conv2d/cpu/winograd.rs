//! Forward and data gradient of 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3).

use rayon::prelude::*;

use super::super::Conv2dDims;
use super::LINE;
use super::filter::{Blocks, FilterView};
use super::isa::Isa;
use super::kernel;
use super::slots::{self, Slots};
use super::tile::{Correlate, MAX_ROWS};
use super::transform::{BLOCK, Filters, Input, Output};
use super::vector::prefetch_share;

const COMPONENTS: usize = 16;

/// Lanes wanted, so that several threads finish together.
const LANES_WANTED: usize = 16;

/// A correlation of `[n, h, w, c]` with 3x3 filters, padded by 1, to `[n, h, w, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    k: usize,
    view: FilterView,
}

impl Problem {
    pub fn forward(d: &Conv2dDims) -> Option<Problem> {
        let (row, column) = ((3 * d.c) as isize, d.c as isize);
        let (r, s, c) = (3, 3, d.c);
        let view =
            FilterView { start: 0, output: 3 * row, row, column, input: 1, r, s, c };
        let Conv2dDims { n, h, w, c, k, .. } = *d;
        pays(d).then_some(Problem { n, h, w, c, k, view })
    }

    pub fn data_gradient(d: &Conv2dDims) -> Option<Problem> {
        let (row, column) = ((3 * d.c) as isize, d.c as isize);
        let (r, s, c) = (3, 3, d.k);
        let start = 2 * row + 2 * column;
        let (output, input) = (1, 3 * row);
        let view = FilterView { start, output, row: -row, column: -column, input, r, s, c };
        let Conv2dDims { n, h, w, c, k, .. } = *d;
        pays(d).then_some(Problem { n, h, w, c: k, k: c, view })
    }

    fn tile_rows(&self) -> usize {
        self.h.div_ceil(2)
    }

    fn tile_columns(&self) -> usize {
        self.w.div_ceil(2)
    }

    fn image_len(&self) -> usize {
        self.h * self.w * self.k
    }
}

fn pays(d: &Conv2dDims) -> bool {
    (d.r, d.s, d.stride, d.pad) == (3, 3, 1, 1) && d.c % BLOCK == 0 && d.k % BLOCK == 0 && unsafe { super::FORCE }
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    isa: Isa,
    blocks: Blocks,
    /// Images in a lane and in a group.
    span: usize,
    group: usize,
    /// Rows of tiles in a lane and in a group, of each image.
    lane_rows: usize,
    group_rows: usize,
    /// Tiles in a full group.
    tiles: usize,
    filters_len: usize,
    v_component: usize,
    m_component: usize,
}

fn env(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

impl Plan {
    fn new(p: &Problem, isa: Isa) -> Plan {
        let blocks = Blocks { k: p.k, lanes: isa.lanes() };
        let most = env("T", 64).min(env("VF", 1 << 30) / (16 * p.c)).max(14);
        let image = p.tile_rows() * p.tile_columns();
        let (group, group_rows) = if 2 * image <= most {
            let g = (most / image).min((p.n / 2).max(1));
            let groups = p.n.div_ceil(g).next_multiple_of(2);
            (p.n.div_ceil(groups).max(1), p.tile_rows())
        } else {
            let rows = (most / p.tile_columns()).clamp(1, p.tile_rows());
            (1, p.tile_rows().div_ceil(p.tile_rows().div_ceil(rows)))
        };
        let groups = p.n.div_ceil(group);
        let span = groups.div_ceil(slots::MOST) * group;
        let mut lane_rows = p.tile_rows();
        if group == 1 && groups < LANES_WANTED {
            let parts = LANES_WANTED.div_ceil(groups.max(1));
            lane_rows = p.tile_rows().div_ceil(parts).next_multiple_of(group_rows);
        }
        let tiles = group * group_rows * p.tile_columns();
        Plan {
            isa,
            blocks,
            span,
            group,
            lane_rows,
            group_rows,
            tiles,
            filters_len: COMPONENTS * blocks.padded() * p.c,
            v_component: tiles * p.c + LINE,
            m_component: tiles * blocks.full().min(blocks.padded()).next_multiple_of(LINE) + LINE,
        }
    }

    fn slot_len(&self) -> usize {
        COMPONENTS * (self.v_component + self.m_component)
    }

    fn lanes(&self, p: &Problem) -> usize {
        p.n.div_ceil(self.span) * p.tile_rows().div_ceil(self.lane_rows)
    }
}

pub fn workspace_len(p: &Problem, isa: Isa) -> usize {
    let plan = Plan::new(p, isa);
    plan.filters_len + plan.lanes(p) * plan.slot_len()
}

pub fn run(
    p: &Problem,
    isa: Isa,
    out: &mut [f32],
    x: &[f32],
    w: &[f32],
    workspace: &mut [f32],
    accumulate: bool,
) {
    if out.is_empty() {
        return;
    }
    let plan = Plan::new(p, isa);
    let (filters, slots) = workspace.split_at_mut(plan.filters_len);
    pack(p, &plan, filters, w);
    let filters = &*filters;
    let slots = Slots::new(slots, plan.slot_len());
    let lane_len =
        if plan.lane_rows < p.tile_rows() { 2 * plan.lane_rows * p.w * p.k } else { plan.span * p.image_len() };
    out.par_chunks_mut(plan.span * p.image_len()).enumerate().for_each(|(span, out)| {
        let x = &x[span * plan.span * p.h * p.w * p.c..];
        out.par_chunks_mut(lane_len).enumerate().for_each(|(part, out)| {
            slots.lend(|slot| {
                let (v, m) = slot.split_at_mut(COMPONENTS * plan.v_component);
                let mut lane = Lane { p, plan: &plan, filters, v, m, accumulate };
                lane.run(out, x, part * plan.lane_rows);
            });
        });
    });
}

fn pack(p: &Problem, plan: &Plan, packed: &mut [f32], w: &[f32]) {
    let blocks = plan.blocks;
    packed.par_chunks_mut(COMPONENTS * blocks.full() * p.c).enumerate().for_each(|(b, packed)| {
        let width = blocks.width(b);
        let mut taps = [0.0; 9 * BLOCK * 32];
        for c in (0..p.c).step_by(BLOCK) {
            let start = p.view.start + c as isize * p.view.input;
            let view = FilterView { start, c: BLOCK, ..p.view };
            let len = BLOCK * width;
            view.pack_block(&mut taps[..9 * len], w, b * blocks.full(), blocks.live(b), width, BLOCK);
            let component = p.c * width;
            let u = packed[c * width..].as_mut_ptr();
            let t = Filters { g: taps.as_ptr(), tap: len, u, component, len };
            // SAFETY:
            unsafe { kernel::filters(plan.isa)(&t) }
        }
    });
}

struct Lane<'a> {
    p: &'a Problem,
    plan: &'a Plan,
    filters: &'a [f32],
    v: &'a mut [f32],
    m: &'a mut [f32],
    accumulate: bool,
}

impl Lane<'_> {
    fn run(&mut self, out: &mut [f32], x: &[f32], first_row: usize) {
        let p = self.p;
        let images = self.plan.group;
        for (g, out) in out.chunks_mut(images * p.image_len()).enumerate() {
            let x = &x[g * images * p.h * p.w * p.c..];
            let rows = if images == 1 { 2 * self.plan.group_rows * p.w * p.k } else { out.len() };
            for (i, out) in out.chunks_mut(rows).enumerate() {
                let images = out.len().div_ceil(p.image_len());
                self.run_group(out, x, images, first_row + i * self.plan.group_rows);
            }
        }
    }

    fn run_group(&mut self, out: &mut [f32], x: &[f32], images: usize, first_row: usize) {
        let p = self.p;
        let out_rows = out.len() / images / (p.w * p.k);
        let rows = out_rows.div_ceil(2);
        let across = p.tile_columns();
        let tiles = images * rows * across;
        let input = kernel::input(self.plan.isa);
        for image in 0..images {
            for row in 0..rows {
                let y = 2 * (first_row + row);
                let rows_in = [0, 1, 2, 3].map(|i| {
                    let y = (y + i).wrapping_sub(1);
                    if y < p.h { x[(image * p.h + y) * p.w * p.c..].as_ptr() } else { std::ptr::null() }
                });
                let t = Input {
                    rows: rows_in,
                    w: p.w,
                    c: p.c,
                    v: self.v[(image * rows + row) * across * BLOCK..].as_mut_ptr(),
                    component: self.plan.v_component,
                    block: self.plan.tiles * BLOCK,
                };
                // SAFETY:
                unsafe { input(&t) }
            }
        }
        // next input
        let row_len = p.w * p.c;
        let from = if images > 1 { images * p.h * row_len } else { (2 * (first_row + rows) + 1) * row_len };
        let len = images * 2 * rows * row_len;
        let mut ahead = &x[from.min(x.len())..(from + len).min(x.len())];
        let blocks = self.plan.blocks;
        let output = kernel::output(self.plan.isa);
        let mut filters = self.filters;
        for b in 0..blocks.count() {
            let width = blocks.width(b);
            let (block, rest) = filters.split_at(COMPONENTS * width * p.c);
            filters = rest;
            let most = self.plan.isa.tile_rows(blocks.vectors(b));
            let runs = tiles.div_ceil(most);
            for i in 0..COMPONENTS {
                let u = &block[i * width * p.c..];
                // the next filters
                let mut filters_ahead = if p.c >= 256 { &u[(width * p.c).min(u.len())..(2 * width * p.c).min(u.len())] } else { &u[..0] };
                for t in 0..runs {
                    let (from, to) = (t * tiles / runs, (t + 1) * tiles / runs);
                    let mut tile = Correlate {
                        x: self.v[i * self.plan.v_component + from * BLOCK..].as_ptr(),
                        w: u.as_ptr(),
                        y: self.m[i * self.plan.m_component + from * width..].as_mut_ptr(),
                        y_offsets: [0; MAX_ROWS],
                        live: width,
                        accumulate: false,
                        c: p.c,
                        block: BLOCK,
                        taps: (1, 1),
                        tap_rows: (0, 1),
                        tap_columns: (0, 1),
                        x_block: self.plan.tiles * BLOCK,
                        x_row: 0,
                        x_phase: 0,
                        x_column: 0,
                        stride: 1,
                    };
                    for (j, offset) in tile.y_offsets[..to - from].iter_mut().enumerate() {
                        *offset = j * width;
                    }
                    let left = ((blocks.count() - b) * COMPONENTS - i) * runs - t;
                    ahead = prefetch_share(ahead, left);
                    filters_ahead = prefetch_share(filters_ahead, runs - t);
                    let kernel = kernel::correlate(self.plan.isa, to - from, blocks.vectors(b), BLOCK);
                    // SAFETY:
                    unsafe { kernel(&tile) }
                }
            }
            for image in 0..images {
                for row in 0..rows {
                    let rows_out = [0, 1].map(|i| {
                        let y = 2 * row + i;
                        if y < out_rows {
                            out[(image * p.h + y) * p.w * p.k + b * blocks.full()..].as_mut_ptr()
                        } else {
                            std::ptr::null_mut()
                        }
                    });
                    let t = Output {
                        m: self.m[(image * rows + row) * across * width..].as_ptr(),
                        component: self.plan.m_component,
                        width,
                        rows: rows_out,
                        w: p.w,
                        k: p.k,
                        accumulate: self.accumulate,
                    };
                    // SAFETY:
                    unsafe { output(&t) }
                }
            }
        }
    }
}

//! Products of rows: `C [m, n] = A B` with the rows of `A` as they lie in memory. Linear layers, 1x1 convolutions forward, and
//! their data gradients.
//!
//! `B` is packed once. A task takes a block of rows that stays in the second-level cache and runs through the columns of `B`, 32
//! at a time. Tiles of `A` are loaded from the tensor itself where rows are whole steps of 32.

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::block::{Live, Multiplier, Operands, Run, SIDE, Sums, TILE, last_part};
use super::finish::{Block, ColumnSums, Finish, Target};
use super::pack::{self, Row};
use super::scratch::{Part, Scratch, Shared, Slots};
use crate::cpu::bf16::moments::LINES;
use crate::cpu::bf16::{Bf16Path, Moments};
use crate::cpu::conv2d::Conv2dDims;

/// Bytes of a block of rows: it stays in the second-level cache beside the columns of `B`.
const BLOCK_BYTES: usize = 512 << 10;
/// Tasks that a product is cut into where its size allows it.
const TASKS: usize = 16;

/// Which rows of a tensor are multiplied, or written.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// All, one after the other.
    All,
    /// The pixels that a 1x1 convolution without padding meets: `p x q` of an image, `stride` apart.
    Strided { p: usize, q: usize, width: usize, image: usize, stride: usize },
    /// For each output pixel of a convolution the pixels under its filter, one after the other. A stem's few channels would
    /// leave most of a step empty; those of all taps do not.
    Taps(Conv2dDims),
}

impl Rows {
    /// The pixels of the larger image of a 1x1 convolution.
    pub fn met(d: &Conv2dDims) -> Self {
        if d.stride == 1 {
            return Rows::All;
        }
        let Conv2dDims { p, q, h, w, stride, .. } = *d;
        Rows::Strided { p, q, width: w, image: h * w, stride }
    }

    /// The pixel of the larger image that row `i` of the product is.
    pub fn at(self, i: usize) -> usize {
        match self {
            Rows::All => i,
            Rows::Strided { p, q, width, image, stride } => {
                let (row, column) = (i / q, i % q);
                row / p * image + row % p * stride * width + column * stride
            }
            Rows::Taps(_) => unreachable!("rows of taps are gathered"),
        }
    }
}

/// Writes the pixels under the filter of output pixel `i`, `r s c` elements, zeros outside the image, and zeros up to the end of
/// the line.
pub fn gather(d: &Conv2dDims, x: &[u16], i: usize, line: &mut [u16]) {
    let (row, q) = (i / d.q, i % d.q);
    let (n, p) = (row / d.p, row % d.p);
    line.fill(0);
    // The columns of the filter that are inside.
    let left = q * d.stride;
    let first = d.pad.saturating_sub(left).min(d.s);
    let last = (d.w + d.pad).saturating_sub(left).min(d.s).max(first);
    let count = (last - first) * d.c;
    for (r, line) in line.chunks_mut(d.s * d.c).take(d.r).enumerate() {
        let row = (p * d.stride + r).wrapping_sub(d.pad);
        if row < d.h && count > 0 {
            let from = ((n * d.h + row) * d.w + left + first - d.pad) * d.c;
            line[first * d.c..][..count].copy_from_slice(&x[from..][..count]);
        }
    }
}

/// How `B` lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// A row of terms for each column of the product: `[n, k]`.
    Transposed,
    /// A row of columns for each term: `[k, n]`.
    Plain,
}

#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub by: Bf16Path,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: &'a [bf16],
    pub a_rows: Rows,
    pub b: &'a [bf16],
    pub right: Right,
    pub bias: Option<&'a [f32]>,
    pub accumulate: bool,
    pub c_rows: Rows,
}

/// The cut into tasks, from the shape alone.
struct Cut {
    /// Groups of rows with moments of their own, and rows in each.
    groups: usize,
    group_rows: usize,
    /// Rows of a block, and blocks of a group.
    block: usize,
    blocks: usize,
    /// Columns of 32 in all, in a set, and sets.
    columns: usize,
    set: usize,
    sets: usize,
    /// Tiles along `k`.
    steps: usize,
}

impl Cut {
    fn new(m: usize, n: usize, k: usize, groups: usize) -> Self {
        let steps = k.div_ceil(SIDE).max(1);
        let group_rows = m / groups;
        let fits = (BLOCK_BYTES / (steps * 64) / SIDE).max(1) * SIDE;
        let block = m.div_ceil(TASKS).max(2 * SIDE).next_multiple_of(SIDE).min(fits);
        let blocks = group_rows.div_ceil(block);
        let columns = n.div_ceil(SIDE);
        let set = columns.div_ceil(TASKS.div_ceil(groups * blocks).min(columns));
        let sets = columns.div_ceil(set);
        Self { groups, group_rows, block, blocks, columns, set, sets, steps }
    }

    fn tasks(&self) -> usize {
        self.groups * self.blocks * self.sets
    }
}

/// Bytes of packed `B`: `terms` by `outputs`.
pub fn right_len(terms: usize, outputs: usize) -> usize {
    outputs.div_ceil(SIDE) * terms.div_ceil(SIDE) * 2 * TILE
}

/// Packs 32 columns of `B`, from 32 `column` on: for each 32 terms two tiles. `b` has rows `line` elements apart.
///
/// # Safety
/// `b` covers `terms` by `outputs` elements in the layout of `right`; [`right_len`] of 32 columns at `to` is writable.
#[target_feature(enable = "avx2")]
pub unsafe fn pack_right(
    to: *mut u8,
    right: Right,
    b: Row,
    line: usize,
    (terms, outputs): (usize, usize),
    column: usize,
) {
    let row = |i: usize, count: usize| {
        if i < count { b.wrapping_add(i * line) } else { std::ptr::null() }
    };
    for step in 0..terms.div_ceil(SIDE) {
        for half in 0..2 {
            let to = to.wrapping_add((2 * step + half) * TILE).cast();
            let first = column * SIDE + half * 16;
            let term = step * SIDE;
            // SAFETY: rows and columns that exist, as the caller vouches; a tile of the caller's memory.
            unsafe {
                match right {
                    Right::Transposed => {
                        let rows = pack::Rows::new(|i| row(first + i, outputs));
                        pack::transposed_pairs(to, &rows, term, terms - term);
                    }
                    Right::Plain => {
                        let rows: pack::Rows<32> = pack::Rows::new(|i| row(term + i, terms));
                        pack::pairs(to, &rows, (first, outputs.saturating_sub(first)), 1, 0);
                    }
                }
            }
        }
    }
}

/// Whether tiles are loaded from `A` itself.
fn direct(k: usize, a_rows: Rows) -> bool {
    k.is_multiple_of(SIDE) && k > 0 && matches!(a_rows, Rows::All)
}

struct Parts {
    right: Part,
    /// Rows that cannot be loaded directly, of a task.
    panels: Slots,
    sums: Part,
}

fn parts(
    scratch: &mut Scratch,
    cut: &Cut,
    n: usize,
    k: usize,
    a_rows: Rows,
    moments: bool,
) -> Parts {
    let rows = if direct(k, a_rows) { SIDE } else { cut.block };
    let panel = rows * cut.steps * 64;
    let sums = if moments { cut.groups * cut.blocks * LINES * n * 4 } else { 0 };
    Parts {
        right: scratch.part(right_len(k, n)),
        panels: Slots::new(scratch, cut.tasks(), panel),
        sums: scratch.part(sums),
    }
}

/// Bytes of scratch for a product whose moments are of at most `groups` groups; 0 for none.
pub fn scratch_len(m: usize, n: usize, k: usize, a_rows: Rows, groups: usize) -> usize {
    let mut scratch = Scratch::counting();
    let cut = Cut::new(m, n, k, groups.max(1));
    parts(&mut scratch, &cut, n, k, a_rows, groups > 0);
    scratch.len()
}

/// Computes the product, and the moments of its columns.
///
/// # Safety
/// The product's path is available; `c` has the rows that `c_rows` names.
pub unsafe fn run(
    product: &Product<'_>,
    c: Target,
    moments: Option<Moments<'_>>,
    workspace: &mut [f32],
) {
    let Product { m, n, k, a_rows, b, right, .. } = *product;
    let cut = Cut::new(m, n, k, moments.as_ref().map_or(1, |moments| moments.groups));
    let mut scratch = Scratch::new(workspace);
    let parts = parts(&mut scratch, &cut, n, k, a_rows, moments.is_some());
    let line = if right == Right::Transposed { k } else { n };
    let b = Shared::of(b);
    (0..cut.columns).into_par_iter().each(|column| {
        let to = parts.right.at(column * cut.steps * 2 * TILE);
        // SAFETY: AVX2 comes with either path; `b` is a matrix of these sizes, and each task writes columns of its own.
        unsafe { pack_right(to, right, b.row(), line, (k, n), column) };
    });
    let wanted = moments.is_some();
    (0..cut.tasks()).into_par_iter().each(|task| {
        // SAFETY: the caller vouches for the path and `c`; tasks write different blocks, and have slots of their own.
        parts
            .panels
            .lend(|panel| unsafe { block(product, c, &cut, &parts, (task, panel), wanted) });
    });
    if let Some(moments) = moments {
        let sums = parts.sums.floats(cut.groups * cut.blocks * LINES * n);
        moments.merge(sums, n, |i| cut.block.min(cut.group_rows - i * cut.block));
    }
}

/// One task.
///
/// # Safety
/// As [`run`]; no other task writes its block of `c` or its panel.
#[target_feature(enable = "avx2,fma")]
unsafe fn block(
    product: &Product<'_>,
    c: Target,
    cut: &Cut,
    parts: &Parts,
    (task, panel): (usize, *mut u8),
    moments: bool,
) {
    let Product { n, k, a, a_rows, bias, accumulate, c_rows, .. } = *product;
    let (rows_block, set) = (task / cut.sets, task % cut.sets);
    let (group, index) = (rows_block / cut.blocks, rows_block % cut.blocks);
    let first = group * cut.group_rows + index * cut.block;
    let count = cut.block.min(cut.group_rows - index * cut.block);
    let line = cut.steps * 64;
    let direct = direct(k, a_rows);
    // The rows that are packed: all, or the last ones that are no whole block.
    let packed = if direct { count / SIDE * SIDE } else { 0 };
    for i in packed..count.next_multiple_of(SIDE) {
        let to = panel.wrapping_add((i - packed) * line);
        if let (Rows::Taps(d), true) = (a_rows, i < count) {
            // SAFETY: a line of this task's panel, which starts on a cache line and holds whole elements.
            let to = unsafe { std::slice::from_raw_parts_mut(to.cast(), line / 2) };
            gather(&d, bytemuck::cast_slice(a), first + i, to);
            continue;
        }
        let row = if i < count {
            a.as_ptr().cast::<u16>().wrapping_add(a_rows.at(first + i) * k)
        } else {
            std::ptr::null()
        };
        // SAFETY: a row of `a`, and a line of this task's panel.
        unsafe { pack::lines(to, row, k, cut.steps, 64) };
    }
    // SAFETY: the caller vouches for the path.
    let multiplier = unsafe { Multiplier::new(product.by) };
    let mut sums = Block([0.0; SIDE * SIDE]);
    let start = sums.0.as_mut_ptr();
    for column in set * cut.set..((set + 1) * cut.set).min(cut.columns) {
        let right = parts.right.at(column * cut.steps * 2 * TILE) as usize;
        let at = column * SIDE;
        let mut column_sums = moments.then(ColumnSums::new);
        let bias = bias.map_or(std::ptr::null(), |bias| bias[at..].as_ptr());
        let finish = Finish { bias, accumulate, columns: (n - at).min(SIDE) };
        for i in (0..count).step_by(SIDE) {
            let (left, a_line) = if i < packed {
                (a.as_ptr().wrapping_add((first + i) * k) as usize, 2 * k)
            } else {
                (panel.wrapping_add((i - packed) * line) as usize, line)
            };
            let run = Run { a: [left, left + 16 * a_line], b: [right, right + TILE] };
            let rows = (count - i).min(SIDE);
            let halves = [rows.min(16), rows.saturating_sub(16)];
            let operands = Operands {
                runs: if k == 0 { &[] } else { &[run] },
                steps: cut.steps,
                a_line,
                a_step: 64,
                b_step: 2 * TILE,
                live: Live { rows: halves, columns: finish.columns, terms: last_part(k) },
            };
            let halves = [start, start.wrapping_add(16 * SIDE)];
            // SAFETY: 32 rows of whole steps, of `a` or of the panel, and packed columns; the sums are a block of this task.
            unsafe {
                multiplier.multiply(&operands, Sums { halves, line: 4 * SIDE, accumulate: false })
            };
            match c_rows {
                Rows::All => {
                    let to = c.offset((first + i) * n + at);
                    // SAFETY: rows of this task's block of `c`.
                    unsafe { finish.write(&sums.0, to, n, rows, column_sums.as_mut()) };
                }
                _ => {
                    for (j, sums) in sums.0.chunks_exact(SIDE).enumerate().take(rows) {
                        let to = c.offset(c_rows.at(first + i + j) * n + at);
                        // SAFETY: a row of this task's block of `c`.
                        unsafe { finish.write(sums, to, n, 1, column_sums.as_mut()) };
                    }
                }
            }
        }
        if let Some(column_sums) = column_sums {
            let to = parts.sums.at((rows_block * LINES * n + at) * 4).cast();
            // SAFETY: the lines of this block of rows, in which this task alone writes these columns.
            unsafe { column_sums.write(to, n, finish.columns) };
        }
    }
}

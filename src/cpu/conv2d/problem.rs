//! Forward pass and data gradient as correlations.
//!
//! Data gradient: the row `h = i t + a` of `dx` depends only on the filter rows `r` with `r = a +
//! pad (mod t)`, at `p = (h + pad - r) / t`. The rows of one phase `a` are therefore a correlation
//! of `dy` with stride 1 and every `t`-th filter row, last row first; likewise columns. The `t * t`
//! phases together fill `dx`, without multiplications by zero.

use super::Conv2dDims;
use super::filter::FilterView;
use selfsup_cpu_kernels::kernel;

/// A set of correlations, one per phase, that together fill one output.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Images; input `[n, h, w, c]`; output `[n, out_h, out_w, k]`.
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub out_h: usize,
    pub out_w: usize,
    pub k: usize,
    /// The filter in memory, before it is split into phases: `[_, r, s, _]`.
    pub r: usize,
    pub s: usize,
    pub stride: usize,
    pub pad: usize,
    pub gradient: bool,
}

/// One of the correlations: outputs at rows `row0 + i * step`, columns `column0 + j * step`.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    pub row0: usize,
    pub column0: usize,
    /// Outputs across.
    pub q: usize,
    /// Input channels, taps and column stride of the tile kernels: with few channels a row of taps
    /// is one tap.
    pub c: usize,
    pub r: usize,
    pub s: usize,
    pub stride_x: usize,
    /// Row stride.
    pub stride: usize,
    pub pad_y: isize,
    pub pad_x: isize,
    pub view: FilterView,
}

/// The number of taps of an output phase, the first of them, and the padding of their correlation.
fn phase_taps(phase: usize, taps: usize, stride: usize, pad: usize) -> (usize, usize, isize) {
    let first = (phase + pad) % stride;
    let count = if first < taps { (taps - first).div_ceil(stride) } else { 0 };
    (count, first, count as isize - 1 - ((phase + pad) / stride) as isize)
}

impl Problem {
    pub fn forward(d: &Conv2dDims) -> Problem {
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *d;
        let gradient = false;
        Problem { n, h, w, c, out_h: p, out_w: q, k, r, s, stride, pad, gradient }.flattened()
    }

    pub fn data_gradient(d: &Conv2dDims) -> Problem {
        let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, pad } = *d;
        let gradient = true;
        Problem { n, h: p, w: q, c: k, out_h: h, out_w: w, k: c, r, s, stride, pad, gradient }
            .flattened()
    }

    /// A 1x1 convolution is a GEMM: every pixel becomes an image of one pixel.
    pub fn flattened(self) -> Problem {
        if (self.r, self.s, self.stride, self.pad) == (1, 1, 1, 0) {
            Problem { n: self.n * self.h * self.w, h: 1, w: 1, out_h: 1, out_w: 1, ..self }
        } else {
            self
        }
    }

    /// Rows and columns between neighbouring outputs of one phase.
    pub fn step(&self) -> usize {
        if self.gradient { self.stride } else { 1 }
    }

    /// The phases that have outputs.
    pub fn phases(self) -> impl Iterator<Item = Phase> {
        let (rows, columns) = (self.step().min(self.out_h), self.step().min(self.out_w));
        (0..rows * columns).map(move |i| self.phase(i / columns, i % columns))
    }

    pub fn phase(&self, row0: usize, column0: usize) -> Phase {
        let (row, column) = ((self.s * self.weight_c()) as isize, self.weight_c() as isize);
        let filter = self.r as isize * row;
        let q = self.out_w.saturating_sub(column0).div_ceil(self.step());
        if !self.gradient {
            let (r, stride, pad) = (self.r, self.stride, self.pad as isize);
            let (s, c, stride_x) =
                if self.merged() { (1, self.s * self.c, 1) } else { (self.s, self.c, stride) };
            let view = FilterView { start: 0, output: filter, row, column, input: 1, r, s, c };
            let (pad_y, pad_x) = (pad, pad);
            return Phase { row0, column0, q, c, r, s, stride_x, stride, pad_y, pad_x, view };
        }
        let step = self.stride as isize;
        let (r, first_row, pad_y) = phase_taps(row0, self.r, self.stride, self.pad);
        let (s, first_column, pad_x) = phase_taps(column0, self.s, self.stride, self.pad);
        let last_row = first_row as isize + (r as isize - 1) * step;
        let last_column = first_column as isize + (s as isize - 1) * step;
        let view = FilterView {
            start: last_row * row + last_column * column,
            output: 1,
            row: -step * row,
            column: -step * column,
            input: filter,
            r,
            s,
            c: self.c,
        };
        let (c, stride_x, stride) = (self.c, 1, 1);
        Phase { row0, column0, q, c, r, s, stride_x, stride, pad_y, pad_x, view }
    }

    /// Channels of the filter in memory.
    pub fn weight_c(&self) -> usize {
        if self.gradient { self.k } else { self.c }
    }

    pub fn image_len(&self) -> usize {
        self.out_h * self.out_w * self.k
    }

    /// Whether the taps of a filter row are read as one. A stem's four channels make loops too
    /// short, but its pixels are contiguous, so that `s` taps of 4 channels are one tap of `4 s`.
    pub fn merged(&self) -> bool {
        !self.gradient && self.c == 4 && self.s > 1 && self.stride <= 2
    }

    /// Whether the tiles read the tensor itself: the rows of a GEMM, of a length that the kernels
    /// have instances for. Packing costs up to a fifth (256 to 64 channels).
    pub fn direct(&self) -> bool {
        (self.r, self.s, self.h, self.w, self.stride, self.pad) == (1, 1, 1, 1, 1, 0)
            && kernel::DIRECT.contains(&self.c)
    }

    /// Channels per block of the tile kernels.
    pub fn block(&self) -> usize {
        match self.c {
            c if self.direct() => c,
            _ if self.merged() => self.c * self.s,
            ..=4 => 4,
            _ => 16,
        }
    }

    /// Floats from one output's pixel to the next output's in a slab.
    pub fn pixel_len(&self) -> usize {
        if self.merged() { self.c * self.stride } else { self.block() }
    }
}

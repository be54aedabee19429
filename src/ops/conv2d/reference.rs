//! The definition, in f64: one loop over all products, summed into a different array for each direction.

use super::Conv2dDims;

/// Calls `f(y index, x index, w index)` for every product of the convolution, output after output, in filter order.
fn products(d: &Conv2dDims, mut f: impl FnMut(usize, usize, usize)) {
    for n in 0..d.n {
        for p in 0..d.p {
            for q in 0..d.q {
                for k in 0..d.k {
                    for r in 0..d.r {
                        for s in 0..d.s {
                            let (i, j) = (p * d.stride + r, q * d.stride + s);
                            let inside = (d.pad..d.h + d.pad).contains(&i)
                                && (d.pad..d.w + d.pad).contains(&j);
                            if !inside {
                                continue;
                            }
                            let y = ((n * d.p + p) * d.q + q) * d.k + k;
                            let x = ((n * d.h + i - d.pad) * d.w + j - d.pad) * d.c;
                            let w = ((k * d.r + r) * d.s + s) * d.c;
                            for c in 0..d.c {
                                f(y, x + c, w + c);
                            }
                        }
                    }
                }
            }
        }
    }
}

pub(super) fn forward(y: &mut [f64], x: &[f64], w: &[f64], d: &Conv2dDims) {
    y.fill(0.0);
    products(d, |at_y, at_x, at_w| y[at_y] += x[at_x] * w[at_w]);
}

pub(super) fn data_gradient(
    dx: &mut [f64],
    dy: &[f64],
    w: &[f64],
    d: &Conv2dDims,
    accumulate: bool,
) {
    if !accumulate {
        dx.fill(0.0);
    }
    products(d, |at_y, at_x, at_w| dx[at_x] += dy[at_y] * w[at_w]);
}

pub(super) fn weight_gradient(
    dw: &mut [f64],
    x: &[f64],
    dy: &[f64],
    d: &Conv2dDims,
    accumulate: bool,
) {
    if !accumulate {
        dw.fill(0.0);
    }
    products(d, |at_y, at_x, at_w| dw[at_w] += dy[at_y] * x[at_x]);
}

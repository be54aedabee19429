//! The naive f64 path.

use super::LinearDims;

pub(super) fn forward(y: &mut [f64], x: &[f64], w: &[f64], bias: Option<&[f64]>, dims: LinearDims) {
    let LinearDims { n, d, k } = dims;
    for i in 0..n {
        for j in 0..k {
            let sum: f64 = (0..d).map(|t| x[i * d + t] * w[j * d + t]).sum();
            y[i * k + j] = sum + bias.map_or(0.0, |b| b[j]);
        }
    }
}

pub(super) fn input_gradient(
    dx: &mut [f64],
    dy: &[f64],
    w: &[f64],
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    for i in 0..n {
        for t in 0..d {
            let sum: f64 = (0..k).map(|j| dy[i * k + j] * w[j * d + t]).sum();
            put(&mut dx[i * d + t], sum, accumulate);
        }
    }
}

pub(super) fn weight_gradient(
    dw: &mut [f64],
    dy: &[f64],
    x: &[f64],
    dims: LinearDims,
    accumulate: bool,
) {
    let LinearDims { n, d, k } = dims;
    for j in 0..k {
        for t in 0..d {
            let sum: f64 = (0..n).map(|i| dy[i * k + j] * x[i * d + t]).sum();
            put(&mut dw[j * d + t], sum, accumulate);
        }
    }
}

pub(super) fn bias_gradient(db: &mut [f64], dy: &[f64], accumulate: bool) {
    let k = db.len();
    for (j, db) in db.iter_mut().enumerate() {
        put(db, dy.iter().skip(j).step_by(k).sum(), accumulate);
    }
}

fn put(to: &mut f64, value: f64, accumulate: bool) {
    *to = if accumulate { *to + value } else { value };
}

//! The naive f64 path.

use super::{BatchNormDims, RUNNING_WEIGHT, Saved};
use crate::tensor::Tensor;

/// Indices of the elements of channel `j` in group `g`.
fn channel(dims: BatchNormDims, g: usize, j: usize) -> impl Iterator<Item = usize> + Clone {
    (0..dims.rows).map(move |i| g * dims.len() + i * dims.c + j)
}

pub(super) fn moments(mean: &mut [f64], variance: &mut [f64], x: &[f64], dims: BatchNormDims) {
    for g in 0..dims.groups {
        for j in 0..dims.c {
            let m = dims.rows as f64;
            let mu = channel(dims, g, j).map(|i| x[i]).sum::<f64>() / m;
            mean[g * dims.c + j] = mu;
            variance[g * dims.c + j] =
                channel(dims, g, j).map(|i| (x[i] - mu).powi(2)).sum::<f64>() / m;
        }
    }
}

pub(super) fn apply(y: &mut [f64], saved: &Saved, residual: Option<&Tensor>, relu: bool) {
    let dims = saved.dims;
    let shift = saved.shift.as_ref();
    for g in 0..dims.groups {
        for j in 0..dims.c {
            for i in channel(dims, g, j) {
                let gain = saved.gain.as_ref().map_or(1.0, |t| t.data::<f64>()[j]);
                let mut v = gain * normalised(saved, g, j, i);
                v += shift.map_or(0.0, |t| t.data::<f64>()[j]);
                v += residual.map_or(0.0, |t| t.data::<f64>()[i]);
                y[i] = if relu && v < 0.0 { 0.0 } else { v };
            }
        }
    }
}

pub(super) fn masked(dy: &Tensor, y: &Tensor) -> Tensor {
    let mut dz = dy.copy();
    for (dz, y) in dz.data_mut::<f64>().iter_mut().zip(y.data::<f64>()) {
        *dz = if *y > 0.0 { *dz } else { 0.0 };
    }
    dz
}

pub(super) fn backward_sums(sums: &mut [f64], dz: &[f64], saved: &Saved) {
    let dims = saved.dims;
    for g in 0..dims.groups {
        for j in 0..dims.c {
            sums[2 * g * dims.c + j] = channel(dims, g, j).map(|i| dz[i]).sum();
            sums[(2 * g + 1) * dims.c + j] =
                channel(dims, g, j).map(|i| dz[i] * normalised(saved, g, j, i)).sum();
        }
    }
}

pub(super) fn sum_groups(total: &mut [f64], sums: &[f64], which: usize) {
    let c = total.len();
    for (j, total) in total.iter_mut().enumerate() {
        *total = sums.chunks_exact(2 * c).map(|group| group[which * c + j]).sum();
    }
}

pub(super) fn input_gradient(
    dx: &mut [f64],
    dz: &[f64],
    sums: &[f64],
    saved: &Saved,
    accumulate: bool,
) {
    let dims = saved.dims;
    let m = dims.all_rows() as f64;
    for g in 0..dims.groups {
        for j in 0..dims.c {
            let (sum, dot) = (sums[2 * g * dims.c + j], sums[(2 * g + 1) * dims.c + j]);
            let gain = saved.gain.as_ref().map_or(1.0, |t| t.data::<f64>()[j]);
            let inv_std = saved.inv_std.data::<f64>()[g * dims.c + j];
            for i in channel(dims, g, j) {
                let x_hat = normalised(saved, g, j, i);
                let value = gain * inv_std * (dz[i] - sum / m - x_hat * dot / m);
                dx[i] = if accumulate { dx[i] + value } else { value };
            }
        }
    }
}

pub(super) fn move_running(running: &mut [f64], batch: &[f64], factor: f64) {
    let c = running.len();
    let groups = (batch.len() / c.max(1)) as f64;
    for (j, running) in running.iter_mut().enumerate() {
        let mean = batch.iter().skip(j).step_by(c).sum::<f64>() / groups;
        *running = (1.0 - RUNNING_WEIGHT) * *running + RUNNING_WEIGHT * factor * mean;
    }
}

/// x̂ of element `i`, which belongs to channel `j` of group `g`.
fn normalised(saved: &Saved, g: usize, j: usize, i: usize) -> f64 {
    let at = g * saved.dims.c + j;
    (saved.x.data::<f64>()[i] - saved.mean.data::<f64>()[at]) * saved.inv_std.data::<f64>()[at]
}

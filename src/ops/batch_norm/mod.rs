//! Batch norm over the rows of `x [rows, c]`, with an optional residual and ReLU in the same pass.
//!
//! `y = relu(gain (x - mean) / sqrt(var + eps) + shift + residual)`, mean and biased variance per channel over the rows
//! (Ioffe and Szegedy 2015, algorithm 1). Images are rows: `[n, h, w, c]` has `n h w` of them. With `groups > 1` the rows
//! fall into that many equal runs, each normalised by its own statistics: MoCo's batch norm on one device
//! (facebookresearch/moco, colab notebook, `SplitBatchNorm`).
//!
//! Backward, with `dz = dy` where `y > 0` and `x̂ = (x - mean) / sqrt(var + eps)`:
//! `dshift = Σ dz`, `dgain = Σ dz x̂`, `dx = gain / sqrt(var + eps) (dz - Σdz / m - x̂ Σ(dz x̂) / m)`, `dresidual = dz`.
//! Masks and `x̂` are recomputed from `x`, and masks after a residual from `y`: both are kept anyway.

mod cpu;
mod cuda;
mod reference;

use super::gemm::Moments;
use crate::arena::Stat;
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::Tensor;

/// What is added under the root.
pub(crate) const EPS: f64 = 1e-5;

/// The weight of the new batch in running statistics (PyTorch's `momentum`; TensorFlow's 0.9 is 1 minus this).
pub(crate) const RUNNING_WEIGHT: f64 = 0.1;

/// Running statistics of one batch norm.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Running mean `[c]`.
    pub mean: Stat,
    /// Running unbiased variance `[c]`.
    pub variance: Stat,
}

/// What [`batch_norm`] meets beside its input; every part is optional.
#[derive(Clone, Copy, Debug)]
pub struct BatchNorm<'v, 't> {
    /// Scale `[c]`, gamma; 1 without.
    pub gain: Option<&'v Var<'t>>,
    /// Shift `[c]`, beta; 0 without.
    pub shift: Option<&'v Var<'t>>,
    /// Added before the ReLU; shaped as the input.
    pub residual: Option<&'v Var<'t>>,
    /// Whether a ReLU comes last.
    pub relu: bool,
    /// Equal runs of rows with statistics of their own, at least 1.
    pub groups: usize,
    /// Statistics that training moves and evaluation uses.
    pub running: Option<Running>,
}

impl Default for BatchNorm<'_, '_> {
    fn default() -> Self {
        Self { gain: None, shift: None, residual: None, relu: false, groups: 1, running: None }
    }
}

/// The sizes of a batch norm: `groups * rows` rows of `c` channels.
#[derive(Clone, Copy, Debug)]
struct BatchNormDims {
    groups: usize,
    /// Rows of one group.
    rows: usize,
    c: usize,
}

impl BatchNormDims {
    /// Elements of one group.
    fn len(self) -> usize {
        self.rows * self.c
    }
}

/// Batch norm of `x` over all sizes but the last.
///
/// Training normalises by the batch and moves running statistics, a split one by the mean over its groups; evaluation
/// normalises by running statistics.
///
/// # Panics
/// When shapes do not fit, the rows are no multiple of `groups`, or evaluation finds no running statistics.
#[track_caller]
pub fn batch_norm<'t>(x: &Var<'t>, with: BatchNorm<'_, 't>) -> Var<'t> {
    batch_norm_by(x, with, None)
}

/// [`batch_norm`], by moments that the convolution before it has brought along, made for as many groups.
#[track_caller]
pub(crate) fn batch_norm_by<'t>(
    x: &Var<'t>,
    with: BatchNorm<'_, 't>,
    moments: Option<Moments>,
) -> Var<'t> {
    let c = *x.shape().last().expect("batch_norm: the input has no channels");
    let all_rows = x.value().len() / c.max(1);
    let groups = if x.tape().batch_statistics() { with.groups } else { 1 };
    assert!(
        groups > 0 && all_rows.is_multiple_of(groups),
        "batch_norm: {all_rows} rows are not {groups} equal groups"
    );
    for (var, what) in [(with.gain, "gain"), (with.shift, "shift")] {
        if let Some(var) = var {
            assert_eq!(**var.shape(), [c], "batch_norm: {what} {:?}, {c} channels", var.shape());
        }
    }
    if let Some(residual) = with.residual {
        assert_eq!(residual.shape(), x.shape(), "batch_norm: residual and input differ");
    }
    let dims = BatchNormDims { groups, rows: all_rows / groups, c };
    let device = x.tape().device().clone();

    let (mean, inv_std) = if x.tape().batch_statistics() {
        match device.kind() {
            DeviceKind::Cuda => cuda::moments(x.tape(), x.value(), with.running, dims, moments),
            _ => batch_moments(x, with.running, dims),
        }
    } else {
        let running = with.running.expect("batch_norm: evaluation needs running statistics");
        let (mean, variance) = (x.tape().stat(running.mean), x.tape().stat(running.variance));
        let inv_std = match device.kind() {
            DeviceKind::Cuda => cuda::inv_std(&variance),
            _ => {
                let inv_std: Vec<f64> =
                    variance.to_f64().iter().map(|v| 1.0 / (v + EPS).sqrt()).collect();
                Tensor::from_f64(&device, [1, c], &inv_std)
            }
        };
        (mean.copy(), inv_std)
    };

    let mut y = x.value().empty_like();
    let saved = Saved {
        x: x.value().clone(),
        gain: with.gain.map(|v| v.value().clone()),
        shift: with.shift.map(|v| v.value().clone()),
        mean,
        inv_std,
        dims,
    };
    let (shift, residual) = (saved.shift.as_ref(), with.residual.map(|v| v.value()));
    match device.kind() {
        DeviceKind::Cpu => {
            let y = y.data_mut();
            device.run(|| cpu::apply(y, &saved, residual, with.relu));
        }
        DeviceKind::Cuda => cuda::apply(&mut y, &saved, shift, residual, with.relu),
        DeviceKind::Reference => {
            reference::apply(y.data_mut(), &saved, shift, residual, with.relu);
        }
    }

    let (x_id, gain_id, shift_id) = (x.id(), with.gain.map(Var::id), with.shift.map(Var::id));
    let residual_id = with.residual.map(Var::id);
    let inputs: Vec<&Var<'t>> =
        [Some(x), with.gain, with.shift, with.residual].into_iter().flatten().collect();
    // Without a residual the mask comes from the input, which is read anyway, and the CPU turns dy into dx in place: the
    // passes are bound by memory.
    let fast = device.kind() != DeviceKind::Reference;
    let rectified = fast && with.relu && with.residual.is_none();
    let mask = (with.relu && !rectified).then(|| y.clone());
    x.tape().record("batch_norm", y, &inputs, move |dy, gradients| {
        let device = dy.device().clone();
        if device.kind() == DeviceKind::Cuda {
            let ids = cuda::Ids { x: x_id, gain: gain_id, shift: shift_id, residual: residual_id };
            return cuda::backward(gradients, dy, &saved, mask.as_ref(), rectified, ids);
        }
        let BatchNormDims { c, groups, .. } = saved.dims;
        // [groups, 2, c]: Σ dz and Σ dz x̂
        let mut sums = Tensor::floats(&device, [groups, 2, c]);
        let mut dz = dy;
        match device.kind() {
            DeviceKind::Cpu => {
                if (mask.is_some() || rectified) && !dz.is_unique() {
                    dz = dz.copy();
                }
                let sums = sums.data_mut();
                match &mask {
                    Some(y) => {
                        let dz = dz.data_mut();
                        device.run(|| cpu::mask_and_sum(sums, dz, y.data(), &saved));
                    }
                    None => device.run(|| cpu::backward_sums(sums, dz.data(), &saved, rectified)),
                }
            }
            // Reference: a GPU has returned.
            _ => {
                if let Some(y) = &mask {
                    dz = reference::masked(&dz, y);
                }
                reference::backward_sums(sums.data_mut(), dz.data(), &saved);
            }
        }
        for (id, which) in [(shift_id, 0), (gain_id, 1)] {
            if let Some(id) = id {
                let mut total = Tensor::floats(&device, [c]);
                match device.kind() {
                    DeviceKind::Cpu => cpu::sum_groups(total.data_mut(), sums.data(), which),
                    _ => {
                        reference::sum_groups(total.data_mut(), sums.data(), which);
                    }
                }
                gradients.add(id, total);
            }
        }
        if rectified {
            let (dx, sums) = (dz.data_mut(), sums.data());
            device.run(|| cpu::rectified_input_gradient(dx, sums, &saved));
            gradients.add(x_id, dz);
            return;
        }
        if let Some((mut dx, accumulate)) = gradients.target(x_id, saved.x.shape()) {
            match device.kind() {
                DeviceKind::Cpu => {
                    let (dx, dz, sums) = (dx.data_mut(), dz.data(), sums.data());
                    device.run(|| cpu::input_gradient(dx, dz, sums, &saved, accumulate));
                }
                _ => reference::input_gradient(
                    dx.data_mut(),
                    dz.data(),
                    sums.data(),
                    &saved,
                    accumulate,
                ),
            }
        }
        if let Some(id) = residual_id {
            gradients.add(id, dz);
        }
    })
}

/// What the backward pass needs.
struct Saved {
    x: Tensor,
    gain: Option<Tensor>,
    shift: Option<Tensor>,
    /// `[groups, c]`
    mean: Tensor,
    /// `[groups, c]`
    inv_std: Tensor,
    dims: BatchNormDims,
}

/// Mean and `1 / sqrt(var + eps)` of each group, `[groups, c]`; moves running statistics on the way.
///
/// CPU and reference; a GPU has `cuda::moments`. Several processes will merge `(rows, mean, M2)` here, between the two halves.
fn batch_moments(x: &Var<'_>, running: Option<Running>, dims: BatchNormDims) -> (Tensor, Tensor) {
    let device = x.tape().device();
    let shape = [dims.groups, dims.c];
    let (mut mean, mut variance) = (Tensor::floats(device, shape), Tensor::floats(device, shape));
    match device.kind() {
        DeviceKind::Cpu => {
            let mut partial = Tensor::floats(device, [cpu::partial_len(dims)]);
            let (mean, variance) = (mean.data_mut(), variance.data_mut());
            let (partial, x) = (partial.data_mut(), x.value().data());
            device.run(|| cpu::moments(mean, variance, partial, x, dims));
        }
        _ => {
            reference::moments(mean.data_mut(), variance.data_mut(), x.value().data(), dims);
        }
    }
    if let Some(running) = running {
        // PyTorch's running variance is the unbiased one.
        let unbiased = dims.rows as f64 / (dims.rows as f64 - 1.0).max(1.0);
        for (stat, batch, factor) in
            [(running.mean, &mean, 1.0), (running.variance, &variance, unbiased)]
        {
            x.tape().update_stat(stat, |mut old| match device.kind() {
                DeviceKind::Cpu => cpu::move_running(old.data_mut(), batch.data(), factor),
                _ => {
                    reference::move_running(old.data_mut(), batch.data(), factor);
                }
            });
        }
    }
    let mut inv_std = Tensor::floats(device, shape);
    match device.kind() {
        DeviceKind::Cpu => {
            for (i, v) in inv_std.data_mut::<f32>().iter_mut().zip(variance.data::<f32>()) {
                *i = 1.0 / (v + EPS as f32).sqrt();
            }
        }
        _ => {
            for (i, v) in inv_std.data_mut::<f64>().iter_mut().zip(variance.data::<f64>()) {
                *i = 1.0 / (v + EPS).sqrt();
            }
        }
    }
    (mean, inv_std)
}

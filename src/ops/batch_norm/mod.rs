//! Batch norm over the rows of `x [rows, c]`, with an optional residual and ReLU in the same pass.
//!
//! `y = relu(gain (x - mean) / sqrt(var + eps) + shift + residual)`, mean and biased variance per channel over the rows
//! (Ioffe and Szegedy 2015, algorithm 1). Images are rows: `[n, h, w, c]` has `n h w` of them. With `groups > 1` the rows
//! are split into that many equal runs, each normalised by its own statistics: MoCo's batch norm on one device
//! (facebookresearch/moco, colab notebook, `SplitBatchNorm`). Groups are those of the batch: a single one spans all ranks, which
//! merge their means and variances; of several, each rank has its share.
//!
//! Backward, with `dz = dy` where `y > 0` and `x̂ = (x - mean) / sqrt(var + eps)`:
//! `dshift = Σ dz`, `dgain = Σ dz x̂`, `dx = gain / sqrt(var + eps) (dz - Σdz / m - x̂ Σ(dz x̂) / m)`, `dresidual = dz`.
//! The backward pass recomputes `x̂` and the mask from `x`, and the mask after a residual from `y`. Both tensors are saved
//! anyway.

mod cpu;
mod cuda;
mod reference;

use super::gemm::Moments;
use crate::arena::Stat;
use crate::device::{DeviceKind, Group};
use crate::tape::{Gradients, Var, VarId};
use crate::tensor::{Float, Tensor, by_activation, sum_over_ranks};

/// Added to the variance before the square root.
pub(crate) const EPS: f64 = 1e-5;

/// Weight of the new batch in the running statistics: PyTorch's `momentum`, 1 minus TensorFlow's.
pub(crate) const RUNNING_WEIGHT: f64 = 0.1;

/// The running statistics of one batch norm.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Running mean `[c]`.
    pub mean: Stat,
    /// Running unbiased variance `[c]`.
    pub variance: Stat,
}

/// The options of [`batch_norm`].
#[derive(Clone, Copy, Debug)]
pub struct BatchNorm<'v, 't> {
    /// Scale `[c]`, gamma; 1 if absent.
    pub gain: Option<&'v Var<'t>>,
    /// Shift `[c]`, beta; 0 if absent.
    pub shift: Option<&'v Var<'t>>,
    /// Added before the ReLU; has the input's shape.
    pub residual: Option<&'v Var<'t>>,
    /// Whether a ReLU follows.
    pub relu: bool,
    /// Number of equal runs of rows, each with its own statistics; at least 1.
    pub groups: usize,
    /// Statistics that training updates and evaluation normalises by.
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
    /// Rows in one group, of this rank.
    rows: usize,
    c: usize,
    /// Number of ranks that share the rows of a group.
    ranks: usize,
}

impl BatchNormDims {
    /// Number of rows whose statistics a group is normalised by.
    fn all_rows(self) -> usize {
        self.rows * self.ranks
    }

    /// Number of elements in one group.
    fn len(self) -> usize {
        self.rows * self.c
    }
}

/// Normalises `x [.., c]` per channel over all dimensions but the last.
///
/// Training normalises by the statistics of the batch and updates the running statistics; with several groups it updates them
/// by the mean over the groups. Evaluation normalises by the running statistics.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [2, 1], &[1.0, 3.0]);
/// let y = tape::forward(&mut arena, |tape| ops::batch_norm(&tape.input(&x), ops::BatchNorm::default()))?;
/// assert!((y.to_f64()[1] - 1.0).abs() < 1e-4);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If shapes do not fit, the number of rows is not a multiple of `groups`, or evaluation has no running statistics.
#[track_caller]
pub fn batch_norm<'t>(x: &Var<'t>, with: BatchNorm<'_, 't>) -> Var<'t> {
    batch_norm_by(x, with, None)
}

/// [`batch_norm`] from `moments` that the preceding convolution computed in its epilogue for the same number of groups.
#[track_caller]
pub(crate) fn batch_norm_by<'t>(
    x: &Var<'t>,
    with: BatchNorm<'_, 't>,
    moments: Option<Moments>,
) -> Var<'t> {
    for input in [with.gain, with.shift, with.residual] {
        x.tape().expect_inputs("batch_norm", input.as_slice());
    }
    let dims = checked_dims(x, &with);
    let device = x.tape().device().clone();
    let (mean, inv_std) = statistics(x, with.running, dims, moments);
    let saved = Saved {
        x: x.value().clone(),
        gain: with.gain.map(|v| v.value().clone()),
        shift: with.shift.map(|v| v.value().clone()),
        mean,
        inv_std,
        dims,
    };
    let y = apply(&saved, with.residual.map(Var::value), with.relu);

    let ids = Ids {
        x: x.id(),
        gain: with.gain.map(Var::id),
        shift: with.shift.map(Var::id),
        residual: with.residual.map(Var::id),
    };
    let inputs: Vec<&Var<'t>> =
        [Some(x), with.gain, with.shift, with.residual].into_iter().flatten().collect();
    // Without a residual the mask comes from the input, which the backward pass reads anyway, and the CPU turns dy into dx in
    // place: both passes are limited by memory bandwidth.
    let rectified = device.kind() != DeviceKind::Reference && with.relu && with.residual.is_none();
    let mask = (with.relu && !rectified).then(|| y.clone());
    let group = x.tape().group().clone();
    x.tape().record("batch_norm", y, &inputs, move |dy, gradients| {
        if device.kind() == DeviceKind::Cuda {
            cuda::backward(gradients, dy, &saved, mask.as_ref(), rectified, ids, &group);
        } else {
            backward_on_host(gradients, dy, &saved, mask.as_ref(), rectified, ids, &group);
        }
    })
}

/// Checks the shapes and returns the sizes.
#[track_caller]
fn checked_dims(x: &Var<'_>, with: &BatchNorm<'_, '_>) -> BatchNormDims {
    let c = *x.shape().last().expect("batch_norm: the input has no channels");
    let all_rows = x.value().len() / c.max(1);
    let (groups, ranks) = match (x.tape().batch_statistics(), with.groups) {
        (false, _) => (1, 1),
        (true, 1) => (1, x.tape().group().size()),
        (true, groups) => {
            let size = x.tape().group().size();
            assert!(
                groups.is_multiple_of(size),
                "batch_norm: {size} ranks cannot have equal shares of {groups} groups"
            );
            (groups / size, 1)
        }
    };
    assert!(
        (1..=all_rows.max(1)).contains(&groups) && all_rows.is_multiple_of(groups),
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
    if let Some(Running { mean, variance }) = with.running {
        for (stat, what) in [(mean, "mean"), (variance, "variance")] {
            let shape = stat.shape();
            assert_eq!(**shape, [c], "batch_norm: running {what} {shape:?}, {c} channels");
        }
    }
    BatchNormDims { groups, rows: all_rows / groups, c, ranks }
}

/// Returns the mean and `1 / sqrt(var + eps)` to normalise by, `[groups, c]`: the batch's in training, the running ones in
/// evaluation.
#[track_caller]
fn statistics(
    x: &Var<'_>,
    running: Option<Running>,
    dims: BatchNormDims,
    moments: Option<Moments>,
) -> (Tensor, Tensor) {
    let (tape, device) = (x.tape(), x.tape().device());
    if tape.batch_statistics() {
        return match device.kind() {
            DeviceKind::Cuda => cuda::moments(tape, x.value(), running, dims, moments),
            _ => batch_moments(x, running, dims, moments),
        };
    }
    let running = running.expect("batch_norm: evaluation needs running statistics");
    let (mean, variance) = (tape.stat(running.mean), tape.stat(running.variance));
    let inv_std = match device.kind() {
        DeviceKind::Cuda => cuda::inv_std(&variance),
        _ => {
            let inv_std: Vec<f64> =
                variance.to_f64().iter().map(|v| 1.0 / (v + EPS).sqrt()).collect();
            Tensor::from_f64(device, [1, dims.c], &inv_std)
        }
    };
    (mean.copy(), inv_std)
}

/// Returns `y` from the statistics in `saved`.
fn apply(saved: &Saved, residual: Option<&Tensor>, relu: bool) -> Tensor {
    let mut y = saved.x.empty_like();
    let device = y.device().clone();
    match device.kind() {
        DeviceKind::Cpu => by_activation!(saved.x.dtype(), T => {
            let y = y.data_mut::<T>();
            device.run(|| cpu::apply(y, saved, residual, relu));
        }),
        DeviceKind::Cuda => cuda::apply(&mut y, saved, residual, relu),
        DeviceKind::Reference => reference::apply(y.data_mut(), saved, residual, relu),
    }
    y
}

/// The backward pass on the CPU and the reference device. `mask` is the forward pass's output if it had a ReLU after a
/// residual; `rectified` says that it had a ReLU without one.
fn backward_on_host(
    gradients: &mut Gradients<'_>,
    dy: Tensor,
    saved: &Saved,
    mask: Option<&Tensor>,
    rectified: bool,
    ids: Ids,
    group: &Group,
) {
    let device = dy.device().clone();
    let BatchNormDims { c, groups, ranks, .. } = saved.dims;
    // [groups, 2, c]: Σ dz and Σ dz x̂
    let mut sums = Tensor::floats(&device, [groups, 2, c]);
    let mut dz = mask_and_sum(&mut sums, dy, saved, mask, rectified);
    for (id, which) in [(ids.shift, 0), (ids.gain, 1)] {
        if let Some(id) = id {
            let mut total = Tensor::floats(&device, [c]);
            match device.kind() {
                DeviceKind::Cpu => cpu::sum_groups(total.data_mut(), sums.data(), which),
                _ => reference::sum_groups(total.data_mut(), sums.data(), which),
            }
            gradients.add(id, total);
        }
    }
    if ranks > 1 {
        // Gain and shift get this rank's sums, as all parameters do; the input's gradient needs those of all rows.
        sum_over_ranks(&mut sums, group, "batch norm's gradients");
    }
    if rectified {
        by_activation!(dz.dtype(), T => {
            let (dx, sums) = (dz.data_mut::<T>(), sums.data());
            device.run(|| cpu::rectified_input_gradient(dx, sums, saved));
        });
        gradients.add(ids.x, dz);
        return;
    }
    let mut own = None;
    if let Some((mut dx, accumulate)) = gradients.target_like(ids.x, &saved.x, &mut own) {
        match device.kind() {
            DeviceKind::Cpu => by_activation!(dz.dtype(), T => {
                let (dx, dz, sums) = (dx.data_mut::<T>(), dz.data(), sums.data());
                device.run(|| cpu::input_gradient(dx, dz, sums, saved, accumulate));
            }),
            _ => {
                let (dz, sums) = (dz.data(), sums.data());
                reference::input_gradient(dx.data_mut(), dz, sums, saved, accumulate);
            }
        }
    }
    if let Some(dx) = own {
        gradients.add(ids.x, dx);
    }
    if let Some(id) = ids.residual {
        gradients.add(id, dz);
    }
}

/// Fills `sums` and returns `dz`, or `dy` as it is if `rectified`.
fn mask_and_sum(
    sums: &mut Tensor,
    dy: Tensor,
    saved: &Saved,
    mask: Option<&Tensor>,
    rectified: bool,
) -> Tensor {
    let device = dy.device().clone();
    let mut dz = dy;
    if device.kind() == DeviceKind::Reference {
        if let Some(y) = mask {
            dz = reference::masked(&dz, y);
        }
        reference::backward_sums(sums.data_mut(), dz.data(), saved);
        return dz;
    }
    if (mask.is_some() || rectified) && !dz.is_unique() {
        dz = dz.copy(); // it is overwritten in place
    }
    let sums = sums.data_mut();
    by_activation!(dz.dtype(), T => match mask {
        Some(y) => {
            let dz = dz.data_mut::<T>();
            device.run(|| cpu::mask_and_sum(sums, dz, y.data(), saved));
        }
        None => device.run(|| cpu::backward_sums(sums, dz.data::<T>(), saved, rectified)),
    });
    dz
}

/// The inputs of a batch norm, as the tape identifies them: where their gradients go.
#[derive(Clone, Copy, Debug)]
struct Ids {
    x: VarId,
    gain: Option<VarId>,
    shift: Option<VarId>,
    residual: Option<VarId>,
}

/// What the backward pass reads.
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

/// Returns mean and biased variance of each group, `[groups, c]`, read from `x`.
fn own_moments(x: &Tensor, dims: BatchNormDims) -> (Tensor, Tensor) {
    let device = x.device();
    let shape = [dims.groups, dims.c];
    let (mut mean, mut variance) = (Tensor::floats(device, shape), Tensor::floats(device, shape));
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.dtype(), T => {
            let mut partial = Tensor::floats(device, [cpu::partial_len(dims)]);
            let (mean, variance) = (mean.data_mut(), variance.data_mut());
            let (partial, x) = (partial.data_mut(), x.data::<T>());
            device.run(|| cpu::moments(mean, variance, partial, x, dims));
        }),
        _ => reference::moments(mean.data_mut(), variance.data_mut(), x.data(), dims),
    }
    (mean, variance)
}

/// Returns mean and `1 / sqrt(var + eps)` of each group, `[groups, c]`, and updates the running statistics.
///
/// For the CPU and the reference device; a GPU uses `cuda::moments`.
fn batch_moments(
    x: &Var<'_>,
    running: Option<Running>,
    dims: BatchNormDims,
    given: Option<Moments>,
) -> (Tensor, Tensor) {
    let device = x.tape().device();
    let shape = [dims.groups, dims.c];
    let (mut mean, mut variance) = match given {
        Some(Moments::Groups { mean, variance }) => (mean, variance),
        _ => own_moments(x.value(), dims),
    };
    if dims.ranks > 1 {
        match device.kind() {
            DeviceKind::Cpu => merge_ranks::<f32>(&mut mean, &mut variance, x.tape().group()),
            _ => merge_ranks::<f64>(&mut mean, &mut variance, x.tape().group()),
        }
    }
    if let Some(running) = running {
        // PyTorch's running variance is unbiased.
        let rows = dims.all_rows() as f64;
        let unbiased = rows / (rows - 1.0).max(1.0);
        for (stat, batch, factor) in
            [(running.mean, &mean, 1.0), (running.variance, &variance, unbiased)]
        {
            x.tape().update_stat(stat, |mut old| match device.kind() {
                DeviceKind::Cpu => cpu::move_running(old.data_mut(), batch.data(), factor),
                _ => reference::move_running(old.data_mut(), batch.data(), factor),
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

/// Replaces mean and biased variance of this rank's rows by those of all ranks' rows, which are as many on each. In rank order,
/// so that all ranks get the same bits.
fn merge_ranks<T: Float>(mean: &mut Tensor, variance: &mut Tensor, group: &Group) {
    let (mean, variance) = (mean.data_mut::<T>(), variance.data_mut::<T>());
    let c = mean.len();
    let own = [&*mean, &*variance].concat();
    let all = group.all_gather("batch norm's statistics", &own).unwrap_or(own);
    let ranks = all.len() as f64 / (2 * c) as f64;
    for j in 0..c {
        let of =
            |which: usize| all.chunks_exact(2 * c).map(move |rank| rank[which * c + j].widen());
        let mu = of(0).sum::<f64>() / ranks;
        let between: f64 = of(0).map(|mean| (mean - mu).powi(2)).sum();
        mean[j] = T::narrow(mu);
        variance[j] = T::narrow((of(1).sum::<f64>() + between) / ranks);
    }
}

//! Sum and mean over one axis. `x` is seen as `[outer, n, inner]`, `y_oj = factor Σ_i x_oij`, where the factor is 1 or `1 / n`;
//! `dx_oij = factor dy_oj`. Sums are in f64 on every device; the output is f32, even if `x` is bf16.

mod cuda;

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{CHUNK, Float, Tensor, by_activation};

/// The sizes of a sum over one axis.
#[derive(Clone, Copy, Debug)]
struct SumDims {
    /// Product of the dimensions before the axis.
    outer: usize,
    n: usize,
    /// Product of the dimensions after the axis.
    inner: usize,
    factor: f64,
}

/// Sums `x` over `axis`, which the output's shape lacks. `sum(&sum(&x, 0), 0)` of a matrix is a scalar.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [2, 2], &[1.0, 2.0, 3.0, 4.0]);
/// let columns = tape::forward(&mut arena, |tape| ops::sum(&tape.input(&x), 0))?;
/// assert_eq!(columns.to_f64(), [4.0, 6.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If `x` has no such axis.
#[track_caller]
pub fn sum<'t>(x: &Var<'t>, axis: usize) -> Var<'t> {
    reduce("sum", x, axis, |_| 1.0)
}

/// Averages `x` over `axis`, which the output's shape lacks.
///
/// # Panics
/// If `x` has no such axis, or the axis has length 0.
#[track_caller]
pub fn mean<'t>(x: &Var<'t>, axis: usize) -> Var<'t> {
    reduce("mean", x, axis, |n| {
        assert!(n > 0, "mean: axis {axis} has length 0");
        1.0 / n as f64
    })
}

#[track_caller]
fn reduce<'t>(
    name: &'static str,
    x: &Var<'t>,
    axis: usize,
    factor: impl FnOnce(usize) -> f64,
) -> Var<'t> {
    let shape = *x.shape();
    assert!(axis < shape.len(), "{name}: no axis {axis} in {shape:?}");
    let (before, after) = (&shape[..axis], &shape[axis + 1..]);
    let (n, [outer, inner]) = (shape[axis], [before, after].map(|sizes| sizes.iter().product()));
    let dims = SumDims { outer, n, inner, factor: factor(n) };
    let device = x.tape().device();
    let mut y = Tensor::floats(device, [before, after].concat().as_slice());
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.value().dtype(), T => {
            let (y, x) = (y.data_mut::<f32>(), x.value().data::<T>());
            device.run(|| forward(y, x, dims));
        }),
        DeviceKind::Cuda => cuda::forward(&mut y, x.value(), dims),
        DeviceKind::Reference => forward::<f64, f64>(y.data_mut(), x.value().data(), dims),
    }
    let (id, dtype) = (x.id(), x.value().dtype());
    x.tape().record(name, y, &[x], move |dy, gradients| {
        let device = dy.device();
        let mut dx = Tensor::empty(device, dtype, shape);
        match device.kind() {
            DeviceKind::Cpu => by_activation!(dtype, T => {
                let (dx, dy) = (dx.data_mut::<T>(), dy.data::<f32>());
                device.run(|| backward(dx, dy, dims));
            }),
            DeviceKind::Cuda => cuda::backward(&mut dx, &dy, dims),
            DeviceKind::Reference => backward::<f64, f64>(dx.data_mut(), dy.data(), dims),
        }
        gradients.add(id, dx);
    })
}

/// Columns of a parallel task, whose sums stay in registers and cache.
const COLUMNS: usize = 256;

fn forward<Y: Float, X: Float>(y: &mut [Y], x: &[X], dims: SumDims) {
    let SumDims { n, inner, factor, .. } = dims;
    if inner == 1 {
        return y.par_iter_mut().enumerate().for_each(|(o, y)| {
            let sum: f64 = x[o * n..][..n].iter().map(|x| x.widen()).sum();
            *y = Y::narrow(factor * sum);
        });
    }
    y.par_chunks_mut(inner.max(1)).enumerate().each(|(o, y)| {
        y.par_chunks_mut(COLUMNS).enumerate().each(|(chunk, y)| {
            let mut sums = [0.0; COLUMNS];
            for i in 0..n {
                let row = &x[(o * n + i) * inner + chunk * COLUMNS..][..y.len()];
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.widen());
            }
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = Y::narrow(factor * sum));
        });
    });
}

fn backward<X: Float, Y: Float>(dx: &mut [X], dy: &[Y], dims: SumDims) {
    let SumDims { n, inner, factor, .. } = dims;
    let rows = dx.par_chunks_mut(inner.max(1)).with_min_len((CHUNK / inner.max(1)).max(1));
    rows.enumerate().each(|(row, dx)| {
        let dy = &dy[row / n * inner..][..inner];
        dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = X::narrow(factor * dy.widen()));
    });
}

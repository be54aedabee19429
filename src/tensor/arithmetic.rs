//! Arithmetic on tensors below the tape, for arenas and for accumulating gradients.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Activation, DType, Element, Tensor, TensorMut, by_activation};
use crate::device::cuda::{In, Launch, Out, Table, sum_squares};
use crate::device::{Device, DeviceKind};

/// Elements per parallel task over a flat array. Fixed, so that results do not depend on the number of threads.
pub(crate) const CHUNK: usize = 1 << 14;

/// Sets every element of a float tensor. Parallel on the CPU, because a network's gradients are large.
pub(crate) fn fill(x: &mut Tensor, value: f64) {
    let device = x.device().clone();
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.dtype(), T => {
            let (x, value) = (x.data_mut::<T>(), T::store(value as f32));
            device.run(|| x.par_chunks_mut(CHUNK).each(|x| x.fill(value)));
        }),
        DeviceKind::Cuda | DeviceKind::Reference => x.view_mut().fill(value),
    }
}

/// `sum += x`, in the dtype of `sum`.
#[track_caller]
pub(crate) fn add_into(device: &Device, sum: &mut TensorMut<'_>, x: &Tensor) {
    assert_eq!(sum.shape().elements(), x.len(), "sum: {:?} into {:?}", x.shape(), sum.shape());
    x.expect_on(device, "sum");
    match device.kind() {
        DeviceKind::Cpu => by_activation!(sum.dtype(), S => by_activation!(x.dtype(), T => {
            let (sum, x) = (sum.data_mut::<S>(), x.data::<T>());
            device.run(|| {
                let pairs = sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
                pairs.each(|(sum, x)| add_chunk(sum, x));
            });
        })),
        DeviceKind::Cuda => add_into_on_gpu(sum, &x.cast(sum.dtype())),
        DeviceKind::Reference => {
            for (sum, x) in sum.data_mut::<f64>().iter_mut().zip(x.data::<f64>()) {
                *sum += x;
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_chunk<S: Activation, T: Activation>(sum: &mut [S], x: &[T]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum = S::store(sum.load() + x.load());
    }
}

/// [`Tensor::cast`] on a host; between the types of a CPU's activations in whole vectors.
#[track_caller]
pub(super) fn cast_on_host(device: &Device, to: &mut TensorMut<'_>, x: &Tensor) {
    match (x.dtype(), to.dtype()) {
        (DType::F32, DType::Bf16) => cast_chunks::<f32, half::bf16>(device, to, x),
        (DType::Bf16, DType::F32) => cast_chunks::<half::bf16, f32>(device, to, x),
        _ => to.write_f64(&x.to_f64()),
    }
}

fn cast_chunks<S: Activation, T: Activation>(device: &Device, to: &mut TensorMut<'_>, x: &Tensor) {
    let (to, x) = (to.data_mut::<T>(), x.data::<S>());
    device.run(|| {
        let pairs = to.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        pairs.each(|(to, x)| cast_chunk(to, x));
    });
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn cast_chunk<S: Activation, T: Activation>(to: &mut [T], x: &[S]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to = T::store(x.load());
    }
}

/// The sum of the squares of `x - y`, or of `x`; see [`Tensor::squared_norm`].
#[track_caller]
pub(super) fn squares(x: &Tensor, y: Option<&Tensor>) -> f64 {
    let device = x.device().clone();
    match device.kind() {
        DeviceKind::Cpu => {
            let (x, y) = (x.data::<f32>(), y.map_or(&[][..], |y| y.data::<f32>()));
            let part = |(i, x): (usize, &[f32])| {
                let y = if y.is_empty() { &[][..] } else { &y[i * CHUNK..][..x.len()] };
                square_chunk(x, y)
            };
            let parts: Vec<f64> =
                device.run(|| x.par_chunks(CHUNK).enumerate().map(part).collect());
            parts.iter().sum()
        }
        DeviceKind::Cuda => squares_on_gpu(x, y),
        DeviceKind::Reference => {
            let x = x.data::<f64>();
            match y {
                Some(y) => x.iter().zip(y.data::<f64>()).map(|(x, y)| (x - y).powi(2)).sum(),
                None => x.iter().map(|x| x * x).sum(),
            }
        }
    }
}

/// `y` is as long as `x` or empty.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn square_chunk(x: &[f32], y: &[f32]) -> f64 {
    // Eight sums, which a vector holds.
    let mut sums = [0.0_f64; 8];
    let mut add = |i: usize, difference: f64| sums[i % 8] += difference * difference;
    if y.is_empty() {
        x.iter().enumerate().for_each(|(i, x)| add(i, f64::from(*x)));
    } else {
        x.iter().zip(y).enumerate().for_each(|(i, (x, y))| add(i, f64::from(*x) - f64::from(*y)));
    }
    sums.iter().sum()
}

#[track_caller]
fn squares_on_gpu(x: &Tensor, y: Option<&Tensor>) -> f64 {
    /// The same on every GPU, so that sums have the same bits.
    const BLOCKS: usize = 1024;
    let blocks = x.len().div_ceil(256 * 8).clamp(1, BLOCKS);
    let mut parts = Table::room(x.device(), blocks);
    let launch = Launch::new(x.device().gpu(), [blocks, 1, 1], [256, 1, 1]);
    let other = y.map_or(In::null(), |y| y.device_in());
    // SAFETY: `x` and `y`, if it is there, have as many elements; `parts` has one for each block.
    unsafe { sum_squares(launch, parts.device_out(), x.device_in(), other, x.len() as i64) };
    parts.read().iter().sum::<f64>()
}

/// `sum += x`, both of one dtype.
fn add_into_on_gpu(sum: &mut TensorMut<'_>, x: &Tensor) {
    fn in_place<T: Element>(sum: Out<'_, T>) -> (Out<'_, T>, In<'_, T>) {
        let also = sum.also_in();
        (sum, also)
    }
    let launch = Launch::over(x.device().gpu(), x.len(), 16 / x.dtype().size());
    let n = x.len() as i64;
    // SAFETY: both have `n` elements, and the kernel may work in place.
    unsafe {
        match x.dtype() {
            DType::Bf16 => {
                let (to, from) = in_place(sum.device_out());
                crate::device::cuda::add_bf16(launch, to, from, x.device_in(), n);
            }
            _ => {
                let (to, from) = in_place(sum.device_out());
                crate::device::cuda::add_f32(launch, to, from, x.device_in(), n);
            }
        }
    }
}

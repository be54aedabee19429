//! Arithmetic on tensors below the tape, for arenas and for accumulating gradients.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Activation, DType, Element, Tensor, TensorMut, by_activation};
use crate::device::cuda::{In, Launch, Out};
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

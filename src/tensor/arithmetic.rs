//! Arithmetic on tensors below the tape, for arenas and for accumulating gradients.

use rayon::prelude::*;

use super::{DType, Element, Tensor, TensorMut};
use crate::device::cuda::{In, Launch, Out};
use crate::device::{Device, DeviceKind};

/// Elements per parallel task over a flat array. Fixed, so that results do not depend on the number of threads.
pub(crate) const CHUNK: usize = 1 << 14;

/// Sets every element of a float tensor. Parallel on the CPU, because a network's gradients are large.
pub(crate) fn fill(x: &mut Tensor, value: f64) {
    let device = x.device().clone();
    match device.kind() {
        DeviceKind::Cpu => {
            let x = x.data_mut::<f32>();
            device.run(|| x.par_chunks_mut(CHUNK).for_each(|x| x.fill(value as f32)));
        }
        DeviceKind::Cuda | DeviceKind::Reference => x.view_mut().fill(value),
    }
}

/// `sum += x`, in the dtype of `sum`.
#[track_caller]
pub(crate) fn add_into(device: &Device, sum: &mut TensorMut<'_>, x: &Tensor) {
    assert_eq!(sum.shape().elements(), x.len(), "sum: {:?} into {:?}", x.shape(), sum.shape());
    x.expect_on(device, "sum");
    match device.kind() {
        DeviceKind::Cpu => {
            let (sum, x) = (sum.data_mut::<f32>(), x.data::<f32>());
            device.run(|| {
                sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(sum, x)| {
                    for (sum, x) in sum.iter_mut().zip(x) {
                        *sum += x;
                    }
                });
            });
        }
        DeviceKind::Cuda => add_into_on_gpu(sum, &x.cast(sum.dtype())),
        DeviceKind::Reference => {
            for (sum, x) in sum.data_mut::<f64>().iter_mut().zip(x.data::<f64>()) {
                *sum += x;
            }
        }
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

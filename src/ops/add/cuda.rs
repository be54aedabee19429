//! `kernels/elementwise.cu`, 16 bytes to a thread.

use crate::device::cuda::{In, Launch, Out};
use crate::tensor::{DType, Element, Tensor, TensorMut};

/// `a + b`, of one dtype.
#[track_caller]
pub(super) fn forward(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.dtype(), b.dtype(), "add: two dtypes");
    let (n, launch) = (a.len() as i64, launch(a));
    let mut y = a.empty_like();
    // SAFETY: all have `n` elements.
    unsafe {
        by_dtype!(
            a.dtype(),
            add_f32 | add_bf16(launch, y.device_out(), a.device_in(), b.device_in(), n)
        );
    }
    y
}

/// `sum += x`, of one dtype.
pub(super) fn add_into(sum: &mut TensorMut<'_>, x: &Tensor) {
    fn in_place<T: Element>(sum: Out<'_, T>) -> (Out<'_, T>, In<'_, T>) {
        let also = sum.also_in();
        (sum, also)
    }
    let (n, launch) = (x.len() as i64, launch(x));
    // SAFETY: both have `n` elements, and the kernel allows its output to be an input.
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

fn launch(x: &Tensor) -> Launch<'_> {
    Launch::over(x.device().gpu(), x.len(), 16 / x.dtype().size())
}

//! The helper of the elementwise primitives: one expression for all devices.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::device::cuda::Launch;
use crate::tensor::{Activation, CHUNK, Tensor, by_activation};

/// Returns `f(x)`, element by element: `map!(x, |x| x * x, square_f32 | square_bf16)`. The expression must be valid in f32, for
/// the CPU, and in f64, for the reference device. The kernels take `(y, x, n)`.
///
/// `map!(x, factor, |x| factor * x, scale_f32 | scale_bf16)` passes a parameter, an f64 that is rounded to f32 except on the
/// reference device. The kernels take `(y, x, factor, n)`.
macro_rules! map {
    ($x:expr, |$v:ident| $f:expr, $f32:ident | $bf16:ident) => {{
        let x: &crate::tensor::Tensor = $x;
        $crate::ops::elementwise::map::map_with(
            x,
            |$v: f32| -> f32 { $f },
            |$v: f64| -> f64 { $f },
            |launch, y, n| {
                // SAFETY: both tensors have `n` elements.
                unsafe {
                    by_dtype!(x.dtype(), $f32 | $bf16(launch, y.device_out(), x.device_in(), n))
                }
            },
        )
    }};
    ($x:expr, $p:ident, |$v:ident| $f:expr, $f32:ident | $bf16:ident) => {{
        let x: &crate::tensor::Tensor = $x;
        let rounded = $p as f32;
        $crate::ops::elementwise::map::map_with(
            x,
            {
                let $p = rounded;
                move |$v: f32| -> f32 { $f }
            },
            |$v: f64| -> f64 { $f },
            |launch, y, n| {
                // SAFETY: both tensors have `n` elements.
                unsafe {
                    by_dtype!(
                        x.dtype(),
                        $f32 | $bf16(launch, y.device_out(), x.device_in(), rounded, n)
                    )
                }
            },
        )
    }};
}

/// Returns `f(a, b)`, element by element, of two tensors of one shape and dtype: `zip!(a, b, |a, b| a + b, add_f32 | add_bf16)`.
/// The kernels take `(y, a, b, n)`.
macro_rules! zip {
    ($a:expr, $b:expr, |$u:ident, $v:ident| $f:expr, $f32:ident | $bf16:ident) => {{
        let (a, b): (&crate::tensor::Tensor, &crate::tensor::Tensor) = ($a, $b);
        $crate::ops::elementwise::map::zip_with(
            a,
            b,
            |$u: f32, $v: f32| -> f32 { $f },
            |$u: f64, $v: f64| -> f64 { $f },
            |launch, y, n| {
                // SAFETY: all three tensors have `n` elements.
                unsafe {
                    by_dtype!(
                        a.dtype(),
                        $f32 | $bf16(launch, y.device_out(), a.device_in(), b.device_in(), n)
                    )
                }
            },
        )
    }};
}

pub(super) use {map, zip};

/// Behind `map!`: `on_cuda(launch, y, n)` launches the kernel.
pub(super) fn map_with(
    x: &Tensor,
    on_cpu: impl Fn(f32) -> f32 + Sync,
    on_reference: impl Fn(f64) -> f64,
    on_cuda: impl FnOnce(Launch<'_>, &mut Tensor, i64),
) -> Tensor {
    let (mut y, device) = (x.empty_like(), x.device());
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.dtype(), T => {
            let (y, x) = (y.data_mut::<T>(), x.data::<T>());
            device.run(|| {
                let pairs = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
                pairs.each(|(y, x)| map_chunk(y, x, &on_cpu));
            });
        }),
        DeviceKind::Cuda => on_cuda(launch(x), &mut y, x.len() as i64),
        DeviceKind::Reference => {
            let pairs = y.data_mut::<f64>().iter_mut().zip(x.data::<f64>());
            pairs.for_each(|(y, &x)| *y = on_reference(x));
        }
    }
    y
}

/// Behind `zip!`: `on_cuda(launch, y, n)` launches the kernel.
#[track_caller]
pub(super) fn zip_with(
    a: &Tensor,
    b: &Tensor,
    on_cpu: impl Fn(f32, f32) -> f32 + Sync,
    on_reference: impl Fn(f64, f64) -> f64,
    on_cuda: impl FnOnce(Launch<'_>, &mut Tensor, i64),
) -> Tensor {
    debug_assert_eq!(
        (a.len(), a.dtype()),
        (b.len(), b.dtype()),
        "elementwise: the operands differ"
    );
    let (mut y, device) = (a.empty_like(), a.device());
    match device.kind() {
        DeviceKind::Cpu => by_activation!(a.dtype(), T => {
            let (y, a, b) = (y.data_mut::<T>(), a.data::<T>(), b.data::<T>());
            device.run(|| {
                let inputs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
                let all = y.par_chunks_mut(CHUNK).zip(inputs);
                all.each(|(y, (a, b))| zip_chunk(y, a, b, &on_cpu));
            });
        }),
        DeviceKind::Cuda => on_cuda(launch(a), &mut y, a.len() as i64),
        DeviceKind::Reference => {
            let inputs = a.data::<f64>().iter().zip(b.data::<f64>());
            let pairs = y.data_mut::<f64>().iter_mut().zip(inputs);
            pairs.for_each(|(y, (&a, &b))| *y = on_reference(a, b));
        }
    }
    y
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn map_chunk<T: Activation, F: Fn(f32) -> f32>(y: &mut [T], x: &[T], f: &F) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = T::store(f(x.load()));
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn zip_chunk<T, F>(y: &mut [T], a: &[T], b: &[T], f: &F)
where
    T: Activation,
    F: Fn(f32, f32) -> f32,
{
    for (y, (a, b)) in y.iter_mut().zip(a.iter().zip(b)) {
        *y = T::store(f(a.load(), b.load()));
    }
}

/// 16 bytes per thread.
fn launch(x: &Tensor) -> Launch<'_> {
    Launch::over(x.device().gpu(), x.len(), 16 / x.dtype().size())
}

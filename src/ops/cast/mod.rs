//! `y = x` in another float type, rounded to nearest even; `dx = dy` in the type of `x`.

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::DType;

/// Returns `x` as `dtype`, or `x` itself if it has that type already.
///
/// # Panics
/// If either type is not a float type.
#[track_caller]
pub(crate) fn cast<'t>(x: &Var<'t>, dtype: DType) -> Var<'t> {
    if x.value().dtype() == dtype {
        return x.clone();
    }
    let (y, x_id) = (x.value().cast(dtype), x.id());
    // `add` converts the gradient to the type of its value.
    x.tape().record("cast", y, &[x], move |dy, gradients| gradients.add(x_id, dy))
}

/// Returns `x` in f32 if it is bf16 on a CPU, else `x` itself: for losses of few rows, whose loops on a CPU are in f32, while a
/// GPU's kernels read either type.
pub(super) fn in_f32_on_a_cpu<'t>(x: &Var<'t>) -> Var<'t> {
    if x.value().device().kind() == DeviceKind::Cpu { cast(x, DType::F32) } else { x.clone() }
}

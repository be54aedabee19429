//! `y = x` in another float type, rounded to nearest even; `dx = dy` in the type of `x`.

use crate::tape::Var;
use crate::tensor::DType;

/// `x` as `dtype`; `x` itself where it is that already.
///
/// # Panics
/// When either is no float type.
#[track_caller]
pub(crate) fn cast<'t>(x: &Var<'t>, dtype: DType) -> Var<'t> {
    if x.value().dtype() == dtype {
        return x.clone();
    }
    let (y, x_id) = (x.value().cast(dtype), x.id());
    // `add` gives a gradient the type of what it belongs to.
    x.tape().record("cast", y, &[x], move |dy, gradients| gradients.add(x_id, dy))
}

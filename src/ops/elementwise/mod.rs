//! Elementwise primitives: [`add`], [`mul`], [`relu`], [`scale`], [`square`].
//!
//! `map!` and `zip!` evaluate one expression for all devices: in f32 on the CPU, in f64 on the reference device, and by the
//! named kernels of `kernels/elementwise.cu` on a GPU. A primitive computes its value with one of them and its gradient with
//! another; [`square`] shows the pattern, and `docs/adding.md` walks through it.

mod map;

use crate::tape::{Var, VarId};
use crate::tensor::{DType, Tensor};
use map::{map, zip};

/// Returns `a + b`, element by element: a residual connection without batch norm, or the sum of two losses. If one operand is
/// bf16 and the other f32, the result is f32.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [2], &[1.0, 2.0]);
/// let y = tape::forward(&mut arena, |tape| ops::add(&tape.input(&x), &tape.input(&x)))?;
/// assert_eq!(y.to_f64(), [2.0, 4.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the shapes differ.
#[track_caller]
pub fn add<'t>(a: &Var<'t>, b: &Var<'t>) -> Var<'t> {
    a.tape().expect_inputs("add", &[a, b]);
    assert_eq!(a.shape(), b.shape(), "add: {:?} and {:?} differ", a.shape(), b.shape());
    let [a, b] = &in_one_type(a, b);
    let y = zip!(a.value(), b.value(), |a, b| a + b, add_f32 | add_bf16);
    let (a_id, b_id) = (a.id(), b.id());
    a.tape().record("add", y, &[a, b], move |dy, gradients| {
        gradients.add(a_id, dy.clone());
        gradients.add(b_id, dy);
    })
}

/// Returns `a b`, element by element; `da = b dy`, `db = a dy`. If one operand is bf16 and the other f32, the result is f32.
///
/// # Panics
/// If the shapes differ.
#[track_caller]
pub fn mul<'t>(a: &Var<'t>, b: &Var<'t>) -> Var<'t> {
    a.tape().expect_inputs("mul", &[a, b]);
    assert_eq!(a.shape(), b.shape(), "mul: {:?} and {:?} differ", a.shape(), b.shape());
    let [a, b] = &in_one_type(a, b);
    let y = multiplied(a.value(), b.value());
    let (a_id, a_value) = (a.id(), a.value().clone());
    let (b_id, b_value) = (b.id(), b.value().clone());
    a.tape().record("mul", y, &[a, b], move |dy, gradients| {
        for (id, other) in [(a_id, &b_value), (b_id, &a_value)] {
            if id != VarId::Constant {
                gradients.add(id, multiplied(&dy, other));
            }
        }
    })
}

fn multiplied(a: &Tensor, b: &Tensor) -> Tensor {
    zip!(a, b, |a, b| a * b, mul_f32 | mul_bf16)
}

/// Both operands as they are if they have one type, else in the device's f32: on a GPU activations are bf16, losses f32.
fn in_one_type<'t>(a: &Var<'t>, b: &Var<'t>) -> [Var<'t>; 2] {
    if a.value().dtype() == b.value().dtype() {
        return [a.clone(), b.clone()];
    }
    [a, b].map(|v| super::cast(v, DType::of(v.tape().device())))
}

/// Returns `max(x, 0)`, element by element. NaN propagates. The gradient at 0 is 0, as in PyTorch.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let x = Tensor::from_f64(&device, [3], &[-1.0, 0.0, 2.0]);
/// let y = tape::forward(&mut arena, |tape| ops::relu(&tape.input(&x)))?;
/// assert_eq!(y.to_f64(), [0.0, 0.0, 2.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
pub fn relu<'t>(x: &Var<'t>) -> Var<'t> {
    // Unlike `max`, the comparison propagates NaN.
    let y = map!(x.value(), |x| if x < 0.0 { 0.0 } else { x }, relu_f32 | relu_bf16);
    // `y` has the mask as well as `x`, and the next operation saves it anyway.
    let (id, y_value) = (x.id(), y.clone());
    x.tape().record("relu", y, &[x], move |dy, gradients| {
        let dx = zip!(
            &dy,
            &y_value,
            |dy, y| if y > 0.0 { dy } else { 0.0 },
            relu_backward_f32 | relu_backward_bf16
        );
        gradients.add(id, dx);
    })
}

/// Returns `factor x`, element by element.
pub fn scale<'t>(x: &Var<'t>, factor: f64) -> Var<'t> {
    let (y, id) = (scaled(x.value(), factor), x.id());
    x.tape().record("scale", y, &[x], move |dy, gradients| {
        gradients.add(id, scaled(&dy, factor));
    })
}

fn scaled(x: &Tensor, factor: f64) -> Tensor {
    map!(x, factor, |x| factor * x, scale_f32 | scale_bf16)
}

/// Returns `x²`, element by element; `dx = 2 x dy`.
pub fn square<'t>(x: &Var<'t>) -> Var<'t> {
    let y = map!(x.value(), |x| x * x, square_f32 | square_bf16);
    let (id, saved) = (x.id(), x.value().clone());
    x.tape().record("square", y, &[x], move |dy, gradients| {
        let dx =
            zip!(&dy, &saved, |dy, x| 2.0 * x * dy, square_backward_f32 | square_backward_bf16);
        gradients.add(id, dx);
    })
}

/// Returns the mean of scalars, for instance of several losses.
///
/// # Panics
/// If `terms` is empty or the shapes differ.
#[track_caller]
pub fn mean_of<'t>(terms: &[Var<'t>]) -> Var<'t> {
    let (first, rest) = terms.split_first().expect("mean_of: no terms");
    for term in rest {
        assert_eq!(term.shape(), first.shape(), "mean_of: terms of different shapes");
    }
    let sum = rest.iter().fold(first.clone(), |sum, term| add(&sum, term));
    scale(&sum, 1.0 / terms.len() as f64)
}

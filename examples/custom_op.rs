//! A custom operation: softplus, `y = log(1 + exp(x))`, `dx = dy / (1 + exp(-x))`.
//!
//! It computes its value and records its backward pass on the tape. `main` checks the gradient on the reference device against
//! finite differences, then benchmarks the operation on the CPU.

use std::sync::Arc;
use std::time::Duration;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::bench::{Bench, Unit, Work};
use selfsup::device::{Device, DeviceKind};
use selfsup::ops::linear;
use selfsup::tape::{Var, evaluate, step};
use selfsup::tensor::{Element, Tensor};

/// Softplus of any shape.
pub fn softplus<'t>(x: &Var<'t>) -> Var<'t> {
    let y = match x.tape().device().kind() {
        DeviceKind::Reference => map(x.value(), x.value(), |x: f64, _| x.exp().ln_1p()),
        _ => map(x.value(), x.value(), |x: f32, _| x.exp().ln_1p()),
    };
    let (id, saved) = (x.id(), x.value().clone());
    x.tape().record("softplus", y, &[x], move |dy, gradients| {
        let dx = match dy.device().kind() {
            DeviceKind::Reference => map(&saved, &dy, |x: f64, dy| dy / (1.0 + (-x).exp())),
            _ => map(&saved, &dy, |x: f32, dy| dy / (1.0 + (-x).exp())),
        };
        gradients.add(id, dx);
    })
}

fn map<T: Element>(a: &Tensor, b: &Tensor, f: impl Fn(T, T) -> T) -> Tensor {
    let mut out = a.empty_like();
    for (out, (a, b)) in out.data_mut::<T>().iter_mut().zip(a.data().iter().zip(b.data())) {
        *out = f(*a, *b);
    }
    out
}

/// Checks the gradient of a small layer, then benchmarks the operation.
pub fn main() {
    let device = Device::reference();
    let mut layout = Layout::new();
    let w = layout.param("w", [1, 3], SlotKind::Matrix, Init::Uniform(1.0));
    let mut arena = Arena::new(&Arc::new(layout), &device, 7);
    let x = Tensor::from_f64(&device, [1, 3], &[0.5, -1.0, 2.0]);
    step(&mut arena, |tape| softplus(&linear(&tape.input(&x), &tape.param(w), None)))
        .expect("the reference device does not fail");
    let gradient = arena.gradient(w).to_f64();
    for (i, gradient) in gradient.iter().enumerate() {
        let mut loss_at = |shift: f64| {
            arena.values_mut().data_mut::<f64>()[i] += shift;
            let loss =
                evaluate(&arena, |tape| softplus(&linear(&tape.input(&x), &tape.param(w), None)));
            arena.values_mut().data_mut::<f64>()[i] -= shift;
            loss.expect("the reference device does not fail").scalar()
        };
        let difference = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
        println!("dw[{i}]: recorded {gradient:.9}, finite difference {difference:.9}");
        assert!((gradient - difference).abs() < 1e-8);
    }
    benchmark().expect("the CPU does not fail");
}

/// Compares its time with the roofline bound, as `selfsup bench` does for the primitives: eight bytes an element, read and written.
fn benchmark() -> selfsup::Result<()> {
    let device = Device::cpu(0)?;
    let x = Tensor::zeros(&device, [1 << 20]);
    let arena = Arena::new(&Arc::new(Layout::new()), &device, 7);
    let mut bench = Bench::new(&device, Duration::from_millis(50))?;
    let timing = bench.measure(|| {
        evaluate(&arena, |tape| softplus(&tape.input(&x))).expect("the CPU does not fail");
    })?;
    let work = Work { operations: 0.0, bytes: 8.0 * x.len() as f64 };
    let share = bench.share(&work, Unit::Vector, timing.hot.median);
    let (us, chip) = (timing.hot.median * 1e6, &bench.chip().name);
    println!(
        "softplus of 2^20: {us:.0} us, {share:.3} of the roofline of {chip}: `map` is a serial loop"
    );
    Ok(())
}

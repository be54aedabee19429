//! The CUDA path: the case table on a GPU against the reference device, and inputs at the edge of what kernels take.

#[path = "cuda/device.rs"]
mod device;
#[path = "cuda/no_gradient.rs"]
mod no_gradient;

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::ops::{self, BatchNorm};
use selfsup::tape;
use selfsup::tensor::Tensor;

use crate::case::{Build, Case, ROUTES, Route};
use crate::cases::{HOST_ONLY, LARGE, case, table};
use crate::compare::{close, report};
use crate::driver::{gpu, open};
use crate::golden::Goldens;

/// The first thing to run on a GPU: where this fails, nothing else means anything.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn conformance_of_the_device() {
    let gpu = gpu(Precision::Bf16);
    let checked = gpu.conformance().unwrap_or_else(|e| {
        panic!("{e}\n{}", open().map(|driver| driver.report()).unwrap_or_default())
    });
    println!("conformance: {checked} of {checked} instructions and primitives on {gpu}");
    assert_eq!(checked, 7);
    assert_eq!(Device::reference().conformance().unwrap(), 0);
}

fn on_gpu() -> impl Iterator<Item = Case> {
    table().into_iter().filter(|case| !HOST_ONLY.contains(&case.primitive()))
}

/// Compares a device with the reference, all routes.
fn agree(
    what: &str,
    gpu: &Device,
    cases: impl Iterator<Item = Case>,
    tolerance: impl Fn(&Case, &str) -> f64,
) {
    let reference = Device::reference();
    let mut results = Vec::new();
    for case in cases {
        let want = case.run(&reference, Route::Param);
        for route in ROUTES {
            let got = case.run(gpu, route);
            for ((part, got), (_, want)) in got.parts(&case).zip(want.parts(&case)) {
                let name = format!("{}|{part}", case.name);
                let tolerance = tolerance(&case, &name);
                results.push(close(&format!("{name} {route:?}"), got, want, tolerance));
            }
        }
        if let Err(e) = gpu.check() {
            let report = open().map(|driver| driver.report()).unwrap_or_default();
            panic!("{case:?}: {e}\n{report}");
        }
    }
    report(what, results);
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_agrees_with_the_f64_reference_in_f32() {
    let goldens = Goldens::open("primitives");
    agree("CUDA f32 against reference", &gpu(Precision::F32), on_gpu(), |case, part| {
        case.loose * goldens.record(part).tolerance(1e-5)
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_agrees_with_the_f64_reference_in_bf16() {
    let cases = on_gpu().map(Case::rounded);
    agree("CUDA bf16 against reference", &gpu(Precision::Bf16), cases, |_, _| 1e-2);
}

/// Sums long enough for split-K, in each of the three GEMMs.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn long_sums_agree_with_the_f64_reference() {
    let cases = || LARGE[3..].iter().map(|line| case(line));
    agree("long sums in f32", &gpu(Precision::F32), cases(), |_, _| 1e-5);
    let rounded = cases().map(Case::rounded);
    agree("long sums in bf16", &gpu(Precision::Bf16), rounded, |_, _| 1e-2);
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_batch_norm_whose_residual_is_its_input_adds_both_gradients() {
    let run = |device: &Device| {
        let case = case("relu n=24 c=13").rounded();
        let build: Build = Box::new(|_, v| {
            let residual = Some(&v[0]);
            ops::batch_norm(&v[0], BatchNorm { residual, relu: true, ..BatchNorm::default() })
        });
        Case { build, ..case }.run(device, Route::Node)
    };
    let want = run(&Device::reference());
    for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)] {
        let got = run(&gpu(precision));
        let dx = close("dx", &got.gradients[0], &want.gradients[0], tolerance);
        report(&format!("x + norm(x) in {precision:?}"), vec![dx]);
    }
}

/// What comes in f32 is rounded to the type that is multiplied, and its gradient comes back in f32.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_linear_layer_takes_f32_where_weights_are_bf16() {
    let case = case("linear n=7 d=13 k=11 bias=1").rounded();
    let mut inputs = case.inputs;
    inputs[0].kind = SlotKind::Bias; // f32 everywhere, though of bf16's numbers
    let case = Case { inputs, ..case };
    let (gpu, reference) = (gpu(Precision::Bf16), Device::reference());
    let (got, want) = (case.run(&gpu, Route::Node), case.run(&reference, Route::Node));
    let results = got.parts(&case).zip(want.parts(&case));
    let results = results.map(|((part, got), (_, want))| close(&part, got, want, 1e-2));
    report("linear of f32", results.collect());
}

/// Losses of a bf16 network get f32 rows, which tensor cores multiply as two bf16 terms each: an error of 2^-17 remains, where a
/// single term would give 2e-3 in the gradient.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn contrastive_losses_of_a_bf16_run_have_nearly_f32_accuracy() {
    let (gpu, reference) = (gpu(Precision::Bf16), Device::reference());
    for line in ["nt_xent rows=130 d=32 t=0.07", "info_nce n=65 m=257 d=17 t=0.07"] {
        let mut case = case(line);
        for input in &mut case.inputs {
            input.kind = SlotKind::Bias; // f32 everywhere
        }
        let (got, want) = (case.run(&gpu, Route::Node), case.run(&reference, Route::Node));
        let parts = got.parts(&case).zip(want.parts(&case));
        report(line, parts.map(|((part, got), (_, want))| close(&part, got, want, 1e-5)).collect());
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_gives_the_same_bits_again() {
    let gpu = gpu(Precision::Bf16);
    for case in on_gpu() {
        assert_eq!(case.run(&gpu, Route::Node), case.run(&gpu, Route::Node), "{case:?}");
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn empty_inputs_work_on_a_gpu() {
    let lines = [
        "conv2d n=0 h=5 w=5 c=3 k=4 r=3 s=3 stride=1 pad=1",
        "linear n=0 d=5 k=3 bias=1",
        "batch_norm rows=0 c=3 groups=1 with=gain+shift+residual+relu",
        "relu n=0 c=3",
        "add n=0 c=3",
        "mul n=0 c=3",
        "scale n=0 c=3 factor=2",
        "square n=0 c=3",
        "sum shape=0x3 axis=1",
        "transpose n=0 d=3",
        "max_pool n=0 h=5 w=5 c=3 size=3 stride=2 pad=1",
        "mean_pool n=0 h=5 w=5 c=3",
        "avg_pool n=0 h=5 w=5 c=3 size=2 stride=2",
        "l2_normalize n=0 d=3 scale=1",
        "stream_mean n=0 h=5 w=5 c=3",
        "stream_select n=0 h=5 w=5 c=3",
        "gather_rows n=0 m=3 d=2",
        "concat_rows a=0 b=0 d=3",
    ];
    let gpu = gpu(Precision::Bf16);
    for line in lines {
        let got = case(line).run(&gpu, Route::Node);
        assert_eq!(got.output, [0.0; 0], "{line}");
        assert!(got.gradients.iter().flatten().all(|dx| *dx == 0.0), "{line}: {:?}", got.gradients);
    }
    gpu.check().unwrap();
}

/// The kernels' integers have 31 bits.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn strides_beyond_the_kernels_integers_give_one_window() {
    for name in ["max_pool n=2 h=5 w=4 c=3 size=2 pad=0", "avg_pool n=2 h=5 w=4 c=3 size=2"] {
        let case = case(&format!("{name} stride={}", 1_u64 << 32));
        let [got, want] = [gpu(Precision::F32), Device::reference()]
            .map(|device| case.run(&device, Route::Node).gradients);
        let close = |(got, want): (&f64, &f64)| (got - want).abs() < 1e-6;
        assert!(got.concat().iter().zip(&want.concat()).all(close), "{got:?}, expected {want:?}");
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_missing_row_gives_nan_on_a_gpu() {
    let gpu = gpu(Precision::F32);
    let mut arena = case("relu n=3 c=2").arena(&gpu).0;
    let x = Tensor::from_f64(&gpu, [2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let index = Tensor::from_slice(&gpu, [3], &[1, 2, -1]);
    let y = tape::forward(&mut arena, |tape| ops::gather_rows(&tape.input(&x), &index));
    let y = y.unwrap().to_f64();
    assert!(y[..2] == [3.0, 4.0] && y[2..].iter().all(|v| v.is_nan()), "{y:?}");
}

/// A loss that stays finite would hide that the queue is spoilt, while every gradient is NaN.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_nan_in_the_queue_reaches_the_loss() {
    const D: usize = 16;
    let gpu = gpu(Precision::F32);
    let loss = |queue: &[f32]| {
        let mut layout = Layout::new();
        let z = layout.param("z", [3, D], SlotKind::Matrix, Init::Uniform(0.25));
        let mut arena = Arena::new(&Arc::new(layout), &gpu, 1);
        let queue = Tensor::from_slice(&gpu, [queue.len() / D, D], queue);
        let negatives = ops::Negatives { queue: &queue, own: None };
        let loss = tape::step(&mut arena, |tape| {
            let z = tape.param(z);
            ops::info_nce(&z, &z, &negatives, 0.2)
        });
        loss.unwrap().scalar()
    };
    // The bad row beside others of its tile, and alone in its own.
    for (rows, bad) in [(300, 7), (257, 256)] {
        let mut queue = vec![0.25; rows * D];
        assert!(loss(&queue).is_finite());
        queue[bad * D..(bad + 1) * D].fill(f32::NAN);
        let loss = loss(&queue);
        assert!(loss.is_nan(), "{loss} with row {bad} of {rows} NaN");
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn without_negatives_a_query_finds_its_key_on_a_gpu() {
    let outcome = case("info_nce n=3 m=0 d=4 t=0.2").run(&gpu(Precision::F32), Route::Node);
    assert!(outcome.loss.abs() < 1e-6, "{}", outcome.loss);
    assert!(outcome.gradients.iter().flatten().all(|v| v.abs() < 1e-6), "{outcome:?}");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
#[should_panic(expected = "max_pool: windows of 17 x 17; a GPU supports at most 16 x 16")]
fn windows_larger_than_a_byte_counts_are_refused() {
    case("max_pool n=1 h=17 w=17 c=1 size=17 stride=1 pad=0")
        .run(&gpu(Precision::F32), Route::Node);
}

/// Without kernels the tests that need them are ignored. `scripts/test` sets the variable: CI fails then.
#[test]
fn kernels_are_built_wherever_they_are_required() {
    let required = std::env::var_os("SELFSUP_REQUIRE_KERNELS").is_some();
    assert!(
        !(required && cfg!(no_kernels)),
        "this build has no CUDA kernels, so the tests that need them were ignored; run scripts/fetch-nvcc"
    );
}

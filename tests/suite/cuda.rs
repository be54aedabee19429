//! The CUDA path: the case table on a GPU against the reference device, and the behaviour of the device after failures.

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::device::{Device, Group, Precision};
use selfsup::ops::{self, BatchNorm, Running};
use selfsup::tape;
use selfsup::tensor::{DType, Tensor};

use crate::case::{Build, Case, ROUTES, Route};
use crate::cases::{HOST_ONLY, LARGE, case, table};
use crate::compare::{close, report};
use crate::driver::{alone, gpu, open};
use crate::golden::Goldens;
use crate::seeded;

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

/// Two steps that move running statistics, then an evaluation by them; the residual is the input itself.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn running_statistics_agree_with_the_f64_reference() {
    let run = |device: &Device| {
        let mut layout = Layout::new();
        let gain = layout.param("gain", [13], SlotKind::Gain, Init::Uniform(1.0));
        let running = Running {
            mean: layout.stat("mean", 13, SlotKind::RunningMean, 0.0),
            variance: layout.stat("variance", 13, SlotKind::RunningVariance, 1.0),
        };
        let mut arena = Arena::new(&Arc::new(layout), device, 5);
        let input = |name: &str| {
            let mut values = seeded::around(seeded::seed(name), 24 * 13, 0.5, 2.0);
            values.iter_mut().for_each(|v| *v = half::bf16::from_f64(*v).to_f64());
            let x = Tensor::from_f64(device, [24, 13], &values);
            x.cast(DType::of_activations(device))
        };
        let norm = |tape: &tape::Tape<'_>, x: &Tensor| {
            let (x, gain) = (ops::scale(&tape.input(x), 1.0), tape.param(gain));
            let with = BatchNorm {
                gain: Some(&gain),
                residual: Some(&x),
                relu: true,
                groups: 2,
                running: Some(running),
                ..BatchNorm::default()
            };
            ops::batch_norm(&x, with).value().clone()
        };
        for name in ["first", "second"] {
            let x = input(name);
            let y = tape::forward(&mut arena, |tape| tape.input(&norm(tape, &x)));
            drop(y.unwrap());
        }
        let x = input("third");
        let y = tape::evaluate(&arena, |tape| tape.input(&norm(tape, &x))).unwrap();
        let statistics = arena.statistics().to_f64();
        (y.to_f64(), statistics)
    };
    let want = run(&Device::reference());
    // A tenth of what a wrong eps would do.
    for (precision, tolerance) in [(Precision::F32, 5e-7), (Precision::Bf16, 1e-2)] {
        let got = run(&gpu(precision));
        let statistics = close("running statistics", &got.1, &want.1, 5e-7);
        let y = close("evaluation", &got.0, &want.0, tolerance);
        report(&format!("batch norm in {precision:?}"), vec![y, statistics]);
    }
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

/// Of a whole arena only sums of parts come to the host.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn squares_are_summed_on_a_gpu() {
    alone("cuda::squares_are_summed_on_a_gpu", |driver| {
        let (gpu, cpu, reference) =
            (gpu(Precision::Bf16), Device::cpu(2).unwrap(), Device::reference());
        for n in [1, 7, 2048, 100_003, 3_000_000] {
            // Of two sizes, so that a sum in f32 would lose digits.
            let values = |factor: f64| -> Vec<f64> {
                let value = |i: usize| f64::from((i as f64 * factor).sin() as f32);
                (0..n).map(|i| value(i) * if i % 97 == 0 { 64.0 } else { 1.0 }).collect()
            };
            let both = |device: &Device| {
                [0.37, 0.73].map(|factor| Tensor::from_f64(device, [n], &values(factor)))
            };
            let [x, y] = both(&reference);
            let want = [x.squared_norm(), x.squared_distance(&y)];
            let naive: f64 = values(0.37).iter().map(|v| v * v).sum();
            assert!((want[0] - naive).abs() <= 1e-12 * naive);
            for device in [&gpu, &cpu] {
                let [x, y] = both(device);
                let before = driver.count("downloaded");
                let got = [x.squared_norm(), x.squared_distance(&y), x.squared_norm()];
                let downloaded = driver.count("downloaded") - before;
                assert!(downloaded <= 3 * 8 * 1024, "{n}: {downloaded} bytes");
                assert_eq!(got[0], got[2], "the same bits again");
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() <= 1e-12 * want, "{device}, {n}: {got}, not {want}");
                }
            }
        }
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn tensors_travel_to_a_gpu_and_back() {
    let gpu = gpu(Precision::Bf16);
    // More than a piece of pinned memory, and no multiple of one.
    let values: Vec<f32> = (0..3_000_001).map(|i| i as f32 * 0.5).collect();
    let x = Tensor::from_slice(&gpu, [values.len()], &values);
    assert_eq!(x.to_vec::<f32>(), values);
    assert_eq!(x.copy().slice(7, [3]).to_f64(), [3.5, 4.0, 4.5]);
    let back = x.to_device(&Device::cpu(1).unwrap());
    assert_eq!(back.data::<f32>(), values);
    let labels = Tensor::from_slice(&gpu, [3], &[1, -2, 3]);
    assert_eq!(labels.to_device(&Device::reference()).data::<i32>(), [1, -2, 3]);
    let small = Tensor::from_f64(&gpu, [3], &[1.0, 1.00390625, -2.0]).cast(DType::Bf16);
    assert_eq!(small.to_f64(), [1.0, 1.0, -2.0]); // halfway, to even
    assert_eq!(small.cast(DType::F32).to_f64(), [1.0, 1.0, -2.0]);
    assert_eq!(Tensor::from_slice(&gpu, [3], &[1.0_f32, -2.0, 2.0]).squared_norm(), 9.0);
    let mut filled = Tensor::empty(&gpu, DType::Bf16, [5]);
    filled.view_mut().slice(1, [3].into()).fill(2.5);
    assert_eq!(filled.to_f64()[1..4], [2.5; 3]);
    assert!(filled.to_f64()[0].is_nan(), "poison");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
#[should_panic(expected = "the host cannot read a tensor on a GPU")]
fn the_host_cannot_look_into_a_gpu() {
    let _ = Tensor::zeros(&gpu(Precision::F32), [2]).data::<f32>();
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn rows_come_to_unit_length_in_place_and_in_the_working_copy() {
    let run = |device: &Device| {
        let case = case("linear n=7 d=13 k=11 bias=0").rounded();
        let (mut arena, params) = case.arena(device);
        ops::normalize_rows(&mut arena, params[1]);
        let values = arena.value(params[1]).to_f64();
        let copy = tape::forward(&mut arena, |tape| tape.param(params[1])).unwrap();
        (values, copy.to_f64())
    };
    let want = run(&Device::reference());
    for (precision, tolerance) in [(Precision::F32, 1e-6), (Precision::Bf16, 1e-2)] {
        let got = run(&gpu(precision));
        close("unit rows", &got.0, &want.0, 1e-6).unwrap();
        close("their copy", &got.1, &want.1, tolerance).unwrap();
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn assignments_on_a_gpu_agree_with_the_f64_reference() {
    let (gpu, reference, alone) = (gpu(Precision::Bf16), Device::reference(), Group::alone());
    let mut results = Vec::new();
    for (b, k, epsilon, iterations) in
        [(1, 1, 0.05, 3), (7, 13, 0.05, 3), (130, 67, 0.03, 1), (70, 5, 1.0, 4)]
    {
        let mut scores = seeded::unit(seeded::seed("scores"), b * k);
        scores.iter_mut().for_each(|v| *v = half::bf16::from_f64(*v).to_f64());
        let want = Tensor::from_f64(&reference, [b, k], &scores);
        let want = ops::sinkhorn(&want, epsilon, iterations, &alone).to_f64();
        for dtype in [DType::F32, DType::Bf16] {
            let got = Tensor::from_f64(&gpu, [b, k], &scores).cast(dtype);
            let got = ops::sinkhorn(&got, epsilon, iterations, &alone);
            assert_eq!(got.dtype(), DType::F32);
            let what = format!("sinkhorn of [{b}, {k}] in {dtype:?}");
            results.push(close(&what, &got.to_f64(), &want, 1e-5));
        }
    }
    gpu.check().unwrap();
    report("assignments", results);
}

/// A teacher's logits are bf16, its targets f32.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn targets_of_a_teacher_agree_with_the_f64_reference() {
    let (gpu, reference) = (gpu(Precision::Bf16), Device::reference());
    let mut results = Vec::new();
    for [n, k] in [[1, 1], [7, 13], [9, 300]] {
        let mut logits = seeded::unit(seeded::seed("logits"), n * k);
        logits.iter_mut().for_each(|v| *v = half::bf16::from_f64(*v).to_f64());
        let want = ops::softmax(&Tensor::from_f64(&reference, [n, k], &logits), 0.5).to_f64();
        for dtype in [DType::F32, DType::Bf16] {
            let got = ops::softmax(&Tensor::from_f64(&gpu, [n, k], &logits).cast(dtype), 0.5);
            assert_eq!(got.dtype(), DType::F32);
            let what = format!("softmax of [{n}, {k}] in {dtype:?}");
            results.push(close(&what, &got.to_f64(), &want, 1e-5));
        }
    }
    gpu.check().unwrap();
    report("targets", results);
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn queues_on_a_gpu_take_rows_where_they_belong() {
    let gpu = gpu(Precision::Bf16);
    for (length, dtype) in [(3, DType::F32), (8, DType::Bf16), (300, DType::F32), (5, DType::Bf16)]
    {
        let tensor = |rows: usize, from: usize| {
            let numbers = (0..rows * length).map(|i| (from + i / length) as f64);
            Tensor::from_f64(&gpu, [rows, length], &numbers.collect::<Vec<_>>()).cast(dtype)
        };
        let firsts = |queue: &Tensor| -> Vec<f64> {
            let rows = queue.to_f64();
            assert!(rows.chunks(length).all(|row| row.iter().all(|v| *v == row[0])), "{rows:?}");
            rows.chunks(length).map(|row| row[0]).collect()
        };
        let mut queue = tensor(7, 10);
        ops::push_rows(&mut queue, &tensor(3, 20));
        assert_eq!(firsts(&queue), [20.0, 21.0, 22.0, 10.0, 11.0, 12.0, 13.0]);
        let at = Tensor::from_slice(&gpu, [2], &[1, 5]);
        ops::write_rows(&mut queue, &at.slice(1, [1]), &tensor(2, 30));
        assert_eq!(firsts(&queue), [20.0, 21.0, 22.0, 10.0, 11.0, 30.0, 31.0]);
        // Positions that no host code checks stay inside the queue: -2 is row 5, 2^31 - 1 is row 1.
        for (position, rows, expected) in [
            (-2, 40.0, [42.0, 21.0, 22.0, 10.0, 11.0, 40.0, 41.0]),
            (i32::MAX, 50.0, [42.0, 50.0, 51.0, 52.0, 11.0, 40.0, 41.0]),
        ] {
            let at = Tensor::from_slice(&gpu, [1], &[position]);
            ops::write_rows(&mut queue, &at, &tensor(3, rows as usize));
            assert_eq!(firsts(&queue), expected, "from {position} on");
        }
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

#[test]
fn a_missing_gpu_is_named() {
    open();
    let error = Device::cuda(77, Precision::F32).unwrap_err().to_string();
    assert!(error.contains("there is no GPU 77"), "{error}");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn the_second_run_allocates_nothing_and_never_waits() {
    alone("cuda::the_second_run_allocates_nothing_and_never_waits", |driver| {
        let gpu = gpu(Precision::Bf16);
        let run = || {
            let case = case("linear n=9 d=16 k=8 bias=1");
            let (mut arena, params) = case.arena(&gpu);
            let counts = |_| (driver.count("allocations"), driver.count("waits"));
            let mut before = (0, 0);
            for step in 0..4 {
                if step == 2 {
                    before = counts(step);
                }
                selfsup::tape::step(&mut arena, |tape| {
                    let [x, w, b] = [0, 1, 2].map(|i| tape.param(params[i]));
                    let y = ops::linear(&x, &w, Some(&b));
                    let y = ops::relu(&ops::add(&y, &ops::batch_norm(&y, BatchNorm::default())));
                    // Any scalar.
                    let y = ops::linear(&y, &tape.input(&ones(&gpu)), None);
                    ops::mean_of(&(0..9).map(|i| pick(&y, i)).collect::<Vec<_>>())
                })
                .unwrap();
            }
            assert!(before.0 > 10, "the driver counts allocations: {before:?}");
            assert_eq!(counts(4), before, "allocations and waits");
            let _ = arena.gradient(params[0]).to_f64();
            assert!(counts(4).1 > before.1, "the driver counts waits");
        };
        run();
    });
}

fn ones(gpu: &Device) -> Tensor {
    let mut ones = Tensor::empty(gpu, DType::Bf16, [1, 8]);
    ones.view_mut().fill(1.0);
    ones
}

/// Element `i` of `y`, as an operation made outside the crate.
fn pick<'t>(y: &selfsup::tape::Var<'t>, i: usize) -> selfsup::tape::Var<'t> {
    let (id, shape) = (y.id(), *y.shape());
    let value = y.value().slice(i, []).copy();
    y.tape().record("pick", value, &[y], move |dy, gradients| {
        let mut dx = Tensor::empty(dy.device(), dy.dtype(), shape);
        dx.view_mut().fill(0.25);
        gradients.add(id, dx);
    })
}

const OUT_OF_MEMORY: u32 = 2;
const LAUNCH_FAILED: u32 = 719;

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn out_of_memory_names_the_request_and_the_largest_holders() {
    alone("cuda::out_of_memory_names_the_request_and_the_largest_holders", |driver| {
        let gpu = gpu(Precision::F32);
        let held = Tensor::zeros(&gpu, [300, 1024]);
        // What is kept for reuse is given up first: one refusal is not the end.
        drop(Tensor::zeros(&gpu, [77]));
        driver.fail("cuMemAlloc", 1, OUT_OF_MEMORY);
        let _fits = Tensor::zeros(&gpu, [999]);
        gpu.check().unwrap();
        driver.fail("cuMemAlloc", 1, OUT_OF_MEMORY);
        driver.fail("cuMemAlloc", 2, OUT_OF_MEMORY);
        let wanted = Tensor::zeros(&gpu, [1 << 20]);
        let error = gpu.check().unwrap_err().to_string();
        println!("{error}");
        for part in ["out of memory: wanted 4.0 MiB, free ", "1.2 MiB in 1 from ", "cuda.rs"] {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
        // Data read after the failure are NaN.
        assert!(wanted.rows(0, 3).to_f64().iter().all(|v| v.is_nan()));
        assert!(held.rows(0, 1).to_f64().iter().all(|v| v.is_nan()));
        assert_eq!(gpu.check().unwrap_err().to_string(), error);
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_failed_kernel_is_an_error_of_the_step() {
    alone("cuda::a_failed_kernel_is_an_error_of_the_step", |driver| {
        let gpu = gpu(Precision::F32);
        let case = case("relu n=7 c=13");
        let (mut arena, params) = case.arena(&gpu);
        let mut step = || {
            let loss = selfsup::tape::step(&mut arena, |tape| {
                let y = selfsup::ops::relu(&tape.param(params[0]));
                pick(&y, 3)
            });
            loss.map(|loss| loss.scalar())
        };
        assert!(step().unwrap().is_finite());
        driver.fail("cuLaunchKernel", 1, LAUNCH_FAILED);
        let error = step().unwrap_err().to_string();
        assert!(
            error.contains("launch of ") && error.contains("CUDA_ERROR_LAUNCH_FAILED"),
            "{error}"
        );
        assert_eq!(step().unwrap_err().to_string(), error);
    });
}

//! Operations without a gradient, of which the case table has no rows: running statistics, rows of unit length, assignments, targets
//! and queues.

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::device::{Device, Group, Precision};
use selfsup::ops::{self, BatchNorm, Running};
use selfsup::tape;
use selfsup::tensor::{DType, Tensor};

use crate::cases::case;
use crate::compare::{close, report};
use crate::driver::gpu;
use crate::seeded;

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

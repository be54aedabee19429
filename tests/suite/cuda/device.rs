//! A GPU as a device: tensors travel to it and back, memory is used again, and failures are errors that say what failed.

use selfsup::device::{Device, Precision};
use selfsup::ops::{self, BatchNorm};
use selfsup::tensor::{DType, Tensor};

use crate::cases::case;
use crate::driver::{alone, gpu, open};

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

/// Of a whole arena only sums of parts come to the host.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn squares_are_summed_on_a_gpu() {
    alone("cuda::device::squares_are_summed_on_a_gpu", |driver| {
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
fn the_second_run_allocates_nothing_and_never_waits() {
    alone("cuda::device::the_second_run_allocates_nothing_and_never_waits", |driver| {
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

#[test]
fn a_missing_gpu_is_named() {
    open();
    let error = Device::cuda(77, Precision::F32).unwrap_err().to_string();
    assert!(error.contains("there is no GPU 77"), "{error}");
}

const OUT_OF_MEMORY: u32 = 2;
const LAUNCH_FAILED: u32 = 719;

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn out_of_memory_names_the_request_and_the_largest_holders() {
    alone("cuda::device::out_of_memory_names_the_request_and_the_largest_holders", |driver| {
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
        for part in ["out of memory: wanted 4.0 MiB, free ", "1.2 MiB in 1 from ", "cuda/device.rs"]
        {
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
    alone("cuda::device::a_failed_kernel_is_an_error_of_the_step", |driver| {
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

//! Several GPUs in one process, several threads on one GPU, and GPUs that are opened again: handles, memory and the current context
//! are those of the right one.

use selfsup::device::{Device, Precision};
use selfsup::tensor::Tensor;

use crate::driver::{alone, gpu};
use crate::graph_replay::ManualRun;

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn two_gpus_of_a_process_train_in_turns_like_one() {
    alone("contexts::two_gpus_of_a_process_train_in_turns_like_one", |driver| {
        driver.check(false);
        driver.devices(2);
        let train = |device: &Device, others: &mut dyn FnMut(u64)| {
            let mut manual = ManualRun::new(device, 2, true);
            for iteration in 0..6 {
                manual.step(iteration).unwrap();
                others(iteration);
            }
            manual.left(Vec::new())
        };
        let first = gpu(Precision::F32);
        let want = train(&first, &mut |_| {});
        let second = Device::cuda(1, Precision::F32).unwrap();
        let mut manual = ManualRun::new(&second, 2, true);
        let got = train(&first, &mut |iteration| manual.step(iteration).unwrap());
        assert_eq!(got, want);
        assert_eq!(manual.left(Vec::new()), want);
        // What one computed travels to the other.
        let x = Tensor::from_slice(&first, [3], &[1.0_f32, -2.0, 3.0]);
        assert_eq!(x.to_device(&second).to_f64(), [1.0, -2.0, 3.0]);
    });
}

/// With everything of a GPU its context goes, and nothing of it is used afterwards.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_that_is_opened_again_starts_anew() {
    alone("contexts::a_gpu_that_is_opened_again_starts_anew", |driver| {
        driver.check(false);
        let train = || {
            let device = gpu(Precision::Bf16);
            let mut manual = ManualRun::new(&device, 2, true);
            (0..4).for_each(|iteration| manual.step(iteration).unwrap());
            drop(device);
            manual.left(Vec::new())
        };
        let want = train();
        assert_eq!(driver.live_allocations(), 0);
        let released = driver.count("cuDevicePrimaryCtxRelease");
        assert!(released > 0 && released == driver.count("cuDevicePrimaryCtxRetain"), "{released}");
        assert_eq!(train(), want);
        // Two users of one GPU: the context stays until both are gone.
        let (one, other) = (gpu(Precision::F32), gpu(Precision::F32));
        let x = Tensor::from_slice(&other, [2], &[1.0_f32, 2.0]);
        drop(one);
        assert_eq!(x.copy().to_f64(), [1.0, 2.0]);
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn threads_of_one_gpu_do_not_mix_up_their_copies() {
    alone("contexts::threads_of_one_gpu_do_not_mix_up_their_copies", |driver| {
        driver.check(false);
        let device = gpu(Precision::F32);
        for seed in 1..=3 {
            driver.interleave(seed);
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let device = &device;
                    scope.spawn(move || {
                        for round in 0..8 {
                            let value = |i: usize| (1000 * thread + 10 * round + i) as f32;
                            let values: Vec<f32> = (0..5).map(value).collect();
                            let x = Tensor::from_slice(device, [5], &values);
                            let twice = x.copy();
                            assert_eq!(twice.to_vec::<f32>(), values, "thread {thread}, {round}");
                        }
                    });
                }
            });
            driver.interleave(0);
        }
        device.check().unwrap();
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_launch_with_too_many_registers_is_an_error_that_names_the_kernel() {
    alone(
        "contexts::a_launch_with_too_many_registers_is_an_error_that_names_the_kernel",
        |driver| {
            let known = selfsup::device::resources();
            assert!(known.iter().any(|of| of.kernel == "sum_squares" && of.registers > 8));
            let device = gpu(Precision::F32);
            let x = Tensor::from_slice(&device, [2], &[1.0_f32, 2.0]);
            assert_eq!(x.squared_norm(), 5.0);
            driver.registers("sum_squares", 255 + 8);
            assert!(x.squared_norm().is_nan());
            let said = device.check().unwrap_err().to_string();
            assert!(said.contains("launch of sum_squares"), "{said}");
            assert!(said.contains("LAUNCH_OUT_OF_RESOURCES"), "{said}");
        },
    );
}

//! Tiles that need problems of their own, on a GPU against the reference device: launch lines choose them by size.

use std::panic::{AssertUnwindSafe, catch_unwind};

use selfsup::device::{Device, Precision};

use crate::case::Route;
use crate::cases::{LARGE, case};
use crate::compare::{close, report};
use crate::driver::{alone, gpu, open, unchecked};

/// Small problems for which the launch lines choose a large tile: their GEMMs have many rows and a short sum, or one row of tiles.
const TILED: [(&str, &[&str]); 15] = [
    (LARGE[0], &["matmul_nt_bf16_128x128", "matmul_nn_bf16_128x64"]),
    (LARGE[1], &["conv2d_data_gradient_bf16_128x128"]),
    (LARGE[2], &["conv2d_bf16_stem"]),
    ("linear n=16896 d=8 k=8 bias=1", &["matmul_nt_bf16_128x64", "matmul_nn_bf16_128x64"]),
    ("linear n=1100 d=8 k=1024 bias=0", &["matmul_nt_bf16_128x128"]),
    ("linear n=1100 d=1024 k=8 bias=0", &["matmul_nn_bf16_128x128"]),
    ("linear n=8 d=768 k=768 bias=0", &["matmul_tn_bf16_64x128"]),
    ("linear n=8 d=512 k=2176 bias=0", &["matmul_tn_bf16_128x128"]),
    (
        "conv2d n=16 h=33 w=34 c=8 k=32 r=3 s=3 stride=1 pad=1",
        &["conv2d_bf16_256x64", "conv2d_data_gradient_bf16_256x64"],
    ),
    ("conv2d n=8 h=33 w=34 c=8 k=8 r=3 s=3 stride=1 pad=1", &["conv2d_bf16_128x64"]),
    ("conv2d n=16 h=16 w=17 c=8 k=256 r=3 s=3 stride=1 pad=1", &["conv2d_bf16_128x128"]),
    ("conv2d n=8 h=32 w=33 c=8 k=32 r=3 s=3 stride=2 pad=1", &["conv2d_data_gradient_bf16_128x64"]),
    (
        "conv2d n=1 h=2 w=2 c=1024 k=32 r=3 s=3 stride=2 pad=1",
        &["conv2d_weight_gradient_bf16_64x128"],
    ),
    (
        "conv2d n=1 h=2 w=2 c=64 k=2048 r=3 s=3 stride=2 pad=1",
        &["conv2d_weight_gradient_bf16_128x128"],
    ),
    ("conv2d n=4 h=80 w=80 c=4 k=8 r=7 s=7 stride=1 pad=3", &["conv2d_weight_gradient_bf16_stem"]),
];

/// Every large tile that a launch line can choose, chosen by one. They run on all blocks, without access checks for speed.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn large_tiles_agree_with_the_f64_reference() {
    unchecked("tiles::large_tiles_agree_with_the_f64_reference", || {
        let (gpu, reference) = (gpu(Precision::Bf16), Device::reference());
        for (line, kernels) in TILED {
            let launches = |kernel: &&str| -> u64 {
                open().map_or(0, |driver| driver.count(&format!("kernel:{kernel}")))
            };
            let before: Vec<u64> = kernels.iter().map(launches).collect();
            let case = case(line).rounded();
            let (got, want) = (case.run(&gpu, Route::Node), case.run(&reference, Route::Node));
            let parts = got.parts(&case).zip(want.parts(&case));
            let results = parts.map(|((part, got), (_, want))| close(&part, got, want, 1e-2));
            report(line, results.collect());
            gpu.check().unwrap();
            // A real driver has no counters.
            for (kernel, before) in kernels.iter().zip(before).filter(|_| open().is_some()) {
                assert!(launches(kernel) > before, "{line}: {kernel} was not chosen");
            }
        }
    });
}

/// More rows than there are groups of tiles: blocks with several tiles each way.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn groups_of_similarity_tiles_agree_with_the_f64_reference() {
    unchecked("tiles::groups_of_similarity_tiles_agree_with_the_f64_reference", || {
        let case = case("nt_xent rows=4226 d=8 t=0.2");
        let loss = |device: &Device| {
            let (mut arena, params) = case.arena(device);
            case.loss(&mut arena, &params)
        };
        let (got, want) = (loss(&gpu(Precision::F32)), loss(&Device::reference()));
        report("34 tiles in 17 groups", vec![close("loss", &[got], &[want], 1e-6)]);
        if let Some(driver) = open() {
            assert!(driver.count("kernel:nt_xent_sums") > 0);
        }
    });
}

/// A kernel with more shared memory than 48 KB has to ask for it, once, and a refusal is an error that says how much it was.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn dynamic_shared_memory_is_asked_for_once_for_each_kernel() {
    alone("tiles::dynamic_shared_memory_is_asked_for_once_for_each_kernel", |driver| {
        driver.check(false);
        let case = case("conv2d n=16 h=33 w=34 c=8 k=32 r=3 s=3 stride=1 pad=1").rounded();
        let device = gpu(Precision::Bf16);
        let run = || {
            let before = driver.count("cuFuncSetAttribute");
            let outcome = case.run(&device, Route::Node);
            (outcome, driver.count("cuFuncSetAttribute") - before)
        };
        // Its limit and its carve-out, of the forward pass and of the data gradient.
        let (first, asked) = run();
        assert_eq!(asked, 4);
        assert_eq!(run(), (first, 0));
        device.check().unwrap();

        let device = gpu(Precision::Bf16);
        driver.fail("cuFuncSetAttribute", 1, 1);
        let failed = catch_unwind(AssertUnwindSafe(|| case.run(&device, Route::Node)));
        assert!(failed.is_err(), "a case panics with the device's error");
        let error = device.check().unwrap_err().to_string();
        for part in ["launch of conv2d_bf16_256x64", "with 61440 bytes of dynamic shared memory"] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    });
}

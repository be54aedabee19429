//! `nn::ConvBn` compared with convolution followed by batch norm, and the memory that a ResNet-50 saves for backward on a GPU.

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::nn::{ConvBn, Norm, ResNet, ResNetConfig};
use selfsup::ops;
use selfsup::tape;
use selfsup::tensor::{DType, Tensor};

use crate::compare::{close, report};
use crate::driver::{alone, gpu, open, unchecked};
use crate::network::images;
use crate::seeded;

/// Output and running statistics of `conv`, batch norm and ReLU on images `[n, size, size, 8]`.
fn unit(
    gpu: &Device,
    [n, size, filter, stride, groups]: [usize; 5],
    fused: bool,
) -> (Vec<f64>, Vec<f64>) {
    const K: usize = 24;
    let mut layout = Layout::new();
    let forward: Box<dyn for<'t> Fn(&tape::Var<'t>) -> tape::Var<'t>> = if fused {
        let unit = ConvBn::new(&mut layout, ("conv", "bn"), 8, K, filter, stride, 1.0, groups);
        Box::new(move |x| unit.forward(x, None, true))
    } else {
        let init = Init::Normal((2.0 / (K * filter * filter) as f64).sqrt());
        let shape = [K, filter, filter, 8];
        let filters = layout.param("conv.weight", shape, SlotKind::Filter, init);
        let norm = Norm::new(&mut layout, "bn", K, Some(1.0), true, groups);
        Box::new(move |x| {
            let y = ops::conv2d(x, &x.tape().param(filters), stride, filter / 2);
            norm.forward(&y, None, true)
        })
    };
    let mut arena = Arena::new(&Arc::new(layout), gpu, 3);
    let values = seeded::around(seeded::seed("fused"), n * size * size * 8, 0.5, 2.0);
    let x = Tensor::from_f64(gpu, [n, size, size, 8], &values).cast(DType::Bf16);
    let y = tape::forward(&mut arena, |tape| forward(&tape.input(&x))).unwrap();
    (y.to_f64(), arena.statistics().to_f64())
}

/// Groups that consist of complete tiles, even if they start inside an image, use the statistics of the convolution's epilogue; other
/// groups make an extra pass over its output.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn fused_batch_norm_equals_convolution_then_batch_norm() {
    alone("conv_batch_norm::fused_batch_norm_equals_convolution_then_batch_norm", |driver| {
        let gpu = gpu(Precision::Bf16);
        let passes = || driver.count("kernel:batch_norm_moments_bf16");
        let mut results = Vec::new();
        for (sizes, saves) in [
            ([2, 8, 3, 1, 1], true),
            ([2, 8, 3, 1, 2], true),
            ([1, 16, 1, 1, 4], true),
            ([3, 5, 1, 1, 1], true),
            ([3, 5, 3, 2, 1], true),
            ([2, 5, 3, 1, 2], false),
            ([2, 5, 1, 1, 2], false),
        ] {
            let before = passes();
            let got = unit(&gpu, sizes, true);
            assert_eq!(passes() - before, u64::from(!saves), "{sizes:?}");
            let want = unit(&gpu, sizes, false);
            assert_eq!(passes() - before, 1 + u64::from(!saves), "{sizes:?}");
            // Values near a rounding boundary of bf16 may round either way.
            results.push(close(&format!("{sizes:?}: y"), &got.0, &want.0, 1e-3));
            results.push(close(&format!("{sizes:?}: statistics"), &got.1, &want.1, 1e-6));
        }
        report("fused batch norm", results);
    });
}

/// So many tiles that a launch of its own merges runs of their moments; the pass over the output has fewer chunks.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn moments_of_many_tiles_are_merged_first() {
    unchecked("conv_batch_norm::moments_of_many_tiles_are_merged_first", || {
        let gpu = gpu(Precision::Bf16);
        // A real driver has no counters.
        let merges = || open().map(|driver| driver.count("kernel:batch_norm_merge"));
        let (sizes, none) = ([2, 512, 1, 1, 1], merges());
        let got = unit(&gpu, sizes, true);
        let one = none.map(|none| none + 1);
        assert_eq!(merges(), one);
        let want = unit(&gpu, sizes, false);
        assert_eq!(merges(), one);
        let y = close("y", &got.0, &want.0, 1e-3);
        report("merged moments", vec![y, close("statistics", &got.1, &want.1, 1e-6)]);
    });
}

/// Measured at a quarter of 256 pixels and an eighth of the channels, to which all saved memory is proportional except the images.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_view_of_resnet_50_keeps_at_most_42_mb_on_a_gpu() {
    alone("conv_batch_norm::a_view_of_resnet_50_keeps_at_most_42_mb_on_a_gpu", |driver| {
        driver.check(false);
        let gpu = gpu(Precision::Bf16);
        let config = ResNetConfig { width: 8, ..ResNetConfig::named("resnet50").unwrap() };
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "", &config);
        let mut arena = Arena::new(&Arc::new(layout), &gpu, 1);
        let mut kept = |n: usize| {
            let x = images(&gpu, "kept", [n, 64, 64]).cast(DType::Bf16);
            let (before, mut after) = (gpu.memory_use().live, 0);
            tape::step(&mut arena, |tape| {
                let y = backbone.forward(&tape.input(&x));
                after = gpu.memory_use().live;
                ops::nt_xent(&y, 0.5)
            })
            .unwrap();
            after - before
        };
        let _ = kept(4); // one-time allocations
        let a_view = (kept(8) - kept(4)) / 4;
        let megabytes =
            (a_view as f64 * 8.0 * (224.0_f64 / 64.0).powi(2) + 224.0 * 224.0 * 8.0) / 1e6;
        println!("ResNet-50 at 224 pixels in bf16 keeps {megabytes:.1} MB a view");
        assert!((35.0..=42.0).contains(&megabytes), "{megabytes} MB");
    });
}

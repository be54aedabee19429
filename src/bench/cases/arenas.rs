//! Optimisers and the momentum encoder over all of ResNet-50's weights at once, and the augmentation of a batch.

use std::sync::Arc;

use crate::arena::{Arena, Layout};
use crate::bench::case::{Case, Extent, Launched, Run};
use crate::bench::{Unit, Work};
use crate::data::augment::{GpuAugmenter, Params, Scratch, View};
use crate::data::{Image, Policy};
use crate::device::cuda::Table;
use crate::device::{Device, DeviceKind, Philox, Purpose};
use crate::nn::{ResNet, ResNetConfig, Stem};
use crate::optim::{Adam, Exclude, Lars, Optimizer, Rule, Sgd, ema};
use crate::tensor::{DType, Numbers, Tensor};

pub(super) fn cases(extent: &Extent, dtype: DType) -> Vec<Case> {
    let width = if extent.tiny { 2 } else { 64 };
    let weights = layout(width).weights() as f64;
    // The bf16 copy of the weights is written, too.
    let copy = if dtype == DType::Bf16 { 2.0 } else { 0.0 };
    vec![
        arena("sgd", weights, &[("sgd_step", 20.0 + copy)], 20.0 + copy, move |device| {
            let rule = Sgd {
                momentum: 0.9,
                nesterov: false,
                weight_decay: 1e-4,
                exclude: Exclude::Nothing,
            };
            optimiser(device, width, Rule::Sgd(rule))
        }),
        // The norms come first: weights and gradients are read twice.
        arena(
            "lars",
            weights,
            &[("lars_norms", 8.0), ("lars_step", 20.0 + copy)],
            20.0 + copy,
            move |device| optimiser(device, width, Rule::Lars(Lars::simclr(0.9, 1e-6))),
        ),
        arena("adam", weights, &[("adam_step", 28.0 + copy)], 28.0 + copy, move |device| {
            optimiser(device, width, Rule::Adam(Adam::new(1e-6)))
        }),
        arena("ema", weights, &[("ema", 12.0 + copy)], 12.0 + copy, move |device| {
            let online = Arena::new(&Arc::new(layout(width)), device, 1);
            let mut target = online.twin();
            let momentum = Numbers::new(device, &[0.99]);
            Box::new(move || ema(&mut target, &online, &momentum))
        }),
        augmentation(if extent.tiny { 2 } else { extent.views.min(64) }, dtype),
    ]
}

fn layout(width: usize) -> Layout {
    let mut layout = Layout::new();
    let config = ResNetConfig {
        depth: 50,
        width,
        stem: Stem::Image,
        zero_init_residual: false,
        norm_groups: 1,
        sk_ratio: 0.0,
        bottleneck: 1,
        project: false,
        same_pool: false,
        channels: 3,
    };
    ResNet::new(&mut layout, "backbone.", &config);
    layout
}

fn arena(
    name: &str,
    weights: f64,
    kernels: &[(&str, f64)],
    least: f64,
    prepare: impl Fn(&Device) -> Run + 'static,
) -> Case {
    let over =
        |&(kernel, bytes): &(&str, f64)| Launched::over(kernel, bytes * weights, 6.0 * weights);
    Case {
        name: format!("{name} ResNet-50 {:.1}M weights", weights / 1e6),
        count: 0,
        work: Work { operations: 6.0 * weights, bytes: least * weights },
        unit: Unit::Vector,
        launched: kernels.iter().map(over).collect(),
        problem: None,
        prepare: Box::new(prepare),
    }
}

fn optimiser(device: &Device, width: usize, rule: Rule) -> Run {
    let mut arena = Arena::new(&Arc::new(layout(width)), device, 1);
    let mut optimizer = Optimizer::new(rule, &arena);
    optimizer.set_rate(1e-3); // a number from the host, which a graph cannot set
    Box::new(move || optimizer.update(&mut arena))
}

/// SimCLR's views of 224 pixels from photos of 500 x 375. The parameters are drawn beforehand: pixels in, views out.
fn augmentation(n: usize, dtype: DType) -> Case {
    const SIZE: usize = 224;
    let policy = || {
        let recipe = crate::recipes::Recipe::load("simclr-imagenet", &[]).expect("it is built in");
        Policy { size: SIZE, ..recipe.augment[0].clone() }
    };
    let out = (n * SIZE * SIZE * 4) as f64;
    // A crop covers about half of the image's pixels; the separable filter taps are most of the operations.
    let bytes = (n * 500 * 375 * 3) as f64 / 2.0 + dtype.size() as f64 * out;
    let kernel = if dtype == DType::Bf16 { "augment_bf16" } else { "augment_f32" };
    let operations = 500.0 * out / 4.0;
    Case {
        name: format!("augment simclr {n}x{SIZE}x{SIZE}"),
        count: 0,
        work: Work { operations, bytes },
        unit: Unit::Vector,
        launched: vec![Launched { blocks: n, ..Launched::over(kernel, bytes, operations) }],
        problem: None,
        prepare: Box::new(move |device| {
            let policy = policy();
            let mut image = Image::default();
            image.resize(500, 375);
            image.pixels.iter_mut().zip(0_usize..).for_each(|(v, i)| *v = (i * 37 % 251) as u8);
            let draw = |i| policy.draw(&mut Philox::new(1, Purpose::Test, 0, i), 500, 375);
            let params: Vec<Params> = (0..n as u32).map(draw).collect();
            let device = device.clone();
            let run: Run = match device.kind() {
                DeviceKind::Cuda => {
                    let mut out =
                        Tensor::empty(&device, DType::of_activations(&device), [n, SIZE, SIZE, 4]);
                    let mut gaussian = Vec::new();
                    let view =
                        |p| View::new(&policy, p, [image.width, image.height], 0, &mut gaussian);
                    let views: Vec<View> = params.iter().map(view).collect();
                    let pixels = Table::new(&device, &image.pixels);
                    let mut maker = GpuAugmenter::new(&device, n, SIZE);
                    Box::new(move || maker.make(&views, &gaussian, &pixels, &mut out))
                }
                _ => {
                    let mut out = vec![0.0; n * SIZE * SIZE * 4];
                    Box::new(move || {
                        use rayon::prelude::*;
                        device.run(|| {
                            let rows = out.par_chunks_exact_mut(SIZE * SIZE * 4).zip(&params);
                            rows.for_each_init(Scratch::default, |scratch, (row, params)| {
                                policy.apply(params, &image, row, scratch);
                            });
                        });
                    })
                }
            };
            run
        }),
    }
}

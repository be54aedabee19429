//! Crops made by a GPU equal those of the host: to the bit in 8 bits, normalised or not; to rounding in floats.

use std::sync::Arc;

use half::bf16;
use safetensors::SafeTensors;
use selfsup::data::augment::{
    Blur, BlurKind, Filter, Jitter, Noise, Normalise, Params, Pixels, Policy, Scratch, Solarise,
    apply_on_gpu,
};
use selfsup::data::{
    Batch, Folder, Format, Image, Loader, Source, Split, Subset, center_batch, fashion_scattered,
};
use selfsup::device::{Device, Philox, Precision, Purpose};
use selfsup::tensor::{DType, Tensor};
use serde_json::Value;

use crate::augmentation::{FLOAT, goldens, image_of, params};
use crate::driver::{gpu, open};

type View = (Policy, Params, Image);

fn on_host((policy, params, image): &View) -> Vec<f32> {
    let channels = image.format.device_channels();
    let mut out = vec![f32::NAN; policy.size * policy.size * channels];
    policy.apply(params, image, &mut out, &mut Scratch::default());
    out
}

/// Makes the views, all of one size, on a GPU in f32 and bf16 and compares them with the host's. Returns the largest difference
/// between floats.
fn compare(gpu: &Device, views: &[View]) -> f64 {
    let (size, format) = (views[0].0.size, views[0].2.format);
    let (channels, padded) = (format.channels, format.device_channels());
    let borrowed: Vec<_> = views.iter().map(|(a, b, c)| (a, b, c)).collect();
    let make = |dtype| {
        let mut out = Tensor::empty(gpu, dtype, [views.len(), size, size, padded]);
        apply_on_gpu(&borrowed, &mut out);
        out
    };
    let (exact, rounded) = (make(DType::F32), make(DType::Bf16).to_vec::<bf16>());
    let exact = exact.to_vec::<f32>();
    if let Err(e) = gpu.check() {
        panic!("{e}\n{}", open().map(|driver| driver.report()).unwrap_or_default());
    }
    let mut worst = 0.0f64;
    let rows =
        exact.chunks_exact(size * size * padded).zip(rounded.chunks_exact(size * size * padded));
    for (view, (got, rounded)) in views.iter().zip(rows) {
        let (policy, params, image) = view;
        let (want, what) = (on_host(view), || {
            format!("{params:?} of {policy:?}, {} x {}", image.width, image.height)
        });
        let mut pixels = got.chunks_exact(padded);
        assert!(pixels.all(|p| p[channels..].iter().all(|v| *v == 0.0)), "padding, {}", what());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let difference = f64::from(got - want).abs();
            let most = if policy.pixels == Pixels::U8 { 0.0 } else { FLOAT };
            assert!(difference <= most, "value {i}: got {got}, expected {want}: {}", what());
            worst = worst.max(difference);
        }
        let again: Vec<bf16> = got.iter().map(|&v| bf16::from_f32(v)).collect();
        assert!(again == rounded, "bf16 differs from rounded f32: {}", what());
    }
    worst
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_makes_the_views_of_the_golden_cases() {
    let bytes = goldens();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut by_size = std::collections::BTreeMap::<usize, Vec<View>>::new();
    for name in file.names() {
        let case: Value = serde_json::from_str(name).unwrap();
        if case.get("center").is_none() {
            let policy: Policy = serde_json::from_value(case["policy"].clone()).unwrap();
            let view = (policy.clone(), params(&case), image_of(&case));
            by_size.entry(policy.size).or_default().push(view);
        }
    }
    let gpu = gpu(Precision::F32);
    let worst = by_size.values().map(|views| compare(&gpu, views)).fold(0.0, f64::max);
    let count = by_size.values().map(Vec::len).sum::<usize>();
    println!("{count} views of a GPU: floats differ by {worst:.1e} at most");
    assert!(count > 150, "{count} cases");
}

fn noise(seed: u32, width: usize, height: usize) -> Image {
    let mut rng = Philox::new(9, Purpose::Test, 1, seed);
    let pixels = (0..width * height * 3).map(|_| rng.next_u32() as u8).collect();
    Image { width, height, pixels, ..Image::default() }
}

/// A policy of the given size; the six kinds cover every transform.
fn policy(size: usize, kind: usize) -> Policy {
    let pixels = if kind % 3 == 2 { Pixels::Float } else { Pixels::U8 };
    let blur = [BlurKind::PillowBox, BlurKind::Gaussian, BlurKind::Gaussian][kind % 3];
    let additive_brightness = kind == 5;
    Policy {
        pixels,
        filter: [Filter::Bilinear, Filter::Bicubic][kind % 2],
        antialias: kind != 4,
        flip: 0.5,
        jitter: Some(Jitter {
            p: 0.8,
            brightness: 0.8,
            contrast: 0.8,
            saturation: 0.8,
            hue: if kind == 1 { 0.0 } else { 0.2 },
            additive_brightness,
            per_channel: false,
        }),
        grey: 0.2,
        grey_first: kind == 3,
        blur: Some(Blur { p: 0.5, sigma: [0.1, if kind == 3 { 9.0 } else { 2.0 }], kind: blur }),
        solarise: Some(Solarise { p: 0.3, threshold: 0.5 }),
        normalise: (pixels == Pixels::U8).then(Normalise::imagenet),
        ..Policy::crop(size)
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_makes_views_of_any_size_of_images_of_any_size() {
    let gpu = gpu(Precision::Bf16);
    let images = [(1, 1), (1, 17), (40, 3), (31, 37), (97, 64)];
    for size in [1, 2, 13, 41] {
        let views = |i: usize| {
            let (policy, (width, height)) = (policy(size, i % 6), images[i % images.len()]);
            policy.check().unwrap();
            let mut rng = Philox::new(3, Purpose::Test, size as u32, i as u32);
            (policy.clone(), policy.draw(&mut rng, width, height), noise(i as u32, width, height))
        };
        compare(&gpu, &(0..30).map(views).collect::<Vec<_>>());
    }
    // Filter weights that fill the shared memory of more than one tile.
    let wide = Policy { filter: Filter::Bicubic, area: [1.0, 1.0], ..Policy::crop(5) };
    let params = wide.draw(&mut Philox::new(3, Purpose::Test, 0, 0), 1100, 900);
    compare(&gpu, &[(wide, params, noise(0, 1100, 900))]);
}

/// A policy with what images of any channels have; the two kinds cover every operation.
fn of_channels(size: usize, channels: usize, kind: usize) -> Policy {
    let mut policy = policy(size, if kind == 0 { 2 } else { 5 });
    policy.normalise = None;
    policy.noise = Some(Noise { p: 0.5, std: [0.01, 0.2] });
    policy.channel_drop = if channels > 1 { 0.4 } else { 0.0 };
    // A value next to the threshold may be rounded to either side of it.
    policy.solarise = Some(Solarise { p: 0.3, threshold: if kind == 0 { 0.0 } else { 1.0 } });
    let jitter = policy.jitter.as_mut().unwrap();
    jitter.per_channel = kind == 1;
    if channels != 3 {
        (policy.grey, jitter.saturation, jitter.hue) = (0.0, 0.0, 0.0);
    }
    policy
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_makes_views_of_any_channels_and_bits() {
    let gpu = gpu(Precision::F32);
    for (channels, bits) in [(1, 8), (3, 8), (4, 16), (13, 16)] {
        let format = Format { channels, bits };
        for (size, width, height) in [(7, 31, 17), (24, 9, 40)] {
            let views = |i: usize| {
                let policy = of_channels(size, channels, i % 2);
                policy.check().and_then(|()| policy.check_for(format)).unwrap();
                let mut rng = Philox::new(4, Purpose::Test, size as u32, i as u32);
                let mut image = noise(i as u32, width * bits / 8, height * channels.div_ceil(3));
                image.pixels.truncate(width * height * format.bytes());
                image.reshape(width, height, format);
                (policy.clone(), policy.draw(&mut rng, width, height), image)
            };
            compare(&gpu, &(0..8).map(views).collect::<Vec<_>>());
        }
    }
}

/// Writes seven PNG files of several sizes, and one that is corrupt after its header.
fn folder(root: &std::path::Path) -> Arc<dyn Source> {
    for i in 0..8 {
        let image = noise(i, 9 + 5 * i as usize, 30 - 3 * i as usize);
        let (width, height) = (image.width as u32, image.height as u32);
        let path = root.join(format!("{i}.png"));
        image::RgbImage::from_raw(width, height, image.pixels).unwrap().save(&path).unwrap();
        if i == 5 {
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    Arc::new(Folder::open(root).unwrap())
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_loader_gives_a_gpu_the_crops_of_the_host() {
    let root = tempfile::tempdir().unwrap();
    let scattered = Arc::new(fashion_scattered(Split::Test));
    let sources = [folder(root.path()), Arc::new(Subset::first(scattered, 7)) as Arc<dyn Source>];
    let gpu = gpu(Precision::F32);
    let host = Device::cpu(1).unwrap();
    for source in &sources {
        let loader = |device: &Device| {
            let policies = vec![policy(16, 0), policy(9, 1), policy(16, 1)];
            Loader::new(source.clone(), policies, 3, 11, 2, device).unwrap()
        };
        let summary = |batch: Batch, crops: &[Tensor]| {
            let crops: Vec<Vec<f32>> = crops.iter().map(Tensor::to_vec).collect();
            (batch.epoch, batch.position, batch.indices, batch.labels, crops)
        };
        let mut expected = loader(&host);
        let want: Vec<_> = (0..5)
            .map(|_| expected.next_batch().unwrap())
            .map(|batch| {
                let crops = batch.crops.clone();
                summary(batch, &crops)
            })
            .collect();
        for budget in [usize::MAX, 100] {
            let mut loader = loader(&gpu).keep_at_most(budget);
            let said = loader.place_images().unwrap().unwrap();
            let resident = budget > 100;
            assert!(said.contains("lie on the GPU") == resident, "{said}");
            assert!(said.contains("batch by batch") != resident, "{said}");
            let mut crops = loader.empty_crops();
            for (i, want) in want.iter().enumerate() {
                let batch = if i % 2 == 0 {
                    loader.next_into(&mut crops).unwrap()
                } else {
                    let batch = loader.next_batch().unwrap();
                    crops.clone_from(&batch.crops);
                    Batch { crops: Vec::new(), ..batch }
                };
                assert!(batch.crops.is_empty());
                assert!(summary(batch, &crops) == *want, "batch {i}: {said}");
            }
            assert_eq!(loader.skipped(), expected.skipped(), "{said}");
        }
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn an_evaluation_sees_the_middle_of_images_on_a_gpu_as_on_the_host() {
    let root = tempfile::tempdir().unwrap();
    let source = folder(root.path());
    let gpu = gpu(Precision::F32);
    let normalise = Normalise { mean: vec![0.5, 0.4, 0.3], std: vec![0.2, 0.3, 0.4] };
    let run = |device: &Device, policy: &Policy| {
        let (batch, skipped) = center_batch(&*source, 0..8, policy, device).unwrap();
        (batch.indices, batch.labels, skipped, batch.crops[0].to_vec::<f32>())
    };
    for size in [1, 14, 33] {
        let policy = Policy { normalise: Some(normalise.clone()), ..Policy::crop(size) };
        let floats = Policy {
            pixels: Pixels::Float,
            filter: Filter::Bicubic,
            antialias: false,
            ..policy.clone()
        };
        let cpu = Device::cpu(1).unwrap();
        assert!(run(&gpu, &policy) == run(&cpu, &policy), "{size} pixels");
        let (gpu, cpu) = (run(&gpu, &floats), run(&cpu, &floats));
        assert!((&gpu.0, &gpu.1, &gpu.2) == (&cpu.0, &cpu.1, &cpu.2), "{size} pixels");
        let far = gpu.3.iter().zip(&cpu.3).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(f64::from(far) < FLOAT / 0.2, "{size} pixels in floats: {far}");
    }
}

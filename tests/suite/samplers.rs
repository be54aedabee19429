//! The distributions of crops, against moments of crops that TensorFlow drew and of an independent implementation of BYOL's.

use selfsup::data::Policy;
use selfsup::data::augment::{CropBox, Sampler};
use selfsup::device::{Philox, Purpose};

use crate::golden::Goldens;

/// Crops drawn here, and those behind a golden.
const DRAWS: u32 = 20_000;
const GOLDEN_DRAWS: f64 = 40_000.0;
const IMAGES: [(usize, usize); 5] = [(500, 375), (375, 500), (32, 32), (160, 213), (90, 30)];

fn draws(sampler: Sampler, width: usize, height: usize) -> Vec<CropBox> {
    let policy = Policy { sampler, ..Policy::crop(32) };
    let draw = |i| policy.draw(&mut Philox::new(3, Purpose::Test, 0, i), width, height).crop;
    (0..DRAWS).map(draw).collect()
}

/// As `moments` of `scripts/goldens/boxes.py`.
fn moments(crops: &[CropBox], width: usize, height: usize) -> Vec<f64> {
    let pixels = (width * height) as f64;
    let rows: Vec<[f64; 6]> = crops
        .iter()
        .map(|c| {
            let [w, h, left, top] = [c.width, c.height, c.left, c.top].map(|v| v as f64);
            [w * h / pixels, w, h, left, top, w / h]
        })
        .collect();
    let n = rows.len() as f64;
    let mean = |f: &dyn Fn(&[f64; 6]) -> f64| rows.iter().map(f).sum::<f64>() / n;
    let means: Vec<f64> = (0..6).map(|i| mean(&|row| row[i])).collect();
    let deviation = |i: usize| mean(&|row| (row[i] - means[i]).powi(2)).sqrt();
    let deviations: Vec<f64> = (0..6).map(deviation).collect();
    let below = |tenth: u32| mean(&|row| f64::from(u8::from(row[0] < f64::from(tenth) / 10.0)));
    [means, deviations, (1..10).map(below).collect()].concat()
}

/// The largest deviation of moments from a golden's, in standard errors of their difference.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    let spread = (1.0 / f64::from(DRAWS) + 1.0 / GOLDEN_DRAWS).sqrt();
    let mut worst = 0.0_f64;
    for i in 0..6 {
        let error = spread * want[6 + i].max(1e-9);
        // The error of a deviation, generous for distributions with long tails.
        worst = worst.max((got[i] - want[i]).abs() / error);
        worst = worst.max((got[6 + i] - want[6 + i]).abs() / error);
    }
    for i in 12..got.len() {
        let error = spread * (want[i] * (1.0 - want[i])).sqrt().max(1e-3);
        worst = worst.max((got[i] - want[i]).abs() / error);
    }
    worst
}

#[test]
fn crops_are_distributed_as_the_references_draw_them() {
    let goldens = Goldens::open("boxes");
    let mut worst = 0.0_f64;
    for (name, sampler) in [("tensorflow", Sampler::Tensorflow), ("clamped", Sampler::Clamped)] {
        for (width, height) in IMAGES {
            let crops = draws(sampler, width, height);
            for c in &crops {
                assert!(c.width > 0 && c.left + c.width <= width, "{c:?} of {width} x {height}");
                assert!(c.height > 0 && c.top + c.height <= height, "{c:?} of {width} x {height}");
            }
            let (got, case) = (moments(&crops, width, height), format!("{name} {width}x{height}"));
            let far = distance(&got, goldens.numbers(&case));
            assert!(far < 5.0, "{case}: {far:.1} standard errors; {got:?}");
            worst = worst.max(far);
        }
    }
    println!("samplers: moments differ by {worst:.1} standard errors at most");
}

/// The three distributions are far apart: a recipe with another's sampler trains on other views.
#[test]
fn no_sampler_passes_as_another() {
    let goldens = Goldens::open("boxes");
    let others = [
        ("tensorflow 500x375", Sampler::Torchvision),
        ("tensorflow 500x375", Sampler::Clamped),
        ("clamped 500x375", Sampler::Torchvision),
        ("clamped 500x375", Sampler::Tensorflow),
    ];
    for (case, sampler) in others {
        let far = distance(&moments(&draws(sampler, 500, 375), 500, 375), goldens.numbers(case));
        assert!(far > 20.0, "{sampler:?} passes for {case}: {far:.1} standard errors");
    }
}

//! A method's step over micro-batches equals the step of one batch whose batch norm normalises each micro-batch separately. Also
//! other pairs of settings that must agree.

use std::collections::BTreeMap;

use selfsup::arena::Arena;
use selfsup::device::Device;
use selfsup::methods::byol::{self, Byol};
use selfsup::methods::moco::{self, MoCo};
use selfsup::methods::simsiam::{self, SimSiam};
use selfsup::methods::{self, Method, RunInfo, State};
use selfsup::nn::ResNetConfig;
use selfsup::tensor::Tensor;

use crate::compare::{close, report};
use crate::methods::{MOCO, MOCO_V2, small};
use crate::network;

const PARTS: usize = 4;
const IMAGES: usize = 12;
const RUN_INFO: RunInfo = RunInfo { seed: 7, batch: IMAGES, images: 24, per_epoch: 2, total: 4 };

type Build = fn(&ResNetConfig) -> Box<dyn Method>;

fn moco(network: &ResNetConfig, settings: moco::Settings) -> Box<dyn Method> {
    Box::new(MoCo::new(network, &moco::Settings { queue: 48, ..settings }))
}

fn simsiam(network: &ResNetConfig, target_every: u64) -> Box<dyn Method> {
    let settings =
        simsiam::Settings { embedding: 24, hidden: 16, target_every, ..Default::default() };
    Box::new(SimSiam::new(network, &settings))
}

fn byol(network: &ResNetConfig) -> Box<dyn Method> {
    let settings = byol::Settings { hidden: 32, embedding: 16, ..Default::default() };
    Box::new(Byol::new(network, &settings))
}

const METHODS: [(&str, Build); 4] = [
    ("moco", |network| moco(network, MOCO)),
    ("moco, symmetric", |network| moco(network, MOCO_V2)),
    ("byol", byol),
    ("simsiam", |network| simsiam(network, 0)),
];

/// The losses of two steps, the gradients of the last one, and the method's state, by name.
fn two_steps(method: Box<dyn Method>, parts: usize) -> BTreeMap<String, Vec<f64>> {
    let device = Device::reference().poisoned();
    let mut method = method;
    let mut online = network::seeded_arena(method.layout(), &device, "micro-batches");
    method.start(&online, &RUN_INFO).unwrap();
    let mut all = BTreeMap::new();
    for step in 0..2 {
        let views = network::images(&device, &format!("micro|{step}"), [2 * IMAGES, 8, 8]);
        method.prepare(step);
        method.before_step(&mut online);
        let loss =
            methods::step(&mut *method, &mut online, &[views], IMAGES, parts).unwrap().scalar();
        all.insert(format!("loss {step}"), vec![loss]);
        descend(&mut online);
        method.after_update(&mut online, 0.0);
    }
    all.extend(network::gradients(&online));
    for (name, part) in method.state() {
        let values = match part {
            State::Network(arena) => arena.values().to_f64(),
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        };
        all.insert(name.into(), values);
    }
    all
}

/// Moves the weights along the gradient, so that the second step starts from different weights.
fn descend(online: &mut Arena) {
    let gradients = online.gradients().to_f64();
    let values = online.values().to_f64();
    let moved: Vec<f64> = values.iter().zip(&gradients).map(|(w, g)| w - 0.01 * g).collect();
    *online.values_mut() = Tensor::from_f64(online.device(), [moved.len()], &moved);
}

fn compare(
    got: &BTreeMap<String, Vec<f64>>,
    want: &BTreeMap<String, Vec<f64>>,
    tolerance: f64,
) -> Vec<Result<f64, String>> {
    let both = got.iter().filter_map(|(name, got)| Some((name, got, want.get(name)?)));
    // A following batch norm cancels a bias: its gradient is only rounding.
    let real = both.filter(|(_, _, want)| want.iter().any(|v| v.abs() > 1e-12));
    real.map(|(name, got, want)| close(name, got, want, tolerance)).collect()
}

#[test]
fn four_micro_batches_of_every_kind_of_step_equal_one_batch_in_four_groups() {
    for (name, build) in METHODS {
        let parts = two_steps(build(&small(1)), PARTS);
        let one_batch = two_steps(build(&small(PARTS)), 1);
        assert!(parts.keys().eq(one_batch.keys()), "{name}");
        report(name, compare(&parts, &one_batch, 1e-10));
        // One batch norm over the complete batch must give a different step.
        let wrong = compare(&parts, &two_steps(build(&small(1)), 1), 1e-3);
        assert!(wrong.iter().filter(|r| r.is_err()).count() > wrong.len() / 2, "{name}: {wrong:?}");
    }
}

#[test]
fn a_batch_that_cannot_be_split_is_an_error() {
    let method = simsiam(&small(1), 0);
    for (parts, text) in [(5, "equal parts"), (0, "equal parts"), (12, "equal parts")] {
        let error = methods::check_micro_batches(&*method, IMAGES, parts).unwrap_err().to_string();
        assert!(error.contains(text), "{parts}: {error}");
    }
    let bank =
        moco::Settings { dictionary: moco::Dictionary::MemoryBank, ..moco::Settings::default() };
    let error = methods::check_micro_batches(&*moco(&small(1), bank), IMAGES, 4).unwrap_err();
    assert!(error.to_string().contains("cannot be split"), "{error}");
}

#[test]
fn an_alternation_of_one_step_equals_simsiam_and_of_two_does_not() {
    let plain = two_steps(simsiam(&small(1), 0), 1);
    report("targets of every step", compare(&two_steps(simsiam(&small(1), 1), 1), &plain, 1e-12));
    let two = two_steps(simsiam(&small(1), 2), 1);
    assert_eq!(two["loss 0"], plain["loss 0"]);
    assert!((two["loss 1"][0] - plain["loss 1"][0]).abs() > 1e-6, "{:?}", two["loss 1"]);
}

/// A step blends the bank's rows of its images with their queries and leaves the other rows unchanged.
#[test]
fn a_memory_bank_updates_only_the_rows_of_the_batch() {
    let device = Device::reference();
    let settings = moco::Settings { dictionary: moco::Dictionary::MemoryBank, ..MOCO };
    let mut method = MoCo::new(&small(1), &settings);
    let mut online = network::seeded_arena(method.layout(), &device, "bank");
    method.start(&online, &RUN_INFO).unwrap();
    let rows = |method: &mut MoCo| match method.state().remove(0) {
        ("bank", State::Rows(rows)) => rows.to_f64(),
        other => panic!("{other:?}"),
    };
    let before = rows(&mut method);
    assert_eq!(before.len(), RUN_INFO.images * settings.embedding);
    method.prepare(0);
    let seen: Vec<u32> = (0..IMAGES as u32).map(|i| 2 * i).collect();
    method.samples(&seen);
    let views = network::images(&device, "bank|images", [2 * IMAGES, 8, 8]);
    methods::step(&mut method, &mut online, &[views], IMAGES, 1).unwrap();
    let q = method.take_embeddings().unwrap().to_f64();
    method.after_update(&mut online, 0.0);
    let after = rows(&mut method);
    let d = settings.embedding;
    for image in 0..RUN_INFO.images {
        let [old, new] = [&before, &after].map(|rows| &rows[image * d..][..d]);
        if image % 2 == 1 {
            assert_eq!(old, new, "image {image} was not seen");
            continue;
        }
        let blend: Vec<f64> =
            old.iter().zip(&q[image / 2 * d..]).map(|(old, q)| 0.5 * old + 0.5 * q).collect();
        let norm = blend.iter().map(|v| v * v).sum::<f64>().sqrt();
        let unit: Vec<f64> = blend.iter().map(|v| v / norm).collect();
        close("row", new, &unit, 1e-12).unwrap();
    }
}

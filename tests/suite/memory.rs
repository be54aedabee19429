//! A training step takes its memory from the free list; the memory of a contrastive loss is linear in its rows.

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::methods::Method;
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::ops::{Negatives, info_nce, nt_xent};
use selfsup::optim::{Lars, Optimizer, Rule};
use selfsup::recipes::Recipe;
use selfsup::tape::{evaluate, step};
use selfsup::tensor::Tensor;
use selfsup::train::{BESIDE_TENSORS, measure_on, memory_within};

struct Training {
    method: SimClr,
    online: Arena,
    optimizer: Optimizer,
    views: Tensor,
}

impl Training {
    fn new(device: &Device) -> Self {
        let config = ResNetConfig {
            depth: 18,
            width: 8,
            stem: Stem::Small,
            zero_init_residual: true,
            norm_groups: 1,
            sk_ratio: 0.0,
            bottleneck: 1,
            project: false,
            same_pool: false,
            channels: 3,
        };
        let settings = Settings { hidden: 16, embedding: 8, ..Settings::default() };
        let method = SimClr::new(&config, &settings);
        let online = Arena::new(method.layout(), device, 1);
        let optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &online);
        let pixels: Vec<f32> = (0..8 * 16 * 16 * 4)
            .map(|i| if i % 4 == 3 { 0.0 } else { (i as f32 * 0.37).sin() })
            .collect();
        let views = Tensor::from_slice(device, [8, 16, 16, 4], &pixels);
        Self { method, online, optimizer, views }
    }

    fn step(&mut self) {
        let method = &mut self.method;
        let views = std::slice::from_ref(&self.views);
        step(&mut self.online, |tape| method.loss(tape, views)).unwrap();
        self.optimizer.step(&mut self.online, 0.1);
        method.take_embeddings();
    }
}

#[test]
fn nothing_is_allocated_after_the_second_step_even_with_an_evaluation_between() {
    let device = Device::cpu(2).unwrap();
    let mut training = Training::new(&device);
    training.step();
    training.step();
    let evaluate_once = |training: &Training| {
        evaluate(&training.online, |tape| {
            training.method.backbone().forward(&tape.input(&training.views))
        })
        .unwrap();
    };
    evaluate_once(&training);
    let before = device.memory_use();
    for _ in 0..3 {
        training.step();
        evaluate_once(&training);
    }
    let after = device.memory_use();
    assert_eq!((after.allocations, after.live), (before.allocations, before.live));
}

#[test]
fn evaluation_saves_nothing_for_backward() {
    let device = Device::cpu(1).unwrap();
    let training = Training::new(&device);
    let before = device.memory_use().live;
    let features = evaluate(&training.online, |tape| {
        let y = training.method.backbone().forward(&tape.input(&training.views));
        assert_eq!(tape.nodes(), []);
        y
    });
    assert_eq!(
        device.memory_use().live - before,
        features.unwrap().size_in_bytes().next_multiple_of(64)
    );
}

/// Peak bytes of a loss and its gradient, without its rows.
fn peak_bytes(rows: usize, queue: usize) -> usize {
    const D: usize = 16;
    let device = Device::cpu(1).unwrap();
    let mut layout = Layout::new();
    let z = layout.param("z", [rows, D], SlotKind::Matrix, Init::Uniform(0.25));
    let mut arena = Arena::new(&Arc::new(layout), &device, 1);
    let keys = Tensor::from_slice(&device, [queue, D], &vec![0.25_f32; queue * D]);
    let before = device.memory_use().live;
    let loss = step(&mut arena, |tape| {
        let z = tape.param(z);
        match queue {
            0 => nt_xent(&z, 0.1),
            _ => info_nce(&z, &z, &Negatives { queue: &keys, own: None }, 0.1),
        }
    });
    assert!(loss.unwrap().scalar().is_finite());
    device.memory_use().peak - before
}

/// The similarity matrix is never stored: doubling the rows doubles the memory, and a longer queue needs none.
#[test]
fn memory_of_contrastive_losses_grows_with_their_rows() {
    let [one, two] = [1024, 2048].map(|rows| peak_bytes(rows, 0));
    println!("nt_xent of 1024 and of 2048 rows: {one} and {two} bytes");
    assert!(two <= one * 2 + 4096 && two < 2048 * 2048, "{one}, then {two}");
    let [one, two] = [1024, 2048].map(|rows| peak_bytes(rows, 64));
    println!("info_nce of 1024 and of 2048 queries: {one} and {two} bytes");
    assert!(two <= one * 2 + 4096, "{one}, then {two}");
    assert_eq!(peak_bytes(256, 1024), peak_bytes(256, 4096), "a queue is read, not copied");
}

/// A small recipe, with recompute and without.
fn small(recompute: bool) -> Recipe {
    let settings = ["network.width=8", "augment.size=16", "train.batch=48"].map(String::from);
    let recipe = Recipe::load("simclr-cifar10-small", &settings).unwrap();
    recipe.with(&[format!("train.recompute={recompute}")]).unwrap()
}

/// What `inspect --memory` says of a batch is what its step takes, or a little more.
#[test]
fn the_estimate_of_a_batch_is_what_its_step_takes() {
    let mut needs = Vec::new();
    for recompute in [false, true] {
        for precision in [Precision::F32, Precision::Bf16] {
            for batch in [640, 48] {
                let mut recipe = small(recompute);
                recipe.train.batch = batch;
                // The other tests keep the machine busy.
                let need = memory_within(&recipe, precision, 60.0).unwrap();
                let device = Device::cpu(0).unwrap().with_precision(precision).unwrap();
                let took = measure_on(&recipe, batch, &device).unwrap();
                let (took, reserved) = (took.peak, took.reserved);
                println!("{precision}, recompute {recompute}: {need:?}; took {took}, {reserved}");
                let share = need.in_all as f64 / took as f64;
                assert!((0.98..1.1).contains(&share), "{precision}: {need:?}, took {took}");
                let share = need.reserved as f64 / reserved as f64;
                assert!((0.98..1.1).contains(&share), "{precision}: {need:?}, reserved {reserved}");
                assert!(need.reserved >= need.in_all);
                if batch == 48 {
                    needs.push(need);
                }
            }
        }
    }
    assert!(needs[2].in_all < needs[0].in_all && needs[3].in_all < needs[1].in_all, "{needs:?}");
    // The largest batch needs no more than the GPU has, and one image more needs more.
    let (need, gpu) = (needs[0], 2 * BESIDE_TENSORS);
    let largest = need.largest_batch(gpu, 1);
    let bytes = |batch: usize| {
        let tensors = need.in_all - need.per_image * 48 + need.per_image * batch;
        (tensors as f64 * 1.12) as usize + BESIDE_TENSORS
    };
    assert!(bytes(largest) <= gpu && bytes(largest + 1) > gpu - (1 << 10), "{largest}");
    assert_eq!(need.largest_batch(gpu, 64), largest / 64 * 64);
    assert_eq!(need.largest_batch(BESIDE_TENSORS, 1), 0);
}

//! A training step takes its memory from the free list.

use selfsup::arena::Arena;
use selfsup::device::Device;
use selfsup::methods::Method;
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::optim::{Lars, Optimizer, Rule};
use selfsup::tape::{evaluate, step};
use selfsup::tensor::Tensor;

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
fn no_memory_is_taken_after_the_second_step_nor_by_an_evaluation_between() {
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

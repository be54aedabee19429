//! Steps that compute residual blocks again in the backward pass: the same bits, less memory.

use selfsup::arena::Arena;
use selfsup::device::{Device, Precision};
use selfsup::methods::{self as library, State};
use selfsup::recipes::Recipe;
use selfsup::tape;

use crate::golden::Goldens;
use crate::methods::{self, Bug, Run, Training};
use crate::network;

fn started(run: Run, device: &Device, recompute: bool) -> Training {
    let mut training = Training::new(run, device);
    training.online = training.online.with_recompute(recompute);
    training
}

/// Everything that two steps leave, in order.
fn two_steps(run: Run, device: &Device, recompute: bool) -> Vec<Vec<f64>> {
    let goldens = Goldens::open("methods");
    let mut training = started(run, device, recompute);
    let mut left = Vec::new();
    for step in 0..2 {
        left.push(vec![training.forward_and_backward(&goldens, step, Bug::None)]);
        left.push(training.online.gradients().to_f64());
        training.update(step, Bug::None);
    }
    left.extend([training.online.values().to_f64(), training.online.statistics().to_f64()]);
    for (_, part) in training.method.state() {
        left.push(match part {
            State::Network(network) => network.values().to_f64(),
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        });
    }
    left
}

#[test]
fn recomputed_steps_of_every_method_have_the_bits_of_plain_ones() {
    for precision in [Precision::F32, Precision::Bf16] {
        let device = Device::cpu(2).unwrap().with_precision(precision).unwrap().poisoned();
        for run in methods::runs() {
            let [plain, again] = [false, true].map(|again| two_steps(run, &device, again));
            assert!(plain.iter().flatten().all(|v| v.is_finite()), "{}", run.name);
            assert!(plain == again, "{} in {precision}", run.name);
        }
    }
}

/// Losses that couple all rows run every micro-batch twice, and its blocks a third time.
#[test]
fn recomputed_micro_batches_have_the_bits_of_plain_ones() {
    let device = Device::cpu(2).unwrap();
    let run = methods::run_of("simclr v2");
    let step = |recompute| {
        let mut training = started(run, &device, recompute);
        training.method.prepare(0);
        let views = network::images(&device, "micro", [2 * methods::BATCH, 8, 8]);
        let (method, online) = (&mut *training.method, &mut training.online);
        let loss = library::step(method, online, &[views], methods::BATCH, 2).unwrap();
        (loss.scalar(), online.gradients().to_f64(), online.statistics().to_f64())
    };
    assert!(step(true) == step(false));
}

#[test]
fn a_recomputed_step_saves_the_inputs_of_blocks_alone() {
    let settings = ["network.width=8".to_owned(), "augment.size=16".to_owned()];
    let recipe = Recipe::load("simclr-cifar10-small", &settings).unwrap();
    let device = Device::cpu(2).unwrap();
    let measure = |recompute| {
        let mut method = recipe.build_method().unwrap();
        let mut online = Arena::new(method.layout(), &device, 1).with_recompute(recompute);
        let views = network::images(&device, "memory", [32, 16, 16]);
        let (mut saved, mut nodes) = (0, Vec::new());
        let before = device.memory_use().live;
        tape::step(&mut online, |tape| {
            let loss = method.loss(tape, std::slice::from_ref(&views));
            saved = device.memory_use().live - before;
            nodes = tape.nodes();
            loss
        })
        .unwrap();
        (saved, nodes)
    };
    let ((plain, _), (again, nodes)) = (measure(false), measure(true));
    println!("saved for the backward pass: {plain} bytes, recomputed {again}");
    let blocks = nodes.iter().filter(|node| node.name == "block");
    let inputs: usize = blocks.map(|node| node.bytes).sum();
    assert!(2 * again < plain && again > inputs / 2, "{plain}, then {again}; outputs {inputs}");
}

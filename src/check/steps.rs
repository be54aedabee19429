//! Training steps on a device: launched against captured, and ten of them against the processor's.

use super::compare::close;
use super::report::Verdict;
use super::seeded;
use crate::arena::Arena;
use crate::data::Batch;
use crate::device::{Device, DeviceKind, Precision};
use crate::error::Result;
use crate::methods::byol::{self, Byol};
use crate::methods::moco::{self, Dictionary, MoCo};
use crate::methods::simclr::{self, SimClr};
use crate::methods::{Method, RunInfo, State};
use crate::nn::{ResNetConfig, Stem};
use crate::optim::{Exclude, Optimizer, Rule, Schedule, Sgd};
use crate::tensor::DType;
use crate::train::{Steps, Training};

/// Images of a step, and pixels of a side.
const BATCH: usize = 8;
const SIDE: usize = 8;
/// Steps that are launched before one is captured, and two replays.
const CAPTURED: usize = 5;
const TEN: usize = 10;
const SEED: u64 = 11;

/// The methods whose captured steps are compared: without state, with a queue and shuffled keys, with a target network.
pub(super) const METHODS: [&str; 3] = ["simclr", "moco", "byol"];

fn method(name: &str) -> Box<dyn Method> {
    let network = ResNetConfig { width: 8, stem: Stem::Small, ..resnet18() };
    let (hidden, embedding) = (16, 8);
    match name {
        "moco" => Box::new(MoCo::new(
            &ResNetConfig { norm_groups: 2, ..network },
            &moco::Settings {
                queue: 4 * BATCH,
                momentum: 0.9,
                temperature: 0.2,
                hidden,
                embedding,
                shuffle: true,
                symmetric: false,
                dictionary: Dictionary::Queue,
                bank_momentum: 0.5,
            },
        )),
        "byol" => Box::new(Byol::new(
            &network,
            &byol::Settings {
                momentum: 0.9,
                hidden,
                embedding,
                fresh_target: true,
                predictor: true,
                head_norm: true,
                constant_momentum: false,
                truncated_init: false,
            },
        )),
        _ => {
            let settings = simclr::Settings { hidden, embedding, ..simclr::Settings::default() };
            Box::new(SimClr::new(&network, &settings))
        }
    }
}

fn resnet18() -> ResNetConfig {
    ResNetConfig::named("resnet18").expect("a known name")
}

/// What steps leave behind.
#[derive(Debug, PartialEq)]
pub(super) struct Left {
    pub(super) losses: Vec<f64>,
    /// Values, statistics and the method's state.
    tensors: Vec<Vec<f64>>,
}

/// Trains `count` steps on seeded images.
pub(super) fn train(device: &Device, name: &str, count: usize, captures: bool) -> Result<Left> {
    let mut method = method(name);
    let mut online = Arena::new(method.layout(), device, SEED);
    let total = count as u64;
    let info = RunInfo { seed: SEED, batch: BATCH, images: 8 * BATCH, per_epoch: 8, total };
    method.start(&online, &info)?;
    let (momentum, weight_decay, exclude) = (0.9, 1e-4, Exclude::Nothing);
    let rule = Rule::Sgd(Sgd { momentum, nesterov: false, weight_decay, exclude });
    let mut optimizer = Optimizer::new(rule, &online);
    let schedule = Schedule { peak: 0.003, warmup: 2, total, ..Schedule::default() };
    method.prepare(0);
    optimizer.set_policies(online.layout(), |slot| method.param_policy(slot, schedule.peak));
    let steps = Steps::new(device);
    let mut steps = if captures { steps } else { steps.without_capture() };
    let mut losses = Vec::new();
    for step in 0..count {
        let images = seeded::images(device, &format!("step {step}"), [2 * BATCH, SIDE, SIDE]);
        let batch = Batch {
            epoch: 0,
            position: step,
            indices: (0..BATCH as u32).collect(),
            labels: vec![-1; BATCH],
            crops: vec![images.cast(DType::of_activations(device))],
        };
        let training = Training {
            method: &mut *method,
            online: &mut online,
            optimizer: &mut optimizer,
            schedule: &schedule,
        };
        losses.extend(steps.run(training, &batch, step as u64)?);
    }
    losses.extend(steps.finish()?);
    let mut tensors = vec![online.values().to_f64(), online.statistics().to_f64()];
    for (_, part) in method.state() {
        tensors.push(match part {
            State::Network(network) => network.values().to_f64(),
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        });
    }
    device.check()?;
    Ok(Left { losses: losses.iter().map(|done| done.loss).collect(), tensors })
}

/// Captured steps must leave the bits of launched ones.
pub(super) fn captured(device: &Device, methods: &[&str]) -> Verdict {
    if device.kind() != DeviceKind::Cuda || device.gpu().is_synchronous() {
        return Verdict::NotHere("only a GPU captures steps, without SELFSUP_SYNC=1".into());
    }
    let mut wrong = Vec::new();
    for name in methods {
        let both = [false, true].map(|captures| train(device, name, CAPTURED, captures));
        match both {
            [Ok(launched), Ok(captured)] => {
                if !launched.tensors.iter().flatten().chain(&launched.losses).all(|v| v.is_finite())
                {
                    wrong
                        .push(format!("{name}: a launched step gives a number that is not finite"));
                }
                if launched != captured {
                    let (a, b) = (&launched.losses, &captured.losses);
                    wrong.push(format!(
                        "{name}: replayed steps differ from launched ones; losses {b:?}, launched {a:?}"
                    ));
                }
            }
            [Err(e), _] | [_, Err(e)] => wrong.push(format!("{name}: {e}")),
        }
    }
    let count = methods.len();
    Verdict::of(format!("the bits of launched ones, {count} methods, {CAPTURED} steps"), wrong)
}

/// Ten steps must have the losses that the processor computes in f32, or on a processor the f64 reference.
pub(super) fn ten(device: &Device) -> Verdict {
    let (judge, name) = match device.kind() {
        DeviceKind::Cuda => (Device::cpu(0), "the processor's in f32"),
        _ => (Ok(Device::reference()), "the f64 reference's"),
    };
    let run = |device: &Device| train(device, METHODS[0], TEN, true);
    let (got, want) = match (run(device), judge.and_then(|judge| run(&judge))) {
        (Ok(got), Ok(want)) => (got.losses, want.losses),
        (Err(e), _) | (_, Err(e)) => return Verdict::of(String::new(), vec![e.to_string()]),
    };
    // Rounding grows from step to step: a processor's f32 is 1.4e-2 off f64 after ten steps, its bf16 6e-2. A single step is held
    // far more strictly by the primitives; this finds what only a sequence shows.
    let tolerance = match device.precision() {
        Precision::F32 => 5e-2,
        Precision::Bf16 => 2e-1,
    };
    match close(&format!("losses of ten steps against {name}"), &got, &want, tolerance) {
        Ok(error) => {
            let (first, last) = (got[0], got[TEN - 1]);
            Verdict::Right(format!(
                "losses {first:.4} to {last:.4}, {error:.0e} off {name}; {tolerance:.0e} is allowed"
            ))
        }
        Err(complaint) => Verdict::Wrong(vec![complaint]),
    }
}

//! Training steps on a device: launched against captured, and each of ten against the processor's.

use super::compare::close;
use super::report::Verdict;
use super::seeded;
use crate::arena::Arena;
use crate::data::Batch;
use crate::device::{Device, DeviceKind, Precision};
use crate::error::{Error, Result};
use crate::methods::byol::{self, Byol};
use crate::methods::moco::{self, Dictionary, MoCo};
use crate::methods::simclr::{self, SimClr};
use crate::methods::{Method, RunInfo, State};
use crate::nn::{ResNetConfig, Stem};
use crate::optim::{Exclude, Optimizer, Rule, Schedule, Sgd};
use crate::tensor::{DType, Tensor};
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

/// A training on seeded images.
struct Run {
    method: Box<dyn Method>,
    online: Arena,
    optimizer: Optimizer,
    schedule: Schedule,
    steps: Steps,
}

impl Run {
    /// Before the first of `total` steps; `peak` is the learning rate after two of them.
    fn new(device: &Device, name: &str, total: usize, peak: f64) -> Result<Self> {
        let mut method = method(name);
        let online = Arena::new(method.layout(), device, SEED);
        let total = total as u64;
        let info = RunInfo { seed: SEED, batch: BATCH, images: 8 * BATCH, per_epoch: 8, total };
        method.start(&online, &info)?;
        let (momentum, weight_decay, exclude) = (0.9, 1e-4, Exclude::Nothing);
        let rule = Rule::Sgd(Sgd { momentum, nesterov: false, weight_decay, exclude });
        let mut optimizer = Optimizer::new(rule, &online);
        let schedule = Schedule { peak, warmup: 2, total, ..Schedule::default() };
        method.prepare(0);
        optimizer.set_policies(online.layout(), |slot| method.param_policy(slot, schedule.peak));
        Ok(Self { method, online, optimizer, schedule, steps: Steps::new(device) })
    }

    /// Launches every step instead of replaying one.
    fn launched(mut self) -> Self {
        self.steps = self.steps.without_capture();
        self
    }

    /// Runs a step, and returns the losses that have become known.
    fn step(&mut self, step: usize) -> Result<Vec<f64>> {
        let device = self.online.device();
        let images = seeded::images(device, &format!("step {step}"), [2 * BATCH, SIDE, SIDE]);
        let batch = Batch {
            epoch: 0,
            position: step,
            indices: (0..BATCH as u32).collect(),
            labels: vec![-1; BATCH],
            crops: vec![images.cast(DType::of_activations(device))],
        };
        let training = Training {
            method: &mut *self.method,
            online: &mut self.online,
            optimizer: &mut self.optimizer,
            schedule: &self.schedule,
        };
        let known = self.steps.run(training, &batch, step as u64)?;
        Ok(known.iter().map(|done| done.loss).collect())
    }

    /// Waits for the losses of all steps, and returns those that were not known.
    fn finish(&mut self) -> Result<Vec<f64>> {
        Ok(self.steps.finish()?.iter().map(|done| done.loss).collect())
    }

    /// Takes the weights, statistics and momentum of a run on another device.
    fn take_over(&mut self, other: &Run) {
        let device = self.online.device().clone();
        let here = |tensor: &Tensor| Tensor::from_f64(&device, *tensor.shape(), &tensor.to_f64());
        *self.online.values_mut() = here(other.online.values());
        *self.online.statistics_mut() = here(&other.online.statistics());
        *self.optimizer.momentum_mut() = here(other.optimizer.momentum());
    }
}

/// Trains `count` steps on seeded images.
pub(super) fn train(device: &Device, name: &str, count: usize, captures: bool) -> Result<Left> {
    let run = Run::new(device, name, count, 0.003)?;
    let mut run = if captures { run } else { run.launched() };
    let mut losses = Vec::new();
    for step in 0..count {
        losses.extend(run.step(step)?);
    }
    losses.extend(run.finish()?);
    if let Some(reason) = run.steps.take_notice() {
        return Err(Error::Device(reason)); // nothing was captured
    }
    let mut tensors = vec![run.online.values().to_f64(), run.online.statistics().to_f64()];
    for (_, part) in run.method.state() {
        tensors.push(match part {
            State::Network(network) => network.values().to_f64(),
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        });
    }
    device.check()?;
    Ok(Left { losses, tensors })
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

/// What ten steps compute, one after the other: losses, and the changes of all weights.
struct Ten {
    losses: Vec<f64>,
    changes: Vec<f64>,
}

/// Trains ten steps of a method on `judge`, and each of them also on `device` from the same weights: rounding that grows from step
/// to step would hide faults. Returns what `device` computed, and what it should have.
fn ten_on_both(device: &Device, judge: &Device) -> Result<[Ten; 2]> {
    let runs = [device, judge].map(|on| Run::new(on, METHODS[0], TEN, 0.1).map(Run::launched));
    let [own, judge] = runs;
    let (mut own, mut judge) = (own?, judge?);
    let mut found = [(); 2].map(|()| Ten { losses: Vec::new(), changes: Vec::new() });
    for step in 0..TEN {
        own.take_over(&judge);
        for (run, found) in [&mut own, &mut judge].into_iter().zip(&mut found) {
            let before = run.online.values().to_f64();
            found.losses.extend(run.step(step)?);
            found.losses.extend(run.finish()?);
            let after = run.online.values().to_f64();
            found.changes.extend(after.iter().zip(before).map(|(after, before)| after - before));
        }
    }
    device.check()?;
    Ok(found)
}

/// Each of ten steps must have the loss, and change the weights, as on the processor in f32, or, on a processor, as in the f64
/// reference.
pub(super) fn ten(device: &Device) -> Verdict {
    let (judge, name) = match device.kind() {
        DeviceKind::Cuda => (Device::cpu(0), "the processor's in f32"),
        _ => (Ok(Device::reference()), "the f64 reference's"),
    };
    let [got, want] = match judge.and_then(|judge| ten_on_both(device, &judge)) {
        Ok(both) => both,
        Err(e) => return Verdict::of(String::new(), vec![e.to_string()]),
    };
    let [of_losses, of_changes] = match device.precision() {
        Precision::F32 => [3e-6, 1e-5],
        // Gradients of batch norm over few pixels: bf16 on a processor is 9e-2 off f64.
        Precision::Bf16 => [1e-2, 2e-1],
    };
    let losses = close(&format!("losses against {name}"), &got.losses, &want.losses, of_losses);
    let what = format!("changes of weights against {name}");
    match (losses, close(&what, &got.changes, &want.changes, of_changes)) {
        (Ok(losses), Ok(changes)) => Verdict::Right(format!(
            "losses {losses:.0e} and changes of weights {changes:.0e} off {name}; {of_losses:.0e} and {of_changes:.0e} are allowed"
        )),
        (losses, changes) => {
            Verdict::Wrong([losses, changes].into_iter().filter_map(Result::err).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_ten_steps_is_held_to_rounding() {
        for precision in [Precision::F32, Precision::Bf16] {
            let device = Device::cpu(2).unwrap().with_precision(precision).unwrap();
            match ten(&device) {
                Verdict::Right(figure) => println!("{precision}: {figure}"),
                wrong => panic!("{precision}: {wrong:?}"),
            }
        }
    }

    /// A rate that is wrong by a ten-thousandth is more than rounding.
    #[test]
    fn a_wrong_update_is_found() {
        let device = Device::cpu(1).unwrap();
        let [mut got, want] = ten_on_both(&device, &Device::reference()).unwrap();
        assert!(close("", &got.changes, &want.changes, 1e-5).is_ok());
        got.changes.iter_mut().for_each(|change| *change *= 1.0001);
        assert!(close("", &got.changes, &want.changes, 1e-5).is_err());
    }
}

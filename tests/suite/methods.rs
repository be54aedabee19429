//! Ten steps of each method against PyTorch, free-running in f64. `stepwise_f32.rs` runs single steps in f32 from the f64
//! state; `shipped_bugs.rs` switches on bugs that other implementations shipped.

use std::collections::BTreeMap;

use selfsup::arena::Arena;
use selfsup::device::Device;
use selfsup::methods::byol::{self, Byol};
use selfsup::methods::distill::{self, Distill};
use selfsup::methods::moco::{self, MoCo};
use selfsup::methods::simclr_v2::{self, SimClrV2};
use selfsup::methods::simsiam::{self, SimSiam};
use selfsup::methods::supervised::{self, Supervised};
use selfsup::methods::swav::{self, Swav};
use selfsup::methods::{Method, RunInfo, State};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::ops;
use selfsup::optim::{Exclude, Lars, Optimizer, ParamPolicy, Rule, Schedule, Sgd};
use selfsup::tape;
use selfsup::tensor::Tensor;

use crate::case::write;
use crate::compare::report;
use crate::golden::{Goldens, Record};
use crate::network;
use crate::seeded;

pub const STEPS: usize = 10;
pub const BATCH: usize = 8;
const EMBEDDING: usize = 16;
/// The steps whose state is in the goldens.
const STEPS_WITH_STATE: [usize; 2] = [0, STEPS - 1];
const EXACT: f64 = 1e-8;

pub const RUN_INFO: RunInfo =
    RunInfo { seed: 7, batch: BATCH, images: 4 * BATCH, per_epoch: 4, total: STEPS as u64 };

/// The settings of one run; `scripts/goldens/methods.py` has the same.
#[derive(Clone, Copy)]
pub struct Run {
    pub name: &'static str,
    method: fn() -> Box<dyn Method>,
    rule: Rule,
    peak: f64,
    /// Number of views and side of each resolution.
    sizes: &'static [(usize, usize)],
    /// Whether ReLU inputs lie too close to zero to compare f32 with f64 (fifty layers). `networks.txt` has a row for this backbone
    /// in f32.
    pub kinked: bool,
}

pub fn small(norm_groups: usize) -> ResNetConfig {
    let (depth, width, stem) = (18, 4, Stem::Small);
    ResNetConfig {
        depth,
        width,
        stem,
        zero_init_residual: false,
        norm_groups,
        sk_ratio: 0.0,
        bottleneck: 1,
        project: false,
        same_pool: false,
        channels: 3,
    }
}

pub const MOCO: moco::Settings = moco::Settings {
    queue: 32,
    momentum: 0.9,
    temperature: 0.07,
    hidden: 0,
    embedding: EMBEDDING,
    shuffle: true,
    symmetric: false,
    dictionary: moco::Dictionary::Queue,
    bank_momentum: 0.5,
};

pub const MOCO_V2: moco::Settings =
    moco::Settings { temperature: 0.2, hidden: 32, symmetric: true, ..MOCO };

const BYOL: byol::Settings = byol::Settings {
    momentum: 0.9,
    hidden: 32,
    embedding: EMBEDDING,
    fresh_target: true,
    predictor: true,
    head_norm: true,
    constant_momentum: false,
    truncated_init: false,
};

pub const SWAV: swav::Settings = swav::Settings {
    crops: 4,
    prototypes: 12,
    temperature: 0.1,
    epsilon: 0.05,
    sinkhorn_iterations: 3,
    hidden: 32,
    embedding: EMBEDDING,
    freeze_steps: 3,
    queue: 16,
    queue_from: 1,
    hard_codes: false,
};

const CLASSIFIER: supervised::Settings = supervised::Settings {
    classes: 5,
    label_smoothing: 0.1,
    head_layers: 0,
    hidden: 0,
    new_classifier: false,
    classifier_rate: 1.0,
};

fn simclr_v2(network: &ResNetConfig, temperature: f64, memory: usize) -> Box<dyn Method> {
    let (hidden, embedding, momentum) = (32, EMBEDDING, 0.9);
    let settings = simclr_v2::Settings {
        temperature,
        hidden,
        embedding,
        memory,
        momentum,
        ..Default::default()
    };
    Box::new(SimClrV2::new(network, &settings))
}

fn simsiam() -> Box<dyn Method> {
    let settings = simsiam::Settings { embedding: 24, hidden: 16, ..Default::default() };
    // Twice the width: at four channels its gradients cancel below what f32 resolves.
    Box::new(SimSiam::new(&ResNetConfig { width: 8, ..small(1) }, &settings))
}

fn distillation() -> Box<dyn Method> {
    let settings = distill::Settings {
        temperature: 2.0,
        student: supervised::Settings { label_smoothing: 0.0, ..CLASSIFIER },
        teacher: distill::Teacher {
            file: String::new(),
            network: small(1),
            head_layers: 1,
            hidden: 32,
        },
    };
    Box::new(Distill::new(&small(1), &settings))
}

pub fn runs() -> Vec<Run> {
    let sgd = |nesterov| {
        let (momentum, weight_decay, exclude) = (0.9, 0.01, Exclude::Nothing);
        Rule::Sgd(Sgd { momentum, nesterov, weight_decay, exclude })
    };
    let lars = Rule::Lars(Lars::simclr(0.9, 0.01));
    let run = |name, method, rule, peak| {
        let sizes: &[(usize, usize)] = &[(2, 8)];
        Run { name, method, rule, peak, sizes, kinked: false }
    };
    let one = &[(1, 8)];
    let selective = || {
        let network = ResNetConfig { depth: 50, sk_ratio: 0.0625, ..small(1) };
        simclr_v2(&network, 0.5, 0)
    };
    let fine_tuning = || -> Box<dyn Method> {
        let (head_layers, hidden, label_smoothing, new_classifier) = (1, 32, 0.0, true);
        let settings = supervised::Settings {
            head_layers,
            hidden,
            label_smoothing,
            new_classifier,
            ..CLASSIFIER
        };
        Box::new(Supervised::new(&small(1), &settings))
    };
    vec![
        Run {
            sizes: &[(2, 16)],
            ..run("moco v1", || Box::new(MoCo::new(&small(2), &MOCO)), sgd(false), 0.005)
        },
        Run {
            sizes: &[(2, 16)],
            ..run("moco v2", || Box::new(MoCo::new(&small(2), &MOCO_V2)), sgd(false), 0.005)
        },
        Run { sizes: &[(2, 16)], kinked: true, ..run("simclr v2", selective, lars, 1e-6) },
        run("simclr v2 memory", || simclr_v2(&small(1), 0.1, 64), lars, 0.3),
        run(
            "byol",
            || Box::new(Byol::new(&small(1), &BYOL)),
            Rule::Lars(Lars::byol(0.9, 0.01)),
            0.3,
        ),
        Run { sizes: &[(2, 16)], ..run("simsiam", simsiam, sgd(false), 0.01) },
        Run {
            sizes: &[(2, 8), (2, 4)],
            ..run(
                "swav",
                || Box::new(Swav::new(&small(1), &SWAV)),
                Rule::Lars(Lars::larc(0.9, 0.01)),
                0.1,
            )
        },
        Run {
            sizes: one,
            ..run(
                "supervised",
                || Box::new(Supervised::new(&small(1), &CLASSIFIER)),
                sgd(true),
                0.05,
            )
        },
        Run { sizes: one, ..run("fine-tuning", fine_tuning, lars, 0.3) },
        Run { sizes: one, ..run("distillation", distillation, lars, 0.3) },
    ]
}

pub fn run_of(name: &str) -> Run {
    runs().into_iter().find(|run| run.name == name).unwrap()
}

impl Run {
    pub fn schedule(&self) -> Schedule {
        Schedule { peak: self.peak, total: STEPS as u64, ..Schedule::default() }
    }

    /// Images for which no ReLU input is so close to zero that rounding decides its sign.
    pub fn views(&self, goldens: &Goldens, device: &Device, step: usize) -> Vec<Tensor> {
        let draw = goldens.numbers(&format!("{}|draws", self.name))[step];
        let tensor = |(i, &(views, side)): (usize, &(usize, usize))| {
            let what = format!("{}|images {step}.{i}|draw {draw}", self.name);
            network::images(device, &what, [views * BATCH, side, side])
        };
        self.sizes.iter().enumerate().map(tensor).collect()
    }

    pub fn labels(&self, step: usize) -> Vec<i32> {
        let seed = seeded::seed(&format!("{}|labels {step}", self.name));
        seeded::indices(seed, BATCH, 5).into_iter().map(|label| label as i32).collect()
    }
}

/// A method, its weights and its optimiser at the start of a run.
pub struct Training {
    pub run: Run,
    pub method: Box<dyn Method>,
    pub online: Arena,
    pub optimizer: Optimizer,
}

impl Training {
    pub fn new(run: Run, device: &Device) -> Self {
        Self::of(run, (run.method)(), device)
    }

    pub fn of(run: Run, mut method: Box<dyn Method>, device: &Device) -> Self {
        let line = run.name;
        let online = network::seeded_arena(method.layout(), device, line);
        method.start(&online, &RUN_INFO).unwrap();
        for (name, part) in method.state() {
            match part {
                State::Network(target) if name == "target" => {
                    *target =
                        network::seeded_arena(target.layout(), device, &format!("{line}|target"));
                }
                State::Rows(rows) if name == "queue" || name == "memory" => {
                    let seed = seeded::seed(&format!("{line}|queue"));
                    write(rows, 0, &seeded::unit_rows(seed, rows.shape()[0], EMBEDDING));
                }
                _ => {}
            }
        }
        if let Some((_, teacher)) = method.teacher() {
            *teacher = network::seeded_arena(teacher.layout(), device, &format!("{line}|teacher"));
        }
        let optimizer = Optimizer::new(run.rule, &online);
        Self { run, method, online, optimizer }
    }

    /// Returns the loss and leaves the gradients in the arena.
    pub fn forward_and_backward(&mut self, goldens: &Goldens, step: usize, bug: Bug) -> f64 {
        let views = self.run.views(goldens, self.online.device(), step);
        self.method.labels(&self.run.labels(step)).unwrap();
        // All steps of an epoch use the momentum of its first step.
        let iteration = if bug == Bug::MomentumPerEpoch { step / 4 * 4 } else { step };
        self.method.prepare(iteration as u64);
        if bug != Bug::UnnormalisedPrototypes {
            self.method.before_step(&mut self.online);
        }
        let (method, factor) = (&mut self.method, if bug == Bug::HalvedLoss { 0.5 } else { 1.0 });
        let loss =
            tape::step(&mut self.online, |tape| ops::scale(&method.loss(tape, &views), factor));
        loss.unwrap().scalar()
    }

    pub fn update(&mut self, step: usize, bug: Bug) {
        let (method, schedule) = (&self.method, self.run.schedule());
        self.optimizer.set_policies(self.online.layout(), |slot| {
            if bug == Bug::IgnoredParamPolicies {
                ParamPolicy::Default
            } else {
                method.param_policy(slot, schedule.peak)
            }
        });
        self.optimizer.step(&mut self.online, schedule.lr(step as u64));
        self.method.after_update(&mut self.online, step as f64 / STEPS as f64);
        if bug == Bug::CopiedStatistics {
            let statistics = self.online.statistics().copy();
            for (_, part) in self.method.state() {
                if let State::Network(network) = part {
                    *network.statistics_mut() = statistics.copy();
                }
            }
        }
    }
}

/// A bug that an implementation shipped (docs/methods.md), switched on in a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    None,
    /// The loss is halved: BYOL averages its two directions, SimCLR takes the paper's mean.
    HalvedLoss,
    /// SwAV's prototypes are not normalised to unit length.
    UnnormalisedPrototypes,
    /// The optimiser ignores parameter policies: SwAV's prototypes move while frozen, SimSiam's predictor has a decaying learning
    /// rate, a new classifier is under LARS.
    IgnoredParamPolicies,
    /// BYOL's momentum changes per epoch instead of per step.
    MomentumPerEpoch,
    /// Running statistics are copied to the momentum encoder, which must keep its own.
    CopiedStatistics,
}

/// Compares the state after a step with the goldens.
fn check_state(
    goldens: &Goldens,
    name: &str,
    step: usize,
    training: &mut Training,
) -> Vec<Result<f64, String>> {
    let mut results = Vec::new();
    if !STEPS_WITH_STATE.contains(&step) {
        return results;
    }
    let all = |arena: &Arena| -> BTreeMap<String, Vec<f64>> {
        let mut slots = network::parameters(arena);
        slots.extend(network::statistics(arena));
        slots
    };
    let table = |part: &str, arena: &Arena| {
        goldens.check_table(&format!("{name}|{part}"), &all(arena), |_| EXACT)
    };
    results.extend(table("slots", &training.online));
    for (part, state) in training.method.state() {
        match state {
            State::Network(_) if part == "teacher" => {} // never changes
            State::Network(arena) => results.extend(table(part, arena)),
            State::Rows(rows) => {
                results
                    .push(goldens.record(&format!("{name}|{part}")).check(&rows.to_f64(), EXACT));
            }
            State::Count(_) => {}
        }
    }
    results
}

/// Biases that a following batch norm cancels: their gradients are zero up to rounding.
const CANCELLED: [&str; 3] = ["head.0.bias", "predictor.0.bias", "projector.0.bias"];

/// Compares gradients with the goldens of a step. Gradients that cancel pass if they are below `negligible`.
pub fn check_gradients(
    goldens: &Goldens,
    name: &str,
    online: &Arena,
    negligible: f64,
    tolerance: impl Fn(&Record<'_>) -> f64,
) -> Vec<Result<f64, String>> {
    let gradients = network::gradients(online);
    let results = goldens.check_table(&format!("{name}|gradients"), &gradients, tolerance);
    let normed = |slot: &str| {
        let norm = slot.replace(".bias", ".norm.weight");
        CANCELLED.contains(&slot) && gradients.contains_key(&norm)
    };
    let check = |(result, (slot, got)): (Result<f64, String>, (&String, &Vec<f64>))| {
        if !normed(slot) || got.is_empty() {
            return result;
        }
        let largest = got.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
        // `f64::max` ignores NaN, hence the check.
        if largest < negligible && got.iter().all(|v| v.is_finite()) { Ok(0.0) } else { result }
    };
    results.into_iter().zip(&gradients).map(check).collect()
}

/// Runs all steps on the reference device and compares each with the goldens.
pub fn free_running(mut training: Training, bug: Bug) -> Vec<Result<f64, String>> {
    let goldens = Goldens::open("methods");
    let mut results = Vec::new();
    for step in 0..STEPS {
        let name = format!("{}|{step}", training.run.name);
        let loss = training.forward_and_backward(&goldens, step, bug);
        results.push(goldens.record(&format!("{name}|loss")).check(&[loss], EXACT));
        results.extend(check_gradients(&goldens, &name, &training.online, 1e-12, |_| EXACT));
        training.update(step, bug);
        results.extend(check_state(&goldens, &name, step, &mut training));
    }
    results
}

#[test]
fn ten_steps_of_every_method_in_f64_agree_with_pytorch() {
    let device = Device::reference().poisoned();
    for run in runs() {
        report(run.name, free_running(Training::new(run, &device), Bug::None));
    }
}

#[test]
fn assignments_of_swav_in_f64_agree_with_pytorch() {
    let goldens = Goldens::open("methods");
    let run = run_of("swav");
    let mut swav = Swav::new(&small(1), &SWAV);
    let mut results = Vec::new();
    // `Training` boxes its method; here its type must be known.
    let device = Device::reference().poisoned();
    let mut online = network::seeded_arena(swav.layout(), &device, run.name);
    swav.start(&online, &RUN_INFO).unwrap();
    let mut optimizer = Optimizer::new(run.rule, &online);
    for step in 0..STEPS {
        let views = run.views(&goldens, &device, step);
        swav.prepare(step as u64);
        swav.before_step(&mut online);
        tape::step(&mut online, |tape| swav.loss(tape, &views)).unwrap();
        for (i, q) in swav.assignments().iter().enumerate() {
            let record = goldens.record(&format!("swav|{step}|assignments.{i}"));
            results.push(record.check(&q.to_f64(), EXACT));
        }
        optimizer.set_policies(swav.layout(), |slot| swav.param_policy(slot, run.peak));
        optimizer.step(&mut online, run.schedule().lr(step as u64));
        swav.after_update(&mut online, 0.0);
    }
    assert_eq!(results.len(), 2 * STEPS);
    report("assignments", results);
}

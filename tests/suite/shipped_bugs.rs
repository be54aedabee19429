//! Bugs that other implementations shipped (docs/methods.md lists them), switched on: each must make the comparison with PyTorch
//! fail.
//!
//! The methods contain no switches for them: a bug here is a different order of calls, an omitted call, a different setting, or a
//! method of this file that wraps the correct one.

use std::sync::Arc;

use selfsup::arena::{Arena, Layout};
use selfsup::device::Device;
use selfsup::methods::moco::{self, MoCo};
use selfsup::methods::swav::{self, Swav};
use selfsup::methods::{Method, RunInfo, State};
use selfsup::nn::ResNet;
use selfsup::ops;
use selfsup::tape::{self, Tape, Var};
use selfsup::tensor::Tensor;

use crate::golden::Goldens;
use crate::methods::{
    BATCH, Bug, MOCO, MOCO_V2, RUN_INFO, SWAV, Training, free_running, run_of, runs, small,
};
use crate::network;

/// MoCo that puts its keys into the queue before it computes the logits.
struct EnqueueBeforeLogits(MoCo);

impl Method for EnqueueBeforeLogits {
    fn layout(&self) -> &Arc<Layout> {
        self.0.layout()
    }
    fn backbone(&self) -> &ResNet {
        self.0.backbone()
    }
    fn start(&mut self, online: &Arena, run: &RunInfo) -> selfsup::Result<()> {
        self.0.start(online, run)
    }
    fn prepare(&mut self, iteration: u64) {
        self.0.prepare(iteration);
    }
    fn before_step(&mut self, online: &mut Arena) {
        self.0.before_step(online);
    }
    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let keys = self.0.encode_keys(&views[0].rows(BATCH, BATCH), 0);
        for (name, part) in self.0.state() {
            if let (State::Rows(queue), "queue") = (part, name) {
                let front = Tensor::from_slice(queue.device(), [1], &[0]);
                ops::write_rows(queue, &front, &keys);
            }
        }
        self.0.loss(tape, views)
    }
    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.0.take_embeddings()
    }
    fn after_update(&mut self, online: &mut Arena, progress: f64) {
        self.0.after_update(online, progress);
    }
    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        self.0.state()
    }
}

/// The symmetric loss of lightly's benchmark, where keys of the first half are negatives of the second. The engine rejects the
/// write because the backward pass still needs the queue. Returns whether it did.
fn enqueueing_between_halves_panics() -> bool {
    let device = Device::reference();
    let run = run_of("moco v2");
    let mut method = MoCo::new(&small(2), &MOCO_V2);
    let mut online = network::seeded_arena(method.layout(), &device, run.name);
    method.start(&online, &RUN_INFO).unwrap();
    method.prepare(0);
    let views = run.views(&Goldens::open("methods"), &device, 0);
    let (x1, x2) = (views[0].rows(0, BATCH), views[0].rows(BATCH, BATCH));
    let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tape::step(&mut online, |tape| {
            let first = method.half(tape, [&x1, &x2], 0);
            method.enqueue();
            ops::add(&first, &method.half(tape, [&x2, &x1], 1))
        })
    }));
    let message = attempt.err().and_then(|panic| panic.downcast::<String>().ok());
    message.is_some_and(|text| text.contains("another tensor still shares its memory"))
}

/// Whether `bug` makes a comparison fail whose name contains `place`.
fn caught(run: &str, bug: Bug, place: &str) -> bool {
    let device = Device::reference();
    let results = free_running(Training::new(run_of(run), &device), bug);
    results.iter().any(|result| result.as_ref().is_err_and(|e| e.contains(place)))
}

fn caught_in(run: &str, method: Box<dyn Method>, place: &str) -> bool {
    let device = Device::reference();
    let training = Training::of(run_of(run), method, &device);
    let results = free_running(training, Bug::None);
    results.iter().any(|result| result.as_ref().is_err_and(|e| e.contains(place)))
}

#[test]
fn shipped_bugs_are_caught() {
    let unshuffled = moco::Settings { shuffle: false, ..MOCO };
    let checks: Vec<(&str, bool)> = vec![
        (
            "BYOL averages its two directions: in the loss",
            caught("byol", Bug::HalvedLoss, "|0|loss"),
        ),
        (
            "BYOL averages its two directions: in the weights",
            caught("byol", Bug::HalvedLoss, "|9|slots"),
        ),
        (
            "prototypes are not normalised to unit length",
            caught("swav", Bug::UnnormalisedPrototypes, "|0|loss"),
        ),
        ("prototypes move while frozen", caught("swav", Bug::IgnoredParamPolicies, "|0|slots")),
        (
            "MoCo's keys enter the queue before the logits",
            caught_in(
                "moco v1",
                Box::new(EnqueueBeforeLogits(MoCo::new(&small(2), &MOCO))),
                "|0|loss",
            ),
        ),
        (
            "keys enter the queue between the halves of a symmetric loss",
            enqueueing_between_halves_panics(),
        ),
        ("BYOL's momentum changes per epoch", caught("byol", Bug::MomentumPerEpoch, "|9|target")),
        (
            "the learning rate of SimSiam's predictor decays",
            caught("simsiam", Bug::IgnoredParamPolicies, "|9|slots|predictor"),
        ),
        ("SimCLR v2's loss is halved", caught("simclr v2 memory", Bug::HalvedLoss, "|0|loss")),
        (
            "running statistics are copied to the momentum encoder",
            caught("moco v1", Bug::CopiedStatistics, "|0|key"),
        ),
        (
            "MoCo's keys are not shuffled",
            caught_in("moco v1", Box::new(MoCo::new(&small(2), &unshuffled)), "|0|loss"),
        ),
        (
            "a new classifier is under LARS",
            caught("fine-tuning", Bug::IgnoredParamPolicies, "|9|slots|fc.weight"),
        ),
        (
            "SwAV runs without Sinkhorn",
            caught_in(
                "swav",
                Box::new(Swav::new(&small(1), &swav::Settings { sinkhorn_iterations: 0, ..SWAV })),
                "|0|loss",
            ),
        ),
        (
            "SwAV runs without its queue",
            caught_in(
                "swav",
                Box::new(Swav::new(&small(1), &swav::Settings { queue: 0, ..SWAV })),
                "|6|loss",
            ),
        ),
    ];
    let missed: Vec<&str> = checks.iter().filter(|(_, caught)| !caught).map(|(n, _)| *n).collect();
    println!("shipped bugs caught: {} of {}", checks.len() - missed.len(), checks.len());
    assert!(missed.is_empty(), "bugs that no comparison caught: {missed:#?}");
}

/// lightly's prototypes have a bias; here it would show as a second slot.
#[test]
fn prototypes_have_no_bias() {
    let swav = Swav::new(&small(1), &SWAV);
    let names = swav.layout().params().iter().filter(|slot| slot.name.starts_with("prototypes"));
    assert_eq!(names.map(|slot| &*slot.name).collect::<Vec<_>>(), ["prototypes.weight"]);
}

/// Shipped bug: checkpoints without the queue or the target network. Loading a file that lacks a part must fail.
#[test]
fn a_checkpoint_restores_the_complete_state_of_each_method() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu(1).unwrap();
    let goldens = Goldens::open("methods");
    for run in runs() {
        let mut training = Training::new(run, &device);
        // SwAV's queue starts in step 4.
        for step in 0..6 {
            training.forward_and_backward(&goldens, step, Bug::None);
            training.update(step, Bug::None);
        }
        let saved = values_of(&mut *training.method);
        let state = training.method.state();
        let path = selfsup::train::save(
            folder.path(),
            2,
            &training.online,
            &training.optimizer,
            state,
            Default::default(),
            1,
        )
        .unwrap();
        let mut fresh = Training::new(run, &device);
        // The teacher is state that never changes.
        if !saved.is_empty() && run.name != "distillation" {
            assert_ne!(
                values_of(&mut *fresh.method),
                saved,
                "{}: the state did not change",
                run.name
            );
        }
        selfsup::train::load_state(&path, fresh.method.state()).unwrap();
        assert_eq!(values_of(&mut *fresh.method), saved, "{}", run.name);
        // The file does not hold the state of another method.
        let mut other =
            Training::new(run_of(if run.name == "byol" { "swav" } else { "byol" }), &device);
        let error =
            selfsup::train::load_state(&path, other.method.state()).unwrap_err().to_string();
        assert!(error.contains("has no tensor method."), "{error}");
    }
}

fn values_of(method: &mut dyn Method) -> Vec<(&'static str, Vec<f64>)> {
    let values = |(name, part): (&'static str, State<'_>)| match part {
        State::Network(network) => {
            let mut all = network.values().to_f64();
            all.extend(network.statistics().to_f64());
            (name, all)
        }
        State::Rows(rows) => (name, rows.to_f64()),
        State::Count(count) => (name, vec![*count as f64]),
    };
    method.state().into_iter().map(values).collect()
}

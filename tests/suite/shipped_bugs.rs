//! Faults that people shipped (references: methods.md 6.1), switched on: each must make the comparison with PyTorch fail.
//!
//! They are not in the methods: a fault is another order of calls, a call left out, another setting, or a method of this file
//! around the right one.

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
    BATCH, COURSE, Fault, MOCO, MOCO_V2, SWAV, Training, free_running, run_of, runs, small,
};
use crate::network;

/// A MoCo whose keys are in the queue before the logits are: (d).
struct EagerMoCo(MoCo);

impl Method for EagerMoCo {
    fn layout(&self) -> &Arc<Layout> {
        self.0.layout()
    }
    fn backbone(&self) -> &ResNet {
        self.0.backbone()
    }
    fn start(&mut self, online: &Arena, course: &RunInfo) -> selfsup::Result<()> {
        self.0.start(online, course)
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

/// The symmetric loss as lightly's benchmark has it: keys of the first half are negatives of the second. The engine does not
/// let it happen: the queue is saved for the backward pass.
fn enqueues_between_the_halves() -> bool {
    let device = Device::reference();
    let run = run_of("moco v2");
    let mut method = MoCo::new(&small(2), &MOCO_V2);
    let mut online = network::seeded_arena(method.layout(), &device, run.name);
    method.start(&online, &COURSE).unwrap();
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

/// Whether a fault shows where it must: in a comparison whose name has `place` in it.
fn caught(run: &str, fault: Fault, place: &str) -> bool {
    let device = Device::reference();
    let results = free_running(Training::new(run_of(run), &device), fault);
    results.iter().any(|result| result.as_ref().is_err_and(|e| e.contains(place)))
}

fn caught_in(run: &str, method: Box<dyn Method>, place: &str) -> bool {
    let device = Device::reference();
    let training = Training::of(run_of(run), method, &device);
    let results = free_running(training, Fault::None);
    results.iter().any(|result| result.as_ref().is_err_and(|e| e.contains(place)))
}

#[test]
fn shipped_bugs_are_caught() {
    let unshuffled = moco::Settings { shuffle: false, ..MOCO };
    let constant_predictor = "simsiam";
    let checks: Vec<(&str, bool)> = vec![
        ("a: the mean of BYOL's two directions", caught("byol", Fault::HalfTheLoss, "|0|loss")),
        ("a: and it shows in the weights", caught("byol", Fault::HalfTheLoss, "|9|slots")),
        (
            "c: prototypes are not brought to unit length",
            caught("swav", Fault::PrototypesNotNormalised, "|0|loss"),
        ),
        ("c: prototypes move while frozen", caught("swav", Fault::NothingSpecial, "|0|slots")),
        (
            "d: MoCo's keys are in the queue before the logits",
            caught_in("moco v1", Box::new(EagerMoCo(MoCo::new(&small(2), &MOCO))), "|0|loss"),
        ),
        ("d: keys enter between the halves of a symmetric loss", enqueues_between_the_halves()),
        (
            "f: BYOL's momentum moves by epochs",
            caught("byol", Fault::MomentumByEpochs, "|9|target"),
        ),
        (
            "g: the predictor's learning rate decays",
            caught(constant_predictor, Fault::NothingSpecial, "|9|slots|predictor"),
        ),
        ("i: half of SimCLR v2's loss", caught("simclr v2 memory", Fault::HalfTheLoss, "|0|loss")),
        (
            "1.0: running statistics are copied to the key encoder",
            caught("moco v1", Fault::StatisticsCopied, "|0|key"),
        ),
        (
            "1.1: keys are not shuffled",
            caught_in("moco v1", Box::new(MoCo::new(&small(2), &unshuffled)), "|0|loss"),
        ),
        (
            "1.4: a new classifier under LARS",
            caught("fine-tuning", Fault::NothingSpecial, "|9|slots|fc.weight"),
        ),
        (
            "1.5: Sinkhorn left out",
            caught_in(
                "swav",
                Box::new(Swav::new(&small(1), &swav::Settings { sinkhorn_iterations: 0, ..SWAV })),
                "|0|loss",
            ),
        ),
        (
            "1.5: the queue left out",
            caught_in(
                "swav",
                Box::new(Swav::new(&small(1), &swav::Settings { queue: 0, ..SWAV })),
                "|6|loss",
            ),
        ),
    ];
    let missed: Vec<&str> = checks.iter().filter(|(_, caught)| !caught).map(|(n, _)| *n).collect();
    println!("shipped bugs caught: {} of {}", checks.len() - missed.len(), checks.len());
    assert!(missed.is_empty(), "passed although wrong: {missed:#?}");
}

/// (c) again: a bias would be one more slot.
#[test]
fn prototypes_have_no_bias() {
    let swav = Swav::new(&small(1), &SWAV);
    let names = swav.layout().params().iter().filter(|slot| slot.name.starts_with("prototypes"));
    assert_eq!(names.map(|slot| &*slot.name).collect::<Vec<_>>(), ["prototypes.weight"]);
}

/// (j): what a checkpoint holds is what a method owns, and a file that lacks a part of it is refused.
#[test]
fn checkpoints_hold_what_methods_own() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu(1).unwrap();
    let goldens = Goldens::open("methods");
    for run in runs() {
        let mut training = Training::new(run, &device);
        // SwAV's queue starts in step 4.
        for step in 0..6 {
            training.forward_and_backward(&goldens, step, Fault::None);
            training.update(step, Fault::None);
        }
        let own = values_of(&mut *training.method);
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
        // A teacher is owned, and never moves.
        if !own.is_empty() && run.name != "distillation" {
            assert_ne!(values_of(&mut *fresh.method), own, "{}: nothing moved", run.name);
        }
        selfsup::train::load_state(&path, fresh.method.state()).unwrap();
        assert_eq!(values_of(&mut *fresh.method), own, "{}", run.name);
        // Another method's state is not in there.
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

//! Ten steps of SimCLR against PyTorch: free-running in f64, and step by step in f32 from the f64 state.

use std::collections::BTreeMap;

use selfsup::arena::{Arena, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::methods::Method;
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::ops;
use selfsup::optim::{Exclude, Lars, Optimizer, Rule, Schedule, Sgd};
use selfsup::tape;
use selfsup::tensor::Tensor;

use crate::audit::drift;
use crate::case::write;
use crate::compare::{close, report};
use crate::driver::{gpu, unchecked};
use crate::golden::{Goldens, Record};
use crate::network;

const STEPS: usize = 10;
/// Rows of a batch: two views of eight images.
const ROWS: usize = 16;
const SIDE: usize = 16;

/// The settings of a run; `scripts/goldens/steps.py` has the same.
#[derive(Clone, Debug)]
struct Run {
    name: &'static str,
    temperature: f64,
    schedule: Schedule,
    rule: Rule,
}

fn runs() -> [Run; 3] {
    let sgd =
        |nesterov, exclude| Rule::Sgd(Sgd { momentum: 0.9, nesterov, weight_decay: 1e-3, exclude });
    let run = |name, temperature, peak, warmup, rule| Run {
        name,
        temperature,
        schedule: Schedule { peak, warmup, total: STEPS as u64, ..Schedule::default() },
        rule,
    };
    [
        run("simclr lars", 0.1, 0.3, 3, Rule::Lars(Lars::simclr(0.9, 1e-4))),
        run("simclr sgd", 0.5, 0.05, 0, sgd(false, Exclude::Nothing)),
        run("simclr nesterov", 0.5, 0.05, 2, sgd(true, Exclude::BiasAndNorm)),
    ]
}

impl Run {
    fn method(&self) -> SimClr {
        let network = ResNetConfig {
            depth: 18,
            width: 8,
            stem: Stem::Small,
            zero_init_residual: false,
            norm_groups: 1,
            sk_ratio: 0.0,
            bottleneck: 1,
            project: false,
            same_pool: false,
            channels: 3,
        };
        let settings = Settings {
            temperature: self.temperature,
            hidden: 64,
            embedding: 24,
            ..Settings::default()
        };
        SimClr::new(&network, &settings)
    }

    /// Images for which no ReLU input is so close to zero that rounding decides its sign.
    fn views(&self, goldens: &Goldens, device: &Device, step: usize) -> [Tensor; 1] {
        let draw = goldens.numbers(&format!("{}|draws", self.name))[step];
        let what = format!("{}|images {step}|draw {draw}", self.name);
        [network::images(device, &what, [ROWS, SIDE, SIDE])]
    }
}

/// Compares a loss and its gradients with the goldens of a step.
fn check_gradients(
    goldens: &Goldens,
    name: &str,
    loss: f64,
    arena: &Arena,
    [of_loss, of_gradients]: [&dyn Fn(&Record<'_>) -> f64; 2],
) -> Vec<Result<f64, String>> {
    let record = goldens.record(&format!("{name}|loss"));
    let mut results = vec![record.check(&[loss], of_loss(&record))];
    let gradients = network::gradients(arena);
    results.extend(goldens.check_table(&format!("{name}|gradients"), &gradients, of_gradients));
    results
}

/// Compares parameters and running statistics after a step with the goldens.
fn check_slots(goldens: &Goldens, name: &str, arena: &Arena) -> Vec<Result<f64, String>> {
    let mut slots: BTreeMap<_, _> = network::parameters(arena);
    slots.extend(network::statistics(arena));
    goldens.check_table(&format!("{name}|slots"), &slots, |_| EXACT)
}

const EXACT: f64 = 1e-8;

/// Runs all steps on the reference device with the loss times `factor`.
fn free_running(run: &Run, factor: f64, rule: Rule) -> Vec<Result<f64, String>> {
    let device = Device::reference().poisoned();
    let goldens = Goldens::open("steps");
    let mut method = run.method();
    let mut arena = network::seeded_arena(method.layout(), &device, run.name);
    let mut optimizer = Optimizer::new(rule, &arena);
    let mut results = Vec::new();
    for step in 0..STEPS {
        let views = run.views(&goldens, &device, step);
        method.prepare(step as u64);
        let loss = tape::step(&mut arena, |tape| ops::scale(&method.loss(tape, &views), factor));
        let name = format!("{}|{step}", run.name);
        let (loss, exact) = (loss.unwrap().scalar(), |_: &Record<'_>| EXACT);
        results.extend(check_gradients(&goldens, &name, loss, &arena, [&exact, &exact]));
        optimizer.step(&mut arena, run.schedule.lr(step as u64));
        method.after_update(&mut arena, step as f64 / STEPS as f64);
        results.extend(check_slots(&goldens, &name, &arena));
    }
    results
}

#[test]
fn ten_steps_of_simclr_in_f64_agree_with_pytorch() {
    let names = Goldens::open("steps").names().count();
    assert_eq!(names, (3 * STEPS + 1) * runs().len(), "run scripts/make-goldens");
    for run in runs() {
        report(run.name, free_running(&run, 1.0, run.rule));
    }
}

/// Runs each step from the golden state: that of the reference device, which the test above compares with PyTorch.
fn teacher_forced(what: &str, device: &Device) {
    let reference = Device::reference();
    let goldens = Goldens::open("steps");
    for run in runs() {
        let mut method = run.method();
        let mut reference_arena = network::seeded_arena(method.layout(), &reference, run.name);
        let mut arena = Arena::new(method.layout(), device, 0);
        let mut optimizer = Optimizer::new(run.rule, &reference_arena);
        let mut results = Vec::new();
        for step in 0..STEPS {
            write(arena.values_mut(), 0, &reference_arena.values().to_f64());
            write(arena.statistics_mut(), 0, &reference_arena.statistics().to_f64());
            let views = run.views(&goldens, device, step);
            let loss = tape::step(&mut arena, |tape| method.loss(tape, &views));
            results.extend(check_gradients(
                &goldens,
                &format!("{}|{step}", run.name),
                loss.unwrap().scalar(),
                &arena,
                [&|_| 1e-5, &|record| record.tolerance(1e-4)],
            ));
            let views = run.views(&goldens, &reference, step);
            tape::step(&mut reference_arena, |tape| method.loss(tape, &views)).unwrap();
            optimizer.step(&mut reference_arena, run.schedule.lr(step as u64));
        }
        report(&format!("{} on the {what}", run.name), results);
    }
}

#[test]
fn every_step_of_simclr_on_the_cpu_from_the_golden_state_agrees_with_pytorch() {
    teacher_forced("CPU", &Device::cpu(2).unwrap().poisoned());
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_step_of_simclr_on_a_gpu_from_the_golden_state_agrees_with_pytorch() {
    unchecked(
        "steps::every_step_of_simclr_on_a_gpu_from_the_golden_state_agrees_with_pytorch",
        || teacher_forced("GPU", &gpu(Precision::F32)),
    );
}

#[test]
fn a_step_of_simclr_on_the_cpu_in_bf16_is_audited_layer_by_layer() {
    audited(&Device::cpu(2).unwrap().with_precision(Precision::Bf16).unwrap().poisoned());
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_step_of_simclr_in_bf16_is_audited_layer_by_layer() {
    unchecked("steps::a_step_of_simclr_in_bf16_is_audited_layer_by_layer", || {
        audited(&gpu(Precision::Bf16));
    });
}

/// bf16 rounds every activation of a network, and a ReLU whose input is near zero may then decide differently: gradients of the
/// complete network cannot meet an op's tolerance (`audit.rs` checks that layer by layer). The yardstick here is the reference
/// with only its weights rounded to bf16; the test prints the errors of every tensor next to it.
fn audited(device: &Device) {
    /// Not only weights are rounded but also images, activations and gradients, each once per layer.
    const TIMES: f64 = 3.0;
    let reference = Device::reference();
    let goldens = Goldens::open("steps");
    let mut results = Vec::new();
    for run in runs().iter().take(2) {
        let mut method = run.method();
        let mut forward_and_backward = |device: &Device, rounded: bool| {
            let mut arena = network::seeded_arena(method.layout(), device, run.name);
            if rounded {
                round_weights(&mut arena);
            }
            let views = run.views(&goldens, device, 0);
            let loss = tape::step(&mut arena, |tape| method.loss(tape, &views)).unwrap();
            let z = method.take_embeddings().unwrap();
            let mut all = network::gradients(&arena);
            all.extend(network::statistics(&arena));
            let gradients = arena.gradients().to_f64();
            all.insert("embeddings".into(), z.to_f64());
            all.insert("loss".into(), vec![loss.scalar()]);
            all.insert("gradients, all together".into(), gradients);
            all
        };
        let [got, rounded, want] = [(device, false), (&reference, true), (&reference, false)]
            .map(|(device, rounded)| forward_and_backward(device, rounded));
        device.check().unwrap();
        println!("{}: relative errors in bf16 | of f64 with weights rounded to bf16", run.name);
        for (slot, want) in &want {
            let [error, yardstick] = [&got, &rounded].map(|of| drift(&of[slot], want));
            println!("{slot:40}{error:10.1e} |{yardstick:9.1e}");
        }
        for part in ["embeddings", "gradients, all together"] {
            let name = format!("{}|{part}", run.name);
            let allowed = TIMES * drift(&rounded[part], &want[part]);
            results.push(close(&name, &got[part], &want[part], allowed));
        }
        results.push(close(&format!("{}|loss", run.name), &got["loss"], &want["loss"], 1e-2));
    }
    report(&format!("SimCLR on {device}"), results);
}

/// Rounds to bf16 the weights that are multiplied in bf16.
fn round_weights(arena: &mut Arena) {
    for slot in arena.layout().clone().params() {
        if matches!(slot.kind, SlotKind::Filter | SlotKind::Matrix) {
            let values = arena.slot_values(slot);
            let rounded = values.iter().map(|v| half::bf16::from_f64(*v).to_f64());
            write(arena.values_mut(), slot.offset, &rounded.collect::<Vec<_>>());
        }
    }
}

/// The failures that concern the state after the steps, not the loss.
fn about_slots(results: Vec<Result<f64, String>>) -> Vec<String> {
    results.into_iter().filter_map(Result::err).filter(|e| e.contains("|slots")).collect()
}

/// Shipped bug: SimCLR's loss as the paper's mean, half of the reference code's.
#[test]
fn half_of_the_loss_of_simclr_is_caught() {
    for run in runs() {
        let results = free_running(&run, 0.5, run.rule);
        assert!(results.iter().any(|r| r.as_ref().is_err_and(|e| e.contains("|0|loss"))));
        assert!(!about_slots(results).is_empty(), "{}: the weights did not differ", run.name);
    }
}

/// Optimiser settings that recipes get wrong: each must show in the weights.
#[test]
fn a_wrong_setting_of_the_optimizer_is_caught() {
    let [lars, sgd, _] = runs();
    let Rule::Lars(simclr) = lars.rule else { panic!("the first run is LARS") };
    for wrong in [
        Lars { exclude: Exclude::Nothing, ..simclr },
        Lars { lr_in_momentum: false, ..simclr },
        Lars { weight_decay: 0.0, ..simclr },
    ] {
        let complaints = about_slots(free_running(&lars, 1.0, Rule::Lars(wrong)));
        assert!(!complaints.is_empty(), "{wrong:?} passed");
    }
    let Rule::Sgd(plain) = sgd.rule else { panic!("the second run is SGD") };
    for wrong in [Sgd { exclude: Exclude::BiasAndNorm, ..plain }, Sgd { nesterov: true, ..plain }] {
        let complaints = about_slots(free_running(&sgd, 1.0, Rule::Sgd(wrong)));
        assert!(!complaints.is_empty(), "{wrong:?} passed");
    }
}

//! Captured steps on a GPU: they give the same bits as launched ones, allocate nothing and never wait, and failures are reported.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use selfsup::arena::{Arena, Layout, Slot};
use selfsup::data::Batch;
use selfsup::device::{Device, Precision};
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::methods::{Method, RunInfo, State};
use selfsup::nn::ResNet;
use selfsup::optim::{Lars, Optimizer, ParamPolicy, Rule, Schedule, ema};
use selfsup::recipes::Recipe;
use selfsup::tape::{self, Tape, Var};
use selfsup::tensor::{DType, Numbers, Tensor};
use selfsup::train::{
    EpochReport, Run, StepReport, StepResult, Steps, Training, Watch, load_weights, newest,
};

use crate::driver::{StandIn, alone, gpu, on_stand_in, unchecked, with_driver};
use crate::methods::{self, small};
use crate::network;

const BATCH: usize = 4;
const SIDE: usize = 8;

/// SimCLR in two phases: at first its backbone's stem is frozen. A second network follows, its momentum growing by the step.
struct Phased {
    simclr: SimClr,
    follower: Option<(Arena, Numbers<f64>)>,
    change: u64,
    frozen: bool,
}

impl Phased {
    fn new(change: u64) -> Self {
        let settings =
            Settings { temperature: 0.2, hidden: 16, embedding: 8, ..Settings::default() };
        let simclr = SimClr::new(&small(1), &settings);
        Self { simclr, follower: None, change, frozen: true }
    }
}

impl Method for Phased {
    fn layout(&self) -> &Arc<Layout> {
        self.simclr.layout()
    }

    fn backbone(&self) -> &ResNet {
        self.simclr.backbone()
    }

    fn start(&mut self, online: &Arena, _: &RunInfo) -> selfsup::Result<()> {
        self.follower = Some((online.twin(), Numbers::new(online.device(), &[0.0])));
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        self.frozen = iteration < self.change;
        if let Some((_, momentum)) = &mut self.follower {
            momentum.set(&[iteration as f64 / 16.0]);
        }
    }

    fn phase(&self) -> u32 {
        u32::from(self.frozen)
    }

    fn param_policy(&self, slot: &Slot, _: f64) -> ParamPolicy {
        let stem = slot.name == "backbone.conv1.weight";
        if self.frozen && stem { ParamPolicy::Frozen } else { ParamPolicy::Default }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.simclr.loss(tape, views)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.simclr.take_embeddings()
    }

    fn after_update(&mut self, online: &mut Arena, _: f64) {
        let (follower, momentum) = self.follower.as_mut().expect("created by start");
        ema(follower, online, momentum);
    }
}

/// The results that must be equal bit for bit.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub losses: Vec<(u64, f64)>,
    pub tensors: Vec<Vec<f64>>,
}

/// A training run whose steps the test drives: `evaluate` and then `watch` run before each step.
pub struct ManualRun {
    device: Device,
    method: Phased,
    online: Arena,
    optimizer: Optimizer,
    schedule: Schedule,
    pub steps: Steps,
    /// Pixels of a side of its images.
    pub side: usize,
    losses: Vec<StepResult>,
}

impl ManualRun {
    pub fn new(device: &Device, change: u64, captures: bool) -> Self {
        let mut method = Phased::new(change);
        let online = Arena::new(method.layout(), device, 3);
        let run_info = RunInfo { seed: 3, batch: BATCH, images: 24, per_epoch: 6, total: 12 };
        method.start(&online, &run_info).unwrap();
        let mut optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &online);
        method.prepare(0);
        optimizer.set_policies(online.layout(), |slot| method.param_policy(slot, 0.3));
        let steps = Steps::new(device);
        Self {
            device: device.clone(),
            method,
            online,
            optimizer,
            schedule: Schedule { peak: 0.3, warmup: 3, total: 12, ..Schedule::default() },
            steps: if captures { steps } else { steps.without_capture() },
            side: SIDE,
            losses: Vec::new(),
        }
    }

    pub fn batch(&self, iteration: u64) -> Batch {
        let what = format!("images {iteration}");
        let images = network::images(&self.device, &what, [2 * BATCH, self.side, self.side]);
        Batch {
            epoch: 0,
            position: iteration as usize,
            indices: vec![0; BATCH],
            labels: vec![-1; BATCH],
            crops: vec![images.cast(DType::of_activations(&self.device))],
        }
    }

    pub fn step(&mut self, iteration: u64) -> selfsup::Result<()> {
        let batch = self.batch(iteration);
        self.step_with(batch, iteration)
    }

    pub fn step_with(&mut self, batch: Batch, iteration: u64) -> selfsup::Result<()> {
        let training = Training {
            method: &mut self.method,
            online: &mut self.online,
            optimizer: &mut self.optimizer,
            schedule: &self.schedule,
        };
        let known = self.steps.run(training, &batch, iteration)?;
        self.losses.extend(known);
        Ok(())
    }

    /// An evaluation like the one at the end of an epoch.
    fn evaluate(&mut self) -> Vec<f64> {
        self.losses.extend(self.steps.finish().unwrap());
        let images = self.batch(99).crops.remove(0);
        let features =
            tape::evaluate(&self.online, |tape| self.method.simclr.embed(&tape.input(&images)));
        features.unwrap().to_f64()
    }

    pub fn left(mut self, mut tensors: Vec<Vec<f64>>) -> Outcome {
        self.losses.extend(self.steps.finish().unwrap());
        let (follower, _) = self.method.follower.as_ref().unwrap();
        tensors.extend([self.online.values().to_f64(), self.online.statistics().to_f64()]);
        tensors.extend([follower.values().to_f64(), self.optimizer.momentum().to_f64()]);
        tensors.push(self.steps.embeddings().unwrap().to_f64());
        Outcome { losses: self.losses.iter().map(|done| (done.step, done.loss)).collect(), tensors }
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn captured_steps_equal_launched_steps_over_two_phases_with_an_evaluation_between() {
    let name = "graph_replay::captured_steps_equal_launched_steps_over_two_phases_with_an_evaluation_between";
    unchecked(name, || {
        let device = gpu(Precision::F32);
        let run = |captures: bool| {
            let mut manual = ManualRun::new(&device, 4, captures);
            let mut seen = Vec::new();
            for iteration in 0..8 {
                if iteration == 3 {
                    seen.push(manual.evaluate());
                }
                manual.step(iteration).unwrap();
            }
            manual.left(seen)
        };
        let (launched, captured) = (run(false), run(true));
        let steps: Vec<u64> = launched.losses.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, (1..=8).collect::<Vec<_>>());
        assert!(launched.tensors.iter().flatten().all(|v| v.is_finite()));
        assert_eq!(captured, launched);
    });
}

/// Runs `count` steps of a method, `before` before each of them; `views` gives the views of each side.
pub fn some_steps(
    name: &str,
    views: &[(usize, usize)],
    count: usize,
    device: &Device,
    (captures, recompute): (bool, bool),
    mut before: impl FnMut(usize),
) -> Outcome {
    let run = methods::run_of(name);
    let mut state = methods::Training::new(run, device);
    state.online = state.online.with_recompute(recompute);
    let steps = Steps::new(device);
    let mut steps = if captures { steps } else { steps.without_capture() };
    let (schedule, mut losses) = (run.schedule(), Vec::new());
    state.method.prepare(0);
    let (online, method) = (&state.online, &state.method);
    state.optimizer.set_policies(online.layout(), |slot| method.param_policy(slot, schedule.peak));
    for step in 0..count {
        before(step);
        let crops = views.iter().map(|&(views, side)| {
            let what = format!("{name}, step {step}, side {side}");
            let images = network::images(device, &what, [views * methods::BATCH, side, side]);
            images.cast(DType::of_activations(device))
        });
        let crops = crops.collect();
        let labels = run.labels(step);
        let batch = Batch { epoch: 0, position: step, indices: Vec::new(), labels, crops };
        let training = Training {
            method: &mut *state.method,
            online: &mut state.online,
            optimizer: &mut state.optimizer,
            schedule: &schedule,
        };
        losses.extend(steps.run(training, &batch, step as u64).unwrap());
    }
    losses.extend(steps.finish().unwrap());
    let mut tensors = vec![state.online.values().to_f64(), state.online.statistics().to_f64()];
    for (_, part) in state.method.state() {
        tensors.push(match part {
            State::Network(network) => network.values().to_f64(),
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        });
    }
    tensors.extend(steps.embeddings().map(Tensor::to_f64));
    Outcome { losses: losses.iter().map(|done| (done.step, done.loss)).collect(), tensors }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn captured_steps_of_methods_with_numbers_equal_launched_steps() {
    unchecked("graph_replay::captured_steps_of_methods_with_numbers_equal_launched_steps", || {
        let device = gpu(Precision::Bf16);
        // These methods use every kind of `Numbers`; SwAV's steps pass through four phases.
        let two: &[(usize, usize)] = &[(2, 8)];
        for (name, views, count) in [
            ("moco v2", two, 4),
            ("simclr v2 memory", two, 4),
            ("swav", &[(2, 8), (2, 4)], 9),
            ("supervised", &[(1, 8)], 3),
        ] {
            let [launched, captured, recomputed] = [(false, false), (true, false), (true, true)]
                .map(|how| some_steps(name, views, count, &device, how, |_| {}));
            let finite = launched.tensors.iter().flatten().all(|v| v.is_finite());
            assert!(finite && launched.losses.len() == count, "{name}: {launched:?}");
            assert!(captured == launched, "{name}: {captured:?}, launched {launched:?}");
            assert!(recomputed == launched, "{name}: {recomputed:?}, launched {launched:?}");
        }
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_step_after_the_first_two_allocates_nothing_and_never_waits() {
    alone("graph_replay::a_step_after_the_first_two_allocates_nothing_and_never_waits", |driver| {
        driver.check(false);
        let device = gpu(Precision::Bf16);
        for captures in [true, false] {
            let mut manual = ManualRun::new(&device, 0, captures);
            let counts =
                || ["allocations", "waits", "cuGraphLaunch"].map(|what| driver.count(what));
            let mut steps = Vec::new();
            for iteration in 0..6 {
                let before = counts();
                manual.step(iteration).unwrap();
                let after = counts();
                steps.push([0, 1, 2].map(|i| after[i] - before[i]));
            }
            println!("allocations, waits and replays of each step: {steps:?}");
            assert!(!captures || steps[0][0] > 10, "the driver counts allocations: {steps:?}");
            let replays = u64::from(captures);
            assert_eq!(steps[2..], [[0, 0, replays]; 4], "{steps:?}");
            let before = counts();
            manual.evaluate();
            assert!(counts()[1] > before[1], "the driver counts waits");
        }
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_without_memory_uses_slightly_larger_blocks_and_returns_others() {
    alone(
        "graph_replay::a_gpu_without_memory_uses_slightly_larger_blocks_and_returns_others",
        |driver| {
            let device = gpu(Precision::F32);
            let take = |bytes: usize| Tensor::empty(&device, DType::F32, [bytes / 4]);
            drop(take(5120));
            let before = device.memory_use();
            driver.fail("cuMemAlloc", 1, OUT_OF_MEMORY);
            drop(take(4096)); // a quarter smaller
            assert_eq!(device.memory_use().allocations, before.allocations);
            drop(take(5120)); // the block has kept its size
            let after = device.memory_use();
            assert_eq!((after.allocations, after.reserved), (before.allocations, before.reserved));
            driver.fail("cuMemAlloc", 1, OUT_OF_MEMORY);
            let small = take(1024); // the block is too large for it and goes back to the driver
            let after = device.memory_use();
            assert_eq!((after.live, after.reserved), (1024, before.reserved - 5120 + 1024));
            device.check().unwrap();
            drop(small);
        },
    );
}

/// The losses of a run, as the program would print them.
#[derive(Default)]
struct Printed(Vec<(u64, f64)>);

impl Watch for Printed {
    fn step(&mut self, report: &StepReport) {
        self.0.push((report.step, report.loss));
    }
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// The demo with the smallest settings: two epochs of four steps.
fn demo(settings: &[&str]) -> Recipe {
    let tiny = [
        "network.width=2",
        "method.hidden=8",
        "method.embedding=8",
        "augment.size=8",
        "data.limit=16",
        "data.test_limit=8",
        "train.epochs=2",
        "train.batch=4",
        "train.knn_every=0",
        "train.checkpoint_every=1",
        "watch.quality=false",
    ];
    let settings: Vec<String> = tiny.iter().chain(settings).map(|s| s.to_string()).collect();
    Recipe::load("demo", &settings).unwrap()
}

fn train(folder: &Path) -> (selfsup::Result<()>, Printed) {
    let mut printed = Printed::default();
    let result = Device::cuda(0, Precision::F32)
        .and_then(|device| Run::new(&demo(&[]), &device, Some(folder))?.train(&mut printed));
    (result, printed)
}

const OUT_OF_MEMORY: u32 = 2;
const LAUNCH_FAILED: u32 = 719;
const NO_DEVICE: u32 = 214;

/// Trains with an injected failure and returns the error, or what a run printed that got over it. Checks that the metrics are
/// complete and that a checkpoint, if one was written, loads after recovery.
fn attempt(driver: &StandIn, folder: &Path, inject: impl FnOnce()) -> Result<Printed, String> {
    inject();
    let (result, printed) = train(folder);
    driver.recover();
    let Err(error) = result else { return Ok(printed) };
    let said = error.to_string();
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    let written = metrics.lines().filter(|line| line.contains("\"lr\"")).count();
    assert_eq!(written, printed.0.len(), "every known loss is written: {said}");
    match newest(folder) {
        Ok(file) => {
            assert!(
                said.contains(&format!("the newest checkpoint is {}", file.display())),
                "{said}"
            );
            let mut arena =
                Arena::new(demo(&[]).build_method().unwrap().layout(), &Device::cpu(1).unwrap(), 0);
            load_weights(&file, &mut arena).unwrap();
            assert!(arena.values().to_f64().iter().all(|v| v.is_finite()));
        }
        Err(_) if folder.join("recipe.toml").exists() => {
            assert!(said.contains("no checkpoint had been written yet"), "{said}");
        }
        Err(_) => {} // the run had not started
    }
    Err(said)
}

/// The error of a run with an injected failure, if any.
fn failing(driver: &StandIn, folder: &Path, inject: impl FnOnce()) -> Option<String> {
    attempt(driver, folder, inject).err()
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_failing_device_ends_a_run_with_one_error_and_leaves_its_checkpoint() {
    alone(
        "graph_replay::a_failing_device_ends_a_run_with_one_error_and_leaves_its_checkpoint",
        |driver| {
            driver.check(false);
            let root = tempfile::tempdir().unwrap();
            let mut runs = 0;
            let mut folder = || {
                runs += 1;
                root.path().join(format!("{runs}"))
            };
            let complete = folder();
            let before = ["cuMemAlloc", "cuLaunchKernel"].map(|call| driver.count(call));
            let (result, printed) = train(&complete);
            result.unwrap();
            let steps: Vec<u64> = printed.0.iter().map(|(step, _)| *step).collect();
            assert_eq!(steps, (1..=8).collect::<Vec<_>>());
            let calls = ["cuMemAlloc", "cuLaunchKernel"].map(|call| driver.count(call));
            let [allocations, launches] = [0, 1].map(|i| calls[i] - before[i]);
            assert!(allocations > 20 && launches > 500, "{allocations} {launches}");

            // Each of the first allocations, and again after the pool has released its free memory; and the last one, for which a
            // free block may be large enough.
            for nth in (1..=24).chain([allocations]) {
                let ended = attempt(driver, &folder(), || {
                    (nth..nth + 60).for_each(|nth| driver.fail("cuMemAlloc", nth, OUT_OF_MEMORY));
                });
                match ended {
                    Err(said) => {
                        assert!(said.contains("out of memory"), "allocation {nth}: {said}")
                    }
                    Ok(again) => {
                        assert_eq!(nth, allocations, "an out-of-memory error");
                        assert_eq!(again.0, printed.0, "the bits of a run with a larger block");
                    }
                }
            }
            let said =
                failing(driver, &folder(), || driver.fail("cuMemHostAlloc", 1, OUT_OF_MEMORY));
            assert!(
                said.expect("an error about pinned memory").contains("CUDA_ERROR_OUT_OF_MEMORY")
            );

            // A launch that fails at once, in the first epoch and in the second.
            for nth in [1, 700] {
                let said = failing(driver, &folder(), || driver.fail("cuLaunchKernel", nth, 701));
                let said = said.expect("a launch failed");
                assert!(
                    said.contains("launch of ") && said.contains("LAUNCH_OUT_OF_RESOURCES"),
                    "{said}"
                );
            }
            // A kernel that fails when it runs later; a device that is lost.
            let late =
                ["kernel:sgd_step", "cuGraphLaunch", "cuEventQuery", "cuGraphInstantiateWithFlags"];
            for (call, nth, code) in [
                (late[0], 2, LAUNCH_FAILED),
                (late[0], 7, LAUNCH_FAILED),
                (late[1], 1, NO_DEVICE),
                (late[1], 5, NO_DEVICE),
                (late[2], 30, NO_DEVICE),
                (late[3], 1, OUT_OF_MEMORY),
            ] {
                let said = failing(driver, &folder(), || driver.fail(call, nth, code));
                let said = said.unwrap_or_else(|| panic!("{call} {nth}: no error was reported"));
                assert!(
                    said.contains("GPU 0 (") && said.contains("CUDA_ERROR_"),
                    "{call} {nth}: {said}"
                );
            }
        },
    );
}

/// Runs the program on the smallest demo with `variables` in its environment.
fn program(folder: &Path, out: &str, variables: &[(&str, &str)]) -> Output {
    let recipe = folder.join("tiny.toml");
    std::fs::write(&recipe, demo(&["train.epochs=1"]).to_toml()).unwrap();
    let mut program = Command::new(crate::program::path());
    with_driver(&mut program)
        .current_dir(folder)
        .args(["train", "tiny.toml", "--device", "cuda", "--out", out])
        .envs(variables.iter().copied())
        .output()
        .expect("the program starts")
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn selfsup_sync_names_the_failed_kernel_and_changes_no_bit() {
    on_stand_in("graph_replay::selfsup_sync_names_the_failed_kernel_and_changes_no_bit", || {
        let root = tempfile::tempdir().unwrap();
        let fail = ("SELFSUP_STAND_IN_FAIL", "kernel:sgd_step:3:719");
        let said = |variables: &[(&str, &str)], out| {
            let output = program(root.path(), out, variables);
            assert_eq!(output.status.code(), Some(1));
            String::from_utf8(output.stderr).unwrap()
        };
        let late = said(&[fail], "late");
        // The last kernel of the third step fails; the error is reported in that step or the next.
        assert!(late.contains("step 3: ") || late.contains("step 4: "), "{late}");
        assert!(late.contains("CUDA_ERROR_LAUNCH_FAILED"), "{late}");
        assert!(late.contains("SELFSUP_SYNC=1 names the kernel"), "{late}");
        let named = said(&[fail, ("SELFSUP_SYNC", "1")], "named");
        assert!(named.contains("launch of sgd_step, "), "{named}");
        for said in [late, named] {
            assert!(said.contains("no checkpoint had been written yet"), "{said}");
        }
        let left = |variables: &[(&str, &str)], out: &str| {
            let output = program(root.path(), out, variables);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let file = std::fs::read(newest(&root.path().join(out)).unwrap()).unwrap();
            let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            file[8 + header..].to_vec() // the order of the header's metadata is not fixed
        };
        assert!(left(&[], "captured") == left(&[("SELFSUP_SYNC", "1")], "waited"));
    });
}

//! Single steps of each method in f32, each started from the f64 state before it: losses, gradients, and the state after the step.
//!
//! The f64 state comes from the reference device, which `methods.rs` compares with PyTorch.

use selfsup::arena::Arena;
use selfsup::device::{Device, Precision};
use selfsup::methods::State;
use selfsup::train::{load_state, load_weights, save};

use crate::case::write;
use crate::compare::{close, norm, report};
use crate::driver::{gpu, unchecked};
use crate::golden::{Goldens, Record};
use crate::methods::{Bug, Run, STEPS, Training, check_gradients, run_of, runs};

/// Copies the state of one training to another on another device.
fn copy_state(from: &mut Training, to: &mut Training) {
    let copy = |from: &Arena, to: &mut Arena| {
        write(to.values_mut(), 0, &from.values().to_f64());
        write(to.statistics_mut(), 0, &from.statistics().to_f64());
    };
    copy(&from.online, &mut to.online);
    write(to.optimizer.momentum_mut(), 0, &from.optimizer.momentum().to_f64());
    for ((_, from), (_, to)) in from.method.state().into_iter().zip(to.method.state()) {
        match (from, to) {
            (State::Network(from), State::Network(to)) => copy(from, to),
            (State::Rows(from), State::Rows(to)) => write(to, 0, &from.to_f64()),
            (State::Count(from), State::Count(to)) => *to = *from,
            _ => panic!("two instances of one method have different state"),
        }
    }
}

/// Everything that a step changes, by name: networks, their running statistics, queues.
fn state_of(training: &mut Training) -> Vec<(String, Vec<f64>)> {
    let network = |name: &str, arena: &Arena| {
        let statistics = arena.statistics().to_f64();
        [("", arena.values().to_f64()), (" statistics", statistics)]
            .map(|(part, values)| (format!("{name}{part}"), values))
    };
    let mut state = network("online", &training.online).to_vec();
    for (name, part) in training.method.state() {
        match part {
            State::Network(arena) => state.extend(network(name, arena)),
            State::Rows(rows) => state.push((name.to_owned(), rows.to_f64())),
            State::Count(count) => state.push((name.to_owned(), vec![*count as f64])),
        }
    }
    state
}

/// Relative rounding error of f32.
const F32: f64 = 1.0 / (1 << 24) as f64;

/// Compares the change of each part of the state with the reference's. A step changes weights by little, so the change is what
/// must agree, up to the rounding of the weights themselves in f32.
fn check_moves(
    name: &str,
    before: &[(String, Vec<f64>)],
    [got, want]: [&[(String, Vec<f64>)]; 2],
) -> Vec<Result<f64, String>> {
    let moves = before.iter().zip(got).zip(want).map(|((before, got), want)| {
        let moved = |after: &[f64]| -> Vec<f64> {
            after.iter().zip(&before.1).map(|(after, before)| after - before).collect()
        };
        let (got, want, name) =
            (moved(&got.1), moved(&want.1), format!("{name}|{} moved", before.0));
        let rounding = match norm(&want) {
            0.0 => 0.0, // the part must not change
            moved => F32 * norm(&before.1) / moved,
        };
        close(&name, &got, &want, 1e-3 + rounding)
    });
    moves.collect()
}

/// Runs the given steps on a device, each from the golden state.
fn teacher_forced(run: Run, device: &Device, steps: &[usize]) -> Vec<Result<f64, String>> {
    let goldens = Goldens::open("methods");
    let mut reference = Training::new(run, &Device::reference());
    let mut training = Training::new(run, device);
    let mut results = Vec::new();
    for step in 0..=*steps.last().expect("some steps") {
        let name = format!("{}|{step}", run.name);
        let forced = steps.contains(&step);
        let before = state_of(&mut reference);
        if forced {
            copy_state(&mut reference, &mut training);
            let loss = training.forward_and_backward(&goldens, step, Bug::None);
            // SimSiam's loss is a mean of cosines of both signs and near zero here: measure its error relative to 1.
            let offset = if run.name == "simsiam" { 1.0 } else { 0.0 };
            let want = goldens.record(&format!("{name}|loss")).entries()[0];
            results.push(close(&format!("{name}|loss"), &[offset + loss], &[offset + want], 1e-5));
            if run.kinked {
                continue;
            }
            let tolerance = |record: &Record<'_>| record.tolerance(1e-4);
            let online = &training.online;
            results.extend(check_gradients(&goldens, &name, online, 1e-6, tolerance));
            training.update(step, Bug::None);
        }
        reference.forward_and_backward(&goldens, step, Bug::None);
        reference.update(step, Bug::None);
        if forced {
            let after = [state_of(&mut training), state_of(&mut reference)];
            results.extend(check_moves(&name, &before, [&after[0], &after[1]]));
        }
    }
    results
}

#[test]
fn every_step_of_every_method_on_the_cpu_from_the_golden_state_agrees_with_pytorch() {
    let device = Device::cpu(2).unwrap().poisoned();
    let all: Vec<usize> = (0..STEPS).collect();
    let plain = runs().into_iter().filter(|run| !run.kinked);
    let results = plain.flat_map(|run| teacher_forced(run, &device, &all)).collect();
    report("every method on the CPU", results);
}

/// The steps that exercise most of a method, for a device that CI emulates: a queue that has changed and is written after its
/// first rows; a target network that differs from the online one; SwAV with frozen prototypes and no queue, and the reverse.
fn representative_steps(run: &Run) -> &'static [usize] {
    match run.name {
        "moco v1" | "moco v2" | "simclr v2 memory" | "byol" => &[1],
        "swav" => &[0, 6],
        _ => &[0],
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn steps_of_every_method_on_a_gpu_from_the_golden_state_agree_with_pytorch() {
    unchecked(
        "stepwise_f32::steps_of_every_method_on_a_gpu_from_the_golden_state_agree_with_pytorch",
        || {
            let device = gpu(Precision::F32);
            let forced = |run| teacher_forced(run, &device, representative_steps(&run));
            let results = runs().into_iter().flat_map(forced).collect();
            device.check().unwrap();
            report("every method on CUDA in f32", results);
        },
    );
}

/// MoCo's weights, momentum encoder, queue and queue position move between GPU and CPU bit for bit.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_method_with_state_moves_between_devices_by_its_checkpoint() {
    unchecked("stepwise_f32::a_method_with_state_moves_between_devices_by_its_checkpoint", || {
        let goldens = Goldens::open("methods");
        let (gpu, cpu) = (gpu(Precision::Bf16), Device::cpu(1).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let started = |device: &Device| Training::new(run_of("moco v2"), device);
        let step = |training: &mut Training, step| {
            training.forward_and_backward(&goldens, step, Bug::None);
            training.update(step, Bug::None);
        };
        let moved = |from: &mut Training, to: &Device, step| {
            let state = from.method.state();
            let (online, optimizer) = (&from.online, &from.optimizer);
            let metadata = Default::default();
            let path = save(folder.path(), step, online, optimizer, state, metadata, 1).unwrap();
            let mut there = started(to);
            load_weights(&path, &mut there.online).unwrap();
            load_state(&path, there.method.state()).unwrap();
            assert_eq!(
                state_of(&mut there),
                state_of(from),
                "from {} to {to}",
                from.online.device()
            );
            there
        };
        let mut on_gpu = started(&gpu);
        step(&mut on_gpu, 0);
        let mut on_cpu = moved(&mut on_gpu, &cpu, 1);
        step(&mut on_cpu, 1);
        let mut back = moved(&mut on_cpu, &gpu, 2);
        // Training continues on the other device.
        step(&mut back, 2);
        gpu.check().unwrap();
        assert_ne!(state_of(&mut back), state_of(&mut on_cpu));
    });
}

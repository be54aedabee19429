//! SGD, Adam, AdamW, the five published forms of LARS, the momentum update and the schedule, each against an independent implementation.
//!
//! A loss that is linear in the weights sets the gradients.

use std::sync::Arc;

use selfsup::arena::{Arena, Init, Layout, Param, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::ops;
use selfsup::optim::{
    Adam, Exclude, Lars, Optimizer, ParamPolicy, Rule, Schedule, Sgd, TrustNorm, ema,
};
use selfsup::tape;
use selfsup::tensor::Numbers;

use crate::case::{dot, write_slot};
use crate::compare::{close, report};
use crate::driver::{alone, gpu};
use crate::golden::Goldens;
use crate::seeded;

const RATES: [f64; 6] = [0.0, 0.1, 0.5, 0.3, 0.05, 0.4];
const MOMENTUM: f64 = 0.9;
const DECAY: f64 = 0.01;

/// Names, shapes and kinds; `zero` and `shift` start at zero, `still` has no gradient, `flicker` none at odd steps.
const SLOTS: [(&str, &[usize], SlotKind); 8] = [
    ("filter", &[3, 2, 2, 4], SlotKind::Filter),
    ("matrix", &[5, 7], SlotKind::Matrix),
    ("zero", &[4, 6], SlotKind::Matrix),
    ("still", &[6, 3], SlotKind::Matrix),
    ("flicker", &[3, 3], SlotKind::Matrix),
    ("bias", &[5], SlotKind::Bias),
    ("gain", &[7], SlotKind::Gain),
    ("shift", &[7], SlotKind::Shift),
];

fn sgd(nesterov: bool, exclude: Exclude) -> Rule {
    Rule::Sgd(Sgd { momentum: MOMENTUM, nesterov, weight_decay: DECAY, exclude })
}

fn rules() -> [(&'static str, Rule); 11] {
    [
        ("sgd", sgd(false, Exclude::Nothing)),
        ("nesterov", sgd(true, Exclude::Nothing)),
        ("spare", sgd(false, Exclude::BiasAndNorm)),
        ("simclr", Rule::Lars(Lars::simclr(MOMENTUM, DECAY))),
        ("byol", Rule::Lars(Lars::byol(MOMENTUM, DECAY))),
        ("larc", Rule::Lars(Lars::larc(MOMENTUM, DECAY))),
        ("lightly", Rule::Lars(Lars::lightly(MOMENTUM, DECAY))),
        ("adam", Rule::Adam(Adam::new(DECAY))),
        ("adamw", Rule::AdamW(Adam::new(DECAY))),
        ("spare_adam", Rule::Adam(Adam { exclude: Exclude::BiasAndNorm, ..Adam::new(DECAY) })),
        ("solo_learn", Rule::Lars(Lars::solo_learn(MOMENTUM, DECAY))),
    ]
}

/// `count` numbers of magnitude `size`, exact in f32.
fn numbers(what: &str, count: usize, size: f64) -> Vec<f64> {
    let values = seeded::unit(seeded::seed(&format!("optimizers|{what}")), count);
    values.into_iter().map(|v| size * v).collect()
}

fn gradient(name: &str, count: usize, step: usize) -> Vec<f64> {
    if name == "still" || (name == "flicker" && step % 2 == 1) {
        return vec![0.0; count];
    }
    numbers(&format!("{name}|{step}"), count, 0.125)
}

fn arena(device: &Device) -> (Arena, Vec<Param>) {
    let mut layout = Layout::new();
    let params =
        SLOTS.map(|(name, shape, kind)| layout.param(name, shape, kind, Init::Constant(0.0)));
    let mut arena = Arena::new(&Arc::new(layout), device, 0);
    for (slot, (name, shape, _)) in SLOTS.iter().enumerate() {
        if !["zero", "shift"].contains(name) {
            write_slot(&mut arena, slot, &numbers(name, shape.iter().product(), 1.0));
        }
    }
    (arena, params.to_vec())
}

/// Weights after each step, slot after slot.
fn run(rule: Rule, device: &Device, first: impl FnOnce(&mut Arena)) -> Vec<Vec<f64>> {
    let (mut arena, params) = arena(device);
    first(&mut arena);
    let mut optimizer = Optimizer::new(rule, &arena);
    let mut steps = Vec::new();
    for (step, lr) in RATES.into_iter().enumerate() {
        let loss = tape::step(&mut arena, |tape| {
            let terms = SLOTS.iter().zip(&params).map(|((name, ..), &param)| {
                let w = tape.param(param);
                let g = gradient(name, w.value().len(), step);
                dot(&w, &g)
            });
            terms.reduce(|sum, term| ops::add(&sum, &term)).unwrap()
        });
        loss.unwrap();
        optimizer.step(&mut arena, lr);
        steps.push(params.iter().flat_map(|&p| arena.value(p).to_f64()).collect());
    }
    steps
}

fn check(name: &str, steps: &[Vec<f64>], tolerance: f64) -> Vec<Result<f64, String>> {
    let goldens = Goldens::open("optimizers");
    let compare = |(step, got): (usize, &Vec<f64>)| {
        let name = format!("{name}|{step}");
        let mut results = Vec::new();
        let mut at = 0;
        // Slot by slot: a small one cannot hide behind a large one.
        for (slot, shape, _) in SLOTS {
            let range = at..at + shape.iter().product::<usize>();
            let want = &goldens.numbers(&name)[range.clone()];
            results.push(close(&format!("{name}|{slot}"), &got[range.clone()], want, tolerance));
            at = range.end;
        }
        assert_eq!(at, goldens.numbers(&name).len());
        results
    };
    steps.iter().enumerate().flat_map(compare).collect()
}

#[test]
fn every_rule_in_f64_moves_weights_as_its_published_code_does() {
    for (name, rule) in rules() {
        let steps = run(rule, &Device::reference().poisoned(), |_| ());
        report(name, check(name, &steps, 1e-12));
    }
}

#[test]
fn every_rule_on_the_cpu_moves_weights_as_its_published_code_does() {
    for (name, rule) in rules() {
        let steps = run(rule, &Device::cpu(2).unwrap().poisoned(), |_| ());
        report(name, check(name, &steps, 1e-6));
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_rule_on_a_gpu_moves_weights_as_its_published_code_does() {
    for precision in [Precision::F32, Precision::Bf16] {
        let gpu = gpu(precision);
        for (name, rule) in rules() {
            let steps = run(rule, &gpu, |_| ());
            report(name, check(name, &steps, 1e-6));
        }
        gpu.check().unwrap();
    }
}

/// One launch for SGD and Adam, two for LARS; the same launch writes the bf16 working copy.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_step_on_a_gpu_is_one_launch_or_two() {
    alone("optimizers::a_step_on_a_gpu_is_one_launch_or_two", |driver| {
        let gpu = gpu(Precision::Bf16);
        let (mut other, other_params) = arena(&gpu);
        for (name, rule) in rules() {
            let (mut arena, params) = arena(&gpu);
            arena.zero_gradients();
            let mut optimizer = Optimizer::new(rule, &arena);
            // Creates both working copies.
            optimizer.step(&mut arena, 0.1);
            let mut momentum = Numbers::new(&gpu, &[1.0]);
            ema(&mut other, &arena, &momentum);
            let launches = || {
                gpu.wait(); // the stand-in driver counts kernels that have run
                ["sgd_step", "adam_step", "lars_norms", "lars_step", "ema", "cast_f32_to_bf16"]
                    .map(|kernel| driver.count(&format!("kernel:{kernel}")))
            };
            momentum.set(&[0.5]);
            let before = launches();
            optimizer.step(&mut arena, 0.1);
            ema(&mut other, &arena, &momentum);
            let after = launches();
            let count = |i: usize| after[i] - before[i];
            let expected = match rule {
                Rule::Sgd(_) => [1, 0, 0, 0, 1, 0],
                Rule::Adam(_) | Rule::AdamW(_) => [0, 1, 0, 0, 1, 0],
                Rule::Lars(_) => [0, 0, 1, 1, 1, 0],
            };
            assert_eq!([0, 1, 2, 3, 4, 5].map(count), expected, "{name}");
            for (arena, params) in [(&arena, &params), (&other, &other_params)] {
                for &param in params {
                    let copy = tape::evaluate(arena, |tape| tape.param(param)).unwrap();
                    let values = arena.value(param);
                    assert_eq!(copy.to_f64(), values.cast(copy.dtype()).to_f64(), "{name}");
                }
            }
        }
        gpu.check().unwrap();
    });
}

/// A slot of several chunks, the last one short, and a multiplier of 4 on a quarter of the rate, which must equal the rate.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_large_slot_on_a_gpu_moves_as_on_the_reference() {
    for (name, rule) in rules() {
        let moved = |device: &Device, times: f64| {
            let mut layout = Layout::new();
            let shape = [3, 2 * 8192 / 3 + 5];
            let w = layout.param("w", shape, SlotKind::Matrix, Init::Normal(1.0));
            layout.param("b", [5], SlotKind::Bias, Init::Normal(1.0));
            let mut arena = Arena::new(&Arc::new(layout), device, 3);
            let mut optimizer = Optimizer::new(rule, &arena);
            optimizer.set_policies(arena.layout(), |_| ParamPolicy::LrMultiplier(times));
            for lr in [0.1, 0.2].map(|lr| lr / times) {
                let g = numbers("large", shape.iter().product(), 0.125);
                tape::step(&mut arena, |tape| dot(&tape.param(w), &g)).unwrap();
                optimizer.step(&mut arena, lr);
            }
            arena.values().to_f64()
        };
        let expected = moved(&Device::reference(), 1.0);
        assert_eq!(moved(&Device::reference(), 4.0), expected, "{name}");
        close(name, &moved(&gpu(Precision::F32), 4.0), &expected, 1e-6).unwrap();
    }
}

/// The goldens tell every pair of published rules apart.
#[test]
fn no_rule_passes_as_another() {
    for (name, rule) in rules() {
        let steps = run(rule, &Device::reference(), |_| ());
        for (other, _) in rules().iter().filter(|(other, _)| *other != name) {
            let passed = check(other, &steps, 1e-4).iter().all(Result::is_ok);
            assert!(!passed, "{name} passed for {other}");
        }
    }
}

/// Shipped bug: LARS without its special case for weights of norm zero. Weights of 1e-30 have the same effect.
#[test]
fn a_trust_ratio_without_the_case_for_zero_weights_is_caught() {
    for (name, rule) in rules() {
        let steps = run(rule, &Device::reference(), |arena| {
            let zero = SLOTS.iter().position(|(name, ..)| *name == "zero").unwrap();
            write_slot(arena, zero, &[1e-30; 24]);
        });
        // The first step has learning rate zero and leaves the weights at 1e-30.
        let first = format!("{name}|0");
        let about = |e: &String| e.contains("|zero") && !e.starts_with(&first);
        let caught = check(name, &steps, 1e-4).iter().any(|r| r.as_ref().is_err_and(about));
        // SGD and Adam have no trust ratio.
        assert_eq!(caught, matches!(rule, Rule::Lars(_)), "{name}");
    }
}

/// Shipped bug: for a gradient of norm zero, weight decay where LARC applies none, and no decay where SimCLR applies it.
#[test]
fn the_wrong_rule_for_a_zero_gradient_is_caught() {
    let swap = |lars: Lars| {
        let norm = match lars.norm {
            TrustNorm::OfDecayed => TrustNorm::SumOfNorms,
            TrustNorm::SumOfNorms => TrustNorm::OfDecayed,
        };
        Rule::Lars(Lars { norm, ..lars })
    };
    for (name, rule) in rules() {
        let Rule::Lars(lars) = rule else { continue };
        let steps = run(swap(lars), &Device::reference(), |_| ());
        let caught =
            check(name, &steps, 1e-6).into_iter().any(|r| r.is_err_and(|e| e.contains("|still")));
        assert!(caught, "{name}");
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn the_momentum_update_averages_every_parameter_and_no_statistic() {
    for (device, tolerance) in [
        (Device::reference().poisoned(), 1e-15),
        (Device::cpu(2).unwrap().poisoned(), 1e-7),
        (gpu(Precision::F32), 1e-7),
        (gpu(Precision::Bf16), 1e-7),
    ] {
        let mut layout = Layout::new();
        layout.param("filter", [3, 5, 5, 7], SlotKind::Filter, Init::Normal(1.0));
        layout.param("gain", [7], SlotKind::Gain, Init::Uniform(1.0));
        layout.stat("mean", 7, SlotKind::RunningMean, 0.25);
        let layout = Arc::new(layout);
        let (mut target, mut online) =
            (Arena::new(&layout, &device, 1), Arena::new(&layout, &device, 2));
        online.statistics_mut().view_mut().fill(4.0);
        for momentum in [0.996, 0.0, 1.0, 0.5] {
            let (t, o) = (target.values().to_f64(), online.values().to_f64());
            let want: Vec<f64> =
                t.iter().zip(&o).map(|(t, o)| momentum * t + (1.0 - momentum) * o).collect();
            ema(&mut target, &online, &Numbers::new(&device, &[momentum]));
            close("ema", &target.values().to_f64(), &want, tolerance).unwrap();
            assert!(target.slot_values(&layout.stats()[0]).iter().all(|v| *v == 0.25));
        }
    }
}

#[test]
fn the_schedule_is_a_line_and_then_half_a_cosine() {
    for (peak, warmup, total) in
        [(4.8, 10, 100), (0.3, 0, 7), (1.0, 1, 2), (2.0, 5, 5), (1.0, 0, 1)]
    {
        let schedule = Schedule { peak, warmup, total, ..Schedule::default() };
        for step in 0..total {
            // cos² of half the angle, in place of (1 + cos) / 2.
            let want = if step < warmup {
                peak / warmup as f64 * step as f64
            } else {
                let done = (step - warmup) as f64 / (total - warmup) as f64;
                peak * (std::f64::consts::FRAC_PI_2 * done).cos().powi(2)
            };
            let got = schedule.lr(step);
            let what = format!("peak {peak}, warm-up {warmup} of {total}, step {step}");
            assert!((got - want).abs() < 1e-12 * peak, "{what}: got {got}, expected {want}");
        }
    }
}

//! Every operation on random shapes, legal and illegal: it computes what the reference device computes, or it refuses with a
//! panic that names the operation. `fuzz/fuzz_targets/ops.rs` feeds the same function.

use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::{Arc, Once};

use selfsup::arena::{Arena, Init, Layout, Param, SlotKind};
use selfsup::device::{Device, Group};
use selfsup::ops::{self, BatchNorm, Negatives, PairLoss, Running};
use selfsup::tape::{Var, step};
use selfsup::tensor::{Shape, Tensor};

/// The operations, by the name that their panics start with.
const OPS: [&str; 33] = [
    "add",
    "avg_pool",
    "batch_norm",
    "concat_rows",
    "conv2d",
    "cross_entropy",
    "distillation",
    "gather_rows",
    "info_nce",
    "l2_normalize",
    "linear",
    "max_pool",
    "mean",
    "mean_of",
    "mean_pool",
    "mul",
    "neg_cosine",
    "normalize_rows",
    "nt_xent",
    "pair_loss",
    "push_rows",
    "relu",
    "scale",
    "sinkhorn",
    "slice_rows",
    "soft_cross_entropy",
    "softmax",
    "square",
    "stream_mean",
    "stream_select",
    "sum",
    "transpose",
    "write_rows",
];

/// Channels for which the benches have running statistics: 0 to this number.
const MOST_CHANNELS: usize = 6;

/// Choices, one from each byte; 0 when they are used up.
#[derive(Clone)]
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> usize {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        usize::from(*first)
    }

    /// True once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.byte() % n == n - 1
    }

    fn size(&mut self) -> usize {
        [1, 2, 3, 4, 2, 5, 6, 0][self.byte() % 8]
    }

    /// A number of features: mostly small, sometimes as wide as vectors and tiles.
    fn width(&mut self) -> usize {
        match self.byte() {
            byte @ 0..=223 => [1, 2, 3, 4, 2, 5, 6, 0][byte % 8],
            byte => [7, 8, 16, 17, 32, 33, 64, 67][byte % 8],
        }
    }

    /// Mostly `size`, so that legal shapes are common.
    fn about(&mut self, size: usize) -> usize {
        if self.once_in(12) { self.size() } else { size }
    }

    /// A number that is mostly small, and sometimes absurd.
    fn setting(&mut self, usual: usize) -> usize {
        match self.byte() {
            byte @ 0..=239 => byte % (usual + 1),
            // A padding of 1000 is legal and takes gigabytes.
            byte => [usize::MAX, usize::MAX / 2 + 1, 1 << 32, 100][byte % 4],
        }
    }

    /// The sizes, mostly; sometimes with one more or one less.
    fn shape(&mut self, sizes: &[usize]) -> Shape {
        match self.byte() {
            0 => sizes[..sizes.len().saturating_sub(1)].into(),
            1 if sizes.len() < 4 => [sizes, &[1]].concat().as_slice().into(),
            _ => sizes.into(),
        }
    }

    fn temperature(&mut self) -> f64 {
        match self.byte() {
            byte @ 0..=249 => 0.1 + byte as f64 / 250.0,
            byte => [0.0, -1.0, f64::NAN, f64::NEG_INFINITY, -0.0, -1e-300][byte - 250],
        }
    }
}

/// One number after another in `[-1, 1)`, no two of a tensor alike.
fn numbers(len: usize, seed: usize) -> Vec<f64> {
    let number = |i: usize| ((i + 1) * 7919 + seed * 104_729) % 16_381;
    (0..len).map(|i| f64::from((number(i) as f64 / 8_190.5 - 1.0) as f32)).collect()
}

/// What an operation made: its value, and the gradients of its inputs.
type Made = Vec<(Vec<usize>, Vec<f64>)>;

/// A device with what a case needs of it.
struct Bench {
    device: Device,
    other: Device,
    arena: RefCell<Arena>,
    dummy: Param,
    /// By number of channels.
    running: Vec<Running>,
    /// Batch norms go without their ReLU.
    without_relu: Cell<bool>,
}

impl Bench {
    fn new(device: Device, other: Device) -> Self {
        let mut layout = Layout::new();
        let dummy = layout.param("dummy", [1], SlotKind::Bias, Init::Constant(0.0));
        let running = (0..=MOST_CHANNELS)
            .map(|c| Running {
                mean: layout.stat(format!("mean {c}"), c, SlotKind::RunningMean, 0.0),
                variance: layout.stat(format!("var {c}"), c, SlotKind::RunningVariance, 1.0),
            })
            .collect();
        let arena = RefCell::new(Arena::new(&Arc::new(layout), &device, 1));
        Self { device, other, arena, dummy, running, without_relu: Cell::new(false) }
    }

    fn tensor(&self, shape: Shape, seed: usize) -> Tensor {
        Tensor::from_f64(&self.device, shape, &numbers(shape.elements(), seed))
    }

    /// Indices below `below`, mostly; once in a while on another device.
    fn indices(&self, choices: &mut Choices<'_>, count: usize, below: usize) -> Tensor {
        let index = |_| match choices.byte() {
            0 => -1,
            1 => below as i32,
            byte => (byte % below.max(1)) as i32,
        };
        let values: Vec<i32> = (0..count).map(index).collect();
        let device = if choices.once_in(24) { &self.other } else { &self.device };
        let shape = choices.shape(&[count]);
        if shape.elements() != count {
            return Tensor::from_slice(device, [count], &values);
        }
        Tensor::from_slice(device, shape, &values)
    }

    /// Computes a case; `Err` with the message of the panic that refused it.
    fn run(&self, op: &'static str, choices: Choices<'_>) -> Result<Made, String> {
        SILENT.set(true);
        let made = panic::catch_unwind(AssertUnwindSafe(|| self.compute(op, choices)));
        SILENT.set(false);
        made.map_err(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
            text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
        })
    }

    fn compute(&self, op: &'static str, mut choices: Choices<'_>) -> Made {
        let c = &mut choices;
        let made = Rc::new(RefCell::new(Made::new()));
        if let Some(y) = self.without_gradient(op, c) {
            return vec![(y.shape().to_vec(), y.to_f64())];
        }
        let kept = made.clone();
        let arena = &mut *self.arena.borrow_mut();
        step(arena, |tape| {
            let mut seed = 0;
            let mut input = |shape: Shape| {
                seed += 1;
                let (value, made) = (self.tensor(shape, seed), kept.clone());
                tape.record("input", value, &[&tape.param(self.dummy)], move |dx, _| {
                    made.borrow_mut().push((dx.shape().to_vec(), dx.to_f64()));
                })
            };
            let y = self.with_gradient(op, c, &mut input);
            kept.borrow_mut().push((y.shape().to_vec(), y.value().to_f64()));
            let (id, weights) = (y.id(), self.tensor(*y.shape(), 99));
            tape.record("loss", Tensor::zeros(&self.device, []), &[&y], move |_, gradients| {
                gradients.add(id, weights);
            })
        })
        .expect("the device does not fail");
        made.take()
    }

    fn without_gradient(&self, op: &str, c: &mut Choices<'_>) -> Option<Tensor> {
        let [n, k] = [c.size(), c.width()];
        match op {
            "softmax" => {
                let x = self.tensor(c.shape(&[n, k]), 1);
                Some(ops::softmax(&x, c.temperature()))
            }
            "sinkhorn" => {
                let x = self.tensor(c.shape(&[n, k]), 1);
                let (epsilon, iterations) = (c.temperature(), c.byte() % 4);
                Some(ops::sinkhorn(&x, epsilon, iterations, &Group::alone()))
            }
            "push_rows" | "write_rows" => {
                let mut to = self.tensor(c.shape(&[n, k]), 1);
                let (rows, width) = (c.about(n.min(1)), c.about(k));
                let rows = self.tensor(c.shape(&[rows, width]), 2);
                if op == "push_rows" {
                    ops::push_rows(&mut to, &rows);
                } else {
                    ops::write_rows(&mut to, &self.indices(c, 1, n), &rows);
                }
                Some(to)
            }
            "normalize_rows" => {
                let mut layout = Layout::new();
                let param =
                    layout.param("x", c.shape(&[n, k]), SlotKind::Matrix, Init::Uniform(1.0));
                let foreign = c.once_in(8).then(|| {
                    Layout::new().param("y", *param.shape(), SlotKind::Matrix, Init::Uniform(1.0))
                });
                let mut arena = Arena::new(&Arc::new(layout), &self.device, 3);
                ops::normalize_rows(&mut arena, foreign.unwrap_or(param));
                Some(arena.value(param))
            }
            _ => None,
        }
    }

    fn with_gradient<'t>(
        &self,
        op: &str,
        c: &mut Choices<'_>,
        input: &mut dyn FnMut(Shape) -> Var<'t>,
    ) -> Var<'t> {
        let [n, h, w, d] = [c.size(), c.size(), c.size(), c.width()];
        match op {
            "relu" => ops::relu(&input(c.shape(&[n, h, w, d]))),
            "square" => ops::square(&input(c.shape(&[n, h, w, d]))),
            "transpose" => ops::transpose(&input(c.shape(&[n * h, d]))),
            "sum" | "mean" => {
                let rank = c.byte() % 5;
                let x = input(c.shape(&[n, h, w, d][..rank]));
                let axis = c.setting(rank);
                if op == "sum" { ops::sum(&x, axis) } else { ops::mean(&x, axis) }
            }
            "mul" => ops::mul(&input(c.shape(&[n, d])), &input(c.shape(&[n, d]))),
            "scale" => ops::scale(&input(c.shape(&[n, d])), c.temperature()),
            "add" => ops::add(&input(c.shape(&[n, d])), &input(c.shape(&[n, d]))),
            "mean_of" => {
                let count = c.byte() % 4;
                let terms: Vec<_> = (0..count)
                    .map(|_| input(c.shape(&[1]).get(1..).unwrap_or_default().into()))
                    .collect();
                ops::mean_of(&terms)
            }
            "linear" => {
                let (x, in_w) = (input(c.shape(&[n, d])), c.about(d));
                let weights = input(c.shape(&[h, in_w]));
                let bias_len = c.about(h);
                let bias = c.once_in(2).then(|| input(c.shape(&[bias_len])));
                ops::linear(&x, &weights, bias.as_ref())
            }
            "conv2d" => {
                let x = input(c.shape(&[n, h, w, d]));
                let sizes = [c.width(), c.size(), c.size(), c.about(d)];
                let filters = input(c.shape(&sizes));
                let (stride, pad) = (c.setting(3), c.setting(3));
                ops::conv2d(&x, &filters, stride, pad)
            }
            "batch_norm" => {
                let x = input(c.shape(&[4 * n, d]));
                let part = c.about(d);
                let gain = c.once_in(2).then(|| input(c.shape(&[part])));
                let shift = c.once_in(2).then(|| input(c.shape(&[part])));
                let residual = c.once_in(3).then(|| input(c.shape(&[4 * n, d])));
                let (relu, groups) = (c.once_in(2) && !self.without_relu.get(), c.setting(4));
                let running =
                    if c.once_in(3) { self.running.get(c.about(d)).copied() } else { None };
                let (gain, shift, residual) = (gain.as_ref(), shift.as_ref(), residual.as_ref());
                ops::batch_norm(&x, BatchNorm { gain, shift, residual, relu, groups, running })
            }
            "max_pool" => {
                let x = input(c.shape(&[n, h, w, d]));
                let (size, stride, pads) =
                    (c.setting(4), c.setting(3), [c.setting(2), c.setting(2)]);
                ops::max_pool(&x, size, stride, pads)
            }
            "avg_pool" => {
                let x = input(c.shape(&[n, h, w, d]));
                let (size, stride) = (c.setting(4), c.setting(3));
                ops::avg_pool(&x, size, stride)
            }
            "mean_pool" => ops::mean_pool(&input(c.shape(&[n, h, w, d]))),
            "stream_mean" => ops::stream_mean(&input(c.shape(&[n, h, w, 2 * d]))),
            "stream_select" => {
                let (x, width) = (input(c.shape(&[n, h, w, 2 * d])), c.about(2 * d));
                ops::stream_select(&x, &input(c.shape(&[n, width])))
            }
            "l2_normalize" => ops::l2_normalize(&input(c.shape(&[n, d]))),
            "neg_cosine" => ops::neg_cosine(&input(c.shape(&[n, d])), &input(c.shape(&[n, d]))),
            "nt_xent" => {
                let z = ops::l2_normalize(&input([c.about(2 * n), d].into()));
                ops::nt_xent(&z, c.temperature())
            }
            "pair_loss" => {
                let z = ops::l2_normalize(&input([c.about(2 * n), d].into()));
                // Not semi-hard: where similarities are equal, rounding would decide which negative it is.
                let loss = match c.byte() % 3 {
                    0 => PairLoss::Xent,
                    1 => PairLoss::Logistic { semi_hard: false },
                    _ => PairLoss::Margin { margin: 0.5, semi_hard: false },
                };
                ops::pair_loss(&z, loss, c.temperature())
            }
            "info_nce" => {
                let q = ops::l2_normalize(&input([n, d].into()));
                let k = ops::l2_normalize(&input([c.about(n), c.about(d)].into()));
                let queue = self.tensor([h * n, c.about(d)].into(), 7);
                let own = c.once_in(3).then(|| self.indices(c, 2, h * n + 1));
                let negatives = Negatives { queue: &queue, own: own.as_ref() };
                ops::info_nce(&q, &k, &negatives, c.temperature())
            }
            "cross_entropy" => {
                let count = c.about(n);
                ops::cross_entropy(&input(c.shape(&[n, d])), &self.indices(c, count, d))
            }
            "soft_cross_entropy" | "distillation" => {
                let x = input(c.shape(&[n, d]));
                let targets = self.tensor(c.shape(&[n, d]), 5);
                let temperature = c.temperature();
                if op == "distillation" {
                    ops::distillation(&x, &targets, temperature)
                } else {
                    ops::soft_cross_entropy(&x, &targets, temperature)
                }
            }
            "gather_rows" => {
                let index = self.indices(c, h, n);
                ops::gather_rows(&input(c.shape(&[n, d])), &index)
            }
            "slice_rows" => {
                let (from, count) = (c.setting(n), c.setting(n));
                ops::slice_rows(&input(c.shape(&[n, d])), from, count)
            }
            "concat_rows" => {
                let count = c.byte() % 4;
                let parts: Vec<_> = (0..count)
                    .map(|_| {
                        let sizes = [c.size(), c.about(d)];
                        input(c.shape(&sizes))
                    })
                    .collect();
                ops::concat_rows(&parts)
            }
            _ => unreachable!("{op} is not in the list of operations"),
        }
    }
}

thread_local! {
    /// Panics of this thread are expected.
    static SILENT: Cell<bool> = const { Cell::new(false) };
    static BENCHES: [Bench; 2] = {
        let new = || [Device::cpu(1).expect("a thread").poisoned(), Device::reference().poisoned()];
        let ([cpu, reference], [other_cpu, other_reference]) = (new(), new());
        [Bench::new(cpu, other_reference), Bench::new(reference, other_cpu)]
    };
}

/// Expected panics print nothing. Others go to the hook that was there (libFuzzer's aborts).
fn silence_expected_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                hook(info);
            }
        }));
    });
}

fn close(got: f64, want: f64) -> bool {
    !want.is_finite() || (got - want).abs() <= 1e-2 * (1.0 + want.abs())
}

/// What became of a case.
#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    /// The operation refused it.
    Refused,
    /// Value and gradients agree.
    Agrees,
    /// The value agrees; rounding decides the gradients.
    AtKink,
}

/// Whether a batch norm's ReLU gets a value so close to its kink at 0 that rounding decides whether the gradient passes. A
/// group of one row has nothing else: it is its own mean, so that every value is the shift or 0.
fn at_kink(reference: &Bench, choices: Choices<'_>) -> bool {
    reference.without_relu.set(true);
    let linear = reference.run("batch_norm", choices);
    reference.without_relu.set(false);
    linear.is_ok_and(|made| made[0].1.iter().any(|value| value.abs() < 1e-3))
}

/// Runs the case that `bytes` describe on both devices.
fn case(bytes: &[u8]) -> Result<Outcome, String> {
    silence_expected_panics();
    let mut choices = Choices(bytes);
    let op = OPS[choices.byte() % OPS.len()];
    let [got, want] = BENCHES.with(|benches| [0, 1].map(|i| benches[i].run(op, choices.clone())));
    match (got, want) {
        (Ok(got), Ok(want)) => {
            let kink = op == "batch_norm" && BENCHES.with(|benches| at_kink(&benches[1], choices));
            // The value is the first part.
            for (part, (got, want)) in got.iter().zip(&want).enumerate() {
                let near = || got.1.iter().zip(&want.1).all(|(&a, &b)| close(a, b));
                let same = got.0 == want.0 && (part > 0 && kink || near());
                if !same {
                    return Err(format!("{op}: part {part} is {got:?}, expected {want:?}"));
                }
            }
            if got.len() != want.len() {
                return Err(format!("{op}: {} parts, expected {}", got.len(), want.len()));
            }
            Ok(if kink { Outcome::AtKink } else { Outcome::Agrees })
        }
        (Err(got), Err(want)) => {
            let names: &[&str] = match op {
                // A composition: the operation inside may refuse.
                "distillation" => &["softmax:", "soft_cross_entropy:"],
                "normalize_rows" => &["arena: the parameter"],
                _ => &[],
            };
            let named = |message: &str| {
                message.contains(&format!("{op}:"))
                    || names.iter().any(|name| message.contains(name))
                    || ["nt_xent", "pair_loss", "info_nce"].contains(&op)
                        && message.contains("l2_normalize:")
            };
            match [got, want].into_iter().find(|message| !named(message)) {
                Some(message) => Err(format!("{op}: refused without its name: {message}")),
                None => Ok(Outcome::Refused),
            }
        }
        (got, want) => Err(format!("{op}: the CPU says {got:?}, the reference {want:?}")),
    }
}

/// What the fuzzer calls (`fuzz/fuzz_targets/ops.rs`).
pub fn ops(bytes: &[u8]) {
    if let Err(wrong) = case(bytes) {
        panic!("{wrong}");
    }
}

#[test]
fn operations_compute_or_refuse_by_name() {
    let mut counts = [[0; 3]; OPS.len()];
    let mut wrong = Vec::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    for i in 0..OPS.len() * 400 {
        let op = i % OPS.len();
        let mut bytes = vec![op as u8];
        bytes.extend((0..40).map(|_| next()));
        match case(&bytes) {
            Ok(outcome) => counts[op][outcome as usize] += 1,
            Err(message) => wrong.push(format!("{message}\n  bytes {bytes:?}")),
        }
    }
    wrong.sort_by_key(|message| message.split(':').next().map(str::to_owned));
    wrong.dedup_by_key(|message| message.split(':').take(2).collect::<String>());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (op, [refused, agrees, at_kink]) in OPS.iter().zip(counts) {
        assert!(agrees >= 20, "{op}: {agrees} legal cases");
        assert!(at_kink < agrees / 4, "{op}: {at_kink} cases at a kink, {agrees} others");
        assert!(
            refused >= 1 || ["relu", "scale", "square", "mean_pool"].contains(op),
            "{op}: no illegal case"
        );
    }
}

#[test]
fn inputs_that_the_fuzzer_found_are_handled() {
    for entry in std::fs::read_dir("tests/corpus/ops").unwrap() {
        ops(&std::fs::read(entry.unwrap().path()).unwrap());
    }
}

#[test]
fn every_public_operation_is_tried() {
    let surface = std::fs::read_to_string("tests/public-surface.txt").unwrap();
    let mut public: Vec<&str> = surface
        .lines()
        .filter_map(|line| line.strip_prefix("fn ops::"))
        .filter(|name| !name.contains("::") && *name != "instruction_set")
        .collect();
    public.sort_unstable();
    assert_eq!(public, OPS);
}

//! Optimizers and the momentum encoder over an entire arena against their definitions in f64.

use half::bf16;

use crate::numbers::{close, noise};
use crate::stage::{Memory, Stage, Value};

/// Elements of a chunk (OPTIMIZER_CHUNK of optimizer.cu).
const CHUNK: usize = 8192;

/// The optimizer's policy for a slot, with its own learning rate if it has one.
#[derive(Clone, Copy, PartialEq)]
enum ParamPolicy {
    Default,
    Excluded,
    Frozen,
    Rate(f64),
    Times(f64),
}

const DEFAULT_LR: f64 = 0.3;

/// Slot lengths, among them a single element and one more than a chunk; the gaps between slots must stay unchanged.
const SLOTS: [(usize, ParamPolicy); 8] = [
    (1, ParamPolicy::Default),
    (17, ParamPolicy::Excluded),
    (CHUNK, ParamPolicy::Default),
    (CHUNK + 1, ParamPolicy::Rate(0.05)),
    (31, ParamPolicy::Frozen),
    (2 * CHUNK + 777, ParamPolicy::Times(0.25)),
    (40, ParamPolicy::Times(20.0)), // zero weights
    (48, ParamPolicy::Default),     // zero gradients
];

struct Arena {
    /// First element and length.
    slots: Vec<(usize, usize, ParamPolicy)>,
    w: Vec<f32>,
    m: Vec<f32>,
    g: Vec<f32>,
}

impl Arena {
    fn new() -> Self {
        let (mut slots, mut end) = (Vec::new(), 0_usize);
        for (length, policy) in SLOTS {
            slots.push((end, length, policy));
            end = (end + length).next_multiple_of(16);
        }
        let (mut w, m, mut g): (Vec<f32>, Vec<f32>, Vec<f32>) =
            (noise(end, 1), noise(end, 2), noise(end, 3));
        w[slots[6].0..][..40].fill(0.0);
        g[slots[7].0..][..48].fill(0.0);
        Self { slots, w, m, g }
    }
}

/// The arena and its tables in device memory.
struct OnDevice {
    w: Memory<f32>,
    m: Memory<f32>,
    g: Memory<f32>,
    copy: Memory<bf16>,
    slots: Memory<u64>,
    chunks: Memory<i32>,
    policy: Memory<i32>,
    rates: Memory<f64>,
    lr: Memory<f64>,
}

impl OnDevice {
    fn new(stage: &Stage, arena: &Arena) -> Self {
        let (mut slots, mut chunks, mut policy, mut rates) = (vec![], vec![], vec![], vec![]);
        for (slot, &(offset, length, how)) in arena.slots.iter().enumerate() {
            slots.extend([offset as u64, length as u64, chunks.len() as u64]);
            chunks.extend(std::iter::repeat_n(slot as i32, length.div_ceil(CHUNK)));
            policy.push(match how {
                ParamPolicy::Excluded => 1,
                ParamPolicy::Frozen => 2,
                ParamPolicy::Default | ParamPolicy::Rate(_) | ParamPolicy::Times(_) => 0,
            });
            rates.push(match how {
                ParamPolicy::Rate(lr) => lr,
                ParamPolicy::Times(factor) => -factor,
                _ => -1.0,
            });
        }
        let copy: Vec<bf16> = arena.w.iter().map(|w| bf16::from_f32(*w)).collect();
        Self {
            w: stage.upload(&arena.w),
            m: stage.upload(&arena.m),
            g: stage.upload(&arena.g),
            copy: stage.upload(&copy),
            slots: stage.upload(&slots),
            chunks: stage.upload(&chunks),
            policy: stage.upload(&policy),
            rates: stage.upload(&rates),
            lr: stage.upload(&[DEFAULT_LR]),
        }
    }

    fn launch(&self, stage: &Stage, name: &str, grid: u32, arguments: &[Value]) {
        stage.launch(name, [grid, 1, 1], [256, 1, 1], 0, arguments);
    }

    fn chunks(&self) -> Value {
        (self.chunks.len as i32).into()
    }

    fn check(&self, stage: &Stage, what: &str, w: &[f64], m: &[f64]) {
        let got = self.w.read(stage);
        close(&format!("{what}: w"), &got, w, 1e-6);
        close(&format!("{what}: m"), &self.m.read(stage), m, 1e-6);
        let copy: Vec<bf16> = got.iter().map(|w| bf16::from_f32(*w)).collect();
        assert_eq!(self.copy.read(stage), copy, "{what}: the bf16 copy");
    }
}

/// One step by the definition: `scaling(|w|, |g|, |g + wd w|, lr)` returns scale and weight decay of a slot that is not
/// excluded.
fn expected(
    arena: &Arena,
    weight_decay: f64,
    momentum: f64,
    [nesterov, lr_in_momentum]: [bool; 2],
    scaling: impl Fn(f64, f64, f64, f64) -> (f64, f64),
) -> (Vec<f64>, Vec<f64>) {
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let (mut w, mut m, g) = (wide(&arena.w), wide(&arena.m), wide(&arena.g));
    for &(offset, length, policy) in &arena.slots {
        let lr = match policy {
            ParamPolicy::Rate(lr) => lr,
            ParamPolicy::Times(factor) => factor * DEFAULT_LR,
            _ => DEFAULT_LR,
        };
        let slot = offset..offset + length;
        let norm =
            |f: &dyn Fn(usize) -> f64| slot.clone().map(|i| f(i).powi(2)).sum::<f64>().sqrt();
        let (scale, decay) = match policy {
            ParamPolicy::Frozen => continue,
            ParamPolicy::Excluded => (1.0, 0.0),
            ParamPolicy::Default | ParamPolicy::Rate(_) | ParamPolicy::Times(_) => {
                scaling(norm(&|i| w[i]), norm(&|i| g[i]), norm(&|i| g[i] + weight_decay * w[i]), lr)
            }
        };
        for i in slot {
            let direction = if lr_in_momentum { lr } else { 1.0 } * scale * (g[i] + decay * w[i]);
            m[i] = momentum * m[i] + direction;
            let along = if nesterov { direction + momentum * m[i] } else { m[i] };
            w[i] -= if lr_in_momentum { along } else { lr * along };
        }
    }
    (w, m)
}

#[test]
fn sgd_updates_an_entire_arena() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        let arena = Arena::new();
        for nesterov in [false, true] {
            let d = OnDevice::new(&stage, &arena);
            let mut arguments: Vec<Value> = vec![(&d.w).into(), (&d.m).into(), (&d.copy).into()];
            arguments.extend([(&d.g).into(), (&d.slots).into(), (&d.chunks).into()]);
            arguments.extend([(&d.policy).into(), (&d.rates).into(), (&d.lr).into(), d.chunks()]);
            arguments.extend([0.9_f64.into(), 1e-2_f64.into(), i32::from(nesterov).into()]);
            d.launch(&stage, "sgd_step", 3, &arguments);
            let (w, m) = expected(&arena, 1e-2, 0.9, [nesterov, false], |_, _, _, _| (1.0, 1e-2));
            d.check(&stage, &format!("sgd, nesterov {nesterov}"), &w, &m);
        }
    }
}

#[test]
fn lars_updates_an_entire_arena() {
    const WD: f64 = 1e-2;
    for checked in [false, true] {
        let stage = Stage::take(checked);
        let arena = Arena::new();
        for variant in 0..8 {
            let [sum_of_norms, clip, in_momentum] = [1, 2, 4].map(|bit| variant & bit != 0);
            let flag = |on: bool| Value::from(i32::from(on));
            let trust = if clip { 0.02 } else { 0.4 };
            let d = OnDevice::new(&stage, &arena);
            let partial = stage.room::<f64>(d.chunks.len * 3);
            let mut arguments: Vec<Value> = vec![(&partial).into(), (&d.w).into(), (&d.g).into()];
            arguments.extend([&d.slots.at, &d.chunks.at, &d.policy.at].map(|at| Value::from(*at)));
            arguments.extend([d.chunks(), WD.into()]);
            d.launch(&stage, "lars_norms", 2, &arguments);
            let mut arguments: Vec<Value> = vec![(&d.w).into(), (&d.m).into(), (&d.copy).into()];
            arguments.extend([(&d.g).into(), (&partial).into(), (&d.slots).into()]);
            arguments.extend([(&d.chunks).into(), (&d.policy).into(), (&d.rates).into()]);
            arguments.extend([(&d.lr).into(), d.chunks(), 0.9_f64.into(), WD.into(), trust.into()]);
            arguments.extend([flag(sum_of_norms), flag(clip), flag(in_momentum)]);
            d.launch(&stage, "lars_step", d.chunks.len as u32, &arguments);
            let scaling = |w: f64, g: f64, decayed: f64, lr: f64| {
                let below = if sum_of_norms { g + WD * w + 1e-8 } else { decayed };
                let known = w > 0.0 && if sum_of_norms { g > 0.0 } else { decayed > 0.0 };
                match known {
                    true if clip => ((trust * w / below / lr).min(1.0), WD),
                    true => (trust * w / below, WD),
                    false => (1.0, if sum_of_norms { 0.0 } else { WD }),
                }
            };
            let (w, m) = expected(&arena, WD, 0.9, [false, in_momentum], scaling);
            let what = format!("lars {:?}", [sum_of_norms, clip, in_momentum]);
            d.check(&stage, &what, &w, &m);
        }
    }
}

#[test]
fn the_momentum_encoder_averages_weights() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for n in [1, 7, 8, 9, 127, 2053] {
            let (old, now): (Vec<f32>, Vec<f32>) = (noise(n, 4), noise(n, 5));
            for momentum in [0.0, 0.996, 1.0] {
                let (target, copy) = (stage.upload(&old), stage.room::<bf16>(n));
                let (online, momentum_) = (stage.upload(&now), stage.upload(&[momentum]));
                let arguments = [
                    (&target).into(),
                    (&copy).into(),
                    (&online).into(),
                    (&momentum_).into(),
                    (n as i64).into(),
                ];
                stage.launch("ema", [3, 1, 1], [32, 1, 1], 0, &arguments);
                let mix = |(t, o): (&f32, &f32)| {
                    momentum * f64::from(*t) + (1.0 - momentum) * f64::from(*o)
                };
                let want: Vec<f64> = old.iter().zip(&now).map(mix).collect();
                let got = target.read(&stage);
                close(&format!("ema of {n} at {momentum}"), &got, &want, 1e-7);
                let rounded: Vec<bf16> = got.iter().map(|v| bf16::from_f32(*v)).collect();
                assert_eq!(copy.read(&stage), rounded);
            }
        }
    }
}

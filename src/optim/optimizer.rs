//! SGD, LARS and Adam over an arena.
//!
//! SGD as in PyTorch: `g += wd w; m = mu m + g; w -= lr m` (Nesterov: `w -= lr (g + mu m)`).
//! LARS (You et al. 2017, arXiv:1708.03888) first scales each slot's gradient by `eta |w| / |g|`. Five published
//! implementations disagree on the details; [`Lars`] has a setting for each difference and a constructor for each
//! implementation, which names its repository and file.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::adam::{self, Adam, AdamStep};
use super::cuda::Tables;
use crate::arena::{Arena, Layout, Slot, SlotKind};
use crate::device::DeviceKind;
use crate::error::{Error, Result};
use crate::tensor::CHUNK;
use crate::tensor::{Float, Numbers, Tensor};

/// Which slots are exempt from weight decay and LARS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exclude {
    /// No slots.
    Nothing,
    /// Biases and batch norm's gains and shifts: no weight decay and, in LARS, no trust ratio.
    BiasAndNorm,
}

impl Exclude {
    fn exempts(self, kind: SlotKind) -> bool {
        self == Exclude::BiasAndNorm && kind.is_bias_or_norm()
    }
}

/// Stochastic gradient descent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sgd {
    /// The momentum coefficient, in `0..1`.
    pub momentum: f64,
    /// Use Nesterov momentum.
    pub nesterov: bool,
    /// The weight decay coefficient: `weight_decay * w` is added to the gradient.
    pub weight_decay: f64,
    /// Slots without weight decay.
    pub exclude: Exclude,
}

/// The denominator of the trust ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrustNorm {
    /// `|g + wd w|`; if either norm is 0, the ratio is 1 (SimCLR, BYOL).
    OfDecayed,
    /// `|g| + wd |w| + 1e-8`; if either norm is 0, the gradient is used unscaled and without decay (LARC and derivatives).
    SumOfNorms,
}

/// Layer-wise adaptive rate scaling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lars {
    /// The trust coefficient, eta.
    pub trust: f64,
    /// The denominator of the trust ratio.
    pub norm: TrustNorm,
    /// Limit the effective rate to that of SGD: the ratio is `min(ratio / lr, 1)`.
    pub clip: bool,
    /// Apply the learning rate inside the momentum (`m = mu m + lr g; w -= m`) instead of outside.
    pub lr_in_momentum: bool,
    /// The momentum coefficient, in `0..1`.
    pub momentum: f64,
    /// The weight decay coefficient: `weight_decay * w` is added to the gradient.
    pub weight_decay: f64,
    /// Slots without weight decay and without trust ratio.
    pub exclude: Exclude,
}

const EPS: f64 = 1e-8;

impl Lars {
    /// As in google-research/simclr, `lars_optimizer.py`.
    pub fn simclr(momentum: f64, weight_decay: f64) -> Self {
        Self {
            trust: 1e-3,
            norm: TrustNorm::OfDecayed,
            clip: false,
            lr_in_momentum: true,
            momentum,
            weight_decay,
            exclude: Exclude::BiasAndNorm,
        }
    }

    /// As in deepmind-research, `byol/utils/optimizers.py`.
    pub fn byol(momentum: f64, weight_decay: f64) -> Self {
        Self { lr_in_momentum: false, ..Self::simclr(momentum, weight_decay) }
    }

    /// As NVIDIA/apex, `apex/parallel/LARC.py`, around SGD, as used by SwAV and SimSiam's linear evaluation: no exclusions.
    pub fn larc(momentum: f64, weight_decay: f64) -> Self {
        Self {
            norm: TrustNorm::SumOfNorms,
            exclude: Exclude::Nothing,
            ..Self::byol(momentum, weight_decay)
        }
    }

    /// As in lightly, `utils/lars.py`, with biases and batch norm in its group without weight decay.
    pub fn lightly(momentum: f64, weight_decay: f64) -> Self {
        Self { exclude: Exclude::BiasAndNorm, ..Self::larc(momentum, weight_decay) }
    }

    /// As in solo-learn, `utils/lars.py`, with the settings of its CIFAR recipes: `eta` 0.02 and clipping.
    pub fn solo_learn(momentum: f64, weight_decay: f64) -> Self {
        Self { trust: 0.02, clip: true, ..Self::lightly(momentum, weight_decay) }
    }

    /// `(scale, decay)` of a slot: its gradient becomes `scale (g + decay w)`.
    fn scaling(&self, w: f64, g: f64, decayed: f64, lr: f64) -> (f64, f64) {
        let known = match self.norm {
            TrustNorm::OfDecayed => w > 0.0 && decayed > 0.0,
            TrustNorm::SumOfNorms => w > 0.0 && g > 0.0,
        };
        let (ratio, decay) = match (self.norm, known) {
            (TrustNorm::OfDecayed, true) => (self.trust * w / decayed, self.weight_decay),
            (TrustNorm::OfDecayed, false) => (1.0, self.weight_decay),
            (TrustNorm::SumOfNorms, true) => {
                (self.trust * w / (g + self.weight_decay * w + EPS), self.weight_decay)
            }
            (TrustNorm::SumOfNorms, false) => return (1.0, 0.0),
        };
        (if self.clip && known { (ratio / lr).min(1.0) } else { ratio }, decay)
    }
}

/// An update rule with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Stochastic gradient descent.
    Sgd(Sgd),
    /// Layer-wise adaptive rate scaling.
    Lars(Lars),
    /// Adam; weight decay is part of the gradient.
    Adam(Adam),
    /// AdamW; weight decay shrinks the weights.
    AdamW(Adam),
}

impl Rule {
    /// Checks that coefficients are numbers in their ranges.
    ///
    /// # Errors
    /// If one is not; the message names its key in a recipe.
    pub fn check(&self) -> Result<()> {
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        let (rule, momentum, weight_decay) = match self {
            Rule::Sgd(sgd) => ("sgd", vec![("momentum", sgd.momentum)], sgd.weight_decay),
            Rule::Lars(lars) => ("lars", vec![("momentum", lars.momentum)], lars.weight_decay),
            Rule::Adam(adam) | Rule::AdamW(adam) => {
                ("adam", vec![("beta1", adam.beta1), ("beta2", adam.beta2)], adam.weight_decay)
            }
        };
        if let Some((key, value)) = momentum.into_iter().find(|(_, value)| !below_one(*value)) {
            let what = format!("optim.rule.{rule}.{key} is {value}; it must be in 0..1");
            return Err(Error::config(what));
        }
        if !(weight_decay.is_finite() && weight_decay >= 0.0) {
            let what =
                format!("optim.rule.{rule}.weight_decay is {weight_decay}; it must be 0 or more");
            return Err(Error::config(what));
        }
        Ok(())
    }

    fn exclude(&self) -> Exclude {
        match self {
            Rule::Sgd(sgd) => sgd.exclude,
            Rule::Lars(lars) => lars.exclude,
            Rule::Adam(adam) | Rule::AdamW(adam) => adam.exclude,
        }
    }

    fn adam(&self) -> Option<&Adam> {
        match self {
            Rule::Adam(adam) | Rule::AdamW(adam) => Some(adam),
            Rule::Sgd(_) | Rule::Lars(_) => None,
        }
    }
}

/// A method's policy for a parameter, beyond what follows from the slot's kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum ParamPolicy {
    /// The optimiser's settings.
    #[default]
    Default,
    /// A fixed learning rate (SimSiam's predictor).
    FixedLr(f64),
    /// A positive multiplier of the learning rate (the new classifier when SwAV fine-tunes).
    LrMultiplier(f64),
    /// Neither value nor momentum is updated (SwAV's prototypes during the first steps). Adam's corrections count these
    /// updates, too, where PyTorch counts a slot's own.
    Frozen,
    /// No weight decay and no trust ratio, whatever its kind (SimCLR's supervised head).
    Exempt,
}

/// A slot, as the optimiser uses it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) offset: usize,
    pub(super) len: usize,
    /// Exempt by its kind.
    pub(super) exempt: bool,
    pub(super) policy: ParamPolicy,
}

/// The coefficients of an element's update by SGD or LARS: `m = mu m + in_lr scale (g + decay w)`, `w -= out_lr (…)`.
#[derive(Clone, Copy, Debug)]
struct Step {
    scale: f64,
    decay: f64,
    momentum: f64,
    nesterov: bool,
    in_lr: f64,
    out_lr: f64,
}

/// An update rule with its state: one momentum value per weight, and with Adam a second one.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    momentum: Tensor,
    /// Adam's mean of squares.
    squares: Option<Tensor>,
    segments: Vec<Segment>,
    /// The learning rate of the next update, and Adam's two corrections.
    rate: Numbers<f64>,
    /// Updates whose rate was set.
    updates: u64,
    /// For a GPU.
    tables: Option<Tables>,
}

impl Optimizer {
    /// Makes an optimiser for an arena, with zero momentum.
    pub fn new(rule: Rule, arena: &Arena) -> Self {
        let exclude = rule.exclude();
        let segment = |slot: &Slot| Segment {
            offset: slot.offset,
            len: slot.shape.elements(),
            exempt: exclude.exempts(slot.kind),
            policy: ParamPolicy::Default,
        };
        let segments: Vec<_> = arena.layout().params().iter().map(segment).collect();
        let device = arena.device();
        Self {
            rule,
            momentum: Tensor::zeros(device, [arena.values().len()]),
            squares: rule.adam().map(|_| Tensor::zeros(device, [arena.values().len()])),
            rate: Numbers::new(device, &[0.0, 1.0, 1.0]),
            updates: 0,
            tables: (device.kind() == DeviceKind::Cuda).then(|| Tables::new(device, &segments)),
            segments,
        }
    }

    /// The momentum, Adam's mean of gradients included, in the layout of the arena's values.
    pub fn momentum(&self) -> &Tensor {
        &self.momentum
    }

    /// The momentum, for restoring a checkpoint.
    pub fn momentum_mut(&mut self) -> &mut Tensor {
        &mut self.momentum
    }

    /// Adam's mean of squares, in the same layout.
    pub fn squares(&self) -> Option<&Tensor> {
        self.squares.as_ref()
    }

    /// Adam's mean of squares, for restoring a checkpoint.
    pub fn squares_mut(&mut self) -> Option<&mut Tensor> {
        self.squares.as_mut()
    }

    /// Sets the number of updates that the state has seen, for restoring a checkpoint.
    pub fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }

    /// Sets the policy of every slot, until the next call.
    ///
    /// # Panics
    /// If the layout is not that of the optimiser's arena.
    pub fn set_policies(&mut self, layout: &Layout, policy: impl Fn(&Slot) -> ParamPolicy) {
        assert_eq!(layout.params().len(), self.segments.len(), "optimizer: another layout");
        for (segment, slot) in self.segments.iter_mut().zip(layout.params()) {
            segment.policy = policy(slot);
        }
        if let Some(tables) = &mut self.tables {
            tables.set_policies(&self.segments);
        }
    }

    /// Updates the arena's values along its gradients with learning rate `lr >= 0`.
    ///
    /// # Panics
    /// As [`Optimizer::update`].
    pub fn step(&mut self, arena: &mut Arena, lr: f64) {
        self.set_rate(lr);
        self.update(arena);
    }

    /// Sets the learning rate of the next update, `lr >= 0`, and counts that update.
    pub fn set_rate(&mut self, lr: f64) {
        self.updates += 1;
        let [first, second] =
            self.rule.adam().map_or([1.0; 2], |adam| adam.corrections(self.updates));
        self.rate.set(&[lr, first, second]);
    }

    /// Updates the arena's values along its gradients with the rate from [`Optimizer::set_rate`].
    ///
    /// # Panics
    /// If the arena's device or layout is not that of the optimiser.
    pub fn update(&mut self, arena: &mut Arena) {
        arena.values().expect_on(self.momentum.device(), "optimizer");
        let slots = arena.layout().params();
        let same = |(segment, slot): (&Segment, &Slot)| {
            (segment.offset, segment.len) == (slot.offset, slot.shape.elements())
        };
        assert!(
            slots.len() == self.segments.len() && self.segments.iter().zip(slots).all(same),
            "optimizer: the arena has another layout"
        );
        for (what, tensor) in [("values", arena.values()), ("momentum", &self.momentum)] {
            let len = arena.layout().len();
            assert_eq!(
                tensor.len(),
                len,
                "optimizer: a tensor of another length replaced the {what}"
            );
        }
        match arena.device().kind() {
            DeviceKind::Cpu => self.step_as::<f32>(arena),
            DeviceKind::Cuda => {
                let tables = self.tables.as_ref().expect("made with the optimizer on a GPU");
                let lr = self.rate.tensor().device_in();
                let state = [Some(&mut self.momentum), self.squares.as_mut()];
                tables.step(self.rule, arena, state, lr);
            }
            DeviceKind::Reference => self.step_as::<f64>(arena),
        }
        arena.refresh();
    }

    fn step_as<T: Float>(&mut self, arena: &mut Arena) {
        let device = arena.device().clone();
        let (values, gradients) = arena.values_and_gradients();
        let (mut w, g) = (values.data_mut::<T>(), gradients.data::<T>());
        let mut m = self.momentum.data_mut::<T>();
        let mut v = self.squares.as_mut().map_or(&mut [][..], |squares| squares.data_mut::<T>());
        // Slots are in order of their offsets, so each splits its part off the front.
        let mut at = 0;
        let mut slots = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let (skip, len) = (segment.offset - at, segment.len);
            let seconds = if v.is_empty() { [0; 2] } else { [skip, len] };
            let parts = (
                part(&mut w, [skip, len]),
                part(&mut m, [skip, len]),
                part(&mut v, seconds),
                &g[segment.offset..][..len],
            );
            slots.push((parts, *segment));
            at = segment.offset + len;
        }
        let (rule, rate) = (self.rule, self.rate.values());
        let (lr, corrections) = (rate[0], [rate[1], rate[2]]);
        device.run(|| {
            slots.into_par_iter().each(|((w, m, v, g), segment)| {
                let (exempt, lr) = match segment.policy {
                    ParamPolicy::Default => (segment.exempt, lr),
                    ParamPolicy::FixedLr(lr) => (segment.exempt, lr),
                    ParamPolicy::LrMultiplier(factor) => (segment.exempt, factor * lr),
                    ParamPolicy::Exempt => (true, lr),
                    ParamPolicy::Frozen => return,
                };
                let step = slot_step(rule, w, g, exempt, [lr, corrections[0], corrections[1]]);
                let chunks = w.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK));
                match step {
                    Update::Momentum(step) => {
                        chunks.zip(g.par_chunks(CHUNK)).each(|((w, m), g)| update(w, m, g, step))
                    }
                    Update::Adam(step) => chunks
                        .zip(v.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)))
                        .each(|((w, m), (v, g))| adam::update(w, m, v, g, step)),
                }
            });
        });
    }
}

/// Splits `skip` elements and then the next `len` off the front, and returns the latter.
fn part<'a, T>(rest: &mut &'a mut [T], [skip, len]: [usize; 2]) -> &'a mut [T] {
    let (part, later) = std::mem::take(rest)[skip..].split_at_mut(len);
    *rest = later;
    part
}

/// The coefficients of a slot's update, by SGD and LARS or by Adam.
enum Update {
    Momentum(Step),
    Adam(AdamStep),
}

/// `rate`: the learning rate and Adam's corrections.
fn slot_step<T: Float>(rule: Rule, w: &[T], g: &[T], exempt: bool, rate: [f64; 3]) -> Update {
    let [lr, corrections @ ..] = rate;
    Update::Momentum(match rule {
        Rule::Sgd(sgd) => Step {
            scale: 1.0,
            decay: if exempt { 0.0 } else { sgd.weight_decay },
            momentum: sgd.momentum,
            nesterov: sgd.nesterov,
            in_lr: 1.0,
            out_lr: lr,
        },
        Rule::Lars(lars) => {
            let (scale, decay) = if exempt {
                (1.0, 0.0)
            } else {
                let [w_norm, g_norm, decayed] = norms(w, g, lars.weight_decay);
                lars.scaling(w_norm, g_norm, decayed, lr)
            };
            let (in_lr, out_lr) = if lars.lr_in_momentum { (lr, 1.0) } else { (1.0, lr) };
            Step { scale, decay, momentum: lars.momentum, nesterov: false, in_lr, out_lr }
        }
        Rule::Adam(adam) | Rule::AdamW(adam) => {
            let decay = if exempt { 0.0 } else { adam.weight_decay };
            let decoupled = matches!(rule, Rule::AdamW(_));
            return Update::Adam(AdamStep { rule: adam, decay, decoupled, lr, corrections });
        }
    })
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn update<T: Float>(w: &mut [T], m: &mut [T], g: &[T], step: Step) {
    for ((w, m), g) in w.iter_mut().zip(m).zip(g) {
        let direction = step.in_lr * step.scale * (g.widen() + step.decay * w.widen());
        let moved = step.momentum * m.widen() + direction;
        *m = T::narrow(moved);
        let along = if step.nesterov { direction + step.momentum * moved } else { moved };
        *w = T::narrow(w.widen() - step.out_lr * along);
    }
}

/// `|w|`, `|g|` and `|g + wd w|`, with the sums of chunks added in order.
fn norms<T: Float>(w: &[T], g: &[T], weight_decay: f64) -> [f64; 3] {
    let partial: Vec<[f64; 3]> = w
        .par_chunks(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .map(|(w, g)| {
            w.iter().zip(g).fold([0.0; 3], |[ww, gg, dd], (w, g)| {
                let (w, g) = (w.widen(), g.widen());
                let d = g + weight_decay * w;
                [ww + w * w, gg + g * g, dd + d * d]
            })
        })
        .collect();
    let sum = partial.iter().fold([0.0; 3], |a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2]]);
    sum.map(f64::sqrt)
}

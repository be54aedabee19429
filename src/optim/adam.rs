//! Adam (Kingma and Ba 2014, arXiv:1412.6980) and AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), as in PyTorch.
//!
//! In update `t`, counted from 1: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g²`,
//! `w -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)`. Adam adds `wd w` to the gradient; AdamW multiplies the weights by
//! `1 - lr wd` first, so that the decay is not divided by the gradient's size.

use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use super::optimizer::Exclude;
use crate::tensor::Float;

/// The settings of Adam and of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adam {
    /// The decay of the mean of gradients, in `0..1`: 0.9.
    pub beta1: f64,
    /// The decay of the mean of their squares, in `0..1`: 0.999.
    pub beta2: f64,
    /// What is added to the root of the mean of squares, > 0: 1e-8.
    pub eps: f64,
    /// The weight decay coefficient: of the gradient in Adam, of the weights in AdamW.
    pub weight_decay: f64,
    /// Slots without weight decay.
    pub exclude: Exclude,
}

impl Adam {
    /// PyTorch's defaults: 0.9, 0.999, 1e-8, and decay on all slots.
    pub fn new(weight_decay: f64) -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, exclude: Exclude::Nothing }
    }

    /// `1 - b1^t` and `1 - b2^t` of update `t`.
    pub(super) fn corrections(&self, update: u64) -> [f64; 2] {
        [self.beta1, self.beta2].map(|beta| 1.0 - beta.powf(update as f64))
    }
}

/// The coefficients of a slot's update.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamStep {
    pub(super) rule: Adam,
    /// The decay of this slot, and whether it is AdamW's.
    pub(super) decay: f64,
    pub(super) decoupled: bool,
    pub(super) lr: f64,
    pub(super) corrections: [f64; 2],
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub(super) fn update<T: Float>(w: &mut [T], m: &mut [T], v: &mut [T], g: &[T], step: AdamStep) {
    let AdamStep { rule: Adam { beta1, beta2, eps, .. }, decay, decoupled, lr, corrections } = step;
    let (coupled, kept) = if decoupled { (0.0, 1.0 - lr * decay) } else { (decay, 1.0) };
    let (rate, root) = (lr / corrections[0], corrections[1].sqrt());
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        let g = g.widen() + coupled * w.widen();
        let mean = beta1 * m.widen() + (1.0 - beta1) * g;
        let square = beta2 * v.widen() + (1.0 - beta2) * g * g;
        (*m, *v) = (T::narrow(mean), T::narrow(square));
        *w = T::narrow(kept * w.widen() - rate * mean / (square.sqrt() / root + eps));
    }
}

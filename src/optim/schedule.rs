//! Learning rates: what the batch size makes of a base rate, and how the rate moves step by step.

use serde::{Deserialize, Serialize};

/// How the base learning rate depends on the batch size `B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrRule {
    /// `lr B / 256` (Goyal et al. 2017).
    Linear,
    /// `lr sqrt(B)` (SimCLR, appendix B.1).
    Sqrt,
    /// `lr`.
    Fixed,
}

impl LrRule {
    /// The learning rate for batches of `batch` images.
    pub fn apply(self, lr: f64, batch: usize) -> f64 {
        match self {
            LrRule::Linear => lr * batch as f64 / 256.0,
            LrRule::Sqrt => lr * (batch as f64).sqrt(),
            LrRule::Fixed => lr,
        }
    }
}

/// Linear warm-up from zero, then half a cosine to zero, both per step
/// (google-research/simclr, `model_util.py`: `WarmUpAndCosineDecay`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of warm-up; may be 0.
    pub warmup: u64,
    /// All steps, warm-up included.
    pub total: u64,
}

impl Schedule {
    /// The learning rate of `step`, which counts from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let span = (self.total - self.warmup.min(self.total)).max(1);
        let done = ((step - self.warmup) as f64 / span as f64).min(1.0);
        self.peak * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_from_zero_and_decays_to_zero() {
        let schedule = Schedule { peak: 4.8, warmup: 10, total: 110 };
        assert_eq!(schedule.lr(0), 0.0);
        assert_eq!(schedule.lr(5), 2.4);
        assert_eq!(schedule.lr(10), 4.8);
        assert!((schedule.lr(60) - 2.4).abs() < 1e-12);
        assert!(schedule.lr(110).abs() < 1e-12 && schedule.lr(500).abs() < 1e-12);
    }

    #[test]
    fn rules_follow_the_batch() {
        assert_eq!(LrRule::Linear.apply(0.3, 4096), 4.8);
        assert_eq!(LrRule::Sqrt.apply(0.075, 4096), 4.8);
        assert_eq!(LrRule::Fixed.apply(0.3, 4096), 0.3);
    }
}

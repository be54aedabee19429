//! Learning rates: scaling with the batch size, and schedules over steps.

use serde::{Deserialize, Serialize};

/// How the base learning rate scales with the batch size `B`.
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

/// How the rate decays after the warm-up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Decay {
    /// Half a cosine, step by step (SimCLR, BYOL, SwAV).
    #[default]
    Cosine,
    /// Half a cosine, updated at the start of each epoch only (MoCo v2, SimSiam).
    CosinePerEpoch,
    /// No decay.
    Constant,
    /// Multiplied by `factor` at the start of each of these epochs, counted from 0 (MoCo v1: 120 and 160).
    Steps {
        /// Epochs, in ascending order.
        epochs: Vec<u64>,
        /// The factor that the rate is multiplied by.
        factor: f64,
    },
}

/// Linear warm-up, then a decay: the learning rate of each step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Schedule {
    /// The rate at the end of the warm-up.
    pub peak: f64,
    /// Steps of warm-up; may be 0.
    pub warmup: u64,
    /// Number of steps, including warm-up.
    pub total: u64,
    /// The initial rate of the warm-up. `None` starts at zero and reaches the peak at the first step after the warm-up
    /// (google-research/simclr, `model_util.py`). A rate starts there and reaches the peak at the last step of the warm-up
    /// (SwAV's `linspace`).
    pub warmup_from: Option<f64>,
    /// The final rate of a cosine.
    pub end: f64,
    /// How the rate decays.
    pub decay: Decay,
    /// Steps per epoch, for decays per epoch; 0 counts as 1.
    pub per_epoch: u64,
}

impl Schedule {
    /// The learning rate of `step`, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            let (step, warmup) = (step as f64, self.warmup as f64);
            return match self.warmup_from {
                Some(from) => from + (self.peak - from) * step / (warmup - 1.0).max(1.0),
                None => self.peak * step / warmup,
            };
        }
        let per_epoch = self.per_epoch.max(1);
        let epoch_start = step - step % per_epoch;
        match &self.decay {
            Decay::Cosine => self.cosine(step),
            Decay::CosinePerEpoch => self.cosine(epoch_start.max(self.warmup)),
            Decay::Constant => self.peak,
            Decay::Steps { epochs, factor } => {
                let passed = epochs.iter().filter(|&&epoch| step / per_epoch >= epoch).count();
                self.peak * factor.powi(passed as i32)
            }
        }
    }

    fn cosine(&self, step: u64) -> f64 {
        let span = (self.total - self.warmup.min(self.total)).max(1);
        let progress = ((step - self.warmup) as f64 / span as f64).min(1.0);
        self.end + (self.peak - self.end) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_from_zero_and_decays_to_zero() {
        let schedule = Schedule { peak: 4.8, warmup: 10, total: 110, ..Schedule::default() };
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

    #[test]
    fn published_schedules_are_followed() {
        // MoCo v1: 0.03, a tenth from epoch 120, a hundredth from 160.
        let decay = Decay::Steps { epochs: vec![120, 160], factor: 0.1 };
        let moco =
            Schedule { peak: 0.03, total: 2000, per_epoch: 10, decay, ..Schedule::default() };
        let expected = [(0, 0.03), (1199, 0.03), (1200, 0.003), (1600, 0.0003)];
        assert!(expected.iter().all(|&(step, lr)| (moco.lr(step) - lr).abs() < 1e-12));
        // MoCo v2 and SimSiam: the cosine of whole epochs.
        let decay = Decay::CosinePerEpoch;
        let v2 = Schedule { peak: 0.03, total: 2000, per_epoch: 10, decay, ..Schedule::default() };
        let half = 0.03 * 0.5 * (1.0 + (std::f64::consts::PI * 100.0 / 200.0).cos());
        assert!((v2.lr(1000) - half).abs() < 1e-12 && v2.lr(1009) == v2.lr(1000));
        // SwAV: numpy's linspace(0.3, 4.8, 10), then a cosine to 0.0048.
        let swav = Schedule {
            peak: 4.8,
            warmup: 10,
            total: 110,
            warmup_from: Some(0.3),
            end: 0.0048,
            ..Schedule::default()
        };
        assert!((swav.lr(0) - 0.3).abs() < 1e-12 && (swav.lr(9) - 4.8).abs() < 1e-12);
        assert!((swav.lr(10) - 4.8).abs() < 1e-12 && (swav.lr(110) - 0.0048).abs() < 1e-12);
    }
}

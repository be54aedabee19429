//! Published protocols for training a linear classifier on frozen features. Comments name repository and file.
//!
//! The best learning rate spans 0.1 to 30 between methods, because their features differ in norm: sweep it, or standardise.

use crate::arena::Init;
use crate::error::{Error, Result};
use crate::optim::{Decay, Exclude, Lars, LrRule, Rule, Schedule, Sgd};

/// The settings of a linear probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    /// The update rule.
    pub rule: Rule,
    /// The base learning rate.
    pub lr: f64,
    /// How the rate scales with the batch size.
    pub lr_rule: LrRule,
    /// How the rate decays; there is no warm-up.
    pub decay: Decay,
    /// Passes over the training images.
    pub epochs: u32,
    /// Images per step; all images if there are fewer.
    pub batch: usize,
    /// Initial weights; biases start at zero.
    pub init: Init,
    /// Whether each step uses new crops, half of them flipped. If not, features of the centre crops are computed once.
    pub augment: bool,
    /// Whether features are standardised to mean 0 and deviation 1, as a batch norm without parameters would.
    pub standardise: bool,
}

/// Names of protocols. The first one is not published: it is quick, and fair to features of any norm.
pub const PROTOCOLS: [&str; 7] = ["cached", "moco", "simclr", "swav", "byol", "simsiam", "lightly"];

impl Protocol {
    /// Returns the protocol of that name, one of [`PROTOCOLS`].
    ///
    /// # Errors
    /// If the name is unknown; the message lists the valid names.
    pub fn named(name: &str) -> Result<Self> {
        let sgd = |nesterov, weight_decay, exclude| {
            Rule::Sgd(Sgd { momentum: 0.9, nesterov, weight_decay, exclude })
        };
        let plain = sgd(false, 0.0, Exclude::Nothing);
        let small = Init::Normal(0.01);
        let cosine = Self {
            rule: plain,
            lr: 0.1,
            lr_rule: LrRule::Linear,
            decay: Decay::Cosine,
            epochs: 90,
            batch: 256,
            init: Init::Constant(0.0),
            augment: true,
            standardise: false,
        };
        Ok(match name {
            "cached" => Self { augment: false, standardise: true, ..cosine },
            // moco:main_lincls.py
            "moco" => Self {
                lr: 30.0,
                lr_rule: LrRule::Fixed,
                decay: Decay::Steps { epochs: vec![60, 80], factor: 0.1 },
                epochs: 100,
                init: small,
                ..cosine
            },
            // simclr:README.md; simclr:model_util.py, add_weight_decay: the bias decays, too, unless the optimiser is LARS
            "simclr" => Self { rule: sgd(true, 1e-6, Exclude::Nothing), batch: 4096, ..cosine },
            // swav:eval_linear.py
            "swav" => Self {
                rule: sgd(false, 1e-6, Exclude::Nothing),
                lr: 0.3,
                lr_rule: LrRule::Fixed,
                decay: Decay::CosinePerEpoch,
                epochs: 100,
                init: small,
                ..cosine
            },
            // byol:configs/eval.py
            "byol" => Self {
                rule: sgd(true, 0.0, Exclude::Nothing),
                lr: 0.2,
                epochs: 80,
                batch: 4096,
                ..cosine
            },
            // simsiam:main_lincls.py
            "simsiam" => Self {
                rule: Rule::Lars(Lars::larc(0.9, 0.0)),
                decay: Decay::CosinePerEpoch,
                batch: 4096,
                init: small,
                ..cosine
            },
            // lightly:utils/benchmarking/linear_classifier.py
            "lightly" => cosine,
            _ => {
                let known = PROTOCOLS.join(", ");
                let reason = format!("unknown protocol {name}; known protocols: {known}");
                return Err(Error::Config(reason));
            }
        })
    }

    /// Returns the protocol over another number of epochs; steps of the rate are moved in proportion.
    pub fn over(mut self, epochs: u32) -> Self {
        if let Decay::Steps { epochs: at, .. } = &mut self.decay {
            let scaled = |at: &u64| *at * u64::from(epochs) / u64::from(self.epochs);
            *at = at.iter().map(scaled).collect();
        }
        self.epochs = epochs;
        self
    }

    /// Returns the learning rate schedule over `images` images. `lr` replaces the protocol's rate; no rule scales it.
    pub(super) fn schedule(&self, images: usize, lr: Option<f64>) -> Schedule {
        let batch = self.batch_of(images);
        let per_epoch = (images / batch) as u64;
        Schedule {
            peak: lr.unwrap_or_else(|| self.lr_rule.apply(self.lr, batch)),
            total: per_epoch * u64::from(self.epochs),
            decay: self.decay.clone(),
            per_epoch,
            ..Schedule::default()
        }
    }

    pub(super) fn batch_of(&self, images: usize) -> usize {
        self.batch.min(images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_have_their_published_rates() {
        let at = |name: &str, images, step| {
            Protocol::named(name).unwrap().schedule(images, None).lr(step)
        };
        for name in PROTOCOLS {
            assert!(Protocol::named(name).is_ok(), "{name}");
        }
        // 10 steps of 256 an epoch; 4,096 of 8,192 images are 2.
        assert_eq!([0, 599].map(|step| at("moco", 2560, step)), [30.0, 30.0]);
        assert!((at("moco", 2560, 800) - 0.3).abs() < 1e-12);
        assert!((at("simclr", 8192, 0) - 1.6).abs() < 1e-12);
        assert!((at("byol", 8192, 0) - 3.2).abs() < 1e-12);
        assert!((at("byol", 100, 0) - 0.2 * 100.0 / 256.0).abs() < 1e-12);
        assert!((at("simsiam", 8192, 90) - 0.8).abs() < 1e-12);
        assert_eq!(at("swav", 2560, 9), 0.3);
        let shorter = Protocol::named("moco").unwrap().over(10);
        assert_eq!(shorter.decay, Decay::Steps { epochs: vec![6, 8], factor: 0.1 });
        assert!(
            Protocol::named("mocco").unwrap_err().to_string().contains("known protocols: cached")
        );
    }
}

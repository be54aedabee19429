//! How a recipe trains: its method and optimizer by name, length and batch, and what stops a run.

use serde::{Deserialize, Serialize};

use crate::device::{DeviceKind, Precision};
use crate::error::Result;
use crate::optim::{Decay, LrRule, Rule};

/// A method by name; the method itself reads the rest of its table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSettings {
    /// A name of [`ALL`](crate::methods::ALL).
    pub name: String,
    /// The method's own settings.
    #[serde(flatten)]
    pub settings: toml::Table,
}

/// The optimizer and its learning rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimSettings {
    /// The base learning rate, before `lr_rule`.
    pub lr: f64,
    /// How the rate scales with the batch size.
    pub lr_rule: LrRule,
    /// Epochs of linear warm-up; may be fractional.
    pub warmup_epochs: f64,
    /// The rate at which the warm-up starts, not scaled by `lr_rule`; 0 if absent. See
    /// [`Schedule::warmup_from`](crate::optim::Schedule::warmup_from).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_from: Option<f64>,
    /// The rate at which a cosine ends, not scaled by `lr_rule`.
    #[serde(default)]
    pub end_lr: f64,
    /// How the rate decays after the warm-up.
    #[serde(default)]
    pub decay: Decay,
    /// The update rule and its settings.
    pub rule: Rule,
}

/// Length, batch size, checkpoints and threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Passes over the training images.
    pub epochs: u32,
    /// Images per step, each in several views.
    pub batch: usize,
    /// The schedule counts all images, as if an epoch's incomplete batch went on into the next epoch: `epochs * images / batch`
    /// steps in place of `epochs * (images / batch)`. The steps that dropped batches leave out follow as further epochs, the last
    /// of them cut short. SimCLR and BYOL.
    #[serde(default, skip_serializing_if = "is_false")]
    pub all_images: bool,
    /// Parts that a step is computed in, for batches that do not fit into memory. Gradients are those of the full batch; batch
    /// norm sees one part.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub micro_batches: usize,
    /// Residual blocks save only their inputs for the backward pass, which computes them again (activation checkpointing): about a
    /// third more computation for a fraction of the memory. Does not change results. `inspect --memory` shows both.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recompute: bool,
    /// kNN accuracy is measured every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub knn_every: u32,
    /// A checkpoint is written every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub checkpoint_every: u32,
    /// A checkpoint is also written every this many steps; 0 for none within an epoch.
    #[serde(default)]
    pub checkpoint_every_steps: u64,
    /// A checkpoint is also written once the last one is this many minutes old; 0 for never.
    #[serde(default)]
    pub checkpoint_every_minutes: f64,
    /// Number of checkpoints that are kept; at least 1.
    #[serde(default = "three")]
    pub keep: usize,
    /// The type in which a device stores activations and multiplies: `bf16` or `f32`. If absent, bf16 on a
    /// GPU and on a processor whose instructions for bf16 are faster, f32 on others and where several processes train together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// The views of the first `dump_views` steps, and the initial weights, are written to the run's `parity/` folder for
    /// `benches/peers/parity.py`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dump_views: u64,
    /// Compute threads; 0 for one per core. Does not change results.
    #[serde(default)]
    pub threads: usize,
    /// Loader threads; 0 for one per core. Does not change results.
    #[serde(default)]
    pub loader_threads: usize,
    /// A weight file to start from, in torchvision's names. It must hold the complete backbone; heads are read if it has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Whether the classifier in that file is taken, too, if it has as many classes as this run. Fine-tuning starts a new one: the
    /// file's may number other classes.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub init_classifier: bool,
}

impl TrainSettings {
    /// The precision that is asked for, or the one in which a process alone trains on a device of this kind.
    ///
    /// # Errors
    /// As [`Precision::of_training`], also if a precision is asked for.
    pub(crate) fn precision_on(&self, kind: DeviceKind) -> Result<Precision> {
        let usual = Precision::of_training(kind, false)?;
        Ok(self.precision.unwrap_or(usual))
    }
}

/// When a run is stopped because it diverged or collapsed, and what it reports.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchSettings {
    /// Embeddings count as collapsed if their standard deviation is below this share of `1 / sqrt(d)`; healthy runs were measured
    /// above 0.19.
    pub collapsed_std: f64,
    /// Embeddings count as collapsed to a line below this effective rank. The deviation does not show it, because a batch norm at
    /// the end of a head keeps it up.
    pub collapsed_rank: f64,
    /// Features count as collapsed if an evaluation measures a lower RankMe of them, on at least 64 features and 128 images; healthy runs
    /// were measured above 8. 0 for never.
    pub collapsed_rank_me: f64,
    /// Below this many prototypes in use, all images count as having one assignment.
    pub collapsed_prototypes: f64,
    /// A run counts as diverged if an epoch's mean loss reaches this multiple of the run's first loss (of 1, or of MoCo's loss at
    /// chance, if that is less); 0 for never.
    pub diverged: f64,
    /// Report divergence or collapse and carry on instead of stopping.
    pub carry_on: bool,
    /// Write `report.html` after every epoch and at the end, with new pictures each time kNN is measured.
    pub report: bool,
    /// Measure with each evaluation what the features are worth without labels (`eval::quality`); without it, a run
    /// without labels has no best checkpoint.
    pub quality: bool,
    /// Also write the numbers of `metrics.jsonl` as TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self {
            collapsed_std: 0.05,
            collapsed_rank: 1.3,
            collapsed_rank_me: 3.0,
            collapsed_prototypes: 1.5,
            diverged: 10.0,
            carry_on: false,
            report: true,
            quality: true,
            tensorboard: false,
        }
    }
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn one() -> usize {
    1
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

fn three() -> usize {
    3
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

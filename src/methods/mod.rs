//! The methods: one file each, which reads like the paper's pseudocode, and one row each in [`ALL`].
//!
//! A method holds the description of its network and its own state (queue, target network); the trained weights live in an arena.
//! A training step calls a method like this:
//!
//! ```no_run
//! # use selfsup::{arena::Arena, methods::Method, optim::{Optimizer, Schedule}, tape::step, tensor::Tensor};
//! # fn one(method: &mut dyn Method, online: &mut Arena, optimizer: &mut Optimizer, schedule: &Schedule,
//! #        views: &[Tensor], iteration: u64, progress: f64) -> selfsup::Result<()> {
//! method.prepare(iteration);                                      // host-side numbers of this iteration
//! method.before_step(online);                                     // momentum encoder, prototypes
//! let loss = step(online, |tape| method.loss(tape, views))?;      // forward, backward, gradients into the arena
//! optimizer.step(online, schedule.lr(iteration));                 // one or two launches
//! method.after_update(online, progress);                          // target network, queue
//! # let _ = loss; Ok(()) }
//! ```
//!
//! # The methods compared
//!
//! | | [`moco`] v1, v2 | [`simclr`] | [`simclr_v2`] | [`swav`] | [`byol`] | [`simsiam`] |
//! |---|---|---|---|---|---|---|
//! | negatives | queue | rest of the batch | rest of the batch, or memory | none | none | none |
//! | momentum encoder | updated before the keys, constant momentum | no | with memory | no | updated after the step, momentum rises to 1 along a cosine | no |
//! | queue | 65,536 keys | no | 64K keys, optional | 3,840 features at small batches | no | no |
//! | clustering | no | no | no | Sinkhorn over prototypes | no | no |
//! | predictor | no | no | no | no | yes | yes |
//! | stop-gradient | keys | no | keys, with memory | assignments | target | target |
//! | what prevents collapse | negatives | negatives | negatives | equal use of prototypes | predictor and moving target | predictor and stop-gradient |
//! | batch norm sees | 32 rows, keys shuffled | both views | both views | all rows of a resolution | one view | one view |
//! | batch size in the paper | 256 | 4096 | 4096 | 4096, or 256 with queue | 4096 | 512 |
//! | sensitivity to batch size | low: the queue compensates | high: -5 points at 256, 100 epochs | lower with memory | low with queue | low down to 256 with accumulation | low, 64 to 2048 |

pub mod byol;
mod dictionary;
pub mod distill;
mod micro;
pub mod moco;
mod monitors;
pub mod simclr;
pub mod simclr_v2;
pub mod simsiam;
pub mod supervised;
pub mod swav;

use std::path::PathBuf;
use std::sync::Arc;

use crate::arena::{Arena, Layout, Slot};
use crate::error::{Error, Result};
use crate::nn::{ResNet, ResNetConfig};
use crate::optim::ParamPolicy;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
pub use micro::{check_micro_batches, step};
pub use monitors::{BINS, Reading, Readings};

/// What a method learns about a run before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunInfo {
    /// Seed of all random numbers.
    pub seed: u64,
    /// Images per step, of all ranks.
    pub batch: usize,
    /// Images of the data set.
    pub images: usize,
    /// Steps per epoch, at least 1.
    pub per_epoch: u64,
    /// Steps of the complete run, at least 1.
    pub total: u64,
}

/// Which rows of a batch the loss couples. This decides how a step can be split into micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coupling {
    /// Unknown: the step cannot be split.
    Whole,
    /// Only the views of one image: the loss is a mean over images, and the gradients of micro-batches add up.
    Images,
    /// All rows of the batch: [`Method::embed_part`] computes the embeddings of each micro-batch twice
    /// ([`cached_step`](crate::tape::cached_step)), and [`Method::couple`] computes the loss of all of them.
    Batch {
        /// Rows per image among the embeddings.
        views: usize,
    },
}

/// One part of a method's state next to the online weights. Checkpoints store all of them.
#[derive(Debug)]
pub enum State<'a> {
    /// A second network, such as a momentum encoder.
    Network(&'a mut Arena),
    /// A queue or memory bank.
    Rows(&'a mut Tensor),
    /// A pointer or a counter.
    Count(&'a mut u64),
}

/// A self-supervised method, as the training loop uses it.
pub trait Method {
    /// The slots of the trained network.
    fn layout(&self) -> &Arc<Layout>;

    /// The backbone whose features are evaluated, with weights in the online arena.
    fn backbone(&self) -> &ResNet;

    /// Names the setting that has no CUDA kernels, or `None` if the method runs on a GPU.
    fn without_cuda(&self) -> Option<&'static str> {
        None
    }

    /// Names the setting that several ranks cannot train, or `None` if N ranks compute what one does.
    ///
    /// A method that answers `None` has a loss that is a mean over its images, or that sees the rows of all ranks: those that couple
    /// rows gather them ([`Arena::group`]). Its state is the same on every rank. The default refuses.
    fn without_ranks(&self) -> Option<&'static str> {
        Some("a method that does not say that N ranks compute what one does")
    }

    /// Views of each image per step.
    fn views(&self) -> usize {
        2
    }

    /// Creates the method's state from the initial online weights. Called once, before the first step.
    ///
    /// # Errors
    /// If the settings do not fit the run, such as a queue whose length is not a multiple of the batch size.
    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        let _ = (online, run);
        Ok(())
    }

    /// A teacher network and the file from which to load its weights before the first step. It is never trained.
    fn teacher(&mut self) -> Option<(PathBuf, &mut Arena)> {
        None
    }

    /// Receives the class of each image of this rank's share of the next batch, -1 for an image without a label. Called before [`Method::prepare`].
    ///
    /// # Errors
    /// If the method needs labels and one is missing or out of range.
    fn labels(&mut self, labels: &[i32]) -> Result<()> {
        let _ = labels;
        Ok(())
    }

    /// Receives the indices, in the data set, of the images of this rank's share of the next batch. Called after [`Method::prepare`].
    fn samples(&mut self, indices: &[u32]) {
        let _ = indices;
    }

    /// Sets the host-side numbers of a step: momentum, random draws, queue positions. Runs nothing on the device.
    ///
    /// Operations read these numbers through [`Numbers`](crate::tensor::Numbers). When a GPU replays a captured step, only this
    /// function, [`Method::labels`] and [`Method::samples`] run, so everything must follow from `iteration` alone.
    fn prepare(&mut self, iteration: u64) {
        let _ = iteration;
    }

    /// The phase of the step, asked after [`Method::prepare`]. Steps that run different operations must have different phases: a
    /// captured step is replayed within one phase only, and [`Method::param_policy`] is asked again when the phase changes.
    fn phase(&self) -> u32 {
        0
    }

    /// The parameter policy of a slot in this phase. `base` is the peak of the learning-rate schedule.
    fn param_policy(&self, slot: &Slot, base: f64) -> ParamPolicy {
        let _ = (slot, base);
        ParamPolicy::Default
    }

    /// Updates what must change before the forward pass: MoCo's momentum encoder, SwAV's prototypes.
    fn before_step(&mut self, online: &mut Arena) {
        let _ = online;
    }

    /// Computes the loss of a batch. `views` holds one tensor `[views * n, s, s, 4]` for each resolution, all rows of one view
    /// before those of the next.
    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t>;

    /// Which rows of a batch the loss couples.
    fn coupling(&self) -> Coupling {
        Coupling::Whole
    }

    /// Computes the embeddings `[views * m, d]` of a micro-batch of `m` images, view after view, for [`Method::couple`].
    ///
    /// # Panics
    /// If [`Method::coupling`] is not [`Coupling::Batch`].
    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let _ = (tape, views);
        panic!("methods: embed_part needs a method whose coupling is Batch");
    }

    /// Computes the loss from the embeddings `z [views * n, d]` of the complete batch, view after view. `views` holds its images.
    ///
    /// # Panics
    /// If [`Method::coupling`] is not [`Coupling::Batch`].
    fn couple<'t>(&mut self, z: Var<'t>, views: &[Tensor]) -> Var<'t> {
        let _ = (z, views);
        panic!("methods: couple needs a method whose coupling is Batch");
    }

    /// Takes the unit embeddings `[rows, d]` of the last [`Method::loss`], which the collapse monitor checks. `None` if the method
    /// has none. Taking them frees their memory.
    fn take_embeddings(&mut self) -> Option<Tensor>;

    /// Returns the method's monitors for the last step. `embeddings` come from [`Method::take_embeddings`]; `loss` is the mean of
    /// the epoch. Called once an epoch because it reads from the device. The documentation of each method says what its monitors
    /// should look like.
    fn monitors(&self, online: &Arena, embeddings: Option<&Tensor>, loss: f64) -> Readings {
        let _ = (online, embeddings, loss);
        Readings::new()
    }

    /// The effective number of prototypes that the last loss used: `exp` of the entropy of the mean assignment. `None` for methods
    /// that do not cluster. Reads from the device.
    fn prototypes_used(&self) -> Option<f64> {
        None
    }

    /// The loss of embeddings that know nothing, where a healthy run's first loss may lie far below it; 0 for other methods.
    fn chance_loss(&self) -> f64 {
        0.0
    }

    /// Updates what follows the weights (target network, queue), after the optimiser. `progress` in `0..=1` is the fraction of
    /// training done. In a replayed step it is frozen at the value of the captured step: compute numbers that depend on it in
    /// [`Method::prepare`].
    fn after_update(&mut self, online: &mut Arena, progress: f64) {
        let _ = (online, progress);
    }

    /// The classifier whose accuracy is measured, for methods that train one.
    fn classifier(&self) -> Option<&supervised::Classifier> {
        None
    }

    /// The method's state by name, as checkpoints store it next to the online weights.
    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        Vec::new()
    }
}

/// The rows of view `index` out of `views` in a tensor of one resolution.
fn view(crops: &Tensor, index: usize, views: usize) -> Tensor {
    let n = crops.shape()[0] / views;
    crops.rows(index * n, n)
}

/// Why several ranks cannot share the groups of batch norm of a pass over several views: a group is a run of the rows of one view,
/// and a rank has a part of every view.
const GROUPS_OF_VIEWS: &str = "network.norm_groups above 1 with all views in one pass";

/// Checks that a temperature is one that a softmax in f32 can use.
fn temperature(value: f64) -> Result<()> {
    if (1e-4..=1e4).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("method.temperature must be in 1e-4..=1e4, not {value:e}")))
}

/// Checks that a setting is finite and positive.
fn above_zero(value: f64, key: &str) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("method.{key} must be above 0, not {value}")))
}

/// Checks that every width is at least 1.
fn widths(all: &[(usize, &str)]) -> Result<()> {
    match all.iter().find(|(width, _)| *width == 0) {
        Some((_, key)) => Err(Error::config(format!("method.{key} must be at least 1"))),
        None => Ok(()),
    }
}

/// Checks that a momentum is in `0..=1`.
fn momentum_in_range(value: f64, key: &str) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("method.{key} must be in 0..=1, not {value}")))
}

/// Builds a method from its network and its table of the recipe.
type Build = fn(&ResNetConfig, &toml::Table) -> Result<Box<dyn Method>>;

/// A method's row in [`ALL`].
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its name in recipes.
    pub name: &'static str,
    /// Settings that make a step cheap, by dotted key: tests use them instead of a recipe's. Settings that a recipe leaves out or
    /// sets to 0 stay as they are.
    pub tiny: &'static [(&'static str, i64)],
    build: Build,
}

/// Every method. A new one adds a file and a row here.
pub const ALL: &[Entry] = &[
    Entry { name: "byol", tiny: &[("hidden", 8), ("embedding", 8)], build: byol::build },
    Entry {
        name: "distill",
        tiny: &[
            ("student.classes", 10),
            ("student.hidden", 8),
            ("teacher.hidden", 8),
            ("teacher.network.width", 2),
        ],
        build: distill::build,
    },
    Entry {
        name: "moco",
        tiny: &[("hidden", 8), ("embedding", 8), ("queue", 32)],
        build: moco::build,
    },
    Entry {
        name: "simclr",
        tiny: &[("hidden", 8), ("embedding", 8), ("predictor", 8)],
        build: simclr::build,
    },
    Entry {
        name: "simclr-v2",
        tiny: &[("hidden", 8), ("embedding", 8), ("memory", 32)],
        build: simclr_v2::build,
    },
    Entry { name: "simsiam", tiny: &[("hidden", 8), ("embedding", 8)], build: simsiam::build },
    Entry { name: "supervised", tiny: &[("hidden", 8), ("classes", 10)], build: supervised::build },
    Entry {
        name: "swav",
        tiny: &[
            ("hidden", 8),
            ("embedding", 8),
            ("prototypes", 12),
            ("queue", 32),
            ("queue_from", 0),
            ("freeze_steps", 1),
        ],
        build: swav::build,
    },
];

/// Builds a method by name from its network and its table of settings.
///
/// # Errors
/// If the name is unknown (the message lists the valid names), or a setting is unknown or out of range.
pub fn build(
    name: &str,
    network: &ResNetConfig,
    settings: &toml::Table,
) -> Result<Box<dyn Method>> {
    let entry = ALL.iter().find(|entry| entry.name == name).ok_or_else(|| {
        let known: Vec<_> = ALL.iter().map(|entry| entry.name).collect();
        Error::Config(format!("unknown method {name}; known methods: {}", known.join(", ")))
    })?;
    network.check()?;
    (entry.build)(network, settings)
}

//! The methods: each one file that reads like its paper's pseudocode, and its row in [`ALL`].
//!
//! A method owns its description and whatever state is its own; weights live in an arena. Around it the training step is:
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
//! # The methods beside each other
//!
//! | | [`moco`] v1, v2 | [`simclr`] | [`simclr_v2`] | [`swav`] | [`byol`] | [`simsiam`] |
//! |---|---|---|---|---|---|---|
//! | negatives | queue | rest of the batch | rest of the batch, or memory | none | none | none |
//! | momentum encoder | before the keys, constant | no | with memory | no | after the update, cosine to 1 | no |
//! | queue | 65,536 keys | no | 64K keys, optional | 3,840 features at small batches | no | no |
//! | clustering | no | no | no | Sinkhorn over prototypes | no | no |
//! | predictor | no | no | no | no | yes | yes |
//! | stop-gradient | keys | no | keys, with memory | assignments | target | target |
//! | what prevents collapse | negatives | negatives | negatives | equal use of prototypes | predictor and moving target | predictor and stop-gradient |
//! | batch norm sees | 32 rows, keys shuffled | both views | both views | all rows of a resolution | one view | one view |
//! | batch size in the paper | 256 | 4096 | 4096 | 4096, or 256 with queue | 4096 | 512 |
//! | sensitivity to it | low: the queue stands in | high: -5 points at 256, 100 epochs | lower with memory | low with queue | low down to 256 with accumulation | low, 64 to 2048 |

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

/// What is known of a run before its first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunInfo {
    /// What decides every random number.
    pub seed: u64,
    /// Images of a step.
    pub batch: usize,
    /// Images of the set.
    pub images: usize,
    /// Steps of an epoch, at least 1.
    pub per_epoch: u64,
    /// Steps of the run, at least 1.
    pub total: u64,
}

/// What a loss couples: how a step of several micro-batches is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coupling {
    /// Nothing is known: the step cannot be cut.
    Whole,
    /// The views of one image: the loss is a mean over images, and gradients of micro-batches add up.
    Images,
    /// All rows of the batch: embeddings are made twice ([`cached_step`](crate::tape::cached_step)) by
    /// [`Method::embed_part`] and meet in [`Method::couple`].
    Batch {
        /// Rows of an image among the embeddings.
        views: usize,
    },
}

/// A piece of what a method owns beside the online weights: what checkpoints hold.
#[derive(Debug)]
pub enum State<'a> {
    /// A second network, slot by slot.
    Network(&'a mut Arena),
    /// A queue.
    Rows(&'a mut Tensor),
    /// A pointer or a counter.
    Count(&'a mut u64),
}

/// What training asks of a method.
pub trait Method {
    /// The slots of the network that is trained.
    fn layout(&self) -> &Arc<Layout>;

    /// The backbone whose features are evaluated, on the online arena.
    fn backbone(&self) -> &ResNet;

    /// What of its settings has no CUDA kernels, if anything.
    fn without_cuda(&self) -> Option<&'static str> {
        None
    }

    /// Views of each image that a step needs.
    fn views(&self) -> usize {
        2
    }

    /// Makes what the method owns beside the online weights, which stand as the run starts with them.
    ///
    /// # Errors
    /// When the method cannot run so: a queue that is no multiple of the batch, say.
    fn start(&mut self, online: &Arena, course: &RunInfo) -> Result<()> {
        let _ = (online, course);
        Ok(())
    }

    /// A network that is filled from a file before the first step and never trained: a teacher.
    fn teacher(&mut self) -> Option<(PathBuf, &mut Arena)> {
        None
    }

    /// The classes of the coming batch's images, -1 where there is none; before [`Method::prepare`].
    ///
    /// # Errors
    /// When the method needs classes and does not get them.
    fn labels(&mut self, labels: &[i32]) -> Result<()> {
        let _ = labels;
        Ok(())
    }

    /// Which images of the set the coming batch is made of; after [`Method::prepare`].
    fn samples(&mut self, indices: &[u32]) {
        let _ = indices;
    }

    /// Sets the host's numbers of a step: momentum, random draws, pointers. Nothing runs on the device. What operations read
    /// of them are [`Numbers`](crate::tensor::Numbers): a step that a GPU replays runs this, [`Method::labels`],
    /// [`Method::samples`] and nothing else of the method, so that what it needs to know follows from `iteration` alone.
    fn prepare(&mut self, iteration: u64) {
        let _ = iteration;
    }

    /// What differs in kind from the phase before, after [`Method::prepare`]: a captured step serves one phase, and
    /// [`Method::param_policy`] is asked again when it changes.
    fn phase(&self) -> u32 {
        0
    }

    /// How the optimiser treats a slot in this phase; `base` is the schedule's peak.
    fn param_policy(&self, slot: &Slot, base: f64) -> ParamPolicy {
        let _ = (slot, base);
        ParamPolicy::Default
    }

    /// Moves what must move before the forward pass: MoCo's key encoder, SwAV's prototypes.
    fn before_step(&mut self, online: &mut Arena) {
        let _ = online;
    }

    /// The loss of a batch. `views` holds one tensor `[views * n, s, s, 4]` for each resolution, view after view.
    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t>;

    /// What the loss couples.
    fn coupling(&self) -> Coupling {
        Coupling::Whole
    }

    /// The embeddings `[views * m, d]` of a micro-batch of `m` images, view after view, that [`Method::couple`] compares.
    ///
    /// # Panics
    /// Unless [`Method::coupling`] is of the batch.
    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let _ = (tape, views);
        panic!("methods: a loss that does not couple the batch has no part to embed");
    }

    /// The loss of the embeddings `z [views * n, d]` of all of the batch, view after view, whose images are `views`.
    ///
    /// # Panics
    /// Unless [`Method::coupling`] is of the batch.
    fn couple<'t>(&mut self, z: Var<'t>, views: &[Tensor]) -> Var<'t> {
        let _ = (z, views);
        panic!("methods: a loss that does not couple the batch has no embeddings to compare");
    }

    /// The embeddings `[rows, d]`, of unit length, that the last [`Method::loss`] compared: what the collapse monitor
    /// looks at. Taken, so that no memory is held.
    fn take_embeddings(&mut self) -> Option<Tensor>;

    /// What a practitioner looks at, of the last step, whose `embeddings` are [`Method::take_embeddings`]'s; `loss` is the epoch's
    /// mean. Asked once an epoch, since it reads from the device. Each method's page says what its monitors should look like.
    fn monitors(&self, online: &Arena, embeddings: Option<&Tensor>, loss: f64) -> Readings {
        let _ = (online, embeddings, loss);
        Readings::new()
    }

    /// How many prototypes the last loss assigned images to, weighed by use: `exp` of the entropy of the mean assignment. For
    /// methods that cluster; reads from the device.
    fn prototypes_used(&self) -> Option<f64> {
        None
    }

    /// Moves what follows the weights, after the optimiser; `progress` in `0..=1` is the share of training done, but where a
    /// step is replayed that of the step that was recorded: numbers that follow it belong in [`Method::prepare`].
    fn after_update(&mut self, online: &mut Arena, progress: f64) {
        let _ = (online, progress);
    }

    /// The network whose accuracy is measured, for methods that train one.
    fn classifier(&self) -> Option<&supervised::Classifier> {
        None
    }

    /// What a checkpoint holds beside the online weights, by name.
    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        Vec::new()
    }
}

/// View `index` of `views` of a tensor of one resolution.
fn view(crops: &Tensor, index: usize, views: usize) -> Tensor {
    let n = crops.shape()[0] / views;
    crops.rows(index * n, n)
}

/// Fails unless a setting is a positive number.
fn above_zero(value: f64, key: &str) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("method.{key} must be above 0, not {value}")))
}

/// Fails unless every width is at least 1.
fn widths(all: &[(usize, &str)]) -> Result<()> {
    match all.iter().find(|(width, _)| *width == 0) {
        Some((_, key)) => Err(Error::config(format!("method.{key} starts at 1"))),
        None => Ok(()),
    }
}

/// Fails unless a momentum is in `0..=1`.
fn momentum_in_range(value: f64, key: &str) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("method.{key} must be in 0..=1, not {value}")))
}

/// Makes a method from its network and its own table of the recipe.
type Build = fn(&ResNetConfig, &toml::Table) -> Result<Box<dyn Method>>;

/// Every method by name. A new one adds a file and a row.
pub const ALL: &[(&str, Build)] = &[
    ("byol", byol::build),
    ("distill", distill::build),
    ("moco", moco::build),
    ("simclr", simclr::build),
    ("simclr-v2", simclr_v2::build),
    ("simsiam", simsiam::build),
    ("supervised", supervised::build),
    ("swav", swav::build),
];

/// Builds a method by name on a network, from its table of settings.
///
/// # Errors
/// If no method has that name, or its settings do not fit.
pub fn build(
    name: &str,
    network: &ResNetConfig,
    settings: &toml::Table,
) -> Result<Box<dyn Method>> {
    let (_, build) = ALL.iter().find(|(known, _)| *known == name).ok_or_else(|| {
        let known: Vec<_> = ALL.iter().map(|(name, _)| *name).collect();
        Error::Config(format!("there is no method `{name}`; known are: {}", known.join(", ")))
    })?;
    network.check()?;
    build(network, settings)
}

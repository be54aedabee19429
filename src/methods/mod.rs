//! The methods (floor 5): each one file that reads like its paper's pseudocode, and its row in [`ALL`].
//!
//! A method owns its description and whatever state is its own; weights live in an arena. Around it the training step is:
//!
//! ```no_run
//! # use selfsup::{arena::Arena, methods::Method, optim::{Optimizer, Schedule}, tape::step, tensor::Tensor};
//! # fn one(method: &mut dyn Method, online: &mut Arena, optimizer: &mut Optimizer, schedule: &Schedule,
//! #        views: &[Tensor], iteration: u64, progress: f64) -> selfsup::Result<()> {
//! method.prepare(iteration);                                      // host-side numbers of this iteration
//! let loss = step(online, |tape| method.loss(tape, views))?;      // forward, backward, gradients into the arena
//! optimizer.step(online, schedule.lr(iteration));                 // one or two launches
//! method.after_update(online, progress);                          // momentum copy, queue, prototypes
//! # let _ = loss; Ok(()) }
//! ```

mod recipe;
pub mod simclr;

use std::sync::Arc;

use crate::arena::{Arena, Layout};
use crate::error::{Error, Result};
use crate::nn::{ResNet, ResNetConfig};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
pub use recipe::{DataSettings, OptimSettings, Recipe, TrainSettings, builtin, builtin_names};

/// What training asks of a method.
pub trait Method {
    /// The slots of the network that is trained.
    fn layout(&self) -> &Arc<Layout>;

    /// The trunk whose features are evaluated, on the online arena.
    fn backbone(&self) -> &ResNet;

    /// Views of each image that a step needs.
    fn views(&self) -> usize {
        2
    }

    /// Sets what changes from step to step, before the step.
    fn prepare(&mut self, iteration: u64) {
        let _ = iteration;
    }

    /// The loss of a batch. `views` holds one tensor `[views * n, s, s, 4]` for each resolution, view after view.
    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t>;

    /// The embeddings `[rows, d]`, of unit length, that the last [`Method::loss`] compared: what the collapse monitor
    /// looks at. Taken, so that no memory is held.
    fn take_embeddings(&mut self) -> Option<Tensor>;

    /// Moves what follows the weights, after the optimiser; `progress` in `0..=1` is the share of training done.
    fn after_update(&mut self, online: &mut Arena, progress: f64) {
        let _ = (online, progress);
    }
}

/// Makes a method from its network and its own table of the recipe.
type Build = fn(&ResNetConfig, &toml::Table) -> Result<Box<dyn Method>>;

/// Every method by name. A new one adds a file and a row.
pub const ALL: &[(&str, Build)] = &[("simclr", simclr::build)];

/// The method of a recipe.
///
/// # Errors
/// When no method has that name, or its settings do not fit.
pub fn build(recipe: &Recipe) -> Result<Box<dyn Method>> {
    let (_, build) = ALL.iter().find(|(name, _)| *name == recipe.method.name).ok_or_else(|| {
        let names: Vec<_> = ALL.iter().map(|(name, _)| *name).collect();
        let (name, known) = (&recipe.method.name, names.join(", "));
        Error::Config(format!("there is no method `{name}`; known are: {known}"))
    })?;
    recipe.network.check()?;
    build(&recipe.network, &recipe.method.settings)
}

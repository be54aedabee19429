//! What a step of a recipe comes to before it is run: its graph, and the memory that it takes.

use serde::Serialize;

use crate::arena::Arena;
use crate::device::Device;
use crate::error::Result;
use crate::methods::{Method, RunInfo};
use crate::optim::Optimizer;
use crate::recipes::Recipe;
use crate::tape::{NodeInfo, step};
use crate::tensor::Tensor;

/// One step as it was measured, on black images.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Images of the step, each in all its views.
    pub images: usize,
    /// What the tape recorded, in order; a momentum encoder's forward pass records nothing.
    pub nodes: Vec<NodeInfo>,
    /// Bytes of weights, gradients, momentum and the method's state.
    pub fixed: usize,
    /// Bytes that the forward pass kept for the backward pass.
    pub saved: usize,
    /// The most bytes that were in use.
    pub peak: usize,
}

/// What a step needs in memory: f32, as on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// Bytes of weights, gradients, momentum and the method's state.
    pub fixed: usize,
    /// Bytes for each image of a batch, all its views together.
    pub per_image: usize,
    /// Those of them that the forward pass keeps for the backward pass; on a GPU, in bf16, half as many.
    pub saved_per_image: usize,
    /// Bytes at the recipe's batch.
    pub in_all: usize,
}

/// The fewest images that a step of the recipe takes: two, or one for each of batch norm's groups.
pub fn fewest(recipe: &Recipe) -> usize {
    recipe.network.norm_groups.max(2)
}

/// Runs one step of `images` images on the CPU, a multiple of batch norm's groups.
///
/// # Errors
/// When the recipe does not fit together, or its method cannot run with so few images.
pub fn measure(recipe: &Recipe, images: usize) -> Result<Measured> {
    let device = Device::cpu(recipe.train.threads)?;
    let mut method = recipe.build_method()?;
    let mut online = Arena::new(method.layout(), &device, recipe.seed);
    let mut optimizer = Optimizer::new(recipe.optim.rule, &online);
    let course = RunInfo { seed: recipe.seed, batch: images, images, per_epoch: 1, total: 1 };
    method.start(&online, &course)?;
    let fixed = device.memory_use().live;
    let crops = crops(recipe, &*method, images, &device)?;
    method.labels(&vec![0; images])?;
    method.prepare(0);
    method.before_step(&mut online);
    let (mut nodes, mut saved) = (Vec::new(), 0);
    let before = device.memory_use().live;
    step(&mut online, |tape| {
        let loss = method.loss(tape, &crops);
        nodes = tape.nodes();
        saved = device.memory_use().live.saturating_sub(before);
        loss
    })?;
    optimizer.step(&mut online, 0.0);
    method.after_update(&mut online, 1.0);
    Ok(Measured { images, nodes, fixed, saved, peak: device.memory_use().peak })
}

/// Black views, by size as the loader gives them.
fn crops(
    recipe: &Recipe,
    method: &dyn Method,
    images: usize,
    device: &Device,
) -> Result<Vec<Tensor>> {
    let mut sizes: Vec<(usize, usize)> = Vec::new();
    for policy in recipe.policies(method.views())? {
        match sizes.iter_mut().find(|(size, _)| *size == policy.size) {
            Some((_, views)) => *views += 1,
            None => sizes.push((policy.size, 1)),
        }
    }
    let of = |(size, views): (usize, usize)| Tensor::zeros(device, [views * images, size, size, 4]);
    Ok(sizes.into_iter().map(of).collect())
}

/// What a step needs at the recipe's batch, by a line through two small ones.
///
/// # Errors
/// As [`measure`].
pub fn memory(recipe: &Recipe) -> Result<Need> {
    let few = measure(recipe, fewest(recipe))?;
    let more = measure(recipe, 2 * fewest(recipe))?;
    let each = |few: usize, more: usize, images: usize| more.saturating_sub(few) / images;
    let images = more.images - few.images;
    let per_image = each(few.peak, more.peak, images);
    let saved_per_image = each(few.saved, more.saved, images);
    let beyond = recipe.train.batch.saturating_sub(few.images);
    Ok(Need { fixed: few.fixed, per_image, saved_per_image, in_all: few.peak + per_image * beyond })
}

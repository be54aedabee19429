//! What a step of a recipe moves in a GPU's memory, kernel by kernel, counted from the launches of the step itself.

use serde::Serialize;

use crate::device::{Device, DeviceKind, Group, KernelTraffic, Precision};
use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::train::inspect::first_step;

/// What a step moves in a GPU's memory.
#[derive(Clone, Debug, Serialize)]
pub struct StepTraffic {
    /// Images of the step.
    pub images: usize,
    /// Views of the step, all sizes together.
    pub views: usize,
    /// The kernels that it launches, and its copies and fills, by name.
    pub kernels: Vec<KernelTraffic>,
}

impl StepTraffic {
    /// Bytes read and written by all kernels.
    pub fn bytes(&self) -> u64 {
        self.kernels.iter().map(|kernel| kernel.read + kernel.written).sum()
    }
}

/// Counts what a step of the recipe moves on a GPU in this precision, at the recipe's batch on one rank. It runs the step on a GPU
/// that does not exist ([`Device::imagined_gpu`]): every launch is made with its true sizes, and counted instead of executed. Making
/// the views is not part of the step.
///
/// # Errors
/// If the recipe's settings contradict each other, or one of them has no CUDA kernels.
pub fn traffic(recipe: &Recipe, precision: Precision) -> Result<StepTraffic> {
    traffic_on(recipe, recipe.train.batch, &Device::imagined_gpu(precision)?)
}

/// [`traffic`] of the first step of `images` images on a device; nothing is counted on one that is not a GPU.
///
/// # Errors
/// As for [`traffic`], or if the device fails.
pub fn traffic_on(recipe: &Recipe, images: usize, device: &Device) -> Result<StepTraffic> {
    let method = recipe.build_method()?;
    if let Some(what) = method.without_cuda().filter(|_| device.kind() == DeviceKind::Cuda) {
        return Err(Error::Config(format!(
            "{}: {what} has no CUDA kernels: a step of it moves nothing on a GPU",
            recipe.method.name
        )));
    }
    let step = |step: &mut dyn FnMut() -> Result<()>| {
        let (result, kernels) = device.count_traffic(step);
        device.wait();
        result.and_then(|()| device.check()).map(|()| kernels)
    };
    let kernels = first_step(recipe, images, device, &Group::alone(), step)??;
    Ok(StepTraffic { images, views: images * method.views(), kernels })
}

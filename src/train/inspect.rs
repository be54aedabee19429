//! Measures one step of a recipe before it is trained: its autograd graph, its memory, and how many threads it can use.

use std::time::Instant;

use serde::Serialize;

use crate::arena::Arena;
use crate::cpu::scaling;
use crate::data::Batch;
use crate::device::{Device, DeviceKind, Group, Precision};
use crate::error::Result;
use crate::methods::{Method, RunInfo, check_micro_batches};
use crate::optim::Optimizer;
use crate::recipes::Recipe;
use crate::tape::{NodeInfo, Tape, step};
use crate::tensor::{DType, Tensor, device_channels};
use crate::train::{Steps, Training};

/// One measured step, on black images.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Images in the step, each in all its views.
    pub images: usize,
    /// The operations that the tape recorded, in order; a momentum encoder's forward pass records nothing.
    pub nodes: Vec<NodeInfo>,
    /// Bytes of weights, gradients, momentum and the method's state.
    pub fixed: usize,
    /// Bytes that the forward pass saved for the backward pass.
    pub saved: usize,
    /// Peak bytes in use.
    pub peak: usize,
    /// Bytes obtained from the system: the peak, and what the free list cannot use again because its sizes differ.
    pub reserved: usize,
    /// Seconds of the forward and backward pass and the update.
    pub seconds: f64,
}

/// The memory that a step needs in one precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// Bytes of weights, gradients, momentum and the method's state.
    pub fixed: usize,
    /// Bytes per image of a batch, all its views together.
    pub per_image: usize,
    /// The part of `per_image` that the forward pass saves for the backward pass.
    pub saved_per_image: usize,
    /// Bytes at the recipe's batch.
    pub in_all: usize,
    /// Bytes that the processor's memory pool obtains from the system for them: `in_all`, and freed blocks that no later request has the
    /// size of. A GPU's kernels have other workspaces.
    pub reserved: usize,
    /// The recipe's batch.
    batch: usize,
}

/// What a GPU holds beside tensors: its context and kernels, the staging buffers, and what rounding of allocations costs.
pub const BESIDE_TENSORS: usize = 1 << 30;

/// What the free list takes from a GPU, in hundredths of the peak: its blocks have exact sizes.
const FREE_LIST: usize = 112;

impl Need {
    /// The largest batch whose step fits into a GPU of this many bytes, a multiple of `multiple`; 0 if none fits. The images of a
    /// data set that lies on the GPU come on top.
    pub fn largest_batch(&self, gpu: usize, multiple: usize) -> usize {
        let without_images = self.in_all.saturating_sub(self.per_image * self.batch);
        let tensors = gpu.saturating_sub(BESIDE_TENSORS) / FREE_LIST * 100;
        let images = tensors.saturating_sub(without_images) / self.per_image.max(1);
        images / multiple.max(1) * multiple.max(1)
    }
}

/// Returns the smallest batch that a step of the recipe accepts: two images, or one for each of batch norm's groups.
pub fn fewest(recipe: &Recipe) -> usize {
    recipe.network.norm_groups.max(2)
}

/// Runs one step of `images` images, a multiple of batch norm's groups, on the CPU in f32.
///
/// # Errors
/// If the recipe's settings contradict each other, or its method needs more images.
pub fn measure(recipe: &Recipe, images: usize) -> Result<Measured> {
    measure_on(recipe, images, &Device::cpu(recipe.train.threads)?)
}

/// [`measure`] on a device that has not been used yet: its memory is counted from its first use on.
///
/// # Errors
/// As for [`measure`], or if the device fails.
pub fn measure_on(recipe: &Recipe, images: usize, device: &Device) -> Result<Measured> {
    let mut model = Model::new(recipe, images, device)?;
    let fixed = model.fixed;
    let before = device.memory_use().live;
    let (mut nodes, mut saved) = (Vec::new(), 0);
    let start = Instant::now();
    model.step(|tape| {
        nodes = tape.nodes();
        saved = device.memory_use().live.saturating_sub(before);
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let used = device.memory_use();
    Ok(Measured { images, nodes, fixed, saved, peak: used.peak, reserved: used.reserved, seconds })
}

/// What a step of a recipe needs: weights, state, and a batch of black images.
struct Model {
    method: Box<dyn Method>,
    online: Arena,
    optimizer: Optimizer,
    crops: Vec<Tensor>,
    /// Bytes of weights, gradients, momentum and the method's state.
    fixed: usize,
}

impl Model {
    fn new(recipe: &Recipe, images: usize, device: &Device) -> Result<Self> {
        let mut method = recipe.build_method()?;
        let online =
            Arena::new(method.layout(), device, recipe.seed).with_recompute(recipe.train.recompute);
        let optimizer = Optimizer::new(recipe.optim.rule, &online);
        let info = RunInfo { seed: recipe.seed, batch: images, images, per_epoch: 1, total: 1 };
        method.start(&online, &info)?;
        let fixed = device.memory_use().live;
        let crops = crops(recipe, &*method, images, device)?;
        method.labels(&vec![0; images])?;
        method.prepare(0);
        Ok(Self { method, online, optimizer, crops, fixed })
    }

    /// One step with a learning rate of 0; `recorded` sees the tape before the backward pass.
    fn step(&mut self, recorded: impl FnOnce(&Tape<'_>)) -> Result<()> {
        let Self { method, online, optimizer, crops, .. } = self;
        method.before_step(online);
        step(online, |tape| {
            let loss = method.loss(tape, crops);
            recorded(tape);
            loss
        })?;
        optimizer.step(online, 0.0);
        method.after_update(online, 1.0);
        Ok(())
    }
}

/// Builds the first step of a recipe on black views, `images` of this rank, and hands it to `run`.
pub(super) fn first_step<R>(
    recipe: &Recipe,
    images: usize,
    device: &Device,
    group: &Group,
    run: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> R,
) -> Result<R> {
    let mut method = recipe.build_method()?;
    let (in_all, micro_batches) = (images * group.size(), recipe.train.micro_batches);
    check_micro_batches(&*method, in_all, micro_batches)?;
    let mut online = Arena::new(method.layout(), device, recipe.seed)
        .in_group(group)
        .with_recompute(recipe.train.recompute);
    let mut optimizer = Optimizer::new(recipe.optim.rule, &online);
    let info = RunInfo { seed: recipe.seed, batch: in_all, images: in_all, per_epoch: 1, total: 1 };
    method.start(&online, &info)?;
    let batch = Batch {
        epoch: 0,
        position: 0,
        indices: (0..images as u32).collect(),
        labels: vec![0; images],
        crops: crops(recipe, &*method, images, device)?,
    };
    let schedule = recipe.schedule(images);
    let mut steps = Steps::new(device).with_micro_batches(micro_batches).without_capture();
    Ok(run(&mut || {
        let training = Training {
            method: &mut *method,
            online: &mut online,
            optimizer: &mut optimizer,
            schedule: &schedule,
        };
        steps.run(training, &batch, 0).map(drop)
    }))
}

/// Black views, grouped by size like the loader's.
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
    let channels = device_channels(recipe.data.channels);
    let black = |(size, views): (usize, usize)| {
        Tensor::zeros(device, [views * images, size, size, channels])
            .cast(DType::of_activations(device))
    };
    Ok(sizes.into_iter().map(black).collect())
}

/// A step of this many seconds is long enough to estimate memory from.
const LONG: f64 = 1.0;

/// The share of the bytes per image by which those of the next batch may differ, and the images that it has at least: workspaces grow
/// with the images up to a hundred or two.
const SETTLED: (f64, usize) = (0.01, 256);

/// Estimates the memory of a step at the recipe's batch with activations of this precision, by a line through two batches. Batches
/// double until the bytes per image change no more, because the peak of a small one lies elsewhere; or until they are the recipe's own, or a step takes a second.
///
/// # Errors
/// As for [`measure`].
pub fn memory(recipe: &Recipe, precision: Precision) -> Result<Need> {
    memory_within(recipe, precision, LONG)
}

/// As [`memory`], with batches that double until a step takes `longest` seconds; on a busy machine that is soon.
///
/// # Errors
/// As for [`measure`].
pub fn memory_within(recipe: &Recipe, precision: Precision, longest: f64) -> Result<Need> {
    let measured = |images| {
        let device = Device::cpu(recipe.train.threads)?.with_precision(precision)?;
        measure_on(recipe, images, &device)
    };
    let least = fewest(recipe);
    let most = (recipe.train.batch / least * least).max(2 * least);
    let (mut small, mut before) = (measured(least)?, f64::NAN);
    loop {
        let large = measured((2 * small.images).min(most))?;
        let images = large.images - small.images;
        let slope = |small: usize, large: usize| large.saturating_sub(small) / images;
        let saved_per_image = slope(small.saved, large.saved);
        // A workspace that shrinks between two batches does not go on shrinking.
        let per_image = slope(small.peak, large.peak).max(saved_per_image);
        let differs = (per_image as f64 / before - 1.0).abs();
        let settled = differs < SETTLED.0 && large.images >= SETTLED.1;
        if settled || large.images == most || large.seconds > longest {
            let more = recipe.train.batch.saturating_sub(small.images);
            let in_all = small.peak + per_image * more;
            let reserved = small.reserved + slope(small.reserved, large.reserved) * more;
            return Ok(Need {
                fixed: small.fixed,
                per_image,
                saved_per_image,
                in_all,
                reserved: reserved.max(in_all),
                batch: recipe.train.batch.max(small.images),
            });
        }
        (small, before) = (large, per_image as f64);
    }
}

/// Measures how many seconds of computing an image of the recipe costs on this processor in this precision, all its views together, by
/// a step of about a second. Loading and augmentation run beside it and are not counted.
///
/// # Errors
/// As for [`measure`].
pub fn seconds_per_image(recipe: &Recipe, precision: Precision) -> Result<f64> {
    let measured = |images| {
        let device = Device::cpu(recipe.train.threads)?.with_precision(precision)?;
        measure_on(recipe, images, &device)
    };
    let least = fewest(recipe);
    let first = measured(least)?;
    let most = recipe.train.batch / recipe.train.micro_batches.max(1);
    let fit = (first.images as f64 / first.seconds.max(1e-6)) as usize;
    let images = fit.min(most).min(MOST_IMAGES) / least * least;
    let timed = if images > least { measured(images)? } else { first };
    Ok(timed.seconds / timed.images as f64)
}

/// More images in a step do not make it more accurate, and need memory.
const MOST_IMAGES: usize = 64;

/// How a step of a recipe uses many threads, as far as the cutting of its work into tasks decides it: caches, memory bandwidth and
/// the waking of threads are not counted.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// Images in the step, each in all its views.
    pub images: usize,
    /// Seconds of the step on one thread.
    pub seconds: f64,
    /// Numbers of threads, and the share of their time in which they work.
    pub efficiency: Vec<(usize, f64)>,
    /// How many threads `waits` are of.
    pub threads: usize,
    /// Where these threads wait, the longest first.
    pub waits: Vec<Waiting>,
}

/// Time that threads wait in a step.
#[derive(Clone, Debug, Serialize)]
pub struct Waiting {
    /// The loop, as file and line.
    pub place: String,
    /// Whether one thread works before the loop; if not, the loop has too few or too uneven tasks.
    pub is_serial: bool,
    /// The share of all threads' time.
    pub share: f64,
}

/// Seconds of a step that [`scaling`] is measured on, about, and the numbers of threads that it is told for.
const MEASURED_SECONDS: f64 = 5.0;
const THREADS: [usize; 6] = [2, 4, 8, 16, 32, 64];

/// Measures [`Scaling`] on one thread, by a step of the recipe's batch or of as many images as take five seconds; `threads` is the
/// number whose waits are told.
///
/// # Errors
/// As for [`measure`].
pub fn scaling(recipe: &Recipe, threads: usize) -> Result<Scaling> {
    // All of the step is one thread's, which stays with its device for the rest of its life.
    let measured = std::thread::scope(|scope| scope.spawn(|| one_thread(recipe)).join());
    let (images, step) = measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let work = step.work();
    let efficiency = |threads| (threads, work / (threads as f64 * step.seconds(threads)));
    let waiting = |wait: scaling::Wait| Waiting {
        place: wait.place.map_or("the end".into(), |(file, line)| format!("{file}:{line}")),
        is_serial: wait.is_serial,
        share: wait.share,
    };
    Ok(Scaling {
        images,
        seconds: work,
        efficiency: THREADS.map(efficiency).to_vec(),
        threads,
        waits: step.waits(threads).into_iter().map(waiting).collect(),
    })
}

/// Runs a step of the recipe's batch, or of as many images as take about `MEASURED_SECONDS`; returns its images and what the thread
/// did.
fn one_thread(recipe: &Recipe) -> Result<(usize, scaling::Task)> {
    let precision = recipe.train.precision_on(DeviceKind::Cpu)?;
    let device = Device::cpu_with_this_thread(1)?.with_precision(precision)?;
    let least = fewest(recipe);
    let most = recipe.train.batch / recipe.train.micro_batches.max(1);
    let most = (most / least * least).max(least);
    let mut images = least;
    loop {
        let mut model = Model::new(recipe, images, &device)?;
        model.step(|_| ())?; // which gets the memory
        scaling::begin();
        model.step(|_| ())?;
        let step = scaling::end();
        let fit = (MEASURED_SECONDS / step.work() * images as f64) as usize / least * least;
        if images == most || fit < 2 * images {
            return Ok((images, step));
        }
        // Small batches are slower by the image.
        images = fit.min(16 * images).min(most);
    }
}

//! Making one batch after another on a pool of threads: the inside of a [`super::Loader`].

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::augment::{MOST_SHRINKING, Policy, Scratch, View};
use super::loader::Batch;
use super::on_gpu::{AugmentParams, Place};
use super::order::order;
use super::rows::{Row, rows_of};
use super::source::{Image, Source};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What to make; shared with the threads.
pub struct BatchPlan {
    /// Where images come from.
    pub source: Arc<dyn Source>,
    /// One per view.
    pub policies: Vec<Policy>,
    /// For each distinct size, the views of that size.
    pub groups: Vec<(usize, Vec<usize>)>,
    /// Samples of a batch.
    pub batch: usize,
    /// Of order and augmentation.
    pub seed: u64,
    /// Where the threads make crops: a host.
    pub device: Device,
    /// Who makes the crops.
    pub maker: CropBackend,
    /// Images that cannot be read, and why.
    pub skipped: Mutex<BTreeMap<u32, String>>,
}

/// Who makes crops, and of what.
pub enum CropBackend {
    /// The threads, of images that they read.
    Host,
    /// A GPU, of images that the threads read.
    GpuFromBatch,
    /// A GPU that has the images.
    GpuFromSet(Arc<[Place]>),
}

/// What the threads made of a batch; without its crops where a GPU makes them, and then what that needs to know.
pub type PreparedBatch = (Batch, Option<AugmentParams>);

/// Who makes a batch.
struct WorkerPool<'a> {
    pool: &'a rayon::ThreadPool,
    /// Buffers of each of its threads.
    workers: Vec<Mutex<Worker>>,
    stop: &'a AtomicBool,
}

/// Buffers of one worker.
#[derive(Default)]
struct Worker {
    image: Image,
    scratch: Scratch,
    row: Vec<f32>,
}

/// A batch's place.
struct Slot<'a> {
    epoch: u32,
    /// In the epoch's order, of its first sample.
    first: usize,
    order: &'a [u32],
}

/// A sample as a GPU takes it.
#[derive(Default)]
struct PreparedSample {
    /// By view, each with the weights of its blur.
    views: Vec<(View, Vec<f32>)>,
    pixels: Vec<u8>,
}

impl BatchPlan {
    /// Makes batch after batch until the consumer is gone, or after an error.
    pub fn produce(
        &self,
        pool: &rayon::ThreadPool,
        next: (u32, usize),
        sender: &SyncSender<Result<PreparedBatch>>,
        stop: &AtomicBool,
    ) {
        let workers = (0..pool.current_num_threads()).map(|_| Mutex::default()).collect();
        let crew = WorkerPool { pool, workers, stop };
        let (first_epoch, mut position) = next;
        for epoch in first_epoch.. {
            let order = order(self.seed, epoch, self.source.len());
            while position < order.len() / self.batch {
                let slot = Slot { epoch, first: position * self.batch, order: &order };
                let make = || self.make(&crew, &slot);
                let made = catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text
                        .or_else(|| panic.downcast_ref::<&str>().copied())
                        .unwrap_or("no message");
                    Err(Error::Worker(format!("a loader thread panicked, which is a bug: {text}")))
                });
                let failed = made.is_err();
                if stop.load(Ordering::Relaxed) || sender.send(made).is_err() || failed {
                    return;
                }
                position += 1;
            }
            position = 0;
        }
    }

    fn make(&self, crew: &WorkerPool<'_>, slot: &Slot<'_>) -> Result<PreparedBatch> {
        let mut indices = vec![0; self.batch];
        let (crops, drawn) = match self.maker {
            CropBackend::Host => (self.crops(crew, slot, &mut indices)?, None),
            _ => (Vec::new(), Some(self.drawn(crew, slot, &mut indices)?)),
        };
        let label = |&i: &u32| self.source.label(i as usize).map_or(-1, |label| label as i32);
        let labels = indices.iter().map(label).collect();
        let (epoch, position) = (slot.epoch, slot.first / self.batch);
        Ok((Batch { epoch, position, indices, labels, crops }, drawn))
    }

    /// The crops of a batch.
    fn crops(
        &self,
        crew: &WorkerPool<'_>,
        slot: &Slot<'_>,
        indices: &mut [u32],
    ) -> Result<Vec<Tensor>> {
        let room = |(size, views): &(usize, Vec<usize>)| {
            Tensor::floats(&self.device, [views.len() * self.batch, *size, *size, 4])
        };
        let mut crops: Vec<Tensor> = self.groups.iter().map(room).collect();
        let mut jobs: Vec<(&mut u32, Vec<Row<'_>>)> =
            indices.iter_mut().map(|i| (i, Vec::with_capacity(self.policies.len()))).collect();
        for (crops, (size, _)) in crops.iter_mut().zip(&self.groups) {
            for (row, values) in rows_of(crops, size * size * 4).into_iter().enumerate() {
                jobs[row % self.batch].1.push(values);
            }
        }
        crew.each(jobs, |i, (index, rows), Worker { image, scratch, row }| {
            *index = self.read(slot, i, |index| self.source.read(index, image))?;
            let views = self.groups.iter().flat_map(|(_, views)| views);
            for (&view, values) in views.zip(rows) {
                let policy = &self.policies[view];
                let mut rng = self.stream(slot, i, view);
                let params = policy.draw(&mut rng, image.width, image.height);
                values.fill(row, |out| policy.apply(&params, image, out, scratch));
            }
            Ok(())
        })?;
        Ok(crops)
    }

    /// What a GPU needs to know to make the crops of a batch.
    fn drawn(
        &self,
        crew: &WorkerPool<'_>,
        slot: &Slot<'_>,
        indices: &mut [u32],
    ) -> Result<AugmentParams> {
        let mut sketches: Vec<PreparedSample> =
            (0..self.batch).map(|_| PreparedSample::default()).collect();
        let jobs = indices.iter_mut().zip(&mut sketches).collect();
        crew.each(jobs, |i, (index, sketch), Worker { image, .. }| {
            let Place { at, size: [width, height] } = match &self.maker {
                CropBackend::GpuFromSet(places) => {
                    *index = self.read(slot, i, |_| Ok(()))?;
                    places[*index as usize]
                }
                _ => {
                    *index = self.read(slot, i, |index| self.source.read(index, image))?;
                    sketch.pixels = std::mem::take(&mut image.pixels);
                    Place { at: 0, size: [image.width, image.height] }
                }
            };
            for (view, policy) in self.policies.iter().enumerate() {
                if width.max(height) > MOST_SHRINKING * policy.size {
                    return Err(Error::config(format!(
                        "{}: {width} x {height} pixels are too many for a GPU to make crops of {} of; \
                         make the image smaller",
                        self.source.name(*index as usize),
                        policy.size,
                    )));
                }
                let params = policy.draw(&mut self.stream(slot, i, view), width, height);
                let mut gaussian = Vec::new();
                let drawn = View::new(policy, &params, width, at, &mut gaussian);
                sketch.views.push((drawn, gaussian));
            }
            Ok(())
        })?;
        let mut drawn = AugmentParams::default();
        if crew.stop.load(Ordering::Relaxed) {
            return Ok(drawn); // not all samples may have been drawn, and nobody wants the batch
        }
        for (_, views) in &self.groups {
            let all = views.iter().flat_map(|&v| sketches.iter().map(move |s| &s.views[v]));
            let (views, gaussian): (Vec<View>, Vec<&[f32]>) =
                all.map(|(view, gaussian)| (*view, gaussian.as_slice())).unzip();
            drawn.groups.push((views, gaussian.concat()));
        }
        drawn.images = sketches.into_iter().map(|sketch| sketch.pixels).collect();
        Ok(drawn)
    }

    /// The random numbers of a view of the batch's sample `i`.
    fn stream(&self, slot: &Slot<'_>, i: usize, view: usize) -> Philox {
        // The image that was meant: one that stands in for a broken one gets crops of its own.
        let meant = slot.order[slot.first + i];
        let stream = meant * self.policies.len() as u32 + view as u32;
        Philox::new(self.seed, Purpose::Augmentation, slot.epoch, stream)
    }

    /// Reads the first readable image from the batch's sample `i` on in the epoch's order, around its end if need be,
    /// and says which.
    fn read(
        &self,
        slot: &Slot<'_>,
        i: usize,
        mut read: impl FnMut(usize) -> Result<()>,
    ) -> Result<u32> {
        let (before, after) = slot.order.split_at(slot.first + i);
        for &index in after.iter().chain(before) {
            if lock(&self.skipped).contains_key(&index) {
                continue;
            }
            match read(index as usize) {
                Ok(()) => return Ok(index),
                Err(e) => {
                    lock(&self.skipped).insert(index, e.to_string());
                }
            }
        }
        let skipped = lock(&self.skipped);
        let example = skipped.values().next().map_or("", String::as_str);
        Err(Error::config(format!(
            "none of the {} images can be read; the first: {example}",
            slot.order.len()
        )))
    }
}

impl WorkerPool<'_> {
    /// Does each job, given its number and a thread's buffers, until one fails or nobody wants the results.
    fn each<J: Send>(
        &self,
        jobs: Vec<J>,
        work: impl Fn(usize, J, &mut Worker) -> Result<()> + Sync,
    ) -> Result<()> {
        let (jobs, error) = (Mutex::new(jobs.into_iter().enumerate()), Mutex::new(None));
        self.pool.broadcast(|context| {
            let mut worker = lock(&self.workers[context.index()]);
            while !self.stop.load(Ordering::Relaxed) {
                let Some((i, job)) = lock(&jobs).next() else { return };
                if let Err(e) = work(i, job, &mut worker) {
                    lock(&error).get_or_insert(e);
                    return;
                }
            }
        });
        error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// Locks, whatever a panic elsewhere left: what these locks guard is valid between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Prepares one batch after another on a pool of worker threads.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::order::order;
use super::prepared::{AugmentParams, Place, PreparedBatch};
use crate::data::augment::{
    MOST_SHRINKING, Made, Params, Policy, Scratch, View, channels_are_needed,
};
use crate::data::batch::{Batch, Skipped};
use crate::data::rows::{Row, rows_of};
use crate::data::source::{Image, Source};
use crate::device::cuda::{Pinned, PinnedBatch};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Everything that determines the batches; shared with the threads.
pub struct BatchPlan {
    /// The images.
    pub source: Arc<dyn Source>,
    /// One policy per view.
    pub policies: Vec<Policy>,
    /// For each distinct crop size, the views of that size.
    pub groups: Vec<(usize, Vec<usize>)>,
    /// Samples per batch, of this rank.
    pub batch: usize,
    /// Which samples of a batch are this rank's.
    pub share: Share,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// The host device on which the threads make crops.
    pub device: Device,
    /// What makes the crops.
    pub backend: CropBackend,
    /// Images that cannot be read, with the reason.
    pub skipped: Mutex<BTreeMap<u32, String>>,
}

/// A rank's share of each batch: of each micro-batch an equal run of samples, so that what batch norm sees of all ranks'
/// micro-batches is what it sees of one rank's.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Of this process.
    pub rank: usize,
    /// Number of processes.
    pub ranks: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
}

impl Share {
    /// All samples.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1, micro_batches: 1 };

    /// The place in the batch of this rank's sample `i` of `batch`.
    fn place(self, i: usize, batch: usize) -> usize {
        let run = batch / self.micro_batches;
        (i / run * self.ranks + self.rank) * run + i % run
    }
}

/// What makes the crops, and from which images.
pub enum CropBackend {
    /// The worker threads, from images that they read.
    Host,
    /// A GPU, from images that the threads read into pinned memory.
    GpuFromBatch(Arc<Pinned>),
    /// A GPU that holds all images.
    GpuFromSet(Arc<[Place]>),
}

/// The threads that prepare a batch.
struct WorkerPool<'a> {
    pool: &'a rayon::ThreadPool,
    /// The buffers of each thread.
    workers: Vec<Mutex<Worker>>,
    stop: &'a AtomicBool,
}

/// The buffers of one worker.
#[derive(Default)]
struct Worker {
    image: Image,
    scratch: Scratch,
    row: Vec<f32>,
}

/// The place of a batch in the epoch.
struct Slot<'a> {
    epoch: u32,
    /// Position in the epoch's order of the first sample of all ranks.
    first: usize,
    order: &'a [u32],
}

/// A sample as a GPU needs it: one entry per view, each with the weights of its blur.
type PreparedSample = Vec<(View, Vec<f32>, Params)>;

impl BatchPlan {
    /// Prepares batch after batch until the consumer is gone or an error occurs.
    pub fn produce(
        &self,
        pool: &rayon::ThreadPool,
        next: (u32, usize),
        sender: &SyncSender<Result<PreparedBatch>>,
        stop: &AtomicBool,
    ) {
        let workers = (0..pool.current_num_threads()).map(|_| Mutex::default()).collect();
        let pool = WorkerPool { pool, workers, stop };
        let (first_epoch, mut position) = next;
        for epoch in first_epoch.. {
            let order = order(self.seed, epoch, self.source.len());
            while position < order.len() / self.whole_batch() {
                let slot = Slot { epoch, first: position * self.whole_batch(), order: &order };
                let prepare = || self.prepare(&pool, &slot);
                let prepared = catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text
                        .or_else(|| panic.downcast_ref::<&str>().copied())
                        .unwrap_or("no message");
                    Err(Error::Worker(format!("a loader thread panicked, which is a bug: {text}")))
                });
                let failed = prepared.is_err();
                if stop.load(Ordering::Relaxed) || sender.send(prepared).is_err() || failed {
                    return;
                }
                position += 1;
            }
            position = 0;
        }
    }

    /// Channels of a view, padded.
    pub fn channels(&self) -> usize {
        self.source.format().device_channels()
    }

    /// Samples per batch, of all ranks.
    pub fn whole_batch(&self) -> usize {
        self.batch * self.share.ranks
    }

    /// The position in the epoch's order of the batch's sample `i`.
    fn place(&self, slot: &Slot<'_>, i: usize) -> usize {
        slot.first + self.share.place(i, self.batch)
    }

    fn prepare(&self, pool: &WorkerPool<'_>, slot: &Slot<'_>) -> Result<PreparedBatch> {
        let mut indices = vec![0; self.batch];
        let (crops, params) = match self.backend {
            CropBackend::Host => (self.crops(pool, slot, &mut indices)?, None),
            _ => (Vec::new(), Some(self.augment_params(pool, slot, &mut indices)?)),
        };
        let label = |&i: &u32| self.source.label(i as usize).map_or(-1, |label| label as i32);
        let labels = indices.iter().map(label).collect();
        let (epoch, position) = (slot.epoch, slot.first / self.whole_batch());
        Ok((Batch { epoch, position, indices, labels, crops }, params))
    }

    /// Makes the crops of a batch on the host and writes the index of each sample.
    fn crops(
        &self,
        pool: &WorkerPool<'_>,
        slot: &Slot<'_>,
        indices: &mut [u32],
    ) -> Result<Vec<Tensor>> {
        let channels = self.channels();
        let empty = |(size, views): &(usize, Vec<usize>)| {
            Tensor::floats(&self.device, [views.len() * self.batch, *size, *size, channels])
        };
        let mut crops: Vec<Tensor> = self.groups.iter().map(empty).collect();
        let mut jobs: Vec<(&mut u32, Vec<Row<'_>>)> =
            indices.iter_mut().map(|i| (i, Vec::with_capacity(self.policies.len()))).collect();
        for (crops, (size, _)) in crops.iter_mut().zip(&self.groups) {
            for (row, values) in rows_of(crops, size * size * channels).into_iter().enumerate() {
                jobs[row % self.batch].1.push(values);
            }
        }
        pool.each(jobs, |i, (index, rows), Worker { image, scratch, row }| {
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

    /// Draws what a GPU needs to make the crops of a batch and writes the index of each sample.
    fn augment_params(
        &self,
        pool: &WorkerPool<'_>,
        slot: &Slot<'_>,
        indices: &mut [u32],
    ) -> Result<AugmentParams> {
        let mut samples: Vec<PreparedSample> = (0..self.batch).map(|_| Vec::new()).collect();
        let jobs = indices.iter_mut().zip(&mut samples).collect();
        let pixels = match &self.backend {
            CropBackend::GpuFromBatch(pinned) => Some(pinned.take()),
            _ => None,
        };
        let format = self.source.format();
        pool.each(jobs, |i, (index, sample), Worker { image, .. }| {
            let Place { at, size: [width, height], pixel } = match &self.backend {
                CropBackend::GpuFromSet(places) => {
                    *index = self.read(slot, i, |_| Ok(()))?;
                    places[*index as usize]
                }
                _ => {
                    *index = self.read(slot, i, |index| self.source.read(index, image))?;
                    let pixels = pixels.as_ref().expect("taken for images that are read");
                    let (at, size) = (pixels.append(&image.pixels), [image.width, image.height]);
                    Place { at: at as i64, size, pixel: format.bytes() }
                }
            };
            debug_assert_eq!(pixel, format.bytes());
            for (view, policy) in self.policies.iter().enumerate() {
                if width.max(height) > MOST_SHRINKING * policy.size {
                    return Err(Error::config(format!(
                        "{}: {width} x {height} pixels are too many for crops of {} on a GPU: make the image smaller",
                        self.source.name(*index as usize),
                        policy.size,
                    )));
                }
                let params = policy.draw(&mut self.stream(slot, i, view), width, height);
                let mut gaussian = Vec::new();
                let made = View::new(policy, &params, [width, height], at, &mut gaussian);
                sample.push((made, gaussian, params));
            }
            Ok(())
        })?;
        let mut params = AugmentParams::default();
        if pool.stop.load(Ordering::Relaxed) {
            return Ok(params); // some samples may be missing, but the batch is no longer wanted
        }
        for (_, views) in &self.groups {
            let all = || views.iter().flat_map(|&v| samples.iter().map(move |s| (v, &s[v])));
            let gaussian: Vec<&[f32]> =
                all().map(|(_, (_, gaussian, _))| gaussian.as_slice()).collect();
            let needed = views.iter().any(|&v| channels_are_needed(&self.policies[v], format));
            let drawn = all().map(|(v, (view, _, params))| (view, &self.policies[v], Some(params)));
            params.groups.push((Made::of(drawn, format, needed), gaussian.concat()));
        }
        pixels.iter().for_each(PinnedBatch::complete);
        params.pixels = pixels;
        Ok(params)
    }

    /// The random stream of a view of the batch's sample `i`.
    fn stream(&self, slot: &Slot<'_>, i: usize, view: usize) -> Philox {
        // Numbered by the image that was meant, so that a substitute for a broken image gets crops of its own.
        let intended = slot.order[self.place(slot, i)];
        let stream = intended * self.policies.len() as u32 + view as u32;
        Philox::new(self.seed, Purpose::Augmentation, slot.epoch, stream)
    }

    /// Reads the first readable image in the epoch's order from the batch's sample `i` on, wrapping around at the end.
    /// Returns its index. An I/O error is not a broken image and ends the search.
    fn read(
        &self,
        slot: &Slot<'_>,
        i: usize,
        mut read: impl FnMut(usize) -> Result<()>,
    ) -> Result<u32> {
        let (before, after) = slot.order.split_at(self.place(slot, i));
        for &index in after.iter().chain(before) {
            if lock(&self.skipped).contains_key(&index) {
                continue;
            }
            match read(index as usize) {
                Ok(()) => return Ok(index),
                Err(e) => {
                    let Skipped { reason, .. } = Skipped::new(index as usize, e)?;
                    lock(&self.skipped).insert(index, reason);
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
    /// Runs `work` on every job, with the job's number and the thread's buffers, until one fails or the loader stops.
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

/// Locks a mutex and ignores poisoning: the values behind these locks are valid between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::tests::folder_with_broken;
    use super::*;
    use crate::data::Loader;

    #[test]
    fn the_shares_of_all_ranks_are_the_batch_and_micro_batches_keep_their_samples() {
        let (batch, ranks, micro_batches) = (24, 3, 2);
        let own = batch / ranks;
        let of = |rank| {
            let share = Share { rank, ranks, micro_batches };
            (0..own).map(move |i| share.place(i, own)).collect::<Vec<_>>()
        };
        assert_eq!(of(1), [4, 5, 6, 7, 16, 17, 18, 19]);
        for part in 0..micro_batches {
            let mut places: Vec<usize> =
                (0..ranks).flat_map(|rank| of(rank)[part * 4..][..4].to_vec()).collect();
            places.sort_unstable();
            assert_eq!(places, (12 * part..12 * part + 12).collect::<Vec<_>>());
        }
        assert_eq!((0..5).map(|i| Share::WHOLE.place(i, 5)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_broken_image_is_replaced_by_the_next_in_order_and_named_once() {
        let root = tempfile::tempdir().unwrap();
        let set = folder_with_broken(root.path(), 8, &[2, 5]);
        let device = Device::reference();
        let indices = |threads| {
            let mut loader =
                Loader::new(set.clone(), vec![Policy::crop(2)], 4, 3, threads, &device).unwrap();
            let indices: Vec<u32> =
                (0..6).flat_map(|_| loader.next_batch().unwrap().indices).collect();
            (indices, loader.skipped())
        };
        let (got, skipped) = indices(1);
        assert_eq!((&got, &skipped), (&indices(3).0, &indices(3).1));
        for (epoch, got) in got.chunks(8).enumerate() {
            let order = order(3, epoch as u32, 8);
            let next = |place: usize| {
                (place..place + 8).map(|p| order[p % 8]).find(|i| ![2, 5].contains(i)).unwrap()
            };
            assert_eq!(got, (0..8).map(next).collect::<Vec<_>>());
        }
        assert_eq!(skipped.iter().map(|s| s.index).collect::<Vec<_>>(), [2, 5]);
        assert!(
            skipped[0].reason.ends_with("2.png: is no JPEG, PNG, WebP, BMP or TIFF file"),
            "{:?}",
            skipped[0]
        );
    }

    #[test]
    fn an_io_error_is_an_error_and_not_a_broken_image() {
        let root = tempfile::tempdir().unwrap();
        let set = folder_with_broken(root.path(), 8, &[2]);
        std::fs::remove_file(root.path().join("5.png")).unwrap();
        let device = Device::reference();
        let mut loader = Loader::new(set, vec![Policy::crop(2)], 8, 3, 2, &device).unwrap();
        let error = loader.next_batch().unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("5.png")), "{error}");
        assert!(loader.skipped().iter().all(|skipped| skipped.index == 2));
    }

    struct Panics;
    impl Source for Panics {
        fn len(&self) -> usize {
            10
        }
        fn read(&self, index: usize, _: &mut Image) -> Result<()> {
            panic!("no image {index} today")
        }
        fn label(&self, _: usize) -> Option<u32> {
            None
        }
        fn classes(&self) -> &[String] {
            &[]
        }
        fn name(&self, _: usize) -> String {
            String::new()
        }
    }

    #[test]
    fn a_panic_on_a_thread_becomes_an_error() {
        let mut loader =
            Loader::new(Arc::new(Panics), vec![Policy::crop(2)], 4, 3, 3, &Device::reference())
                .unwrap();
        let error = loader.next_batch().unwrap_err();
        assert!(matches!(error, Error::Worker(_)), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains("a loader thread panicked, which is a bug: no image"),
            "{message}"
        );
        assert!(loader.next_batch().unwrap_err().to_string().contains("an earlier batch failed"));
    }
}

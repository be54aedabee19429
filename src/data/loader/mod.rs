//! Batches of augmented crops, prepared on threads ahead of their use.
//!
//! A coordinating thread walks epochs and batches; a pool of worker threads reads and augments the samples of one
//! batch; finished batches wait in a channel of capacity one, so that at most two are ahead. A batch depends on seed,
//! epoch and position alone, never on the number of threads: the order of an epoch is one shuffle, every view has a
//! random stream of its own, and a broken image is replaced by the next readable one in the epoch's order (under the
//! broken one's stream, so that the two crops of that image in the batch differ).
//!
//! For a GPU the threads draw the parameters and read the images; a kernel makes the crops, bit-identical in 8 bits. A set
//! that fits there is uploaded once, before the first batch. Of a larger one the threads write each batch to pinned memory, and it
//! is copied while the GPU computes with the one before ([`Feed`](crate::device::cuda::Feed)).
//!
//! Files, lowest first: `order`, `prepared` (what threads hand over), `resident` (a set on a GPU), `plan` (the threads' side), `running`
//! (the threads themselves), `gpu`, this one.

mod gpu;
mod order;
mod plan;
mod prepared;
mod resident;
mod running;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gpu::GpuCrops;
use plan::{BatchPlan, CropBackend, Share, lock};
use prepared::{AugmentParams, PreparedBatch};
use running::Running;

use super::augment::{Pixels, Policy, channels_are_needed};
use super::batch::{Batch, Skipped};
use super::source::{Format, Source};
use crate::device::{Device, DeviceKind, Group};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Hands out the batches of a run, in order.
pub struct Loader {
    plan: Arc<BatchPlan>,
    device: Device,
    threads: usize,
    /// Epoch and position of the next batch.
    next: (u32, usize),
    running: Option<Running>,
    /// Makes the crops on a GPU; set once it is decided where the images lie.
    gpu_crops: Option<GpuCrops>,
    /// Bytes of images that a GPU may keep; `None` is half of the free memory.
    budget: Option<usize>,
    waited: Duration,
    /// Ends a wait for a batch.
    stop: Arc<AtomicBool>,
}

impl Loader {
    /// Creates a loader of `source` with one view of each sample per policy and `batch` samples per batch, on `threads`
    /// worker threads (0: one per core). The last samples of an epoch that do not fill a batch are left out. The threads
    /// start with the first batch.
    ///
    /// # Errors
    /// If a policy is out of range, `policies` is empty, or the source holds less than one batch.
    pub fn new(
        source: Arc<dyn Source>,
        policies: Vec<Policy>,
        batch: usize,
        seed: u64,
        threads: usize,
        device: &Device,
    ) -> Result<Self> {
        policies.iter().try_for_each(Policy::check)?;
        policies.iter().try_for_each(|policy| policy.check_for(source.format()))?;
        let images = source.len();
        if policies.is_empty() || batch == 0 {
            return Err(Error::config("a batch needs at least one view and one sample"));
        }
        if images < batch {
            let reason = format!(
                "a batch of {batch} is larger than the set of {images} images: lower the batch size"
            );
            return Err(Error::config(reason));
        }
        if (images * policies.len()) as u64 > u64::from(u32::MAX) {
            return Err(Error::config(format!(
                "{images} images are more than a loader can number"
            )));
        }
        let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
        for (view, policy) in policies.iter().enumerate() {
            match groups.iter_mut().find(|(size, _)| *size == policy.size) {
                Some((_, views)) => views.push(view),
                None => groups.push((policy.size, vec![view])),
            }
        }
        for (size, views) in &groups {
            let of = |&view: &usize| &policies[view];
            let needed = views.iter().map(of).any(|p| channels_are_needed(p, Format::RGB));
            if needed && views.iter().map(of).any(|policy| policy.pixels == Pixels::U8) {
                return Err(Error::Config(format!(
                    "augmentation: of the views of {size} pixels some have channel_drop, noise or per_channel: write pixels = \"float\" for all of them"
                )));
            }
        }
        let (host, skipped) = (device.host().clone(), Mutex::default());
        let backend = CropBackend::Host;
        let plan = BatchPlan {
            source,
            policies,
            groups,
            batch,
            share: Share::WHOLE,
            seed,
            device: host,
            backend,
            skipped,
        };
        Ok(Self {
            plan: Arc::new(plan),
            device: device.clone(),
            threads,
            next: (0, 0),
            running: None,
            gpu_crops: None,
            budget: None,
            waited: Duration::ZERO,
            stop: Arc::default(),
        })
    }

    /// Hands out only this rank's share of each batch: an equal run of samples of each of the `micro_batches` of a step, in rank
    /// order. The batches of all ranks together, and the crops of each sample, are those of one process.
    ///
    /// # Errors
    /// If the ranks cannot have equal shares.
    ///
    /// # Panics
    /// If a batch was taken already.
    pub fn shared(mut self, group: &Group, micro_batches: usize) -> Result<Self> {
        let (rank, ranks) = (group.rank(), group.size());
        let plan = Arc::get_mut(&mut self.plan).expect("loader: share it before the first batch");
        if ranks > 1 && !plan.batch.is_multiple_of(ranks * micro_batches) {
            let parts = match micro_batches {
                1 => String::new(),
                count => format!(" in {count} micro-batches"),
            };
            return Err(Error::Config(format!(
                "{ranks} ranks cannot have equal shares of train.batch={}{parts}",
                plan.batch
            )));
        }
        if ranks > 1 {
            plan.batch /= ranks;
            plan.share = Share { rank, ranks, micro_batches };
        }
        Ok(self)
    }

    /// Keeps at most `bytes` of images on a GPU (default: half of the free memory). A larger set is uploaded batch by
    /// batch.
    pub fn keep_at_most(mut self, bytes: usize) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// Makes [`Loader::next_batch`] return [`Error::Stopped`] soon after `flag` becomes true if no batch is ready: a signal ends
    /// a run even if a read never returns.
    pub fn stop_when(&mut self, flag: Arc<AtomicBool>) {
        self.stop = flag;
    }

    /// Decides where the images of a loader for a GPU lie, uploads them if they fit, and returns a sentence that says so;
    /// `None` on a host or after the first call. The first batch does it if nobody has.
    ///
    /// # Errors
    /// If an image cannot be read for another reason than that it is broken.
    pub fn place_images(&mut self) -> Result<Option<String>> {
        if self.device.kind() != DeviceKind::Cuda || self.gpu_crops.is_some() {
            return Ok(None);
        }
        let plan = Arc::get_mut(&mut self.plan).expect("threads start after this");
        let (gpu_crops, sentence) = GpuCrops::new(plan, &self.device, self.budget)?;
        self.gpu_crops = Some(gpu_crops);
        Ok(Some(sentence))
    }

    /// Returns the loader's images as a source. Once they are [placed](Loader::place_images) and lie on a GPU, it knows where, and
    /// an evaluation there does not read them again.
    pub fn images(&self) -> Arc<dyn Source> {
        let source = &self.plan.source;
        let resident = self.gpu_crops.as_ref().and_then(|crops| crops.resident(source));
        resident.unwrap_or_else(|| source.clone())
    }

    /// Returns empty tensors for the crops of a batch, on the loader's device in its activation type.
    pub fn empty_crops(&self) -> Vec<Tensor> {
        let (device, batch) = (&self.device, self.plan.batch);
        let empty = |(size, views): &(usize, Vec<usize>)| {
            let shape = [views.len() * batch, *size, *size, self.plan.channels()];
            Tensor::empty(device, DType::of_activations(device), shape)
        };
        self.plan.groups.iter().map(empty).collect()
    }

    /// Makes batch `position` of `epoch` the next one and drops what was prepared: a run is resumed with it.
    ///
    /// # Panics
    /// If an epoch has no such batch.
    pub fn seek(&mut self, epoch: u32, position: usize) {
        let length = self.batches_per_epoch();
        assert!(position < length, "loader: batch {position} of an epoch of {length}");
        self.running = None;
        self.next = (epoch, position);
    }

    /// Returns the next batch. The last batch of an epoch is followed by the first of the next, without a pause.
    ///
    /// # Errors
    /// If an image cannot be read for another reason than that it is broken, all images are broken, or a thread failed; the
    /// loader has then ended. With [`Error::Stopped`] if it was [asked to stop](Loader::stop_when) while it waited.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let (mut batch, params) = self.next_prepared()?;
        if let Some(params) = params {
            batch.crops = self.empty_crops();
            self.make_crops(params, &mut batch.crops);
        }
        Ok(batch)
    }

    /// Returns the next batch with its crops written into `crops`, tensors from [`Loader::empty_crops`], in stream order:
    /// for a captured step, whose inputs stay at fixed addresses. The batch itself has no crops.
    ///
    /// # Errors
    /// As [`Loader::next_batch`].
    ///
    /// # Panics
    /// If a tensor has another shape or shares its memory.
    #[track_caller]
    pub fn next_into(&mut self, crops: &mut [Tensor]) -> Result<Batch> {
        let (mut batch, params) = self.next_prepared()?;
        assert_eq!(crops.len(), self.plan.groups.len(), "loader: a tensor for each crop size");
        match params {
            Some(params) => self.make_crops(params, crops),
            None => {
                for (to, from) in crops.iter_mut().zip(std::mem::take(&mut batch.crops)) {
                    to.view_mut().copy_from(&from);
                }
            }
        }
        Ok(batch)
    }

    #[track_caller]
    fn make_crops(&mut self, params: AugmentParams, crops: &mut [Tensor]) {
        let gpu_crops =
            self.gpu_crops.as_mut().expect("created before the threads that draw for it");
        gpu_crops.make(params, crops);
    }

    /// Receives the next batch from the threads, which it starts if need be.
    fn next_prepared(&mut self) -> Result<PreparedBatch> {
        if self.running.is_none() {
            self.place_images()?;
            self.running = Some(Running::start(self.plan.clone(), self.next, self.threads)?);
        }
        let running = self.running.as_ref().expect("started above");
        let begin = Instant::now();
        let Some(received) = running.receive(&self.stop) else {
            return Err(Error::Stopped("stopped while waiting for images".into()));
        };
        self.waited += begin.elapsed();
        let prepared = received?;
        let (epoch, position) = self.next;
        debug_assert_eq!((prepared.0.epoch, prepared.0.position), (epoch, position));
        let last = position + 1 == self.batches_per_epoch();
        self.next = if last { (epoch + 1, 0) } else { (epoch, position + 1) };
        Ok(prepared)
    }

    /// Iterates over the remaining batches of the current epoch; dropping the iterator early loses none.
    pub fn epoch(&mut self) -> impl Iterator<Item = Result<Batch>> + '_ {
        let (_, position) = self.next;
        (position..self.batches_per_epoch()).map(|_| self.next_batch())
    }

    /// Batches per epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.plan.source.len() / self.plan.whole_batch()
    }

    /// Views of each sample.
    pub fn views(&self) -> usize {
        self.plan.policies.len()
    }

    /// Total time that [`Loader::next_batch`] has waited for data, including the first batch.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The images so far that could not be read, each once, by index.
    pub fn skipped(&self) -> Vec<Skipped> {
        let skipped = lock(&self.plan.skipped);
        skipped.iter().map(|(&index, reason)| Skipped { index, reason: reason.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::augment::{Jitter, Scratch};
    use crate::data::{Folder, Image, Split, Subset, fashion_scattered};
    use crate::device::{Philox, Purpose};

    fn policy(size: usize) -> Policy {
        let (brightness, contrast, saturation, hue) = (0.4, 0.4, 0.4, 0.1);
        let jitter = Some(Jitter {
            p: 0.8,
            brightness,
            contrast,
            saturation,
            hue,
            additive_brightness: false,
            per_channel: false,
        });
        Policy { flip: 0.5, jitter, grey: 0.2, ..Policy::crop(size) }
    }

    /// 23 images, two views of 16 pixels around one of 8, batches of 5.
    pub(super) fn loader(threads: usize, device: &Device) -> Loader {
        let set = Subset::first(Arc::new(fashion_scattered(Split::Test)), 23);
        Loader::new(Arc::new(set), vec![policy(16), policy(8), policy(16)], 5, 11, threads, device)
            .unwrap()
    }

    type Summary = (u32, usize, Vec<u32>, Vec<i32>, Vec<Vec<f64>>);

    fn summary(batch: Result<Batch>) -> Summary {
        let batch = batch.unwrap();
        let crops = batch.crops.iter().map(Tensor::to_f64).collect();
        (batch.epoch, batch.position, batch.indices, batch.labels, crops)
    }

    #[test]
    fn batches_are_the_same_with_any_number_of_threads_and_on_both_devices() {
        let run = |threads, device: &Device| -> Vec<Summary> {
            let mut loader = loader(threads, device);
            (0..9).map(|_| summary(loader.next_batch())).collect()
        };
        let one = run(1, &Device::cpu(1).unwrap().poisoned());
        assert_eq!(one, run(2, &Device::cpu(1).unwrap()));
        assert_eq!(one, run(3, &Device::cpu(2).unwrap()));
        assert_eq!(one, run(2, &Device::reference().poisoned()));
        assert_eq!(
            one.iter().map(|b| (b.0, b.1)).collect::<Vec<_>>()[3..6],
            [(0, 3), (1, 0), (1, 1)]
        );
        assert_ne!(one[0].2, one[4].2);
        assert!(one.iter().all(|b| b.4.iter().flatten().all(|v| v.is_finite())));
    }

    #[test]
    fn a_batch_depends_only_on_epoch_and_position() {
        let device = Device::cpu(1).unwrap();
        let mut straight = loader(2, &device);
        let all: Vec<_> = (0..8).map(|_| summary(straight.next_batch())).collect();
        let mut resumed = loader(1, &device);
        resumed.seek(1, 2);
        assert_eq!(resumed.epoch().map(summary).collect::<Vec<_>>(), all[6..8]);
        resumed.seek(0, 1);
        assert_eq!(resumed.epoch().map(summary).next().as_ref(), Some(&all[1]));
        assert_eq!(summary(resumed.next_batch()), all[2]);
    }

    #[test]
    fn crops_are_grouped_by_size_and_lie_view_by_view() {
        let device = Device::cpu(1).unwrap();
        let mut loader = loader(2, &device);
        let batch = loader.next_batch().unwrap();
        let shapes: Vec<_> = batch.crops.iter().map(|c| c.shape().to_vec()).collect();
        assert_eq!(shapes, [[10, 16, 16, 4], [5, 8, 8, 4]]);
        let set = fashion_scattered(Split::Test);
        let mut image = Image::default();
        for (group, row, view) in [(0, 3, 0), (0, 8, 2), (1, 3, 1)] {
            let index = batch.indices[3];
            set.read(index as usize, &mut image).unwrap();
            let policy = policy(if view == 1 { 8 } else { 16 });
            let mut rng = Philox::new(11, Purpose::Augmentation, 0, index * 3 + view);
            let mut expected = vec![0.0; policy.size * policy.size * 4];
            policy.apply(
                &policy.draw(&mut rng, 32, 32),
                &image,
                &mut expected,
                &mut Scratch::default(),
            );
            assert_eq!(batch.crops[group].rows(row, 1).data::<f32>(), expected);
        }
        assert_eq!(batch.labels[3], set.label(batch.indices[3] as usize).unwrap() as i32);
    }

    #[test]
    fn the_loader_allocates_nothing_after_the_first_batches() {
        let device = Device::cpu(1).unwrap();
        let mut loader = loader(2, &device);
        (0..4).for_each(|_| drop(loader.next_batch().unwrap()));
        let before = device.memory_use().allocations;
        (0..20).for_each(|_| drop(loader.next_batch().unwrap()));
        // One batch is in use, one waits, one is being prepared: later batches may need all three at once where the
        // first ones did not.
        assert!(device.memory_use().allocations <= before.max(3 * 2), "{:?}", device.memory_use());
    }

    pub(super) fn folder_with_broken(root: &Path, images: usize, broken: &[usize]) -> Arc<Folder> {
        for i in 0..images {
            let path = root.join(format!("{i}.png"));
            if broken.contains(&i) {
                std::fs::write(path, "not an image").unwrap();
            } else {
                image::GrayImage::from_pixel(4, 4, image::Luma([i as u8])).save(path).unwrap();
            }
        }
        Arc::new(Folder::open(root).unwrap())
    }

    #[test]
    fn impossible_settings_and_an_unreadable_set_are_errors() {
        let root = tempfile::tempdir().unwrap();
        let set = folder_with_broken(root.path(), 3, &[0, 1, 2]);
        let device = Device::reference();
        let new = |policies, batch| Loader::new(set.clone(), policies, batch, 3, 2, &device);
        let message = |result: Result<Loader>| result.err().expect("an error").to_string();
        assert!(
            message(new(vec![Policy::crop(2)], 4))
                .contains("a batch of 4 is larger than the set of 3 images")
        );
        assert!(message(new(vec![], 1)).contains("at least one view"));
        assert!(message(new(vec![Policy::crop(0)], 1)).contains("size = 0"));
        let mut loader = new(vec![Policy::crop(2)], 2).unwrap();
        let error = loader.next_batch().unwrap_err().to_string();
        assert!(error.contains("none of the 3 images can be read; the first: "), "{error}");
        assert!(loader.next_batch().is_err());
    }
}

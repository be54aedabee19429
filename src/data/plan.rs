//! Making one batch after another on a pool of threads: the inside of a [`super::Loader`]. Floor 5.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::augment::{Policy, Scratch};
use super::loader::Batch;
use super::order::order;
use super::rows::{Row, rows_of};
use super::source::{Image, Source};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What to make; shared with the threads.
pub struct Plan {
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
    /// Where the crops are made: a host.
    pub device: Device,
    /// Images that cannot be read, and why.
    pub skipped: Mutex<BTreeMap<u32, String>>,
}

/// One sample of a batch in the making.
struct Job<'a> {
    /// Place in the epoch's order.
    place: usize,
    index: &'a mut u32,
    /// By group, then by view in the group.
    rows: Vec<Row<'a>>,
}

/// Buffers of one worker.
#[derive(Default)]
struct Worker {
    image: Image,
    scratch: Scratch,
    row: Vec<f32>,
}

impl Plan {
    /// Makes batch after batch until the consumer is gone, or after an error.
    pub fn produce(
        &self,
        pool: &rayon::ThreadPool,
        next: (u32, usize),
        sender: &SyncSender<Result<Batch>>,
        stop: &AtomicBool,
    ) {
        let workers: Vec<_> =
            (0..pool.current_num_threads()).map(|_| Mutex::<Worker>::default()).collect();
        let (first_epoch, mut position) = next;
        for epoch in first_epoch.. {
            let order = order(self.seed, epoch, self.source.len());
            while position < order.len() / self.batch {
                let make = || self.make(pool, &workers, &order, epoch, position, stop);
                let batch = catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text
                        .or_else(|| panic.downcast_ref::<&str>().copied())
                        .unwrap_or("no message");
                    Err(Error::Worker(format!("a loader thread panicked, which is a bug: {text}")))
                });
                let failed = batch.is_err();
                if stop.load(Ordering::Relaxed) || sender.send(batch).is_err() || failed {
                    return;
                }
                position += 1;
            }
            position = 0;
        }
    }

    fn make(
        &self,
        pool: &rayon::ThreadPool,
        workers: &[Mutex<Worker>],
        order: &[u32],
        epoch: u32,
        position: usize,
        stop: &AtomicBool,
    ) -> Result<Batch> {
        let mut indices = vec![0; self.batch];
        let mut crops: Vec<Tensor> = self
            .groups
            .iter()
            .map(|(size, views)| {
                Tensor::floats(&self.device, [views.len() * self.batch, *size, *size, 4])
            })
            .collect();
        let first = position * self.batch;
        let rows = || Vec::with_capacity(self.policies.len());
        let mut jobs: Vec<_> = indices
            .iter_mut()
            .enumerate()
            .map(|(i, index)| Job { place: first + i, index, rows: rows() })
            .collect();
        for (crops, (size, _)) in crops.iter_mut().zip(&self.groups) {
            for (row, values) in rows_of(crops, size * size * 4).into_iter().enumerate() {
                jobs[row % self.batch].rows.push(values);
            }
        }
        let (jobs, error) = (Mutex::new(jobs.into_iter()), Mutex::new(None));
        pool.broadcast(|context| {
            let mut worker = lock(&workers[context.index()]);
            while !stop.load(Ordering::Relaxed) {
                let Some(job) = lock(&jobs).next() else { return };
                if let Err(e) = self.fill(job, order, epoch, &mut worker) {
                    lock(&error).get_or_insert(e);
                    return;
                }
            }
        });
        drop(jobs);
        match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => {
                let label =
                    |&i: &u32| self.source.label(i as usize).map_or(-1, |label| label as i32);
                let labels = indices.iter().map(label).collect();
                Ok(Batch { epoch, position, indices, labels, crops })
            }
        }
    }

    /// Reads and augments one sample.
    fn fill(&self, job: Job<'_>, order: &[u32], epoch: u32, worker: &mut Worker) -> Result<()> {
        let Worker { image, scratch, row } = worker;
        let meant = order[job.place];
        *job.index = self.read(order, job.place, image)?;
        let views = self.groups.iter().flat_map(|(_, views)| views);
        for (&view, values) in views.zip(job.rows) {
            let policy = &self.policies[view];
            let stream = meant * self.policies.len() as u32 + view as u32;
            let mut rng = Philox::new(self.seed, Purpose::Augmentation, epoch, stream);
            let params = policy.draw(&mut rng, image.width, image.height);
            values.fill(row, |out| policy.apply(&params, image, out, scratch));
        }
        Ok(())
    }

    /// Reads the first readable image from `place` on in the epoch's order, around its end if need be, and says
    /// which.
    fn read(&self, order: &[u32], place: usize, image: &mut Image) -> Result<u32> {
        for &index in order[place..].iter().chain(&order[..place]) {
            if lock(&self.skipped).contains_key(&index) {
                continue;
            }
            match self.source.read(index as usize, image) {
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
            order.len()
        )))
    }
}

/// Locks, whatever a panic elsewhere left: what these locks guard is valid between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

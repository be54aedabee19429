//! The threads of a loader at work: they are started, waited for and ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::plan::BatchPlan;
use super::prepared::PreparedBatch;
use crate::error::{Error, Result};

/// Finished batches that wait for the consumer, in addition to the one being prepared.
const AHEAD: usize = 1;

/// How long a wait for a batch goes on before the stop flag is read again.
const STOP_CHECK: Duration = Duration::from_millis(50);

/// How long a dropped loader waits for its threads. A read that never returns (a network mount that is gone) keeps its thread;
/// the program goes on without it.
const GRACE: Duration = Duration::from_secs(1);

/// The threads of a loader that has been started.
pub(super) struct Running {
    batches: Receiver<Result<PreparedBatch>>,
    stop: Arc<AtomicBool>,
    coordinator: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts `threads` worker threads (0: one per core) on the batches from `next` on, an epoch and a position.
    pub(super) fn start(plan: Arc<BatchPlan>, next: (u32, usize), threads: usize) -> Result<Self> {
        let refused = |e: &dyn std::fmt::Display| {
            Error::Device(format!("cannot start the loader's threads: {e}"))
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("selfsup-loader-{i}"))
            .build()
            .map_err(|e| refused(&e))?;
        let (sender, batches) = sync_channel(AHEAD);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let coordinator = std::thread::Builder::new()
            .name("selfsup-loader".into())
            .spawn(move || plan.produce(&pool, next, &sender, &stopped))
            .map_err(|e| refused(&e))?;
        Ok(Self { batches, stop, coordinator: Some(coordinator) })
    }

    /// Waits for the next batch; `None` if `stop` becomes true before it comes.
    pub(super) fn receive(&self, stop: &AtomicBool) -> Option<Result<PreparedBatch>> {
        loop {
            match self.batches.recv_timeout(STOP_CHECK) {
                Ok(prepared) => return Some(prepared),
                Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => return None,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = "the loader has ended: an earlier batch failed";
                    return Some(Err(Error::Worker(ended.into())));
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A closed channel wakes a coordinator that waits to hand over a batch.
        self.batches = sync_channel(0).1;
        if let Some(coordinator) = self.coordinator.take() {
            let dropped = Instant::now();
            while !coordinator.is_finished() && dropped.elapsed() < GRACE {
                std::thread::sleep(Duration::from_millis(1));
            }
            if coordinator.is_finished() {
                // Its panics are caught and sent as errors, so the result says nothing new.
                let _ = coordinator.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::loader;
    use super::*;
    use crate::data::{Image, Loader, Policy, Source};
    use crate::device::Device;

    #[test]
    fn dropping_a_loader_half_way_ends_its_threads() {
        let device = Device::cpu(1).unwrap();
        let mut loader = loader(3, &device);
        drop(loader.next_batch().unwrap());
        drop(loader);
        assert_eq!(device.memory_use().live, 0);
    }

    /// A read that never returns, as on a network mount that is gone.
    struct Stalls;
    impl Source for Stalls {
        fn len(&self) -> usize {
            10
        }
        fn read(&self, _: usize, _: &mut Image) -> Result<()> {
            loop {
                std::thread::park();
            }
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
    fn a_stalled_read_does_not_outlast_a_stop() {
        let flag = Arc::new(AtomicBool::new(false));
        let device = Device::reference();
        let mut loader =
            Loader::new(Arc::new(Stalls), vec![Policy::crop(2)], 4, 3, 2, &device).unwrap();
        loader.stop_when(flag.clone());
        let asked = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            flag.store(true, Ordering::Relaxed);
            Instant::now()
        });
        assert!(matches!(loader.next_batch(), Err(Error::Stopped(_))));
        drop(loader);
        assert!(asked.join().unwrap().elapsed() < Duration::from_secs(2));
    }
}

//! The compute threads of the processor.
//!
//! The thread that makes a device is one of them: an operation then starts at once, where a pool of other threads would
//! have to be woken for each (3% of a ResNet-50 step on two cores). From any other thread work goes to a pool that is
//! made when it is first needed, since the maker may be busy elsewhere and would never take it up.

use std::sync::OnceLock;
use std::thread::ThreadId;

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

#[derive(Debug)]
pub(super) struct Threads {
    maker: ThreadId,
    pool: ThreadPool,
    /// For callers other than the maker.
    others: OnceLock<ThreadPool>,
}

impl Threads {
    /// `count` threads, the calling one among them; 0 takes one per core.
    pub(super) fn new(count: usize) -> Result<Self, ThreadPoolBuildError> {
        // A thread can belong to one pool only. A second device made by the same thread gets a pool without it.
        let pool =
            builder(count).use_current_thread().build().or_else(|_| builder(count).build())?;
        Ok(Self { maker: std::thread::current().id(), pool, others: OnceLock::new() })
    }

    pub(super) fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` where rayon's parallel iterators use these threads.
    pub(super) fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let inside =
            std::thread::current().id() == self.maker || self.pool.current_thread_index().is_some();
        if inside { self.pool.install(f) } else { self.others().install(f) }
    }

    fn others(&self) -> &ThreadPool {
        self.others.get_or_init(|| {
            builder(self.count()).build().expect("as many threads as the device has already")
        })
    }
}

fn builder(count: usize) -> ThreadPoolBuilder {
    ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("selfsup-compute-{i}"))
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn any_thread_may_run_work_on_a_device_that_another_made() {
        let threads = Threads::new(1).unwrap();
        let sum = || (0..100).into_par_iter().sum::<i32>();
        assert_eq!(threads.run(sum), 4950);
        // The maker waits here outside of rayon: nobody but the other pool can do the work.
        let from_another = std::thread::scope(|s| s.spawn(|| threads.run(sum)).join().unwrap());
        assert_eq!(from_another, 4950);
    }

    #[test]
    fn a_thread_may_make_several_devices_and_use_one_inside_another() {
        let (first, second) = (Threads::new(2).unwrap(), Threads::new(3).unwrap());
        assert_eq!((first.count(), second.count()), (2, 3));
        assert_eq!(first.run(|| second.run(|| (0..100).into_par_iter().count())), 100);
        assert_eq!(second.run(|| first.run(|| (0..100).into_par_iter().count())), 100);
    }
}

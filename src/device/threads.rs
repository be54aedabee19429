//! The compute threads of the processor.
//!
//! A pool has threads of its own, and the caller of [`Threads::run`] waits for them. A program whose thread does nothing but
//! drive a device can make that thread one of the compute threads ([`Threads::with_this_thread`]): operations then start
//! without waking another thread (3% of a ResNet-50 step on two cores). rayon ties such a thread to the pool for the rest of
//! the thread's life, so that this is never done without being asked for.

use std::sync::OnceLock;
use std::thread::ThreadId;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The most threads of a device: more are a mistake, and starting them would take the machine down with it.
const MAX_THREADS: usize = 4096;

#[derive(Debug)]
pub(super) struct Threads {
    pool: ThreadPool,
    /// For a pool that its maker is one of the threads of.
    maker: Option<Maker>,
}

#[derive(Debug)]
struct Maker {
    id: ThreadId,
    /// For callers on other threads: the maker may be busy elsewhere and would never take up its share.
    others: OnceLock<ThreadPool>,
}

impl Threads {
    /// A pool of `count` threads; 0 takes one per core.
    pub(super) fn new(count: usize) -> Result<Self, String> {
        let pool = checked(count)?.build().map_err(|e| e.to_string())?;
        Ok(Self { pool, maker: None })
    }

    /// A pool of `count` threads, the calling one among them for the rest of its life; 0 takes one per core. The calling
    /// thread stays outside if it belongs to a pool already.
    pub(super) fn with_this_thread(count: usize) -> Result<Self, String> {
        match checked(count)?.use_current_thread().build() {
            Ok(pool) => {
                let id = std::thread::current().id();
                Ok(Self { pool, maker: Some(Maker { id, others: OnceLock::new() }) })
            }
            Err(_) => Self::new(count),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` so that rayon's parallel iterators use these threads.
    pub(super) fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let (mut f, mut result) = (Some(f), None);
        self.install(&mut || result = f.take().map(|f| f()));
        result.expect("install has called it once")
    }

    /// Behind a pointer, because rayon would compile every operation six times: for a caller inside, outside and in another pool,
    /// and each again for either pool below.
    fn install(&self, f: &mut (dyn FnMut() + Send)) {
        match &self.maker {
            Some(maker)
                if std::thread::current().id() != maker.id
                    && self.pool.current_thread_index().is_none() =>
            {
                let count = self.count();
                let build = || builder(count).build().expect("as many threads as the device has");
                maker.others.get_or_init(build).install(f)
            }
            _ => self.pool.install(f),
        }
    }
}

/// Seconds of processor time that this thread has used.
#[cfg(unix)]
pub(crate) fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to write to, and every unix of the last decades has this clock.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "the clock of this thread's processor time");
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}

/// Seconds, of the wall: there is no such clock of the thread.
#[cfg(not(unix))]
pub(crate) fn thread_seconds() -> f64 {
    static BEGIN: OnceLock<std::time::Instant> = OnceLock::new();
    BEGIN.get_or_init(std::time::Instant::now).elapsed().as_secs_f64()
}

/// A builder for `count` threads.
fn checked(count: usize) -> Result<ThreadPoolBuilder, String> {
    if count > MAX_THREADS {
        return Err(format!("at most {MAX_THREADS} are supported"));
    }
    if count == 0 {
        check_default(MAX_THREADS)?;
    }
    Ok(builder(count))
}

/// Fails if the environment asks rayon for more threads than `most` where nothing else says how many.
pub(crate) fn check_default(most: usize) -> Result<(), String> {
    let name = "RAYON_NUM_THREADS";
    let asked = std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    match asked.filter(|&asked| asked > most) {
        Some(asked) => Err(format!("{name} is {asked}; it must be at most {most}")),
        None => Ok(()),
    }
}

fn builder(count: usize) -> ThreadPoolBuilder {
    ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("selfsup-compute-{i}"))
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    fn count_to(n: usize) -> usize {
        (0..n).into_par_iter().count()
    }

    #[test]
    fn any_thread_may_run_work_on_a_device_that_another_made() {
        for make in [Threads::new, Threads::with_this_thread] {
            let threads = make(1).unwrap();
            assert_eq!(threads.run(|| count_to(100)), 100);
            // The maker waits here outside of rayon, so its own pool cannot do the work.
            let from_another =
                std::thread::scope(|s| s.spawn(|| threads.run(|| count_to(100))).join().unwrap());
            assert_eq!(from_another, 100);
        }
    }

    #[test]
    fn a_thread_may_make_several_devices_and_use_one_inside_another() {
        for make in [Threads::new, Threads::with_this_thread] {
            let (first, second) = (make(2).unwrap(), make(3).unwrap());
            assert_eq!((first.count(), second.count()), (2, 3));
            assert_eq!(first.run(|| second.run(|| count_to(100))), 100);
            assert_eq!(second.run(|| first.run(|| count_to(100))), 100);
        }
    }

    #[test]
    fn a_device_does_not_bind_the_thread_that_makes_it() {
        let work = || {
            let before = rayon::current_num_threads();
            let threads = Threads::new(before + 1).unwrap();
            assert_eq!(threads.run(rayon::current_num_threads), before + 1);
            assert_eq!(
                (rayon::current_num_threads(), rayon::current_thread_index()),
                (before, None)
            );
            drop(threads);
            assert_eq!(
                (rayon::current_num_threads(), rayon::current_thread_index()),
                (before, None)
            );
        };
        std::thread::scope(|s| s.spawn(work).join().unwrap());
    }

    #[test]
    fn absurd_numbers_of_threads_are_refused() {
        for make in [Threads::new, Threads::with_this_thread] {
            for count in [MAX_THREADS + 1, 1_000_000, usize::MAX] {
                assert!(make(count).unwrap_err().contains("at most 4096"));
            }
        }
    }
}

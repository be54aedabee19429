//! Threads that take turns: if asked for, a thread often waits before its call until another thread has made one, so that what one
//! does between two of its calls meets what others do. A machine with few cores hardly ever shows such a meeting by itself.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long a thread waits for another one's call: there may be none.
const PATIENCE: Duration = Duration::from_millis(2);

/// The seed of who waits; 0 if nobody does.
static SEED: AtomicU64 = AtomicU64::new(0);
static THREADS: AtomicU64 = AtomicU64::new(1);
/// How many calls have been made.
static CALLS: Mutex<u64> = Mutex::new(0);
static CALLED: Condvar = Condvar::new();

thread_local! {
    static NUMBER: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
    static RANDOM: Cell<u64> = const { Cell::new(0) };
}

/// Lets threads take turns in an order of this seed, or not if it is 0.
pub(crate) fn set(seed: u64) {
    SEED.store(seed, Ordering::Relaxed);
}

/// Before a call, and outside of all locks: perhaps waits for another thread.
pub(crate) fn before_call() {
    let seed = SEED.load(Ordering::Relaxed);
    if seed == 0 {
        return;
    }
    let mut random = RANDOM.get();
    if random == 0 {
        random =
            (seed ^ NUMBER.with(|number| number << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    }
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    RANDOM.set(random);
    if random.is_multiple_of(2) {
        let calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *calls;
        drop(CALLED.wait_timeout_while(calls, PATIENCE, |calls| *calls == before));
    }
}

pub(crate) fn after_call() {
    if SEED.load(Ordering::Relaxed) != 0 {
        *CALLS.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        CALLED.notify_all();
    }
}

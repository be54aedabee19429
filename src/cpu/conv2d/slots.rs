//! Scratch that tasks borrow while they run.
//!
//! A task takes the first free slot. Two threads then use only two slots, which stay in the caches; a
//! fixed slot per task would be cold each time (that cost as much as reading the input). The slot does
//! not affect the results. There are no more than [`MOST`] slots, whatever the number of tasks; on
//! more threads than that some wait.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The most slots of a workspace.
pub const MOST: usize = 64;

pub struct Slots<'a> {
    /// Floats of a slot.
    len: usize,
    free: Mutex<[Option<&'a mut [f32]>; MOST]>,
    returned: Condvar,
}

impl<'a> Slots<'a> {
    /// Splits `scratch` into at most `MOST` slots of `len` floats.
    ///
    /// # Panics
    /// If it is too short for one.
    pub fn new(scratch: &'a mut [f32], len: usize) -> Slots<'a> {
        assert!(scratch.len() >= len, "a workspace of {} floats, {len} in a slot", scratch.len());
        let mut slots = scratch.chunks_exact_mut(len.max(1));
        let free = Mutex::new(std::array::from_fn(|_| slots.next()));
        Slots { len, free, returned: Condvar::new() }
    }

    /// Runs `task` on a slot, once one is free. The task must not wait for others.
    pub fn lend<R>(&self, task: impl FnOnce(&mut [f32]) -> R) -> R {
        if self.len == 0 {
            return task(&mut []);
        }
        let mut free = self.lock();
        let (i, slot) = loop {
            let first = free.iter_mut().enumerate().find_map(|(i, slot)| Some((i, slot.take()?)));
            match first {
                Some(found) => break found,
                None => free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(free);
        let mut lent = Lent { slots: self, i, slot: Some(slot) };
        task(lent.slot.as_deref_mut().unwrap_or_default())
    }

    /// Nothing panics while the lock is held.
    fn lock(&self) -> MutexGuard<'_, [Option<&'a mut [f32]>; MOST]> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot in use, which comes back even if its task panics: others may wait for it.
struct Lent<'s, 'a> {
    slots: &'s Slots<'a>,
    i: usize,
    slot: Option<&'a mut [f32]>,
}

impl Drop for Lent<'_, '_> {
    fn drop(&mut self) {
        self.slots.lock()[self.i] = self.slot.take();
        self.slots.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn more_tasks_than_slots_wait_for_each_other() {
        let mut scratch = [0.0; 7];
        let slots = Slots::new(&mut scratch, 3);
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        slots.lend(|slot| {
                            most.fetch_max(
                                running.fetch_add(1, Ordering::SeqCst) + 1,
                                Ordering::SeqCst,
                            );
                            assert_eq!(slot.len(), 3);
                            slot[0] += 1.0;
                            std::thread::yield_now();
                            running.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert!((1..=2).contains(&most.into_inner()));
        assert_eq!(scratch[0] + scratch[3], 800.0);
        Slots::new(&mut [], 0).lend(|slot| assert!(slot.is_empty()));
    }
}

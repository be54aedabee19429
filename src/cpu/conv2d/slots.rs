//! Scratch that tasks borrow while they run.
//!
//! There is one slot per task, so that any number of threads can run, but a task takes the first
//! free one. Two threads then use only two slots, which stay in the caches; a fixed slot per task
//! would be cold each time (that cost as much as reading the input). The slot does not affect the
//! results.

use std::sync::Mutex;

/// The most tasks that share a workspace.
pub const MOST: usize = 64;

pub struct Slots<'a> {
    free: Mutex<[Option<&'a mut [f32]>; MOST]>,
}

impl<'a> Slots<'a> {
    /// Splits `scratch` into at most `MOST` slots of `len` floats.
    pub fn new(scratch: &'a mut [f32], len: usize) -> Slots<'a> {
        let mut slots = scratch.chunks_exact_mut(len.max(1));
        Slots { free: Mutex::new(std::array::from_fn(|_| slots.next())) }
    }

    /// Runs `task` on a slot, or on an empty one if there are none.
    ///
    /// # Panics
    /// If another task panicked.
    pub fn lend<R>(&self, task: impl FnOnce(&mut [f32]) -> R) -> R {
        let (i, slot) = {
            let mut free = self.free.lock().expect("a task panicked while holding the slots");
            let first = free.iter().position(|slot| slot.is_some());
            (first, first.and_then(|i| free[i].take()))
        };
        let (Some(i), Some(slot)) = (i, slot) else { return task(&mut []) };
        let result = task(&mut *slot);
        self.free.lock().expect("a task panicked while holding the slots")[i] = Some(slot);
        result
    }
}

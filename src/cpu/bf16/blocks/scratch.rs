//! The workspace of a kernel, cut into parts that start on cache lines.

use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;

use super::pack::Row;

/// Bytes of a cache line; tiles are read by lines.
const LINE: usize = 64;

/// Hands out parts of a workspace, or counts their bytes.
pub struct Scratch {
    start: *mut u8,
    used: usize,
    capacity: usize,
}

/// A part of a workspace. Tasks access different elements of it.
#[derive(Clone, Copy)]
pub struct Part {
    start: *mut u8,
    len: usize,
}

// SAFETY: a part is used while the workspace is borrowed; the drivers let tasks write different elements.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

impl Scratch {
    pub fn new(workspace: &mut [f32]) -> Self {
        let start = workspace.as_mut_ptr().cast::<u8>();
        let skipped = start.align_offset(LINE);
        let capacity = size_of_val(workspace).saturating_sub(skipped);
        Self { start: start.wrapping_add(skipped), used: 0, capacity }
    }

    /// Only counts.
    pub fn counting() -> Self {
        Self { start: std::ptr::null_mut(), used: 0, capacity: usize::MAX / 2 }
    }

    /// # Panics
    /// If the workspace is too short.
    pub fn part(&mut self, len: usize) -> Part {
        let start = self.start.wrapping_add(self.used);
        self.used += len.next_multiple_of(LINE);
        assert!(self.used <= self.capacity, "bf16: a workspace shorter than its length");
        Part { start, len }
    }

    /// Bytes of all parts, and for the start to be on a cache line.
    pub fn len(&self) -> usize {
        self.used + LINE
    }
}

impl Part {
    /// The address of a byte.
    #[inline]
    #[track_caller]
    pub fn at(&self, byte: usize) -> *mut u8 {
        debug_assert!(byte <= self.len, "byte {byte} of {}", self.len);
        self.start.wrapping_add(byte)
    }

    /// The first `count` floats, once all tasks that write them have ended.
    #[track_caller]
    pub fn floats(&self, count: usize) -> &[f32] {
        assert!(count * 4 <= self.len);
        // SAFETY: the workspace is a slice of floats, and the part starts on a line of it.
        unsafe { std::slice::from_raw_parts(self.start.cast(), count) }
    }
}

/// The start of a tensor, for tasks.
#[derive(Clone, Copy)]
pub struct Shared(Row);

// SAFETY: tasks only read it, while the slice is borrowed.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn of(x: &[bf16]) -> Self {
        Self(x.as_ptr().cast())
    }

    pub fn row(self) -> Row {
        self.0
    }
}

/// Scratch that tasks borrow while they run: a task takes the first free slot, so that two threads use two slots, which stay in
/// the caches, however many tasks there are. The slot does not affect the results.
pub struct Slots {
    part: Part,
    len: usize,
    /// A bit for each free slot.
    free: AtomicU64,
}

impl Slots {
    /// Slots of `len` bytes for so many tasks.
    pub fn new(scratch: &mut Scratch, tasks: usize, len: usize) -> Self {
        let len = len.next_multiple_of(LINE);
        let count = tasks.min(64);
        let part = scratch.part(count * len);
        let free = AtomicU64::new(if count == 64 { u64::MAX } else { (1 << count) - 1 });
        Self { part, len, free }
    }

    /// Runs `task` on a slot. With more threads than slots it waits for one: tasks with slots wait for nothing.
    pub fn lend<R>(&self, task: impl FnOnce(*mut u8) -> R) -> R {
        let slot = loop {
            let free = self.free.load(Ordering::Acquire);
            let first = free & free.wrapping_neg();
            if first == 0 {
                std::thread::yield_now();
                continue;
            }
            let taken = self.free.compare_exchange_weak(
                free,
                free & !first,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if taken.is_ok() {
                break first;
            }
        };
        let borrowed = Borrowed { slots: self, slot };
        task(self.part.at(borrowed.slot.trailing_zeros() as usize * self.len))
    }
}

/// Gives a slot back, after a panic too: other tasks may be waiting for it.
struct Borrowed<'a> {
    slots: &'a Slots,
    slot: u64,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.slots.free.fetch_or(self.slot, Ordering::Release);
    }
}

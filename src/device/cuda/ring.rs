//! A ring of numbers in flight from a GPU, which the host polls without waiting, or waits for one after another.

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUresult};

use super::In;
use crate::device::Device;

/// Slots in pinned memory, each with an event that marks its numbers as arrived.
#[derive(Debug)]
pub(crate) struct Ring {
    device: Device,
    /// Null if pinning failed; the device is in its failed state then.
    numbers: *mut f32,
    /// Numbers that a slot has room for.
    each: usize,
    events: Vec<CUevent>,
    sent: usize,
    seen: usize,
}

// SAFETY: pinned memory and events belong to the context, not to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for up to `slots` numbers in flight.
    pub(crate) fn new(device: &Device, slots: usize) -> Self {
        Self::of_rows(device, slots, 1)
    }

    /// A ring for up to `slots` sets of at most `each` numbers in flight.
    pub(crate) fn of_rows(device: &Device, slots: usize, each: usize) -> Self {
        let each = each.max(1);
        let made = device.gpu().attempt(
            || format!("pinning memory for {} numbers", slots * each),
            |_| {
                // SAFETY: plain pinned memory of this size, which `drop` frees.
                let numbers = unsafe { result::malloc_host(slots * each * size_of::<f32>(), 0)? };
                let event = |_| result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
                Ok((numbers.cast(), (0..slots).map(event).collect::<Result<_, _>>()?))
            },
        );
        let (numbers, events) = made.unwrap_or((std::ptr::null_mut(), Vec::new()));
        Self { device: device.clone(), numbers, each, events, sent: 0, seen: 0 }
    }

    /// Queues a copy of a number to the host, behind all queued work.
    ///
    /// # Panics
    /// If every slot is in flight.
    pub(crate) fn send(&mut self, number: In<'_, f32>) {
        self.send_row(number, 1);
    }

    /// Queues a copy of the first `count` numbers behind a pointer.
    ///
    /// # Panics
    /// If every slot is in flight, or there are more numbers than a slot has room for or than lie behind the pointer.
    pub(crate) fn send_row(&mut self, numbers: In<'_, f32>, count: usize) {
        assert!(self.events.is_empty() || self.sent - self.seen < self.events.len(), "ring: full");
        assert!(count <= self.each && count <= numbers.count(), "ring: {count} numbers");
        let slot = self.sent % self.events.len().max(1);
        self.device.gpu().attempt(
            || "copying numbers from the GPU".into(),
            |gpu| {
                // SAFETY: the slot lies in the pinned memory, no copy to it is in flight, and so many numbers lie behind the pointer.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(self.slot(slot), count);
                    let to = bytemuck::cast_slice_mut::<f32, u8>(to);
                    result::memcpy_dtoh_async(to, numbers.address(), gpu.stream())?;
                    result::event::record(self.events[slot], gpu.stream())
                }
            },
        );
        self.sent += 1;
    }

    /// Where a slot begins.
    fn slot(&self, slot: usize) -> *mut f32 {
        self.numbers.wrapping_add(slot * self.each)
    }

    /// Waits for the oldest set of numbers in flight, and returns it; `None` after a failure.
    pub(crate) fn wait(&mut self, count: usize) -> Option<Vec<f32>> {
        assert!(count <= self.each && self.seen < self.sent, "ring: {count} numbers");
        let slot = self.seen % self.events.len().max(1);
        self.seen += 1;
        self.device.gpu().attempt(
            || "waiting for numbers from the GPU".into(),
            // SAFETY: the event belongs to this context; once it has passed, the slot's numbers are not being written.
            |_| unsafe {
                result::event::synchronize(self.events[slot])?;
                Ok(std::slice::from_raw_parts(self.slot(slot), count).to_vec())
            },
        )
    }

    /// The oldest number in flight, if it has arrived. An error that surfaces here is reported as an error of `what`.
    pub(crate) fn poll(&mut self, what: impl FnOnce() -> String) -> Option<f32> {
        let slot = self.seen % self.events.len().max(1);
        let arrived = self.device.gpu().attempt(what, |_| {
            // SAFETY: the event belongs to this context; once it has passed, the number is not being written.
            unsafe {
                match result::event::query(self.events[slot]) {
                    Ok(()) => Ok(Some(self.slot(slot).read_volatile())),
                    Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(None),
                    Err(e) => Err(e),
                }
            }
        });
        let number = arrived.flatten()?;
        self.seen += 1;
        Some(number)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.device.gpu().finish(|| {
            // SAFETY: no copy is in flight after the wait. Errors are ignored: nothing uses the ring any more.
            unsafe {
                let _ = result::stream::synchronize(self.device.gpu().stream());
                for &event in &self.events {
                    let _ = result::event::destroy(event);
                }
                if !self.numbers.is_null() {
                    let _ = result::free_host(self.numbers.cast::<c_void>());
                }
            }
        });
    }
}

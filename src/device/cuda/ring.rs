//! Numbers on their way from a GPU, which the host looks at without waiting.

use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUresult};

use super::In;
use crate::device::Device;

/// A few places in pinned memory, each with the event after which its number is there.
#[derive(Debug)]
pub(crate) struct Ring {
    device: Device,
    /// Null if there was no memory, which has failed the device.
    numbers: *mut f32,
    events: Vec<CUevent>,
    sent: usize,
    seen: usize,
}

// SAFETY: pinned memory and events belong to the context, not to a thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Room for `places` numbers that are under way at once.
    pub(crate) fn new(device: &Device, places: usize) -> Self {
        let made = device.gpu().attempt(
            || format!("pinning memory for {places} numbers"),
            |_| {
                // SAFETY: plain pinned memory of this size, which `drop` frees.
                let numbers = unsafe { result::malloc_host(places * size_of::<f32>(), 0)? };
                let event = |_| result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
                Ok((numbers.cast(), (0..places).map(event).collect::<Result<_, _>>()?))
            },
        );
        let (numbers, events) = made.unwrap_or((std::ptr::null_mut(), Vec::new()));
        Self { device: device.clone(), numbers, events, sent: 0, seen: 0 }
    }

    /// Sends a number, as it will be when all that is queued has run.
    ///
    /// # Panics
    /// When all places are under way.
    pub(crate) fn send(&mut self, number: In<'_, f32>) {
        assert!(self.events.is_empty() || self.sent - self.seen < self.events.len(), "ring: full");
        let place = self.sent % self.events.len().max(1);
        self.device.gpu().attempt(
            || "copy of a number from the GPU".into(),
            |gpu| {
                // SAFETY: the place is in the pinned memory, and no copy to it is under way.
                unsafe {
                    let to = std::slice::from_raw_parts_mut(self.numbers.add(place), 1);
                    let to = bytemuck::cast_slice_mut::<f32, u8>(to);
                    result::memcpy_dtoh_async(to, number.address(), gpu.stream())?;
                    result::event::record(self.events[place], gpu.stream())
                }
            },
        );
        self.sent += 1;
    }

    /// The oldest number under way, if it has arrived. An error that comes out here is told as one of `what`.
    pub(crate) fn poll(&mut self, what: impl FnOnce() -> String) -> Option<f32> {
        let place = self.seen % self.events.len().max(1);
        let arrived = self.device.gpu().attempt(what, |_| {
            // SAFETY: the event is one of this context; the number is not being written once it has passed.
            unsafe {
                match result::event::query(self.events[place]) {
                    Ok(()) => Ok(Some(self.numbers.add(place).read_volatile())),
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
            // SAFETY: no copy is under way any more after the wait. An error has nobody left to tell.
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

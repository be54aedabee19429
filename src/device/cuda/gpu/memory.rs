//! A GPU's memory: what is taken from the driver, and copies to it, from it and within it.

use std::sync::atomic::Ordering;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::{Gpu, lock};
use crate::device::cuda::staging::PIECE;

impl Gpu {
    /// Allocates device memory from the driver. Returns `None` if none is left; the caller reports it.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        if let Some(addresses) = &self.imagined {
            return Some(addresses.take(bytes));
        }
        self.attempt(
            || format!("allocation of {bytes} bytes"),
            // SAFETY: `free` gives it back.
            |_| match unsafe { result::malloc_sync(bytes) } {
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
                other => other.map(Some),
            },
        )
        .flatten()
    }

    /// Returns memory to the driver.
    ///
    /// # Safety
    /// It came from `allocate`, and no queued work uses it.
    pub(crate) unsafe fn free(&self, address: u64) {
        if self.ignores.load(Ordering::Acquire) {
            // A program that goes on without this GPU's handle, or with another one, needs the memory.
            return self.finish(|| {
                // SAFETY: the caller vouches for it. An error is ignored: one was reported.
                let _ = unsafe { result::free_sync(address) };
            });
        }
        // SAFETY: the caller vouches for it.
        self.attempt(|| "freeing memory".into(), |_| unsafe { result::free_sync(address) });
    }

    /// Free bytes and total bytes.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.attempt(|| "querying free memory".into(), |_| result::mem_get_info())
            .unwrap_or_default()
    }

    /// Queues setting `bytes` bytes.
    ///
    /// # Safety
    /// There are that many bytes at `to`.
    pub(crate) unsafe fn set(&self, to: u64, byte: u8, bytes: usize) {
        self.note("memset", || [0, bytes as u64]);
        self.attempt(
            || "filling memory".into(),
            // SAFETY: the caller vouches for `to`.
            |gpu| unsafe { result::memset_d8_async(to, byte, bytes, gpu.compute) },
        );
    }

    /// Queues a copy from the host. Fails the GPU during a capture: every replay would copy the bytes of now.
    ///
    /// # Safety
    /// There are that many bytes at `to`.
    pub(crate) unsafe fn upload(&self, to: u64, from: &[u8]) {
        self.expect_no_capture("copies from the host");
        self.note("copy from the host", || [0, from.len() as u64]);
        self.attempt(
            || format!("copy of {} bytes to the GPU", from.len()),
            // SAFETY: the caller vouches for `to`; the context is current and owns the stream.
            |gpu| unsafe { lock(&gpu.staging).upload(to, from, gpu.compute) },
        );
    }

    /// Copies to the host and waits. After a failure all bits of the result are set, which is NaN in every float type, so
    /// that it cannot be taken for a result.
    ///
    /// # Safety
    /// There are that many bytes at `from`.
    pub(crate) unsafe fn download(&self, to: &mut [u8], from: u64) {
        let bytes = to.len();
        let done = self.attempt(
            || format!("copy of {bytes} bytes from the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the caller vouches for `from`; `to` stays borrowed until the copies have been waited for, also
                // after one that failed.
                unsafe {
                    let mut pieces = to.chunks_mut(PIECE).enumerate();
                    let queued = pieces.try_for_each(|(i, piece)| {
                        result::memcpy_dtoh_async(piece, from + (i * PIECE) as u64, gpu.compute)
                    });
                    queued.and(result::stream::synchronize(gpu.compute))
                }
            },
        );
        if done.is_none() {
            to.fill(0xFF);
        }
    }

    /// Queues a copy within the GPU.
    ///
    /// # Safety
    /// There are that many bytes at both addresses, and they do not overlap.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.note("copy", || [bytes as u64; 2]);
        self.attempt(
            || format!("copy of {bytes} bytes on the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the caller vouches for both addresses.
                unsafe { result::memcpy_dtod_async(to, from, bytes, gpu.compute) }
            },
        );
    }

    /// Allocates memory for numbers that the host sets; `None` after a failure.
    pub(crate) fn take_numbers(&self, bytes: usize) -> Option<u64> {
        let address = lock(&self.numbers).take(bytes, |size| self.allocate(size));
        if address.is_none() {
            self.fail(format!("GPU {}: out of memory: {bytes} bytes for numbers", self.ordinal));
        }
        address
    }

    /// Frees memory from `take_numbers`.
    pub(crate) fn give_back_numbers(&self, address: u64, bytes: usize) {
        if address != 0 {
            lock(&self.numbers).give_back(address, bytes);
        }
    }

    /// Sets numbers for all work queued from now on.
    pub(crate) fn set_numbers(&self, address: u64, bytes: &[u8]) {
        if self.ignores.load(Ordering::Acquire) {
            return; // the address may be 0
        }
        if self.capturing.load(Ordering::Acquire) {
            return self.refuse("sets numbers");
        }
        lock(&self.numbers).set(address, bytes);
        self.unsent.store(true, Ordering::Release);
    }

    /// Queues copies of the numbers that have been set, ahead of the next work.
    pub(in crate::device::cuda) fn send_numbers(&self) -> Result<(), DriverError> {
        if !self.unsent.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut staging = lock(&self.staging);
        lock(&self.numbers).send(|to, bytes| {
            // SAFETY: the region owns these bytes, and the caller has made the context current.
            unsafe { staging.upload(to, bytes, self.compute) }
        })
    }

    /// Ends a step's copies from the host; see [`Staging::end_step`](crate::device::cuda::staging::Staging::end_step).
    pub(crate) fn end_step(&self, steps_in_flight: Option<usize>) {
        self.attempt(
            || "pinning staging memory".into(),
            |gpu| lock(&gpu.staging).end_step(steps_in_flight),
        );
    }
}

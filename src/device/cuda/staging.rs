//! Pinned host memory for staging copies, so that queueing a copy does not wait.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUstream};

/// The largest piece of a copy, in bytes.
pub(super) const PIECE: usize = 8 << 20;
/// The most bytes pinned: beyond this, a copy waits for an earlier one instead of pinning more.
const MOST: usize = 64 << 20;

/// Blocks of pinned memory, each with the event after which it is free again.
#[derive(Debug, Default)]
pub(super) struct Staging {
    blocks: Vec<Block>,
    pinned: usize,
    /// How many blocks of each size copies have taken in this step.
    taken: HashMap<usize, usize>,
}

#[derive(Debug)]
struct Block {
    at: *mut c_void,
    bytes: usize,
    done: CUevent,
}

// SAFETY: pinned memory and events belong to the context, not to a thread.
unsafe impl Send for Staging {}

impl Staging {
    /// Queues a copy of `from` to device address `to`. `from` may change as soon as this returns.
    ///
    /// # Safety
    /// `to` has room for it, the context is current, and `stream` belongs to the context.
    pub(super) unsafe fn upload(
        &mut self,
        to: u64,
        from: &[u8],
        stream: CUstream,
    ) -> Result<(), DriverError> {
        for (i, piece) in from.chunks(PIECE).enumerate() {
            let block = self.free_block(piece.len())?;
            // SAFETY: no copy from this block is in flight, and the block is at least as large as the piece.
            let pinned = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), block.at.cast(), piece.len());
                std::slice::from_raw_parts(block.at.cast::<u8>(), piece.len())
            };
            // SAFETY: the caller vouches for `to` and `stream`; the block is not written again before its event has passed.
            unsafe {
                result::memcpy_htod_async(to + (i * PIECE) as u64, pinned, stream)?;
                result::event::record(block.done, stream)?;
            }
        }
        Ok(())
    }

    /// A block of at least `bytes` that no copy is using.
    fn free_block(&mut self, bytes: usize) -> Result<&Block, DriverError> {
        let bytes = bytes.next_power_of_two().max(4096);
        *self.taken.entry(bytes).or_default() += 1;
        let fits = |block: &Block| block.bytes == bytes;
        // SAFETY: the events live as long as their blocks.
        let free =
            |block: &Block| fits(block) && unsafe { result::event::query(block.done) }.is_ok();
        if let Some(i) = self.blocks.iter().position(free) {
            return Ok(&self.blocks[i]);
        }
        if self.pinned + bytes > MOST
            && let Some(i) = self.blocks.iter().position(fits)
        {
            // SAFETY: as above.
            unsafe { result::event::synchronize(self.blocks[i].done)? };
            return Ok(&self.blocks[i]);
        }
        self.pin(bytes)?;
        Ok(self.blocks.last().expect("pinned just now"))
    }

    fn pin(&mut self, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: plain pinned memory of this size.
        let at = unsafe { result::malloc_host(bytes, 0)? };
        let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        self.pinned += bytes;
        self.blocks.push(Block { at, bytes, done });
        Ok(())
    }

    /// Ends a training step. With `steps_in_flight`, pins now what that many steps like this one need at the same time, so
    /// that a slow copy never causes pinning in a later step.
    pub(super) fn end_step(&mut self, steps_in_flight: Option<usize>) -> Result<(), DriverError> {
        let taken = std::mem::take(&mut self.taken);
        let Some(steps) = steps_in_flight else { return Ok(()) };
        for (bytes, count) in taken {
            let pinned = self.blocks.iter().filter(|block| block.bytes == bytes).count();
            for _ in pinned..steps * count {
                if self.pinned + bytes <= MOST {
                    self.pin(bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Frees everything.
    ///
    /// # Safety
    /// No copy is in flight, and the context is current.
    pub(super) unsafe fn free(&mut self) {
        for block in self.blocks.drain(..) {
            // SAFETY: the caller vouches for it. Errors are ignored: the device is being dropped.
            unsafe {
                let _ = result::event::destroy(block.done);
                let _ = result::free_host(block.at);
            }
        }
    }
}

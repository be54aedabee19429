//! Pinned host memory that copies go through, so that queueing one does not wait.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUstream};

/// A copy goes in pieces of at most this many bytes.
pub(super) const PIECE: usize = 8 << 20;
/// With this many bytes pinned, a copy waits for an earlier one rather than pinning more.
const MOST: usize = 64 << 20;

/// Blocks of pinned memory, each with the event after which it is free again.
#[derive(Debug, Default)]
pub(super) struct Staging {
    blocks: Vec<Block>,
    pinned: usize,
    /// How many blocks of each size copies have taken in this turn.
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
    /// Copies `from` to the device at `to` in the stream's order; `from` may change as soon as this returns.
    ///
    /// # Safety
    /// `to` has room for it, the context is current, and so the stream is one of it.
    pub(super) unsafe fn upload(
        &mut self,
        to: u64,
        from: &[u8],
        stream: CUstream,
    ) -> Result<(), DriverError> {
        for (i, piece) in from.chunks(PIECE).enumerate() {
            let block = self.free_block(piece.len())?;
            // SAFETY: no copy is under way from this block, which is no smaller than the piece.
            let pinned = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), block.at.cast(), piece.len());
                std::slice::from_raw_parts(block.at.cast::<u8>(), piece.len())
            };
            // SAFETY: as this function's, and the block is not written before its event.
            unsafe {
                result::memcpy_htod_async(to + (i * PIECE) as u64, pinned, stream)?;
                result::event::record(block.done, stream)?;
            }
        }
        Ok(())
    }

    /// A block of at least `bytes` that no copy uses.
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

    /// Ends a turn, of which there are many alike: a training step. With `provide`, pins what as many
    /// copies need in so many turns at once: none has to be pinned later because a copy is slower one day.
    pub(super) fn end_turn(&mut self, provide: Option<usize>) -> Result<(), DriverError> {
        let taken = std::mem::take(&mut self.taken);
        let Some(turns) = provide else { return Ok(()) };
        for (bytes, count) in taken {
            let there = self.blocks.iter().filter(|block| block.bytes == bytes).count();
            for _ in there..turns * count {
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
    /// No copy is under way, and the context is current.
    pub(super) unsafe fn free(&mut self) {
        for block in self.blocks.drain(..) {
            // SAFETY: as this function's. An error here has nobody left to tell.
            unsafe {
                let _ = result::event::destroy(block.done);
                let _ = result::free_host(block.at);
            }
        }
    }
}

//! Memory and the exact-size free list.
//!
//! A training step asks for the same sizes in the same order every time, so a list of freed blocks by exact size
//! serves every request after the first step without asking the system, without splitting and without search.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Mutex;

use super::Device;

/// Alignment of every block in bytes: a cache line, and a full vector of the widest instruction set.
const ALIGNMENT: usize = 64;

/// What a device's pool has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes held by live tensors.
    pub live: usize,
    /// The most that `live` has been.
    pub peak: usize,
    /// Bytes taken from the system, live or on the free list.
    pub reserved: usize,
    /// How often the system was asked.
    pub allocations: usize,
}

#[derive(Debug)]
pub(crate) struct Pool {
    poison: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    free: HashMap<usize, Vec<Block>>,
    usage: MemoryUse,
}

/// A block of `ALIGNMENT`-aligned, initialised host memory, owned.
#[derive(Debug)]
struct Block(NonNull<u8>);

// SAFETY: a block is plain owned memory; nothing about it is tied to a thread.
unsafe impl Send for Block {}

impl Pool {
    pub(super) fn new(poison: bool) -> Self {
        Self { poison, state: Mutex::default() }
    }

    pub(super) fn usage(&self) -> MemoryUse {
        self.lock().usage
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the counters half-changed: nothing below panics while it holds the lock.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Block {
        let mut state = self.lock();
        state.usage.live += bytes;
        state.usage.peak = state.usage.peak.max(state.usage.live);
        if let Some(block) = state.free.get_mut(&bytes).and_then(Vec::pop) {
            return block;
        }
        state.usage.reserved += bytes;
        state.usage.allocations += 1;
        drop(state);
        let layout = layout(bytes);
        // SAFETY: the layout's size is not zero (`rounded`). Zeroed, because a later `&[f32]` over memory that
        // nobody wrote would be undefined behaviour; the system hands out zero pages at no cost.
        let pointer = unsafe { alloc_zeroed(layout) };
        Block(NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout)))
    }

    fn give_back(&self, block: Block, bytes: usize) {
        let mut state = self.lock();
        state.usage.live -= bytes;
        state.free.entry(bytes).or_default().push(block);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (bytes, blocks) in state.free.drain() {
            for block in blocks {
                // SAFETY: the block was allocated with this layout and is on no other list.
                unsafe { dealloc(block.0.as_ptr(), layout(bytes)) };
            }
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGNMENT).expect("a tensor's size fits the address space")
}

/// Room for at least one byte, and whole cache lines, so that neighbours never share one.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

/// A piece of a device's memory; dropping it returns it to the device's free list.
#[derive(Debug)]
pub(crate) struct Memory {
    block: Option<Block>,
    bytes: usize,
    device: Device,
}

// SAFETY: `&Memory` gives only shared reads of plain bytes; writing needs `&mut Memory`.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least `bytes` of memory with unspecified (on a poisoned device: NaN) contents.
    pub(crate) fn new(device: &Device, bytes: usize) -> Self {
        let bytes = rounded(bytes);
        let block = device.pool().take(bytes);
        let mut memory = Self { block: Some(block), bytes, device: device.clone() };
        if device.pool().poison {
            // All bits set is a NaN in every float format, and -1 in integers.
            memory.bytes_mut().fill(0xFF);
        }
        memory
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let block = self.block.as_ref().expect("present until dropped");
        // SAFETY: the block holds `self.bytes` initialised bytes and is borrowed for as long as `self`.
        unsafe { std::slice::from_raw_parts(block.0.as_ptr(), self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let block = self.block.as_mut().expect("present until dropped");
        // SAFETY: as above, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(block.0.as_ptr(), self.bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.device.pool().give_back(block, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_serves_the_next_request_of_its_size() {
        let device = Device::reference();
        drop(Memory::new(&device, 1000));
        let before = device.memory_use();
        let again = Memory::new(&device, 1000);
        assert_eq!(device.memory_use().allocations, before.allocations);
        assert_eq!(device.memory_use().live, 1024);
        drop(again);
        assert_eq!(device.memory_use().live, 0);
    }

    #[test]
    fn poisoned_memory_is_nan_again_after_reuse() {
        let device = Device::reference().poisoned();
        let mut memory = Memory::new(&device, 64);
        memory.bytes_mut().fill(0);
        drop(memory);
        let again = Memory::new(&device, 64);
        assert!(bytemuck::cast_slice::<u8, f32>(again.bytes()).iter().all(|x| x.is_nan()));
    }
}

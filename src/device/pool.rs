//! The exact-size free list of a device, on the host and on GPUs.
//!
//! A training step requests the same sizes in the same order every time. A free list keyed by exact size therefore serves
//! every request after the first step, without system calls, without splitting blocks and without a search.
//! On a GPU a freed block may still be in use by queued work; the next owner's work is queued behind it. Once a GPU has run out
//! of memory, a request may also take a free block that is a little larger, and only then is the free list returned to the driver. A
//! capture may not do that, and is given up instead.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::panic::Location;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use memmap2::MmapMut;

use super::cuda::Gpu;
use super::gib;

/// Alignment of every block in bytes: a cache line, and a full vector of the widest instruction set.
const ALIGNMENT: usize = 64;

/// Bytes of a huge page. Host blocks of this size and larger request huge pages: activations take megabytes, and with small
/// pages every other cache line that a convolution reads costs a TLB miss.
const HUGE_PAGE: usize = 2 << 20;

/// A request on a GPU without free memory takes a free block of up to its own size and this share of it more.
const SPARE: usize = 4;

/// Statistics of a device's memory pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes held by live tensors.
    pub live: usize,
    /// The peak of `live`.
    pub peak: usize,
    /// Bytes obtained from the system, live or on the free list.
    pub reserved: usize,
    /// Number of allocations requested from the system.
    pub allocations: usize,
}

#[derive(Debug)]
pub(crate) struct Pool {
    poison: bool,
    /// The GPU that memory comes from; `None` for host memory.
    gpu: Option<Arc<Gpu>>,
    state: Mutex<State>,
}

/// Freed blocks by size.
type FreeList = HashMap<usize, Vec<Block>>;

#[derive(Debug, Default)]
struct State {
    free: FreeList,
    /// Freed blocks of each captured graph. Every replay writes them, so only that graph may reuse them.
    captured: HashMap<u64, FreeList>,
    /// The graph that owns a block, by the block's address; most blocks have no owner.
    owners: HashMap<usize, u64>,
    /// The capture in progress, and the thread whose work it is.
    capture: Option<u64>,
    capturer: Option<ThreadId>,
    captures: u64,
    /// The GPU has run out of memory before: larger blocks serve requests before the driver is asked.
    tight: bool,
    /// The sizes of live blocks that are larger than what was asked for, by address.
    larger: HashMap<usize, usize>,
    usage: MemoryUse,
    /// Mappings of the large host blocks; unmapped when the pool is dropped.
    maps: Vec<MmapMut>,
    /// Bytes and number of live blocks by the source location that requested them. Kept for GPUs only, whose memory runs
    /// out first.
    holders: HashMap<&'static Location<'static>, (usize, usize)>,
}

/// An owned block, `ALIGNMENT`-aligned: initialised host memory, or an address on a GPU. Null if the GPU ran out of memory;
/// the GPU ignores all work then, and no operation touches the block.
#[derive(Debug)]
pub(super) struct Block(pub(super) *mut u8);

// SAFETY: a block is plain owned memory, not tied to a thread.
unsafe impl Send for Block {}

impl Pool {
    pub(super) fn new(poison: bool, gpu: Option<Arc<Gpu>>) -> Self {
        Self { poison, gpu, state: Mutex::default() }
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.poison
    }

    pub(super) fn usage(&self) -> MemoryUse {
        self.lock().usage
    }

    pub(super) fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_deref()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing below panics while it holds the lock, so a poisoned lock still guards consistent counters.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn take(&self, bytes: usize, place: &'static Location<'static>) -> Block {
        let mut state = self.lock();
        state.usage.live += bytes;
        state.usage.peak = state.usage.peak.max(state.usage.live);
        if self.gpu.is_some() {
            let holder = state.holders.entry(place).or_default();
            *holder = (holder.0 + bytes, holder.1 + 1);
        }
        if let Some(block) = state.reuse(bytes) {
            return block;
        }
        if state.tight
            && let Some(block) = state.reuse_larger(bytes)
        {
            return block;
        }
        state.usage.reserved += bytes;
        state.usage.allocations += 1;
        drop(state);
        if let Some(gpu) = &self.gpu {
            let block = self.take_from_gpu(gpu, bytes);
            if !block.0.is_null() {
                self.lock().claim(&block);
            }
            return block;
        }
        let pointer = if bytes < HUGE_PAGE {
            // SAFETY: the layout's size is not zero (`rounded`). Zeroed, because a later `&[f32]` over uninitialised
            // memory would be undefined behaviour.
            unsafe { alloc_zeroed(layout(bytes)) }
        } else {
            self.map(bytes).unwrap_or(std::ptr::null_mut())
        };
        if pointer.is_null() {
            let mut state = self.lock();
            state.usage.live -= bytes;
            state.usage.reserved -= bytes;
            let live = gib(state.usage.live);
            drop(state);
            panic!("out of memory: a tensor needs {}, and tensors hold {live}", gib(bytes));
        }
        Block(pointer)
    }

    /// Maps zeroed memory that starts on a huge page, if the system provides huge pages.
    fn map(&self, bytes: usize) -> std::io::Result<*mut u8> {
        // the part before the first boundary is never touched, so it takes no physical memory
        let mut map = MmapMut::map_anon(bytes.saturating_add(HUGE_PAGE))?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // an optimisation: failure is harmless
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        let pointer = map[start..].as_mut_ptr();
        self.lock().maps.push(map);
        Ok(pointer)
    }

    fn take_from_gpu(&self, gpu: &Gpu, bytes: usize) -> Block {
        let block = |address: u64| Block(std::ptr::without_provenance_mut(address as usize));
        if let Some(address) = gpu.allocate(bytes) {
            return block(address);
        }
        let mut state = self.lock();
        state.tight = true;
        let larger = state.reuse_larger(bytes);
        let capturing = state.capture.is_some();
        let gives_up = capturing && state.capturer == Some(std::thread::current().id());
        if larger.is_some() || gives_up {
            state.usage.reserved -= bytes; // the driver gave nothing
            state.usage.allocations -= 1;
        }
        drop(state);
        if let Some(block) = larger {
            return block;
        }
        // The free list may hold blocks of other sizes: return them to the driver and try again. Not during a capture, whose
        // launches may refer to them.
        if gives_up {
            gpu.give_up_capture(self.out_of_memory(gpu, bytes));
            return block(0);
        }
        // What another thread is given must be there after the capture, too.
        if !capturing {
            self.trim(gpu);
            if let Some(address) = gpu.allocate(bytes) {
                return block(address);
            }
        }
        gpu.fail(self.out_of_memory(gpu, bytes));
        block(0)
    }

    /// Returns the free list to the GPU, even if that has failed: other handles on it may work.
    fn trim(&self, gpu: &Gpu) {
        gpu.wait_to_free();
        let mut state = self.lock();
        let free = std::mem::take(&mut state.free);
        for (bytes, blocks) in free {
            state.usage.reserved -= bytes * blocks.len();
            for block in blocks {
                // SAFETY: the block came from `allocate`, and all queued work is done.
                unsafe { gpu.free(block.0.addr() as u64) };
            }
        }
    }

    fn out_of_memory(&self, gpu: &Gpu, bytes: usize) -> String {
        let (free, total) = gpu.memory();
        let state = self.lock();
        let mut holders: Vec<_> =
            state.holders.iter().filter(|(_, (_, count))| *count > 0).collect();
        holders.sort_by_key(|(place, (bytes, _))| {
            (std::cmp::Reverse(*bytes), place.file(), place.line())
        });
        let holder = |(place, (bytes, count)): &(&&Location<'_>, &(usize, usize))| {
            format!("{} in {count} from {}:{}", gib(*bytes), place.file(), place.line())
        };
        let holders: Vec<String> = holders.iter().take(5).map(holder).collect();
        format!(
            "GPU {}: out of memory: wanted {}, free {} of {}, held by tensors {}; largest holders: {}; use a smaller batch or more micro-batches",
            gpu.ordinal(),
            gib(bytes),
            gib(free),
            gib(total),
            gib(state.usage.live - bytes),
            holders.join(", ")
        )
    }

    pub(super) fn give_back(&self, block: Block, bytes: usize, place: &'static Location<'static>) {
        let mut state = self.lock();
        state.usage.live -= bytes;
        if let Some(holder) = state.holders.get_mut(place) {
            *holder = (holder.0 - bytes, holder.1 - 1);
        }
        if !block.0.is_null() {
            // Captured work may have touched the blocks that it frees.
            state.claim(&block);
            let bytes = state.larger.remove(&block.0.addr()).unwrap_or(bytes);
            state.list_of(&block).entry(bytes).or_default().push(block);
        }
    }

    /// Starts a capture: until [`Pool::end_capture`], blocks that are taken or given back belong to the returned id.
    pub(super) fn begin_capture(&self) -> u64 {
        let mut state = self.lock();
        let id = state.captures;
        state.captures += 1;
        state.captured.insert(id, FreeList::new());
        state.capture = Some(id);
        state.capturer = Some(std::thread::current().id());
        id
    }

    /// Ends the capture: blocks taken from now on have no owner.
    pub(super) fn end_capture(&self) {
        self.lock().capture = None;
    }

    /// Makes the blocks of a graph that will not be replayed again available to everyone.
    pub(super) fn release_captured(&self, id: u64) {
        let mut state = self.lock();
        for (bytes, mut blocks) in state.captured.remove(&id).unwrap_or_default() {
            state.free.entry(bytes).or_default().append(&mut blocks);
        }
        state.owners.retain(|_, owner| *owner != id);
    }
}

impl State {
    /// A freed block of this size. During a capture, a block that the capture already owns is preferred.
    fn reuse(&mut self, bytes: usize) -> Option<Block> {
        let own = self.capture.and_then(|id| self.captured.get_mut(&id)?.get_mut(&bytes)?.pop());
        let block = own.or_else(|| self.free.get_mut(&bytes)?.pop())?;
        self.claim(&block);
        Some(block)
    }

    /// The smallest freed block that is larger than `bytes`, but not by much.
    fn reuse_larger(&mut self, bytes: usize) -> Option<Block> {
        let fits = bytes + 1..=bytes + bytes / SPARE;
        let own = self.capture.and_then(|id| self.captured.get_mut(&id));
        let (size, block) = own
            .and_then(|list| smallest(list, &fits))
            .or_else(|| smallest(&mut self.free, &fits))?;
        self.larger.insert(block.0.addr(), size);
        self.claim(&block);
        Some(block)
    }

    /// Marks a block as owned by the capture in progress.
    fn claim(&mut self, block: &Block) {
        if let Some(id) = self.capture {
            self.owners.insert(block.0.addr(), id);
        }
    }

    /// The free list that a block returns to.
    fn list_of(&mut self, block: &Block) -> &mut FreeList {
        let owner = self.owners.get(&block.0.addr());
        match owner.and_then(|id| self.captured.get_mut(id)) {
            Some(list) => list,
            None => &mut self.free,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(gpu) = &self.gpu {
            return self.trim(gpu);
        }
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (bytes, blocks) in state.free.drain().filter(|(bytes, _)| *bytes < HUGE_PAGE) {
            for block in blocks {
                // SAFETY: the block was allocated with this layout and is on no other list.
                unsafe { dealloc(block.0, layout(bytes)) };
            }
        }
    }
}

/// Takes the smallest block whose size is in the range, with its size.
fn smallest(list: &mut FreeList, fits: &RangeInclusive<usize>) -> Option<(usize, Block)> {
    let free = list.iter().filter(|(size, blocks)| fits.contains(size) && !blocks.is_empty());
    let size = *free.map(|(size, _)| size).min()?;
    Some((size, list.get_mut(&size)?.pop()?))
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, ALIGNMENT).expect("a tensor's size fits the address space")
}

/// At least one byte, rounded up to whole cache lines so that neighbouring blocks never share a line.
pub(super) fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use crate::device::{Device, Memory};

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
    fn running_out_of_memory_is_a_panic_that_leaves_the_device_usable() {
        let device = Device::reference();
        let take = || drop(Memory::new(&device, isize::MAX as usize / 2));
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(take)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.starts_with("out of memory: a tensor needs"), "{message}");
        assert_eq!((device.memory_use().live, device.memory_use().reserved), (0, 0));
        drop(Memory::new(&device, 1000));
    }
}

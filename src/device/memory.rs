//! Memory and the exact-size free list, on the host and on GPUs.
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

use super::cuda::{Foreign, Gpu};
use super::{Device, gib};

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
struct Block(*mut u8);

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

    fn take(&self, bytes: usize, place: &'static Location<'static>) -> Block {
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

    fn give_back(&self, block: Block, bytes: usize, place: &'static Location<'static>) {
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

/// The number of elements of an array with these sizes, or `None` if memory cannot hold it. Products of some of the sizes do
/// not overflow either, even if another size is 0.
pub(crate) fn elements(sizes: &[usize]) -> Option<usize> {
    /// The largest element has 8 bytes, and a slice has at most `isize::MAX` bytes, less some for rounding.
    const MOST: usize = isize::MAX as usize / 16;
    let all = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size.max(1)))?;
    (all <= MOST).then(|| if sizes.contains(&0) { 0 } else { all })
}

/// At least one byte, rounded up to whole cache lines so that neighbouring blocks never share a line.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

/// A piece of a device's memory; dropping it returns it to the device's free list.
#[derive(Debug)]
pub(crate) struct Memory {
    block: Option<Block>,
    bytes: usize,
    device: Device,
    place: &'static Location<'static>,
    /// Where it comes from, and so where it goes, if that is not the device's pool. Boxed, because it is rare.
    origin: Option<Box<Origin>>,
}

#[derive(Debug)]
enum Origin {
    /// The GPU's region of host-set numbers.
    Numbers,
    /// Another library.
    Foreign(Foreign),
}

// SAFETY: `&Memory` gives only shared reads of plain bytes; writing needs `&mut Memory`.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least `bytes` of memory with unspecified (on a poisoned device: NaN) contents.
    #[track_caller]
    pub(crate) fn new(device: &Device, bytes: usize) -> Self {
        // Exact on a GPU, whose driver aligns: memory checkers then know where a tensor ends.
        let bytes = if device.pool().gpu.is_some() { bytes.max(1) } else { rounded(bytes) };
        let place = Location::caller();
        let block = device.pool().take(bytes, place);
        let device = device.clone();
        let mut memory = Self { block: Some(block), bytes, device, place, origin: None };
        if memory.device.pool().poison {
            // All bits set is a NaN in every float format, and -1 in integers.
            match memory.device.pool().gpu() {
                // SAFETY: the block is this large.
                Some(gpu) => unsafe { gpu.set(memory.address(), 0xFF, bytes) },
                None => memory.bytes_mut().fill(0xFF),
            }
        }
        memory
    }

    /// `bytes` of GPU memory for numbers that [`Memory::set_numbers`] sets.
    #[track_caller]
    pub(crate) fn for_numbers(device: &Device, bytes: usize) -> Self {
        let address = device.gpu().take_numbers(bytes).unwrap_or(0);
        let block = Some(Block(std::ptr::without_provenance_mut(address as usize)));
        let (device, place) = (device.clone(), Location::caller());
        Self { block, bytes, device, place, origin: Some(Box::new(Origin::Numbers)) }
    }

    /// `bytes` of another library's memory on a GPU, which goes back to it in the order of its stream.
    #[track_caller]
    pub(crate) fn foreign(device: &Device, bytes: usize, foreign: Foreign) -> Self {
        let block = Some(Block(std::ptr::without_provenance_mut(foreign.address as usize)));
        let (device, place) = (device.clone(), Location::caller());
        let origin = Some(Box::new(Origin::Foreign(foreign)));
        Self { block, bytes, device, place, origin }
    }

    /// Sets all the numbers, for work queued from now on.
    pub(crate) fn set_numbers(&self, bytes: &[u8]) {
        let fits =
            matches!(self.origin.as_deref(), Some(Origin::Numbers)) && bytes.len() == self.bytes;
        assert!(fits, "numbers: the length cannot change");
        self.device.gpu().set_numbers(self.address(), bytes);
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    fn pointer(&self) -> *mut u8 {
        self.block.as_ref().expect("present until dropped").0
    }

    /// Its address on the GPU.
    pub(crate) fn address(&self) -> u64 {
        self.pointer().addr() as u64
    }

    /// Whether `bytes` bytes from offset `from` on lie in it.
    pub(crate) fn holds(&self, from: usize, bytes: usize) -> bool {
        from.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    #[track_caller]
    fn assert_on_host(&self) {
        assert!(
            self.device.pool().gpu.is_none(),
            "the host cannot read a tensor on a GPU: copy it with to_vec, to_f64 or to_device"
        );
    }

    #[track_caller]
    pub(crate) fn bytes(&self) -> &[u8] {
        self.assert_on_host();
        // SAFETY: the block holds `self.bytes` initialised bytes and is borrowed for as long as `self`.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.bytes) }
    }

    #[track_caller]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.assert_on_host();
        // SAFETY: as above, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.bytes) }
    }

    /// Copies `to.len()` bytes, starting at byte `from`, to the host. Waits for a GPU.
    #[track_caller]
    pub(crate) fn read(&self, from: usize, to: &mut [u8]) {
        assert!(self.holds(from, to.len()), "a read beyond the memory's end");
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in the block, as asserted.
            Some(gpu) => unsafe { gpu.download(to, self.address() + from as u64) },
            None => to.copy_from_slice(&self.bytes()[from..][..to.len()]),
        }
    }

    /// Copies `from` from the host to byte offset `at`, queued behind earlier work on a GPU.
    #[track_caller]
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        assert!(self.holds(at, from.len()), "a write beyond the memory's end");
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in the block, as asserted.
            Some(gpu) => unsafe { gpu.upload(self.address() + at as u64, from) },
            None => self.bytes_mut()[at..][..from.len()].copy_from_slice(from),
        }
    }

    /// Copies `bytes` bytes from offset `from` of other memory of the same device to offset `at`.
    #[track_caller]
    pub(crate) fn copy_from(&mut self, at: usize, other: &Memory, from: usize, bytes: usize) {
        assert!(self.device.same(&other.device), "a copy between two devices: use to_device");
        assert!(
            self.holds(at, bytes) && other.holds(from, bytes),
            "a copy beyond the memory's end"
        );
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in both blocks, as asserted; the blocks are distinct, because one is borrowed mutably.
            Some(gpu) => unsafe {
                gpu.copy(self.address() + at as u64, other.address() + from as u64, bytes);
            },
            None => {
                self.bytes_mut()[at..][..bytes].copy_from_slice(&other.bytes()[from..][..bytes])
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            match self.origin.take().map(|origin| *origin) {
                None => self.device.pool().give_back(block, self.bytes, self.place),
                Some(Origin::Numbers) => {
                    self.device.gpu().give_back_numbers(block.0.addr() as u64, self.bytes);
                }
                Some(Origin::Foreign(foreign)) => {
                    if !self.device.gpu().return_to(foreign.stream) {
                        std::mem::forget(foreign); // a graph may use it for as long as the program runs
                    }
                }
            }
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
    fn numbers_of_elements_are_checked() {
        assert_eq!(elements(&[]), Some(1));
        assert_eq!(elements(&[2, 3, 4]), Some(24));
        assert_eq!(elements(&[2, 0, 4]), Some(0));
        assert_eq!(elements(&[3, 12_297_829_382_473_034_411]), None); // 1 modulo 2^64
        assert_eq!(elements(&[0, 1 << 40, 1 << 40]), None);
        assert_eq!(elements(&[1 << 60]), None);
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

//! Memory and the exact-size free list, on the host and on GPUs.
//!
//! A training step asks for the same sizes in the same order every time, so a list of freed blocks by exact size
//! serves every request after the first step without asking the system, without splitting and without search.
//! On a GPU a freed block may still be in use by queued work; whoever gets it next is queued behind that work.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::panic::Location;
use std::sync::{Arc, Mutex};

use super::cuda::Gpu;
use super::{Device, gib};

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
    /// Where memory comes from: a GPU, or the host.
    gpu: Option<Arc<Gpu>>,
    state: Mutex<State>,
}

/// Freed blocks by size.
type FreeList = HashMap<usize, Vec<Block>>;

#[derive(Debug, Default)]
struct State {
    free: FreeList,
    /// Freed blocks that recorded work writes whenever it is replayed, by recording: for that recording alone.
    recorded: HashMap<u64, FreeList>,
    /// Which recording a block belongs to, by its address; most belong to none.
    owners: HashMap<usize, u64>,
    /// The recording under way.
    recording: Option<u64>,
    recordings: u64,
    usage: MemoryUse,
    /// Bytes and number of live blocks by the place in the source that asked for them; kept for GPUs, whose memory
    /// runs out first.
    holders: HashMap<&'static Location<'static>, (usize, usize)>,
}

/// An owned block, `ALIGNMENT`-aligned: initialised host memory, or an address on a GPU. Null where a GPU had none left,
/// which has failed the GPU: nothing will be done with it.
#[derive(Debug)]
struct Block(*mut u8);

// SAFETY: a block is plain owned memory; nothing about it is tied to a thread.
unsafe impl Send for Block {}

impl Pool {
    pub(super) fn new(poison: bool, gpu: Option<Arc<Gpu>>) -> Self {
        Self { poison, gpu, state: Mutex::default() }
    }

    pub(super) fn usage(&self) -> MemoryUse {
        self.lock().usage
    }

    pub(super) fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_deref()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the counters half-changed: nothing below panics while it holds the lock.
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
        state.usage.reserved += bytes;
        state.usage.allocations += 1;
        drop(state);
        if let Some(gpu) = &self.gpu {
            let block = self.take_from_gpu(gpu, bytes);
            self.lock().claim(&block);
            return block;
        }
        let layout = layout(bytes);
        // SAFETY: the layout's size is not zero (`rounded`). Zeroed, because a later `&[f32]` over memory that
        // nobody wrote would be undefined behaviour; the system hands out zero pages at no cost.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        Block(pointer)
    }

    fn take_from_gpu(&self, gpu: &Gpu, bytes: usize) -> Block {
        let block = |address: u64| Block(std::ptr::without_provenance_mut(address as usize));
        if let Some(address) = gpu.allocate(bytes) {
            return block(address);
        }
        // What is kept for reuse may be of the wrong sizes. What is being recorded may still need it.
        if self.lock().recording.is_none() {
            self.trim(gpu);
            if let Some(address) = gpu.allocate(bytes) {
                return block(address);
            }
        }
        gpu.fail(self.out_of_memory(gpu, bytes));
        block(0)
    }

    /// Gives the free list back to the GPU.
    fn trim(&self, gpu: &Gpu) {
        gpu.wait();
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
            "GPU {}: out of memory: wanted {}, free {} of {}, held by tensors {}; largest holders: {}; a smaller batch, or micro-batches, needs less",
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
            // Work that is recorded may have touched whatever it frees.
            state.claim(&block);
            state.list_of(&block).entry(bytes).or_default().push(block);
        }
    }

    /// From now on blocks that are taken or given back belong to a recording, whose name this is.
    pub(super) fn begin_recording(&self) -> u64 {
        let mut state = self.lock();
        let name = state.recordings;
        state.recordings += 1;
        state.recorded.insert(name, FreeList::new());
        state.recording = Some(name);
        name
    }

    /// Blocks belong to nobody again that are taken from now on.
    pub(super) fn end_recording(&self) {
        self.lock().recording = None;
    }

    /// Lets everybody have the blocks of a recording that will not be replayed any more.
    pub(super) fn release_recorded(&self, name: u64) {
        let mut state = self.lock();
        for (bytes, mut blocks) in state.recorded.remove(&name).unwrap_or_default() {
            state.free.entry(bytes).or_default().append(&mut blocks);
        }
        state.owners.retain(|_, owner| *owner != name);
    }
}

impl State {
    /// A freed block of this size: the recording's own if there is one under way, else one that will be.
    fn reuse(&mut self, bytes: usize) -> Option<Block> {
        let own =
            self.recording.and_then(|name| self.recorded.get_mut(&name)?.get_mut(&bytes)?.pop());
        let block = own.or_else(|| self.free.get_mut(&bytes)?.pop())?;
        self.claim(&block);
        Some(block)
    }

    /// Notes that a block belongs to the recording under way.
    fn claim(&mut self, block: &Block) {
        if let Some(name) = self.recording {
            self.owners.insert(block.0.addr(), name);
        }
    }

    /// Where a block goes when it is given back.
    fn list_of(&mut self, block: &Block) -> &mut FreeList {
        let owner = self.owners.get(&block.0.addr());
        match owner.and_then(|name| self.recorded.get_mut(name)) {
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
        for (bytes, blocks) in state.free.drain() {
            for block in blocks {
                // SAFETY: the block was allocated with this layout and is on no other list.
                unsafe { dealloc(block.0, layout(bytes)) };
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
    place: &'static Location<'static>,
    /// It lies among a GPU's numbers, which the host sets.
    numbers: bool,
}

// SAFETY: `&Memory` gives only shared reads of plain bytes; writing needs `&mut Memory`.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least `bytes` of memory with unspecified (on a poisoned device: NaN) contents.
    #[track_caller]
    pub(crate) fn new(device: &Device, bytes: usize) -> Self {
        // Exact on a GPU, whose driver aligns: what checks accesses there knows where a tensor ends.
        let bytes = if device.pool().gpu.is_some() { bytes.max(1) } else { rounded(bytes) };
        let place = Location::caller();
        let block = device.pool().take(bytes, place);
        let device = device.clone();
        let mut memory = Self { block: Some(block), bytes, device, place, numbers: false };
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

    /// Room for `bytes` of numbers on a GPU that [`Memory::set_numbers`] sets.
    #[track_caller]
    pub(crate) fn for_numbers(device: &Device, bytes: usize) -> Self {
        let address = device.gpu().take_numbers(bytes).unwrap_or(0);
        let block = Some(Block(std::ptr::without_provenance_mut(address as usize)));
        Self { block, bytes, device: device.clone(), place: Location::caller(), numbers: true }
    }

    /// Sets all of memory for numbers, for what is queued from now on.
    pub(crate) fn set_numbers(&self, bytes: &[u8]) {
        assert!(self.numbers && bytes.len() == self.bytes, "numbers keep their length");
        self.device.gpu().set_numbers(self.address(), bytes);
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    fn pointer(&self) -> *mut u8 {
        self.block.as_ref().expect("present until dropped").0
    }

    /// Where it lies on its GPU.
    pub(crate) fn address(&self) -> u64 {
        self.pointer().addr() as u64
    }

    #[track_caller]
    fn assert_on_host(&self) {
        assert!(
            self.device.pool().gpu.is_none(),
            "the host cannot look at a tensor on a GPU: copy it with to_vec, to_f64 or to_device"
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

    /// Copies `to.len()` bytes from byte `from` on to the host, waiting for a GPU.
    #[track_caller]
    pub(crate) fn read(&self, from: usize, to: &mut [u8]) {
        assert!(from + to.len() <= self.bytes, "a read beyond the memory's end");
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in the block, as asserted.
            Some(gpu) => unsafe { gpu.download(to, self.address() + from as u64) },
            None => to.copy_from_slice(&self.bytes()[from..][..to.len()]),
        }
    }

    /// Copies `from` from the host to byte `at` on, behind whatever a GPU has queued.
    #[track_caller]
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        assert!(at + from.len() <= self.bytes, "a write beyond the memory's end");
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in the block, as asserted.
            Some(gpu) => unsafe { gpu.upload(self.address() + at as u64, from) },
            None => self.bytes_mut()[at..][..from.len()].copy_from_slice(from),
        }
    }

    /// Copies `bytes` from byte `from` of other memory of the same device to byte `at` on.
    #[track_caller]
    pub(crate) fn copy_from(&mut self, at: usize, other: &Memory, from: usize, bytes: usize) {
        assert!(
            at + bytes <= self.bytes
                && from + bytes <= other.bytes
                && self.device.same(&other.device),
            "a copy beyond the memory's end or between devices"
        );
        match self.device.pool().gpu() {
            // SAFETY: the bytes lie in both blocks, as asserted, which are two: one is borrowed mutably.
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
            if self.numbers {
                return self.device.gpu().give_back_numbers(block.0.addr() as u64, self.bytes);
            }
            self.device.pool().give_back(block, self.bytes, self.place);
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

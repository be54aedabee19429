//! Pieces of a device's memory, and what is copied from, to and between them.

use std::panic::Location;

use super::Device;
use super::cuda::Foreign;
use super::pool::{Block, rounded};

/// The number of elements of an array with these sizes, or `None` if memory cannot hold it. Products of some of the sizes do
/// not overflow either, even if another size is 0.
pub(crate) fn elements(sizes: &[usize]) -> Option<usize> {
    /// The largest element has 8 bytes, and a slice has at most `isize::MAX` bytes, less some for rounding.
    const MOST: usize = isize::MAX as usize / 16;
    let all = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size.max(1)))?;
    (all <= MOST).then(|| if sizes.contains(&0) { 0 } else { all })
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
        let bytes = if device.pool().gpu().is_some() { bytes.max(1) } else { rounded(bytes) };
        let place = Location::caller();
        let block = device.pool().take(bytes, place);
        let device = device.clone();
        let mut memory = Self { block: Some(block), bytes, device, place, origin: None };
        if memory.device.pool().is_poisoned() {
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
            self.device.pool().gpu().is_none(),
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
    fn numbers_of_elements_are_checked() {
        assert_eq!(elements(&[]), Some(1));
        assert_eq!(elements(&[2, 3, 4]), Some(24));
        assert_eq!(elements(&[2, 0, 4]), Some(0));
        assert_eq!(elements(&[3, 12_297_829_382_473_034_411]), None); // 1 modulo 2^64
        assert_eq!(elements(&[0, 1 << 40, 1 << 40]), None);
        assert_eq!(elements(&[1 << 60]), None);
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

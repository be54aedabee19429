//! Numbers that the host sets from step to step, in one block of a GPU's memory.
//!
//! The host writes to a copy of its own; what it wrote goes to the GPU in one piece, through pinned memory, ahead of whatever
//! is queued next. So a captured step reads the numbers of its turn, and steps under way keep those of theirs.

use std::collections::HashMap;
use std::ops::Range;

/// Bytes of a block; one set of numbers that is larger has a block of its own.
const BLOCK: usize = 64 << 10;
/// Every set of numbers starts at a multiple of this, as vectors of 16 bytes need.
const ALIGNMENT: usize = 16;

/// The blocks of a GPU, in most runs one.
#[derive(Debug, Default)]
pub(super) struct Region {
    blocks: Vec<Block>,
    /// Places that were given back, by size.
    free: HashMap<usize, Vec<u64>>,
}

#[derive(Debug)]
struct Block {
    address: u64,
    /// What is there, or will be after the next copy.
    host: Vec<u8>,
    used: usize,
    /// What has been set since the last copy.
    set: Range<usize>,
}

impl Region {
    /// Room for `bytes`; `allocate` gives device memory, or `None` where there is none left.
    pub(super) fn take(
        &mut self,
        bytes: usize,
        allocate: impl FnOnce(usize) -> Option<u64>,
    ) -> Option<u64> {
        let bytes = rounded(bytes);
        if let Some(place) = self.free.get_mut(&bytes).and_then(Vec::pop) {
            return Some(place);
        }
        if self.blocks.last().is_none_or(|block| block.used + bytes > block.host.len()) {
            let size = bytes.max(BLOCK);
            let address = allocate(size)?;
            self.blocks.push(Block { address, host: vec![0; size], used: 0, set: 0..0 });
        }
        let block = self.blocks.last_mut().expect("pushed if there was none");
        block.used += bytes;
        Some(block.address + (block.used - bytes) as u64)
    }

    /// Takes a place back.
    pub(super) fn give_back(&mut self, place: u64, bytes: usize) {
        self.free.entry(rounded(bytes)).or_default().push(place);
    }

    /// Sets the numbers at `place`, which `take` gave.
    pub(super) fn set(&mut self, place: u64, bytes: &[u8]) {
        let holds = |block: &&mut Block| {
            (block.address..block.address + block.host.len() as u64).contains(&place)
        };
        let block = self.blocks.iter_mut().find(holds).expect("a place of this region");
        let at = (place - block.address) as usize;
        block.host[at..][..bytes.len()].copy_from_slice(bytes);
        let end = at + bytes.len();
        let set = &block.set;
        block.set = if set.is_empty() { at..end } else { set.start.min(at)..set.end.max(end) };
    }

    /// Calls `copy` with place and contents of what has been set since the last time.
    pub(super) fn send<E>(
        &mut self,
        mut copy: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for block in &mut self.blocks {
            let set = std::mem::take(&mut block.set);
            if !set.is_empty() {
                copy(block.address + set.start as u64, &block.host[set])?;
            }
        }
        Ok(())
    }

    /// Addresses of all blocks, for whoever frees them.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.iter().map(|block| block.address)
    }
}

fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_goes_in_one_piece() {
        let mut region = Region::default();
        let mut asked = Vec::new();
        let mut take = |region: &mut Region, bytes| {
            region.take(bytes, |size| {
                asked.push(size);
                Some(1 << (20 + asked.len()))
            })
        };
        let [a, b] = [8, 20].map(|bytes| take(&mut region, bytes).unwrap());
        assert_eq!(b, a + 16);
        region.set(b, &[7; 20]);
        region.set(a, &[5; 8]);
        let sent = |region: &mut Region| {
            let mut sent = Vec::new();
            region
                .send(|place, bytes| {
                    sent.push((place, bytes.to_vec()));
                    Ok::<_, ()>(())
                })
                .unwrap();
            sent
        };
        let all = [vec![5; 8], vec![0; 8], vec![7; 20]].concat();
        assert_eq!(sent(&mut region), [(a, all)]);
        assert_eq!(sent(&mut region), []);
        region.give_back(b, 20);
        assert_eq!(take(&mut region, 31), Some(b));
        let large = take(&mut region, BLOCK + 1).unwrap();
        region.set(large, &[1]);
        assert_eq!(sent(&mut region), [(large, vec![1])]);
        assert_eq!(region.take(2 * BLOCK, |_| None), None);
        assert_eq!(asked, [BLOCK, BLOCK + ALIGNMENT]);
        assert_eq!(region.addresses().count(), 2);
    }
}

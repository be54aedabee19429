//! Numbers that the host sets from step to step, in one block of GPU memory.
//!
//! The host writes to a shadow copy. Its changes go to the GPU in one piece, through pinned memory, ahead of the next queued
//! work. A replayed step therefore reads the numbers of its own step, and steps in flight keep theirs.

use std::collections::HashMap;
use std::ops::Range;

/// Bytes of a block; a larger set of numbers gets a block of its own.
const BLOCK: usize = 64 << 10;
/// Every set of numbers starts at a multiple of this, for loads of 16-byte vectors.
const ALIGNMENT: usize = 16;

/// The blocks of a GPU; most runs need one.
#[derive(Debug, Default)]
pub(super) struct Region {
    blocks: Vec<Block>,
    /// Freed addresses, by size.
    free: HashMap<usize, Vec<u64>>,
}

#[derive(Debug)]
struct Block {
    address: u64,
    /// The contents on the GPU after the next copy.
    host: Vec<u8>,
    used: usize,
    /// The range that was set since the last copy.
    set: Range<usize>,
}

impl Region {
    /// Allocates `bytes`. `allocate` provides device memory, or `None` if there is none left.
    pub(super) fn take(
        &mut self,
        bytes: usize,
        allocate: impl FnOnce(usize) -> Option<u64>,
    ) -> Option<u64> {
        let bytes = rounded(bytes);
        if let Some(address) = self.free.get_mut(&bytes).and_then(Vec::pop) {
            return Some(address);
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

    /// Frees an allocation.
    pub(super) fn give_back(&mut self, address: u64, bytes: usize) {
        self.free.entry(rounded(bytes)).or_default().push(address);
    }

    /// Sets the numbers at `address`, which `take` returned.
    pub(super) fn set(&mut self, address: u64, bytes: &[u8]) {
        let holds = |block: &&mut Block| {
            (block.address..block.address + block.host.len() as u64).contains(&address)
        };
        let block = self.blocks.iter_mut().find(holds).expect("an address of this region");
        let at = (address - block.address) as usize;
        block.host[at..][..bytes.len()].copy_from_slice(bytes);
        let end = at + bytes.len();
        let set = &block.set;
        block.set = if set.is_empty() { at..end } else { set.start.min(at)..set.end.max(end) };
    }

    /// Calls `copy` with address and contents of each range that was set since the last call.
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

    /// Addresses of all blocks, for freeing them.
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
    fn numbers_set_together_are_sent_in_one_piece() {
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
                .send(|address, bytes| {
                    sent.push((address, bytes.to_vec()));
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

//! The order of an epoch's samples.

use crate::device::{Philox, Purpose};

/// Returns a permutation of `0..count`, the same for the same seed and epoch on every machine.
pub fn order(seed: u64, epoch: u32, count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    Philox::new(seed, Purpose::Order, epoch, 0).shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_an_order_of_its_own() {
        let (first, second) = (order(3, 0, 50), order(3, 1, 50));
        assert_ne!(first, second);
        assert_eq!(first, order(3, 0, 50));
        let mut sorted = second;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}

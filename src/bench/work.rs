//! The work that an operation cannot avoid, and the roofline that follows from it.

use super::{Chip, Unit};

/// The least work that an operation's definition asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Operations; a multiply-add counts as two.
    pub operations: f64,
    /// Bytes read and written; each tensor counts as often as its traffic is unavoidable.
    pub bytes: f64,
}

impl Work {
    /// Returns the roofline in seconds: the longer of the bytes at the chip's copy rate and the operations at the unit's rate.
    pub fn roofline(&self, chip: &Chip, unit: Unit) -> f64 {
        (self.bytes / chip.copy).max(self.operations / chip.rate(unit))
    }

    /// Whether memory, not compute, sets the roofline.
    pub fn is_bound_by_memory(&self, chip: &Chip, unit: Unit) -> bool {
        self.bytes / chip.copy >= self.operations / chip.rate(unit)
    }
}

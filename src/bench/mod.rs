//! Benchmarks: how fast kernels are, and how far from what the hardware allows.
//!
//! A [`Case`] is one operation at one size, with its [`Work`]: the operations that its definition asks for and the bytes that
//! must move at least. The *floor* is the longer of the two at the machine's ceilings ([`Chip`]), and the share of the floor
//! is what a time is judged by. [`cases`] lists every layer of ResNet-50 in its three directions and the other primitives;
//! [`plan`] says on paper what a chip will do with one; [`Bench`] measures one, or a kernel of your own, in the same way
//! (`examples/custom_op.rs`).

mod arenas;
mod case;
mod chip;
mod convolutions;
mod layers;
mod losses;
mod measure;
mod plan;

pub use case::{Case, Extent, Launched, cases};
pub use chip::{Chip, Unit};
pub use measure::{Bench, Quantiles, Timing};
pub use plan::{LaunchPlan, plan};

/// What an operation asks for at least.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Operations, a multiply-add being two.
    pub operations: f64,
    /// Bytes read and written, each tensor as often as it cannot be avoided.
    pub bytes: f64,
}

impl Work {
    /// Seconds that a chip takes at its ceilings.
    pub fn floor(&self, chip: &Chip, unit: Unit) -> f64 {
        (self.bytes / chip.copy).max(self.operations / chip.rate(unit))
    }

    /// Whether memory sets the floor.
    pub fn is_bound_by_memory(&self, chip: &Chip, unit: Unit) -> bool {
        self.bytes / chip.copy >= self.operations / chip.rate(unit)
    }
}

//! NVIDIA GPUs, through the driver alone.
//!
//! [`Gpu`] holds one device's context, its compute stream, pinned staging memory and all kernels of the program, loaded and
//! checked. All work is queued on the compute stream, so memory that one operation frees may serve the next without waiting.
//! A [`Graph`] is work captured once and replayed as a whole. Operations do not return errors: the first error is kept, later
//! work is ignored, and [`Device::check`](super::Device::check) reports the error. No failure of the machine panics here.

mod conformance;
mod describe;
mod driver;
mod gpu;
mod graph;
mod kernels;
mod marks;
mod numbers;
mod ring;
mod staging;
mod table;
mod timer;

pub(crate) use conformance::check as conformance;
pub(crate) use describe::describe;
pub(crate) use gpu::Gpu;
pub(crate) use graph::Graph;
pub(crate) use kernels::*;
#[allow(unused_imports)] // a test checks that every kernel has a caller
pub use kernels::{Counts, Mix, Resources};
pub(crate) use marks::Marks;
pub(crate) use ring::Ring;
pub(crate) use table::Table;
pub(crate) use timer::Timer;

use serde::{Deserialize, Serialize};

/// The type in which a GPU stores activations and the working copies of weights. Sums, statistics, losses, master weights
/// and optimiser state are f32 in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on tensor cores: the usual choice for training.
    Bf16,
    /// f32 throughout.
    F32,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

//! NVIDIA GPUs, through the driver alone.
//!
//! [`Gpu`] is one device's context with a stream that computes, pinned memory to copy through and every kernel of the
//! program, loaded and checked. All work is queued on the compute stream, so memory that one operation frees may serve
//! the next without waiting. A [`Graph`] is work queued once and repeated as a whole. Operations do not return errors: the first error is kept, everything after it does nothing,
//! and [`Device::check`](super::Device::check) says what it was. Nothing here panics because of the machine.

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
#[allow(unused_imports)] // which kernels have a launch line yet is a test's business
pub use kernels::{Counts, Mix, Resources};
pub(crate) use marks::Marks;
pub(crate) use ring::Ring;
pub(crate) use table::Table;
pub(crate) use timer::Timer;

use serde::{Deserialize, Serialize};

/// What a GPU stores activations and the working copies of weights in. Sums, statistics, losses, master weights and
/// optimisers are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16, multiplied by tensor cores: what one trains in.
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

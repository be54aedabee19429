//! NVIDIA GPUs, through the driver alone.
//!
//! [`Gpu`] holds one device's context, its compute stream, pinned staging memory and all kernels of the program, loaded and
//! checked. All work is queued on the compute stream, so memory that one operation frees may serve the next without waiting; only a
//! [`Feed`] copies the pixels of batches on a stream of its own, and other libraries' memory is used in the order of their streams.
//! A [`Graph`] is work captured once and replayed as a whole. A GPU counts what its launches move if it is asked to, and one that
//! is only imagined does nothing else. Operations do not return errors: the first error is kept, later
//! work is ignored, and [`Device::check`](super::Device::check) reports the error. No failure of the machine panics here.

mod conformance;
mod describe;
mod driver;
mod feed;
mod foreign;
mod gpu;
mod graph;
mod kernels;
mod ledger;
mod marks;
mod numbers;
mod pointers;
mod ring;
mod staging;
mod table;
mod timer;

pub(crate) use conformance::check as conformance;
pub(crate) use describe::{compiles_first, describe, driver_version};
pub(crate) use feed::{Feed, Pinned, PinnedBatch};
pub use foreign::{Foreign, ForeignStream, as_guest};
pub(crate) use gpu::Gpu;
pub(crate) use graph::Graph;
pub(crate) use kernels::*;
#[allow(unused_imports)] // a test checks that every kernel has a caller
pub use kernels::{Counts, Mix, Resources};
pub use ledger::KernelTraffic;
pub(crate) use marks::Marks;
pub(crate) use pointers::{In, Out};
pub(crate) use ring::Ring;
pub(crate) use table::Table;
pub(crate) use timer::Timer;

/// The number of GPUs that the driver reports.
///
/// # Errors
/// If there is no driver or no GPU; the message says what to do.
pub(crate) fn count() -> crate::error::Result<usize> {
    driver::start()?;
    let count = cudarc::driver::result::device::get_count()
        .map_err(|e| crate::error::Error::Device(format!("counting GPUs: {}", driver::words(e))))?;
    Ok(count.max(0) as usize)
}

/// A size in the type of the kernels' arguments.
///
/// # Panics
/// If it does not fit: a wrapped size would be another one.
#[track_caller]
pub(crate) fn int(size: usize) -> i32 {
    i32::try_from(size).unwrap_or_else(|_| {
        panic!("a size of {size}: the GPU kernels support at most 2^31 - 1, use smaller tensors")
    })
}

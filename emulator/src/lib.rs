//! A stand-in for the CUDA driver: a `libcuda.so` that runs kernels on the CPU, for tests on machines without a GPU. The same file
//! stands in for NCCL, `libnccl.so.2`. The README next to this crate explains how it works.
//!
//! | file | contents |
//! |---|---|
//! | `api.rs`, `api/` | the driver calls, one function each, as the driver's manual documents them |
//! | `control.rs` | calls that only this driver has: counters, fault injection, reports |
//! | `driver.rs` | the driver's state, and the behaviour common to all calls |
//! | `context.rs` | devices and their primary contexts |
//! | `work.rs` | streams, events and graphs: queued work, and when it runs |
//! | `nccl.rs` | NCCL's calls: collectives between processes, as host functions on a stream |
//! | `image.rs` | fatbins: which kernels a device finds in one |
//! | `interleave.rs` | threads that take turns |
//! | `memory.rs` | device and pinned memory, with guards and poison |
//! | `engine.rs` | the kernels, and bindings to the C++ engine of `cuda-on-host`, which runs one launch on fibers |
//!
//! Every call is unsafe, as its counterpart in the driver is. Handles may have any value, because they are looked up;
//! pointers must satisfy the driver's manual.
#![allow(
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::too_many_arguments
)]

mod api;
mod context;
mod control;
mod driver;
mod engine;
mod image;
mod interleave;
mod memory;
mod nccl;
mod work;

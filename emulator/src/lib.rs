//! A stand-in for the CUDA driver: a `libcuda.so` that runs the project's kernels on the processor, for tests on machines
//! without a GPU. README.md beside this crate explains it to someone who has never seen it.
//!
//! | file | what it is |
//! |---|---|
//! | `api.rs`, `api/` | the driver calls, one function each, as the driver documents them |
//! | `control.rs` | the calls that only this driver has: counters, faults, reports |
//! | `driver.rs` | the state behind the calls, and what every call has in common |
//! | `work.rs` | streams, events and graphs: what is queued, and when it runs |
//! | `memory.rs` | device and pinned memory, with guards and poison |
//! | `engine.rs` | the way to the C++ engine (`engine/`), which runs one launch on fibers |
//!
//! Every call is unsafe as its counterpart in the driver is: handles may be anything (and are looked up), pointers must
//! be what the driver's manual asks for.
#![allow(
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::too_many_arguments
)]

mod api;
mod control;
mod driver;
mod engine;
mod memory;
mod work;

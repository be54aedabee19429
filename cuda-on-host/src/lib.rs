//! CUDA kernels on the CPU: compiled by g++, executed on fibers, checked access by access.
//!
//! | module | contents |
//! |---|---|
//! | [`source`] | signatures of kernels, and the rewriting of what g++ does not know: `extern __shared__`, inline PTX |
//! | [`host`] | compiles kernels, and the engine once |
//! | [`device`] | a process that holds tensors and launches kernels, which may crash or hang in it |
//! | `judge` | whether a kernel is right and safe, from a case in TOML; which mutants the case notices |
//!
//! `engine/` and `include/` are the C++ side: the scheduler, the shadow memory, CUDA's names for the host. The README explains
//! how a kernel runs here, and what that does not show.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod device;
pub mod host;
#[cfg(feature = "judge")]
pub mod judge;
pub mod source;

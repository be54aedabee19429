//! Build scripts for CUDA kernels.
//!
//! A [`Build`] takes a folder of `.cu` files and makes of it what a Rust program needs to run them: fat binaries, embedded; a table of
//! files, kernels and the resources that each kernel uses; and a launch function for each kernel, whose arguments have the types of the
//! kernel's signature. Without nvcc the same program builds, with a warning, and has no kernels to run.
//!
//! ```no_run
//! // build.rs
//! use cuda_kernels_build::{Build, Error};
//!
//! fn main() -> Result<(), Error> {
//!     Build::new("kernels").emit()?;
//!     Ok(())
//! }
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`nvcc`] | finds, fetches and asks the compiler and its disassembler |
//! | [`kernel`] | kernels with the Rust types of their arguments |
//! | [`ptxas`] | registers, shared and local memory |
//! | [`sass`] | instructions of a kernel and of its hot loop, and a model of how long a loop of tiles takes |
//!
//! The README has a whole program and says what is generated.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod build;
mod cache;
mod cargo;
mod error;
pub mod kernel;
mod launch;
pub mod nvcc;
pub mod ptxas;
mod render;
pub mod sass;

pub use build::{Build, File, Kernels, Launches};
pub use cuda_signatures::Words;
pub use error::{Error, Result};

//! The innermost loops of selfsup's convolutions on the CPU: register tiles and Winograd transforms, one instance per tile height
//! and instruction set.
//!
//! [`tile`] and [`transform`] say what a kernel computes and which memory it touches, [`kernel`] selects an instance for an
//! [`Isa`]. The caller packs the operands and is responsible for every address.

pub mod block;
mod isa;
pub mod kernel;
pub mod tile;
pub mod transform;
mod vector;

pub use isa::Isa;
pub use vector::Coming;

/// Floats per cache line. The parts of a workspace start on a line, or every vector load would access
/// two lines.
pub const LINE: usize = 16;

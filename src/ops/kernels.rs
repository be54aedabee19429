//! The CPU kernels as functions over slices, for benchmarks and for programs that manage their own memory; and the tiles that
//! GEMMs use on a GPU.

pub use super::gemm::{Gemm, GemmKind, Tile, TileShape};

/// Convolution in its three directions; the functions document the shapes.
pub mod conv2d {
    pub use crate::ops::conv2d::kernels::*;
}

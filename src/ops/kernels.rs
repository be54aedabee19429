//! The CPU's kernels as functions of slices, for benchmarks and for programs that bring their own memory; and the tiles that
//! matrix products get on a GPU.

pub use super::gemm::{Gemm, GemmKind, Tile, TileShape};

/// Convolution in three directions; see the functions for shapes.
pub mod conv2d {
    pub use crate::ops::conv2d::kernels::*;
}

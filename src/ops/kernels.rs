//! The CPU kernels as functions over slices, for benchmarks and for programs that manage their own memory; and the tiles that
//! GEMMs use on a GPU.

pub use super::gemm::{Gemm, GemmKind, Tile, TileShape};

/// Convolution in its three directions; the functions document the shapes.
pub mod conv2d {
    pub use crate::ops::conv2d::kernels::*;
}

/// The kernels in bf16: GEMMs, conversions and convolutions, on tiles where the processor has them.
pub mod bf16 {
    pub use crate::cpu::bf16::{
        Bf16Path, Gemm, GemmKind, GemmSize, Moments, Output, conv2d, gemm, gemm_workspace_len,
        round, widen,
    };
}

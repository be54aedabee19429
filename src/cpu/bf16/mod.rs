//! bf16 kernels: GEMMs and convolutions whose operands are stored in bf16 and whose sums are in f32.
//!
//! Results are written in bf16, each rounded once, or in f32 (gradients of weights). [`Bf16Path`] decides how: by AMX tiles
//! or AVX512-BF16 (`blocks`), or by the f32 kernels with widened operands (portable). They differ in the order of sums only,
//! and in numbers below 2^-126, which both instructions read and write as zero. Work is partitioned by shape, never by
//! thread count: each path gives the same bits in every rayon pool. Call the functions inside the pool that should do the
//! work. Operands are packed in the caller's workspace; tasks allocate lists of addresses only.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod blocks;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[path = "no_blocks.rs"]
mod blocks;
pub mod conv2d;
mod convert;
mod gemm;
mod moments;
#[cfg(test)]
mod tests;

pub use crate::device::Bf16Path;
pub use convert::{round, widen};
pub(crate) use convert::{rounded, widened};
pub use gemm::{Gemm, GemmKind, GemmSize, Output, gemm, gemm_workspace_len};
pub use moments::Moments;

//! The primitives: operations on a [`Var`](crate::tape::Var) with a gradient.
//!
//! Each primitive is a folder. `mod.rs` states the maths with shapes and source, checks the arguments and records the
//! operation on the tape; `cpu.rs` is the path over slices, which computes in f32; `cuda.rs` launches its kernels, which are in
//! `kernels/`; `reference.rs` is the naive f64 path that tests compare with, written for clarity and not for speed. A new
//! primitive needs its folder, the re-export below and a row in the case table of the tests (`src/check/cases.txt`).

/// Launches the kernel for a dtype: `by_dtype!(x.dtype(), relu_f32 | relu_bf16(launch, …))`. Needs an unsafe block.
macro_rules! by_dtype {
    ($dtype:expr, $f32:ident | $bf16:ident ($($argument:expr),* $(,)?)) => {
        match $dtype {
            crate::tensor::DType::Bf16 => crate::device::cuda::$bf16($($argument),*),
            crate::tensor::DType::F32 => crate::device::cuda::$f32($($argument),*),
            other => panic!("{} does not support {other:?}", stringify!($f32)),
        }
    };
}

mod batch_norm;
mod cast;
pub(crate) mod conv2d;
mod cross_entropy;
mod elementwise;
pub(crate) mod gemm;
mod info_nce;
pub mod kernels;
mod l2_normalize;
mod linear;
mod neg_cosine;
mod nt_xent;
mod pair_loss;
mod pool;
mod row_losses;
pub(crate) mod rows;
mod selective_kernel;
mod sinkhorn;
mod soft_cross_entropy;
mod sum;
mod transpose;
mod window;

pub use batch_norm::{BatchNorm, Running, batch_norm};
pub(crate) use batch_norm::{EPS as BATCH_NORM_EPS, batch_norm_by};
pub(crate) use cast::cast;
use cast::in_f32_on_a_cpu;
pub(crate) use conv2d::conv2d_with_moments;
pub use conv2d::{Conv2dDims, conv2d};
pub use cross_entropy::cross_entropy;
pub use elementwise::{add, mean_of, mul, relu, scale, square};
pub(crate) use gemm::Moments;
pub use info_nce::{Negatives, info_nce};
pub use l2_normalize::{l2_normalize, normalize_rows};
pub use linear::linear;
pub use neg_cosine::neg_cosine;
pub use nt_xent::nt_xent;
pub(crate) use nt_xent::nt_xent_groups;
pub use pair_loss::{PairLoss, pair_loss};
pub use pool::{avg_pool, max_pool, mean_pool};
pub(crate) use rows::gather_ranks;
pub use rows::{concat_rows, gather_rows, push_rows, slice_rows, write_rows};
pub use selective_kernel::{stream_mean, stream_select};
pub use sinkhorn::sinkhorn;
pub(crate) use sinkhorn::sinkhorn_rows_per_chunk;
pub use soft_cross_entropy::{distillation, soft_cross_entropy, softmax};
pub use sum::{mean, sum};
pub use transpose::transpose;

/// Returns the instruction set that the CPU kernels use on this machine.
pub fn instruction_set() -> &'static str {
    match crate::cpu::Isa::current() {
        crate::cpu::Isa::Portable => "portable",
        crate::cpu::Isa::Avx2 => "AVX2",
        crate::cpu::Isa::Avx512 => "AVX-512",
    }
}

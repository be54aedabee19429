//! Kernels for the CPU in f32 and, under `bf16`, in bf16, as functions of slices: the twin of `kernels/`.
//!
//! This module does not know tensors or the tape: an operation of [`ops`](crate::ops) checks shapes, then calls these functions
//! inside the device's thread pool. Work is partitioned by shape and instruction set, never by thread count, so results do not
//! depend on the number of threads.

pub(crate) mod bf16;
pub(crate) mod conv2d;
pub(crate) mod exp;
mod gemm;
pub(crate) mod parallel;
pub(crate) mod scaling;

pub(crate) use crate::device::Isa;
pub(crate) use gemm::{Matrix, gemm, gemm_sequential};

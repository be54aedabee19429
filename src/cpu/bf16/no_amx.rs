//! Stands in for `amx` where there are no tiles: nothing here is ever called.

use half::bf16;

use super::Moments;
use super::gemm::{Gemm, GemmKind, GemmSize, Output};
use crate::cpu::conv2d::{Conv2dDims, Direction};

const NEVER: &str = "tiles are never available on this platform";

pub fn gemm_workspace_len(_: GemmKind, _: GemmSize) -> usize {
    unreachable!("{NEVER}")
}

pub fn gemm(_: Output<'_>, _: &Gemm<'_>, _: &mut [f32]) {
    unreachable!("{NEVER}")
}

pub fn conv2d_workspace_len(_: &Conv2dDims, _: Direction) -> usize {
    unreachable!("{NEVER}")
}

pub fn forward(
    _: &mut [bf16],
    _: &[bf16],
    _: &[bf16],
    _: Option<Moments<'_>>,
    _: &mut [f32],
    _: &Conv2dDims,
) {
    unreachable!("{NEVER}")
}

pub fn data_gradient(
    _: &mut [bf16],
    _: &[bf16],
    _: &[bf16],
    _: &mut [f32],
    _: &Conv2dDims,
    _: bool,
) {
    unreachable!("{NEVER}")
}

pub fn weight_gradient(
    _: &mut [f32],
    _: &[bf16],
    _: &[bf16],
    _: &mut [f32],
    _: &Conv2dDims,
    _: bool,
) {
    unreachable!("{NEVER}")
}

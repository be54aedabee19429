//! Stands in for `blocks` elsewhere than on x86-64 Linux: nothing here is ever called.

use half::bf16;

use super::gemm::{Gemm, GemmKind, GemmSize, Output};
use super::{Bf16Path, Moments};
use crate::cpu::conv2d::{Conv2dDims, Direction};

const NEVER: &str = "the instructions are never available on this platform";

pub fn gemm_workspace_len(_: Bf16Path, _: GemmKind, _: GemmSize) -> usize {
    unreachable!("{NEVER}")
}

pub fn gemm(_: Bf16Path, _: Output<'_>, _: &Gemm<'_>, _: &mut [f32]) {
    unreachable!("{NEVER}")
}

pub fn conv2d_workspace_len(_: Bf16Path, _: &Conv2dDims, _: Direction) -> usize {
    unreachable!("{NEVER}")
}

pub fn forward(
    _: Bf16Path,
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
    _: Bf16Path,
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
    _: Bf16Path,
    _: &mut [f32],
    _: &[bf16],
    _: &[bf16],
    _: &mut [f32],
    _: &Conv2dDims,
    _: bool,
) {
    unreachable!("{NEVER}")
}

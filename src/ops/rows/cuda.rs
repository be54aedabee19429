//! `kernels/rows.cu`: 16 bytes to a thread where addresses allow it.

use crate::device::cuda::Launch;
use crate::tensor::{DType, Tensor};

/// `to[i to_stride ..] = from[i from_stride ..]` for `i < count`, `length` elements each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) count: usize,
    pub(super) length: usize,
    pub(super) to_stride: usize,
    pub(super) from_stride: usize,
}

/// Copies blocks to element `to_offset` of `to` on, from element `from_offset` of `from` on.
pub(super) fn copy(
    (to, to_offset): (&mut Tensor, usize),
    (from, from_offset): (&Tensor, usize),
    Blocks { count, length, to_stride, from_stride }: Blocks,
) {
    if count * length == 0 {
        return;
    }
    let end = |offset, stride| offset + (count - 1) * stride + length;
    assert!(
        end(to_offset, to_stride) <= to.len() && end(from_offset, from_stride) <= from.len(),
        "a copy of rows beyond a tensor's end"
    );
    let dtype = from.dtype();
    let along = length.div_ceil(16 / dtype.size()).next_power_of_two().min(256);
    let (down, device) = (256 / along, from.device().clone());
    let launch = Launch::new(device.gpu(), [count.div_ceil(down), 1, 1], [along, down, 1]);
    let (blocks, [length, to_stride, from_stride]) =
        (count as i32, [length, to_stride, from_stride].map(|size| size as i64));
    let from = from.slice(from_offset, [from.len() - from_offset]);
    let rest = [to.len() - to_offset].into();
    let mut to = to.view_mut().slice(to_offset, rest);
    macro_rules! call {
        ($kernel:ident) => {
            crate::device::cuda::$kernel(
                launch,
                to.device_out(),
                from.device_in(),
                blocks,
                length,
                to_stride,
                from_stride,
            )
        };
    }
    // SAFETY: every block lies in both tensors, as asserted.
    unsafe {
        match dtype {
            DType::Bf16 => call!(copy_blocks_bf16),
            DType::F32 => call!(copy_blocks_f32),
            DType::I32 => call!(copy_blocks_i32),
            DType::F64 => panic!("rows: no f64 on a GPU"),
        }
    }
}

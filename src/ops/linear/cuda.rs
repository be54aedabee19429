//! `kernels/matmul.cu`: tiles of 64 x 64, bf16 on tensor cores with f32 sums, or f32 throughout.

use super::Dims;
use crate::device::cuda::{self, In, Launch};
use crate::tensor::{DType, Tensor, TensorMut};

/// How the factors of a product lie in memory: the letters of the kernels' names.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// `A [m, k]`, `B [n, k]`
    Nt,
    /// `A [m, k]`, `B [k, n]`
    Nn,
    /// `A [k, m]`, `B [k, n]`
    Tn,
}

/// `C [m, n] = A B` over `k`.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    m: usize,
    n: usize,
    k: usize,
}

const TILE: usize = 64;

pub(super) fn forward(y: &mut Tensor, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, dims: Dims) {
    let sizes = Sizes { m: dims.n, n: dims.k, k: dims.d };
    product(Order::Nt, &mut y.view_mut(), x, w, bias, sizes, false);
}

pub(super) fn input_gradient(
    dx: &mut TensorMut<'_>,
    dy: &Tensor,
    w: &Tensor,
    dims: Dims,
    accumulate: bool,
) {
    let sizes = Sizes { m: dims.n, n: dims.d, k: dims.k };
    product(Order::Nn, dx, dy, w, None, sizes, accumulate);
}

pub(super) fn weight_gradient(
    dw: &mut TensorMut<'_>,
    dy: &Tensor,
    x: &Tensor,
    dims: Dims,
    accumulate: bool,
) {
    let sizes = Sizes { m: dims.k, n: dims.d, k: dims.n };
    product(Order::Tn, dw, dy, x, None, sizes, accumulate);
}

/// A product in one pass, or, where `k` is long and the tiles are few, in slices of `k` that are summed in order after:
/// a weight gradient has all rows for its `k`. How many is the shape's to say, so the sum has one order on every chip.
fn product(
    order: Order,
    c: &mut TensorMut<'_>,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    sizes: Sizes,
    accumulate: bool,
) {
    /// Blocks that a large GPU has work for.
    const BLOCKS: usize = 256;
    /// A slice has at least this many steps of k.
    const LEAST: usize = 512;
    let tiles = sizes.m.div_ceil(TILE) * sizes.n.div_ceil(TILE);
    let slices = (BLOCKS / tiles.max(1)).clamp(1, sizes.k.div_ceil(LEAST).max(1));
    if slices == 1 || bias.is_some() {
        return launch(order, c, a, b, bias, sizes, 1, accumulate);
    }
    let device = a.device();
    let len = sizes.m * sizes.n;
    let mut partial = Tensor::empty(device, DType::F32, [slices, sizes.m, sizes.n]);
    launch(order, &mut partial.view_mut(), a, b, None, sizes, slices, false);
    let (dtype, slices, sum) = (c.dtype(), slices as i32, Launch::over(device.gpu(), len, 1));
    // SAFETY: `partial` has `slices` times the elements of `c`.
    unsafe {
        by_dtype!(
            dtype,
            sum_slices_f32
                | sum_slices_bf16(
                    sum,
                    c.device_out(),
                    partial.device_in(),
                    slices,
                    len as i64,
                    i32::from(accumulate)
                )
        );
    }
}

#[allow(clippy::too_many_arguments)] // it is the kernel's launch line
fn launch(
    order: Order,
    c: &mut TensorMut<'_>,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    Sizes { m, n, k }: Sizes,
    slices: usize,
    accumulate: bool,
) {
    // Whole steps of the kernel's depth, so that a slice never reaches into the next.
    let per_slice = k.div_ceil(slices).next_multiple_of(32).max(32);
    let grid = [m.div_ceil(TILE), n.div_ceil(TILE), slices];
    let threads = if a.dtype() == DType::Bf16 { 128 } else { 256 };
    let to = Launch::new(a.device().gpu(), grid, [threads, 1, 1]);
    let bias = bias.map_or(In::null(), Tensor::device_in);
    let ([m, n, k, per_slice], accumulate) =
        ([m, n, k, per_slice].map(|size| size as i64), i32::from(accumulate));
    macro_rules! call {
        ($kernel:ident) => {
            cuda::$kernel(
                to,
                c.device_out(),
                a.device_in(),
                b.device_in(),
                bias,
                m,
                n,
                k,
                per_slice,
                accumulate,
            )
        };
    }
    // SAFETY: the tensors have these sizes, checked by the operation; `c` has a plane for each slice.
    unsafe {
        match (order, a.dtype(), c.dtype()) {
            (Order::Nt, DType::Bf16, DType::Bf16) => call!(matmul_nt_bf16),
            (Order::Nn, DType::Bf16, DType::Bf16) => call!(matmul_nn_bf16),
            (Order::Tn, DType::Bf16, DType::Bf16) => call!(matmul_tn_bf16),
            (Order::Nt, DType::Bf16, _) => call!(matmul_nt_bf16_f32),
            (Order::Nn, DType::Bf16, _) => call!(matmul_nn_bf16_f32),
            (Order::Tn, DType::Bf16, _) => call!(matmul_tn_bf16_f32),
            (Order::Nt, ..) => call!(matmul_nt_f32),
            (Order::Nn, ..) => call!(matmul_nn_f32),
            (Order::Tn, ..) => call!(matmul_tn_f32),
        }
    }
}

/// A block for every 32 columns: 32 threads next to each other read a line, 8 rows at a time.
pub(super) fn bias_gradient(db: &mut TensorMut<'_>, dy: &Tensor, dims: Dims, accumulate: bool) {
    let launch = Launch::new(dy.device().gpu(), [dims.k.div_ceil(32), 1, 1], [32, 8, 1]);
    let (n, k, accumulate) = (dims.n as i64, dims.k as i32, i32::from(accumulate));
    let dtype = dy.dtype();
    // SAFETY: `dy` has `n` rows of `k`, `db` has `k`.
    unsafe {
        by_dtype!(
            dtype,
            column_sums_f32
                | column_sums_bf16(launch, db.device_out(), dy.device_in(), n, k, accumulate)
        );
    }
}

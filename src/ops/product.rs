//! `kernels/matmul.cu`: matrix products on a GPU, of linear layers and of 1x1 convolutions.

use super::tiles::{Product, ProductKind, Tile, TileForm};
use crate::device::cuda::{self, In, Launch, Out};
use crate::tensor::{DType, Tensor, TensorMut};

/// `C [m, n] = A B` over `k`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// What a product brings along for a batch norm: mean and squared deviations of each column, for runs of rows.
pub(crate) struct Moments {
    /// `[runs, 2, columns]`
    pub(crate) partial: Tensor,
    /// Rows of a run; the last may have fewer.
    pub(crate) rows: usize,
}

impl Moments {
    /// Room for those of `rows` rows in `groups` equal groups, made by tiles of `tile` rows; none where a tile would have rows
    /// of two groups.
    pub(super) fn new(y: &Tensor, rows: usize, groups: usize, tile: &Tile) -> Option<Self> {
        let fits = y.dtype() == DType::Bf16 && rows > 0 && rows.is_multiple_of(groups);
        let aligned = groups == 1 || (rows / groups).is_multiple_of(tile.m);
        (fits && aligned && tile.slices == 1).then(|| {
            let columns = y.len() / rows;
            let partial = Tensor::floats(y.device(), [rows.div_ceil(tile.m), 2, columns]);
            Self { partial, rows: tile.m }
        })
    }
}

/// The product as the table sees it, of matrices in memory.
fn table(
    kind: ProductKind,
    Sizes { m, n, k }: Sizes,
    operands: [&Tensor; 2],
    splits: bool,
) -> Product {
    for size in [m, n, k] {
        assert!(
            size < 1 << 31,
            "product: {size} rows or columns, and a GPU's kernels count to 2^31 - 1"
        );
    }
    // The lengths of the operands' lines.
    let lines = match kind {
        ProductKind::Nt => [k, k],
        ProductKind::Nn => [k, n],
        _ => [m, n],
    };
    let whole =
        lines.iter().all(|length| length.is_multiple_of(8)) && operands.into_iter().all(is_aligned);
    Product { kind, m, n, k, count: 1, run: if whole { 8 } else { 1 }, splits }
}

/// A product in one pass, or, where `k` is long and the tiles are few, in slices of `k` that are summed in order after:
/// a weight gradient has all rows for its `k`.
pub(super) fn product(
    kind: ProductKind,
    c: &mut TensorMut<'_>,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    sizes: Sizes,
    accumulate: bool,
) {
    let product = table(kind, sizes, [a, b], bias.is_none());
    let tile = product.tile();
    if tile.slices == 1 {
        return launch(&product, &tile, c, a, b, bias, None, accumulate);
    }
    let mut partial = Tensor::empty(a.device(), DType::F32, [tile.slices, sizes.m, sizes.n]);
    launch(&product, &tile, &mut partial.view_mut(), a, b, None, None, false);
    sum_slices(c, &partial, tile.slices, accumulate);
}

/// `y [m, n] = x Wᵀ` in one pass, and the moments of its columns for so many groups of rows, where they can be had.
pub(super) fn product_with_moments(
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    sizes: Sizes,
    groups: usize,
) -> Option<Moments> {
    let product = table(ProductKind::Nt, sizes, [x, w], false);
    let tile = product.tile();
    let mut moments = Moments::new(y, sizes.m, groups, &tile);
    let to = moments.as_mut().map(|m| &mut m.partial);
    launch(&product, &tile, &mut y.view_mut(), x, w, None, to, false);
    moments
}

/// Whether pieces of 16 bytes start where the tensor does.
pub(super) fn is_aligned(x: &Tensor) -> bool {
    x.dtype() == DType::Bf16 && x.device_in::<half::bf16>().is_aligned_16()
}

/// `y`, or what it holds and more, from slices `[slices, …]` in order.
pub(super) fn sum_slices(y: &mut TensorMut<'_>, partial: &Tensor, slices: usize, accumulate: bool) {
    let len = partial.len() / slices;
    let launch = Launch::over(partial.device().gpu(), len, 1);
    let (slices, accumulate) = (slices as i32, i32::from(accumulate));
    // SAFETY: `partial` has `slices` times the elements of `y`.
    unsafe {
        by_dtype!(
            y.dtype(),
            sum_slices_f32
                | sum_slices_bf16(
                    launch,
                    y.device_out(),
                    partial.device_in(),
                    slices,
                    len as i64,
                    accumulate
                )
        );
    }
}

#[allow(clippy::too_many_arguments)] // it is the kernel's launch line
fn launch(
    product: &Product,
    tile: &Tile,
    c: &mut TensorMut<'_>,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    moments: Option<&mut Tensor>,
    accumulate: bool,
) {
    let threads = if a.dtype() == DType::Bf16 { 128 } else { 256 };
    let to = Launch::new(a.device().gpu(), [tile.tiles, 1, tile.slices], [threads, 1, 1]);
    let bias = bias.map_or(In::null(), Tensor::device_in);
    let [m, n, k, slice] =
        [product.m, product.n, product.k, tile.k_per_slice].map(|size| size as i32);
    let accumulate = i32::from(accumulate);
    let moments = moments.map_or(Out::null(), Tensor::device_out);
    macro_rules! of_f32 {
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
                slice,
                accumulate,
            )
        };
    }
    macro_rules! of_bf16 {
        ($kernel:ident $(, $moments:expr)?) => {{
            let (narrow, wide) = match c.dtype() {
                DType::Bf16 => (c.device_out(), Out::null()),
                _ => (Out::null(), c.device_out()),
            };
            let (a, b) = (a.device_in(), b.device_in());
            cuda::$kernel(to, narrow, wide, a, b, bias, $($moments,)? m, n, k, slice, accumulate)
        }};
    }
    // SAFETY: the tensors have these sizes, checked by the operation; `c` has a plane for each slice.
    unsafe {
        match (product.kind, a.dtype(), tile.form) {
            (ProductKind::Nt, DType::F32, _) => of_f32!(matmul_nt_f32),
            (ProductKind::Nn, DType::F32, _) => of_f32!(matmul_nn_f32),
            (_, DType::F32, _) => of_f32!(matmul_tn_f32),
            (ProductKind::Nt, _, TileForm::Large) => of_bf16!(matmul_nt_bf16_128x128, moments),
            (ProductKind::Nt, _, TileForm::Half) => of_bf16!(matmul_nt_bf16_128x64, moments),
            (ProductKind::Nt, ..) => of_bf16!(matmul_nt_bf16_64x64, moments),
            (ProductKind::Nn, _, TileForm::Large) => of_bf16!(matmul_nn_bf16_128x128),
            (ProductKind::Nn, _, TileForm::Half) => of_bf16!(matmul_nn_bf16_128x64),
            (ProductKind::Nn, ..) => of_bf16!(matmul_nn_bf16_64x64),
            (_, _, TileForm::Large) => of_bf16!(matmul_tn_bf16_128x128),
            (_, _, TileForm::Half) => of_bf16!(matmul_tn_bf16_64x128),
            _ => of_bf16!(matmul_tn_bf16_64x64),
        }
    }
}

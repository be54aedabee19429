//! GEMMs on a GPU (`kernels/matmul.cu`), for linear layers and 1x1 convolutions.

pub(crate) mod similarity;
mod tiles;

use crate::device::cuda::{self, Gpu, In, Launch, Out, int};
use crate::tensor::{DType, Tensor, TensorMut};
pub use tiles::{Gemm, GemmKind, Tile, TileShape};

/// `C [m, n] = A B` over `k`.
#[derive(Clone, Copy, Debug)]
pub(super) struct GemmSize {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Batch norm statistics of a convolution's output, from its epilogue.
pub(crate) enum Moments {
    /// From a GPU.
    Blocks(BlockMoments),
    /// From a CPU: mean and biased variance of each group of rows, both `[groups, columns]`.
    Groups { mean: Tensor, variance: Tensor },
}

/// Batch norm statistics from a GEMM's epilogue: mean and sum of squared deviations of each column, per block of rows.
pub(crate) struct BlockMoments {
    /// `[blocks, 2, columns]`
    pub(crate) partial: Tensor,
    /// Rows of a block; the last may have fewer.
    pub(crate) rows: usize,
}

impl BlockMoments {
    /// Memory for the moments of `rows` rows in `groups` equal groups, computed by `tile`. `None` if a tile would span two
    /// groups.
    pub(super) fn new(y: &Tensor, rows: usize, groups: usize, tile: &Tile) -> Option<Self> {
        let fits = y.dtype() == DType::Bf16 && rows > 0 && rows.is_multiple_of(groups);
        let aligned = groups == 1 || (rows / groups).is_multiple_of(tile.m);
        (fits && aligned && tile.splits == 1).then(|| {
            let columns = y.len() / rows;
            let partial = Tensor::floats(y.device(), [rows.div_ceil(tile.m), 2, columns]);
            Self { partial, rows: tile.m }
        })
    }
}

/// The tile table's key for a GEMM of matrices in memory.
fn table(
    kind: GemmKind,
    GemmSize { m, n, k }: GemmSize,
    operands: [&Tensor; 2],
    splittable: bool,
) -> Gemm {
    for size in [m, n, k] {
        assert!(
            size < 1 << 31,
            "gemm: {size} rows or columns, and the GPU kernels support at most 2^31 - 1"
        );
    }
    // The row lengths of the operands.
    let rows = match kind {
        GemmKind::Nt => [k, k],
        GemmKind::Nn => [k, n],
        _ => [m, n],
    };
    let aligned =
        rows.iter().all(|length| length.is_multiple_of(8)) && operands.into_iter().all(is_aligned);
    Gemm { kind, m, n, k, count: 1, k_of_all: k, run: if aligned { 8 } else { 1 }, splittable }
}

/// Runs a GEMM in one pass or, if `k` is long and the tiles are few (weight gradients, whose `k` is the number of rows), as
/// split-K with the splits summed in order afterwards.
pub(super) fn gemm(
    kind: GemmKind,
    c: &mut TensorMut<'_>,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
    sizes: GemmSize,
    accumulate: bool,
) {
    let gemm = table(kind, sizes, [a, b], bias.is_none());
    let tile = gemm.tile();
    if tile.splits == 1 {
        return Matmul { gemm, tile, c, a, b, bias, moments: None, accumulate }.run();
    }
    let mut partial = Tensor::empty(a.device(), DType::F32, [tile.splits, sizes.m, sizes.n]);
    let c_partial = &mut partial.view_mut();
    let launch =
        Matmul { gemm, tile, c: c_partial, a, b, bias: None, moments: None, accumulate: false };
    launch.run();
    split_k_reduce(c, &partial, tile.splits, accumulate);
}

/// `y [m, n] = x Wᵀ` in one pass, and the moments of its columns in `groups` groups of rows, if the tile supports them.
pub(super) fn gemm_with_moments(
    y: &mut Tensor,
    x: &Tensor,
    w: &Tensor,
    sizes: GemmSize,
    groups: usize,
) -> Option<BlockMoments> {
    let gemm = table(GemmKind::Nt, sizes, [x, w], false);
    let tile = gemm.tile();
    let mut moments = BlockMoments::new(y, sizes.m, groups, &tile);
    let (c, partial) = (&mut y.view_mut(), moments.as_mut().map(|m| &mut m.partial));
    Matmul { gemm, tile, c, a: x, b: w, bias: None, moments: partial, accumulate: false }.run();
    moments
}

/// Whether the tensor is bf16 and aligned for 16-byte accesses.
pub(super) fn is_aligned(x: &Tensor) -> bool {
    x.dtype() == DType::Bf16 && x.device_in::<half::bf16>().is_aligned_16()
}

/// How a block of `split_k_reduce` shares its threads: elements, and runs of the splits of each. A large matrix fills a GPU by its
/// elements; a small one needs more threads than that, but each at least four splits.
pub(crate) fn reduce_block(len: usize, splits: usize) -> [usize; 2] {
    /// Threads that fill a GPU.
    const FILL: usize = 1 << 18;
    /// The most runs; the kernel's blocks have at most 512 threads.
    const RUNS: usize = 16;
    let wanted = (FILL / len.max(1)).min(splits / 4).clamp(1, RUNS);
    let runs = 1 << wanted.ilog2();
    [(256 / runs).max(32), runs]
}

/// The launch of `split_k_reduce` over `len` elements.
pub(super) fn reduce_launch(gpu: &Gpu, len: usize, splits: usize) -> Launch<'_> {
    let [elements, runs] = reduce_block(len, splits);
    let blocks = len.div_ceil(elements).min(8 * gpu.multiprocessors());
    Launch::new(gpu, [blocks, 1, 1], [elements, runs, 1])
}

/// Adds the splits of `partial [splits, …]` into `y`, in an order that the sizes alone determine; to what `y` holds if `accumulate`.
pub(super) fn split_k_reduce(
    y: &mut TensorMut<'_>,
    partial: &Tensor,
    splits: usize,
    accumulate: bool,
) {
    let len = partial.len() / splits;
    let launch = reduce_launch(partial.device().gpu(), len, splits);
    let (splits, accumulates, accumulate) = (int(splits), accumulate, i32::from(accumulate));
    // SAFETY: `partial` has `splits` times the elements of `y`.
    unsafe {
        by_dtype!(
            y.dtype(),
            split_k_reduce_f32
                | split_k_reduce_bf16(
                    launch,
                    y.device_out().updating(accumulates),
                    partial.device_in(),
                    splits,
                    len as i64,
                    accumulate
                )
        );
    }
}

/// One launch of a kernel of `kernels/matmul.cu`.
struct Matmul<'a, 'c> {
    gemm: Gemm,
    tile: Tile,
    c: &'a mut TensorMut<'c>,
    a: &'a Tensor,
    b: &'a Tensor,
    /// For `Nt` only.
    bias: Option<&'a Tensor>,
    /// For `Nt` in bf16 only: `[row tiles, 2, n]`.
    moments: Option<&'a mut Tensor>,
    /// Adds to the contents of `c`; for `Nn` and `Tn` only.
    accumulate: bool,
}

impl Matmul<'_, '_> {
    fn run(self) {
        let Self { gemm, tile, c, a, b, bias, moments, accumulate } = self;
        let is_nt = gemm.kind == GemmKind::Nt;
        assert!(is_nt || bias.is_none(), "matmul: only y = x Wᵀ supports a bias");
        assert!(!(is_nt && accumulate), "matmul: only gradients support accumulation");
        let threads = if a.dtype() == DType::Bf16 { 128 } else { 256 };
        let to = Launch::new(a.device().gpu(), [tile.tiles, 1, tile.splits], [threads, 1, 1]);
        let bias = bias.map_or(In::null(), Tensor::device_in);
        let moments = moments.map_or(Out::null(), Tensor::device_out);
        let [m, n, k, k_per_split] = [gemm.m, gemm.n, gemm.k, tile.k_per_split].map(int);
        let (accumulates, accumulate) = (accumulate, i32::from(accumulate));
        // `$input`: extra inputs before the sizes; `$flag`: flags after them.
        macro_rules! of_f32 {
            ($kernel:ident, [$($input:expr),*], [$($flag:expr),*]) => {{
                let (c, a, b) =
                    (c.device_out().updating(accumulates), a.device_in(), b.device_in());
                cuda::$kernel(to, c, a, b, $($input,)* m, n, k, k_per_split $(, $flag)*)
            }};
        }
        macro_rules! of_bf16 {
            ($kernel:ident, [$($input:expr),*], [$($flag:expr),*]) => {{
                let (out_bf16, out_f32) = match c.dtype() {
                    DType::Bf16 => (c.device_out().updating(accumulates), Out::null()),
                    _ => (Out::null(), c.device_out().updating(accumulates)),
                };
                let (a, b) = (a.device_in(), b.device_in());
                cuda::$kernel(
                    to, out_bf16, out_f32, a, b, $($input,)* m, n, k, k_per_split $(, $flag)*
                )
            }};
        }
        // SAFETY: the operation has checked that the tensors have these sizes; `c` holds all splits.
        unsafe {
            match (gemm.kind, a.dtype(), tile.shape) {
                (GemmKind::Nt, DType::F32, _) => of_f32!(matmul_nt_f32, [bias], []),
                (GemmKind::Nn, DType::F32, _) => of_f32!(matmul_nn_f32, [], [accumulate]),
                (_, DType::F32, _) => of_f32!(matmul_tn_f32, [], [accumulate]),
                (GemmKind::Nt, _, TileShape::Large) => {
                    of_bf16!(matmul_nt_bf16_128x128, [bias, moments], []);
                }
                (GemmKind::Nt, _, TileShape::Half) => {
                    of_bf16!(matmul_nt_bf16_128x64, [bias, moments], []);
                }
                (GemmKind::Nt, ..) => of_bf16!(matmul_nt_bf16_64x64, [bias, moments], []),
                (GemmKind::Nn, _, TileShape::Large) => {
                    of_bf16!(matmul_nn_bf16_128x128, [], [accumulate]);
                }
                (GemmKind::Nn, _, TileShape::Half) => {
                    of_bf16!(matmul_nn_bf16_128x64, [], [accumulate]);
                }
                (GemmKind::Nn, ..) => of_bf16!(matmul_nn_bf16_64x64, [], [accumulate]),
                (_, _, TileShape::Large) => of_bf16!(matmul_tn_bf16_128x128, [], [accumulate]),
                (_, _, TileShape::Half) => of_bf16!(matmul_tn_bf16_64x128, [], [accumulate]),
                _ => of_bf16!(matmul_tn_bf16_64x64, [], [accumulate]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reduce_block;

    #[test]
    fn small_sums_of_many_splits_are_shared_by_more_threads() {
        for (len, splits, block) in [
            (64 * 64, 128, [32, 16]), // ResNet's first 1x1 convolution
            (64 * 576, 52, [64, 4]),  // and 3x3
            (64 * 576, 16, [64, 4]),
            (512 * 4608, 5, [256, 1]), // elements enough
            (64, 7, [256, 1]),         // too few splits to share
            (64, 8, [128, 2]),
            (1, 10_000, [32, 16]),
            (0, 0, [256, 1]),
        ] {
            assert_eq!(reduce_block(len, splits), block, "{len} elements of {splits} splits");
        }
    }
}

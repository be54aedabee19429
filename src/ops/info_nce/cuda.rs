//! `kernels/info_nce.cu`: tiles of 64 x 64 similarities in registers, the queue in slices that are put together in order.

use super::Dims;
use crate::device::cuda::{self, In, Launch};
use crate::ops::row_losses;
use crate::tensor::Tensor;

const TILE: usize = 64;
const THREADS: [usize; 3] = [256, 1, 1];

/// How the queue is cut: by the shape alone, so that sums have one order on every chip. An empty queue has no slices,
/// and the launches over them are left out.
#[derive(Clone, Copy, Debug)]
struct Slices {
    columns: usize,
    count: usize,
}

impl Slices {
    fn new(dims: &Dims) -> Self {
        /// Blocks that a large GPU has work for.
        const BLOCKS: usize = 256;
        let (rows, tiles) = (dims.n.div_ceil(TILE), dims.m.div_ceil(TILE).max(1));
        let columns = tiles.div_ceil((BLOCKS / rows).clamp(1, tiles)) * TILE;
        Self { columns, count: dims.m.div_ceil(columns) }
    }
}

/// What a query is compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs<'a> {
    pub(super) q: &'a Tensor,
    pub(super) k: &'a Tensor,
    pub(super) queue: &'a Tensor,
    /// Begin and end of the rows of the queue that hold this batch's keys.
    pub(super) own: Option<&'a Tensor>,
}

impl Inputs<'_> {
    fn own(&self) -> In<'_, i32> {
        self.own.map_or(In::null(), Tensor::device_in)
    }

    /// A warp to each query.
    fn warps(&self, dims: &Dims) -> Launch<'_> {
        Launch::new(self.q.device().gpu(), [dims.n.div_ceil(8), 1, 1], THREADS)
    }
}

/// Fills `lse [n]` and returns the loss.
pub(super) fn forward(lse: &mut Tensor, inputs: Inputs<'_>, dims: &Dims) -> Tensor {
    let (device, slices) = (inputs.q.device(), Slices::new(dims));
    let [n, m, d, columns, count] =
        [dims.n, dims.m, dims.d, slices.columns, slices.count].map(|size| size as i32);
    let inv_t = 1.0 / dims.temperature;
    let mut maxima = Tensor::floats(device, [slices.count, dims.n]);
    let mut sums = maxima.empty_like();
    let mut row_losses = Tensor::floats(device, [dims.n]);
    let tiles = Launch::new(device.gpu(), [dims.n.div_ceil(TILE), slices.count, 1], THREADS);
    // SAFETY: `q` and `k` have `n` rows of `d`, the queue `m`, the workspaces a row for each slice, the rest a number for
    // each query; `own` has two numbers or is null.
    unsafe {
        cuda::info_nce_sums(
            tiles,
            maxima.device_out(),
            sums.device_out(),
            inputs.q.device_in(),
            inputs.queue.device_in(),
            inputs.own(),
            n,
            m,
            d,
            columns,
            inv_t,
        );
        cuda::info_nce_finish(
            inputs.warps(dims),
            lse.device_out(),
            row_losses.device_out(),
            maxima.device_in(),
            sums.device_in(),
            inputs.q.device_in(),
            inputs.k.device_in(),
            n,
            d,
            count,
            inv_t,
        );
    }
    row_losses::mean(&row_losses)
}

/// `dq` from `dy`, the gradient of the loss, which stays where it is.
pub(super) fn query_gradient(
    dq: &mut Tensor,
    inputs: Inputs<'_>,
    lse: &Tensor,
    dy: &Tensor,
    dims: &Dims,
) {
    /// Columns of the queue that a block sums.
    const WIDTH: usize = 128;
    let (device, slices) = (inputs.q.device(), Slices::new(dims));
    let [n, m, d, columns, count] =
        [dims.n, dims.m, dims.d, slices.columns, slices.count].map(|size| size as i32);
    let inv_t = 1.0 / dims.temperature;
    let mut partial = Tensor::floats(device, [slices.count, dims.n, dims.d]);
    let grid = [dims.n.div_ceil(TILE), dims.d.div_ceil(WIDTH), slices.count];
    let tiles = Launch::new(device.gpu(), grid, THREADS);
    // SAFETY: sizes as in the forward; `partial` has a plane of `dq`'s size for each slice.
    unsafe {
        cuda::info_nce_gradient(
            tiles,
            partial.device_out(),
            inputs.q.device_in(),
            inputs.queue.device_in(),
            inputs.own(),
            lse.device_in(),
            dy.device_in(),
            n,
            m,
            d,
            columns,
            inv_t,
        );
        cuda::info_nce_query_finish(
            inputs.warps(dims),
            dq.device_out(),
            partial.device_in(),
            inputs.q.device_in(),
            inputs.k.device_in(),
            lse.device_in(),
            dy.device_in(),
            n,
            d,
            count,
            inv_t,
            0,
        );
    }
}

/// `dk`, in the same way.
pub(super) fn key_gradient(
    dk: &mut Tensor,
    inputs: Inputs<'_>,
    lse: &Tensor,
    dy: &Tensor,
    dims: &Dims,
) {
    let [n, d] = [dims.n, dims.d].map(|size| size as i32);
    // SAFETY: sizes as in the forward.
    unsafe {
        cuda::info_nce_key_gradient(
            inputs.warps(dims),
            dk.device_out(),
            inputs.q.device_in(),
            inputs.k.device_in(),
            lse.device_in(),
            dy.device_in(),
            n,
            d,
            1.0 / dims.temperature,
            0,
        );
    }
}

//! Launches `kernels/info_nce.cu`: tiles of 128 x 128 similarities in registers, computed by tensor cores from the bf16 terms
//! that f32 queries and queue are split into. The queue is cut into splits whose partial results are combined in order.

use super::InfoNceDims;
use crate::device::cuda::{self, In, Launch, int};
use crate::ops::gemm::similarity::{
    ColumnSplits, SplitRows, THREADS, TILE, WEIGHT_TILE, WEIGHT_WIDTH,
};
use crate::ops::row_losses;
use crate::tensor::Tensor;

/// The inputs of the loss.
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

    /// One warp per query.
    fn warps(&self, dims: &InfoNceDims) -> Launch<'_> {
        Launch::new(self.q.device().gpu(), [dims.n.div_ceil(8), 1, 1], [256, 1, 1])
    }
}

/// The bf16 terms of the queries and of the queue.
#[derive(Debug)]
pub(super) struct Terms {
    q: SplitRows,
    queue: SplitRows,
}

/// Fills `lse [n]`, and returns the loss and the terms. An empty queue has no splits; launches over them are skipped.
pub(super) fn forward(lse: &mut Tensor, inputs: Inputs<'_>, dims: &InfoNceDims) -> (Tensor, Terms) {
    let (device, splits) = (inputs.q.device(), ColumnSplits::new(dims.n, dims.m, TILE));
    let terms = Terms { q: SplitRows::of(inputs.q), queue: SplitRows::of(inputs.queue) };
    let [n, m, d, columns, count] = [dims.n, dims.m, dims.d, splits.columns, splits.count].map(int);
    let inv_t = 1.0 / dims.temperature;
    let mut maxima = Tensor::floats(device, [splits.count, dims.n]);
    let mut sums = maxima.empty_like();
    let mut row_losses = Tensor::floats(device, [dims.n]);
    let tiles = Launch::new(device.gpu(), [dims.n.div_ceil(TILE), splits.count, 1], THREADS);
    // SAFETY: `q` and `k` have `n` rows of `d`, the queue has `m`, and so have their terms; the workspaces have one row per
    // split, the other tensors `n` elements; `own` has two elements or is null.
    unsafe {
        cuda::info_nce_sums(
            tiles,
            maxima.device_out(),
            sums.device_out(),
            terms.q.device_in(),
            terms.queue.device_in(),
            inputs.own(),
            n,
            m,
            int(dims.batch),
            int(dims.first),
            terms.q.pitch(),
            terms.q.terms(),
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
    (row_losses::mean(&row_losses), terms)
}

/// Fills `dq`. `dy`, the gradient of the loss, is read on the device.
pub(super) fn query_gradient(
    dq: &mut Tensor,
    inputs: Inputs<'_>,
    terms: &Terms,
    lse: &Tensor,
    dy: &Tensor,
    dims: &InfoNceDims,
) {
    let (device, splits) = (inputs.q.device(), ColumnSplits::new(dims.n, dims.m, WEIGHT_TILE));
    let [n, m, d, columns, count] = [dims.n, dims.m, dims.d, splits.columns, splits.count].map(int);
    let inv_t = 1.0 / dims.temperature;
    let mut partial = Tensor::floats(device, [splits.count, dims.n, dims.d]);
    let grid = [dims.n.div_ceil(WEIGHT_TILE), dims.d.div_ceil(WEIGHT_WIDTH), splits.count];
    let tiles = Launch::new(device.gpu(), grid, THREADS);
    let gradient =
        if terms.q.terms() == 2 { cuda::info_nce_gradient_2 } else { cuda::info_nce_gradient_3 };
    // SAFETY: sizes as in the forward pass; `partial` has the size of `dq` per terms.
    unsafe {
        gradient(
            tiles,
            partial.device_out(),
            terms.q.device_in(),
            terms.queue.device_in(),
            inputs.own(),
            lse.device_in(),
            dy.device_in(),
            n,
            m,
            int(dims.batch),
            int(dims.first),
            d,
            terms.q.pitch(),
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
        );
    }
}

/// Fills `dk`, likewise.
pub(super) fn key_gradient(
    dk: &mut Tensor,
    inputs: Inputs<'_>,
    lse: &Tensor,
    dy: &Tensor,
    dims: &InfoNceDims,
) {
    let [n, d] = [dims.n, dims.d].map(int);
    // SAFETY: sizes as in the forward pass.
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
        );
    }
}

//! Launches `kernels/batch_norm.cu`: a thread handles 16 bytes of channels, and sums over rows are reduced per chunk first.
//!
//! Chunks depend on the shape alone, so a sum has the same order on every chip.

use super::{BatchNormDims, EPS, Ids, RUNNING_WEIGHT, Running, Saved};
use crate::device::cuda::{self, In, Launch, Out, int};
use crate::device::{Group, Reduction};
use crate::ops::gemm::{BlockMoments, Moments};
use crate::tape::{Gradients, Tape};
use crate::tensor::{DType, Element, Tensor, gather_views, reduce_over_ranks};

/// Threads in a block; the kernels' shared memory is sized for this.
const THREADS: usize = 256;
/// Maximum number of chunks: enough blocks to fill a GPU for any number of channels. More would only add partial sums.
const CHUNKS: usize = 512;

/// How rows and channels map to blocks and threads.
struct Shape {
    chunks: usize,
    rows_per_chunk: usize,
    grid: [usize; 3],
    block: [usize; 3],
}

impl Shape {
    fn new(dims: BatchNormDims, dtype: DType) -> Self {
        let vectors = dims.c.div_ceil(16 / dtype.size());
        let across = vectors.next_power_of_two().min(32);
        let down = THREADS / across;
        // At least eight rows per thread; with fewer, launch overhead dominates.
        let rows_per_chunk = dims.rows.div_ceil(CHUNKS).max(8 * down).next_multiple_of(down);
        let chunks = dims.rows.div_ceil(rows_per_chunk);
        let grid = [vectors.div_ceil(across), chunks, dims.groups];
        Self { chunks, rows_per_chunk, grid, block: [across, down, 1] }
    }
}

/// Flags of `accumulate` in `batch_norm_backward_finish`: which gradients it adds to.
const ACCUMULATE_DSHIFT: i32 = 1;
const ACCUMULATE_DGAIN: i32 = 2;
/// Flags of `accumulate` in `batch_norm_backward_apply`.
const ACCUMULATE_DX: i32 = 1;
const ACCUMULATE_DRESIDUAL: i32 = 2;

/// Returns `flag` if it is set, else 0.
fn flag_if(set: bool, flag: i32) -> i32 {
    if set { flag } else { 0 }
}

/// A launch with one thread per channel.
fn per_channel(x: &Tensor, c: usize) -> Launch<'_> {
    Launch::new(x.device().gpu(), [c.div_ceil(128), 1, 1], [128, 1, 1])
}

/// A launch of a `finish` kernel: blocks of 8 channels, which is 32 bytes of a line, with up to 128 threads over the chunks.
fn over_chunks(x: &Tensor, c: usize, chunks: usize) -> Launch<'_> {
    let down = chunks.next_power_of_two().min(128);
    Launch::new(x.device().gpu(), [c.div_ceil(8), 1, 1], [8, down, 1])
}

/// Returns mean and squared deviations of each chunk of rows.
fn partial_moments(x: &Tensor, dims: BatchNormDims) -> BlockMoments {
    let shape = Shape::new(dims, x.dtype());
    let mut partial = Tensor::floats(x.device(), [dims.groups * shape.chunks, 2, dims.c]);
    let launch = Launch::new(x.device().gpu(), shape.grid, shape.block);
    let (rows, per_chunk, channels) = (dims.rows as i64, int(shape.rows_per_chunk), int(dims.c));
    // SAFETY: `partial` has two rows of `c` per group and chunk.
    unsafe {
        by_dtype!(
            x.dtype(),
            batch_norm_moments_f32
                | batch_norm_moments_bf16(
                    launch,
                    partial.device_out(),
                    x.device_in(),
                    rows,
                    per_chunk,
                    channels
                )
        );
    }
    BlockMoments { partial, rows: shape.rows_per_chunk }
}

/// The number of chunks from which a launch of its own merges them, and to how many: below, the finish kernel's blocks of 128 thread
/// rows read them themselves in less time than a launch takes.
const MANY_CHUNKS: usize = 4096;
const MERGED_CHUNKS: usize = 512;

/// Merges runs of the chunks of each group, if they are many, for the finish kernel: after a stem there are 25,088 of them for 8 blocks.
fn with_fewer_chunks(own: BlockMoments, dims: BatchNormDims) -> BlockMoments {
    let BatchNormDims { groups, rows, c, .. } = dims;
    let chunks = rows.div_ceil(own.rows);
    if chunks < MANY_CHUNKS {
        return own;
    }
    let run = chunks.div_ceil(MERGED_CHUNKS);
    let mut merged = Tensor::floats(own.partial.device(), [groups * chunks.div_ceil(run), 2, c]);
    let grid = [c.div_ceil(32), chunks.div_ceil(run), groups];
    // SAFETY: `partial` has two rows of `c` per group and chunk, `merged` two per group and run.
    unsafe {
        cuda::batch_norm_merge(
            Launch::new(own.partial.device().gpu(), grid, [32, 8, 1]),
            merged.device_out(),
            own.partial.device_in(),
            int(chunks),
            int(run),
            rows as i64,
            int(own.rows),
            int(c),
        );
    }
    BlockMoments { partial: merged, rows: own.rows * run }
}

/// Returns the moments of each rank's rows, in rank order, from those of this rank's chunks. A rank is a chunk of equal size, so
/// that the finish kernel merges ranks as it merges chunks, by mean and squared deviations.
fn of_ranks(own: &BlockMoments, dims: BatchNormDims, group: &Group) -> BlockMoments {
    let BatchNormDims { rows, c, .. } = dims;
    let (device, chunks) = (own.partial.device(), rows.div_ceil(own.rows));
    let mut pair = Tensor::zeros(device, [2, c]);
    let [mut unused, mut scaled] = [(); 2].map(|()| Tensor::zeros(device, [c]));
    {
        let (pair, bytes) = (pair.device_out::<f32>(), c * size_of::<f32>());
        let (mean, deviations) = (pair.address(), pair.address() + bytes as u64);
        // The kernel moves a running variance of 0 by `weight` towards M2 / (rows - 1): with rows - 1 as weight, to M2.
        // SAFETY: as in `moments`; `pair` has two rows of `c`, the other tensors one.
        unsafe {
            cuda::batch_norm_finish(
                over_chunks(&own.partial, c, chunks),
                Out::new(mean, bytes),
                unused.device_out(),
                scaled.device_out(),
                Out::new(deviations, bytes),
                own.partial.device_in(),
                1,
                int(chunks),
                rows as i64,
                int(own.rows),
                int(c),
                (rows - 1) as f32,
                EPS as f32,
            );
        }
    }
    let partial = gather_views(&pair.reshape([1, 2, c]), 1, group, "batch norm's statistics");
    BlockMoments { partial, rows }
}

/// Returns mean and `1 / sqrt(var + eps)` of each group, `[groups, c]`, and updates the running statistics. Reads `x` only if
/// its moments are not `given`.
pub(super) fn moments(
    tape: &Tape<'_>,
    x: &Tensor,
    running: Option<Running>,
    dims: BatchNormDims,
    given: Option<Moments>,
) -> (Tensor, Tensor) {
    let BatchNormDims { groups, c, .. } = dims;
    let device = x.device();
    let own = match given {
        Some(Moments::Blocks(given)) => with_fewer_chunks(given, dims),
        _ => partial_moments(x, dims),
    };
    let BlockMoments { partial, rows: per_chunk } =
        if dims.ranks > 1 { of_ranks(&own, dims, tape.group()) } else { own };
    let rows = dims.all_rows();
    let chunks = rows.div_ceil(per_chunk);
    let (mut mean, mut inv_std) =
        (Tensor::floats(device, [groups, c]), Tensor::floats(device, [groups, c]));
    let (mut running_mean, mut running_variance) = (Out::null(), Out::null());
    if let Some(running) = running {
        // Both stay null if the tape does not update running statistics.
        for (stat, to) in
            [(running.mean, &mut running_mean), (running.variance, &mut running_variance)]
        {
            tape.update_stat(stat, |mut old| *to = old.device_out().updating(true).unbound());
        }
    }
    // SAFETY: `partial` has two rows of `c` per group and chunk. Running statistics have `c` channels and are in the arena,
    // which outlives the tape; nothing else writes them before this launch.
    unsafe {
        cuda::batch_norm_finish(
            over_chunks(x, c, chunks),
            mean.device_out(),
            inv_std.device_out(),
            running_mean,
            running_variance,
            partial.device_in(),
            int(groups),
            int(chunks),
            rows as i64,
            int(per_chunk),
            int(c),
            RUNNING_WEIGHT as f32,
            EPS as f32,
        );
    }
    (mean, inv_std)
}

/// Returns `1 / sqrt(var + eps)`, `[1, c]`.
pub(super) fn inv_std(variance: &Tensor) -> Tensor {
    let c = variance.len();
    let mut inv_std = Tensor::floats(variance.device(), [1, c]);
    // SAFETY: both have `c` channels.
    unsafe {
        cuda::batch_norm_inv_std(
            per_channel(variance, c),
            inv_std.device_out(),
            variance.device_in(),
            int(c),
            EPS as f32,
        );
    }
    inv_std
}

pub(super) fn apply(y: &mut Tensor, saved: &Saved, residual: Option<&Tensor>, relu: bool) {
    let (x, dims) = (&saved.x, saved.dims);
    let shape = Shape::new(dims, x.dtype());
    let launch = Launch::new(x.device().gpu(), shape.grid, shape.block);
    // SAFETY: `x`, `y` and the residual have the rows of `dims`, statistics one row per group, the rest `c` channels.
    unsafe {
        by_dtype!(
            x.dtype(),
            batch_norm_apply_f32
                | batch_norm_apply_bf16(
                    launch,
                    y.device_out(),
                    x.device_in(),
                    residual.map_or(In::null(), Tensor::device_in),
                    saved.mean.device_in(),
                    saved.inv_std.device_in(),
                    saved.gain.as_ref().map_or(In::null(), Tensor::device_in),
                    saved.shift.as_ref().map_or(In::null(), Tensor::device_in),
                    dims.rows as i64,
                    int(shape.rows_per_chunk),
                    int(dims.c),
                    i32::from(relu)
                )
        );
    }
}

/// All gradients. `mask` is the forward pass's output if it had a ReLU after a residual; `relu` says that it had a ReLU without
/// one.
pub(super) fn backward(
    gradients: &mut Gradients<'_>,
    dy: Tensor,
    saved: &Saved,
    mask: Option<&Tensor>,
    relu: bool,
    ids: Ids,
    group: &Group,
) {
    let mut sums = backward_sums(gradients, &dy, saved, mask, relu, ids);
    if saved.dims.ranks > 1 {
        // The last kernel divides by this rank's rows: the mean of the sums is the sum of all rows divided by all.
        reduce_over_ranks(&mut sums, group, "batch norm's gradients", Reduction::Mean);
    }
    let mut own = [None, None];
    match saved.x.dtype() {
        DType::Bf16 => {
            let to = Targets::new(gradients, &dy, mask.is_some(), ids, &mut own);
            backward_apply(cuda::batch_norm_backward_apply_bf16, to, &dy, saved, mask, relu, &sums);
        }
        _ => {
            let to = Targets::new(gradients, &dy, mask.is_some(), ids, &mut own);
            backward_apply(cuda::batch_norm_backward_apply_f32, to, &dy, saved, mask, relu, &sums);
        }
    }
    for (id, own) in [Some(ids.x), ids.residual].into_iter().zip(own) {
        if let (Some(id), Some(own)) = (id, own) {
            gradients.add(id, own);
        }
    }
}

/// Returns `[groups, 2, c]`, Σ dz and Σ dz x̂, and adds their totals to the gradients of shift and gain.
fn backward_sums(
    gradients: &mut Gradients<'_>,
    dy: &Tensor,
    saved: &Saved,
    mask: Option<&Tensor>,
    relu: bool,
    ids: Ids,
) -> Tensor {
    let (x, BatchNormDims { groups, rows, c, .. }) = (&saved.x, saved.dims);
    let device = x.device();
    let shape = Shape::new(saved.dims, x.dtype());
    let mut partial = Tensor::floats(device, [groups, shape.chunks, 2, c]);
    let mut sums = Tensor::floats(device, [groups, 2, c]);
    let launch = Launch::new(device.gpu(), shape.grid, shape.block);

    let (mut dshift, mut dgain, mut accumulate) = (Out::null(), Out::null(), 0);
    let channel_shape = [c].into();
    if let Some((mut to, old)) = ids.shift.and_then(|id| gradients.target(id, &channel_shape)) {
        dshift = to.device_out().updating(old).unbound();
        accumulate |= flag_if(old, ACCUMULATE_DSHIFT);
    }
    if let Some((mut to, old)) = ids.gain.and_then(|id| gradients.target(id, &channel_shape)) {
        dgain = to.device_out().updating(old).unbound();
        accumulate |= flag_if(old, ACCUMULATE_DGAIN);
    }
    // SAFETY: sizes as in the forward pass. `gradients` owns the targets, and both launches are queued before anything else
    // that uses them.
    unsafe {
        by_dtype!(
            x.dtype(),
            batch_norm_backward_sums_f32
                | batch_norm_backward_sums_bf16(
                    launch,
                    partial.device_out(),
                    dy.device_in(),
                    mask.map_or(In::null(), Tensor::device_in),
                    x.device_in(),
                    saved.mean.device_in(),
                    saved.inv_std.device_in(),
                    saved.gain.as_ref().map_or(In::null(), Tensor::device_in),
                    saved.shift.as_ref().map_or(In::null(), Tensor::device_in),
                    rows as i64,
                    int(shape.rows_per_chunk),
                    int(c),
                    i32::from(relu)
                )
        );
        cuda::batch_norm_backward_finish(
            over_chunks(x, c, shape.chunks),
            sums.device_out(),
            dshift,
            dgain,
            partial.device_in(),
            int(groups),
            int(shape.chunks),
            int(c),
            accumulate,
        );
    }
    sums
}

/// The kernel that writes the gradients of the input and of the residual, in the type `T` of activations.
type BackwardApply<T> = unsafe fn(
    Launch<'_>,
    Out<'_, T>,
    Out<'_, T>,
    In<'_, T>,
    In<'_, T>,
    In<'_, T>,
    In<'_, f32>,
    In<'_, f32>,
    In<'_, f32>,
    In<'_, f32>,
    In<'_, f32>,
    i64,
    i32,
    i32,
    i32,
    i32,
);

/// Writes the gradients of the input and of the residual.
fn backward_apply<T: Element>(
    kernel: BackwardApply<T>,
    to: Targets<'_, T>,
    dy: &Tensor,
    saved: &Saved,
    mask: Option<&Tensor>,
    relu: bool,
    sums: &Tensor,
) {
    let shape = Shape::new(saved.dims, saved.x.dtype());
    // SAFETY: sizes as in the forward pass; the targets have the size of the input, or are null.
    unsafe {
        kernel(
            Launch::new(saved.x.device().gpu(), shape.grid, shape.block),
            to.dx,
            to.dresidual,
            dy.device_in(),
            mask.map_or(In::null(), Tensor::device_in),
            saved.x.device_in(),
            saved.mean.device_in(),
            saved.inv_std.device_in(),
            saved.gain.as_ref().map_or(In::null(), Tensor::device_in),
            saved.shift.as_ref().map_or(In::null(), Tensor::device_in),
            sums.device_in(),
            saved.dims.rows as i64,
            int(shape.rows_per_chunk),
            int(saved.dims.c),
            i32::from(relu),
            to.accumulate,
        );
    }
}

/// Where the last kernel writes; null if a gradient is not wanted.
struct Targets<'a, T> {
    dx: Out<'a, T>,
    dresidual: Out<'a, T>,
    accumulate: i32,
}

impl<T: Element> Targets<'_, T> {
    /// The residual comes first, as in the kernel: if the residual is `x` itself, the second write adds to the first.
    fn new(
        gradients: &mut Gradients<'_>,
        dy: &Tensor,
        masked: bool,
        ids: Ids,
        own: &mut [Option<Tensor>; 2],
    ) -> Self {
        let [own_x, own_residual] = own;
        let (mut dx, mut dresidual, mut accumulate) = (Out::null(), Out::null(), 0);
        match ids.residual {
            // Without a mask the residual's gradient is `dy` itself.
            Some(id) if !masked => gradients.add(id, dy.clone()),
            Some(id) => {
                if let Some((mut to, old)) = gradients.target_like(id, dy, own_residual) {
                    dresidual = to.device_out().updating(old).unbound();
                    accumulate |= flag_if(old, ACCUMULATE_DRESIDUAL);
                }
            }
            None => {}
        }
        if let Some((mut to, old)) = gradients.target_like(ids.x, dy, own_x) {
            dx = to.device_out().updating(old).unbound();
            accumulate |= flag_if(old, ACCUMULATE_DX);
        }
        Self { dx, dresidual, accumulate }
    }
}

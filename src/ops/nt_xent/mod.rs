//! NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, eq. 1, arXiv:2002.05709).
//!
//! `z [2n, d]` unit rows, view after view: the positive of row `i` is row `(i + n) mod 2n`. With `s_ij = <z_i, z_j>`,
//! `L = mean_i (log Σ_{j != i} exp(s_ij / T) - s_{i, pos(i)} / T)`, the mean over all `2n` rows. The reference code's loss,
//! the sum of two means over `n`, is twice this (google-research/simclr objective.py; see `methods::simclr`).
//!
//! With `p_ij = exp(s_ij / T - lse_i)` and `j != i`, `dz_i = (Σ_j (p_ij + p_ji) z_j - 2 z_pos(i)) dL / (2n T)`.
//! Both passes compute the similarity matrix in tiles and never store it: memory is O(n d). Since `|s| <= 1`, `1 / T` is a
//! known bound of the maximum to subtract; below T = 0.025 its exponentials would leave the range of f32, and the running
//! maximum of each row replaces it. On a GPU the forward pass computes each pair once, and GEMMs multiply the bf16 terms that
//! f32 rows are split into (`ops/gemm/similarity.rs`).
//!
//! Of several ranks each computes the losses of its own rows against the rows of all, and the gradient of its own rows, whole:
//! it takes nothing from the others but their `lse`, as `s` is symmetric. Both passes of a rank take the N-th part of one rank's.

mod cpu;
mod cuda;
mod reference;

pub(crate) use cuda::groups as nt_xent_groups;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{DType, Tensor, gather_views};

/// The sizes of the loss.
#[derive(Clone, Copy, Debug)]
struct NtXentDims {
    /// Number of this rank's rows, of both views together.
    rows: usize,
    /// Number of all ranks' rows: `2n`.
    all: usize,
    /// The place of this rank's first row of a view among all of that view.
    first: usize,
    d: usize,
    temperature: f64,
}

impl NtXentDims {
    /// The positive of a row among this rank's.
    fn positive(self, row: usize) -> usize {
        (row + self.rows / 2) % self.rows
    }

    /// The place among all rows of one of this rank's.
    fn place(self, row: usize) -> usize {
        let half = self.rows / 2;
        self.first + row % half + row / half * (self.all / 2)
    }
}

/// What both passes read. On one rank `own` and `all` are the same.
struct Rows {
    /// This rank's `[rows, d]`.
    own: Tensor,
    /// Those of all ranks `[2n, d]`, view after view.
    all: Tensor,
}

/// Returns the mean NT-Xent over the `2n` rows of `z [2n, d]`, view after view; a scalar. Rows must have unit length (see
/// [`l2_normalize`](super::l2_normalize())). `temperature > 0`. With several ranks `z` has a rank's own rows, and the result is the mean
/// over these; the mean over the ranks is the loss of all.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let z = Tensor::from_f64(&device, [4, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
/// let loss = tape::forward(&mut arena, |tape| ops::nt_xent(&tape.input(&z), 1.0))?;
/// // The positive has similarity 1, both negatives 0.
/// assert!((loss.scalar() - ((1.0_f64.exp() + 2.0).ln() - 1.0)).abs() < 1e-12);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If the number of rows is odd or less than 4 (one pair has no negatives), or the temperature is not positive.
#[track_caller]
pub fn nt_xent<'t>(z: &Var<'t>, temperature: f64) -> Var<'t> {
    let group = z.tape().group().clone();
    let [rows, d] = z.value().dims("nt_xent: the embeddings");
    let all = rows * group.size();
    assert!(
        rows.is_multiple_of(2) && all >= 4,
        "nt_xent: {all} rows, expected two views of 2 or more"
    );
    assert!(d > 0, "nt_xent: embeddings without features");
    assert!(temperature > 0.0, "nt_xent: temperature {temperature}");
    let dims = NtXentDims { rows, all, first: rows / 2 * group.rank(), d, temperature };
    let device = z.tape().device().clone();
    let dtype = DType::of(&device);
    let gathered = gather_views(z.value(), 2, &group, "rows").cast(dtype);
    let z = &super::cast(z, dtype);
    let z_rows = Rows { own: z.value().clone(), all: gathered };
    let mut lse = Tensor::floats(&device, [rows]); // log-sum-exp of each row
    let mut terms = None; // only on a GPU
    let y = match device.kind() {
        DeviceKind::Cpu => {
            let mut workspace = Tensor::floats(&device, [cpu::workspace_len(dims)]);
            let (lse, workspace) = (lse.data_mut(), workspace.data_mut());
            let z = [z_rows.own.data(), z_rows.all.data()];
            let loss = device.run(|| cpu::forward(lse, workspace, z, dims));
            Tensor::from_f64(&device, [], &[loss])
        }
        DeviceKind::Cuda => {
            let (loss, terms_of_z) = cuda::forward(&mut lse, &z_rows, dims);
            terms = Some(terms_of_z);
            loss
        }
        DeviceKind::Reference => {
            let z = [z_rows.own.data(), z_rows.all.data()];
            let loss = reference::forward(lse.data_mut(), z, dims);
            Tensor::from_f64(&device, [], &[loss])
        }
    };
    let lse = gather_views(&lse, 2, &group, "sums of rows");
    let z_id = z.id();
    z.tape().record("nt_xent", y, &[z], move |dy, gradients| {
        if let Some(terms) = terms {
            if let Some((mut dz, accumulate)) = gradients.target(z_id, z_rows.own.shape()) {
                cuda::backward(&mut dz, &terms, &lse, &dy, dims, accumulate);
            }
            return;
        }
        let mut dz = z_rows.own.empty_like();
        let scale = dy.scalar() / (dims.rows as f64 * dims.temperature);
        match device.kind() {
            DeviceKind::Cpu => {
                let mut workspace = Tensor::floats(&device, [cpu::workspace_len(dims)]);
                let (dz, workspace) = (dz.data_mut(), workspace.data_mut());
                let z = [z_rows.own.data(), z_rows.all.data()];
                device.run(|| cpu::backward(dz, workspace, z, lse.data(), dims, scale));
            }
            // The reference device; the GPU returned above.
            _ => {
                let z = [z_rows.own.data(), z_rows.all.data()];
                reference::backward(dz.data_mut(), z, lse.data(), dims, scale);
            }
        }
        gradients.add(z_id, dz);
    })
}

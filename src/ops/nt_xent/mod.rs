//! NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, eq. 1, arXiv:2002.05709).
//!
//! `z [2n, d]` unit rows, view after view: the positive of row `i` is row `(i + n) mod 2n`. With `s_ij = <z_i, z_j>`,
//! `L = mean_i (log Σ_{j != i} exp(s_ij / T) - s_{i, pos(i)} / T)`, the mean over all `2n` rows. The reference code's loss,
//! the sum of two means over `n`, is twice this (google-research/simclr objective.py; see `methods::simclr`).
//!
//! With `p_ij = exp(s_ij / T - lse_i)` and `j != i`, `dz_i = (Σ_j (p_ij + p_ji) z_j - 2 z_pos(i)) dL / (2n T)`.
//! The similarity matrix is made in tiles, in both directions, and never kept: memory is O(n d). Since `|s| <= 1`, the
//! maximum to remove is known, `1 / T`; below T = 0.025 its exponentials would leave f32's range and the running maximum
//! of each row takes its place. On a GPU the forward pass makes each pair once, and products are of bf16 planes
//! ([`similarity`](super::similarity)).

mod cpu;
mod cuda;
mod reference;

pub(crate) use cuda::groups as nt_xent_groups;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{DType, Tensor};

/// The sizes of the loss.
#[derive(Clone, Copy, Debug)]
struct NtXentDims {
    /// Rows, both views together: `2n`.
    rows: usize,
    d: usize,
    temperature: f64,
}

impl NtXentDims {
    fn positive(self, row: usize) -> usize {
        (row + self.rows / 2) % self.rows
    }
}

/// The mean NT-Xent over the `2n` rows of `z [2n, d]`, which must have unit length (see
/// [`l2_normalize`](super::l2_normalize())); a scalar. `temperature > 0`.
///
/// # Panics
/// When the number of rows is odd or less than 4 (one pair has no negatives), or the temperature is not positive.
#[track_caller]
pub fn nt_xent<'t>(z: &Var<'t>, temperature: f64) -> Var<'t> {
    let [rows, d] = z.value().dims("nt_xent: the embeddings");
    assert!(
        rows.is_multiple_of(2) && rows >= 4,
        "nt_xent: {rows} rows, not two views of 2 or more"
    );
    assert!(temperature > 0.0, "nt_xent: temperature {temperature}");
    let dims = NtXentDims { rows, d, temperature };
    let device = z.tape().device().clone();
    assert_eq!(z.tape().group().size(), 1, "nt_xent: gathering from several processes");
    let z = &super::cast(z, DType::of(&device));
    let z_value = z.value().clone();
    let mut lse = Tensor::floats(&device, [rows]); // log Σ exp of each row
    let mut planes = None; // a GPU's
    let y = match device.kind() {
        DeviceKind::Cpu => {
            let mut workspace = Tensor::floats(&device, [cpu::workspace_len(dims)]);
            let (lse, workspace) = (lse.data_mut(), workspace.data_mut());
            let loss = device.run(|| cpu::forward(lse, workspace, z_value.data(), dims));
            Tensor::from_f64(&device, [], &[loss])
        }
        DeviceKind::Cuda => {
            let (loss, of_z) = cuda::forward(&mut lse, &z_value, dims);
            planes = Some(of_z);
            loss
        }
        DeviceKind::Reference => {
            let loss = reference::forward(lse.data_mut(), z_value.data(), dims);
            Tensor::from_f64(&device, [], &[loss])
        }
    };
    let z_id = z.id();
    z.tape().record("nt_xent", y, &[z], move |dy, gradients| {
        if let Some(planes) = planes {
            if let Some((mut dz, accumulate)) = gradients.target(z_id, z_value.shape()) {
                cuda::backward(&mut dz, &planes, &lse, &dy, dims, accumulate);
            }
            return;
        }
        let mut dz = z_value.empty_like();
        let scale = dy.scalar() / (dims.rows as f64 * dims.temperature);
        match device.kind() {
            DeviceKind::Cpu => {
                let mut workspace = Tensor::floats(&device, [cpu::workspace_len(dims)]);
                let (dz, workspace) = (dz.data_mut(), workspace.data_mut());
                device.run(|| {
                    cpu::backward(dz, workspace, z_value.data(), lse.data(), dims, scale);
                });
            }
            // Reference: a GPU has returned.
            _ => reference::backward(dz.data_mut(), z_value.data(), lse.data(), dims, scale),
        }
        gradients.add(z_id, dz);
    })
}

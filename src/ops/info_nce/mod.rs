//! InfoNCE with a queue of negatives (MoCo, eq. 1, arXiv:1911.05722).
//!
//! `q [n, d]` queries, `k [n, d]` their keys, `queue [m, d]` negatives, all rows of unit length:
//! `L = mean_i (log (exp(<q_i, k_i> / T) + Σ_j exp(<q_i, queue_j> / T)) - <q_i, k_i> / T)`; a scalar.
//!
//! Where the queue holds keys of this batch already (SimCLR v2's memory, "current and past batches"), a query leaves out
//! those of its own image: [`Negatives::own`].
//!
//! With `p_ij = exp(s_ij / T - lse_i)`: `dq_i = ((p_i+ - 1) k_i + Σ_j p_ij queue_j) dL / (n T)`,
//! `dk_i = (p_i+ - 1) q_i dL / (n T)`; the queue has no gradient. Logits are made in tiles, forward and backward, and never
//! kept: at N = 256 MoCo's would be 64 MiB. The maximum that is removed is `1 / T`, or the running one below T = 0.025.

mod cpu;
mod reference;

use std::ops::Range;

use crate::device::DeviceKind;
use crate::tape::{Var, VarId};
use crate::tensor::Tensor;

/// What queries are told apart from.
#[derive(Clone, Debug)]
pub struct Negatives<'a> {
    /// Unit rows `[m, d]`; they must not change before the backward pass has run.
    pub queue: &'a Tensor,
    /// Rows of the queue that hold this batch's keys, view after view: query `i` of `n` leaves out those whose place in the
    /// range is `i` modulo `n`. Empty for MoCo, whose queue holds past batches only.
    pub own: Range<usize>,
}

/// The sizes of the loss.
#[derive(Clone, Debug)]
struct Dims {
    n: usize,
    d: usize,
    /// Rows of the queue.
    m: usize,
    temperature: f64,
    own: Range<usize>,
}

impl Dims {
    /// Whether query `i` leaves row `j` of the queue out.
    fn skips(&self, i: usize, j: usize) -> bool {
        self.own.contains(&j) && (j - self.own.start) % self.n == i
    }

    /// The rows of the queue among `columns` that query `i` leaves out.
    fn skipped(&self, i: usize, columns: Range<usize>) -> impl Iterator<Item = usize> {
        let all = (self.own.start + i..self.own.end).step_by(self.n);
        all.filter(move |j| columns.contains(j))
    }
}

/// The mean InfoNCE loss of unit queries `q [n, d]` whose keys are `k [n, d]`, against `negatives`; a scalar.
/// `temperature > 0`.
///
/// # Panics
/// When shapes do not fit, there are no queries, `own` leaves the queue or is no multiple of `n` rows, or the temperature is
/// not positive.
#[track_caller]
pub fn info_nce<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    negatives: &Negatives<'_>,
    temperature: f64,
) -> Var<'t> {
    let [n, d] = q.value().dims("info_nce: the queries");
    let [m, queue_d] = negatives.queue.dims("info_nce: the queue");
    assert_eq!(q.shape(), k.shape(), "info_nce: queries {:?}, keys {:?}", q.shape(), k.shape());
    assert_eq!(d, queue_d, "info_nce: queries {:?}, queue [{m}, {queue_d}]", q.shape());
    assert!(n > 0, "info_nce: no queries");
    assert!(temperature > 0.0, "info_nce: temperature {temperature}");
    let own = negatives.own.clone();
    assert!(
        own.end <= m && own.len().is_multiple_of(n),
        "info_nce: own rows {own:?} of a queue of {m} for {n} queries"
    );
    let dims = Dims { n, d, m, temperature, own };
    let device = q.tape().device().clone();
    let (q_value, k_value) = (q.value().clone(), k.value().clone());
    let queue = negatives.queue.clone();
    let mut lse = Tensor::floats(&device, [n]); // log Σ exp of each query
    let loss = match device.kind() {
        DeviceKind::Cpu => {
            let mut workspace = Tensor::floats(&device, [cpu::workspace_len(&dims)]);
            let (lse, workspace) = (lse.data_mut(), workspace.data_mut());
            let (q, k, queue) = (q_value.data(), k_value.data(), queue.data());
            device.run(|| cpu::forward(lse, workspace, [q, k, queue], &dims))
        }
        DeviceKind::Cuda => crate::ops::no_cuda("info_nce"),
        DeviceKind::Reference => reference::forward(
            lse.data_mut(),
            [q_value.data(), k_value.data(), queue.data()],
            &dims,
        ),
    };
    let y = Tensor::from_f64(&device, [], &[loss]);
    let (q_id, k_id) = (q.id(), k.id());
    q.tape().record("info_nce", y, &[q, k], move |dy, gradients| {
        let scale = dy.scalar() / (dims.n as f64 * dims.temperature);
        if q_id != VarId::Constant {
            let mut dq = q_value.empty_like();
            match device.kind() {
                DeviceKind::Cpu => {
                    let mut workspace = Tensor::floats(&device, [cpu::workspace_len(&dims)]);
                    let (dq, workspace) = (dq.data_mut(), workspace.data_mut());
                    let (q, k, queue) = (q_value.data(), k_value.data(), queue.data());
                    let lse = lse.data();
                    device.run(|| {
                        cpu::query_gradient(dq, workspace, [q, k, queue], lse, &dims, scale);
                    });
                }
                DeviceKind::Cuda => crate::ops::no_cuda("info_nce"),
                DeviceKind::Reference => reference::query_gradient(
                    dq.data_mut(),
                    [q_value.data(), k_value.data(), queue.data()],
                    lse.data(),
                    &dims,
                    scale,
                ),
            }
            gradients.add(q_id, dq);
        }
        if k_id != VarId::Constant {
            let mut dk = k_value.empty_like();
            match device.kind() {
                DeviceKind::Cpu => cpu::key_gradient(
                    dk.data_mut(),
                    [q_value.data(), k_value.data()],
                    lse.data(),
                    &dims,
                    scale,
                ),
                DeviceKind::Cuda => crate::ops::no_cuda("info_nce"),
                DeviceKind::Reference => reference::key_gradient(
                    dk.data_mut(),
                    [q_value.data(), k_value.data()],
                    lse.data(),
                    &dims,
                    scale,
                ),
            }
            gradients.add(k_id, dk);
        }
    })
}

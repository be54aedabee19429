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
mod cuda;
mod reference;

use std::ops::Range;

use crate::device::DeviceKind;
use crate::tape::{Var, VarId};
use crate::tensor::{DType, Tensor};

/// What queries are told apart from.
#[derive(Clone, Debug)]
pub struct Negatives<'a> {
    /// Unit rows `[m, d]`; they must not change before the backward pass has run.
    pub queue: &'a Tensor,
    /// Begin and end of the rows of the queue that hold this batch's keys, view after view: two i32 on the device, where a
    /// step that is replayed finds those of its turn. Query `i` of `n` leaves out the rows whose place in the range is `i`
    /// modulo `n`. None for MoCo, whose queue holds past batches only.
    pub own: Option<&'a Tensor>,
}

/// The sizes of the loss.
#[derive(Clone, Debug)]
struct InfoNceDims {
    n: usize,
    d: usize,
    /// Rows of the queue.
    m: usize,
    temperature: f64,
    /// Empty on a GPU, which finds it in its memory.
    own: Range<usize>,
}

impl InfoNceDims {
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
/// When shapes do not fit, there are no queries, the temperature is not positive, or, on the host, `own` leaves the queue or
/// is no multiple of `n` rows.
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
    let device = q.tape().device().clone();
    let own = negatives.own.cloned();
    let dims = InfoNceDims { n, d, m, temperature, own: own_rows(own.as_ref(), n, m) };
    let [q, k] = &[q, k].map(|x| super::cast(x, DType::of(&device)));
    let (q_value, k_value) = (q.value().clone(), k.value().clone());
    let queue = negatives.queue.clone();
    let mut lse = Tensor::floats(&device, [n]); // log Σ exp of each query
    let scalar = |loss: f64| Tensor::from_f64(&device, [], &[loss]);
    let mut split = None; // a GPU's
    let y = match device.kind() {
        DeviceKind::Cpu => {
            let mut workspace = Tensor::floats(&device, [cpu::workspace_len(&dims)]);
            let (lse, workspace) = (lse.data_mut(), workspace.data_mut());
            let (q, k, queue) = (q_value.data(), k_value.data(), queue.data());
            scalar(device.run(|| cpu::forward(lse, workspace, [q, k, queue], &dims)))
        }
        DeviceKind::Cuda => {
            let inputs =
                cuda::Inputs { q: &q_value, k: &k_value, queue: &queue, own: own.as_ref() };
            let (loss, planes) = cuda::forward(&mut lse, inputs, &dims);
            split = Some(planes);
            loss
        }
        DeviceKind::Reference => {
            let inputs = [q_value.data(), k_value.data(), queue.data()];
            scalar(reference::forward(lse.data_mut(), inputs, &dims))
        }
    };
    let (q_id, k_id) = (q.id(), k.id());
    q.tape().record("info_nce", y, &[q, k], move |dy, gradients| {
        let scale = || dy.scalar() / (dims.n as f64 * dims.temperature); // on a GPU it stays there
        let inputs = cuda::Inputs { q: &q_value, k: &k_value, queue: &queue, own: own.as_ref() };
        if q_id != VarId::Constant {
            let mut dq = q_value.empty_like();
            match device.kind() {
                DeviceKind::Cpu => {
                    let mut workspace = Tensor::floats(&device, [cpu::workspace_len(&dims)]);
                    let (dq, workspace) = (dq.data_mut(), workspace.data_mut());
                    let (q, k, queue) = (q_value.data(), k_value.data(), queue.data());
                    let (lse, scale) = (lse.data(), scale());
                    device.run(|| {
                        cpu::query_gradient(dq, workspace, [q, k, queue], lse, &dims, scale);
                    });
                }
                DeviceKind::Cuda => {
                    let split = split.as_ref().expect("the forward pass made them");
                    cuda::query_gradient(&mut dq, inputs, split, &lse, &dy, &dims);
                }
                DeviceKind::Reference => reference::query_gradient(
                    dq.data_mut(),
                    [q_value.data(), k_value.data(), queue.data()],
                    lse.data(),
                    &dims,
                    scale(),
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
                    scale(),
                ),
                DeviceKind::Cuda => cuda::key_gradient(&mut dk, inputs, &lse, &dy, &dims),
                DeviceKind::Reference => reference::key_gradient(
                    dk.data_mut(),
                    [q_value.data(), k_value.data()],
                    lse.data(),
                    &dims,
                    scale(),
                ),
            }
            gradients.add(k_id, dk);
        }
    })
}

/// The range that `own` holds, where the host can look.
#[track_caller]
fn own_rows(own: Option<&Tensor>, n: usize, m: usize) -> Range<usize> {
    let Some(own) = own else { return 0..0 };
    assert_eq!(own.len(), 2, "info_nce: own rows have a begin and an end, not {:?}", own.shape());
    if own.device().kind() == DeviceKind::Cuda {
        return 0..0;
    }
    let [begin, end] = [0, 1].map(|i| usize::try_from(own.data::<i32>()[i]).unwrap_or(usize::MAX));
    assert!(
        begin <= end && end <= m && (end - begin).is_multiple_of(n),
        "info_nce: own rows {begin}..{end} of a queue of {m} for {n} queries"
    );
    begin..end
}

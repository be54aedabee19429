//! InfoNCE with a queue of negatives (MoCo, eq. 1, arXiv:1911.05722).
//!
//! `q [n, d]` queries, `k [n, d]` their keys, `queue [m, d]` negatives, all rows of unit length:
//! `L = mean_i (log (exp(<q_i, k_i> / T) + Σ_j exp(<q_i, queue_j> / T)) - <q_i, k_i> / T)`; a scalar.
//!
//! If the queue already holds keys of this batch (SimCLR v2's memory, "current and past batches"), a query excludes those of
//! its own image: [`Negatives::own`].
//!
//! With `p_ij = exp(s_ij / T - lse_i)`: `dq_i = ((p_i+ - 1) k_i + Σ_j p_ij queue_j) dL / (n T)`,
//! `dk_i = (p_i+ - 1) q_i dL / (n T)`; the queue has no gradient. Both passes compute logits in tiles and
//! never store them: at n = 256 MoCo's would take 64 MiB. The maximum to subtract is the bound `1 / T`, or below T = 0.025 the
//! running maximum.

mod cpu;
mod cuda;
mod reference;

use std::ops::Range;

use crate::device::DeviceKind;
use crate::tape::{Var, VarId};
use crate::tensor::{DType, Tensor};

/// The negatives of [`info_nce`].
#[derive(Clone, Debug)]
pub struct Negatives<'a> {
    /// Unit rows `[m, d]`, which must not change until the backward pass has run.
    pub queue: &'a Tensor,
    /// Begin and end of the rows of the queue that hold this batch's keys, view after view: two i32 on the device, so that a
    /// replayed step reads current values. Query `i` of a batch of `n`, all ranks' queries in rank order, excludes the rows whose
    /// offset in the range is `i` modulo `n`.
    /// `None` for MoCo, whose queue holds only past batches.
    pub own: Option<&'a Tensor>,
}

/// The sizes of the loss.
#[derive(Clone, Debug)]
struct InfoNceDims {
    n: usize,
    d: usize,
    /// Number of rows in the queue.
    m: usize,
    temperature: f64,
    /// Empty on a GPU, whose kernels read the range from memory.
    own: Range<usize>,
    /// Number of queries of the batch, and the place of the first of this rank among them.
    batch: usize,
    first: usize,
}

impl InfoNceDims {
    /// Whether query `i` excludes row `j` of the queue.
    fn skips(&self, i: usize, j: usize) -> bool {
        self.own.contains(&j) && (j - self.own.start) % self.batch == self.first + i
    }

    /// The rows of the queue among `columns` that query `i` excludes.
    fn skipped(&self, i: usize, columns: Range<usize>) -> impl Iterator<Item = usize> {
        let all = (self.own.start + self.first + i..self.own.end).step_by(self.batch);
        all.filter(move |j| columns.contains(j))
    }
}

/// Returns the mean InfoNCE loss of unit queries `q [n, d]` with keys `k [n, d]` and `negatives`; a scalar.
/// `temperature > 0`.
///
/// ```
/// # use selfsup::{arena::{Arena, Layout}, device::Device, ops, tape, tensor::Tensor};
/// # let mut arena = Arena::new(&std::sync::Arc::new(Layout::new()), &Device::reference(), 0);
/// # let device = arena.device().clone();
/// let q = Tensor::from_f64(&device, [1, 2], &[1.0, 0.0]);
/// let queue = Tensor::from_f64(&device, [1, 2], &[0.0, 1.0]);
/// let negatives = ops::Negatives { queue: &queue, own: None };
/// let loss = tape::forward(&mut arena, |tape| {
///     ops::info_nce(&tape.input(&q), &tape.input(&q), &negatives, 1.0)
/// })?;
/// assert!((loss.scalar() - ((1.0_f64.exp() + 1.0).ln() - 1.0)).abs() < 1e-12);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Panics
/// If shapes do not fit, there are no queries, the temperature is not positive, or, on the host, `own` exceeds the queue or its
/// length is not a multiple of `n`.
#[track_caller]
pub fn info_nce<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    negatives: &Negatives<'_>,
    temperature: f64,
) -> Var<'t> {
    q.tape().expect_inputs("info_nce", &[q, k]);
    for tensor in [Some(negatives.queue), negatives.own].into_iter().flatten() {
        tensor.expect_on(q.tape().device(), "info_nce");
    }
    let [n, d] = q.value().dims("info_nce: the queries");
    let [m, queue_d] = negatives.queue.dims("info_nce: the queue");
    assert_eq!(q.shape(), k.shape(), "info_nce: queries {:?}, keys {:?}", q.shape(), k.shape());
    assert_eq!(d, queue_d, "info_nce: queries {:?}, queue [{m}, {queue_d}]", q.shape());
    assert!(n > 0 && d > 0, "info_nce: no queries in [{n}, {d}]");
    assert!(temperature > 0.0, "info_nce: temperature {temperature}");
    let device = q.tape().device().clone();
    let own = negatives.own.cloned();
    let group = q.tape().group();
    let (batch, first) = (n * group.size(), n * group.rank());
    let rows = own_rows(own.as_ref(), batch, m);
    let dims = InfoNceDims { n, d, m, temperature, own: rows, batch, first };
    let [q, k] = &[q, k].map(|x| super::cast(x, DType::of(&device)));
    let mut saved = Saved {
        q: q.value().clone(),
        k: k.value().clone(),
        queue: negatives.queue.clone(),
        own,
        lse: Tensor::floats(&device, [n]),
        terms: None,
        dims,
    };
    let y = saved.forward();
    let (q_id, k_id) = (q.id(), k.id());
    q.tape().record("info_nce", y, &[q, k], move |dy, gradients| {
        if q_id != VarId::Constant {
            gradients.add(q_id, saved.query_gradient(&dy));
        }
        if k_id != VarId::Constant {
            gradients.add(k_id, saved.key_gradient(&dy));
        }
    })
}

/// What the backward pass reads.
struct Saved {
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    /// [`Negatives::own`].
    own: Option<Tensor>,
    /// `[n]`, the log-sum-exp of each query's logits.
    lse: Tensor,
    /// The bf16 terms of queries and queue, only on a GPU.
    terms: Option<cuda::Terms>,
    dims: InfoNceDims,
}

impl Saved {
    fn cuda_inputs(&self) -> cuda::Inputs<'_> {
        cuda::Inputs { q: &self.q, k: &self.k, queue: &self.queue, own: self.own.as_ref() }
    }

    fn workspace(&self) -> Tensor {
        Tensor::floats(self.q.device(), [cpu::workspace_len(&self.dims)])
    }

    /// The factor of the gradients. Not on a GPU, which would have to wait for `dy`.
    fn scale(&self, dy: &Tensor) -> f64 {
        dy.scalar() / (self.dims.n as f64 * self.dims.temperature)
    }

    /// Returns the loss and fills in `lse` and `terms`.
    fn forward(&mut self) -> Tensor {
        let device = self.q.device().clone();
        // Filled apart from `self`, which the inputs borrow.
        let mut lse = Tensor::floats(&device, [self.dims.n]);
        let scalar = |loss: f64| Tensor::from_f64(&device, [], &[loss]);
        let loss = match device.kind() {
            DeviceKind::Cpu => {
                let mut workspace = self.workspace();
                let (lse, workspace) = (lse.data_mut(), workspace.data_mut());
                let inputs = [&self.q, &self.k, &self.queue].map(Tensor::data::<f32>);
                scalar(device.run(|| cpu::forward(lse, workspace, inputs, &self.dims)))
            }
            DeviceKind::Cuda => {
                let (loss, terms) = cuda::forward(&mut lse, self.cuda_inputs(), &self.dims);
                self.terms = Some(terms);
                loss
            }
            DeviceKind::Reference => {
                let inputs = [&self.q, &self.k, &self.queue].map(Tensor::data::<f64>);
                scalar(reference::forward(lse.data_mut(), inputs, &self.dims))
            }
        };
        self.lse = lse;
        loss
    }

    /// Returns `dq`.
    fn query_gradient(&self, dy: &Tensor) -> Tensor {
        let (mut dq, dims, lse) = (self.q.empty_like(), &self.dims, &self.lse);
        let device = self.q.device();
        match device.kind() {
            DeviceKind::Cpu => {
                let (mut workspace, scale) = (self.workspace(), self.scale(dy));
                let (dq, workspace) = (dq.data_mut(), workspace.data_mut());
                let inputs = [&self.q, &self.k, &self.queue].map(Tensor::data::<f32>);
                let lse = lse.data();
                device.run(|| cpu::query_gradient(dq, workspace, inputs, lse, dims, scale));
            }
            DeviceKind::Cuda => {
                let terms = self.terms.as_ref().expect("the forward pass computes them");
                cuda::query_gradient(&mut dq, self.cuda_inputs(), terms, lse, dy, dims);
            }
            DeviceKind::Reference => {
                let inputs = [&self.q, &self.k, &self.queue].map(Tensor::data::<f64>);
                let scale = self.scale(dy);
                reference::query_gradient(dq.data_mut(), inputs, lse.data(), dims, scale);
            }
        }
        dq
    }

    /// Returns `dk`.
    fn key_gradient(&self, dy: &Tensor) -> Tensor {
        let (mut dk, dims, lse) = (self.k.empty_like(), &self.dims, &self.lse);
        match self.k.device().kind() {
            DeviceKind::Cpu => {
                let (pair, scale) = ([self.q.data(), self.k.data()], self.scale(dy));
                cpu::key_gradient(dk.data_mut(), pair, lse.data(), dims, scale);
            }
            DeviceKind::Cuda => cuda::key_gradient(&mut dk, self.cuda_inputs(), lse, dy, dims),
            DeviceKind::Reference => {
                let (pair, scale) = ([self.q.data(), self.k.data()], self.scale(dy));
                reference::key_gradient(dk.data_mut(), pair, lse.data(), dims, scale);
            }
        }
        dk
    }
}

/// Returns the range in `own`, or an empty one on a GPU.
#[track_caller]
fn own_rows(own: Option<&Tensor>, n: usize, m: usize) -> Range<usize> {
    let Some(own) = own else { return 0..0 };
    assert_eq!(own.len(), 2, "info_nce: own rows need a begin and an end, not {:?}", own.shape());
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

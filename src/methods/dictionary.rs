//! MoCo's two other dictionaries, with which the paper compares its queue (section 4.1, arXiv:1911.05722).

use serde::Deserialize;

use super::RunInfo;
use crate::arena::Arena;
use crate::device::{Device, Philox, Purpose};
use crate::ops::{
    Negatives, add, cross_entropy, gather_rows, info_nce, l2_normalize, linear, scale, write_rows,
};
use crate::tape::{Var, forward_in_step};
use crate::tensor::Tensor;

/// Which keys a query must tell apart: MoCo's dictionary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dictionary {
    /// Keys of past batches from the momentum encoder. This is MoCo.
    #[default]
    Queue,
    /// The keys of the current batch, with a gradient.
    EndToEnd,
    /// One stored key per image of the data set, from which negatives are drawn (Wu et al. 2018, arXiv:1805.01978).
    MemoryBank,
}

/// InfoNCE of queries `q [m, d]` against the keys `k [n, d]` of the batch. `labels [m]` holds the row of each query's key: 0, 1, …,
/// n - 1, or a rank's share of them.
pub(super) fn batch_loss<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    labels: &Tensor,
    temperature: f64,
) -> Var<'t> {
    let logits = scale(&linear(q, k, None), 1.0 / temperature); // [m, n]
    cross_entropy(&logits, labels)
}

/// InfoNCE of queries `q [n, d]` against rows of `bank [images, d]`, given the row numbers of the queries' images and of the
/// negatives. Also returns the stored keys `[n, d]` of the queries' images.
pub(super) fn bank_loss<'t>(
    q: &Var<'t>,
    bank: &Tensor,
    [positives, negatives]: &[Tensor; 2],
    temperature: f64,
) -> (Var<'t>, Tensor) {
    let bank = q.tape().input(bank);
    let k = gather_rows(&bank, positives); // [n, d]
    let negatives = gather_rows(&bank, negatives); // [count, d]
    let negatives = Negatives { queue: negatives.value(), own: None };
    (info_nce(q, &k, &negatives, temperature), k.value().clone())
}

/// Row numbers in the bank of a batch's images and of `count` random negatives. As in the paper, a negative may be one of the
/// batch's images.
pub(super) fn draw_rows(
    device: &Device,
    run: &RunInfo,
    indices: &[u32],
    count: usize,
    step: u64,
) -> [Tensor; 2] {
    // Minor stream 0 draws the initial contents of the bank.
    let mut rng = Philox::new(run.seed, Purpose::Queue, step as u32, 1);
    let images = run.images as f64;
    let draw = |_| (f64::from(rng.uniform()) * images) as i32;
    let negatives: Vec<i32> = (0..count).map(draw).collect();
    let positives: Vec<i32> = indices.iter().map(|&i| i as i32).collect();
    [positives, negatives].map(|rows| Tensor::from_slice(device, [rows.len()], &rows))
}

/// Writes `m old + (1 - m) new`, normalised to unit length, to the rows of `bank` that `positions` names.
pub(super) fn blend_rows(
    online: &mut Arena,
    bank: &mut Tensor,
    positions: &Tensor,
    rows: [&Tensor; 2],
    m: f64,
) {
    let blend = forward_in_step(online, |tape| {
        let [old, new] = rows.map(|rows| tape.input(rows));
        l2_normalize(&add(&scale(&old, m), &scale(&new, 1.0 - m)))
    });
    for i in 0..positions.len() {
        write_rows(bank, &positions.slice(i, [1]), &blend.rows(i, 1));
    }
}

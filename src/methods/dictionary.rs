//! MoCo's other dictionaries, which its paper compares the queue with (section 4.1, arXiv:1911.05722).

use serde::Deserialize;

use super::RunInfo;
use crate::arena::Arena;
use crate::device::{Device, Philox, Purpose};
use crate::ops::{
    Negatives, add, cross_entropy, gather_rows, info_nce, l2_normalize, linear, scale, write_rows,
};
use crate::tape::{Var, forward_in_step};
use crate::tensor::Tensor;

/// What queries are told apart from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dictionary {
    /// Keys of past batches from the momentum encoder: MoCo.
    #[default]
    Queue,
    /// The keys of the batch, with a gradient.
    EndToEnd,
    /// Keys of images as they were last seen, drawn from all of the set (Wu et al. 2018, arXiv:1805.01978).
    MemoryBank,
}

/// InfoNCE of queries `[n, d]` against the keys `[n, d]` of the same images and of all others of the batch; `own [n]` counts
/// from 0.
pub(super) fn of_the_batch<'t>(
    q: &Var<'t>,
    k: &Var<'t>,
    own: &Tensor,
    temperature: f64,
) -> Var<'t> {
    let logits = scale(&linear(q, k, None), 1.0 / temperature); // [n, n]
    cross_entropy(&logits, own)
}

/// InfoNCE of queries `[n, d]` against rows of `bank [images, d]`: places of the queries' own images and of the negatives. Also
/// returns the images' own rows.
pub(super) fn of_the_bank<'t>(
    q: &Var<'t>,
    bank: &Tensor,
    [places, drawn]: &[Tensor; 2],
    temperature: f64,
) -> (Var<'t>, Tensor) {
    let bank = q.tape().input(bank);
    let k = gather_rows(&bank, places); // [n, d]
    let drawn = gather_rows(&bank, drawn); // [count, d]
    let negatives = Negatives { queue: drawn.value(), own: None };
    (info_nce(q, &k, &negatives, temperature), k.value().clone())
}

/// Places in the bank of a batch's images, and of `count` negatives, which may be among them, as in the paper.
pub(super) fn draw(
    device: &Device,
    course: &RunInfo,
    indices: &[u32],
    count: usize,
    step: u64,
) -> [Tensor; 2] {
    // Minor stream 0 draws what the bank starts with.
    let mut rng = Philox::new(course.seed, Purpose::Queue, step as u32, 1);
    let images = course.images as f64;
    let one = |_| (f64::from(rng.uniform()) * images) as i32;
    let drawn: Vec<i32> = (0..count).map(one).collect();
    let places: Vec<i32> = indices.iter().map(|&i| i as i32).collect();
    [places, drawn].map(|places| Tensor::from_slice(device, [places.len()], &places))
}

/// Puts `m old + (1 - m) new`, brought to unit length, in the images' places of the bank.
pub(super) fn blend(
    online: &mut Arena,
    bank: &mut Tensor,
    places: &Tensor,
    rows: [&Tensor; 2],
    m: f64,
) {
    let blend = forward_in_step(online, |tape| {
        let [old, new] = rows.map(|rows| tape.input(rows));
        l2_normalize(&add(&scale(&old, m), &scale(&new, 1.0 - m)))
    });
    for i in 0..places.len() {
        write_rows(bank, &places.slice(i, [1]), &blend.rows(i, 1));
    }
}

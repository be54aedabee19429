//! MoCo v1 (He et al. 2019, arXiv:1911.05722) and v2 (Chen et al. 2020, arXiv:2003.04297).
//!
//! Each image gives two views. The query, the embedding of one view by the trained encoder, must find the key of the other view
//! among tens of thousands of keys of other images. Keys come from a momentum encoder, a slow moving average of the trained one.
//! A queue holds the keys of past batches, so many negatives do not need a large batch, and the slow average keeps old keys
//! comparable. v2 replaces the linear head by a two-layer one, raises the temperature, adds blur and decays the learning rate by
//! a cosine. Batch norm could reveal a key by the statistics of its batch: rows are normalised in small groups, and the images
//! of keys are shuffled between the groups.
//!
//! `L = -mean_i log (exp(q_i k_i / T) / (exp(q_i k_i / T) + Σ_j exp(q_i queue_j / T)))` (eq. 1)
//!
//! ```text
//!         ┌─ view 1 ─ encoder ─────────────────── q ─┐
//! image ──┤              │ m (before the keys)       ├─ q finds k among the queue
//!         └─ view 2 ─ momentum encoder, no gradient k ┘
//!                                                  └──> queue, after the backward pass; the oldest keys leave
//! ```
//!
//! The momentum encoder is updated before it encodes the keys, from the weights after the previous step. Parameters are
//! averaged; running statistics are not. The loss reads the queue before the keys of the batch replace its oldest keys, which
//! happens after the backward pass. `symmetric` adds the loss with the views exchanged. Both halves use the same queue: the keys
//! of the first half must not enter it before the second half is computed, or they would be negatives of their own images.
//!
//! **Settings**: [`Settings`]. Section 4.1 of the paper compares three dictionaries, and `selfsup study moco-dictionary` repeats
//! the comparison: the queue; `end-to-end`, where the keys of the batch are the dictionary and get a gradient, so the dictionary
//! is only as large as the batch; and a `memory-bank` of one key per image of the data set, which is blended with the query of
//! its image in every step that sees it, and from which negatives are drawn (Wu et al. 2018, arXiv:1805.01978).
//!
//! **Deviations**: contiguous groups of rows on one device replace the reference's GPUs in batch norm. In `end-to-end` one encoder
//! produces both queries and keys. `[source]` of each recipe lists its own (`selfsup recipes NAME`).
//!
//! **Monitors**: the loss starts near `ln(K + 1)`, 11.09 for the published queue, or below it while the queue holds random rows,
//! which are easy to tell apart. It *rises* while keys replace them (`queue_filled` goes to 1) and then falls slowly. The rise
//! is not a failure. `positive_similarity` grows, `negative_similarity` stays near 0 with a narrow histogram. `queue_age` is the
//! mean age of keys in steps; together with `target_distance`, the lag of the momentum encoder, it shows how comparable the keys
//! are. `mutual_information_bound` is `ln(K + 1) - L`. The standard deviation of the embeddings stays near 1 (in units of
//! `1/sqrt(d)`).
//!
//! **Run it**: `selfsup train moco-v2-cifar10-small --set data.path=PATH`.

use std::sync::Arc;

use serde::Deserialize;

use super::dictionary;
pub use super::dictionary::Dictionary;
use super::monitors::{Reading, Readings, distance, information, similarities};
use crate::arena::{Arena, Layout};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::methods::{
    Coupling, Method, RunInfo, State, momentum_in_range, temperature, view, widths,
};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{
    Negatives, add, concat_rows, gather_ranks, gather_rows, info_nce, l2_normalize, slice_rows,
    write_rows,
};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor, gather_views, pick_views};

/// MoCo's settings: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// K, the number of keys in the queue: 65,536 for ImageNet. A multiple of the keys of a step. With a memory bank, the number
    /// of negatives of a step.
    pub queue: usize,
    /// m, the weight of the momentum encoder's old value, in `0..=1`: 0.999.
    pub momentum: f64,
    /// Temperature T, > 0: 0.07 in v1, 0.2 in v2.
    pub temperature: f64,
    /// Width of v2's hidden layer; 0 for v1's linear head.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// Whether the images of keys are shuffled between the groups of batch norm.
    pub shuffle: bool,
    /// Whether each view serves once as query and once as key; the two losses are added (the authors' CIFAR-10 notebook).
    #[serde(default)]
    pub symmetric: bool,
    /// Which keys a query must tell apart.
    #[serde(default)]
    pub dictionary: Dictionary,
    /// With a memory bank, the weight of an image's old key when a new one is blended in, in `0..=1`.
    #[serde(default = "half")]
    pub bank_momentum: f64,
}

fn half() -> f64 {
    0.5
}

impl Default for Settings {
    /// The settings of v2 for ImageNet.
    fn default() -> Self {
        Self {
            queue: 65_536,
            momentum: 0.999,
            temperature: 0.2,
            hidden: 2048,
            embedding: 128,
            shuffle: true,
            symmetric: false,
            dictionary: Dictionary::Queue,
            bank_momentum: half(),
        }
    }
}

/// MoCo: backbone and head, the momentum encoder's weights and the queue.
pub struct MoCo {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    settings: Settings,
    run_state: Option<RunState>,
    /// A permutation of the batch and its inverse, for each half of the loss; empty without shuffling.
    shuffles: Vec<[Numbers<i32>; 2]>,
    /// Keys of the last loss, of all ranks, which [`MoCo::enqueue`] puts into the queue.
    keys: Vec<Tensor>,
    embeddings: Option<Tensor>,
    /// Queries and keys of the last loss, for the monitors.
    monitored: Option<[Tensor; 2]>,
    iteration: u64,
    /// Images of this rank per micro-batch, in a step of several micro-batches.
    micro_batch: Option<usize>,
    /// With a memory bank: row numbers of the batch's images and of the negatives.
    bank_rows: Option<[Tensor; 2]>,
}

/// What the method owns during a run, created by [`Method::start`].
struct RunState {
    momentum_encoder: Arena,
    /// m.
    momentum: Numbers<f64>,
    /// Unit rows `[K, embedding]`; of a memory bank `[images, embedding]`.
    queue: Tensor,
    /// Queue: for each half of the loss, the first of the rows that its keys overwrite, which hold the oldest keys. End to end:
    /// the row of each query's key.
    positions: Numbers<i32>,
    run: RunInfo,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    temperature(settings.temperature)?;
    momentum_in_range(settings.momentum, "momentum")?;
    momentum_in_range(settings.bank_momentum, "bank_momentum")?;
    widths(&[(settings.queue, "queue"), (settings.embedding, "embedding")])?;
    if settings.dictionary != Dictionary::Queue && settings.symmetric {
        return Err(Error::config("method.symmetric is for method.dictionary = \"queue\""));
    }
    Ok(Box::new(MoCo::new(network, &settings)))
}

/// Random unit rows from a normal distribution: the initial contents of the queue.
pub(super) fn random_rows(device: &Device, rows: usize, d: usize, seed: u64) -> Tensor {
    let mut values = Vec::with_capacity(rows * d);
    for row in 0..rows {
        let mut rng = Philox::new(seed, Purpose::Queue, row as u32, 0);
        let row: Vec<f64> = (0..d).map(|_| rng.normal()).collect();
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
        values.extend(row.iter().map(|v| f64::from((v / norm) as f32)));
    }
    Tensor::from_f64(device, [rows, d], &values)
}

impl MoCo {
    /// Describes the network: slots under `backbone.` and `head.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        let layer =
            |width, relu| MlpLayer { width, bias: true, norm: NormKind::None, relu, std: None };
        let mut layers = vec![layer(settings.embedding, false)];
        if settings.hidden > 0 {
            layers.insert(0, layer(settings.hidden, true));
        }
        let head = Mlp::new(&mut layout, "head", backbone.features(), &layers, 1);
        let (layout, settings) = (Arc::new(layout), *settings);
        Self {
            layout,
            backbone,
            head,
            settings,
            run_state: None,
            shuffles: Vec::new(),
            keys: Vec::new(),
            embeddings: None,
            monitored: None,
            iteration: 0,
            micro_batch: None,
            bank_rows: None,
        }
    }

    /// Encodes images `[n, s, s, 4]` to unit embeddings `[n, embedding]`.
    pub fn encode<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// The same with the images shuffled before the encoder and the embeddings put back in order after it.
    fn encode_shuffled<'t>(&self, images: &Var<'t>, half: usize) -> Var<'t> {
        match self.shuffles.get(half) {
            Some([shuffle, unshuffle]) => {
                let shuffled = gather_rows(images, shuffle.tensor());
                gather_rows(&self.encode(&shuffled), unshuffle.tensor())
            }
            None => self.encode(images),
        }
    }

    /// Encodes images `[n, s, s, 4]` to keys `[n, embedding]` with the momentum encoder, without a gradient. `half` (0, or 1 in a
    /// symmetric loss) picks the shuffle.
    ///
    /// # Panics
    /// If called before [`Method::start`].
    pub fn encode_keys(&mut self, images: &Tensor, half: usize) -> Tensor {
        self.encode_all_keys(images, half)[0].clone()
    }

    /// The keys of this rank's images, and those of all ranks in the order of the batch.
    fn encode_all_keys(&mut self, images: &Tensor, half: usize) -> [Tensor; 2] {
        let mut state = self.run_state.take().expect("moco: start comes before the first step");
        let encoder = &mut state.momentum_encoder;
        let rows = self.micro_batch.unwrap_or(images.shape()[0]);
        let keys = if rows < images.shape()[0] || encoder.group().size() > 1 {
            self.encode_keys_in_parts(encoder, images, half, rows)
        } else {
            let k =
                forward_in_step(encoder, |tape| self.encode_shuffled(&tape.input(images), half));
            [k.clone(), k]
        };
        self.run_state = Some(state);
        keys
    }

    /// The same in micro-batches of `rows` images of this rank. The shuffle spans the complete batch, so that the groups of batch
    /// norm mix as they do in an undivided step on one rank.
    fn encode_keys_in_parts(
        &self,
        encoder: &mut Arena,
        images: &Tensor,
        half: usize,
        rows: usize,
    ) -> [Tensor; 2] {
        let (group, count) = (encoder.group().clone(), images.shape()[0] / rows);
        let own = |all: &Tensor| pick_views(all, count, group.size(), group.rank());
        let shuffle = self.shuffles.get(half);
        let images = shuffle.map_or(images.clone(), |[order, _]| {
            let all = gather_views(images, count, &group, "images of keys");
            forward_in_step(encoder, |tape| gather_rows(&tape.input(&all), &own(order.tensor())))
        });
        let part = |i: usize| images.rows(i * rows, rows);
        let parts: Vec<Tensor> = (0..count)
            .map(|i| forward_in_step(encoder, |tape| self.encode(&tape.input(&part(i)))))
            .collect();
        let keys = forward_in_step(encoder, |tape| {
            concat_rows(&parts.iter().map(|part| tape.input(part)).collect::<Vec<_>>())
        });
        let all = gather_views(&keys, count, &group, "keys");
        let all = shuffle.map_or(all.clone(), |[_, inverse]| {
            forward_in_step(encoder, |tape| gather_rows(&tape.input(&all), inverse.tensor()))
        });
        [own(&all), all]
    }

    /// Computes one half of the loss: queries of `x_q` against keys of `x_k`. Keeps the keys for [`MoCo::enqueue`].
    pub fn half<'t>(
        &mut self,
        tape: &'t Tape<'t>,
        [x_q, x_k]: [&Tensor; 2],
        half: usize,
    ) -> Var<'t> {
        let q = self.encode(&tape.input(x_q)); // [n, embedding]
        self.contrast(&q, x_k, half)
    }

    /// The loss of queries `q [n, embedding]` against keys of `x_k`.
    fn contrast<'t>(&mut self, q: &Var<'t>, x_k: &Tensor, half: usize) -> Var<'t> {
        let [k, all] = match self.settings.dictionary {
            Dictionary::Queue => self.encode_all_keys(x_k, half), // [n, embedding]
            Dictionary::EndToEnd => return self.end_to_end(q, x_k),
            Dictionary::MemoryBank => return self.against_bank(q),
        };
        let state = self.run_state.as_ref().expect("created by start");
        let negatives = Negatives { queue: &state.queue, own: None };
        let loss = info_nce(q, &q.tape().input(&k), &negatives, self.settings.temperature);
        self.keep_for_monitors(q, &k);
        self.keys.push(all);
        loss
    }

    /// The loss with the batch as dictionary: gradients flow into the keys.
    fn end_to_end<'t>(&mut self, q: &Var<'t>, x_k: &Tensor) -> Var<'t> {
        let (tape, group) = (q.tape(), q.tape().group());
        let own = |all: &Tensor| pick_views(all, 1, group.size(), group.rank());
        let k = match self.shuffles.first() {
            Some([order, inverse]) if group.size() > 1 => {
                let all = gather_views(x_k, 1, group, "images of keys");
                let shuffled = gather_rows(&tape.input(&all), &own(order.tensor()));
                let keys = gather_ranks(&self.encode(&shuffled), 1);
                gather_rows(&keys, inverse.tensor())
            }
            _ => gather_ranks(&self.encode_shuffled(&tape.input(x_k), 0), 1),
        }; // those of all ranks
        self.keep_for_monitors(q, &own(k.value()));
        let state = self.run_state.as_ref().expect("moco: start comes before the first step");
        let labels = own(state.positions.tensor());
        dictionary::batch_loss(q, &k, &labels, self.settings.temperature)
    }

    /// The loss with a memory bank: the key of an image is its row of the bank. The new keys are blended in after the update.
    fn against_bank<'t>(&mut self, q: &Var<'t>) -> Var<'t> {
        let state = self.run_state.as_ref().expect("moco: start comes before the first step");
        let rows = self.bank_rows.as_ref().expect("moco: samples come before the loss");
        let (loss, k) = dictionary::bank_loss(q, &state.queue, rows, self.settings.temperature);
        self.keep_for_monitors(q, &k);
        loss
    }

    fn keep_for_monitors(&mut self, q: &Var<'_>, k: &Tensor) {
        self.embeddings = Some(q.value().clone());
        self.monitored = Some([q.value().clone(), k.clone()]);
    }

    /// Blends the queries of the batch into the bank's rows of their images.
    fn update_bank(&mut self, online: &mut Arena) {
        let state = self.run_state.as_mut().expect("moco: start comes before the first step");
        if let (Some([q, k]), Some([rows, _])) = (&self.monitored, self.bank_rows.take()) {
            let momentum = self.settings.bank_momentum;
            let [q, k, rows] =
                [q, k, &rows].map(|own| gather_views(own, 1, online.group(), "rows of the bank"));
            dictionary::blend_rows(online, &mut state.queue, &rows, [&k, &q], momentum);
        }
    }

    /// Replaces the oldest keys of the queue by the keys of the last loss.
    pub fn enqueue(&mut self) {
        let state = self.run_state.as_mut().expect("moco: start comes before the first step");
        for (half, k) in self.keys.drain(..).enumerate() {
            write_rows(&mut state.queue, &state.positions.tensor().slice(half, [1]), &k);
        }
    }
}

impl Method for MoCo {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    /// All keys alike. At the start the keys of the queue are random, and the own key is the query itself: it wins by far.
    fn chance_loss(&self) -> f64 {
        let halves = if self.settings.symmetric { 2.0 } else { 1.0 };
        halves * (1.0 + self.settings.queue as f64).ln()
    }

    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        let Settings { queue, embedding, symmetric, dictionary, .. } = self.settings;
        let keys = if symmetric { 2 * run.batch } else { run.batch };
        if dictionary == Dictionary::Queue && !queue.is_multiple_of(keys) {
            let reason =
                format!("method.queue is {queue}, not a multiple of the {keys} keys of a step");
            return Err(Error::Config(reason));
        }
        let (device, batch) = (online.device(), run.batch);
        let halves = if symmetric { 2 } else { 1 };
        let indices = || [(); 2].map(|()| Numbers::new(device, &vec![0; batch]));
        let shuffled = if self.settings.shuffle { halves } else { 0 };
        self.shuffles = (0..shuffled).map(|_| indices()).collect();
        // Only the queue has a momentum encoder.
        let empty = || Arena::new(&Arc::new(Layout::new()), device, run.seed);
        let (momentum_encoder, rows, positions) = match dictionary {
            Dictionary::Queue => (online.twin(), queue, vec![0; halves]),
            Dictionary::EndToEnd => (empty(), 0, (0..batch as i32).collect()),
            Dictionary::MemoryBank => (empty(), run.images, Vec::new()),
        };
        self.run_state = Some(RunState {
            momentum_encoder,
            momentum: Numbers::new(device, &[self.settings.momentum]),
            queue: random_rows(device, rows, embedding, run.seed),
            positions: Numbers::new(device, &positions),
            run: *run,
        });
        Ok(())
    }

    fn samples(&mut self, indices: &[u32]) {
        let bank = self.settings.dictionary == Dictionary::MemoryBank;
        if let Some(state) = self.run_state.as_ref().filter(|_| bank) {
            let (device, count) = (state.queue.device(), self.settings.queue);
            let rows = dictionary::draw_rows(device, &state.run, indices, count, self.iteration);
            self.bank_rows = Some(rows);
        }
    }

    fn prepare(&mut self, iteration: u64) {
        self.iteration = iteration;
        let Some(RunState { run, positions, .. }) = &mut self.run_state else { return };
        if self.settings.dictionary == Dictionary::Queue {
            let halves = positions.values().len() as u64;
            let position = |half| {
                let keys = (iteration * halves + half) * run.batch as u64;
                (keys % self.settings.queue as u64) as i32
            };
            positions.set(&(0..halves).map(position).collect::<Vec<_>>());
        }
        for (half, [shuffle, unshuffle]) in self.shuffles.iter_mut().enumerate() {
            let (step, half) = (iteration as u32, half as u32);
            let mut rng = Philox::new(run.seed, Purpose::Shuffle, step, half);
            let mut order: Vec<i32> = (0..run.batch as i32).collect();
            rng.shuffle(&mut order);
            let mut inverse = vec![0; order.len()];
            order.iter().enumerate().for_each(|(to, &from)| inverse[from as usize] = to as i32);
            shuffle.set(&order);
            unshuffle.set(&inverse);
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        if self.settings.dictionary != Dictionary::Queue {
            return;
        }
        let state = self.run_state.as_mut().expect("moco: start comes before the first step");
        ema(&mut state.momentum_encoder, online, &state.momentum);
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.micro_batch = None;
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let loss = self.half(tape, [&x1, &x2], 0);
        if !self.settings.symmetric {
            return loss;
        }
        add(&loss, &self.half(tape, [&x2, &x1], 1))
    }

    fn without_cuda(&self) -> Option<&'static str> {
        (self.settings.dictionary == Dictionary::MemoryBank).then_some("a memory bank")
    }

    fn coupling(&self) -> Coupling {
        match self.settings.dictionary {
            Dictionary::Queue => {
                Coupling::Batch { views: if self.settings.symmetric { 2 } else { 1 } }
            }
            _ => Coupling::Whole,
        }
    }

    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        self.micro_batch = Some(x1.shape()[0]);
        let q = self.encode(&tape.input(&x1)); // [m, embedding]
        if !self.settings.symmetric {
            return q;
        }
        concat_rows(&[q, self.encode(&tape.input(&x2))])
    }

    fn couple<'t>(&mut self, z: Var<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        if !self.settings.symmetric {
            return self.contrast(&z, &x2, 0);
        }
        let n = x1.shape()[0];
        let first = self.contrast(&slice_rows(&z, 0, n), &x2, 0);
        add(&first, &self.contrast(&slice_rows(&z, n, n), &x1, 1))
    }

    fn without_ranks(&self) -> Option<&'static str> {
        None
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, online: &Arena, _: Option<&Tensor>, loss: f64) -> Readings {
        let (Some(state), Some([q, k])) = (&self.run_state, &self.monitored) else {
            return Readings::new();
        };
        let [q, k] = [q, k].map(|rows| gather_views(rows, 1, online.group(), "monitors"));
        let Settings { queue, symmetric, dictionary, .. } = self.settings;
        if dictionary == Dictionary::EndToEnd {
            let mut readings = similarities(&q, &k, None);
            readings.push(information(q.shape()[0], loss));
            return readings;
        }
        let mut readings = similarities(&q, &k, Some(&state.queue));
        let halves = if symmetric { 2 } else { 1 };
        readings.push(information(queue + 1, loss / halves as f64));
        if dictionary == Dictionary::Queue {
            let capacity = (queue / (halves * state.run.batch)) as u64; // steps whose keys fit
            let held = (self.iteration + 1).min(capacity);
            readings.push(("queue_filled", Reading::Number(held as f64 / capacity as f64)));
            readings.push(("queue_age", Reading::Number((held + 1) as f64 / 2.0)));
            readings.push(distance(online, &state.momentum_encoder));
        }
        readings
    }

    // The keys must not enter earlier: the backward pass still reads the queue that the loss used.
    fn after_update(&mut self, online: &mut Arena, _: f64) {
        match self.settings.dictionary {
            Dictionary::Queue => self.enqueue(),
            Dictionary::EndToEnd => {}
            Dictionary::MemoryBank => self.update_bank(online),
        }
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let Some(state) = &mut self.run_state else { return Vec::new() };
        match self.settings.dictionary {
            Dictionary::Queue => {}
            Dictionary::EndToEnd => return Vec::new(),
            Dictionary::MemoryBank => return vec![("bank", State::Rows(&mut state.queue))],
        }
        vec![
            ("key", State::Network(&mut state.momentum_encoder)),
            ("queue", State::Rows(&mut state.queue)),
        ]
    }
}

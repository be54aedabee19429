//! MoCo v1 (He et al. 2019, arXiv:1911.05722) and v2 (Chen et al. 2020, arXiv:2003.04297).
//!
//! Each image is seen twice. A query from the trained encoder must find, among tens of thousands of keys of other images, the
//! key that a slowly following copy of the encoder gives its other view. The keys of past batches wait in a queue, so that
//! many negatives need no large batch; the copy moves slowly, so that old keys stay comparable. v2 puts a two-layer head in
//! place of the linear one, raises the temperature, blurs, and decays by a cosine. Batch norm could find a key by its batch
//! alone: rows are normalised in small groups, and keys' images are shuffled between them.
//!
//! `L = -mean_i log (exp(q_i k_i / T) / (exp(q_i k_i / T) + Σ_j exp(q_i queue_j / T)))` (eq. 1)
//!
//! ```text
//!         ┌─ view 1 ─ encoder ─────────────── q ─┐
//! image ──┤              │ m (before the keys)   ├─ q finds k among the queue
//!         └─ view 2 ─ key encoder, no gradient k ┘
//!                                              └──> queue, after the backward pass; the oldest leave
//! ```
//!
//! The key encoder moves before the keys are made, from weights as the last step left them; parameters are averaged,
//! running statistics are not. The queue is read before the batch's keys replace its oldest ones, which happens after the
//! backward pass. `symmetric` adds the loss with views exchanged, both against one queue: neither half's keys are in it
//! before the other has been computed, or they would be negatives of their own images.
//!
//! **Settings**: [`Settings`]. The paper's section 4.1 compares three dictionaries, and so can you
//! (`selfsup study moco-dictionary`): the queue; `end-to-end`, where the keys of the batch are the dictionary and have a
//! gradient, so that it is as large as the batch; and a `memory-bank` of one key for each image of the set, blended with the
//! image's query whenever it is seen, from which negatives are drawn (Wu et al. 2018, arXiv:1805.01978).
//!
//! **Deviations**: groups of batch norm are runs of rows on one device, for the reference's GPUs. End to end, one encoder makes
//! queries and keys.
//!
//! **Monitors**: the loss starts near `ln(K + 1)`, 11.09 for the published queue, or below it while the queue holds random rows,
//! which are easy to tell apart: it *rises* while keys replace them (`queue_filled` to 1), then falls slowly. That is no
//! failure. `positive_similarity` grows, `negative_similarity` stays near 0 with a narrow histogram.
//! `queue_age` is the mean age of keys in steps; with `target_distance`, how far the key encoder lags, it says how comparable
//! they are. `mutual_information_bound` is `ln(K + 1) - L`. The embeddings' deviation stays near 1.
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
    Coupling, Method, RunInfo, State, above_zero, momentum_in_range, view, widths,
};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{
    Negatives, add, concat_rows, gather_rows, info_nce, l2_normalize, slice_rows, write_rows,
};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor};

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// K, keys that wait: 65,536 for ImageNet. A multiple of the keys of a step. Of a memory bank, the negatives of a step.
    pub queue: usize,
    /// m, the share of the key encoder that stays: 0.999.
    pub momentum: f64,
    /// T: 0.07 in v1, 0.2 in v2.
    pub temperature: f64,
    /// Width of v2's hidden layer; 0 for v1's linear head.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// Whether keys' images are shuffled between batch norm's groups.
    pub shuffle: bool,
    /// Whether each view is query and key once, both losses added (the authors' CIFAR-10 notebook).
    #[serde(default)]
    pub symmetric: bool,
    /// What queries are told apart from.
    #[serde(default)]
    pub dictionary: Dictionary,
    /// The share of its old key that an image keeps in a memory bank.
    #[serde(default = "half")]
    pub bank_momentum: f64,
}

fn half() -> f64 {
    0.5
}

impl Default for Settings {
    /// v2's, for ImageNet.
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

/// The description, the key encoder's weights and the queue.
pub struct MoCo {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    settings: Settings,
    own: Option<Own>,
    /// A permutation of the batch and its inverse, for each half of the loss; none without shuffling.
    shuffles: Vec<[Numbers<i32>; 2]>,
    /// What the last loss left for the queue.
    keys: Vec<Tensor>,
    embeddings: Option<Tensor>,
    /// Queries and their keys of the last loss, for the monitors.
    seen: Option<[Tensor; 2]>,
    iteration: u64,
    /// Images of a micro-batch, in a step of several.
    part: Option<usize>,
    /// Of a memory bank: the places of the batch's images, and of the negatives.
    places: Option<[Tensor; 2]>,
}

/// What a run gives a method to own.
struct Own {
    key: Arena,
    /// m.
    momentum: Numbers<f64>,
    /// Unit rows `[K, embedding]`; a memory bank's `[images, embedding]`.
    queue: Tensor,
    /// The rows that each half's keys overwrite, from this one on: the oldest. End to end, each query's own key.
    places: Numbers<i32>,
    course: RunInfo,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    above_zero(settings.temperature, "temperature")?;
    momentum_in_range(settings.momentum, "momentum")?;
    momentum_in_range(settings.bank_momentum, "bank_momentum")?;
    widths(&[(settings.queue, "queue"), (settings.embedding, "embedding")])?;
    if settings.dictionary != Dictionary::Queue && settings.symmetric {
        return Err(Error::config("method.symmetric is for method.dictionary = \"queue\""));
    }
    Ok(Box::new(MoCo::new(network, &settings)))
}

/// Unit rows of normal numbers: what the queue holds before keys do.
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
    /// The backbone under `backbone.`, the head under `head.`.
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
            own: None,
            shuffles: Vec::new(),
            keys: Vec::new(),
            embeddings: None,
            seen: None,
            iteration: 0,
            part: None,
            places: None,
        }
    }

    /// Images to unit embeddings `[n, embedding]`.
    pub fn encode<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// Unit embeddings whose images are shuffled on the way in and put back on the way out.
    fn encode_shuffled<'t>(&self, images: &Var<'t>, half: usize) -> Var<'t> {
        match self.shuffles.get(half) {
            Some([shuffle, unshuffle]) => {
                let shuffled = gather_rows(images, shuffle.tensor());
                gather_rows(&self.encode(&shuffled), unshuffle.tensor())
            }
            None => self.encode(images),
        }
    }

    /// Keys of images `[n, s, s, 4]` from the momentum encoder, shuffled on the way in and put back on the way out; no
    /// gradient.
    ///
    /// # Panics
    /// Before [`Method::start`].
    pub fn encode_keys(&mut self, images: &Tensor, half: usize) -> Tensor {
        let mut own = self.own.take().expect("moco: start comes before the first step");
        let k = match self.part {
            Some(rows) => self.encode_keys_in_parts(&mut own.key, images, half, rows),
            None => forward_in_step(&mut own.key, |tape| {
                self.encode_shuffled(&tape.input(images), half)
            }),
        };
        self.own = Some(own);
        k
    }

    /// The same, `rows` images at a time: shuffled among all of the batch, as batch norm's groups would see them.
    fn encode_keys_in_parts(
        &self,
        key: &mut Arena,
        images: &Tensor,
        half: usize,
        rows: usize,
    ) -> Tensor {
        let shuffle = self.shuffles.get(half);
        let images = shuffle.map_or(images.clone(), |[order, _]| {
            forward_in_step(key, |tape| gather_rows(&tape.input(images), order.tensor()))
        });
        let part = |i: usize| images.rows(i * rows, rows);
        let parts: Vec<Tensor> = (0..images.shape()[0] / rows)
            .map(|i| forward_in_step(key, |tape| self.encode(&tape.input(&part(i)))))
            .collect();
        forward_in_step(key, |tape| {
            let parts: Vec<_> = parts.iter().map(|part| tape.input(part)).collect();
            let all = concat_rows(&parts);
            shuffle.map_or(all.clone(), |[_, back]| gather_rows(&all, back.tensor()))
        })
    }

    /// One half of the loss: queries of `x_q` against keys of `x_k`, which are kept for the queue.
    pub fn half<'t>(
        &mut self,
        tape: &'t Tape<'t>,
        [x_q, x_k]: [&Tensor; 2],
        half: usize,
    ) -> Var<'t> {
        let q = self.encode(&tape.input(x_q)); // [n, embedding]
        self.contrast(&q, x_k, half)
    }

    /// The loss of queries `[n, embedding]` against keys of `x_k`.
    fn contrast<'t>(&mut self, q: &Var<'t>, x_k: &Tensor, half: usize) -> Var<'t> {
        let k = match self.settings.dictionary {
            Dictionary::Queue => self.encode_keys(x_k, half), // [n, embedding]
            Dictionary::EndToEnd => return self.end_to_end(q, x_k),
            Dictionary::MemoryBank => return self.against_bank(q),
        };
        let own = self.own.as_ref().expect("made by start");
        let negatives = Negatives { queue: &own.queue, own: None };
        let loss = info_nce(q, &q.tape().input(&k), &negatives, self.settings.temperature);
        self.see(q, &k);
        self.keys.push(k);
        loss
    }

    /// The batch is the dictionary, and gradients flow into its keys.
    fn end_to_end<'t>(&mut self, q: &Var<'t>, x_k: &Tensor) -> Var<'t> {
        let k = self.encode_shuffled(&q.tape().input(x_k), 0); // [n, embedding]
        self.see(q, k.value());
        let own = self.own.as_ref().expect("moco: start comes before the first step");
        dictionary::of_the_batch(q, &k, own.places.tensor(), self.settings.temperature)
    }

    /// Keys are the images' own of the last time that they were seen; the new ones blend in after the update.
    fn against_bank<'t>(&mut self, q: &Var<'t>) -> Var<'t> {
        let own = self.own.as_ref().expect("moco: start comes before the first step");
        let places = self.places.as_ref().expect("moco: samples come before the loss");
        let (loss, k) = dictionary::of_the_bank(q, &own.queue, places, self.settings.temperature);
        self.see(q, &k);
        loss
    }

    fn see(&mut self, q: &Var<'_>, k: &Tensor) {
        self.embeddings = Some(q.value().clone());
        self.seen = Some([q.value().clone(), k.clone()]);
    }

    /// Blends the batch's queries into its images' keys.
    fn update_bank(&mut self, online: &mut Arena) {
        let own = self.own.as_mut().expect("moco: start comes before the first step");
        if let (Some([q, k]), Some([places, _])) = (&self.seen, self.places.take()) {
            dictionary::blend(online, &mut own.queue, &places, [k, q], self.settings.bank_momentum);
        }
    }

    /// Puts the keys of the last loss in place of the oldest ones.
    pub fn enqueue(&mut self) {
        let own = self.own.as_mut().expect("moco: start comes before the first step");
        for (half, k) in self.keys.drain(..).enumerate() {
            write_rows(&mut own.queue, &own.places.tensor().slice(half, [1]), &k);
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

    fn start(&mut self, online: &Arena, course: &RunInfo) -> Result<()> {
        let Settings { queue, embedding, symmetric, dictionary, .. } = self.settings;
        let keys = if symmetric { 2 * course.batch } else { course.batch };
        if dictionary == Dictionary::Queue && !queue.is_multiple_of(keys) {
            let reason =
                format!("method.queue is {queue}, no multiple of the {keys} keys of a step");
            return Err(Error::Config(reason));
        }
        let (device, batch) = (online.device(), course.batch);
        let halves = if symmetric { 2 } else { 1 };
        let indices = || [(); 2].map(|()| Numbers::new(device, &vec![0; batch]));
        let shuffled = if self.settings.shuffle { halves } else { 0 };
        self.shuffles = (0..shuffled).map(|_| indices()).collect();
        // Nothing follows the encoder but where there is a queue.
        let nothing = || Arena::new(&Arc::new(Layout::new()), device, course.seed);
        let (key, rows, places) = match dictionary {
            Dictionary::Queue => (online.twin(), queue, vec![0; halves]),
            Dictionary::EndToEnd => (nothing(), 0, (0..batch as i32).collect()),
            Dictionary::MemoryBank => (nothing(), course.images, Vec::new()),
        };
        self.own = Some(Own {
            key,
            momentum: Numbers::new(device, &[self.settings.momentum]),
            queue: random_rows(device, rows, embedding, course.seed),
            places: Numbers::new(device, &places),
            course: *course,
        });
        Ok(())
    }

    fn samples(&mut self, indices: &[u32]) {
        let bank = self.settings.dictionary == Dictionary::MemoryBank;
        if let Some(own) = self.own.as_ref().filter(|_| bank) {
            let (device, count) = (own.key.device(), self.settings.queue);
            self.places =
                Some(dictionary::draw(device, &own.course, indices, count, self.iteration));
        }
    }

    fn prepare(&mut self, iteration: u64) {
        self.iteration = iteration;
        let Some(Own { course, places, .. }) = &mut self.own else { return };
        if self.settings.dictionary == Dictionary::Queue {
            let halves = places.values().len() as u64;
            let place = |half| {
                let keys = (iteration * halves + half) * course.batch as u64;
                (keys % self.settings.queue as u64) as i32
            };
            places.set(&(0..halves).map(place).collect::<Vec<_>>());
        }
        for (half, [shuffle, unshuffle]) in self.shuffles.iter_mut().enumerate() {
            let (step, half) = (iteration as u32, half as u32);
            let mut rng = Philox::new(course.seed, Purpose::Shuffle, step, half);
            let mut order: Vec<i32> = (0..course.batch as i32).collect();
            rng.shuffle(&mut order);
            let mut back = vec![0; order.len()];
            order.iter().enumerate().for_each(|(place, &row)| back[row as usize] = place as i32);
            shuffle.set(&order);
            unshuffle.set(&back);
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        if self.settings.dictionary != Dictionary::Queue {
            return;
        }
        let own = self.own.as_mut().expect("moco: start comes before the first step");
        ema(&mut own.key, online, &own.momentum);
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.part = None;
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
        self.part = Some(x1.shape()[0]);
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

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, online: &Arena, _: Option<&Tensor>, loss: f64) -> Readings {
        let (Some(own), Some([q, k])) = (&self.own, &self.seen) else { return Readings::new() };
        let Settings { queue, symmetric, dictionary, .. } = self.settings;
        if dictionary == Dictionary::EndToEnd {
            let mut readings = similarities(q, k, None);
            readings.push(information(q.shape()[0], loss));
            return readings;
        }
        let mut readings = similarities(q, k, Some(&own.queue));
        let halves = if symmetric { 2 } else { 1 };
        readings.push(information(queue + 1, loss / halves as f64));
        if dictionary == Dictionary::Queue {
            let all = (queue / (halves * own.course.batch)) as u64; // steps whose keys fit
            let held = (self.iteration + 1).min(all);
            readings.push(("queue_filled", Reading::Number(held as f64 / all as f64)));
            readings.push(("queue_age", Reading::Number((held + 1) as f64 / 2.0)));
            readings.push(distance(online, &own.key));
        }
        readings
    }

    // Not before: the backward pass still reads the queue as the loss saw it.
    fn after_update(&mut self, online: &mut Arena, _: f64) {
        match self.settings.dictionary {
            Dictionary::Queue => self.enqueue(),
            Dictionary::EndToEnd => {}
            Dictionary::MemoryBank => self.update_bank(online),
        }
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let Some(own) = &mut self.own else { return Vec::new() };
        match self.settings.dictionary {
            Dictionary::Queue => {}
            Dictionary::EndToEnd => return Vec::new(),
            Dictionary::MemoryBank => return vec![("bank", State::Rows(&mut own.queue))],
        }
        vec![("key", State::Network(&mut own.key)), ("queue", State::Rows(&mut own.queue))]
    }
}

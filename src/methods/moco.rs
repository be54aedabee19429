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
//! The key encoder moves before the keys are made, from weights as the last step left them; parameters are averaged,
//! running statistics are not. The queue is read before the batch's keys replace its oldest ones, which happens after the
//! backward pass. `symmetric` adds the loss with views exchanged, both against one queue: neither half's keys are in it
//! before the other has been computed, or they would be negatives of their own images.
//!
//! What to expect: the loss starts near `ln(K + 1)` once the queue has real keys, rises while random rows leave it, then
//! falls slowly; the embeddings' deviation stays near 1. `selfsup train moco-v2-cifar10-small`.
//!
//! Deviations: groups of batch norm are runs of rows on one device, for the reference's GPUs.

use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Arena, Layout};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::methods::{Course, Method, State, above_zero, momentum_in_range, view, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{Negatives, add, gather_rows, info_nce, l2_normalize, write_rows};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward};
use crate::tensor::Tensor;

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// K, keys that wait: 65,536 for ImageNet. A multiple of the keys of a step.
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
}

/// The description, the key encoder's weights and the queue.
pub struct MoCo {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    settings: Settings,
    own: Option<Own>,
    /// A permutation of the batch and its inverse, for each half of the loss.
    shuffles: Vec<[Tensor; 2]>,
    /// The rows of the queue that each half's keys go to, from this one on; on the device.
    places: Option<Tensor>,
    /// What the last loss left for the queue.
    keys: Vec<Tensor>,
    embeddings: Option<Tensor>,
}

/// What a run gives a method to own.
struct Own {
    key: Arena,
    /// Unit rows `[K, embedding]`.
    queue: Tensor,
    /// The row that the next step overwrites first: follows from the iteration, and is kept for who reads a checkpoint.
    oldest: u64,
    course: Course,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = super::recipe::table(table, "method")?;
    above_zero(settings.temperature, "temperature")?;
    momentum_in_range(settings.momentum, "momentum")?;
    widths(&[(settings.queue, "queue"), (settings.embedding, "embedding")])?;
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
    /// The trunk under `backbone.`, the head under `head.`.
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
            places: None,
            keys: Vec::new(),
            embeddings: None,
        }
    }

    /// Images to unit embeddings `[n, embedding]`.
    pub fn encode<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// Keys of images `[n, s, s, 4]` from the momentum encoder, shuffled on the way in and put back on the way out; no
    /// gradient.
    ///
    /// # Panics
    /// Before [`Method::start`].
    pub fn encode_keys(&mut self, images: &Tensor, half: usize) -> Tensor {
        let mut own = self.own.take().expect("moco: start comes before the first step");
        let k = forward(&mut own.key, |tape| match self.shuffles.get(half) {
            Some([shuffle, unshuffle]) => {
                let x = gather_rows(&tape.input(images), shuffle);
                gather_rows(&self.encode(&x), unshuffle)
            }
            None => self.encode(&tape.input(images)),
        });
        self.own = Some(own);
        k.expect("a forward pass on this device works") // the online one has just done so
    }

    /// One half of the loss: queries of `x_q` against keys of `x_k`, which are kept for the queue.
    pub fn half<'t>(
        &mut self,
        tape: &'t Tape<'t>,
        [x_q, x_k]: [&Tensor; 2],
        half: usize,
    ) -> Var<'t> {
        let q = self.encode(&tape.input(x_q)); // [n, embedding]
        let k = self.encode_keys(x_k, half); // [n, embedding]
        let own = self.own.as_ref().expect("made by start");
        let negatives = Negatives { queue: &own.queue, own: None };
        let loss = info_nce(&q, &tape.input(&k), &negatives, self.settings.temperature);
        self.embeddings = Some(q.value().clone());
        self.keys.push(k);
        loss
    }

    /// Puts the keys of the last loss in place of the oldest ones.
    pub fn enqueue(&mut self) {
        let own = self.own.as_mut().expect("moco: start comes before the first step");
        let places = self.places.as_ref().expect("moco: prepare comes before a step");
        for (half, k) in self.keys.drain(..).enumerate() {
            write_rows(&mut own.queue, &places.slice(half, [1]), &k);
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

    fn start(&mut self, online: &Arena, course: &Course) -> Result<()> {
        let Settings { queue, embedding, symmetric, .. } = self.settings;
        let keys = if symmetric { 2 * course.batch } else { course.batch };
        if !queue.is_multiple_of(keys) {
            let reason =
                format!("method.queue is {queue}, no multiple of the {keys} keys of a step");
            return Err(Error::Config(reason));
        }
        let queue = random_rows(online.device(), queue, embedding, course.seed);
        self.own = Some(Own { key: online.twin(), queue, oldest: 0, course: *course });
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        let Some(own) = &mut self.own else { return };
        let (device, course, queue) =
            (own.key.device().clone(), own.course, self.settings.queue as u64);
        let halves = if self.settings.symmetric { 2 } else { 1 };
        let index = |order: &[i32]| Tensor::from_slice(&device, [order.len()], order);
        let keys = halves * course.batch as u64;
        let first = iteration * keys % queue;
        own.oldest = (first + keys) % queue;
        let place = |half| (first + half * course.batch as u64) as i32;
        self.places = Some(index(&(0..halves).map(place).collect::<Vec<_>>()));
        if !self.settings.shuffle {
            return;
        }
        let draw = |half| {
            let mut rng = Philox::new(course.seed, Purpose::Shuffle, iteration as u32, half);
            let mut order: Vec<i32> = (0..course.batch as i32).collect();
            rng.shuffle(&mut order);
            let mut back = vec![0; order.len()];
            order.iter().enumerate().for_each(|(place, &row)| back[row as usize] = place as i32);
            [index(&order), index(&back)]
        };
        self.shuffles = (0..halves as u32).map(draw).collect();
    }

    fn before_step(&mut self, online: &mut Arena) {
        let own = self.own.as_mut().expect("moco: start comes before the first step");
        ema(&mut own.key, online, self.settings.momentum);
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let loss = self.half(tape, [&x1, &x2], 0);
        if !self.settings.symmetric {
            return loss;
        }
        add(&loss, &self.half(tape, [&x2, &x1], 1))
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    // Not before: the backward pass still reads the queue as the loss saw it.
    fn after_update(&mut self, _: &mut Arena, _: f64) {
        self.enqueue();
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let Some(own) = &mut self.own else { return Vec::new() };
        vec![
            ("key", State::Network(&mut own.key)),
            ("queue", State::Rows(&mut own.queue)),
            ("oldest", State::Count(&mut own.oldest)),
        ]
    }
}

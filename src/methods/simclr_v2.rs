//! SimCLR v2 (Chen et al. 2020, arXiv:2006.10029), as google-research/simclr trains it.
//!
//! Three stages for few labels: pretrain a big network without labels, fine-tune it with the few, distil what it then says of
//! all images into a small one. Pretraining is SimCLR with a wider, deeper backbone (selective kernels, ResNet-D), a head of
//! three layers, and optionally a memory of keys from a momentum encoder. Fine-tuning starts from the middle of the head: its
//! first layer stays part of the network ([`supervised`](super::supervised) with `head_layers = 1`). The fewer the labels, the
//! more a deep head and a big network help. Distillation needs no labels ([`distill`](super::distill)).
//!
//! Without memory the loss is SimCLR's. With memory, both views' embeddings are queries; keys, positives and negatives alike,
//! come from the momentum encoder, "current and past batches, consistent with MoCo" (google-research/simclr#54): this batch's
//! keys enter the memory first, and a query leaves out those of its own image there:
//! `L = InfoNCE(z1 -> k2) + InfoNCE(z2 -> k1)`.
//!
//! ```text
//! all images ── views 1, 2 ── big backbone ─ head 1 ─ head 2 ─ head 3 ── NT-Xent       1. pretrain
//! few labels ──── crop ────── big backbone ─ head 1 ─ fc ── cross-entropy              2. fine-tune
//! all images ──┬─ crop ────── big backbone ─ head 1 ─ fc ── softmax(/ T) ─┐
//!              └─ crop ────── student ───────────── fc ── softmax(/ T) ───┴─ cross-entropy 3. distil
//! ```
//!
//! **Settings**: [`Settings`], and those of the two other stages. `selfsup study simclr-v2-head` fine-tunes one pretrained
//! network from 0, 1 and 2 layers of its head with shares of the labels.
//!
//! **Deviations**: the memory is in no public code; size (64K) and momentum (0.999) are from secondary accounts of the paper.
//! Pooling after the stem pads both sides, where TensorFlow's `SAME` pads one. Filters start as PyTorch's do unless
//! `truncated_init` is set.
//!
//! **Monitors**: as [SimCLR's](super::simclr). With memory the loss is about `2 ln(memory)` at first, and `target_distance` says
//! how far the key encoder lags. Memory is worth about one point. Distillation's loss falls to the teacher's own entropy.
//!
//! **Run it**: `selfsup train simclr-v2-cifar10-small --set data.path=PATH`, then `simclr-v2-finetune-cifar10-small` and
//! `simclr-v2-distill-cifar10-small`.

use std::sync::Arc;

use serde::Deserialize;

use super::monitors::{Readings, distance, information, similarities};
use super::simclr::TRUNCATION;
use crate::arena::{Arena, Layout, SlotKind};
use crate::error::{Error, Result};
use crate::methods::moco::random_rows;
use crate::methods::{Coupling, Method, RunInfo, State, above_zero, momentum_in_range, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{Negatives, add, info_nce, l2_normalize, nt_xent, scale, slice_rows, write_rows};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor};

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// T: 0.1.
    pub temperature: f64,
    /// Width of the head's two hidden layers: the backbone's features.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// Keys in memory, a multiple of twice the batch: 65,536; 0 for none.
    #[serde(default)]
    pub memory: usize,
    /// The share of the key encoder that stays: 0.999.
    #[serde(default = "slow")]
    pub momentum: f64,
    /// Whether filters start truncated normal, as in the reference code.
    #[serde(default)]
    pub truncated_init: bool,
}

impl Default for Settings {
    /// The public code's, for ResNet-50.
    fn default() -> Self {
        Self {
            temperature: 0.1,
            hidden: 2048,
            embedding: 128,
            memory: 0,
            momentum: slow(),
            truncated_init: false,
        }
    }
}

fn slow() -> f64 {
    0.999
}

/// Layers of the head.
pub const HEAD_LAYERS: usize = 3;

/// The first `keep` layers of the head over `inputs` features, under `head.`: fine-tuning keeps 0, 1 or all of them.
pub(super) fn head(
    layout: &mut Layout,
    prefix: &str,
    inputs: usize,
    [hidden, embedding, keep]: [usize; 3],
    groups: usize,
) -> Mlp {
    let layer = |width, norm, relu| MlpLayer { width, bias: false, norm, relu, std: Some(0.01) };
    let layers = [
        layer(hidden, NormKind::Affine, true),
        layer(hidden, NormKind::Affine, true),
        layer(embedding, NormKind::ScaleOnly, false),
    ];
    Mlp::new(layout, &format!("{prefix}head"), inputs, &layers[..keep], groups)
}

/// The description, and with memory the key encoder's weights and its keys.
pub struct SimClrV2 {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    settings: Settings,
    memory: Option<Memory>,
    embeddings: Option<Tensor>,
    /// With memory, the keys `[n, embedding]` that the first view's embeddings were to find, for the monitors.
    seen: Option<Tensor>,
}

struct Memory {
    key: Arena,
    /// m.
    momentum: Numbers<f64>,
    /// Unit rows `[memory, embedding]`.
    keys: Tensor,
    /// Keys of a step.
    entering: u64,
    /// Begin and end of the rows that this step's keys go to, in place of the oldest.
    place: Numbers<i32>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    above_zero(settings.temperature, "temperature")?;
    momentum_in_range(settings.momentum, "momentum")?;
    widths(&[(settings.hidden, "hidden"), (settings.embedding, "embedding")])?;
    Ok(Box::new(SimClrV2::new(network, &settings)))
}

impl SimClrV2 {
    /// The backbone under `backbone.`, the head under `head.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        if settings.truncated_init {
            layout.start_truncated(&[SlotKind::Filter], 1.0 / TRUNCATION);
        }
        let sizes = [settings.hidden, settings.embedding, HEAD_LAYERS];
        let head = head(&mut layout, "", backbone.features(), sizes, network.norm_groups);
        let (layout, settings) = (Arc::new(layout), *settings);
        Self { layout, backbone, head, settings, memory: None, embeddings: None, seen: None }
    }

    /// Images to unit embeddings `[rows, embedding]`.
    pub fn embed<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// Both views' embeddings against both views' keys and the memory.
    fn contrast_with_memory<'t>(&self, z: &Var<'t>, k: &Tensor, memory: &Memory) -> Var<'t> {
        let n = z.shape()[0] / 2;
        // This batch's keys have just been written there.
        let negatives = Negatives { queue: &memory.keys, own: Some(memory.place.tensor()) };
        let [k1, k2] = [0, n].map(|from| z.tape().input(&k.rows(from, n)));
        let [z1, z2] = [0, n].map(|from| slice_rows(z, from, n));
        let t = self.settings.temperature;
        add(&info_nce(&z1, &k2, &negatives, t), &info_nce(&z2, &k1, &negatives, t))
    }
}

impl Method for SimClrV2 {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn start(&mut self, online: &Arena, course: &RunInfo) -> Result<()> {
        let Settings { memory, embedding, .. } = self.settings;
        if memory == 0 {
            return Ok(());
        }
        let keys = 2 * course.batch;
        if !memory.is_multiple_of(keys) {
            let reason =
                format!("method.memory is {memory}, no multiple of the {keys} keys of a step");
            return Err(Error::Config(reason));
        }
        let (device, entering) = (online.device(), keys as u64);
        self.memory = Some(Memory {
            key: online.twin(),
            momentum: Numbers::new(device, &[self.settings.momentum]),
            keys: random_rows(device, memory, embedding, course.seed),
            entering,
            place: Numbers::new(device, &[0, entering as i32]),
        });
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        if let Some(Memory { keys, entering, place, .. }) = &mut self.memory {
            let first = iteration * *entering % keys.shape()[0] as u64;
            place.set(&[first as i32, (first + *entering) as i32]);
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        if let Some(memory) = &mut self.memory {
            ema(&mut memory.key, online, &memory.momentum);
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let z = self.embed_part(tape, views); // [2n, embedding]
        self.couple(z, views)
    }

    fn coupling(&self) -> Coupling {
        // The memory's keys would need parts of their own.
        if self.settings.memory > 0 { Coupling::Whole } else { Coupling::Batch { views: 2 } }
    }

    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.embed(&tape.input(&views[0]))
    }

    fn couple<'t>(&mut self, z: Var<'t>, views: &[Tensor]) -> Var<'t> {
        let n = z.shape()[0] / 2;
        self.embeddings = Some(z.value().clone());
        let Some(mut memory) = self.memory.take() else {
            return scale(&nt_xent(&z, self.settings.temperature), 2.0);
        };
        let k = forward_in_step(&mut memory.key, |tape| self.embed(&tape.input(&views[0])));
        write_rows(&mut memory.keys, &memory.place.tensor().slice(0, [1]), &k);
        let loss = self.contrast_with_memory(&z, &k, &memory);
        self.seen = Some(k.rows(n, n));
        self.memory = Some(memory);
        loss
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, online: &Arena, embeddings: Option<&Tensor>, loss: f64) -> Readings {
        let Some(z) = embeddings else { return Readings::new() };
        let n = z.shape()[0] / 2;
        let (Some(memory), Some(k)) = (&self.memory, &self.seen) else {
            let mut readings = similarities(&z.rows(0, n), &z.rows(n, n), None);
            readings.push(information(2 * n - 1, loss / 2.0));
            return readings;
        };
        let mut readings = similarities(&z.rows(0, n), k, Some(&memory.keys));
        // A query leaves out its own two keys in memory and finds one of them as its positive.
        readings.push(information(self.settings.memory - 1, loss / 2.0));
        readings.push(distance(online, &memory.key));
        readings
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let Some(memory) = &mut self.memory else { return Vec::new() };
        vec![("key", State::Network(&mut memory.key)), ("memory", State::Rows(&mut memory.keys))]
    }
}

//! SimCLR v2 (Chen et al. 2020, arXiv:2006.10029), as google-research/simclr trains it.
//!
//! Three stages make use of few labels: pretrain a big network without labels, fine-tune it with the few labels, distil its
//! predictions on all images into a small one. Pretraining is SimCLR with a wider, deeper backbone (selective kernels,
//! ResNet-D), a head of three layers, and optionally a memory of keys from a momentum encoder. Fine-tuning starts from the middle
//! of the head: its first layer stays part of the network ([`supervised`](super::supervised) with `head_layers = 1`). The fewer
//! the labels, the more a deep head and a big network help. Distillation needs no labels ([`distill`](super::distill)).
//!
//! Without memory the loss is SimCLR's. With memory, the embeddings of both views are queries; keys, positives and negatives
//! alike, come from the momentum encoder, "current and past batches, consistent with MoCo" (google-research/simclr#54). The keys
//! of the batch enter the memory first, and a query excludes the keys of its own image from its negatives:
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
//! network from 0, 1 and 2 layers of its head with fractions of the labels.
//!
//! **Deviations**: no public code has the memory; its size (64K) and momentum (0.999) are from secondary accounts of the paper.
//! Filters start as PyTorch's do unless `truncated_init` is set. The blur draws one sigma for each image, where the reference draws
//! one for the batch; running variances are unbiased. `[source]` of each recipe lists what applies to it (`selfsup recipes NAME`).
//!
//! **Monitors**: as for [SimCLR](super::simclr). With memory the loss starts at about `2 ln(memory)`, and `target_distance` is
//! the lag of the momentum encoder. Memory is worth about one point. The distillation loss falls to the entropy of the teacher's
//! predictions.
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
use crate::methods::{
    Coupling, GROUPS_OF_VIEWS, Method, RunInfo, State, momentum_in_range, temperature, widths,
};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{Negatives, add, info_nce, l2_normalize, nt_xent, scale, slice_rows, write_rows};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor, gather_views};

/// Settings of SimCLR v2's pretraining: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Temperature T, > 0: 0.1.
    pub temperature: f64,
    /// Width of the head's two hidden layers: that of the backbone's features.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// Keys in memory, a multiple of twice the batch: 65,536; 0 for no memory.
    #[serde(default)]
    pub memory: usize,
    /// The weight of the momentum encoder's old value, in `0..=1`: 0.999.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
    /// Whether filters start from a truncated normal distribution, as in the reference code.
    #[serde(default)]
    pub truncated_init: bool,
}

impl Default for Settings {
    /// The public code's settings for ResNet-50.
    fn default() -> Self {
        Self {
            temperature: 0.1,
            hidden: 2048,
            embedding: 128,
            memory: 0,
            momentum: default_momentum(),
            truncated_init: false,
        }
    }
}

fn default_momentum() -> f64 {
    0.999
}

/// Number of layers of the head.
pub const HEAD_LAYERS: usize = 3;

/// Describes the first `keep` layers of the head over `inputs` features, under `head.`. Fine-tuning keeps 0, 1 or all of them.
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

/// SimCLR v2's pretraining: backbone and head, and with memory the momentum encoder and its keys.
pub struct SimClrV2 {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    settings: Settings,
    norm_groups: usize,
    memory: Option<Memory>,
    embeddings: Option<Tensor>,
    /// For the monitors: with memory, the positive keys `[n, embedding]` of the first view's embeddings.
    monitored: Option<Tensor>,
}

struct Memory {
    encoder: Arena,
    /// m.
    momentum: Numbers<f64>,
    /// Unit rows `[memory, embedding]`.
    keys: Tensor,
    /// Keys that enter per step.
    entering: u64,
    /// Begin and end of the rows that this step's keys overwrite, which hold the oldest keys.
    window: Numbers<i32>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    temperature(settings.temperature)?;
    momentum_in_range(settings.momentum, "momentum")?;
    widths(&[(settings.hidden, "hidden"), (settings.embedding, "embedding")])?;
    Ok(Box::new(SimClrV2::new(network, &settings)))
}

impl SimClrV2 {
    /// Describes the network: slots under `backbone.` and `head.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        if settings.truncated_init {
            layout.start_truncated(&[SlotKind::Filter], 1.0 / TRUNCATION);
        }
        let sizes = [settings.hidden, settings.embedding, HEAD_LAYERS];
        let head = head(&mut layout, "", backbone.features(), sizes, network.norm_groups);
        let (layout, settings) = (Arc::new(layout), *settings);
        let norm_groups = network.norm_groups;
        let (memory, embeddings, monitored) = (None, None, None);
        Self { layout, backbone, head, settings, norm_groups, memory, embeddings, monitored }
    }

    /// Embeds images `[rows, s, s, 4]` to unit rows `[rows, embedding]`.
    pub fn embed<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// The loss with memory: the embeddings `z [2n, embedding]` of both views against the keys `k` of both views and the memory.
    fn contrast_with_memory<'t>(&self, z: &Var<'t>, k: &Tensor, memory: &Memory) -> Var<'t> {
        let n = z.shape()[0] / 2;
        // The keys of this batch are already in the memory, so each query must exclude its own image's.
        let negatives = Negatives { queue: &memory.keys, own: Some(memory.window.tensor()) };
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

    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        let Settings { memory, embedding, .. } = self.settings;
        if memory == 0 {
            return Ok(());
        }
        let keys = 2 * run.batch;
        if !memory.is_multiple_of(keys) {
            let reason =
                format!("method.memory is {memory}, not a multiple of the {keys} keys of a step");
            return Err(Error::Config(reason));
        }
        let (device, entering) = (online.device(), keys as u64);
        self.memory = Some(Memory {
            encoder: online.twin(),
            momentum: Numbers::new(device, &[self.settings.momentum]),
            keys: random_rows(device, memory, embedding, run.seed),
            entering,
            window: Numbers::new(device, &[0, entering as i32]),
        });
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        if let Some(Memory { keys, entering, window, .. }) = &mut self.memory {
            let first = iteration * *entering % keys.shape()[0] as u64;
            window.set(&[first as i32, (first + *entering) as i32]);
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        if let Some(memory) = &mut self.memory {
            ema(&mut memory.encoder, online, &memory.momentum);
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let z = self.embed_part(tape, views); // [2n, embedding]
        self.couple(z, views)
    }

    fn coupling(&self) -> Coupling {
        // The momentum encoder would have to encode its keys in micro-batches too.
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
        let k = forward_in_step(&mut memory.encoder, |tape| self.embed(&tape.input(&views[0])));
        let entering = gather_views(&k, 2, z.tape().group(), "keys");
        write_rows(&mut memory.keys, &memory.window.tensor().slice(0, [1]), &entering);
        let loss = self.contrast_with_memory(&z, &k, &memory);
        self.monitored = Some(k.rows(n, n));
        self.memory = Some(memory);
        loss
    }

    fn without_ranks(&self) -> Option<&'static str> {
        (self.norm_groups > 1).then_some(GROUPS_OF_VIEWS)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, online: &Arena, embeddings: Option<&Tensor>, loss: f64) -> Readings {
        let Some(z) = embeddings else { return Readings::new() };
        let n = z.shape()[0] / 2;
        let (Some(memory), Some(k)) = (&self.memory, &self.monitored) else {
            let mut readings = similarities(&z.rows(0, n), &z.rows(n, n), None);
            readings.push(information(2 * n - 1, loss / 2.0));
            return readings;
        };
        let k = gather_views(k, 1, online.group(), "monitors");
        let mut readings = similarities(&z.rows(0, n), &k, Some(&memory.keys));
        // A query excludes the two keys of its own image in memory and has one of them as its positive.
        readings.push(information(self.settings.memory - 1, loss / 2.0));
        readings.push(distance(online, &memory.encoder));
        readings
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let Some(memory) = &mut self.memory else { return Vec::new() };
        vec![
            ("key", State::Network(&mut memory.encoder)),
            ("memory", State::Rows(&mut memory.keys)),
        ]
    }
}

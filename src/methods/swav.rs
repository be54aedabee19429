//! SwAV (Caron et al. 2020, arXiv:2006.09882), as facebookresearch/swav trains it.
//!
//! Embeddings are compared with a few thousand learnt prototypes instead of with each other. From the scores of a large crop
//! Sinkhorn's algorithm computes a soft assignment that uses all prototypes equally, which prevents collapse. Every other crop of
//! the image, small crops included, must predict that assignment. Small crops are cheap: eight crops cost as much as three full
//! views. At small batches a queue of past embeddings helps to balance the assignments.
//!
//! `L = mean over assigning crops i of (1 / (V - 1)) Σ_{v != i} mean_n -Σ_k q_i log softmax(s_v / T)` (eq. 1 and 2), `s` the
//! scores `z · prototypes`, `q_i` the assignments of crop `i`, which are constants.
//!
//! ```text
//!         ┌─ large crop 1 ─┐                                 ┌─ s1 ─ Sinkhorn (with the queue) ─ q1 ─┐
//! image ──┼─ large crop 2 ─┼─ backbone ─ head ─ prototypes ──┼─ s2 ─ Sinkhorn ─ q2                   ├─ cross-entropy
//!         └─ small crops   ─┘                                 └─ s3, s4, … ──── softmax(s / T) ───────┘
//! ```
//!
//! A step runs the backbone once for each resolution and the head once for all rows. Prototypes have no bias. Their rows are
//! normalised to unit length at the start of every step and are not updated in the first `freeze_steps` steps. Each assigning
//! crop has a queue, newest rows first, which starts as zeros in epoch `queue_from` and is used once it is full. Its scores are
//! recomputed from the current prototypes in every step.
//!
//! **Settings**: [`Settings`]. `hard_codes` rounds each assignment to one prototype (section 3.1: worse online than soft
//! assignments). `sinkhorn_iterations = 0` removes the balancing, which is what separates SwAV from SimSiam.
//! `selfsup study swav-codes` and `swav-crops` run the comparisons.
//!
//! **Deviations**: batch norm on one device sees the complete batch, where the reference synchronises groups of 8 GPUs.
//! `[source]` of each recipe lists its own (`selfsup recipes NAME`).
//!
//! **Monitors**: the loss first stays near `ln(prototypes)`, 8.006 for 3000, and falls late: after the freeze, sometimes only
//! after tens of epochs. If it never falls, lower `epsilon` to 0.03, freeze longer, or start the queue later (README of the
//! reference code). `prototypes_used` stays near the number of prototypes, or near the number that a batch can use; near 1 is
//! collapse. `assignment_entropy`, the entropy of one image's assignment in nats, starts near `ln(prototypes)` and falls as
//! assignments sharpen. `positive_similarity` of the large crops' embeddings rises, `negative_similarity` stays low.
//!
//! **Run it**: `selfsup train swav-cifar10-small --set data.path=PATH`.

use std::sync::Arc;

use serde::Deserialize;

use super::monitors::{Reading, Readings, similarities};
use crate::arena::{Arena, Init, Layout, Param, Slot, SlotKind};
use crate::device::Group;
use crate::error::{Error, Result};
use crate::methods::{
    Coupling, GROUPS_OF_VIEWS, Method, RunInfo, State, above_zero, temperature, widths,
};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{
    concat_rows, l2_normalize, linear, mean_of, normalize_rows, push_rows, sinkhorn, slice_rows,
    soft_cross_entropy, softmax,
};
use crate::optim::ParamPolicy;
use crate::tape::{Tape, Var};
use crate::tensor::{Tensor, gather_views};

/// SwAV's settings: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Crops per image, small crops included, at least 2: 8 or 2 in the paper.
    pub crops: usize,
    /// Number of prototypes: 3000 for ImageNet.
    pub prototypes: usize,
    /// Temperature T, > 0: 0.1.
    pub temperature: f64,
    /// Smoothness of assignments, > 0: 0.05.
    pub epsilon: f64,
    /// Iterations of Sinkhorn's algorithm: 3. With 0 assignments are not balanced, `q = softmax(s / epsilon)`, and it collapses.
    pub sinkhorn_iterations: usize,
    /// Width of the head's hidden layer: 2048.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// Number of first steps in which prototypes are frozen: one epoch, 313 at batch 4096 or 5005 at 256.
    #[serde(default)]
    pub freeze_steps: u64,
    /// Embeddings in each queue, rounded down to a multiple of the batch; 0 for no queue.
    #[serde(default)]
    pub queue: usize,
    /// Epoch, counted from 0, in which the queue starts: 15.
    #[serde(default)]
    pub queue_from: u64,
    /// Whether each assignment is rounded to its largest prototype.
    #[serde(default)]
    pub hard_codes: bool,
}

impl Default for Settings {
    /// The paper's settings for ImageNet at batch 4096.
    fn default() -> Self {
        Self {
            crops: 8,
            prototypes: 3000,
            temperature: 0.1,
            epsilon: 0.05,
            sinkhorn_iterations: 3,
            hidden: 2048,
            embedding: 128,
            freeze_steps: 313,
            queue: 0,
            queue_from: 0,
            hard_codes: false,
        }
    }
}

/// A temperature so low that a softmax of assignments, which lie in `0..=1`, is one-hot at their maximum.
const HARD_TEMPERATURE: f64 = 1e-8;

/// Number of crops whose assignments are predicted: the first two, which are the large ones.
const ASSIGNING: usize = 2;

/// SwAV: backbone, head and prototypes, and the queues.
pub struct Swav {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    prototypes: Param,
    settings: Settings,
    norm_groups: usize,
    group: Group,
    /// One queue `[queue, embedding]` for each assigning crop, newest rows first; empty if there is no queue.
    queues: Vec<Tensor>,
    run: RunInfo,
    frozen: bool,
    queue_runs: bool,
    queue_full: bool,
    /// Embeddings of the assigning crops of the last loss, which enter the queues after the update.
    to_enqueue: Option<Tensor>,
    /// Images of this rank in a micro-batch of the last loss.
    micro_batch: usize,
    assignments: Vec<Tensor>,
    embeddings: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    temperature(settings.temperature)?;
    above_zero(settings.epsilon, "epsilon")?;
    widths(&[
        (settings.prototypes, "prototypes"),
        (settings.hidden, "hidden"),
        (settings.embedding, "embedding"),
    ])?;
    if settings.crops < ASSIGNING {
        return Err(Error::config(
            "method.crops must be at least 2: the two large crops give the assignments",
        ));
    }
    Ok(Box::new(Swav::new(network, &settings)))
}

impl Swav {
    /// Describes the network: slots under `backbone.`, `head.` and `prototypes.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let Settings { hidden, embedding, prototypes, .. } = *settings;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        let layer = |width, norm, relu| MlpLayer { width, bias: true, norm, relu, std: None };
        let layers =
            [layer(hidden, NormKind::Affine, true), layer(embedding, NormKind::None, false)];
        let groups = network.norm_groups;
        let head = Mlp::new(&mut layout, "head", backbone.features(), &layers, groups);
        let init = Init::Uniform(1.0 / (embedding as f64).sqrt());
        let shape = [prototypes, embedding];
        let prototypes = layout.param("prototypes.weight", shape, SlotKind::Matrix, init);
        Self {
            layout: Arc::new(layout),
            backbone,
            head,
            prototypes,
            settings: *settings,
            norm_groups: groups,
            group: Group::alone(),
            queues: Vec::new(),
            run: RunInfo { seed: 0, batch: 1, images: 1, per_epoch: 1, total: 1 },
            frozen: settings.freeze_steps > 0,
            queue_runs: false,
            queue_full: false,
            to_enqueue: None,
            micro_batch: 1,
            assignments: Vec::new(),
            embeddings: None,
        }
    }

    /// The assignments of the last loss: `[n, prototypes]` for each assigning crop, each row summing to 1.
    pub fn assignments(&self) -> &[Tensor] {
        &self.assignments
    }

    /// The assignments of the last loss, of all ranks.
    fn all_assignments(&self) -> Vec<Tensor> {
        let gathered = |q| gather_views(q, 1, &self.group, "monitors");
        self.assignments.iter().map(gathered).collect()
    }

    /// Assignments `[n, prototypes]` from the scores of crop `i`, without a gradient.
    fn assign<'t>(&self, i: usize, scores: &Var<'t>) -> Tensor {
        let Settings { epsilon, sinkhorn_iterations, .. } = self.settings;
        let (tape, n) = (scores.tape(), scores.shape()[0]);
        if sinkhorn_iterations == 0 {
            return softmax(scores.value(), epsilon);
        }
        let all = if self.queue_full {
            // Detached inputs record no node on the tape.
            let prototypes = tape.param(self.prototypes).detach();
            // Each rank takes its share of the queue's rows, as of the batch's: Sinkhorn sums over all of them.
            let queue = &self.queues[i];
            let rows = queue.shape()[0] / self.group.size();
            let queue = tape.input(&queue.rows(self.group.rank() * rows, rows));
            let queued = linear(&queue, &prototypes, None);
            concat_rows(&[queued, scores.detach()])
        } else {
            scores.detach()
        };
        let q = sinkhorn(all.value(), epsilon, sinkhorn_iterations, tape.group());
        let q = q.rows(q.shape()[0] - n, n);
        if self.settings.hard_codes { softmax(&q, HARD_TEMPERATURE) } else { q }
    }
}

impl Method for Swav {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn views(&self) -> usize {
        self.settings.crops
    }

    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        self.run = *run;
        self.group = online.group().clone();
        let Settings { queue, embedding, .. } = self.settings;
        let rows = queue - queue % run.batch;
        if queue > 0 && rows == 0 {
            let batch = run.batch;
            let reason = format!("method.queue is {queue}, less than a batch of {batch}");
            return Err(Error::Config(reason));
        }
        if rows > 0 {
            let empty = |_| Tensor::zeros(online.device(), [rows, embedding]);
            self.queues = (0..ASSIGNING).map(empty).collect();
        }
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        let start = self.settings.queue_from * self.run.per_epoch;
        self.frozen = iteration < self.settings.freeze_steps;
        self.queue_runs = !self.queues.is_empty() && iteration >= start;
        // Full once the oldest row is an embedding and not one of the initial zeros.
        self.queue_full = self.queue_runs && {
            let filled = (iteration - start) * self.run.batch as u64;
            filled >= self.queues[0].shape()[0] as u64
        };
    }

    fn phase(&self) -> u32 {
        u32::from(self.frozen) | u32::from(self.queue_runs) << 1 | u32::from(self.queue_full) << 2
    }

    fn param_policy(&self, slot: &Slot, _: f64) -> ParamPolicy {
        if self.frozen && slot.name == "prototypes.weight" {
            ParamPolicy::Frozen
        } else {
            ParamPolicy::Default
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        normalize_rows(online, self.prototypes);
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let z = self.embed_part(tape, views); // [crops n, embedding]
        self.couple(z, views)
    }

    fn coupling(&self) -> Coupling {
        Coupling::Batch { views: self.settings.crops }
    }

    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.micro_batch =
            views.iter().map(|crops| crops.shape()[0]).sum::<usize>() / self.settings.crops;
        let features: Vec<Var<'t>> =
            views.iter().map(|crops| self.backbone.forward(&tape.input(crops))).collect();
        l2_normalize(&self.head.forward(concat_rows(&features)))
    }

    fn couple<'t>(&mut self, z: Var<'t>, _: &[Tensor]) -> Var<'t> {
        let crops = self.settings.crops;
        let scores = linear(&z, &z.tape().param(self.prototypes), None); // [crops n, prototypes]
        let n = scores.shape()[0] / crops;
        let crop = |v: usize| slice_rows(&scores, v * n, n);
        self.assignments.clear();
        let mut losses = Vec::with_capacity(ASSIGNING);
        for i in 0..ASSIGNING {
            let q = self.assign(i, &crop(i));
            self.assignments.push(q.clone());
            let predicted = (0..crops).filter(|&v| v != i);
            let terms: Vec<Var<'t>> = predicted
                .map(|v| soft_cross_entropy(&crop(v), &q, self.settings.temperature))
                .collect();
            losses.push(mean_of(&terms));
        }
        let assigning = z.value().rows(0, ASSIGNING * n);
        let micro_batches = n / self.micro_batch.max(1);
        self.to_enqueue = self.queue_runs.then(|| {
            gather_views(&assigning, ASSIGNING * micro_batches, &self.group, "queued rows")
        });
        self.embeddings = Some(assigning);
        mean_of(&losses)
    }

    fn without_ranks(&self) -> Option<&'static str> {
        (self.norm_groups > 1).then_some(GROUPS_OF_VIEWS)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, _: &Arena, embeddings: Option<&Tensor>, _: f64) -> Readings {
        let Some(z) = embeddings else { return Readings::new() };
        let n = z.shape()[0] / ASSIGNING;
        let mut readings = similarities(&z.rows(0, n), &z.rows(n, n), None);
        let assignments = self.all_assignments();
        let rows = assignments.iter().map(|q| q.shape()[0]).sum::<usize>().max(1);
        let all = assignments.iter().flat_map(Tensor::to_f64);
        let entropy: f64 = all.filter(|&q| q > 0.0).map(|q| -q * q.ln()).sum();
        readings.push(("assignment_entropy", Reading::Number(entropy / rows as f64)));
        readings.push(("queue_full", Reading::Number(f64::from(u8::from(self.queue_full)))));
        readings
    }

    fn prototypes_used(&self) -> Option<f64> {
        let k = self.settings.prototypes;
        let mut mean = vec![0.0; k];
        for q in &self.all_assignments() {
            let share = 1.0 / (self.assignments.len() * q.shape()[0]) as f64;
            q.to_f64().iter().enumerate().for_each(|(i, v)| mean[i % k] += share * v);
        }
        let entropy: f64 = mean.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
        (!self.assignments.is_empty()).then(|| entropy.exp())
    }

    fn after_update(&mut self, _: &mut Arena, _: f64) {
        let Some(z) = self.to_enqueue.take() else { return };
        let n = z.shape()[0] / ASSIGNING;
        for (i, queue) in self.queues.iter_mut().enumerate() {
            push_rows(queue, &z.rows(i * n, n));
        }
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let names = ["queue.0", "queue.1"];
        names.into_iter().zip(self.queues.iter_mut().map(State::Rows)).collect()
    }
}

//! BYOL (Grill et al. 2020, arXiv:2006.07733), as google-deepmind/deepmind-research trains it.
//!
//! The online network sees one view of an image and predicts the target network's projection of the other view. The target is
//! a slow moving average of the online network and gets no gradient. There are no negatives. The predictor, the lag of the
//! target and, by later accounts, batch norm keep the embeddings from collapsing to one point. The two views come from
//! different augmentation distributions. The momentum of the average rises along a cosine until the target stands still.
//!
//! `L = mean_i (|p̂_i - ẑ'_i|² + |p̂'_i - ẑ_i|²) = 4 + 2 (D(p1, z2) + D(p2, z1))` (eq. 2), `D` the negative cosine, `p`
//! predictions of the online network, `z` projections of the target.
//!
//! ```text
//!         ┌─ view 1 ─ backbone ─ projector ─ predictor ─ p1 ─┐
//! image ──┤             │ tau (after the update)             ├─ |p̂1 - ẑ2|², and the same with the views exchanged
//!         └─ view 2 ─ target's backbone ─ projector ──── z2 ─┘   (no gradient)
//! ```
//!
//! The loss is the **sum** of both directions, not their mean: biases and batch norm are outside LARS, so they feel the factor
//! (averaging cost lightly 11 points, lightly-ai/lightly#1286). Each network processes each view in its own forward pass, so
//! batch norm sees one view at a time. The target normalises by batch statistics too, and keeps its own running statistics.
//! After each update `target = tau target + (1 - tau) online` with `tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2` at step `k` of
//! `K`.
//!
//! **Settings**: [`Settings`]. Table 5a of the paper compares three targets: the moving average; a fixed random network, which is
//! `momentum = 1` with `fresh_target`; and the online network itself, which is `momentum = 0` with `constant_momentum`. The last
//! one is SimSiam with BYOL's heads. `predictor` and `head_norm` remove the remaining parts. `selfsup study byol-target` and
//! `byol-norm` run the comparisons.
//!
//! **Deviations**: no online classifier is trained next to the loss (the reference stops its gradient). Weights start from a
//! normal distribution and filters as PyTorch's do, unless `truncated_init` is set. Convolutions of stride 2 pad
//! evenly, and running variances are unbiased. `[source]` of each recipe lists what applies to it (`selfsup recipes NAME`).
//!
//! **Monitors**: the loss starts near 4, falls fast below 1 and says little after that: a falling loss does not prove progress,
//! and a rising loss does not prove failure, because the target gets harder to predict. `positive_similarity`, between
//! predictions and targets, is `1 - L / 4`. `negative_similarity` must stay well below it. `predictor_gain` is what the
//! predictor adds to that cosine; it stays above 0 as long as the predictor is needed. `target_distance` shrinks as tau
//! approaches 1. The standard deviation of the embeddings dips in the first epochs and recovers; near 0 the network has
//! collapsed: check warm-up, weight decay and batch size.
//!
//! **Run it**: `selfsup train byol-cifar10-small --set data.path=PATH`.

use std::sync::Arc;

use serde::Deserialize;

use super::monitors::{Reading, Readings, distance, mean_cosine, similarities};
use crate::arena::{Arena, Layout, SlotKind};
use crate::error::Result;
use crate::methods::{
    Coupling, Method, RunInfo, State, above_zero, momentum_in_range, view, widths,
};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{add, l2_normalize, neg_cosine, scale};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor, gather_views};

/// BYOL's settings: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Base of tau, in `0..=1`: 0.996 for 1000 epochs, 0.99 for 300 and 100, 0.97 for 40.
    pub momentum: f64,
    /// Width of the hidden layers of projector and predictor: 4096.
    pub hidden: usize,
    /// Width of the embedding: 256.
    pub embedding: usize,
    /// Whether the target starts from its own random weights, as in the reference code, instead of a copy of the online
    /// network's. The reference reports "no significant difference".
    #[serde(default)]
    pub fresh_target: bool,
    /// Whether the network has a predictor. Without one it collapses.
    #[serde(default = "yes")]
    pub predictor: bool,
    /// Whether the heads have batch norm.
    #[serde(default = "yes")]
    pub head_norm: bool,
    /// Whether tau stays at its base instead of rising to 1.
    #[serde(default)]
    pub constant_momentum: bool,
    /// Whether filters and matrices start from a truncated normal distribution, as in the reference code.
    #[serde(default)]
    pub truncated_init: bool,
}

impl Default for Settings {
    /// The paper's settings for 1000 epochs of ImageNet.
    fn default() -> Self {
        Self {
            momentum: 0.996,
            hidden: 4096,
            embedding: 256,
            fresh_target: true,
            predictor: true,
            head_norm: true,
            constant_momentum: false,
            truncated_init: false,
        }
    }
}

fn yes() -> bool {
    true
}

/// BYOL: backbone, projector and predictor, and the target network.
pub struct Byol {
    layout: Arc<Layout>,
    backbone: ResNet,
    projector: Mlp,
    predictor: Mlp,
    settings: Settings,
    target: Option<Arena>,
    total: u64,
    /// tau of the current step; created by `start`.
    tau: Option<Numbers<f64>>,
    embeddings: Option<Tensor>,
    /// For the monitors: projection and prediction of one view, and the target's projection of the other.
    monitored: Option<[Tensor; 3]>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    momentum_in_range(settings.momentum, "momentum")?;
    above_zero(settings.hidden as f64, "hidden")?;
    widths(&[(settings.hidden, "hidden"), (settings.embedding, "embedding")])?;
    Ok(Box::new(Byol::new(network, &settings)))
}

impl Byol {
    /// Describes the network: slots under `backbone.`, `projector.` and `predictor.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let Settings { hidden, embedding, .. } = *settings;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        let norm = if settings.head_norm { NormKind::Affine } else { NormKind::None };
        let mut head = |name: &str, inputs: usize| {
            let std = |inputs: usize| Some(1.0 / (inputs as f64).sqrt());
            let layers = [
                MlpLayer { width: hidden, bias: true, norm, relu: true, std: std(inputs) },
                MlpLayer {
                    width: embedding,
                    bias: false,
                    norm: NormKind::None,
                    relu: false,
                    std: std(hidden),
                },
            ];
            let layers = if inputs > 0 { &layers[..] } else { &[] };
            Mlp::new(&mut layout, name, inputs, layers, network.norm_groups)
        };
        let projector = head("projector", backbone.features());
        let predictor = head("predictor", if settings.predictor { embedding } else { 0 });
        if settings.truncated_init {
            layout.start_truncated(&[SlotKind::Filter, SlotKind::Matrix], 1.0);
        }
        Self {
            layout: Arc::new(layout),
            backbone,
            projector,
            predictor,
            settings: *settings,
            target: None,
            total: 1,
            tau: None,
            embeddings: None,
            monitored: None,
        }
    }

    fn project<'t>(&self, x: &Var<'t>) -> Var<'t> {
        self.projector.forward(self.backbone.forward(x))
    }

    /// The target network's projections `[n, embedding]` of images, without a gradient.
    fn project_target(&mut self, images: &Tensor) -> Tensor {
        let mut target = self.target.take().expect("byol: start comes before the first step");
        let z = forward_in_step(&mut target, |tape| self.project(&tape.input(images)));
        self.target = Some(target);
        z
    }
}

impl Method for Byol {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        self.total = run.total.max(1);
        self.tau = Some(Numbers::new(online.device(), &[self.settings.momentum]));
        self.target = Some(if self.settings.fresh_target {
            Arena::new(&self.layout, online.device(), run.seed ^ (1 << 63)).in_group(online.group())
        } else {
            online.twin()
        });
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        if self.settings.constant_momentum {
            return;
        }
        let progress = iteration as f64 / self.total as f64;
        let half_cosine = ((std::f64::consts::PI * progress).cos() + 1.0) / 2.0;
        if let Some(tau) = &mut self.tau {
            tau.set(&[1.0 - (1.0 - self.settings.momentum) * half_cosine]);
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let z1 = self.project(&tape.input(&x1)); // [n, embedding]
        let z2 = self.project(&tape.input(&x2));
        let p1 = self.predictor.forward(z1.clone());
        let p2 = self.predictor.forward(z2);
        let t1 = tape.input(&self.project_target(&x1));
        let t2 = tape.input(&self.project_target(&x2));
        self.embeddings = Some(l2_normalize(&z1.detach()).value().clone());
        self.monitored = Some([&z1, &p1, &t2].map(|rows| rows.value().clone()));
        // For unit rows |a - b|² = 2 - 2 cos(a, b); the loss has one such term per direction.
        let cosines = add(&neg_cosine(&p1, &t2), &neg_cosine(&p2, &t1));
        add(&scale(&cosines, 2.0), &tape.constant(4.0))
    }

    fn coupling(&self) -> Coupling {
        Coupling::Images
    }

    fn without_ranks(&self) -> Option<&'static str> {
        None
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, online: &Arena, _: Option<&Tensor>, _: f64) -> Readings {
        let (Some([z, p, t]), Some(target)) = (&self.monitored, &self.target) else {
            return Readings::new();
        };
        let [z, p, t] = [z, p, t].map(|rows| gather_views(rows, 1, online.group(), "monitors"));
        let mut readings = similarities(&p, &t, None);
        let gain = mean_cosine(&p, &t) - mean_cosine(&z, &t);
        readings.push(("predictor_gain", Reading::Number(gain)));
        readings.push(distance(online, target));
        readings
    }

    fn after_update(&mut self, online: &mut Arena, _: f64) {
        let (target, tau) = (self.target.as_mut(), self.tau.as_ref());
        let (target, tau) = target.zip(tau).expect("byol: start comes before the first step");
        ema(target, online, tau);
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        self.target.as_mut().map(|target| ("target", State::Network(target))).into_iter().collect()
    }
}

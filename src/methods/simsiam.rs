//! SimSiam (Chen and He 2020, arXiv:2011.10566), as facebookresearch/simsiam trains it.
//!
//! One network embeds two views of an image. A predictor maps the projection of one view to that of the other, which is treated
//! as a constant. There are no negatives, no momentum encoder and no queue. The stop-gradient and the predictor prevent collapse:
//! without either, training collapses within an epoch. The predictor's learning rate does not decay, so that the predictor keeps
//! up with the projections. The authors interpret the method as an alternation (section 5): fit the network to fixed targets,
//! then compute new targets.
//!
//! `L = D(p1, stop(z2)) / 2 + D(p2, stop(z1)) / 2` (eq. 4), `D` the negative cosine (eq. 1).
//!
//! ```text
//!         ┌─ view 1 ─ backbone ─ projector ─ z1 ─ predictor ─ p1 ─┐
//! image ──┤             ║ the same weights                        ├─ D(p1, stop(z2)), and with the views exchanged
//!         └─ view 2 ─ backbone ─ projector ─ z2 ── stop ──────────┘
//! ```
//!
//! Each view passes through backbone and heads in its own forward pass, so batch norm sees one view at a time. The projector's
//! last batch norm has neither scale nor shift. The bias before it, frozen in the reference code, is omitted because the batch
//! norm cancels it. The predictor does not end in a batch norm.
//!
//! **Settings**: [`Settings`]. `stop_gradient`, `predictor` and `fix_predictor_lr` each remove one part (tables 1 and 2).
//! `target_every = k` is the alternation, whose targets come from the network as it was up to k steps ago; 1 is SimSiam itself.
//! `selfsup study simsiam-parts` and `simsiam-alternation` run the comparisons.
//!
//! **Deviations**: none known; `[source]` of each recipe lists its own (`selfsup recipes NAME`).
//!
//! **Monitors**: the loss starts near 0 and falls towards -0.9. A loss of -1 with a standard deviation near 0 is collapse;
//! healthy projections have a standard deviation near 1, in units of `1/sqrt(d)`. `positive_similarity`, between predictions and
//! projections, is `-L`; `negative_similarity` stays near 0. `predictor_gain` is what the predictor adds to that cosine; it stays
//! above 0.
//!
//! **Run it**: `selfsup train simsiam-cifar10-small --set data.path=PATH`.

use std::sync::Arc;

use serde::Deserialize;

use super::monitors::{Reading, Readings, mean_cosine, similarities};
use crate::arena::{Arena, Layout, Slot};
use crate::error::{Error, Result};
use crate::methods::{Coupling, Method, RunInfo, State, view, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{l2_normalize, mean_of, neg_cosine};
use crate::optim::{ParamPolicy, ema};
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor, gather_views};

/// SimSiam's settings: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Layers of the projector: 3, or 2 for CIFAR-10.
    pub projector_layers: usize,
    /// Width of the projector's layers, the last included: 2048.
    pub embedding: usize,
    /// Width of the predictor's hidden layer: 512.
    pub hidden: usize,
    /// Whether the predictor's learning rate stays at the peak of the schedule.
    #[serde(default = "yes")]
    pub fix_predictor_lr: bool,
    /// Whether the gradient stops at the targets. Without the stop it collapses.
    #[serde(default = "yes")]
    pub stop_gradient: bool,
    /// Whether the network has a predictor. Without one it collapses.
    #[serde(default = "yes")]
    pub predictor: bool,
    /// Steps between refreshes of the network that computes targets; 0 to use the current network.
    #[serde(default)]
    pub target_every: u64,
}

impl Default for Settings {
    /// The paper's settings for ImageNet.
    fn default() -> Self {
        Self {
            projector_layers: 3,
            embedding: 2048,
            hidden: 512,
            fix_predictor_lr: true,
            stop_gradient: true,
            predictor: true,
            target_every: 0,
        }
    }
}

fn yes() -> bool {
    true
}

/// SimSiam: backbone, projector and predictor. Apart from the alternation, the method's only state is the weights.
pub struct SimSiam {
    layout: Arc<Layout>,
    backbone: ResNet,
    projector: Mlp,
    predictor: Mlp,
    settings: Settings,
    /// With `target_every`: the network that computes targets.
    target: Option<Arena>,
    /// The weight of its old values in the update of this step: 0 in a step that refreshes it, otherwise 1.
    target_momentum: Option<Numbers<f64>>,
    embeddings: Option<Tensor>,
    /// For the monitors: projection and prediction of one view, and the target of the other.
    monitored: Option<[Tensor; 3]>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    widths(&[(settings.embedding, "embedding"), (settings.hidden, "hidden")])?;
    if settings.projector_layers == 0 {
        return Err(Error::config("method.projector_layers must be at least 1"));
    }
    if settings.target_every > 0 && !settings.stop_gradient {
        return Err(Error::config(
            "method.target_every makes targets constant: set method.stop_gradient",
        ));
    }
    Ok(Box::new(SimSiam::new(network, &settings)))
}

impl SimSiam {
    /// Describes the network: slots under `backbone.`, `projector.` and `predictor.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let Settings { projector_layers, embedding, hidden, .. } = *settings;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        let layer = |width, norm, relu| MlpLayer { width, bias: false, norm, relu, std: None };
        let mut layers = vec![layer(embedding, NormKind::Affine, true); projector_layers - 1];
        layers.push(layer(embedding, NormKind::Plain, false));
        let groups = network.norm_groups;
        let projector = Mlp::new(&mut layout, "projector", backbone.features(), &layers, groups);
        let last = MlpLayer { bias: true, ..layer(embedding, NormKind::None, false) };
        let layers = [layer(hidden, NormKind::Affine, true), last];
        let layers = if settings.predictor { &layers[..] } else { &[] };
        let predictor = Mlp::new(&mut layout, "predictor", embedding, layers, groups);
        Self {
            layout: Arc::new(layout),
            backbone,
            projector,
            predictor,
            settings: *settings,
            target: None,
            target_momentum: None,
            embeddings: None,
            monitored: None,
        }
    }

    fn encode<'t>(&self, x: &Var<'t>) -> Var<'t> {
        self.projector.forward(self.backbone.forward(x))
    }

    /// The target with which a prediction is compared: `z`, or with `target_every` the projection of `images` by the target
    /// network.
    fn target<'t>(&mut self, z: &Var<'t>, images: &Tensor) -> Var<'t> {
        let Some(mut target) = self.target.take() else {
            return if self.settings.stop_gradient { z.detach() } else { z.clone() };
        };
        let fixed = forward_in_step(&mut target, |tape| self.encode(&tape.input(images)));
        self.target = Some(target);
        z.tape().input(&fixed)
    }
}

impl Method for SimSiam {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn start(&mut self, online: &Arena, _: &RunInfo) -> Result<()> {
        if self.settings.target_every > 0 {
            self.target = Some(online.twin());
            self.target_momentum = Some(Numbers::new(online.device(), &[0.0]));
        }
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        if let Some(momentum) = &mut self.target_momentum {
            let refresh = iteration.is_multiple_of(self.settings.target_every);
            momentum.set(&[if refresh { 0.0 } else { 1.0 }]);
        }
    }

    fn before_step(&mut self, online: &mut Arena) {
        if let (Some(target), Some(momentum)) = (&mut self.target, &self.target_momentum) {
            ema(target, online, momentum);
        }
    }

    fn param_policy(&self, slot: &Slot, base: f64) -> ParamPolicy {
        if self.settings.fix_predictor_lr && slot.name.starts_with("predictor.") {
            return ParamPolicy::FixedLr(base);
        }
        ParamPolicy::Default
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let z1 = self.encode(&tape.input(&x1)); // [n, embedding]
        let z2 = self.encode(&tape.input(&x2));
        let p1 = self.predictor.forward(z1.clone());
        let p2 = self.predictor.forward(z2.clone());
        self.embeddings = Some(l2_normalize(&z1.detach()).value().clone());
        let [t1, t2] = [self.target(&z1, &x1), self.target(&z2, &x2)];
        self.monitored = Some([&z1, &p1, &t2].map(|rows| rows.value().clone()));
        mean_of(&[neg_cosine(&p1, &t2), neg_cosine(&p2, &t1)])
    }

    fn coupling(&self) -> Coupling {
        Coupling::Images
    }

    fn monitors(&self, online: &Arena, _: Option<&Tensor>, _: f64) -> Readings {
        let Some([z, p, t]) = &self.monitored else { return Readings::new() };
        let [z, p, t] = [z, p, t].map(|rows| gather_views(rows, 1, online.group(), "monitors"));
        let mut readings = similarities(&p, &t, None);
        let gain = mean_cosine(&p, &t) - mean_cosine(&z, &t);
        readings.push(("predictor_gain", Reading::Number(gain)));
        readings
    }

    fn without_ranks(&self) -> Option<&'static str> {
        None
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        self.target.as_mut().map(|target| ("target", State::Network(target))).into_iter().collect()
    }
}

//! SimSiam (Chen and He 2020, arXiv:2011.10566), as facebookresearch/simsiam trains it.
//!
//! One network sees two views of an image; from one view's projection a predictor guesses the other's, which counts as a
//! constant. There are no negatives, no momentum encoder, no queue. The stop-gradient and the predictor are what keeps all
//! images from having one embedding: without either it collapses within an epoch. The predictor's learning rate does not
//! decay, so that it keeps up with the projections.
//!
//! `L = D(p1, stop(z2)) / 2 + D(p2, stop(z1)) / 2` (eq. 4), `D` the negative cosine (eq. 1).
//!
//! Each view goes through trunk and heads alone: batch norm sees one view. The projector's last batch norm has neither scale
//! nor shift; the bias before it, frozen in the reference code, is left out, because batch norm takes it away again. The
//! predictor has no batch norm at its end.
//!
//! What to expect: the loss starts near 0 and falls towards -0.9; at -1 with a deviation near 0 it has collapsed, while
//! healthy projections stay near 1 of `1/sqrt(d)`. `selfsup train simsiam-cifar10-small`.

use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Layout, Slot};
use crate::error::{Error, Result};
use crate::methods::{Method, view, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{l2_normalize, mean, neg_cosine};
use crate::optim::Care;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Layers of the projector: 3, or 2 for CIFAR-10.
    pub projector_layers: usize,
    /// Width of the projector's layers, the last included: 2048.
    pub embedding: usize,
    /// Width of the predictor's hidden layer: 512.
    pub hidden: usize,
    /// Whether the predictor's learning rate stays at the schedule's peak.
    #[serde(default = "yes")]
    pub fix_predictor_lr: bool,
    /// Whether no gradient flows through projections as targets. With one it collapses.
    #[serde(default = "yes")]
    pub stop_gradient: bool,
    /// Whether there is a predictor. Without one it collapses.
    #[serde(default = "yes")]
    pub predictor: bool,
}

fn yes() -> bool {
    true
}

/// The description; the method has no state but the weights.
pub struct SimSiam {
    layout: Arc<Layout>,
    backbone: ResNet,
    projector: Mlp,
    predictor: Mlp,
    settings: Settings,
    embeddings: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = super::recipe::table(table, "method")?;
    widths(&[(settings.embedding, "embedding"), (settings.hidden, "hidden")])?;
    if settings.projector_layers == 0 {
        return Err(Error::config("method.projector_layers starts at 1"));
    }
    Ok(Box::new(SimSiam::new(network, &settings)))
}

impl SimSiam {
    /// The trunk under `backbone.`, then `projector.` and `predictor.`.
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
        let (layout, settings) = (Arc::new(layout), *settings);
        Self { layout, backbone, projector, predictor, settings, embeddings: None }
    }

    fn encode<'t>(&self, x: &Var<'t>) -> Var<'t> {
        self.projector.forward(self.backbone.forward(x))
    }
}

impl Method for SimSiam {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn care(&self, slot: &Slot, base: f64) -> Care {
        if self.settings.fix_predictor_lr && slot.name.starts_with("predictor.") {
            return Care::FixedRate(base);
        }
        Care::Usual
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let z1 = self.encode(&tape.input(&x1)); // [n, embedding]
        let z2 = self.encode(&tape.input(&x2));
        let p1 = self.predictor.forward(z1.clone());
        let p2 = self.predictor.forward(z2.clone());
        self.embeddings = Some(l2_normalize(&z1.detach()).value().clone());
        let stop = |z: Var<'t>| if self.settings.stop_gradient { z.detach() } else { z };
        mean(&[neg_cosine(&p1, &stop(z2)), neg_cosine(&p2, &stop(z1))])
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }
}

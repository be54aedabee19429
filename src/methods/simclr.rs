//! SimCLR (Chen et al. 2020, arXiv:2002.05709), as google-research/simclr trains it.
//!
//! Two augmented views of each image go through trunk and head in one forward pass of `2N` rows, so that batch norm sees
//! both; each embedding must find its other view among all `2N - 1` others:
//! `L = mean_i CE(view 1 -> view 2) + mean_i CE(view 2 -> view 1)`, which is twice the paper's NT-Xent (`objective.py` adds
//! the two means). The factor matters: weights under LARS do not feel it, biases and batch norm do.

use std::sync::Arc;

use serde::Deserialize;

use crate::arena::Layout;
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{l2_normalize, nt_xent, scale};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// T, > 0: 0.1 for ImageNet, 0.5 for CIFAR-10.
    pub temperature: f64,
    /// Width of the head's hidden layer: as wide as the trunk's features in the paper.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
}

/// The network and what its last step left behind.
pub struct SimClr {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    temperature: f64,
    embeddings: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = super::recipe::table(table, "method")?;
    if settings.temperature.is_nan() || settings.temperature <= 0.0 {
        return Err(Error::config("method.temperature must be above 0"));
    }
    if settings.hidden == 0 || settings.embedding == 0 {
        return Err(Error::config("method.hidden and method.embedding start at 1"));
    }
    Ok(Box::new(SimClr::new(network, &settings)))
}

impl SimClr {
    /// The trunk under `backbone.`, the head under `head.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        // No biases: each is followed by a batch norm, the last of which has no shift either (`model_util.py`).
        let layer =
            |width, norm, relu| MlpLayer { width, bias: false, norm, relu, std: Some(0.01) };
        let layers = [
            layer(settings.hidden, NormKind::Affine, true),
            layer(settings.embedding, NormKind::ScaleOnly, false),
        ];
        let groups = network.norm_groups;
        let head = Mlp::new(&mut layout, "head", backbone.features(), &layers, groups);
        let (layout, temperature) = (Arc::new(layout), settings.temperature);
        Self { layout, backbone, head, temperature, embeddings: None }
    }

    /// Images to unit embeddings `[rows, embedding]`.
    pub fn embed<'t>(&self, x: &Var<'t>) -> Var<'t> {
        l2_normalize(&self.head.forward(self.backbone.forward(x)))
    }

    /// The loss of unit embeddings `[2n, embedding]`, view after view.
    pub fn contrast<'t>(&self, z: &Var<'t>) -> Var<'t> {
        scale(&nt_xent(z, self.temperature), 2.0)
    }
}

impl Method for SimClr {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let z = self.embed(&tape.input(&views[0])); // [2n, embedding]
        self.embeddings = Some(z.value().clone());
        self.contrast(&z)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }
}

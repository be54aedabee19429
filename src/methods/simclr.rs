//! SimCLR (Chen et al. 2020, arXiv:2002.05709), as google-research/simclr trains it.
//!
//! Each image gives two views, cropped, coloured and blurred independently. One network embeds all views of the batch, and each
//! embedding must find its other view among those of all other images. Two views can only agree on what augmentation preserves,
//! so the augmentations decide what is learnt. The loss is applied to the output of a small head that is discarded afterwards:
//! the backbone below it keeps information that the loss would make it forget. Negatives are the rest of the batch, so large
//! batches and long training help.
//!
//! `L = mean_i CE(view 1 -> view 2) + mean_i CE(view 2 -> view 1)`, cross-entropies over the `2N - 1` others of cosines divided
//! by T: twice the paper's NT-Xent (eq. 1), because `objective.py` adds the two means. The factor matters: weights under LARS
//! do not feel it, biases and batch norm do.
//!
//! ```text
//! image ─┬─ view 1 ─┐                                ┌─ z1 ─┐
//!        └─ view 2 ─┴─ backbone ─ head ─ unit length ┴─ z2 ─┴─ each finds the other among 2N - 1
//! ```
//!
//! **Settings**: [`Settings`]. Both views pass through the network in one forward pass of `2N` rows, so batch norm sees both. The
//! paper's ablations are settings: `head_layers` 0, 1 or 2 (figure 8; 3 is the default of the reference code since June 2020), `normalise` and `temperature` (table 5), `loss` (table 4).
//! `loss = "attract"` has no negatives; with a `predictor` it is SimSiam with one batch norm over both views (arXiv:2011.10566,
//! section 6.2). `selfsup study simclr-head` and the other `simclr-` studies run the comparisons.
//!
//! **Deviations**: the blur draws one sigma for each image, where the reference draws one for the batch; filters start as
//! PyTorch's do unless `truncated_init` is set. An epoch drops its incomplete batch; with `train.all_images` the schedule has the
//! reference's steps but its last one. Running variances are unbiased. `[source]` of each recipe lists what applies to it
//! (`selfsup recipes NAME`).
//!
//! **Monitors**: the loss starts near `2 ln(2N - 1)`, 18 at batch 4096, falls fast in the first epochs and slowly from then on.
//! `positive_similarity` rises to 0.8 or more while `negative_similarity` stays near 0; both near 1 is collapse.
//! `mutual_information_bound` is `ln(2N - 1) - L / 2`: close to its limit `ln(2N - 1)`, the batch is too small for the loss to
//! measure more. The standard deviation of the embeddings stays near 1 (in units of `1/sqrt(d)`), the effective rank grows.
//!
//! **Run it**: `selfsup train simclr-cifar10-small --set data.path=PATH`, or `selfsup demo`.

use std::sync::Arc;

use serde::Deserialize;

use super::monitors::{Readings, information, similarities};
use crate::arena::{Arena, Layout, SlotKind};
use crate::error::{Error, Result};
use crate::methods::{Coupling, GROUPS_OF_VIEWS, Method, temperature, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{PairLoss, add, l2_normalize, neg_cosine, nt_xent, pair_loss, scale, slice_rows};
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// The loss on embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The paper's loss, NT-Xent.
    #[default]
    NtXent,
    /// A logistic regression of each pair, with T as in NT-Xent ([`PairLoss::Logistic`]).
    NtLogistic,
    /// A margin between positive and negatives ([`PairLoss::Margin`]).
    Margin,
    /// The negative cosine of positives, without negatives. Collapses without a predictor.
    Attract,
}

/// SimCLR's settings: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Temperature T, > 0: 0.1 for ImageNet, 0.5 for CIFAR-10.
    pub temperature: f64,
    /// Width of the head's hidden layers. In the paper it is the width of the backbone's features.
    pub hidden: usize,
    /// Width of the embedding: 128.
    pub embedding: usize,
    /// 2 for the paper's MLP, 3 for that of the reference code since June 2020, 1 for a linear layer, 0 for a loss on the
    /// backbone's features.
    #[serde(default = "two")]
    pub head_layers: usize,
    /// Whether embeddings are normalised to unit length.
    #[serde(default = "yes")]
    pub normalise: bool,
    /// The loss on embeddings.
    #[serde(default)]
    pub loss: Loss,
    /// m of the margin loss, >= 0, in units of similarity.
    #[serde(default = "margin")]
    pub margin: f64,
    /// Whether NT-Logistic and the margin loss keep only one semi-hard negative per row.
    #[serde(default)]
    pub semi_hard: bool,
    /// For `attract`: width of the hidden layer of a predictor like SimSiam's, with which targets get no gradient; 0 for no
    /// predictor.
    #[serde(default)]
    pub predictor: usize,
    /// Whether filters start from a truncated normal distribution, as in the reference code.
    #[serde(default)]
    pub truncated_init: bool,
}

impl Default for Settings {
    /// The paper's settings for CIFAR-10.
    fn default() -> Self {
        Self {
            temperature: 0.5,
            hidden: 512,
            embedding: 128,
            head_layers: two(),
            normalise: true,
            loss: Loss::NtXent,
            margin: margin(),
            semi_hard: false,
            predictor: 0,
            truncated_init: false,
        }
    }
}

/// The most layers of a head.
const MOST_LAYERS: usize = 3;

fn two() -> usize {
    2
}

fn yes() -> bool {
    true
}

fn margin() -> f64 {
    0.4
}

/// The standard deviation of a unit normal distribution truncated at two standard deviations. TensorFlow divides by it, so that
/// truncation does not change the standard deviation.
pub(super) const TRUNCATION: f64 = 0.879_625_661_034_239_8;

/// SimCLR: backbone, head and optional predictor, and the embeddings of the last step.
pub struct SimClr {
    layout: Arc<Layout>,
    backbone: ResNet,
    head: Mlp,
    predictor: Mlp,
    settings: Settings,
    norm_groups: usize,
    embeddings: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    temperature(settings.temperature)?;
    widths(&[(settings.hidden, "hidden"), (settings.embedding, "embedding")])?;
    if settings.head_layers > MOST_LAYERS {
        return Err(Error::config(format!("method.head_layers must be at most {MOST_LAYERS}")));
    }
    if !settings.margin.is_finite() || settings.margin < 0.0 {
        return Err(Error::config("method.margin must be 0 or more"));
    }
    if settings.predictor > 0 && settings.loss != Loss::Attract {
        return Err(Error::config("method.predictor is for method.loss = \"attract\""));
    }
    Ok(Box::new(SimClr::new(network, &settings)))
}

impl SimClr {
    /// Describes the network: slots under `backbone.`, `head.` and `predictor.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        if settings.truncated_init {
            layout.start_truncated(&[SlotKind::Filter], 1.0 / TRUNCATION);
        }
        // No biases: a batch norm follows each layer. The last batch norm has no shift either (`model_util.py`).
        let layer =
            |width, norm, relu| MlpLayer { width, bias: false, norm, relu, std: Some(0.01) };
        let layers = [
            layer(settings.hidden, NormKind::Affine, true),
            layer(settings.hidden, NormKind::Affine, true),
            layer(settings.embedding, NormKind::ScaleOnly, false),
        ];
        let groups = network.norm_groups;
        let layers = &layers[MOST_LAYERS - settings.head_layers..];
        let head = Mlp::new(&mut layout, "head", backbone.features(), layers, groups);
        let d = if layers.is_empty() { backbone.features() } else { settings.embedding };
        let layers = [
            MlpLayer { std: None, ..layer(settings.predictor, NormKind::Affine, true) },
            MlpLayer { bias: true, std: None, ..layer(d, NormKind::None, false) },
        ];
        let layers = if settings.predictor > 0 { &layers[..] } else { &[] };
        let predictor = Mlp::new(&mut layout, "predictor", d, layers, groups);
        let (layout, settings) = (Arc::new(layout), *settings);
        Self { layout, backbone, head, predictor, settings, norm_groups: groups, embeddings: None }
    }

    /// Embeds images `[rows, s, s, 4]` to `[rows, embedding]`, of unit length unless `normalise` is off.
    pub fn embed<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let z = self.head.forward(self.backbone.forward(x));
        if self.settings.normalise { l2_normalize(&z) } else { z }
    }

    /// Computes the loss of embeddings `z [2n, embedding]`: all rows of view 1, then all rows of view 2.
    pub fn contrast<'t>(&self, z: &Var<'t>) -> Var<'t> {
        let Settings { temperature, margin, semi_hard, normalise, .. } = self.settings;
        let over_pairs = |loss| pair_loss(z, loss, temperature);
        let mean = match self.settings.loss {
            Loss::NtXent if normalise => nt_xent(z, temperature),
            Loss::NtXent => over_pairs(PairLoss::Xent),
            Loss::NtLogistic => over_pairs(PairLoss::Logistic { semi_hard }),
            Loss::Margin => over_pairs(PairLoss::Margin { margin, semi_hard }),
            Loss::Attract => return self.attract(z),
        };
        scale(&mean, 2.0)
    }

    /// `D(p1, z2) + D(p2, z1)`; with a predictor the targets are constants.
    fn attract<'t>(&self, z: &Var<'t>) -> Var<'t> {
        let n = z.shape()[0] / 2;
        let p = self.predictor.forward(z.clone());
        let target = if self.settings.predictor > 0 { z.detach() } else { z.clone() };
        let half = |from: usize, to: usize| {
            neg_cosine(&slice_rows(&p, from, n), &slice_rows(&target, to, n))
        };
        add(&half(0, n), &half(n, 0))
    }
}

impl Method for SimClr {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn without_cuda(&self) -> Option<&'static str> {
        match self.settings.loss {
            Loss::NtXent if self.settings.normalise => None,
            Loss::Attract => None,
            _ => Some("a loss of pairs, or embeddings of any length,"),
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let z = self.embed_part(tape, views); // [2n, embedding]
        self.couple(z, views)
    }

    fn coupling(&self) -> Coupling {
        Coupling::Batch { views: 2 }
    }

    fn embed_part<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        self.embed(&tape.input(&views[0]))
    }

    fn couple<'t>(&mut self, z: Var<'t>, _: &[Tensor]) -> Var<'t> {
        let unit = if self.settings.normalise { z.detach() } else { l2_normalize(&z.detach()) };
        self.embeddings = Some(unit.value().clone());
        self.contrast(&z)
    }

    fn without_ranks(&self) -> Option<&'static str> {
        (self.norm_groups > 1).then_some(GROUPS_OF_VIEWS)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn monitors(&self, _: &Arena, embeddings: Option<&Tensor>, loss: f64) -> Readings {
        let Some(z) = embeddings else { return Readings::new() };
        let n = z.shape()[0] / 2;
        let mut readings = similarities(&z.rows(0, n), &z.rows(n, n), None);
        if self.settings.loss == Loss::NtXent {
            readings.push(information(2 * n - 1, loss / 2.0));
        }
        readings
    }
}

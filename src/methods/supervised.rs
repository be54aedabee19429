//! The supervised baseline, also used for fine-tuning: a ResNet with a classifier, trained by cross-entropy.
//!
//! `L = -mean_i Σ_k q_ik log softmax(logits_i)_k`, `q` one-hot or smoothed: `(1 - s)` on the class plus `s / classes` on each.
//!
//! To fine-tune, start from a checkpoint (`train.init`). SimCLR v2 fine-tunes from the middle of its head: with
//! `head_layers = 1` the head's first layer stays between backbone and classifier, and the classifier starts at zero and is
//! exempt from LARS and weight decay, like `head_supervised` in google-research/simclr (`run.py`, `ft_proj_selector`). With 1% or
//! 10% of the labels this gains points; with all of them `head_layers = 0` does as well (arXiv:2006.10029, section 3).
//!
//! What to expect: the loss starts at `ln(classes)`. `selfsup train supervised-cifar10-small`.

use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Arena, Init, Layout, Param, Slot, SlotKind};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::simclr_v2::{HEAD_LAYERS, head};
use crate::methods::{Method, RunInfo, above_zero, widths};
use crate::nn::{Mlp, ResNet, ResNetConfig};
use crate::ops::{cross_entropy, gather_rows, linear, soft_cross_entropy};
use crate::optim::ParamPolicy;
use crate::tape::{Tape, Var};
use crate::tensor::{Numbers, Tensor};

/// Settings of supervised training: the `[method]` table of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Number of classes of the data set.
    pub classes: usize,
    /// Label smoothing s in `0..1`. Published recipes that smooth use 0.1.
    #[serde(default)]
    pub label_smoothing: f64,
    /// Layers of SimCLR v2's head to keep: 0, 1 or 2.
    #[serde(default)]
    pub head_layers: usize,
    /// Width of that head's hidden layers.
    #[serde(default)]
    pub hidden: usize,
    /// Whether the classifier starts at zero and is exempt from weight decay and LARS, as in fine-tuning.
    #[serde(default)]
    pub new_classifier: bool,
    /// Learning rate of the classifier relative to the rest, > 0. A value other than 1 takes precedence over the exemption of
    /// `new_classifier`.
    #[serde(default = "same_rate")]
    pub classifier_rate: f64,
}

fn same_rate() -> f64 {
    1.0
}

impl Default for Settings {
    /// Plain training. `classes` is 0 and must be set.
    fn default() -> Self {
        Self {
            classes: 0,
            label_smoothing: 0.0,
            head_layers: 0,
            hidden: 0,
            new_classifier: false,
            classifier_rate: same_rate(),
        }
    }
}

impl Settings {
    /// Checks the ranges of all settings.
    ///
    /// # Errors
    /// If a setting is out of range; the message names it.
    pub fn check(&self) -> Result<()> {
        widths(&[(self.classes, "classes")])?;
        above_zero(self.classifier_rate, "classifier_rate")?;
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return Err(Error::config("method.label_smoothing must be in 0..1"));
        }
        if self.head_layers >= HEAD_LAYERS || (self.head_layers > 0 && self.hidden == 0) {
            return Err(Error::config(
                "method.head_layers is 0, 1 or 2, and needs method.hidden, the head's width, above 0",
            ));
        }
        Ok(())
    }
}

/// A backbone, the layers of SimCLR v2's head that were kept, and a linear layer that gives logits.
#[derive(Clone, Debug)]
pub struct Classifier {
    backbone: ResNet,
    head: Mlp,
    fc: [Param; 2],
}

impl Classifier {
    /// Describes the network: slots under `backbone.`, `head.` and `fc.`.
    pub fn new(layout: &mut Layout, network: &ResNetConfig, settings: &Settings) -> Self {
        let backbone = ResNet::new(layout, "backbone.", network);
        let Settings { classes, head_layers, hidden, new_classifier, .. } = *settings;
        let sizes = [hidden, 1, head_layers];
        let head = head(layout, "", backbone.features(), sizes, network.norm_groups);
        let d = if head_layers > 0 { hidden } else { backbone.features() };
        let bound = 1.0 / (d as f64).sqrt();
        let init = if new_classifier { Init::Constant(0.0) } else { Init::Uniform(bound) };
        let fc = [
            layout.param("fc.weight", [classes, d], SlotKind::Matrix, init),
            layout.param("fc.bias", [classes], SlotKind::Bias, init),
        ];
        Self { backbone, head, fc }
    }

    /// The backbone.
    pub fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    /// The number of classes.
    pub fn classes(&self) -> usize {
        self.fc[0].shape()[0]
    }

    /// Maps images `[n, s, s, 4]` to logits `[n, classes]`.
    pub fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let [w, b] = self.fc.map(|param| x.tape().param(param));
        linear(&self.head.forward(self.backbone.forward(x)), &w, Some(&b))
    }
}

/// Supervised training: the classifier and the labels of the current batch.
pub struct Supervised {
    layout: Arc<Layout>,
    classifier: Classifier,
    settings: Settings,
    device: Option<Device>,
    labels: Option<Numbers<i32>>,
    /// The smoothed targets `[classes, classes]`, one row per class; `None` without smoothing.
    smoothed: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    settings.check()?;
    Ok(Box::new(Supervised::new(network, &settings)))
}

impl Supervised {
    /// Describes the network with the slot names of [`Classifier::new`].
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let mut layout = Layout::new();
        let classifier = Classifier::new(&mut layout, network, settings);
        let (layout, settings) = (Arc::new(layout), *settings);
        Self { layout, classifier, settings, device: None, labels: None, smoothed: None }
    }
}

impl Method for Supervised {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        self.classifier.backbone()
    }

    fn views(&self) -> usize {
        1
    }

    fn start(&mut self, online: &Arena, _: &RunInfo) -> Result<()> {
        let Settings { classes, label_smoothing: s, .. } = self.settings;
        let device = online.device();
        self.device = Some(device.clone());
        if s > 0.0 {
            let mut targets = vec![s / classes as f64; classes * classes];
            (0..classes).for_each(|class| targets[class * (classes + 1)] += 1.0 - s);
            self.smoothed = Some(Tensor::from_f64(device, [classes, classes], &targets));
        }
        Ok(())
    }

    fn labels(&mut self, labels: &[i32]) -> Result<()> {
        let Settings { classes, .. } = self.settings;
        if let Some(bad) = labels.iter().find(|&&label| label < 0 || label as usize >= classes) {
            return Err(Error::Config(match bad {
                ..0 => "an image has no class: supervised training needs a labelled set".into(),
                _ => format!(
                    "an image has class {bad}, counted from 0, and method.classes is {classes}: set it to the number of classes"
                ),
            }));
        }
        let device = self.device.as_ref().expect("supervised: start comes before the first step");
        match &mut self.labels {
            Some(known) if known.values().len() == labels.len() => known.set(labels),
            other => *other = Some(Numbers::new(device, labels)),
        }
        Ok(())
    }

    fn param_policy(&self, slot: &Slot, _: f64) -> ParamPolicy {
        let Settings { new_classifier, classifier_rate, .. } = self.settings;
        match slot.name.starts_with("fc.") {
            true if classifier_rate != 1.0 => ParamPolicy::LrMultiplier(classifier_rate),
            true if new_classifier => ParamPolicy::Exempt,
            _ => ParamPolicy::Default,
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let logits = self.classifier.forward(&tape.input(&views[0])); // [n, classes]
        let labels = self.labels.as_ref().expect("supervised: labels come before the loss");
        match &self.smoothed {
            None => cross_entropy(&logits, labels.tensor()),
            Some(smoothed) => {
                let targets = gather_rows(&tape.input(smoothed), labels.tensor()); // [n, classes]
                soft_cross_entropy(&logits, targets.value(), 1.0)
            }
        }
    }

    fn without_ranks(&self) -> Option<&'static str> {
        None
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        None
    }

    fn classifier(&self) -> Option<&Classifier> {
        Some(&self.classifier)
    }
}

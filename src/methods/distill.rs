//! SimCLR v2's third stage: a student learns a fine-tuned teacher's predictions on unlabelled images (arXiv:2006.10029, eq. 2).
//!
//! `L = T² CE(softmax(teacher / T), softmax(student / T))`. The teacher is frozen, normalises by its running statistics and
//! sees the same crop as the student (google-research/simclr, distillation colab; crop and flip only). T is 0.1 for
//! self-distillation and 1 from a big network to a small one. Distillation uses no labels: the few labels trained the teacher.
//!
//! What to expect: the loss falls to the entropy of the teacher's predictions, not to 0.
//! `selfsup train simclr-v2-distill-cifar10-small`.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Arena, Layout, Slot};
use crate::error::Result;
use crate::methods::supervised::{self, Classifier};
use crate::methods::{Method, RunInfo, State, temperature};
use crate::nn::{ResNet, ResNetConfig};
use crate::ops::distillation;
use crate::optim::ParamPolicy;
use crate::tape::{Tape, Var, evaluate_in_step};
use crate::tensor::Tensor;

/// Settings of distillation: the `[method]` table of a recipe.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Temperature T, > 0.
    pub temperature: f64,
    /// The student's head and classifier.
    pub student: supervised::Settings,
    /// The trained network that the student learns from.
    pub teacher: Teacher,
}

/// A trained network and the checkpoint that holds its weights.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Teacher {
    /// Path of a checkpoint of a `supervised` run.
    pub file: String,
    /// Its backbone.
    pub network: ResNetConfig,
    /// Layers of SimCLR v2's head that it kept.
    #[serde(default)]
    pub head_layers: usize,
    /// Width of that head's hidden layers.
    #[serde(default)]
    pub hidden: usize,
}

/// Distillation: student, teacher and the teacher's weights.
pub struct Distill {
    layout: Arc<Layout>,
    student: Classifier,
    teacher_layout: Arc<Layout>,
    teacher: Classifier,
    settings: Settings,
    weights: Option<Arena>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = crate::settings::read(table, "method")?;
    temperature(settings.temperature)?;
    settings.student.check()?;
    settings.teacher.network.check()?;
    settings.teacher_settings().check()?;
    Ok(Box::new(Distill::new(network, &settings)))
}

impl Settings {
    fn teacher_settings(&self) -> supervised::Settings {
        let Teacher { head_layers, hidden, .. } = self.teacher;
        let classes = self.student.classes;
        supervised::Settings { classes, head_layers, hidden, ..Default::default() }
    }
}

impl Distill {
    /// Describes both networks, each in its own layout, with the slot names of [`Classifier::new`].
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let (mut layout, mut teacher_layout) = (Layout::new(), Layout::new());
        let student = Classifier::new(&mut layout, network, &settings.student);
        let teacher = settings.teacher_settings();
        // Both see the same images.
        let of_teacher = ResNetConfig { channels: network.channels, ..settings.teacher.network };
        let teacher = Classifier::new(&mut teacher_layout, &of_teacher, &teacher);
        let (layout, teacher_layout) = (Arc::new(layout), Arc::new(teacher_layout));
        Self { layout, student, teacher_layout, teacher, settings: settings.clone(), weights: None }
    }
}

impl Method for Distill {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        self.student.backbone()
    }

    fn views(&self) -> usize {
        1
    }

    fn start(&mut self, online: &Arena, run: &RunInfo) -> Result<()> {
        self.weights = Some(Arena::new(&self.teacher_layout, online.device(), run.seed));
        Ok(())
    }

    fn teacher(&mut self) -> Option<(PathBuf, &mut Arena)> {
        let file = PathBuf::from(&self.settings.teacher.file);
        self.weights.as_mut().map(|weights| (file, weights))
    }

    fn param_policy(&self, slot: &Slot, _: f64) -> ParamPolicy {
        let exempt = self.settings.student.new_classifier && slot.name.starts_with("fc.");
        if exempt { ParamPolicy::Exempt } else { ParamPolicy::Default }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let student = self.student.forward(&tape.input(&views[0])); // [n, classes]
        let weights = self.weights.as_ref().expect("distill: start comes before the first step");
        let teacher =
            evaluate_in_step(weights, |tape| self.teacher.forward(&tape.input(&views[0])));
        distillation(&student, &teacher, self.settings.temperature)
    }

    fn without_ranks(&self) -> Option<&'static str> {
        None
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        None
    }

    fn classifier(&self) -> Option<&Classifier> {
        Some(&self.student)
    }

    // The teacher never changes. Checkpoints hold it so that a resumed run does not need the teacher's file.
    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let weights = self.weights.as_mut();
        weights.map(|weights| ("teacher", State::Network(weights))).into_iter().collect()
    }
}

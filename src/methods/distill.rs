//! SimCLR v2's third stage: a student learns what a fine-tuned teacher says of unlabelled images (arXiv:2006.10029, eq. 2).
//!
//! `L = T² CE(softmax(teacher / T), softmax(student / T))`, the teacher frozen, normalising by its running statistics, and
//! seeing the same crop as the student (google-research/simclr, distillation colab; crop and flip only). T is 0.1 for
//! self-distillation, 1 from a big network to a small one. No labels are used: the few that exist made the teacher.
//!
//! What to expect: the loss falls to the teacher's own entropy, not to 0. `selfsup train simclr-v2-distill-cifar10-small`.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Arena, Layout, Slot};
use crate::error::Result;
use crate::methods::supervised::{self, Classifier};
use crate::methods::{Method, RunInfo, State, above_zero};
use crate::nn::{ResNet, ResNetConfig};
use crate::ops::distillation;
use crate::optim::ParamPolicy;
use crate::tape::{Tape, Var, evaluate_in_step};
use crate::tensor::Tensor;

/// The method's own settings.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// T, > 0.
    pub temperature: f64,
    /// The student's head and classifier.
    pub student: supervised::Settings,
    /// Who teaches.
    pub teacher: Teacher,
}

/// A network that was trained before.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Teacher {
    /// Its checkpoint, of a run of `supervised`.
    pub file: String,
    /// Its backbone.
    pub network: ResNetConfig,
    /// What stayed of its head.
    #[serde(default)]
    pub head_layers: usize,
    /// Width of that head's hidden layers.
    #[serde(default)]
    pub hidden: usize,
}

/// Student, teacher and the teacher's weights.
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
    above_zero(settings.temperature, "temperature")?;
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
    /// Both networks with the names of [`Classifier::new`], each in a layout of its own.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let (mut layout, mut teacher_layout) = (Layout::new(), Layout::new());
        let student = Classifier::new(&mut layout, network, &settings.student);
        let own = settings.teacher_settings();
        let teacher = Classifier::new(&mut teacher_layout, &settings.teacher.network, &own);
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

    fn start(&mut self, online: &Arena, course: &RunInfo) -> Result<()> {
        self.weights = Some(Arena::new(&self.teacher_layout, online.device(), course.seed));
        Ok(())
    }

    fn teacher(&mut self) -> Option<(PathBuf, &mut Arena)> {
        let file = PathBuf::from(&self.settings.teacher.file);
        self.weights.as_mut().map(|weights| (file, weights))
    }

    fn param_policy(&self, slot: &Slot, _: f64) -> ParamPolicy {
        let spared = self.settings.student.new_classifier && slot.name.starts_with("fc.");
        if spared { ParamPolicy::Exempt } else { ParamPolicy::Default }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let student = self.student.forward(&tape.input(&views[0])); // [n, classes]
        let weights = self.weights.as_ref().expect("distill: start comes before the first step");
        let teacher =
            evaluate_in_step(weights, |tape| self.teacher.forward(&tape.input(&views[0])));
        distillation(&student, &teacher, self.settings.temperature)
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        None
    }

    fn classifier(&self) -> Option<&Classifier> {
        Some(&self.student)
    }

    // Never moves, but a run must not depend on whether its teacher's file is still there.
    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        let weights = self.weights.as_mut();
        weights.map(|weights| ("teacher", State::Network(weights))).into_iter().collect()
    }
}

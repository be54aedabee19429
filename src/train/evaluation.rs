//! Measures a run after an epoch: the method's monitors, kNN and classifier accuracy; and draws the report's pictures.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::data::{Source, Subset};
use crate::error::{Error, Result};
use crate::eval::{self, Features, Knn, Quality};
use crate::methods::Reading;
use crate::optim::Rule;
use crate::tensor::Tensor;
use crate::train::folder::Folder;
use crate::train::report::{self, Found};
use crate::train::run::Watch;
use crate::train::skipped::RunSplit;
use crate::train::{Images, Run};

/// Images evaluated between two checks whether the run is to stop: a multiple of the evaluation's batch.
const PIECE: usize = 1024;

/// The results of an evaluation, in `0..=1`; `None` if there are no images or no classifier to measure.
#[derive(Default)]
pub(super) struct Accuracies {
    pub(super) knn: Option<f64>,
    /// kNN accuracy on the validation images.
    pub(super) validation: Option<f64>,
    pub(super) classifier: Option<f64>,
    /// The share of the largest class among the held-out images: kNN of features that know nothing.
    pub(super) chance: Option<f64>,
    /// What needs no labels.
    pub(super) quality: Option<Quality>,
    /// Images of each split that could not be read and do not count.
    pub(super) skipped: BTreeMap<RunSplit, usize>,
}

impl Run {
    /// Reads the method's monitors and the norm of the last step's gradient.
    pub(super) fn monitors(
        &self,
        embeddings: Option<&Tensor>,
        loss: f64,
    ) -> BTreeMap<String, Reading> {
        let mut readings = self.method.monitors(&self.online, embeddings, loss);
        let squares = self.online.gradients().to_f64().iter().map(|g| g * g).sum::<f64>();
        readings.push(("gradient_norm", Reading::Number(squares.sqrt())));
        readings.push(("update_ratio", Reading::Number(self.update_ratio())));
        readings.into_iter().map(|(name, reading)| (name.to_owned(), reading)).collect()
    }

    /// The size of the last step's update relative to that of the weights. Its learning rate is that of the schedule; parameters
    /// with a policy of their own count as if they had none.
    fn update_ratio(&self) -> f64 {
        let norm = |values: &Tensor| values.to_f64().iter().map(|v| v * v).sum::<f64>().sqrt();
        let lr = match self.recipe.optim.rule {
            Rule::Lars(lars) if lars.lr_in_momentum => 1.0,
            _ => self.schedule.lr(self.begun.saturating_sub(1)),
        };
        lr * norm(self.optimizer.momentum()) / norm(self.online.values()).max(f64::MIN_POSITIVE)
    }

    /// Measures what needs no labels, kNN accuracy on the validation and held-out images and the accuracy of the method's own classifier on the
    /// held-out ones, and draws the report's pictures.
    ///
    /// # Errors
    /// If images cannot be read, or too many of a split are skipped; if the run was asked to stop.
    pub(super) fn evaluate(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<Accuracies> {
        let Images { train, validation, test, .. } = self.images.clone();
        let mut accuracies = Accuracies { quality: self.quality()?, ..Accuracies::default() };
        if validation.is_none() && test.is_none() {
            return Ok(accuracies);
        }
        let bank = self.features(RunSplit::Training, &train)?;
        let mut skipped = BTreeMap::from([(RunSplit::Training, bank.skipped.len())]);
        if let Some(validation) = validation {
            let queries = self.features(RunSplit::Validation, &validation)?;
            skipped.insert(RunSplit::Validation, queries.skipped.len());
            let device = self.online.device();
            let found = eval::knn_accuracies(&bank, &queries, &[Knn::default()], device)?;
            accuracies.validation = found.first().copied();
        }
        if let Some(test) = test {
            let queries = self.features(RunSplit::HeldOut, &test)?;
            skipped.insert(RunSplit::HeldOut, queries.skipped.len());
            accuracies.chance = Some(largest_class(&queries.labels));
            accuracies.knn = Some(self.knn(epoch, (&*train, &bank), (&*test, &queries), watch)?);
            accuracies.classifier = self.classifier_accuracy(&test)?;
        }
        accuracies.skipped = skipped;
        Ok(accuracies)
    }

    /// What the features of training images are worth, measured without labels.
    pub(super) fn quality(&mut self) -> Result<Option<Quality>> {
        if !self.recipe.watch.quality {
            return Ok(None);
        }
        self.stop_if_asked()?;
        let policies = self.recipe.policies(self.method.views())?;
        let (backbone, train) = (self.method.backbone(), &self.images.train);
        eval::quality(&self.online, backbone, train, &policies, self.recipe.seed)
    }

    /// kNN accuracy on the held-out images; draws the report's pictures.
    fn knn(
        &self,
        epoch: u32,
        bank: (&dyn Source, &Features),
        queries: (&dyn Source, &Features),
        watch: &mut dyn Watch,
    ) -> Result<f64> {
        let device = self.online.device();
        let answers =
            eval::knn_answers(bank.1, queries.1, Knn::default(), report::NEIGHBOURS, device)?;
        let labels = &queries.1.labels;
        let right = answers.iter().zip(labels).filter(|(answer, label)| answer.class == **label);
        let accuracy = right.count() as f64 / answers.len() as f64;
        if let Some(Folder { path, .. }) = self.folder.as_ref().filter(|_| self.recipe.watch.report)
        {
            let found = Found { bank, queries, answers: &answers };
            let views = self.method.views();
            let drawn = report::write_gallery(path, &self.recipe, views, epoch + 1, &found, device);
            if let Err(error) = drawn {
                watch.note(&format!("the pictures could not be drawn: {error}"));
            }
        }
        Ok(accuracy)
    }

    /// Computes the features of a set piece by piece, so that a run can be stopped in between.
    ///
    /// # Errors
    /// If no image can be read.
    fn features(&mut self, split: RunSplit, source: &Arc<dyn Source>) -> Result<Features> {
        let mut all = Features::none(self.method.backbone().features());
        for piece in pieces(source) {
            self.stop_if_asked()?;
            let (backbone, policy) = (self.method.backbone(), &self.recipe.augment[0]);
            all.append(eval::backbone_features(&self.online, backbone, &piece, policy)?);
        }
        self.skipped.add(split, &all.skipped);
        if all.labels.is_empty() {
            let first = all.skipped.first().map_or("", |skipped| &skipped.reason);
            return Err(Error::Unreadable(format!(
                "{}: none of its {} {split} images can be read; the first: {first}",
                self.recipe.data.path,
                source.len()
            )));
        }
        Ok(all)
    }

    /// Accuracy of the method's classifier on a set; `None` without a classifier.
    fn classifier_accuracy(&mut self, test: &Arc<dyn Source>) -> Result<Option<f64>> {
        let (mut right, mut count) = (0, 0);
        for piece in pieces(test) {
            self.stop_if_asked()?;
            let Some(classifier) = self.method.classifier() else { return Ok(None) };
            let policy = &self.recipe.augment[0];
            let answers = eval::count_correct(&self.online, classifier, &piece, policy)?;
            (right, count) = (right + answers[0], count + answers[1]);
        }
        Ok(Some(right as f64 / count.max(1) as f64))
    }

    /// Tells the user which images were skipped, and lists them in the run's folder.
    ///
    /// # Errors
    /// If the list cannot be written.
    pub(super) fn tell_skipped(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let folder = self.folder.as_ref().map(|folder| &*folder.path);
        self.skipped.tell(folder)?.iter().for_each(|sentence| watch.note(sentence));
        Ok(())
    }

    /// Fails if more images of a split are unreadable than `data.max_skipped` allows.
    ///
    /// # Errors
    /// [`Error::Unreadable`] in that case.
    pub(super) fn skipped_too_many(&self) -> Result<()> {
        let Images { train, validation, test, .. } = &self.images;
        let length = |source: &Option<Arc<dyn Source>>| source.as_ref().map_or(0, |s| s.len());
        [
            (RunSplit::Training, train.len()),
            (RunSplit::Validation, length(validation)),
            (RunSplit::HeldOut, length(test)),
        ]
        .into_iter()
        .try_for_each(|(split, length)| {
            let complaint = self.skipped.complaint(split, length, self.recipe.data.max_skipped);
            complaint.map_or(Ok(()), |reason| {
                Err(Error::Unreadable(format!("{}: {reason}", self.recipe.data.path)))
            })
        })
    }
}

/// The share of the most frequent label.
fn largest_class(labels: &[u32]) -> f64 {
    let mut times: BTreeMap<u32, usize> = BTreeMap::new();
    labels.iter().for_each(|label| *times.entry(*label).or_default() += 1);
    times.values().max().copied().unwrap_or(0) as f64 / labels.len().max(1) as f64
}

/// Splits a set into pieces of [`PIECE`] images.
fn pieces(source: &Arc<dyn Source>) -> impl Iterator<Item = Subset> + use<> {
    let (source, len) = (source.clone(), source.len());
    (0..len).step_by(PIECE).map(move |from| {
        let to = (from + PIECE).min(len);
        Subset::new(source.clone(), (from as u32..to as u32).collect())
    })
}

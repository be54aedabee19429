//! Measures a run after an epoch: the method's monitors, kNN and classifier accuracy; and draws the report's pictures.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::arena::Arena;
use crate::data::{Source, Subset};
use crate::device::DeviceKind;
use crate::error::{Error, Result};
use crate::eval::{self, Answer, Features, Knn, Quality};
use crate::methods::Reading;
use crate::optim::Rule;
use crate::tensor::Tensor;
use crate::train::folder::Folder;
use crate::train::ranks::shared_skipped;
use crate::train::report::{self, Found};
use crate::train::run::Watch;
use crate::train::skipped::RunSplit;
use crate::train::{Images, Run};

/// Images that a rank evaluates between two checks whether the run is to stop: a multiple of the evaluation's batch.
const PIECE: usize = 1024;

/// The same of a GPU without others: it computes them in as little time, and in each piece begins with nothing to compute.
const PIECE_OF_GPU: usize = 16 * PIECE;

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
        let norm = self.online.gradients().squared_norm().sqrt();
        readings.push(("gradient_norm", Reading::Number(norm)));
        readings.push(("update_ratio", Reading::Number(self.update_ratio())));
        readings.into_iter().map(|(name, reading)| (name.to_owned(), reading)).collect()
    }

    /// The size of the last step's update relative to that of the weights. Its learning rate is that of the schedule; parameters
    /// with a policy of their own count as if they had none.
    fn update_ratio(&self) -> f64 {
        let norm = |values: &Tensor| values.squared_norm().sqrt();
        let lr = match self.recipe.optim.rule {
            Rule::Lars(lars) if lars.lr_in_momentum => 1.0,
            _ => self.schedule.lr(self.begun.saturating_sub(1)),
        };
        lr * norm(self.optimizer.momentum()) / norm(self.online.values()).max(f64::MIN_POSITIVE)
    }

    /// Measures what needs no labels, kNN accuracy on the validation and held-out images and the accuracy of the method's own classifier on the
    /// held-out ones, and draws the report's pictures. The ranks, which all call this, each compute a share of it.
    ///
    /// # Errors
    /// On all ranks if on one: if images cannot be read, or too many of a split are skipped; if the run was asked to stop.
    pub(super) fn evaluate(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<Accuracies> {
        let Images { train, validation, test, .. } = self.images.clone();
        let mut accuracies = Accuracies { quality: self.quality()?, ..Accuracies::default() };
        if validation.is_none() && test.is_none() {
            return Ok(accuracies);
        }
        // Not `train` itself: it does not know which of its images lie on the GPU.
        let bank = self.features(RunSplit::Training, &self.loader.images())?;
        let mut skipped = BTreeMap::from([(RunSplit::Training, bank.skipped.len())]);
        if let Some(validation) = validation {
            let queries = self.features(RunSplit::Validation, &validation)?;
            skipped.insert(RunSplit::Validation, queries.skipped.len());
            accuracies.validation = Some(accuracy(&self.knn(&bank, &queries, 0)?, &queries));
        }
        if let Some(test) = test {
            let queries = self.features(RunSplit::HeldOut, &test)?;
            skipped.insert(RunSplit::HeldOut, queries.skipped.len());
            accuracies.chance = Some(largest_class(&queries.labels));
            let answers = self.knn(&bank, &queries, report::NEIGHBOURS)?;
            accuracies.knn = Some(accuracy(&answers, &queries));
            let (bank, queries) = ((&*train, &bank), (&*test, &queries));
            self.draw(epoch, &Found { bank, queries, answers: &answers }, watch);
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
        let asked = self.asked_to_stop();
        self.together(asked)?;
        let policies = self.recipe.policies(self.method.views())?;
        let (backbone, train) = (self.method.backbone(), self.loader.images());
        eval::quality(&self.online, backbone, &train, &policies, self.recipe.seed)
    }

    /// Returns what kNN answers for each of `queries`, with the `keep` nearest images. Each rank asks for a share of them.
    fn knn(&mut self, bank: &Features, queries: &Features, keep: usize) -> Result<Vec<Answer>> {
        let (knn, device) = (Knn::default(), self.online.device());
        let own = queries.rows(self.group().share(queries.labels.len()));
        let own = match own.labels.len() {
            0 => Ok(Vec::new()), // there are more ranks than queries
            _ => eval::knn_answers(bank, &own, knn, keep, device),
        };
        let own = self.together(own)?;
        let group = self.group();
        if group.size() == 1 {
            return Ok(own);
        }
        // An answer is its class, then cosine and row of each image that it keeps.
        let keep = keep.min(knn.k).min(bank.labels.len());
        let words = own.into_iter().flat_map(|Answer { class, nearest }| {
            let nearest = nearest.into_iter().flat_map(|(cosine, row)| [cosine.to_bits(), row]);
            [class].into_iter().chain(nearest)
        });
        let all = group.all_gather_rows("answers", words.collect());
        group.check()?;
        let answer = |words: &[u32]| Answer {
            class: words[0],
            nearest: words[1..].chunks(2).map(|pair| (f32::from_bits(pair[0]), pair[1])).collect(),
        };
        Ok(all.chunks(1 + 2 * keep).map(answer).collect())
    }

    /// Draws the report's pictures, on the rank that has the run's folder.
    fn draw(&self, epoch: u32, found: &Found<'_>, watch: &mut dyn Watch) {
        if let Some(Folder { path, .. }) = self.folder.as_ref().filter(|_| self.recipe.watch.report)
        {
            let (views, device) = (self.method.views(), self.online.device());
            let drawn = report::write_gallery(path, &self.recipe, views, epoch + 1, found, device);
            if let Err(error) = drawn {
                watch.note(&format!("the pictures could not be drawn: {error}"));
            }
        }
    }

    /// Computes the features of a set, each rank a share of it, piece by piece, so that a run can be stopped in between.
    ///
    /// # Errors
    /// If no image can be read.
    fn features(&mut self, split: RunSplit, source: &Arc<dyn Source>) -> Result<Features> {
        let mut own = Features::none(self.method.backbone().features());
        for piece in pieces(source, &self.online) {
            let (backbone, policy) = (self.method.backbone(), &self.recipe.augment[0]);
            let found = self
                .asked_to_stop()
                .and_then(|()| eval::backbone_features(&self.online, backbone, &piece, policy));
            own.append(self.together(found)?);
        }
        let all = self.gathered(own, source.len())?;
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

    /// Gathers the features of all ranks' shares of `count` images.
    fn gathered(&self, own: Features, count: usize) -> Result<Features> {
        let group = self.group();
        if group.size() == 1 {
            return Ok(own);
        }
        let Features { values, d, labels, skipped } = own;
        let before = group.share(count).start as u32;
        let all = Features {
            values: group.all_gather_rows(eval::FEATURES, values),
            d,
            labels: group.all_gather_rows(eval::FEATURES, labels),
            skipped: shared_skipped(group, skipped, before)?,
        };
        group.check()?;
        Ok(all)
    }

    /// Accuracy of the method's classifier on a set, of which each rank has a share; `None` without a classifier.
    fn classifier_accuracy(&mut self, test: &Arc<dyn Source>) -> Result<Option<f64>> {
        let mut counts = [0; 2]; // right, all
        for piece in pieces(test, &self.online) {
            let Some(classifier) = self.method.classifier() else { return Ok(None) };
            let policy = &self.recipe.augment[0];
            let found = self
                .asked_to_stop()
                .and_then(|()| eval::count_correct(&self.online, classifier, &piece, policy));
            let found = self.together(found)?;
            (0..2).for_each(|i| counts[i] += found[i] as u64);
        }
        self.group().all_reduce_sum("answers", &mut counts);
        self.group().check()?;
        Ok(Some(counts[0] as f64 / counts[1].max(1) as f64))
    }

    /// [`Group::together`] in an evaluation, which stops on all ranks, with a checkpoint, if one was asked to.
    fn together<T>(&mut self, own: Result<T>) -> Result<T> {
        let all = self.group().together(own);
        if matches!(all, Err(Error::Stopped(_))) {
            self.stop()?;
        }
        all
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

/// The share of the queries that kNN answers rightly.
fn accuracy(answers: &[Answer], queries: &Features) -> f64 {
    let right =
        answers.iter().zip(&queries.labels).filter(|(answer, label)| answer.class == **label);
    right.count() as f64 / answers.len() as f64
}

/// Splits this rank's share of a set into pieces: as many on every rank, of which the last may be empty.
fn pieces(source: &Arc<dyn Source>, arena: &Arena) -> impl Iterator<Item = Subset> + use<> {
    let (group, on_gpu) = (arena.group(), arena.device().kind() == DeviceKind::Cuda);
    let piece = if on_gpu && group.size() == 1 { PIECE_OF_GPU } else { PIECE };
    let (source, share) = (source.clone(), group.share(source.len()));
    let rounds = source.len().div_ceil(group.size()).div_ceil(piece);
    (0..rounds).map(move |round| {
        let from = (share.start + round * piece).min(share.end);
        let to = (from + piece).min(share.end);
        Subset::new(source.clone(), (from as u32..to as u32).collect())
    })
}

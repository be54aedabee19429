//! What a run measures of itself after an epoch: monitors, kNN, its classifier; and the report's pictures.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::data::{Source, Subset};
use crate::error::{Error, Result};
use crate::eval::{self, Features, Knn};
use crate::methods::Reading;
use crate::train::Run;
use crate::train::folder::Folder;
use crate::train::report::{self, Found};
use crate::train::run::Watch;

/// Images whose features are made between two looks at whether the run is to stop; whole batches of the evaluation.
const EVALUATED: usize = 1024;

impl Run {
    /// The method's monitors, and the norm of the last step's gradient.
    pub(super) fn monitors(&self, loss: f64) -> BTreeMap<String, Reading> {
        let mut readings = self.method.monitors(&self.online, self.steps.embeddings(), loss);
        let squares = self.online.gradients().to_f64().iter().map(|g| g * g).sum::<f64>();
        readings.push(("gradient_norm", Reading::Number(squares.sqrt())));
        readings.into_iter().map(|(name, reading)| (name.to_owned(), reading)).collect()
    }

    /// kNN accuracy on the held-out images, and the report's pictures; `None` without any.
    pub(super) fn knn(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<Option<f64>> {
        let measured = self.measured_knn(epoch, watch);
        self.unless_diverged(measured, watch)
    }

    /// Drops the figure of a run that has diverged and carries on all the same: it would be that of chance.
    fn unless_diverged(
        &self,
        measured: Result<Option<f64>>,
        watch: &mut dyn Watch,
    ) -> Result<Option<f64>> {
        match measured {
            Err(Error::Diverged(reason)) if self.recipe.watch.carry_on => {
                watch.note(&format!("no accuracy this time: {reason}"));
                Ok(None)
            }
            measured => measured,
        }
    }

    fn measured_knn(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<Option<f64>> {
        let Some(test) = self.images.test.clone() else { return Ok(None) };
        let train = self.images.train.clone();
        let (bank, queries) = (self.features(&train)?, self.features(&test)?);
        if bank.labels.is_empty() || queries.labels.is_empty() {
            watch.note("kNN cannot be measured: no training or no held-out image can be read");
            return Ok(None);
        }
        let device = self.online.device();
        let answers =
            eval::knn_answers(&bank, &queries, Knn::default(), report::NEIGHBOURS, device)?;
        let right = answers.iter().zip(&queries.labels).filter(|(a, label)| a.class == **label);
        let accuracy = right.count() as f64 / answers.len() as f64;
        if let Some(Folder { path, .. }) = self.folder.as_ref().filter(|_| self.recipe.watch.report)
        {
            let found =
                Found { bank: (&*train, &bank), queries: (&*test, &queries), answers: &answers };
            let views = self.method.views();
            let written =
                report::write_gallery(path, &self.recipe, views, epoch + 1, &found, device);
            if let Err(error) = written {
                watch.note(&format!("no pictures this time: {error}"));
            }
        }
        Ok(Some(accuracy))
    }

    /// Features of a whole set, some at a time, so that a run can be stopped between.
    fn features(&mut self, source: &Arc<dyn Source>) -> Result<Features> {
        let mut all = Features::none(self.method.backbone().features());
        for part in parts(source) {
            self.stop_if_asked()?;
            let (backbone, policy) = (self.method.backbone(), &self.recipe.augment[0]);
            all.append(eval::backbone_features(&self.online, backbone, &part, policy)?);
        }
        Ok(all)
    }

    /// Accuracy of the method's classifier on the held-out images, likewise; `None` without a classifier or without images.
    pub(super) fn accuracy(&mut self, watch: &mut dyn Watch) -> Result<Option<f64>> {
        let measured = self.measured_accuracy();
        self.unless_diverged(measured, watch)
    }

    fn measured_accuracy(&mut self) -> Result<Option<f64>> {
        let Some(test) = self.images.test.clone() else { return Ok(None) };
        let (mut right, mut all) = (0, 0);
        for part in parts(&test) {
            self.stop_if_asked()?;
            let Some(classifier) = self.method.classifier() else { return Ok(None) };
            let policy = &self.recipe.augment[0];
            let found = eval::count_correct(&self.online, classifier, &part, policy)?;
            (right, all) = (right + found[0], all + found[1]);
        }
        Ok((all > 0).then(|| right as f64 / all as f64)) // none if no image can be read
    }
}

/// A set in parts of [`EVALUATED`] images.
fn parts(source: &Arc<dyn Source>) -> impl Iterator<Item = Subset> + use<> {
    let (source, len) = (source.clone(), source.len());
    (0..len).step_by(EVALUATED).map(move |from| {
        let to = (from + EVALUATED).min(len);
        Subset::new(source.clone(), (from as u32..to as u32).collect())
    })
}

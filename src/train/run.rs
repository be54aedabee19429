//! A training run: how it is made, its epochs one after the other, and when checkpoints are written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;

use crate::arena::Arena;
use crate::data::{Loader, Source};
use crate::device::{Device, DeviceKind, Group};
use crate::error::{Error, Result};
use crate::eval::{Quality, Spread};
use crate::files::find;
use crate::methods::{self, Method, Reading, RunInfo, State};
use crate::optim::{Optimizer, Schedule};
use crate::recipes::Recipe;
use crate::train::epoch::{Chooser, WAITING, due};
use crate::train::folder::{self, Folder};
use crate::train::resume::Progress;
use crate::train::skipped::SkippedImages;
use crate::train::trace::Trace;
use crate::train::{GIVEN, Images, Steps, checkpoint, images as sets, ranks, report, teacher};
use crate::weights::WeightFile;

/// One step, as reported to a [`Watch`].
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// The step's number, from 1.
    pub step: u64,
    /// The number of steps of the run.
    pub total: u64,
    /// The loss.
    pub loss: f64,
    /// The learning rate.
    pub lr: f64,
    /// Views per second, over the steps of this epoch so far.
    pub views_per_second: f64,
}

/// One epoch, as reported to a [`Watch`].
#[derive(Clone, Debug)]
pub struct EpochReport {
    /// The epoch's number, from 1.
    pub epoch: u32,
    /// The number of epochs of the run.
    pub epochs: u32,
    /// The mean loss of the epoch's steps.
    pub loss: f64,
    /// The spread of the last step's embeddings.
    pub spread: Option<Spread>,
    /// kNN accuracy on the held-out images, in `0..=1`, if measured.
    pub knn: Option<f64>,
    /// kNN accuracy on the validation images, in `0..=1`, if there are any and it was measured.
    pub validation: Option<f64>,
    /// Accuracy of the method's own classifier on the held-out images, in `0..=1`, if it has one and it was measured.
    pub accuracy: Option<f64>,
    /// What the features are worth without labels, if measured.
    pub quality: Option<Quality>,
    /// The method's monitors after the last step.
    pub monitors: BTreeMap<String, Reading>,
    /// Views per second, without evaluation; NaN if the run was resumed after the epoch's last batch.
    pub views_per_second: f64,
    /// The share of the training time spent waiting for data.
    pub waiting: f64,
}

/// Receives the progress of a run. The library itself prints nothing.
pub trait Watch {
    /// Called after each step.
    fn step(&mut self, report: &StepReport);
    /// Called after each epoch.
    fn epoch(&mut self, report: &EpochReport);
    /// Called with a sentence for the user.
    fn note(&mut self, sentence: &str);
}

/// A training run.
pub struct Run {
    pub(super) recipe: Recipe,
    pub(super) method: Box<dyn Method>,
    pub(super) online: Arena,
    pub(super) optimizer: Optimizer,
    pub(super) schedule: Schedule,
    pub(super) loader: Loader,
    pub(super) images: Images,
    pub(super) folder: Option<Folder>,
    pub(super) steps: Steps,
    /// Steps begun. [`Progress`] counts the steps whose losses are known; on a GPU these are fewer in the middle of an epoch.
    pub(super) begun: u64,
    pub(super) progress: Progress,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) trace: Option<Trace>,
    /// During an evaluation, before which everything was saved: how the run would be resumed.
    pub(super) evaluating: Arc<Mutex<Option<String>>>,
    /// Images that could not be read.
    pub(super) skipped: SkippedImages,
    /// The step of the last checkpoint that this process wrote or resumed from.
    pub(super) saved_step: Option<u64>,
    /// The step after which the ranks last agreed on their state.
    pub(super) agreed_step: Option<u64>,
    /// The checkpoint written before the last evaluation, and when the one before was written.
    pub(super) provisional: Option<(PathBuf, Instant)>,
    /// When the last checkpoint was written, or else when the run began.
    pub(super) saved: Instant,
}

impl Run {
    /// Prepares a run on a device. With `folder`, creates it and writes the resolved recipe there.
    ///
    /// # Errors
    /// If recipe, data and device do not fit together, or `folder` is not empty.
    pub fn new(recipe: &Recipe, device: &Device, folder: Option<&Path>) -> Result<Self> {
        Self::in_group(recipe, device, folder, &Group::alone())
    }

    /// Prepares this rank's part of a run of several ranks, which all call this with the same recipe. Rank 0 has the folder.
    ///
    /// # Errors
    /// As [`Run::new`], on all ranks if on one ([`Group::together`]); if the ranks differ in recipe, images or program, or cannot
    /// train this recipe.
    pub fn in_group(
        recipe: &Recipe,
        device: &Device,
        folder: Option<&Path>,
        group: &Group,
    ) -> Result<Self> {
        Self::begin(recipe, device, None, folder, group)
    }

    /// As [`Run::new`], on images that the program has: [`Images::given`].
    ///
    /// # Errors
    /// As [`Run::new`].
    pub fn on(
        recipe: &Recipe,
        device: &Device,
        images: Images,
        folder: Option<&Path>,
    ) -> Result<Self> {
        let mut recipe = recipe.clone();
        recipe.data.path = GIVEN.into();
        Self::begin(&recipe, device, Some(images), folder, &Group::alone())
    }

    fn begin(
        recipe: &Recipe,
        device: &Device,
        images: Option<Images>,
        folder: Option<&Path>,
        group: &Group,
    ) -> Result<Self> {
        let folder = folder.filter(|_| group.leads());
        group.join(device)?;
        let prepared = folder
            .map_or(Ok(()), folder::check_free)
            .and_then(|()| Self::prepare(recipe, device, images, true, group));
        let mut run = group.together(prepared)?;
        ranks::compare(&run, group)?;
        let created = folder.map(|folder| Folder::create(folder, recipe)).transpose();
        run.folder = group.together(created)?;
        Ok(run)
    }

    /// Prepares a run without a folder, on these images or those at the recipe's path. A `fresh` run reads its first weights from files; a
    /// resumed one has them in its checkpoint.
    pub(super) fn prepare(
        recipe: &Recipe,
        device: &Device,
        images: Option<Images>,
        fresh: bool,
        group: &Group,
    ) -> Result<Self> {
        let mut method = recipe.build_method()?;
        ranks::check(recipe, &*method, group)?;
        if let Some(what) = method.without_cuda().filter(|_| device.kind() == DeviceKind::Cuda) {
            let name = &recipe.method.name;
            return Err(Error::Config(format!(
                "{name}: {what} has no CUDA kernels: train it with --device cpu"
            )));
        }
        methods::check_micro_batches(&*method, recipe.train.batch, recipe.train.micro_batches)?;
        let images = images.map_or_else(|| Images::open(&recipe.data), Ok)?;
        images.check_readable(&recipe.data)?;
        let loader_threads = match (recipe.train.loader_threads, group.launch()) {
            (0, Some(launch)) => launch.threads(),
            (threads, _) => threads,
        };
        let mut loader = Loader::new(
            images.train.clone(),
            recipe.policies(method.views())?,
            recipe.train.batch,
            recipe.seed,
            loader_threads,
            device,
        )?
        .shared(group, recipe.train.micro_batches)?;
        if let Some(bytes) = recipe.data.gpu_bytes()? {
            loader = loader.keep_at_most(bytes);
        }
        let mut online = Arena::new(method.layout(), device, recipe.seed)
            .in_group(group)
            .with_recompute(recipe.train.recompute);
        if let Some(file) = recipe.train.init.as_ref().filter(|_| fresh) {
            let file = Path::new(file);
            let other = teacher::other_classes(&WeightFile::open(file)?, images.train.classes())?;
            let classifier = recipe.train.init_classifier && other.is_none();
            checkpoint::init_fitted(file, &mut online, classifier, true)?;
        }
        let optimizer = Optimizer::new(recipe.optim.rule, &online);
        let schedule = recipe.schedule(images.train.len());
        method.start(
            &online,
            &RunInfo {
                seed: recipe.seed,
                batch: recipe.train.batch,
                images: images.train.len(),
                per_epoch: schedule.per_epoch.max(1),
                total: schedule.total.max(1),
            },
        )?;
        if let Some((file, teacher)) = method.teacher().filter(|_| fresh) {
            teacher::check(&file, recipe, images.train.classes())?;
            checkpoint::load_weights(&file, teacher)?;
        }
        // A class that the method cannot take is an error now, not when its first image comes.
        let class = |i| images.train.label(i).map_or(-1, |label| label as i32);
        let labels = (0..images.train.len()).map(class);
        let extremes = [labels.clone().min().unwrap_or(-1), labels.max().unwrap_or(-1)];
        method.labels(&extremes)?;
        method.prepare(0);
        let checksums = |set: &Arc<dyn Source>| sets::checksums(&**set, recipe.seed, device);
        let mut run = Self {
            recipe: recipe.clone(),
            method,
            online,
            optimizer,
            schedule,
            loader,
            progress: Progress {
                images: images.train.len(),
                classes: images.train.classes().to_vec(),
                checksums: Some(checksums(&images.train)?),
                held_out: images.test.as_ref().map(checksums).transpose()?,
                ..Progress::default()
            },
            images,
            folder: None,
            steps: Steps::new(device).with_micro_batches(recipe.train.micro_batches),
            begun: 0,
            stop: Arc::default(),
            trace: None,
            evaluating: Arc::default(),
            skipped: SkippedImages::default(),
            saved_step: None,
            agreed_step: None,
            provisional: None,
            saved: Instant::now(),
        };
        run.set_policies();
        Ok(run)
    }

    /// Sets the optimizer's policy for each parameter: the method may change them with its phase.
    pub(super) fn set_policies(&mut self) {
        let (method, peak) = (&self.method, self.schedule.peak);
        self.optimizer.set_policies(self.online.layout(), |slot| method.param_policy(slot, peak));
    }

    /// Returns the weights.
    pub fn online(&self) -> &Arena {
        &self.online
    }

    /// Returns the method.
    pub fn method(&self) -> &dyn Method {
        &*self.method
    }

    /// Returns the method's state next to the online weights.
    pub fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        self.method.state()
    }

    /// Returns the training and held-out images.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// Returns the learning-rate schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Traces `steps` of this process's first steps, after two that allocate memory, and writes a Chrome trace to a file: phases
    /// and operations, forward and backward, by the host's clock, and a GPU's kernels by its own. Until the trace is written, a
    /// GPU's steps are launched, not replayed.
    pub fn trace(&mut self, file: &Path, steps: u64) {
        self.trace = Some(Trace::new(file, steps));
        self.steps = self.fresh_steps().without_capture();
    }

    pub(super) fn fresh_steps(&self) -> Steps {
        Steps::new(self.online.device()).with_micro_batches(self.recipe.train.micro_batches)
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// If the loss diverges or becomes NaN, or the embeddings collapse: the message says what was seen and what to try. If the
    /// run was [asked to stop](Run::stop_when). If data cannot be read or a file cannot be written. Checkpoints written earlier
    /// stay.
    pub fn train(&mut self, watch: &mut dyn Watch) -> Result<()> {
        self.begun = self.progress.step;
        let trained = self.train_epochs(watch).map_err(|error| self.with_newest_checkpoint(error));
        if trained.is_err() && self.progress.step == 0 {
            self.folder.take().into_iter().for_each(folder::discard);
        }
        if let (Err(error), Some(Folder { metrics, .. })) = (&trained, &mut self.folder) {
            // An error here would hide the first one. A resumed run drops the line.
            let _ = metrics.write(&json!({ "stopped": error.to_string() }));
        }
        if let Some(trace) = &self.trace {
            watch.note(&trace.unwritten());
        }
        self.diagnose(watch);
        self.write_report(watch);
        trained
    }

    /// Says how the run went. A log that cannot be read back does not stop a run.
    fn diagnose(&self, watch: &mut dyn Watch) {
        let Some(Folder { path, .. }) = &self.folder else { return };
        let found = report::diagnosis(path).unwrap_or_default();
        found.iter().for_each(|finding| watch.note(&finding.sentence));
    }

    /// Writes the run's report. A report that cannot be written does not stop a run.
    fn write_report(&self, watch: &mut dyn Watch) {
        if let Some(Folder { path, .. }) = self.folder.as_ref().filter(|_| self.recipe.watch.report)
            && let Err(error) = report::write_report(&[path], &path.join(report::REPORT))
        {
            watch.note(&format!("the report could not be written: {error}"));
        }
    }

    fn train_epochs(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let epochs = self.epochs();
        self.images.notes().for_each(|note| watch.note(note));
        if let Some(loss) = self.folder.as_ref().and_then(|folder| folder.metrics.loss()) {
            watch.note(loss);
        }
        if let Some(sentence) = self.loader.place_images()? {
            watch.note(&sentence);
        }
        self.dump_start()?;
        for epoch in self.progress.epoch..epochs {
            let (report, best) = self.epoch(epoch, watch)?;
            if report.waiting > WAITING {
                watch.note(&format!(
                    "{:.0}% of this epoch was spent waiting for images: give the loader more threads, or faster files",
                    100.0 * report.waiting
                ));
            }
            watch.epoch(&report);
            let last = epoch + 1 == epochs;
            self.save_after_epoch(due(self.recipe.train.checkpoint_every, epoch) || last, best)?;
            if !last {
                self.write_report(watch);
            }
        }
        self.add_skipped()?;
        self.tell_skipped(watch)?;
        if let (Some(folder), Some(step)) = (&self.folder, self.progress.best_step)
            && find(&checkpoint::best(&folder.path)).is_ok_and(|best| best.is_some())
        {
            watch.note(&format!(
                "best.safetensors is the checkpoint of step {step}, chosen by {}",
                match self.chooser() {
                    Chooser::Validation => "kNN on the validation images, a share of the training split",
                    Chooser::HeldOut => "kNN on the held-out images, so its accuracy on them is optimistic; data.validation=0.1 \
                         chooses on a tenth of the training images instead",
                    Chooser::RankMe => "the rank of its features (RankMe), as there are no labels to measure accuracy with",
                }
            ));
        }
        Ok(())
    }

    /// Writes a checkpoint before an evaluation, which may fail. The evaluation's end makes it permanent or removes it.
    pub(super) fn save_before_evaluation(&mut self) -> Result<()> {
        if self.saved_step != Some(self.progress.step) {
            let keep = self.recipe.train.keep + 1; // it must not push out one that stays
            let before = self.saved;
            self.provisional = self.save(keep)?.map(|file| (file, before));
        }
        Ok(())
    }

    /// Writes the checkpoint of an epoch's end if it is due or the best so far.
    fn save_after_epoch(&mut self, due: bool, best: bool) -> Result<()> {
        let provisional = self.provisional.take();
        if due || best {
            if let Some(file) = self.checkpoint()?.filter(|_| best) {
                checkpoint::keep_as_best(&file)?;
            }
        } else if let Some((file, before)) = provisional {
            std::fs::remove_file(&file).map_err(Error::io(&file))?;
            (self.saved, self.saved_step) = (before, None);
        }
        Ok(())
    }
}

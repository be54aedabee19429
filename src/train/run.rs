//! The training loop: steps, epochs, what is logged, and when checkpoints are written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use crate::arena::Arena;
use crate::data::{Batch, Loader};
use crate::device::{Device, DeviceKind, Group, trace_phase};
use crate::error::{Error, Result};
use crate::eval::{self, Quality, Spread};
use crate::files::{create_folder, find};
use crate::methods::{self, Method, Reading, RunInfo, State};
use crate::optim::{Optimizer, Schedule};
use crate::recipes::Recipe;
use crate::train::diagnosis::is_judged;
use crate::train::evaluation::Accuracies;
use crate::train::folder::{self, Folder};
use crate::train::health::{collapse, divergence};
use crate::train::resume::Progress;
use crate::train::skipped::SkippedImages;
use crate::train::trace::Trace;
use crate::train::{Images, StepResult, Steps, Training, checkpoint, parity_dump, ranks, report};

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
    /// Views per second, without evaluation.
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

/// The fraction of an epoch spent waiting for data above which a warning is printed.
const WAITING: f64 = 0.1;

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
    trace: Option<Trace>,
    /// During an evaluation, before which everything was saved: how the run would be resumed.
    pub(super) evaluating: Arc<Mutex<Option<String>>>,
    /// Images that could not be read.
    pub(super) skipped: SkippedImages,
    /// The step of the last checkpoint that this process wrote or resumed from.
    pub(super) saved_step: Option<u64>,
    /// The step after which the ranks last agreed on their state.
    pub(super) agreed_step: Option<u64>,
    /// The checkpoint written before the last evaluation, and when the one before was written.
    provisional: Option<(PathBuf, Instant)>,
    /// When the last checkpoint was written, or else when the run began.
    pub(super) saved: Instant,
}

/// The epoch in progress, and what its speed is computed from.
struct EpochProgress {
    start: Instant,
    /// Batches done before the run was last stopped: they count in the loss, not in the speed.
    first: usize,
    steps: usize,
    /// Views of all batches from `first` on.
    views: usize,
}

/// How long the parts of an epoch took.
struct EpochTimes {
    training: Duration,
    evaluation: Duration,
}

/// What the best checkpoint is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Chooser {
    Validation,
    HeldOut,
    RankMe,
}

/// Makes an error of a sentence that says what went wrong with the numbers.
type Alarm = fn(String) -> Error;

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
        let folder = folder.filter(|_| group.leads());
        group.join(device)?;
        let prepared = folder
            .map_or(Ok(()), folder::check_free)
            .and_then(|()| Self::prepare(recipe, device, true, group));
        let mut run = group.together(prepared)?;
        ranks::compare(&run, group)?;
        let created = folder.map(|folder| Folder::create(folder, recipe)).transpose();
        run.folder = group.together(created)?;
        Ok(run)
    }

    /// Prepares a run without a folder. A `fresh` run reads its first weights from files; a resumed one has them in its checkpoint.
    pub(super) fn prepare(
        recipe: &Recipe,
        device: &Device,
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
        let images = Images::open(&recipe.data)?;
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
            checkpoint::init_fitted(Path::new(file), &mut online, true)?;
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
            checkpoint::load_weights(&file, teacher)?;
        }
        // A class that the method cannot take is an error now, not when its first image comes.
        let class = |i| images.train.label(i).map_or(-1, |label| label as i32);
        let labels = (0..images.train.len()).map(class);
        let extremes = [labels.clone().min().unwrap_or(-1), labels.max().unwrap_or(-1)];
        method.labels(&extremes)?;
        method.prepare(0);
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

    fn fresh_steps(&self) -> Steps {
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
    fn save_before_evaluation(&mut self) -> Result<()> {
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

    /// The number of epochs that the schedule's steps take.
    pub(super) fn epochs(&self) -> u32 {
        let batches = self.loader.batches_per_epoch().max(1) as u64;
        self.schedule.total.div_ceil(batches) as u32
    }

    /// The steps of an epoch: fewer than its batches if the schedule ends in it.
    fn steps_of(&self, epoch: u32) -> usize {
        let batches = self.loader.batches_per_epoch();
        let before = u64::from(epoch) * batches as u64;
        batches.min(self.schedule.total.saturating_sub(before) as usize)
    }

    /// Trains an epoch, or the rest of one, then evaluates and logs it. Returns also whether it is the best so far.
    fn epoch(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<(EpochReport, bool)> {
        let (first, steps) = (self.progress.position, self.steps_of(epoch));
        let views = (steps - first) * self.recipe.train.batch * self.method.views();
        let waited = self.loader.waited();
        let so_far = EpochProgress { start: Instant::now(), first, steps, views };
        self.train_batches(&so_far, watch)?;
        let training = so_far.start.elapsed();
        let loss = self.progress.losses / steps as f64;
        if first < steps {
            self.observe_last_step(loss)?;
        }
        let unhealthy = self.check_health(epoch, loss);
        let last = epoch + 1 == self.epochs() || unhealthy.is_some();
        let measure = due(self.recipe.train.knn_every, epoch) || last;
        self.add_skipped()?;
        if unhealthy.is_none() && (measure || self.skipped_too_many().is_err()) {
            self.save_before_evaluation()?;
        }
        let evaluation = Instant::now();
        let accuracies = if measure {
            self.evaluate_saved(epoch, unhealthy.is_some(), watch)?
        } else {
            Accuracies::default()
        };
        let evaluation = evaluation.elapsed();
        let unhealthy =
            unhealthy.or_else(|| self.check_features(epoch, accuracies.quality.as_ref()));
        self.tell_skipped(watch)?;
        let checked = self.skipped_too_many();
        self.group().together(checked)?;
        let waiting = self.loader.waited() - waited;
        let times = EpochTimes { training, evaluation };
        let report = EpochReport {
            epoch: epoch + 1,
            epochs: self.epochs(),
            loss,
            spread: self.progress.spread,
            knn: accuracies.knn,
            validation: accuracies.validation,
            accuracy: accuracies.classifier,
            quality: accuracies.quality.clone(),
            monitors: self.progress.monitors.clone(),
            views_per_second: views as f64 / training.as_secs_f64(),
            waiting: waiting.as_secs_f64() / training.as_secs_f64().max(1e-9),
        };
        let best = self.is_best(&accuracies);
        self.log_epoch(&report, &times, &accuracies, best)?;
        if let Some((alarm, sentence)) = unhealthy {
            self.raise(alarm, sentence, watch)?;
        }
        self.progress.begin_epoch(epoch + 1);
        Ok((report, best))
    }

    /// Evaluates after a checkpoint, so that the process may be ended meanwhile.
    fn evaluate_saved(
        &mut self,
        epoch: u32,
        is_unhealthy: bool,
        watch: &mut dyn Watch,
    ) -> Result<Accuracies> {
        let evaluating = self.evaluating.clone();
        let set = |sentence| *evaluating.lock().unwrap_or_else(PoisonError::into_inner) = sentence;
        let saved = self.folder.is_none() || self.saved_step == Some(self.progress.step);
        set((saved && self.group().leads()).then(|| self.stopped()));
        let accuracies = self.evaluate_together(epoch, watch);
        set(None);
        match accuracies {
            // A diverged run has no accuracy: it would be that of chance. If it does not carry on, what is wrong is reported next.
            Err(Error::Diverged(reason)) if is_unhealthy || self.recipe.watch.carry_on => {
                watch.note(&format!("no accuracy after this epoch: {reason}"));
                Ok(Accuracies::default())
            }
            accuracies => accuracies,
        }
    }

    /// What chooses the best checkpoint: accuracy on the validation images if there are any, else on the held-out ones, else RankMe.
    fn chooser(&self) -> Chooser {
        match (&self.images.validation, &self.images.test) {
            (Some(_), _) => Chooser::Validation,
            (None, Some(_)) => Chooser::HeldOut,
            (None, None) => Chooser::RankMe,
        }
    }

    /// Whether an epoch is the best so far, which is then remembered.
    fn is_best(&mut self, accuracies: &Accuracies) -> bool {
        let chooser = self.chooser();
        let progress = &mut self.progress;
        let (measured, so_far) = match chooser {
            Chooser::Validation => (accuracies.validation, &mut progress.best_knn),
            Chooser::HeldOut => (accuracies.knn, &mut progress.best_knn),
            Chooser::RankMe => {
                let rank = accuracies.quality.as_ref().map(|quality| quality.rank_me);
                (rank.filter(|rank| rank.is_finite()), &mut progress.best_rank)
            }
        };
        let best = measured > *so_far; // `None` is less than any number
        if best {
            (*so_far, progress.best_step) = (measured, Some(progress.step));
        }
        best
    }

    /// Trains the epoch's remaining batches. Stops or writes checkpoints between them, but not after the last one: a checkpoint
    /// does not hold the embeddings, which have to be observed first.
    fn train_batches(&mut self, so_far: &EpochProgress, watch: &mut dyn Watch) -> Result<()> {
        for i in so_far.first..so_far.steps {
            if let Some(trace) = &self.trace {
                trace.before_step(self.online.device());
            }
            let batch = trace_phase("wait for images", || self.loader.next_batch());
            let wishes = self.agree(self.begun, matches!(batch, Err(Error::Stopped(_))))?;
            if wishes.stop {
                self.catch_up(so_far, watch)?;
                return self.stop();
            }
            if wishes.save && i > so_far.first {
                self.catch_up(so_far, watch)?;
                self.checkpoint()?;
            }
            let batch = batch?;
            self.dump_views(&batch)?;
            let training = Training {
                method: &mut *self.method,
                online: &mut self.online,
                optimizer: &mut self.optimizer,
                schedule: &self.schedule,
            };
            let known = self.steps.run(training, &batch, self.begun)?;
            self.begun += 1;
            known.into_iter().try_for_each(|done| self.log_step(done, so_far, watch))?;
            self.trace_step(so_far, watch)?;
        }
        self.catch_up(so_far, watch)
    }

    /// Reads the spread, the prototypes and the monitors after an epoch's last step, while its embeddings exist.
    fn observe_last_step(&mut self, loss: f64) -> Result<()> {
        let embeddings = self.all_embeddings();
        self.progress.spread = embeddings.as_ref().map(eval::spread);
        self.progress.prototypes_used = self.method.prototypes_used();
        self.progress.monitors = self.monitors(embeddings.as_ref(), loss);
        self.online.device().check()?;
        self.between_steps()
    }

    /// Appends an epoch's line to the log.
    fn log_epoch(
        &mut self,
        report: &EpochReport,
        times: &EpochTimes,
        accuracies: &Accuracies,
        best: bool,
    ) -> Result<()> {
        let Accuracies { skipped, chance, .. } = accuracies;
        let chooser = self.chooser();
        let Some(Folder { metrics, .. }) = &mut self.folder else { return Ok(()) };
        let training = times.training.as_secs_f64();
        metrics.write(&json!({
            "epoch": report.epoch,
            "step": self.progress.step,
            "loss": report.loss,
            "embedding_std": report.spread.map(|s| s.std),
            "effective_rank": report.spread.map(|s| s.effective_rank),
            "uniformity": report.spread.map(|s| s.uniformity),
            "quality": report.quality,
            "prototypes_used": self.progress.prototypes_used,
            "knn": report.knn,
            "chance": chance,
            "validation": report.validation,
            "best_by": best.then_some(chooser),
            "skipped": (!skipped.is_empty()).then_some(skipped),
            "accuracy": report.accuracy,
            "views_per_second": report.views_per_second,
            "waiting": report.waiting,
            "seconds": {
                "training": (1.0 - report.waiting) * training,
                "waiting": report.waiting * training,
                "evaluation": times.evaluation.as_secs_f64(),
            },
            "monitors": report.monitors,
        }))
    }

    /// Ends the trace after its last step.
    fn trace_step(&mut self, so_far: &EpochProgress, watch: &mut dyn Watch) -> Result<()> {
        let Some(trace) = &mut self.trace else { return Ok(()) };
        if trace.after_step()? {
            watch.note(&trace.sentence());
            self.trace = None;
            self.catch_up(so_far, watch)?;
            self.steps = self.fresh_steps();
        }
        Ok(())
    }

    /// Says what is wrong with an epoch's numbers, if something is.
    fn check_health(&self, epoch: u32, loss: f64) -> Option<(Alarm, String)> {
        let (watch, Progress { spread, prototypes_used, first_loss, .. }) =
            (&self.recipe.watch, &self.progress);
        let epoch = epoch + 1;
        if let Some(seen) = divergence(watch, *first_loss, self.method.chance_loss(), loss) {
            return Some((
                Error::Diverged,
                format!(
                    "the run diverged in epoch {epoch}: {seen}; lower optim.lr or lengthen optim.warmup_epochs"
                ),
            ));
        }
        let seen = collapse(watch, *spread, *prototypes_used)?;
        Some((
            Error::Collapsed,
            format!(
                "the embeddings collapsed in epoch {epoch}: {seen}; \
                 lower optim.lr, lengthen optim.warmup_epochs or check the augmentation"
            ),
        ))
    }

    /// Says that the features have collapsed, if they have: embeddings whose batch norm or negatives keep them apart do not show it.
    fn check_features(&self, epoch: u32, quality: Option<&Quality>) -> Option<(Alarm, String)> {
        let (epoch, &Quality { rank_me, compared, .. }) = (epoch + 1, quality?);
        (is_judged(compared) && rank_me < self.recipe.watch.collapsed_rank_me).then(|| {
            let sentence = format!(
                "the features collapsed in epoch {epoch}: they use {rank_me:.1} directions (RankMe); \
                 lower optim.lr (selfsup tune-lr finds a rate) or lengthen optim.warmup_epochs"
            );
            (Error::Collapsed as Alarm, sentence)
        })
    }

    /// Waits for the losses of all steps begun: required before weights are read or saved.
    fn catch_up(&mut self, so_far: &EpochProgress, watch: &mut dyn Watch) -> Result<()> {
        let known = self.steps.finish()?;
        known.into_iter().try_for_each(|done| self.log_step(done, so_far, watch))
    }

    /// Logs and reports a step whose loss is known.
    fn log_step(
        &mut self,
        done: StepResult,
        so_far: &EpochProgress,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let StepResult { step, lr, loss } = done;
        self.online.device().check()?; // a failed device returns garbage
        if !loss.is_finite() && self.progress.losses.is_finite() {
            let sentence = format!(
                "the loss became {loss} at step {step} (learning rate {lr:.4}): lower optim.lr or lengthen optim.warmup_epochs"
            );
            self.raise(Error::Diverged, sentence, watch)?;
        }
        let progress = &mut self.progress;
        progress.losses += loss;
        progress.first_loss.get_or_insert(loss);
        (progress.step, progress.position) = (step, progress.position + 1);
        let done = (progress.position - so_far.first) as f64 / (so_far.steps - so_far.first) as f64;
        watch.step(&StepReport {
            step,
            total: self.schedule.total,
            loss,
            lr,
            views_per_second: done * so_far.views as f64 / so_far.start.elapsed().as_secs_f64(),
        });
        if let Some(Folder { metrics, .. }) = &mut self.folder {
            metrics.write(&json!({ "step": step, "loss": loss, "lr": lr }))?;
        }
        Ok(())
    }

    /// Adds the newest checkpoint to a device's error.
    fn with_newest_checkpoint(&self, error: Error) -> Error {
        let (Error::Device(reason), Some(Folder { path, .. })) = (&error, &self.folder) else {
            return error;
        };
        Error::Device(match checkpoint::newest(path) {
            Ok(file) => format!("{reason}; the newest checkpoint is {}", file.display()),
            Err(_) => format!("{reason}; no checkpoint had been written yet"),
        })
    }

    /// Stops a run whose numbers went wrong; only reports it if the recipe says to carry on.
    fn raise(&self, alarm: Alarm, sentence: String, watch: &mut dyn Watch) -> Result<()> {
        if !self.recipe.watch.carry_on {
            return Err(alarm(sentence + "; watch.carry_on=true continues all the same"));
        }
        watch.note(&sentence);
        Ok(())
    }

    /// The folder to dump the next step's views to; `None` if they are not wanted.
    fn dump_folder(&self) -> Option<PathBuf> {
        let Folder { path, .. } = self.folder.as_ref()?;
        (self.begun < self.recipe.train.dump_views).then(|| path.join(parity_dump::FOLDER))
    }

    /// Dumps the first weights if the views of the first step are to be dumped.
    fn dump_start(&mut self) -> Result<()> {
        let Some(folder) = self.dump_folder().filter(|_| self.begun == 0) else { return Ok(()) };
        create_folder(&folder)?;
        let state = self.method.state();
        let (online, optimizer) = (&self.online, &self.optimizer);
        checkpoint::save(&folder, 0, online, optimizer, state, HashMap::new(), 1)?;
        Ok(())
    }

    fn dump_views(&self, batch: &Batch) -> Result<()> {
        let Some(folder) = self.dump_folder() else { return Ok(()) };
        parity_dump::write_views(&folder, self.begun, batch)
    }
}

/// Whether something done every `every` epochs is due after `epoch`, which counts from 0.
fn due(every: u32, epoch: u32) -> bool {
    every > 0 && (epoch + 1).is_multiple_of(every)
}

//! An epoch of a run: its steps, its evaluation, what is logged of it, and whether its numbers are sound.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use crate::data::Batch;
use crate::device::trace_phase;
use crate::error::{Error, Result};
use crate::eval::{self, Quality};
use crate::files::create_folder;
use crate::train::diagnosis::is_judged;
use crate::train::evaluation::Accuracies;
use crate::train::folder::Folder;
use crate::train::health::{collapse, divergence};
use crate::train::resume::Progress;
use crate::train::run::{EpochReport, Run, StepReport, Watch};
use crate::train::{StepResult, Training, checkpoint, parity_dump};

/// The fraction of an epoch spent waiting for data above which a warning is printed.
pub(super) const WAITING: f64 = 0.1;

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
pub(super) enum Chooser {
    Validation,
    HeldOut,
    RankMe,
}

/// Makes an error of a sentence that says what went wrong with the numbers.
type Alarm = fn(String) -> Error;

impl Run {
    /// The number of epochs that the schedule's steps take.
    pub(super) fn epochs(&self) -> u32 {
        let batches = self.loader.batches_per_epoch().max(1) as u64;
        self.schedule.total.div_ceil(batches) as u32
    }

    /// The steps of an epoch: fewer than its batches if the schedule ends in it.
    pub(super) fn steps_of(&self, epoch: u32) -> usize {
        let batches = self.loader.batches_per_epoch();
        let before = u64::from(epoch) * batches as u64;
        batches.min(self.schedule.total.saturating_sub(before) as usize)
    }

    /// Trains an epoch, or the rest of one, then evaluates and logs it. Returns also whether it is the best so far.
    pub(super) fn epoch(
        &mut self,
        epoch: u32,
        watch: &mut dyn Watch,
    ) -> Result<(EpochReport, bool)> {
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
            // Of no views at all, where an epoch had only its evaluation left, there is no speed.
            views_per_second: if views > 0 {
                views as f64 / training.as_secs_f64()
            } else {
                f64::NAN
            },
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
    pub(super) fn chooser(&self) -> Chooser {
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
            let batch = trace_phase("wait for images", || self.next_batch());
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
            self.steps.take_notice().iter().for_each(|sentence| watch.note(sentence));
            self.begun += 1;
            known.into_iter().try_for_each(|done| self.log_step(done, so_far, watch))?;
            self.trace_step(so_far, watch)?;
        }
        self.catch_up(so_far, watch)
    }

    /// Returns the next batch. Its views are written to where the steps of a GPU read them.
    fn next_batch(&mut self) -> Result<Batch> {
        let mut crops = self.steps.take_views();
        if crops.is_empty() {
            return self.loader.next_batch();
        }
        let batch = self.loader.next_into(&mut crops)?;
        Ok(Batch { crops, ..batch })
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
    pub(super) fn with_newest_checkpoint(&self, error: Error) -> Error {
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
    pub(super) fn dump_start(&mut self) -> Result<()> {
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
pub(super) fn due(every: u32, epoch: u32) -> bool {
    every > 0 && (epoch + 1).is_multiple_of(every)
}

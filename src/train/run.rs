//! One training run: data, method, optimiser and what is written, step after step.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::arena::Arena;
use crate::data::{Batch, Loader};
use crate::device::{Device, DeviceKind, trace_phase};
use crate::error::{Error, Result};
use crate::eval::{self, Spread};
use crate::methods::{self, Method, Reading, RunInfo};
use crate::optim::{Optimizer, Schedule};
use crate::recipes::Recipe;
use crate::train::folder::{self, Folder};
use crate::train::health::{collapse, diverged};
use crate::train::resume::Progress;
use crate::train::trace::Trace;
use crate::train::{Images, StepResult, Steps, Training, checkpoint, parity_dump, report};

/// What a step looked like.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Steps done, from 1.
    pub step: u64,
    /// Steps of the run.
    pub total: u64,
    /// Its loss.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Views a second, over the steps of this epoch so far.
    pub views_per_second: f64,
}

/// What an epoch looked like.
#[derive(Clone, Debug)]
pub struct EpochReport {
    /// Epochs done, from 1.
    pub epoch: u32,
    /// Epochs of the run.
    pub epochs: u32,
    /// Mean loss of its steps.
    pub loss: f64,
    /// How far the embeddings of its last step were spread.
    pub spread: Option<Spread>,
    /// kNN accuracy on held-out images, in `0..=1`, if it was measured.
    pub knn: Option<f64>,
    /// The method's own classifier's accuracy on held-out images, in `0..=1`, if it has one and it was measured.
    pub accuracy: Option<f64>,
    /// What the method's monitors show after its last step.
    pub monitors: BTreeMap<String, Reading>,
    /// Views a second, evaluation excluded.
    pub views_per_second: f64,
    /// Share of its time that the run waited for data.
    pub waiting: f64,
}

/// Who is told how a run goes. The library itself prints nothing.
pub trait Watch {
    /// A step is done.
    fn step(&mut self, report: &StepReport);
    /// An epoch is done.
    fn epoch(&mut self, report: &EpochReport);
    /// Something worth a sentence.
    fn note(&mut self, sentence: &str);
}

/// Above this share of an epoch the wait for data is worth a sentence.
const WAITING: f64 = 0.1;

/// A run under way.
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
    /// Steps begun. [`Progress`] counts those whose losses are known, which on a GPU are fewer while an epoch lasts.
    pub(super) begun: u64,
    pub(super) progress: Progress,
    pub(super) stop: Arc<AtomicBool>,
    trace: Option<Trace>,
    /// When the last checkpoint was written, or the run began.
    pub(super) saved: Instant,
}

/// An epoch under way.
struct EpochProgress {
    start: Instant,
    /// Batches that were done before, by a run that was stopped: they count in the loss, not in the speed.
    first: usize,
    steps: usize,
    /// Views of all batches from the first on.
    views: usize,
}

impl Run {
    /// Prepares a run on a device; with `folder`, makes it and writes the resolved recipe there.
    ///
    /// # Errors
    /// When recipe, data and device do not go together, or `folder` already holds a run.
    pub fn new(recipe: &Recipe, device: &Device, folder: Option<&Path>) -> Result<Self> {
        let mut run = Self::prepare(recipe, device, true)?;
        run.folder = folder.map(|folder| Folder::create(folder, recipe)).transpose()?;
        Ok(run)
    }

    /// A run without a folder; weights from files are read if it is a `fresh` one.
    pub(super) fn prepare(recipe: &Recipe, device: &Device, fresh: bool) -> Result<Self> {
        let mut method = recipe.build_method()?;
        if let Some(what) = method.without_cuda().filter(|_| device.kind() == DeviceKind::Cuda) {
            let name = &recipe.method.name;
            return Err(Error::Config(format!(
                "{name}: {what} has no CUDA kernels: train it with --device cpu"
            )));
        }
        methods::check_micro_batches(&*method, recipe.train.batch, recipe.train.micro_batches)?;
        let images = Images::open(&recipe.data)?;
        let loader = Loader::new(
            images.train.clone(),
            recipe.policies(method.views())?,
            recipe.train.batch,
            recipe.seed,
            recipe.train.loader_threads,
            device,
        )?;
        let mut online = Arena::new(method.layout(), device, recipe.seed);
        if let Some(file) = recipe.train.init.as_ref().filter(|_| fresh) {
            checkpoint::init_weights(Path::new(file), &mut online)?;
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
        // A class that the method has no place for is told now, not when its image comes.
        let classes = |i| images.train.label(i).map_or(-1, |label| label as i32);
        let all = (0..images.train.len()).map(classes);
        let extremes = [all.clone().min().unwrap_or(-1), all.max().unwrap_or(-1)];
        method.labels(&extremes)?;
        method.prepare(0);
        let mut run = Self {
            recipe: recipe.clone(),
            method,
            online,
            optimizer,
            schedule,
            loader,
            progress: Progress { images: images.train.len(), ..Progress::default() },
            images,
            folder: None,
            steps: Steps::new(device).in_parts(recipe.train.micro_batches),
            begun: 0,
            stop: Arc::default(),
            trace: None,
            saved: Instant::now(),
        };
        run.set_policies();
        Ok(run)
    }

    /// Asks the method how its slots are to be treated in this phase.
    pub(super) fn set_policies(&mut self) {
        let (method, peak) = (&self.method, self.schedule.peak);
        self.optimizer.set_policies(self.online.layout(), |slot| method.param_policy(slot, peak));
    }

    /// The weights.
    pub fn online(&self) -> &Arena {
        &self.online
    }

    /// The method.
    pub fn method(&self) -> &dyn Method {
        &*self.method
    }

    /// Training and held-out images.
    pub fn images(&self) -> &Images {
        &self.images
    }

    /// The learning rate, step by step.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Writes some of the first steps of this process, after two that ask for memory, to a file as a Chrome trace: phases,
    /// operations forward and backward by the host's clock, and a GPU's kernels by its own. Until then a GPU's steps are launched,
    /// not replayed.
    pub fn trace(&mut self, file: &Path, steps: u64) {
        self.trace = Some(Trace::new(file, steps));
        self.steps = self.fresh_steps().launched();
    }

    fn fresh_steps(&self) -> Steps {
        Steps::new(self.online.device()).in_parts(self.recipe.train.micro_batches)
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// When the loss is no longer a number or the embeddings collapse, with a sentence on what was seen and what to try; when
    /// the run was [asked to stop](Run::stop_when); when data cannot be read or a file cannot be written. Checkpoints written
    /// before stay.
    pub fn train(&mut self, watch: &mut dyn Watch) -> Result<()> {
        self.begun = self.progress.step;
        let trained = self.train_epochs(watch).map_err(|error| self.with_what_is_left(error));
        if trained.is_err() && self.progress.step == 0 {
            self.folder.take().into_iter().for_each(folder::discard);
        }
        if let (Err(error), Some(Folder { metrics, .. })) = (&trained, &mut self.folder) {
            // Its own error is what is told; a run that goes on drops the line.
            let _ = metrics.write(&json!({ "stopped": error.to_string() }));
        }
        self.report(watch);
        trained
    }

    /// Writes the run's page; a run does not end because it cannot be written.
    fn report(&self, watch: &mut dyn Watch) {
        if let Some(Folder { path, .. }) = self.folder.as_ref().filter(|_| self.recipe.watch.report)
            && let Err(error) = report::write_report(&[path], &path.join(report::REPORT))
        {
            watch.note(&format!("no report this time: {error}"));
        }
    }

    fn train_epochs(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let epochs = self.recipe.train.epochs;
        self.images.notes().for_each(|note| watch.note(note));
        if let Some(sentence) = self.loader.place_images()? {
            watch.note(&sentence);
        }
        self.record_start()?;
        for epoch in self.progress.epoch..epochs {
            let report = self.epoch(epoch, watch)?;
            if report.waiting > WAITING {
                watch.note(&format!(
                    "{:.0}% of this epoch was spent waiting for images: give the loader more threads, or faster files",
                    100.0 * report.waiting
                ));
            }
            watch.epoch(&report);
            let last = epoch + 1 == epochs;
            let best = report.knn > self.progress.best_knn; // nothing is less than any number
            if best {
                self.progress.best_knn = report.knn;
            }
            if (due(self.recipe.train.checkpoint_every, epoch) || last || best)
                && let Some(file) = self.checkpoint()?.filter(|_| best)
            {
                checkpoint::keep_as_best(&file)?;
            }
            if !last {
                self.report(watch);
            }
        }
        for skipped in self.loader.skipped() {
            watch.note(&format!("skipped image {}: {}", skipped.index, skipped.reason));
        }
        Ok(())
    }

    fn epoch(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<EpochReport> {
        let waited = self.loader.waited();
        let (first, steps) = (self.progress.position, self.loader.batches_per_epoch());
        let views = (steps - first) * self.recipe.train.batch * self.method.views();
        let so_far = EpochProgress { start: Instant::now(), first, steps, views };
        for i in first..steps {
            if let Some(trace) = &self.trace {
                trace.before_step(self.online.device());
            }
            let batch = trace_phase("wait for images", || self.loader.next_batch());
            if let Err(Error::Stopped(_)) = batch {
                self.stop_if_asked()?;
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
            known.into_iter().try_for_each(|done| self.tell(done, &so_far, watch))?;
            self.traced(&so_far, watch)?;
            // After the last one its embeddings are looked at first: a checkpoint does not hold them.
            if i + 1 < steps && self.pauses() {
                self.catch_up(&so_far, watch)?;
                self.between_steps()?;
            }
        }
        self.catch_up(&so_far, watch)?;
        let elapsed = so_far.start.elapsed();
        let loss = self.progress.losses / steps as f64;
        if first < steps {
            self.progress.spread = self.steps.embeddings().map(eval::spread);
            self.progress.prototypes_used = self.method.prototypes_used();
            self.progress.monitors = self.monitors(loss);
            self.online.device().check()?;
            self.between_steps()?;
        }
        let Progress { spread, prototypes_used, .. } = self.progress;
        let seen = self.check_health(epoch, loss);
        let last = epoch + 1 == self.recipe.train.epochs || seen.is_some();
        let measure = due(self.recipe.train.knn_every, epoch) || last;
        let evaluation = Instant::now();
        let knn = if measure { self.knn(epoch, watch)? } else { None };
        let accuracy = if measure { self.accuracy(watch)? } else { None };
        let evaluation = evaluation.elapsed();
        let share = |part: Duration| part.as_secs_f64() / elapsed.as_secs_f64().max(1e-9);
        let report = EpochReport {
            epoch: epoch + 1,
            epochs: self.recipe.train.epochs,
            loss,
            spread,
            knn,
            accuracy,
            monitors: self.progress.monitors.clone(),
            views_per_second: views as f64 / elapsed.as_secs_f64(),
            waiting: share(self.loader.waited() - waited),
        };
        if let Some(Folder { metrics, .. }) = &mut self.folder {
            metrics.write(&json!({
                "epoch": report.epoch,
                "step": self.progress.step,
                "loss": report.loss,
                "embedding_std": spread.map(|s| s.std),
                "effective_rank": spread.map(|s| s.effective_rank),
                "uniformity": spread.map(|s| s.uniformity),
                "prototypes_used": prototypes_used,
                "knn": knn,
                "accuracy": accuracy,
                "views_per_second": report.views_per_second,
                "waiting": report.waiting,
                "seconds": {
                    "training": (1.0 - report.waiting) * elapsed.as_secs_f64(),
                    "waiting": report.waiting * elapsed.as_secs_f64(),
                    "evaluation": evaluation.as_secs_f64(),
                },
                "monitors": report.monitors,
            }))?;
        }
        if let Some(seen) = seen {
            self.alarm(watch, || seen)?;
        }
        let progress = &mut self.progress;
        (progress.epoch, progress.position, progress.losses) = (epoch + 1, 0, 0.0);
        (progress.spread, progress.prototypes_used) = (None, None);
        progress.monitors.clear();
        Ok(report)
    }

    /// Ends the trace, if there is one and this was its last step.
    fn traced(&mut self, so_far: &EpochProgress, watch: &mut dyn Watch) -> Result<()> {
        let Some(trace) = &mut self.trace else { return Ok(()) };
        if trace.after_step()? {
            watch.note(&trace.told());
            self.trace = None;
            self.catch_up(so_far, watch)?;
            self.steps = self.fresh_steps();
        }
        Ok(())
    }

    /// What the numbers of an epoch say against it, if they do.
    fn check_health(&self, epoch: u32, loss: f64) -> Option<String> {
        let (watch, Progress { spread, prototypes_used, first_loss, .. }) =
            (&self.recipe.watch, &self.progress);
        let epoch = epoch + 1;
        if let Some(seen) = diverged(watch, *first_loss, loss) {
            return Some(format!(
                "the run diverged in epoch {epoch}: {seen}; lower optim.lr or lengthen optim.warmup_epochs"
            ));
        }
        let seen = collapse(watch, *spread, *prototypes_used)?;
        Some(format!(
            "the embeddings collapsed in epoch {epoch}: {seen}; \
             lower optim.lr, lengthen optim.warmup_epochs or check the augmentation"
        ))
    }

    /// Waits for the losses of all steps begun: before weights are looked at, or written.
    fn catch_up(&mut self, so_far: &EpochProgress, watch: &mut dyn Watch) -> Result<()> {
        let known = self.steps.finish()?;
        known.into_iter().try_for_each(|done| self.tell(done, so_far, watch))
    }

    /// Writes down a step whose loss is known.
    fn tell(
        &mut self,
        done: StepResult,
        so_far: &EpochProgress,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let StepResult { step, lr, loss } = done;
        self.online.device().check()?; // what a failed device gives is no number
        if !loss.is_finite() && self.progress.losses.is_finite() {
            self.alarm(watch, || format!(
                "the loss became {loss} at step {step} (learning rate {lr:.4}): lower optim.lr or lengthen optim.warmup_epochs"
            ))?;
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

    /// A device's failure with what is left of the run.
    fn with_what_is_left(&self, error: Error) -> Error {
        let (Error::Device(reason), Some(Folder { path, .. })) = (&error, &self.folder) else {
            return error;
        };
        Error::Device(match checkpoint::newest(path) {
            Ok(file) => format!("{reason}; the newest checkpoint is {}", file.display()),
            Err(_) => format!("{reason}; no checkpoint had been written yet"),
        })
    }

    /// Stops a run whose numbers went wrong, or says what is wrong where the recipe has it carry on.
    fn alarm(&self, watch: &mut dyn Watch, sentence: impl FnOnce() -> String) -> Result<()> {
        if !self.recipe.watch.carry_on {
            return Err(Error::Diverged(sentence() + "; watch.carry_on=true goes on all the same"));
        }
        watch.note(&sentence());
        Ok(())
    }

    /// The folder of a record of this run's first steps, if one is asked for and this is one of them.
    fn record(&self) -> Option<PathBuf> {
        let Folder { path, .. } = self.folder.as_ref()?;
        (self.begun < self.recipe.train.dump_views).then(|| path.join(parity_dump::FOLDER))
    }

    fn record_start(&mut self) -> Result<()> {
        let Some(folder) = self.record().filter(|_| self.begun == 0) else { return Ok(()) };
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let state = self.method.state();
        let (online, optimizer) = (&self.online, &self.optimizer);
        checkpoint::save(&folder, 0, online, optimizer, state, HashMap::new(), 1)?;
        Ok(())
    }

    fn dump_views(&self, batch: &Batch) -> Result<()> {
        self.record().map_or(Ok(()), |folder| parity_dump::write_views(&folder, self.begun, batch))
    }
}

/// Whether something done every `every` epochs is due after `epoch`, which counts from 0.
fn due(every: u32, epoch: u32) -> bool {
    every > 0 && (epoch + 1).is_multiple_of(every)
}

//! One training run: data, method, optimiser and what is written, step after step.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::arena::Arena;
use crate::data::{self, Batch, Loader, Source, Split, Subset};
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::eval::{self, Knn, Spread};
use crate::methods::{self, Course, DataSettings, Method, Reading, Readings, Recipe};
use crate::optim::{Optimizer, Schedule};
use crate::train::{Done, Metrics, Steps, Training, checkpoint, replay};

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
    pub monitors: Readings,
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

/// Below this share of `1 / sqrt(d)` embeddings have collapsed. Healthy runs stay above 0.3.
const COLLAPSED: f64 = 0.05;

/// Below this many directions embeddings lie on one line. A batch norm that ends a head keeps their deviation up, but not this.
const ON_A_LINE: f64 = 1.3;

/// Below this many prototypes all images have one assignment.
const ONE_PROTOTYPE: f64 = 1.5;

/// Above this share of an epoch the wait for data is worth a sentence.
const WAITING: f64 = 0.1;

/// The images of a run.
#[derive(Clone)]
pub struct Images {
    /// What is trained on.
    pub train: Arc<dyn Source>,
    /// What is held out; none where the set has no such part or no labels.
    pub test: Option<Arc<dyn Source>>,
}

impl Images {
    /// The images that a recipe names.
    ///
    /// # Errors
    /// When the path does not hold a data set.
    pub fn open(settings: &DataSettings) -> Result<Self> {
        let open = |split, limit: usize| -> Result<Arc<dyn Source>> {
            let all: Arc<dyn Source> = if settings.path == "fashion-scattered" {
                Arc::new(data::fashion_scattered(split))
            } else {
                data::open(Path::new(&settings.path), split)?.into()
            };
            Ok(if limit == 0 { all } else { Arc::new(Subset::spread(all, limit)) })
        };
        let train = open(Split::Train, settings.limit)?;
        if train.classes().is_empty() {
            return Ok(Self { train, test: None });
        }
        let test = match open(Split::Test, settings.test_limit) {
            Ok(test) => Some(test),
            Err(Error::Format { .. }) => None, // a set without a held-out part trains all the same
            Err(error) => return Err(error),
        };
        Ok(Self { train, test })
    }

    /// The held-out images, for a command that cannot do without.
    ///
    /// # Errors
    /// When there are none.
    pub fn held_out(&self) -> Result<&Arc<dyn Source>> {
        self.test.as_ref().ok_or_else(|| {
            Error::config(
                "evaluation needs labelled held-out images: class folders in test/ or val/",
            )
        })
    }
}

/// A run under way.
pub struct Run {
    recipe: Recipe,
    method: Box<dyn Method>,
    online: Arena,
    optimizer: Optimizer,
    schedule: Schedule,
    loader: Loader,
    images: Images,
    folder: Option<(PathBuf, Metrics)>,
    steps: Steps,
    /// Steps begun.
    step: u64,
}

/// An epoch under way.
struct SoFar {
    start: Instant,
    /// Steps done before it.
    first: u64,
    steps: usize,
    /// Views of all its steps.
    views: usize,
    /// The sum of the losses that are known.
    losses: f64,
}

impl Run {
    /// Prepares a run on a device; with `folder`, makes it and writes the resolved recipe there.
    ///
    /// # Errors
    /// When recipe, data and device do not go together, or `folder` already holds a run.
    pub fn new(recipe: &Recipe, device: &Device, folder: Option<&Path>) -> Result<Self> {
        let mut method = methods::build(recipe)?;
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
        if let Some(file) = &recipe.train.init {
            checkpoint::init_weights(Path::new(file), &mut online)?;
        }
        let mut optimizer = Optimizer::new(recipe.optim.rule, &online);
        let schedule = recipe.schedule(images.train.len());
        method.start(
            &online,
            &Course {
                seed: recipe.seed,
                batch: recipe.train.batch,
                images: images.train.len(),
                per_epoch: schedule.per_epoch.max(1),
                total: schedule.total.max(1),
            },
        )?;
        if let Some((file, teacher)) = method.teacher() {
            checkpoint::load_weights(&file, teacher)?;
        }
        method.prepare(0);
        optimizer.treat(online.layout(), |slot| method.care(slot, schedule.peak));
        let folder = folder.map(|folder| start_folder(folder, recipe)).transpose()?;
        Ok(Self {
            recipe: recipe.clone(),
            method,
            online,
            optimizer,
            schedule,
            loader,
            images,
            folder,
            steps: Steps::new(device).in_parts(recipe.train.micro_batches),
            step: 0,
        })
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

    /// Trains to the end.
    ///
    /// # Errors
    /// When the loss is no longer a number or the embeddings collapse, with a sentence on what was seen and what to try; when
    /// data cannot be read or a file cannot be written. Checkpoints written before stay.
    pub fn train(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let epochs = self.recipe.train.epochs;
        self.record_start()?;
        for epoch in 0..epochs {
            let report = self.epoch(epoch, watch).map_err(|e| self.with_what_is_left(e))?;
            if report.waiting > WAITING {
                watch.note(&format!(
                    "{:.0}% of this epoch was spent waiting for images: give the loader more threads, or faster files",
                    100.0 * report.waiting
                ));
            }
            watch.epoch(&report);
            let last = epoch + 1 == epochs;
            if due(self.recipe.train.checkpoint_every, epoch) || last {
                self.checkpoint().map_err(|e| self.with_what_is_left(e))?;
            }
        }
        for skipped in self.loader.skipped() {
            watch.note(&format!("skipped image {}: {}", skipped.index, skipped.reason));
        }
        Ok(())
    }

    fn epoch(&mut self, epoch: u32, watch: &mut dyn Watch) -> Result<EpochReport> {
        let waited = self.loader.waited();
        let steps = self.loader.batches_per_epoch();
        let mut so_far = SoFar {
            start: Instant::now(),
            first: self.step,
            steps,
            views: steps * self.recipe.train.batch * self.method.views(),
            losses: 0.0,
        };
        for _ in 0..steps {
            let batch = self.loader.next_batch()?;
            self.record_views(&batch)?;
            let training = Training {
                method: &mut *self.method,
                online: &mut self.online,
                optimizer: &mut self.optimizer,
                schedule: &self.schedule,
            };
            let known = self.steps.run(training, &batch, self.step)?;
            self.step += 1;
            known.into_iter().try_for_each(|done| self.tell(done, &mut so_far, watch))?;
        }
        let known = self.steps.finish()?;
        known.into_iter().try_for_each(|done| self.tell(done, &mut so_far, watch))?;
        let SoFar { start, views, losses, .. } = so_far;
        let elapsed = start.elapsed();
        let spread = self.steps.embeddings().map(eval::spread);
        let monitors = self.monitors(losses / steps as f64);
        self.online.device().check()?;
        let collapsed = collapse(spread, self.method.prototypes_used());
        let last = epoch + 1 == self.recipe.train.epochs || collapsed.is_some();
        let measure = due(self.recipe.train.knn_every, epoch) || last;
        let knn = if measure { self.knn()? } else { None };
        let accuracy = if measure { self.accuracy()? } else { None };
        let share = |part: Duration| part.as_secs_f64() / elapsed.as_secs_f64().max(1e-9);
        let report = EpochReport {
            epoch: epoch + 1,
            epochs: self.recipe.train.epochs,
            loss: losses / steps as f64,
            spread,
            knn,
            accuracy,
            monitors,
            views_per_second: views as f64 / elapsed.as_secs_f64(),
            waiting: share(self.loader.waited() - waited),
        };
        if let Some((_, metrics)) = &mut self.folder {
            let monitors: BTreeMap<_, _> = report.monitors.iter().cloned().collect();
            metrics.write(&json!({
                "epoch": report.epoch,
                "step": self.step,
                "loss": report.loss,
                "embedding_std": spread.map(|s| s.std),
                "effective_rank": spread.map(|s| s.effective_rank),
                "prototypes_used": self.method.prototypes_used(),
                "knn": knn,
                "accuracy": accuracy,
                "views_per_second": report.views_per_second,
                "waiting": report.waiting,
                "monitors": monitors,
            }))?;
        }
        if let Some(seen) = collapsed {
            return Err(Error::Diverged(format!(
                "the embeddings collapsed in epoch {}: {seen}; \
                 lower optim.lr, lengthen optim.warmup_epochs or check the augmentation",
                epoch + 1,
            )));
        }
        Ok(report)
    }

    /// The method's monitors, and the norm of the last step's gradient.
    fn monitors(&self, loss: f64) -> Readings {
        let mut readings = self.method.monitors(&self.online, self.steps.embeddings(), loss);
        let squares = self.online.gradients().to_f64().iter().map(|g| g * g).sum::<f64>();
        readings.push(("gradient_norm", Reading::Number(squares.sqrt())));
        readings
    }

    /// Writes down a step whose loss is known.
    fn tell(&mut self, done: Done, so_far: &mut SoFar, watch: &mut dyn Watch) -> Result<()> {
        let Done { step, lr, loss } = done;
        self.online.device().check()?; // what a failed device gives is no number
        if !loss.is_finite() {
            return Err(Error::Diverged(format!(
                "the loss became {loss} at step {step} (learning rate {lr:.4}): lower optim.lr or lengthen optim.warmup_epochs"
            )));
        }
        so_far.losses += loss;
        let share = (step - so_far.first) as f64 / so_far.steps as f64;
        watch.step(&StepReport {
            step,
            total: self.schedule.total,
            loss,
            lr,
            views_per_second: share * so_far.views as f64 / so_far.start.elapsed().as_secs_f64(),
        });
        if let Some((_, metrics)) = &mut self.folder {
            metrics.write(&json!({ "step": step, "loss": loss, "lr": lr }))?;
        }
        Ok(())
    }

    /// A device's failure with what is left of the run.
    fn with_what_is_left(&self, error: Error) -> Error {
        let (Error::Device(reason), Some((folder, _))) = (&error, &self.folder) else {
            return error;
        };
        Error::Device(match checkpoint::newest(folder) {
            Ok(file) => format!("{reason}; the newest checkpoint is {}", file.display()),
            Err(_) => format!("{reason}; no checkpoint had been written yet"),
        })
    }

    /// kNN accuracy on the held-out images; `None` without any.
    fn knn(&self) -> Result<Option<f64>> {
        let Some(test) = &self.images.test else { return Ok(None) };
        let policy = &self.recipe.augment[0];
        let features = |source: &Arc<dyn Source>| {
            eval::trunk_features(
                &self.online,
                self.method.backbone(),
                &**source,
                policy.size,
                policy.normalise.as_ref(),
            )
        };
        let (bank, queries) = (features(&self.images.train)?, features(test)?);
        eval::knn_accuracy(&bank, &queries, Knn::default(), self.online.device()).map(Some)
    }

    /// Accuracy of the method's classifier on the held-out images; `None` without a classifier or without images.
    fn accuracy(&self) -> Result<Option<f64>> {
        let (Some(test), Some(classifier)) = (&self.images.test, self.method.classifier()) else {
            return Ok(None);
        };
        let policy = &self.recipe.augment[0];
        let normalise = policy.normalise.as_ref();
        eval::classifier_accuracy(&self.online, classifier, &**test, policy.size, normalise)
            .map(Some)
    }

    /// The folder of a record of this run's first steps, if one is asked for and this is one of them.
    fn record(&self) -> Option<PathBuf> {
        let (folder, _) = self.folder.as_ref()?;
        let wanted = self.step < self.recipe.train.record_views;
        wanted.then(|| folder.join(replay::FOLDER))
    }

    fn record_start(&mut self) -> Result<()> {
        let Some(folder) = self.record().filter(|_| self.step == 0) else { return Ok(()) };
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let state = self.method.state();
        let (online, optimizer) = (&self.online, &self.optimizer);
        checkpoint::save(&folder, 0, online, optimizer, state, HashMap::new(), 1)?;
        Ok(())
    }

    fn record_views(&self, batch: &Batch) -> Result<()> {
        self.record().map_or(Ok(()), |folder| replay::write_views(&folder, self.step, batch))
    }

    fn checkpoint(&mut self) -> Result<()> {
        let Some((folder, _)) = &self.folder else { return Ok(()) };
        let metadata = HashMap::from([
            ("format".into(), "pt".into()),
            ("selfsup.step".into(), self.step.to_string()),
            ("selfsup.recipe".into(), self.recipe.to_toml()),
        ]);
        let keep = self.recipe.train.keep;
        let state = self.method.state();
        checkpoint::save(folder, self.step, &self.online, &self.optimizer, state, metadata, keep)?;
        Ok(())
    }
}

/// What a collapse looks like, if it is one.
fn collapse(spread: Option<Spread>, prototypes_used: Option<f64>) -> Option<String> {
    if let Some(Spread { std, effective_rank }) = spread {
        if std < COLLAPSED {
            return Some(format!(
                "their deviation is {std:.4} of 1/sqrt(d), where a healthy run has about 1"
            ));
        }
        if effective_rank < ON_A_LINE {
            return Some(format!(
                "they use {effective_rank:.2} directions, so all lie on one line"
            ));
        }
    }
    let used = prototypes_used.filter(|&used| used < ONE_PROTOTYPE)?;
    Some(format!("images are assigned to {used:.2} prototypes, so all to one"))
}

/// Whether something done every `every` epochs is due after `epoch`, which counts from 0.
fn due(every: u32, epoch: u32) -> bool {
    every > 0 && (epoch + 1).is_multiple_of(every)
}

fn start_folder(folder: &Path, recipe: &Recipe) -> Result<(PathBuf, Metrics)> {
    if folder.join("recipe.toml").exists() {
        return Err(Error::format(folder, "already holds a run: choose another --out"));
    }
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join("recipe.toml");
    std::fs::write(&path, recipe.to_toml()).map_err(Error::io(&path))?;
    Ok((folder.to_path_buf(), Metrics::open(folder)?))
}

//! Stopping a run, and going on with it: to the last bit as if it had never stopped, times and speeds apart.
//!
//! Random numbers are functions of seed, epoch and sample, and schedules of the step, so that what a run needs beside its
//! tensors is where it stands: [`Progress`].

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::Spread;
use crate::methods::Reading;
use crate::recipes::Recipe;
use crate::train::folder::{self, Folder, RECIPE};
use crate::train::{Run, checkpoint};
use crate::weights::{WeightFile, write_whole};

/// Notes in a checkpoint's header.
const PROGRESS_NOTE: &str = "selfsup.progress";
const RECIPE_NOTE: &str = "selfsup.recipe";

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// Steps done.
    pub(super) step: u64,
    /// The epoch under way, from 0.
    pub(super) epoch: u32,
    /// Batches of it that are done; all of them where only its evaluation is missing.
    pub(super) position: usize,
    /// The sum of their losses.
    pub(super) losses: f64,
    /// The run's first loss.
    pub(super) first_loss: Option<f64>,
    /// The best kNN accuracy so far, in `0..=1`.
    pub(super) best_knn: Option<f64>,
    /// Training images, which must not change.
    pub(super) images: usize,
    /// Bytes of `metrics.jsonl`.
    pub(super) metrics: u64,
    /// What the epoch's last step showed, once all batches are done.
    pub(super) prototypes_used: Option<f64>,
    /// The same.
    pub(super) spread: Option<Spread>,
    /// The same.
    #[serde(default)]
    pub(super) monitors: BTreeMap<String, Reading>,
}

/// A run that was stopped or killed, or has ended, in its folder.
pub struct Paused {
    path: PathBuf,
    lock: File,
    recipe: Recipe,
    /// Whether the recipe was changed.
    changed: bool,
    /// Without one the run starts anew.
    checkpoint: Option<WeightFile>,
    progress: Progress,
}

impl Paused {
    /// Opens and locks a run's folder, with `key.path=value` settings on top of its recipe.
    ///
    /// # Errors
    /// When the folder holds no run or another process trains in it, when its newest checkpoint is damaged, or when a setting
    /// would make it another run.
    pub fn open(path: &Path, settings: &[String]) -> Result<Self> {
        let file = path.join(RECIPE);
        if !file.exists() {
            return Err(Error::format(
                path,
                "holds no run to go on with (there is no recipe.toml)",
            ));
        }
        let lock = folder::lock(path)?;
        let recipe = Recipe::load(&file.to_string_lossy(), settings)?;
        let checkpoint =
            checkpoint::last(path)?.map(|path| checkpoint::checked(&path)).transpose()?;
        let mut progress = Progress::default();
        if let Some(file) = &checkpoint {
            let origin = file.path().display().to_string();
            same_run(&recipe, &Recipe::parse(note(file, RECIPE_NOTE)?, &origin, &[])?)?;
            progress = toml::from_str(note(file, PROGRESS_NOTE)?)
                .map_err(|e| Error::format(&origin, format!("{PROGRESS_NOTE} is damaged: {e}")))?;
        }
        let (path, changed) = (path.to_path_buf(), !settings.is_empty());
        Ok(Self { path, lock, recipe, changed, checkpoint, progress })
    }

    /// Its recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }
}

/// A note of a checkpoint.
fn note<'a>(file: &'a WeightFile, key: &str) -> Result<&'a str> {
    let missing =
        || Error::format(file.path(), format!("is no checkpoint: its header has no {key}"));
    file.note(key).ok_or_else(missing)
}

/// The recipe that a checkpoint was made by, with `key.path=value` settings on top.
///
/// # Errors
/// When the file is damaged or no checkpoint of a run, or a setting does not fit.
pub fn recipe_in(checkpoint: &Path, settings: &[String]) -> Result<Recipe> {
    let file = WeightFile::open(checkpoint)?;
    Recipe::parse(note(&file, RECIPE_NOTE)?, &checkpoint.display().to_string(), settings)
}

/// Fails unless a recipe computes what another one did; where files are and how often something is written may change.
fn same_run(now: &Recipe, then: &Recipe) -> Result<()> {
    let mut same = now.clone();
    same.data.path.clone_from(&then.data.path);
    same.watch = then.watch;
    same.train.clone_from(&then.train);
    same.train.epochs = now.train.epochs;
    same.train.batch = now.train.batch;
    same.train.precision = now.train.precision;
    let tables = [same, then.clone()].map(|recipe| recipe.to_toml().parse::<toml::Table>());
    let [Ok(now), Ok(then)] = tables else { unreachable!("a recipe writes what it reads") };
    let Some((key, now, then)) = difference("", &now.into(), &then.into()) else { return Ok(()) };
    Err(Error::Config(format!(
        "{key} was {then} and is now {now}: that is another run, start it with --out; a resumed one may change data.path, \
         train.threads, what is watched and how often something is measured or written"
    )))
}

/// The first key in which two values differ, and what it is in both.
fn difference(key: &str, a: &toml::Value, b: &toml::Value) -> Option<(String, String, String)> {
    let within = |name: &str| if key.is_empty() { name.into() } else { format!("{key}.{name}") };
    match (a, b) {
        (toml::Value::Table(a), toml::Value::Table(b)) => {
            a.keys().chain(b.keys()).find_map(|name| {
                let nothing = toml::Value::String("not set".into());
                let of = |table: &toml::Table| table.get(name).cloned().unwrap_or(nothing.clone());
                difference(&within(name), &of(a), &of(b))
            })
        }
        (toml::Value::Array(a), toml::Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(i, (a, b))| difference(&within(&i.to_string()), a, b))
        }
        _ if a == b => None,
        _ => Some((key.to_owned(), a.to_string(), b.to_string())),
    }
}

impl Run {
    /// Goes on with a run where its newest checkpoint left it: from there on it is, to the last bit, what it would have been.
    ///
    /// # Errors
    /// As [`Run::new`]; when the checkpoint is of another architecture, or the training set has changed in size.
    pub fn resume(paused: Paused, device: &Device) -> Result<Self> {
        let Paused { path, lock, recipe, changed, checkpoint, progress } = paused;
        let mut run = Self::prepare(&recipe, device, checkpoint.is_none())?;
        if let Some(mut file) = checkpoint {
            let (images, epochs) = (run.progress.images, recipe.train.epochs);
            let Progress { epoch, position, step, .. } = progress;
            let batches = run.loader.batches_per_epoch();
            if progress.images != images {
                return Err(Error::Config(format!(
                    "{}: the run had {} training images, now there are {images}: it cannot go on as it was",
                    recipe.data.path, progress.images
                )));
            }
            let steps = u64::from(epoch) * batches as u64 + position as u64;
            if epoch > epochs || position > batches || step != steps {
                let reason = format!("{PROGRESS_NOTE} is damaged: epoch {epoch}, batch {position}");
                return Err(Error::format(file.path(), reason));
            }
            let state = run.method.state();
            checkpoint::restore(&mut file, &mut run.online, &mut run.optimizer, state)?;
            run.progress = progress;
            run.loader
                .seek(if position == batches { epoch + 1 } else { epoch }, position % batches);
            run.method.prepare(step);
            run.set_policies();
        }
        if changed {
            write_whole(&path.join(RECIPE), recipe.to_toml().as_bytes())?;
        }
        run.folder = Some(Folder::open(&path, lock, run.progress.metrics, &run.recipe)?);
        Ok(run)
    }

    /// Makes the run stop, with a checkpoint, soon after `flag` becomes true: between two steps, or while it evaluates.
    pub fn stop_when(&mut self, flag: Arc<AtomicBool>) {
        self.loader.stop_when(flag.clone());
        self.stop = flag;
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.progress.step
    }

    /// Whether all epochs are done, the last one's evaluation included.
    pub fn has_ended(&self) -> bool {
        self.progress.epoch >= self.recipe.train.epochs
    }

    /// Whether something is to happen after the step begun last: a stop, or a checkpoint.
    pub(super) fn pauses(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.checkpoint_is_due(self.begun)
    }

    fn checkpoint_is_due(&self, step: u64) -> bool {
        let train = &self.recipe.train;
        let minutes = train.checkpoint_every_minutes;
        let by_steps =
            train.checkpoint_every_steps > 0 && step.is_multiple_of(train.checkpoint_every_steps);
        by_steps || minutes > 0.0 && self.saved.elapsed().as_secs_f64() >= 60.0 * minutes
    }

    /// What may happen after any step: a stop, or a checkpoint that is due.
    pub(super) fn between_steps(&mut self) -> Result<()> {
        self.stop_if_asked()?;
        if self.checkpoint_is_due(self.progress.step) {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Stops with a checkpoint if that is wanted.
    pub(super) fn stop_if_asked(&mut self) -> Result<()> {
        if !self.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.checkpoint()?;
        let stopped = format!("stopped at step {} of {}", self.progress.step, self.schedule.total);
        Err(Error::Stopped(match &self.folder {
            Some(Folder { path, .. }) => {
                format!("{stopped}; go on with: selfsup train --resume {}", path.display())
            }
            None => format!("{stopped}; nothing is kept without --out"),
        }))
    }

    /// Writes a checkpoint, if the run has a folder; returns the file.
    pub(super) fn checkpoint(&mut self) -> Result<Option<PathBuf>> {
        let Some(folder) = &mut self.folder else { return Ok(None) };
        self.progress.metrics = folder.metrics.synced()?;
        let progress = toml::to_string(&self.progress).expect("progress is plain data");
        let notes = [(RECIPE_NOTE, self.recipe.to_toml()), (PROGRESS_NOTE, progress)];
        let path = checkpoint::save(
            &folder.path,
            self.progress.step,
            &self.online,
            &self.optimizer,
            self.method.state(),
            notes.map(|(key, note)| (key.to_owned(), note)).into(),
            self.recipe.train.keep,
        )?;
        self.saved = Instant::now();
        Ok(Some(path))
    }
}

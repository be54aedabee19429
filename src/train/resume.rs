//! Stops a run and resumes it: the results equal those of a run that never stopped to the last bit, times and speeds excepted.
//!
//! Random numbers are functions of seed, epoch and sample, and schedules are functions of the step. Besides its tensors, a run
//! therefore only needs to know how far it has come: [`Progress`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::data::Source;
use crate::device::{Device, DeviceKind, Group, Precision};
use crate::error::{Error, Result, as_word};
use crate::eval::Spread;
use crate::files::{Lock, find, is_file, is_folder, write_file};
use crate::methods::Reading;
use crate::recipes::Recipe;
use crate::train::changes::{changed, same_run};
use crate::train::folder::{self, Folder, RECIPE};
use crate::train::{Images, Run, checkpoint, images, ranks};
use crate::weights::WeightFile;

/// Notes in a checkpoint's header.
pub(super) const PROGRESS_NOTE: &str = "selfsup.progress";
pub(super) const RECIPE_NOTE: &str = "selfsup.recipe";
/// In which precision the run was trained; missing in files of earlier versions.
const PRECISION_NOTE: &str = "selfsup.precision";

/// How far a run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// Steps done.
    pub(super) step: u64,
    /// The current epoch, from 0.
    pub(super) epoch: u32,
    /// Batches of the epoch that are done; all of them if only its evaluation is missing.
    pub(super) position: usize,
    /// The sum of their losses.
    pub(super) losses: f64,
    /// The run's first loss.
    pub(super) first_loss: Option<f64>,
    /// The best kNN accuracy so far, in `0..=1`: on the validation images if there are any, on the held-out ones otherwise.
    pub(super) best_knn: Option<f64>,
    /// The highest RankMe so far, for runs without labels to measure accuracy with.
    #[serde(default)]
    pub(super) best_rank: Option<f64>,
    /// The step of the checkpoint with that accuracy or rank, which is kept as `best.safetensors`.
    #[serde(default)]
    pub(super) best_step: Option<u64>,
    /// The number of training images, which must not change.
    pub(super) images: usize,
    /// The names of the classes, in the order of their labels; empty without labels, and in files of earlier versions.
    #[serde(default)]
    pub(super) classes: Vec<String>,
    /// Checksums of the names and labels of the training images, and of the pixels of some; `None` in files of earlier versions.
    #[serde(default)]
    pub(super) checksums: Option<[u32; 2]>,
    /// The same of the held-out images, if there are any.
    #[serde(default)]
    pub(super) held_out: Option<[u32; 2]>,
    /// The length of `metrics.jsonl` in bytes.
    pub(super) metrics: u64,
    /// Prototypes in use after the epoch's last step, once all batches are done.
    pub(super) prototypes_used: Option<f64>,
    /// Spread of the embeddings, likewise.
    pub(super) spread: Option<Spread>,
    /// The method's monitors, likewise.
    #[serde(default)]
    pub(super) monitors: BTreeMap<String, Reading>,
}

impl Progress {
    /// Moves on to the beginning of an epoch.
    pub(super) fn begin_epoch(&mut self, epoch: u32) {
        (self.epoch, self.position, self.losses) = (epoch, 0, 0.0);
        (self.spread, self.prototypes_used) = (None, None);
        self.monitors.clear();
    }
}

/// The folder of a run that was stopped or killed or has ended, opened to be resumed.
pub struct Paused {
    path: PathBuf,
    /// Of rank 0.
    lock: Option<Lock>,
    recipe: Recipe,
    /// Whether settings were changed.
    changed: bool,
    /// `None` if the run has to start again, and on ranks other than 0.
    checkpoint: Option<WeightFile>,
    precision: Option<Precision>,
    progress: Progress,
    group: Group,
}

impl Paused {
    /// Opens and locks a run's folder, with `key.path=value` settings on top of its recipe.
    ///
    /// # Errors
    /// If the folder holds no run or another process works in it, if its newest checkpoint is damaged, or if a setting would
    /// change the results.
    pub fn open(path: &Path, settings: &[String]) -> Result<Self> {
        let file = path.join(RECIPE);
        let newest = if is_folder(path)? { checkpoint::last(path)? } else { None };
        let has_recipe = is_file(&file)?;
        if !has_recipe && newest.is_none() {
            return Err(Error::format(path, "holds no run to resume (it has no recipe.toml)"));
        }
        let lock = folder::lock(path)?;
        if let Some(newest) = newest.filter(|_| !has_recipe) {
            // Somebody removed it: a checkpoint has it, too.
            write_file(&file, recipe_in(&newest, &[])?.to_toml().as_bytes())?;
        }
        let written = Recipe::load(&file.to_string_lossy(), &[])?;
        let checkpoint = checkpoint::last(path)?.map(|path| checkpoint::open(&path)).transpose()?;
        let (mut recipe, mut then, mut progress) =
            (written.clone(), written.clone(), Progress::default());
        if let Some(file) = &checkpoint {
            let origin = file.path().display().to_string();
            then = as_meant(Recipe::parse(note(file, RECIPE_NOTE)?, &origin, &[])?, file);
            recipe = as_meant(recipe, file);
            progress = progress_in(file)?;
        }
        recipe = recipe.with(settings)?;
        same_run(&recipe, &then)?;
        let (path, changed, lock) =
            (path.to_path_buf(), !settings.is_empty() || recipe != written, Some(lock));
        let group = Group::alone();
        let precision = checkpoint.as_ref().and_then(precision_in).or(recipe.train.precision);
        Ok(Self { path, lock, recipe, changed, checkpoint, precision, progress, group })
    }

    /// Opens a run's folder to be resumed by all ranks of a group, however many trained it before. Rank 0 reads the folder, and
    /// the others get from it what they need; they need not see the folder.
    ///
    /// # Errors
    /// As [`Paused::open`], on all ranks.
    pub fn open_in(path: &Path, settings: &[String], group: &Group) -> Result<Self> {
        let own = group.leads().then(|| Self::open(path, settings)).transpose();
        let own = group.together(own)?;
        let recipe = own.as_ref().map(|paused| paused.recipe.to_toml()).unwrap_or_default();
        let text = group.broadcast_bytes("the recipe", recipe.into_bytes());
        let progress = own.as_ref().map(|paused| paused.progress.clone()).unwrap_or_default();
        let progress = toml::to_string(&progress).expect("progress is plain data");
        let progress = group.broadcast_bytes("the progress", progress.into_bytes());
        let progress =
            toml::from_str(&String::from_utf8_lossy(&progress)).expect("rank 0 wrote it");
        let precision = own.as_ref().and_then(|paused| paused.precision);
        let precision = precision.map(|precision| precision.to_string()).unwrap_or_default();
        let precision = group.broadcast_bytes("the precision", precision.into_bytes());
        group.check()?;
        let paused = match own {
            Some(own) => Ok(Self { group: group.clone(), ..own }),
            None => Recipe::parse(&String::from_utf8_lossy(&text), "rank 0's recipe", &[]).map(
                |recipe| Self {
                    path: path.to_path_buf(),
                    lock: None,
                    recipe,
                    changed: false,
                    checkpoint: None,
                    precision: precision_named(&String::from_utf8_lossy(&precision)),
                    progress,
                    group: group.clone(),
                },
            ),
        };
        group.together(paused)
    }

    /// The precision in which the run was trained so far, or else what its recipe says; `None` for the device's usual one.
    pub fn precision(&self) -> Option<Precision> {
        self.precision
    }

    /// Whether the run was stopped before its first checkpoint, so that it starts again. Known on rank 0.
    pub fn starts_again(&self) -> bool {
        self.checkpoint.is_none()
    }

    /// The run's recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }
}

/// Returns a note from a checkpoint's header.
fn note<'a>(file: &'a WeightFile, key: &str) -> Result<&'a str> {
    let missing =
        || Error::format(file.path(), format!("is not a checkpoint: its header has no {key}"));
    file.note(key).ok_or_else(missing)
}

/// Returns the precision in which the run was trained that wrote a checkpoint, unless its version did not note it.
fn precision_in(file: &WeightFile) -> Option<Precision> {
    precision_named(file.note(PRECISION_NOTE)?)
}

/// Where a run's weights come from.
#[derive(Default)]
pub(super) struct Origin {
    /// What its device computed in.
    pub(super) precision: Option<Precision>,
    /// Checksums of the training images, as in [`Progress`].
    pub(super) training: Option<[u32; 2]>,
    /// The same of the held-out ones.
    pub(super) held_out: Option<[u32; 2]>,
}

/// Returns what a checkpoint notes of its run's origin; nothing for a file that notes no progress.
pub(super) fn origin(file: &WeightFile) -> Result<Origin> {
    if file.note(PROGRESS_NOTE).is_none() {
        return Ok(Origin::default());
    }
    let Progress { checksums, held_out, .. } = progress_in(file)?;
    Ok(Origin { precision: precision_in(file), training: checksums, held_out })
}

fn precision_named(name: &str) -> Option<Precision> {
    [Precision::Bf16, Precision::F32].into_iter().find(|precision| precision.to_string() == name)
}

/// Returns a run's recipe as the version meant it that wrote a checkpoint. Before checkpoints noted their precision, each recipe
/// said bf16 or f32, but a CPU always trained in f32: `bf16` was the usual precision of a device.
fn as_meant(mut recipe: Recipe, checkpoint: &WeightFile) -> Recipe {
    if checkpoint.note(PRECISION_NOTE).is_none() {
        recipe.train.precision = recipe.train.precision.filter(|p| *p == Precision::F32);
    }
    recipe
}

/// Returns how far the run was that wrote a checkpoint.
pub(super) fn progress_in(file: &WeightFile) -> Result<Progress> {
    toml::from_str(note(file, PROGRESS_NOTE)?)
        .map_err(|e| Error::format(file.path(), format!("{PROGRESS_NOTE} is damaged: {e}")))
}

/// Keeps the best checkpoint as `best.safetensors` if the run was killed between the two. If the file is gone altogether, the
/// next evaluated epoch makes another.
fn restore_best(folder: &Path, progress: &mut Progress) -> Result<()> {
    let Some(step) = progress.best_step else { return Ok(()) };
    let is_best = |path: &Path| {
        let found = WeightFile::open(path).and_then(|file| progress_in(&file));
        found.is_ok_and(|found| (found.step, found.best_step) == (step, Some(step)))
    };
    let (best, own) = (checkpoint::best(folder), checkpoint::of_step(folder, step));
    if is_best(&best) {
        return Ok(());
    }
    if is_best(&own) {
        return checkpoint::keep_as_best(&own);
    }
    if find(&best)?.is_none() {
        (progress.best_knn, progress.best_rank, progress.best_step) = (None, None, None);
    }
    Ok(())
}

/// Returns the recipe of the run that wrote a checkpoint, with `key.path=value` settings on top.
///
/// # Errors
/// If the file is damaged or is not a run's checkpoint, or a setting does not fit.
pub fn recipe_in(checkpoint: &Path, settings: &[String]) -> Result<Recipe> {
    let file = WeightFile::open(checkpoint)?;
    checkpoint::check_format(&file)?;
    let origin = format!("{}, {RECIPE_NOTE}", checkpoint.display());
    let recipe = Recipe::parse(note(&file, RECIPE_NOTE)?, &origin, &[])?;
    as_meant(recipe, &file).with(settings)
}

/// Returns the recipe in a run's `recipe.toml`, with `key.path=value` settings on top; `checkpoint` is one of the run's.
///
/// # Errors
/// As [`recipe_in`]; if the two differ in more than a resumed run may change: somebody edited the recipe, or put the checkpoint of
/// another run there, and its figures would be those of neither.
pub fn recipe_of(recipe: &Path, checkpoint: &Path, settings: &[String]) -> Result<Recipe> {
    let then = recipe_in(checkpoint, &[])?;
    let now =
        as_meant(Recipe::load(&recipe.to_string_lossy(), &[])?, &WeightFile::open(checkpoint)?);
    if let Some((key, now, then)) = changed(&now, &then) {
        return Err(Error::format(
            recipe,
            format!(
                "{key} is {now}, and was {then} when {} was written: restore it (settings for one evaluation are given with --set), or \
                 name the checkpoint itself, which has its recipe",
                checkpoint.display()
            ),
        ));
    }
    now.with(settings)
}

/// Fails unless a device computes in the precision in which the run was trained that wrote a checkpoint.
fn check_precision(file: &WeightFile, device: &Device) -> Result<()> {
    let on_cpu = device.kind() == DeviceKind::Cpu;
    let then = precision_in(file).or(on_cpu.then_some(Precision::F32));
    match then.filter(|then| *then != device.precision()) {
        None => Ok(()),
        Some(then) => Err(Error::Config(format!(
            "the run was trained in {then}, and the device computes in {}, which makes another run: resume on a device in {then}",
            device.precision()
        ))),
    }
}

/// Fails unless the training images, which were found at `data`, are those of the run that wrote a checkpoint: a relative path is another
/// folder in another place.
///
/// # Errors
/// If they are not, or the checkpoint cannot be read.
pub(crate) fn check_trained_on(
    checkpoint: &Path,
    data: &str,
    set: &dyn Source,
    device: &Device,
) -> Result<()> {
    let file = checkpoint::open(checkpoint)?;
    let (Some(_), Some(recipe)) = (file.note(PROGRESS_NOTE), file.note(RECIPE_NOTE)) else {
        return Ok(());
    };
    let seed = Recipe::parse(recipe, &checkpoint.display().to_string(), &[])?.seed;
    let Some(then) = progress_in(&file)?.checksums else { return Ok(()) };
    match differing(then, images::checksums(set, seed, device)?) {
        None => Ok(()),
        Some(what) => Err(Error::Config(format!(
            "{data}: the training images have other {what} than those that the run was trained on: name the folder of those with --set \
             data.path=…, or say that these are meant with --set data.path={}",
            as_word(Path::new(data))
        ))),
    }
}

/// In what checksums of images differ.
fn differing(then: [u32; 2], now: [u32; 2]) -> Option<&'static str> {
    (then != now).then(|| if then[0] != now[0] { "names or labels" } else { "pixels" })
}

impl Run {
    /// Resumes a run from its newest checkpoint. Its results equal those of a run that never stopped, to the last bit.
    ///
    /// # Errors
    /// As for [`Run::new`]; if the checkpoint is of another architecture, the training set has changed in size, or the device
    /// has another precision than [`Paused::precision`].
    pub fn resume(paused: Paused, device: &Device) -> Result<Self> {
        Self::resumed(paused, device, None)
    }

    /// As [`Run::resume`], on the images that the run was [given](Images::given) before.
    ///
    /// # Errors
    /// As [`Run::resume`].
    pub fn resume_on(paused: Paused, device: &Device, images: Images) -> Result<Self> {
        Self::resumed(paused, device, Some(images))
    }

    fn resumed(paused: Paused, device: &Device, images: Option<Images>) -> Result<Self> {
        let group = paused.group.clone();
        let mut resumes = [u64::from(paused.checkpoint.is_some())];
        group.broadcast("whether a checkpoint exists", &mut resumes);
        let resumes = resumes == [1];
        group.join(device)?;
        let prepared = Self::prepare(&paused.recipe, device, images, !resumes, &group);
        let mut run = group.together(prepared)?;
        ranks::compare(&run, &group)?;
        let Paused { path, lock, recipe, changed, checkpoint, progress, .. } = paused;
        if resumes {
            let restored = run.restore(checkpoint, &path, progress);
            group.together(restored)?;
            run.share_restored(&group);
            group.check()?;
        }
        let opened = lock.map(|lock| {
            if changed {
                write_file(&path.join(RECIPE), recipe.to_toml().as_bytes())?;
            }
            Folder::open(&path, lock, &run.progress, &run.recipe)
        });
        run.folder = group.together(opened.transpose())?;
        Ok(run)
    }

    /// Takes up a run where it was: its progress, and what the checkpoint holds on the rank that has it.
    fn restore(
        &mut self,
        checkpoint: Option<WeightFile>,
        path: &Path,
        progress: Progress,
    ) -> Result<()> {
        let run = self;
        let (images, epochs) = (run.progress.images, run.epochs());
        let Progress { epoch, position, step, .. } = progress;
        let batches = run.loader.batches_per_epoch();
        let data = &run.recipe.data.path;
        if progress.images != images {
            return Err(Error::Config(format!(
                "{data}: the run was started with {} training images, and the set now has {images}: restore the images, or start another run",
                progress.images
            )));
        }
        let steps = u64::from(epoch) * batches as u64 + position as u64;
        // The last epoch may be cut short.
        let steps = steps.min(run.schedule.total);
        if epoch > epochs || position > batches || step != steps {
            let file = checkpoint.as_ref().map_or(path, |file| file.path());
            let reason = format!("{PROGRESS_NOTE} is damaged: epoch {epoch}, batch {position}");
            return Err(Error::format(file, reason));
        }
        if let Some(mut file) = checkpoint {
            check_precision(&file, run.online.device())?;
            let state = run.method.state();
            checkpoint::restore(&mut file, &mut run.online, &mut run.optimizer, state)?;
        }
        if !progress.classes.is_empty() && progress.classes != run.progress.classes {
            return Err(Error::Config(format!(
                "{data}: the run was started with other classes: {} then, {} now",
                progress.classes.join(", "),
                run.progress.classes.join(", ")
            )));
        }
        let (checksums, held_out) = (run.progress.checksums, run.progress.held_out);
        for (split, then, now) in [
            ("training", progress.checksums, checksums),
            // Figures of later epochs would be of other images than those of earlier ones, and the best checkpoint chosen among both.
            ("held-out", progress.held_out, held_out),
        ] {
            if let (Some(then), Some(now)) = (then, now)
                && let Some(what) = differing(then, now)
            {
                return Err(Error::Config(format!(
                    "{data}: the {split} images have other {what} than those that the run was started with: restore them, or start another run"
                )));
            }
        }
        run.optimizer.set_updates(step);
        run.saved_step = Some(step);
        let classes = std::mem::take(&mut run.progress.classes);
        run.progress = Progress { classes, checksums, held_out, ..progress };
        if run.group().leads() {
            restore_best(path, &mut run.progress)?;
        }
        run.loader.seek(if position == batches { epoch + 1 } else { epoch }, position % batches);
        run.method.prepare(step);
        run.set_policies();
        Ok(())
    }

    /// Makes the run stop with a checkpoint soon after `flag` becomes true, between two steps or during evaluation.
    pub fn stop_when(&mut self, flag: Arc<AtomicBool>) {
        self.loader.stop_when(flag.clone());
        self.stop = flag;
    }

    /// Returns a place that holds a sentence on how to resume the run while it evaluates. A checkpoint was written before, so
    /// that the process can be ended without a loss, even if the evaluation is stuck in a read that never returns.
    pub fn evaluating(&self) -> Arc<Mutex<Option<String>>> {
        self.evaluating.clone()
    }

    /// The number of steps done.
    pub fn step(&self) -> u64 {
        self.progress.step
    }

    /// Whether all epochs are done, the last one's evaluation included.
    pub fn has_ended(&self) -> bool {
        self.progress.epoch >= self.epochs()
    }

    pub(super) fn checkpoint_is_due(&self, step: u64) -> bool {
        let train = &self.recipe.train;
        let minutes = train.checkpoint_every_minutes;
        let by_steps =
            train.checkpoint_every_steps > 0 && step.is_multiple_of(train.checkpoint_every_steps);
        by_steps || minutes > 0.0 && self.saved.elapsed().as_secs_f64() >= 60.0 * minutes
    }

    /// Stops if a rank was asked to, or writes a checkpoint if one is due; called between steps.
    pub(super) fn between_steps(&mut self) -> Result<()> {
        let wishes = self.agree(self.progress.step, false)?;
        if wishes.stop {
            self.stop()?;
        }
        if wishes.save {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Fails with [`Error::Stopped`] if this rank was asked to stop.
    pub(super) fn asked_to_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Stopped(self.stopped())),
            false => Ok(()),
        }
    }

    /// Stops with a checkpoint, unless there is nothing to save yet.
    pub(super) fn stop(&mut self) -> Result<()> {
        if self.progress.step == 0 {
            return Err(Error::Stopped("stopped before the first step".into()));
        }
        self.checkpoint()?;
        Err(Error::Stopped(self.stopped()))
    }

    /// Says where the run stopped, and how to resume it.
    pub(super) fn stopped(&self) -> String {
        let stopped = format!("stopped at step {} of {}", self.progress.step, self.schedule.total);
        match &self.folder {
            Some(Folder { path, .. }) => {
                format!("{stopped}; continue with: selfsup train --resume {}", as_word(path))
            }
            None => format!("{stopped}; nothing is saved without --out"),
        }
    }

    /// Writes a checkpoint and returns the file; `None` if the run has no folder.
    pub(super) fn checkpoint(&mut self) -> Result<Option<PathBuf>> {
        self.save(self.recipe.train.keep)
    }

    /// Writes a checkpoint and removes all but the newest `keep`.
    pub(super) fn save(&mut self, keep: usize) -> Result<Option<PathBuf>> {
        self.agree_on_state()?;
        let Some(folder) = &mut self.folder else { return Ok(None) };
        self.progress.metrics = folder.metrics.synced()?;
        let recipe = folder.path.join(RECIPE);
        if find(&recipe)?.is_none() {
            write_file(&recipe, self.recipe.to_toml().as_bytes())?; // somebody removed it
        }
        let progress = toml::to_string(&self.progress).expect("progress is plain data");
        let precision = self.online.device().precision().to_string();
        let notes = [
            (RECIPE_NOTE, self.recipe.to_toml()),
            (PROGRESS_NOTE, progress),
            (PRECISION_NOTE, precision),
        ];
        let path = checkpoint::save(
            &folder.path,
            self.progress.step,
            &self.online,
            &self.optimizer,
            self.method.state(),
            notes.map(|(key, note)| (key.to_owned(), note)).into(),
            keep,
        )?;
        (self.saved, self.saved_step) = (Instant::now(), Some(self.progress.step));
        Ok(Some(path))
    }
}

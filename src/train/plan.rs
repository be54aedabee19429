//! Plans a run on somebody's own images: looks at them, measures a few real steps, and fits network and epochs to the time.

use std::path::Path;
use std::time::{Duration, Instant};

use super::reading::own_reading;
use crate::data::{self, LabelTable, Split, Survey};
use crate::device::{Device, DeviceKind, Precision};
use crate::error::{Error, Result};
use crate::eval;
use crate::files::{find, is_file, is_folder};
use crate::recipes::{self, Choice, FEWEST_IMAGES, OwnImages, Recipe};
use crate::train::{self, Images, Run};

/// Images that are read to know a set: all of most people's own.
const LOOKED_AT: usize = 20_000;

/// How long steps are measured for each network that is tried.
const MEASURED: Duration = Duration::from_secs(4);

/// Seconds that a run may take if nothing is said about it.
const USUAL: f64 = 2.0 * 3600.0;

/// Evaluations of a run.
const EVALUATIONS: u32 = 10;

/// The most epochs that a budget is filled with.
const MOST_EPOCHS: u32 = 1000;

/// Bytes of decoded images that a set keeps in memory at most.
const CACHE: f64 = (1u64 << 30) as f64;

/// What a run on own images will be, and why.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What was found in the folder.
    pub survey: Survey,
    /// Classes; 0 without labels.
    pub classes: usize,
    /// Held-out images with labels.
    pub held_out: usize,
    /// Sentences on what lies there and is not read.
    pub notes: Vec<String>,
    /// The settings.
    pub recipe: Recipe,
    /// Those of them that were chosen, with reasons.
    pub choices: Vec<Choice>,
    /// Steps.
    pub steps: u64,
    /// What was measured.
    pub pace: Pace,
    /// Seconds in all: steps, evaluations and the start.
    pub seconds: f64,
    /// Bytes of memory: a step's on the device, and decoded images.
    pub memory: usize,
    /// Bytes on disk in the run's folder, with all checkpoints that are kept.
    pub disk: usize,
}

/// What a plan is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes<'a> {
    /// The method; chosen if absent.
    pub method: Option<&'a str>,
    /// How long the run may take.
    pub budget: Option<Duration>,
    /// `key.path=value` settings on top of what is chosen.
    pub settings: &'a [String],
}

/// How fast a run goes, measured on a few of its steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Seconds of a step.
    pub step: f64,
    /// Steps that were measured.
    pub steps: u64,
    /// Seconds of an image's features in an evaluation.
    pub feature: f64,
    /// Seconds of what an evaluation measures without labels.
    pub quality: f64,
    /// Seconds until the first step.
    pub start: f64,
}

/// Whether `train` is given a folder of images, not a recipe: a folder that holds no run.
///
/// # Errors
/// With a sentence, if the path is a folder that holds a run, or an image.
pub fn is_own_folder(name: &str) -> Result<bool> {
    let path = Path::new(name);
    if recipes::builtin(name).is_some() || find(path)?.is_none() {
        return Ok(false);
    }
    if is_folder(path)? {
        if is_file(&path.join("recipe.toml"))? {
            return Err(Error::format(
                path,
                "is the folder of a run: continue it with --resume, or train its recipe.toml again",
            ));
        }
        return Ok(true);
    }
    if data::is_image_name(path) {
        return Err(Error::format(path, "is an image; name the folder it lies in"));
    }
    Ok(false)
}

/// Fails if a run's folder would lie in the folder of its images, where the next look at them would find it.
///
/// # Errors
/// In that case, and if a folder cannot be read.
pub fn check_outside(images: &Path, out: &Path) -> Result<()> {
    let full = |path: &Path| path.canonicalize().map_err(Error::io(path));
    let images = full(images)?;
    // The nearest folder that exists decides: a link on the way may lead anywhere.
    let absolute = std::path::absolute(out).map_err(Error::io(out))?;
    let there = absolute.ancestors().find(|path| path.exists());
    if there.is_some_and(|path| full(path).is_ok_and(|path| path.starts_with(&images))) {
        return Err(Error::format(
            out,
            "lies in the folder of the images: name a folder elsewhere with --out, or start the program from another folder",
        ));
    }
    Ok(())
}

/// Looks at a folder and plans a run on its images on a device. `tell` gets a sentence before what takes seconds.
///
/// # Errors
/// If the folder holds no data set, too few images or too many broken ones; if a setting is unknown or out of range; if not even
/// one epoch fits into the budget, or no batch into memory.
pub fn plan(
    folder: &Path,
    wishes: Wishes<'_>,
    device: &Device,
    tell: &dyn Fn(&str),
) -> Result<Plan> {
    let path = folder.to_str().ok_or_else(|| {
        Error::format(folder, "a recipe cannot hold a path that is not UTF-8: rename the folder")
    })?;
    wishes.method.map_or(Ok(()), recipes::check_method)?;
    if let Some(setting) = wishes.settings.iter().find(|s| s.trim_start().starts_with("data.path="))
    {
        return Err(Error::Config(format!(
            "--set {setting}: the folder {path} is the set that is looked at and trained on: name the other folder in its place"
        )));
    }
    let reading = own_reading(folder, wishes.settings)?;
    let labels = table_in(wishes.settings);
    let table = labels.map(|file| LabelTable::read(Path::new(file))).transpose()?;
    let source = data::open_labelled(folder, Split::Train, &reading, table.as_ref())?;
    if source.len() < FEWEST_IMAGES {
        let (path, images) = (path.to_owned(), source.len());
        return Err(too_few(&path, images, 0));
    }
    tell(&format!("{path}: looking at {} images", source.len().min(LOOKED_AT)));
    let survey = data::survey(&*source, LOOKED_AT, device)?;
    let readable = survey.looked_at - survey.broken.len();
    if let (Some(first), true) = (survey.broken.first(), readable < FEWEST_IMAGES) {
        let error = too_few(path, readable, survey.broken.len());
        return Err(Error::Unreadable(format!("{error}; the first: {}", first.reason)));
    }
    let mut set = OwnImages {
        path: path.to_owned(),
        images: source.len(),
        side: survey.sides[1],
        grey: survey.grey == readable,
        classes: source.classes().len(),
        held_out: false,
        labels: labels.map(Into::into),
        reading,
        mean: survey.mean.clone(),
        std: survey.std.clone(),
    };
    drop(source);
    let (recipe, _) = recipes::own_recipe(&set, wishes.method, on_gpu(device), 16, usize::MAX)?;
    let opened = Images::open(&recipe.data)?;
    set.held_out = opened.test.is_some();
    let held_out = opened.test.as_ref().map_or(0, |test| test.len());
    let notes = opened.notes().cloned().collect();
    let share = survey.broken.len() as f64 / survey.looked_at as f64;
    let planner = Planner { set, held_out, share, wishes, device, tell };
    let Fitted { recipe, choices, pace, need } = planner.fit()?;
    let schedule = recipe.schedule(trained_on(&planner.set, &recipe));
    let bytes = survey.pixels * reading.format.bytes() as f64;
    let cache = CACHE.min(bytes * (planner.set.images + held_out) as f64);
    Ok(Plan {
        classes: planner.set.classes,
        held_out,
        notes,
        steps: schedule.total,
        seconds: planner.seconds(&recipe, &pace),
        memory: need.in_all + cache as usize,
        // Checkpoints hold weights, momentum and state; `best` may be one more, and one is written before an old one goes.
        disk: need.fixed * (recipe.train.keep + 2),
        survey,
        recipe,
        choices,
        pace,
    })
}

/// The table of labels among settings, if one is.
fn table_in(settings: &[String]) -> Option<&str> {
    let labels = settings.iter().rev().find_map(|setting| setting.strip_prefix("data.labels="));
    data::table_and_part(labels?).0
}

fn too_few(path: &str, readable: usize, broken: usize) -> Error {
    let among = if broken > 0 { format!(" can be read, {broken} cannot:") } else { " are".into() };
    Error::Config(format!(
        "{path}: {readable} images{among} too few to learn from; at least {FEWEST_IMAGES} are needed, and a thousand are a beginning"
    ))
}

fn on_gpu(device: &Device) -> bool {
    device.kind() == DeviceKind::Cuda
}

/// Training images, without those that choose the best checkpoint.
fn trained_on(set: &OwnImages, recipe: &Recipe) -> usize {
    set.images - (set.images as f64 * recipe.data.validation) as usize
}

struct Planner<'a> {
    set: OwnImages,
    /// Held-out images.
    held_out: usize,
    /// The share of broken images.
    share: f64,
    wishes: Wishes<'a>,
    device: &'a Device,
    tell: &'a dyn Fn(&str),
}

struct Fitted {
    recipe: Recipe,
    choices: Vec<Choice>,
    pace: Pace,
    need: train::Need,
}

impl Planner<'_> {
    /// Tries networks, the widest first, until one has time for enough epochs.
    fn fit(&self) -> Result<Fitted> {
        let widths = recipes::widths(self.set.images, on_gpu(self.device));
        let mut tried: Option<Recipe> = None;
        for (i, &width) in widths.iter().enumerate() {
            let (mut recipe, mut choices, need) = self.within_memory(width)?;
            let last = i + 1 == widths.len();
            if !last && tried.as_ref() == Some(&recipe) {
                continue; // a setting has fixed the width
            }
            tried = Some(recipe.clone());
            let network = network(&recipe);
            (self.tell)(&format!("measuring a few steps of {network}"));
            let pace = self.pace(&recipe)?;
            let wished = recipes::wished_epochs(self.set.images);
            let affordable = self.affordable(&recipe, &pace);
            // Half the epochs on a wider network are worth more than all on a narrow one.
            if affordable < wished.div_ceil(2) && !last {
                continue;
            }
            let (epochs, why) = self.epochs(wished, affordable, &recipe, &pace)?;
            recipe = self.with_epochs(recipe, epochs)?;
            let chosen = recipe.train.epochs;
            choices.push(Choice::new("network", network, self.network_why(i, last, widths)));
            choices.push(Choice::new("epochs", chosen, why));
            as_set(&mut choices, self.wishes.settings, &recipe);
            return Ok(Fitted { recipe, choices, pace, need });
        }
        unreachable!("the last width returns")
    }

    fn network_why(&self, i: usize, last: bool, widths: &[usize]) -> String {
        let images = self.set.images;
        match (i, last) {
            _ if on_gpu(self.device) => "a GPU has time for the published network".into(),
            (0, _) if widths[0] < 64 => format!("{images} images do not fill a wider one"),
            (0, _) => "the published one, and there is time for it".into(),
            (_, true) => "a wider one has no time for enough epochs here".into(),
            _ => "the widest with time for enough epochs here".into(),
        }
    }

    /// A recipe whose step fits into memory, what it needs, and the reasons so far.
    fn within_memory(&self, width: usize) -> Result<(Recipe, Vec<Choice>, train::Need)> {
        let mut most_batch = usize::MAX;
        let (method, on_gpu) = (self.wishes.method, on_gpu(self.device));
        loop {
            let (mut recipe, choices) =
                recipes::own_recipe(&self.set, method, on_gpu, width, most_batch)?;
            recipe.data.max_skipped =
                recipe.data.max_skipped.max((self.share * 100.0).ceil() / 100.0);
            let recipe = self.with_epochs(recipe, recipes::wished_epochs(self.set.images))?;
            let need = train::memory(&recipe, Precision::F32)?;
            let free = free_memory(self.device).unwrap_or(usize::MAX);
            if need.in_all <= free / 10 * 9 {
                return Ok((recipe, choices, need));
            }
            if recipe.train.batch < 16 || most_batch < 16 {
                return Err(Error::Config(format!(
                    "a step needs {} MiB of memory and {} MiB are free: lower augment.size or network.width",
                    need.in_all >> 20,
                    free >> 20
                )));
            }
            most_batch = recipe.train.batch / 2;
        }
    }

    /// Sets the epochs, and what follows from them, and then the settings that were asked for.
    fn with_epochs(&self, mut recipe: Recipe, epochs: u32) -> Result<Recipe> {
        recipe.train.epochs = epochs;
        let epochs = recipe.with(self.wishes.settings)?.train.epochs; // a setting may have fixed them
        recipe.train.knn_every = epochs.div_ceil(EVALUATIONS);
        recipe.train.checkpoint_every = recipe.train.knn_every;
        recipe.optim.warmup_epochs = recipe.optim.warmup_epochs.min(f64::from(epochs) / 10.0);
        recipe.with(self.wishes.settings)
    }

    /// Measures a run's pace. The images of its few batches are decoded before: so are all in most epochs of a run if they fit
    /// into the memory that is meant for them.
    fn pace(&self, recipe: &Recipe) -> Result<Pace> {
        let mut recipe = recipe.clone();
        if recipe.data.limit == 0 {
            recipe.data.limit = (4 * recipe.train.batch).max(eval::IMAGES);
        }
        recipe.data.validation = 0.0;
        let start = Instant::now();
        let run = Run::new(&recipe, self.device, None)?;
        run.pace(MEASURED, start)
    }

    fn seconds(&self, recipe: &Recipe, pace: &Pace) -> f64 {
        let steps = recipe.schedule(trained_on(&self.set, recipe)).total as f64;
        let times = recipe.train.epochs / recipe.train.knn_every.max(1)
            + u32::from(!recipe.train.epochs.is_multiple_of(recipe.train.knn_every.max(1)));
        pace.start + steps * pace.step + f64::from(times) * self.evaluation(recipe, pace)
    }

    /// Seconds of an evaluation.
    fn evaluation(&self, recipe: &Recipe, pace: &Pace) -> f64 {
        let validation = (self.set.images as f64 * recipe.data.validation) as usize;
        let labelled = self.set.held_out || validation > 0;
        let held_out = labelled.then_some(self.held_out + validation);
        let ranked = self.set.images.clamp(eval::IMAGES, eval::RANKED) - eval::IMAGES;
        let compared = held_out.map_or(0, |held_out| self.set.images + held_out);
        pace.quality + pace.feature * (ranked + compared) as f64
    }

    /// Epochs that fit into the time.
    fn affordable(&self, recipe: &Recipe, pace: &Pace) -> u32 {
        let limit = self.wishes.budget.map_or(USUAL, |budget| budget.as_secs_f64());
        let per_epoch = recipe.schedule(trained_on(&self.set, recipe)).per_epoch as f64 * pace.step;
        let evaluation = self.evaluation(recipe, pace);
        let after = |evaluations: f64| (limit - pace.start - evaluations * evaluation) / per_epoch;
        // Fewer epochs than evaluations are evaluated after each of them.
        let all = after(f64::from(EVALUATIONS));
        let few = (limit - pace.start) / (per_epoch + evaluation);
        let epochs =
            if all >= f64::from(EVALUATIONS) { all } else { few.min(f64::from(EVALUATIONS)) };
        epochs.clamp(0.0, f64::from(MOST_EPOCHS)) as u32
    }

    fn epochs(
        &self,
        wished: u32,
        affordable: u32,
        recipe: &Recipe,
        pace: &Pace,
    ) -> Result<(u32, String)> {
        let images = self.set.images;
        let Some(budget) = self.wishes.budget else {
            return Ok(match affordable >= wished {
                true => (wished, format!("{images} images are worth that many passes")),
                false => (
                    affordable.max(1),
                    format!(
                        "what two hours hold of the {wished} that {images} images are worth; --budget gives it more time"
                    ),
                ),
            });
        };
        if affordable == 0 {
            let needed = self.seconds(&self.with_epochs(recipe.clone(), 1)?, pace);
            return Err(Error::Config(format!(
                "--budget {:.0}s is shorter than one epoch of {images} images, which takes {:.0}s here: give it more time, or set data.limit",
                budget.as_secs_f64(),
                needed.ceil(),
            )));
        }
        Ok((affordable, "what the budget holds".into()))
    }
}

/// Says of choices that settings have overridden what they are now.
fn as_set(choices: &mut [Choice], settings: &[String], recipe: &Recipe) {
    let key = |setting: &String| setting.split('=').next().unwrap_or_default().to_owned();
    let keys: Vec<String> = settings.iter().map(key).collect();
    let is_set = |name: &str| keys.iter().any(|key| key.starts_with(name));
    for choice in choices {
        let (set, value) = match choice.what {
            "network" => (is_set("network.width") || is_set("network.depth"), network(recipe)),
            "epochs" => (is_set("train.epochs"), recipe.train.epochs.to_string()),
            "batch" => (is_set("train.batch"), recipe.train.batch.to_string()),
            "stem" => (is_set("network.stem"), format!("{:?}", recipe.network.stem).to_lowercase()),
            "crops" => (is_set("augment"), format!("{} pixels", recipe.augment[0].size)),
            "method" => (is_set("method.name"), recipe.method.name.clone()),
            _ => continue,
        };
        if set {
            (choice.value, choice.why) = (value, "as set".into());
        }
    }
}

/// A network in words.
fn network(recipe: &Recipe) -> String {
    let config = recipe.network;
    format!("ResNet-{} of width {}", config.depth, config.width)
}

/// Bytes of free memory, if the machine says.
fn free_memory(device: &Device) -> Option<usize> {
    if on_gpu(device) {
        return Some(device.gpu().memory().0);
    }
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

impl Run {
    /// Measures steps for about that long, after a few that are not counted, and the features of some images. The run is of no
    /// further use.
    pub(super) fn pace(mut self, measured: Duration, start: Instant) -> Result<Pace> {
        let per_epoch = self.loader.batches_per_epoch() as u64;
        // All images are decoded in the first epoch; a GPU's step is captured in its third.
        let before = per_epoch.clamp(4, 12);
        let ready = start.elapsed().as_secs_f64();
        let mut begun = Instant::now();
        let steps = loop {
            if self.begun == before {
                self.steps.finish()?;
                begun = Instant::now();
            }
            if self.begun >= before {
                let steps = self.begun - before;
                if steps >= 4 && begun.elapsed() >= measured {
                    break steps;
                }
            }
            let batch = self.loader.next_batch()?;
            let training = train::Training {
                method: &mut *self.method,
                online: &mut self.online,
                optimizer: &mut self.optimizer,
                schedule: &self.schedule,
            };
            self.steps.run(training, &batch, self.begun)?;
            self.begun += 1;
        };
        self.steps.finish()?;
        let step = begun.elapsed().as_secs_f64() / steps as f64;
        let begun = Instant::now();
        let (images, policy) = (self.images.train.len().min(256), &self.recipe.augment[0]);
        let range = 0..images;
        let (batch, _) =
            data::center_batch(&*self.images.train, range, policy, self.online.device())?;
        let backbone = self.method.backbone();
        crate::tape::evaluate(&self.online, |tape| backbone.forward(&tape.input(&batch.crops[0])))?
            .to_f64();
        let feature = begun.elapsed().as_secs_f64() / images as f64;
        let begun = Instant::now();
        self.quality()?;
        let quality = begun.elapsed().as_secs_f64();
        Ok(Pace { step, steps, feature, quality, start: ready })
    }
}

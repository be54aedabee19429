//! Recipes: every setting that decides a run's result, as one TOML file.

mod builtin;
mod load;
mod measured;
mod normalise;
mod own;
mod source;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::{Axes, Format, LabelTable, Pages, Policy, Reading, table_and_part};
use crate::device::Precision;
use crate::error::{Error, Result};
use crate::methods::{self, Method};
use crate::nn::ResNetConfig;
use crate::optim::{Decay, LrRule, Rule, Schedule};
use crate::settings::{self, parsed, set};
pub use builtin::{builtin, builtin_names, builtin_studies, builtin_study};
use load::table_of;
pub use measured::{MeasuredRun, measured_runs};
pub use normalise::with_normalise;
pub use own::{Choice, FEWEST_IMAGES, OWN_METHODS, OwnImages};
pub(crate) use own::{check_method, own_recipe, widths, wished_epochs};
pub use source::Source;

/// A run's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The seed of every random number.
    pub seed: u64,
    /// Where the settings come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// The method and its own settings.
    pub method: MethodSettings,
    /// The images.
    pub data: DataSettings,
    /// The backbone.
    pub network: ResNetConfig,
    /// The optimizer and its learning rate schedule.
    pub optim: OptimSettings,
    /// Length, batch size, checkpoints and threads.
    pub train: TrainSettings,
    /// When a run is stopped because it diverged or collapsed, and what it reports.
    #[serde(default)]
    pub watch: WatchSettings,
    /// Augmentation: one policy for all views, or one for each view.
    pub augment: Vec<Policy>,
}

/// A method by name; the method itself reads the rest of its table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSettings {
    /// A name of [`ALL`](crate::methods::ALL).
    pub name: String,
    /// The method's own settings.
    #[serde(flatten)]
    pub settings: toml::Table,
}

/// The images of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// A folder, or `fashion-scattered` for the built-in images.
    pub path: String,
    /// Channels of the images; see [`Reading`]. The network has as many inputs.
    #[serde(default = "three", skip_serializing_if = "is_three")]
    pub channels: usize,
    /// Bits of a sample, 8 or 16.
    #[serde(default = "eight", skip_serializing_if = "is_eight")]
    pub bits: usize,
    /// The values that become 0 and the largest sample of 16 bits; files of floats need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// What the pages of a TIFF file are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Pages>,
    /// The axes of NumPy arrays, which are read only with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axes: Option<Axes>,
    /// Use this many training images, spread over the set; 0 for all.
    #[serde(default)]
    pub limit: usize,
    /// Use this many held-out images, spread over the set; 0 for all.
    #[serde(default)]
    pub test_limit: usize,
    /// Train on a labelled part of the images only: `10%` of each class, or a file that lists images (see
    /// [`labelled`](crate::data::labelled)); or the classes of image files, from a table whose name ends in `.csv` or `.tsv` (see
    /// [`LabelTable`]), of which a share may follow: `labels.csv 10%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// The largest share of unreadable images, in `0..=1`, that a command leaves out; with more it stops.
    #[serde(default = "one_percent", skip_serializing_if = "is_one_percent")]
    pub max_skipped: f64,
    /// The share of each class's training images, in `0..1`, that is not trained on but chooses `best.safetensors`. With 0 the
    /// held-out images choose it.
    #[serde(default, skip_serializing_if = "is_zero_share")]
    pub validation: f64,
    /// The most memory of a GPU that the decoded training images may take, such as `20GB`; `0` for none. A larger set is uploaded
    /// batch by batch. If absent, half of what is free at the start. Does not change results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<String>,
}

impl DataSettings {
    /// The bytes of [`gpu_memory`](DataSettings::gpu_memory), if it is set.
    ///
    /// # Errors
    /// If it is not a size.
    pub(crate) fn gpu_bytes(&self) -> Result<Option<usize>> {
        let wrong = |reason| Error::Config(format!("data.gpu_memory: {reason}"));
        self.gpu_memory.as_deref().map(settings::bytes).transpose().map_err(wrong)
    }
}

impl DataSettings {
    /// All images of a folder, read in some way.
    pub(crate) fn all_of(path: &str, reading: &Reading) -> Self {
        let Reading { format: Format { channels, bits }, range, pages, axes } = *reading;
        let (limit, test_limit, labels) = (0, 0, None);
        let (max_skipped, validation, path) = (MAX_SKIPPED, 0.0, path.to_owned());
        Self {
            path,
            channels,
            bits,
            range,
            pages,
            axes,
            limit,
            test_limit,
            labels,
            max_skipped,
            validation,
            gpu_memory: None,
        }
    }

    /// The file of the table of classes that `labels` names, if it does, and the part of the images that it asks for, if it does.
    fn split_labels(&self) -> (Option<&str>, Option<&str>) {
        self.labels.as_deref().map_or((None, None), table_and_part)
    }

    /// The table of classes that `labels` names, if it does, and the part of the images that it asks for, if it does.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub fn label_table(&self) -> Result<(Option<LabelTable>, Option<&str>)> {
        let (file, part) = self.split_labels();
        Ok((file.map(|file| LabelTable::read(Path::new(file))).transpose()?, part))
    }

    /// Narrows the images to a share or a list, with the classes of the table that it has, if it has one.
    pub(crate) fn set_labels(&mut self, which: &str) {
        let table = self.split_labels().0.filter(|_| which.trim_end().ends_with('%'));
        self.labels = Some(table.map_or(which.to_owned(), |table| format!("{table} {which}")));
    }

    /// How its files are read.
    pub fn reading(&self) -> Reading {
        let &Self { channels, bits, range, pages, axes, .. } = self;
        Reading { format: Format { channels, bits }, range, pages, axes }
    }
}

/// The optimizer and its learning rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimSettings {
    /// The base learning rate, before `lr_rule`.
    pub lr: f64,
    /// How the rate scales with the batch size.
    pub lr_rule: LrRule,
    /// Epochs of linear warm-up; may be fractional.
    pub warmup_epochs: f64,
    /// The rate at which the warm-up starts, not scaled by `lr_rule`; 0 if absent. See [`Schedule::warmup_from`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_from: Option<f64>,
    /// The rate at which a cosine ends, not scaled by `lr_rule`.
    #[serde(default)]
    pub end_lr: f64,
    /// How the rate decays after the warm-up.
    #[serde(default)]
    pub decay: Decay,
    /// The update rule and its settings.
    pub rule: Rule,
}

/// Length, batch size, checkpoints and threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Passes over the training images.
    pub epochs: u32,
    /// Images per step, each in several views.
    pub batch: usize,
    /// The schedule counts all images, as if an epoch's incomplete batch went on into the next epoch: `epochs * images / batch`
    /// steps in place of `epochs * (images / batch)`. The steps that dropped batches leave out follow as further epochs, the last
    /// of them cut short. SimCLR and BYOL.
    #[serde(default, skip_serializing_if = "is_false")]
    pub all_images: bool,
    /// Parts that a step is computed in, for batches that do not fit into memory. Gradients are those of the full batch; batch
    /// norm sees one part.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub micro_batches: usize,
    /// Residual blocks save only their inputs for the backward pass, which computes them again (activation checkpointing): about a
    /// third more computation for a fraction of the memory. Does not change results. `inspect --memory` shows both.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recompute: bool,
    /// kNN accuracy is measured every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub knn_every: u32,
    /// A checkpoint is written every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub checkpoint_every: u32,
    /// A checkpoint is also written every this many steps; 0 for none within an epoch.
    #[serde(default)]
    pub checkpoint_every_steps: u64,
    /// A checkpoint is also written once the last one is this many minutes old; 0 for never.
    #[serde(default)]
    pub checkpoint_every_minutes: f64,
    /// Number of checkpoints that are kept; at least 1.
    #[serde(default = "three")]
    pub keep: usize,
    /// The type in which a device stores activations and multiplies: `bf16` or `f32`. If absent, bf16 on a
    /// GPU and on a processor whose instructions for bf16 are faster, f32 on others and where several processes train together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// The views of the first `dump_views` steps, and the initial weights, are written to the run's `parity/` folder for
    /// `benches/peers/parity.py`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dump_views: u64,
    /// Compute threads; 0 for one per core. Does not change results.
    #[serde(default)]
    pub threads: usize,
    /// Loader threads; 0 for one per core. Does not change results.
    #[serde(default)]
    pub loader_threads: usize,
    /// A weight file to start from, in torchvision's names. It must hold the complete backbone; heads are read if it has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// Whether the classifier in that file is taken, too, if it has as many classes as this run. Fine-tuning starts a new one: the
    /// file's may number other classes.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub init_classifier: bool,
}

/// When a run is stopped because it diverged or collapsed, and what it reports.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchSettings {
    /// Embeddings count as collapsed if their standard deviation is below this share of `1 / sqrt(d)`; healthy runs were measured
    /// above 0.19.
    pub collapsed_std: f64,
    /// Embeddings count as collapsed to a line below this effective rank. The deviation does not show it, because a batch norm at
    /// the end of a head keeps it up.
    pub collapsed_rank: f64,
    /// Features count as collapsed if an evaluation measures a lower RankMe of them, on at least 64 features and 128 images; healthy runs
    /// were measured above 8. 0 for never.
    pub collapsed_rank_me: f64,
    /// Below this many prototypes in use, all images count as having one assignment.
    pub collapsed_prototypes: f64,
    /// A run counts as diverged if an epoch's mean loss reaches this multiple of the run's first loss (of 1, or of MoCo's loss at
    /// chance, if that is less); 0 for never.
    pub diverged: f64,
    /// Report divergence or collapse and carry on instead of stopping.
    pub carry_on: bool,
    /// Write `report.html` after every epoch and at the end, with new pictures each time kNN is measured.
    pub report: bool,
    /// Measure with each evaluation what the features are worth without labels (`eval::quality`); without it, a run
    /// without labels has no best checkpoint.
    pub quality: bool,
    /// Also write the numbers of `metrics.jsonl` as TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self {
            collapsed_std: 0.05,
            collapsed_rank: 1.3,
            collapsed_rank_me: 3.0,
            collapsed_prototypes: 1.5,
            diverged: 10.0,
            carry_on: false,
            report: true,
            quality: true,
            tensorboard: false,
        }
    }
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero_share(value: &f64) -> bool {
    *value == 0.0
}

fn one() -> usize {
    1
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

/// The default of [`DataSettings::max_skipped`].
pub(crate) const MAX_SKIPPED: f64 = 0.01;

fn one_percent() -> f64 {
    MAX_SKIPPED
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_one_percent(value: &f64) -> bool {
    *value == MAX_SKIPPED
}

fn is_three(value: &usize) -> bool {
    *value == 3
}

fn eight() -> usize {
    8
}

fn is_eight(value: &usize) -> bool {
    *value == 8
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn three() -> usize {
    3
}

/// The most threads that are accepted: more than any machine's cores, fewer than an operating system refuses.
pub(crate) const MOST_THREADS: usize = 1024;

/// The most epochs of warm-up: more are a slip of the keyboard.
const MOST_EPOCHS: f64 = 1e6;

impl Recipe {
    /// Loads a recipe from a file or by a name of [`builtin_names`], with `key.path=value` settings on top.
    ///
    /// A recipe may start with `base = "…"`, the name or file of another recipe, and then holds only what differs from it; the file
    /// is looked for next to the recipe first. An `[augment]` table then applies to every view of the base. The base's published
    /// figure is not inherited, and a setting that changes the weights removes the recipe's own. `~/` at the start of a string is
    /// the home folder.
    ///
    /// # Errors
    /// If no such file or recipe exists, or a setting is unknown or out of range; the message names the key.
    pub fn load(name: &str, settings: &[String]) -> Result<Self> {
        Self::from_table(table_of(name)?, settings)
    }

    /// Loads only how the images of a recipe are read: its views may not fit them yet.
    ///
    /// # Errors
    /// If no such file or recipe exists, or a setting of `data` is unknown or out of range.
    pub(crate) fn reading_of(name: &str) -> Result<Reading> {
        let table = table_of(name)?;
        let data = table.get("data").and_then(toml::Value::as_table).cloned().unwrap_or_default();
        let data: DataSettings = settings::read(&data, "data")?;
        Ok(data.reading())
    }

    /// Parses a complete recipe from its text, with `key.path=value` settings on top; messages call it `origin`.
    ///
    /// # Errors
    /// If the text is not TOML, or a setting is unknown or out of range; the message names the key.
    pub fn parse(text: &str, origin: &str, settings: &[String]) -> Result<Self> {
        Self::from_table(parsed(text, origin)?, settings)
    }

    /// Returns the recipe with `key.path=value` settings on top.
    ///
    /// # Errors
    /// If a setting is unknown or out of range; the message names the key.
    pub fn with(&self, settings: &[String]) -> Result<Self> {
        Self::from_table(self.to_toml().parse().expect("a recipe is TOML"), settings)
    }

    fn from_table(mut table: toml::Table, settings: &[String]) -> Result<Self> {
        for setting in settings {
            set(&mut table, setting)?;
        }
        settings::expand_home(&mut table, std::env::var("HOME").ok().as_deref());
        settings::check_sizes(&table)?;
        let mut recipe: Self = settings::read_with(&mut table, settings)?;
        if let Some(source) = &mut recipe.source {
            source.forget_figure(settings);
        }
        recipe.network.channels = recipe.data.channels;
        recipe.check()?;
        Ok(recipe)
    }

    /// Builds the recipe's method on the recipe's network.
    ///
    /// # Errors
    /// If the method's name is unknown, or its settings are unknown or out of range.
    pub fn build_method(&self) -> Result<Box<dyn Method>> {
        methods::build(&self.method.name, &self.network, &self.method.settings)
    }

    /// Returns the recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe is plain data")
    }

    /// Returns the augmentation policy of each of `views` views.
    ///
    /// # Errors
    /// If the recipe's policies make neither one view nor `views`.
    pub fn policies(&self, views: usize) -> Result<Vec<Policy>> {
        let repeat = |policy: &Policy| std::iter::repeat_n(policy.clone(), policy.repeat);
        let all: Vec<Policy> = self.augment.iter().flat_map(repeat).collect();
        match all.len() {
            1 => Ok(vec![all[0].clone(); views]),
            n if n == views => Ok(all),
            n => Err(Error::config(format!(
                "the recipe's [[augment]] tables make {n} views; this method needs 1, which is used for all views, or {views}"
            ))),
        }
    }

    /// Returns the learning rate schedule of a run over `images` images: `total = images / batch * epochs` steps, or with
    /// [`all_images`](TrainSettings::all_images) `images * epochs / batch`.
    pub fn schedule(&self, images: usize) -> Schedule {
        let (batch, epochs) = (self.train.batch, u64::from(self.train.epochs));
        let per_epoch = (images / batch) as u64;
        let warmup = self.optim.warmup_epochs;
        let (warmup, total) = if self.train.all_images && per_epoch > 0 {
            // Rounded down, as in google-research/simclr, `model_util.py`.
            let warmup = (warmup * images as f64 / batch as f64).floor();
            (warmup, epochs * images as u64 / batch as u64)
        } else {
            ((warmup * per_epoch as f64).round(), per_epoch * epochs)
        };
        Schedule {
            peak: self.optim.lr_rule.apply(self.optim.lr, self.train.batch),
            warmup: warmup as u64,
            total,
            warmup_from: self.optim.warmup_from,
            end: self.optim.end_lr,
            decay: self.optim.decay.clone(),
            per_epoch,
        }
    }

    fn check(&self) -> Result<()> {
        self.source.as_ref().map_or(Ok(()), Source::check)?;
        self.network.check()?;
        let positive = |value: f64, key: &str| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                Err(Error::config(format!("{key} is {value}; it must be 0 or more")))
            }
        };
        if self.train.init.as_deref().is_some_and(|file| file.trim().is_empty()) {
            let reason = "train.init is empty: name a file of weights, or leave it out";
            return Err(Error::config(reason));
        }
        self.data.gpu_bytes()?;
        let limited = |value: f64, most: f64, key: &str| match value > most {
            true => Err(Error::config(format!("{key} is {value:e}; it must be at most {most:e}"))),
            false => positive(value, key),
        };
        limited(self.optim.lr, f64::from(f32::MAX), "optim.lr")?;
        limited(self.optim.warmup_epochs, MOST_EPOCHS, "optim.warmup_epochs")?;
        self.optim.rule.check()?;
        let most = f64::from(f32::MAX);
        limited(self.optim.warmup_from.unwrap_or(0.0), most, "optim.warmup_from")?;
        limited(self.optim.end_lr, most, "optim.end_lr")?;
        if let Decay::Steps { factor, .. } = self.optim.decay {
            limited(factor, 1.0, "optim.decay.steps.factor")?;
        }
        positive(self.train.checkpoint_every_minutes, "train.checkpoint_every_minutes")?;
        for (share, key) in
            [(self.data.max_skipped, "data.max_skipped"), (self.data.validation, "data.validation")]
        {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::Config(format!(
                    "{key} is {share}; it must be a share between 0 and 1"
                )));
            }
        }
        positive(self.watch.collapsed_std, "watch.collapsed_std")?;
        positive(self.watch.collapsed_rank, "watch.collapsed_rank")?;
        positive(self.watch.collapsed_rank_me, "watch.collapsed_rank_me")?;
        positive(self.watch.collapsed_prototypes, "watch.collapsed_prototypes")?;
        positive(self.watch.diverged, "watch.diverged")?;
        let most = [
            (self.train.threads, "train.threads"),
            (self.train.loader_threads, "train.loader_threads"),
        ];
        for (value, key) in most {
            if value > MOST_THREADS {
                return Err(Error::config(format!(
                    "{key} is {value}; it must be at most {MOST_THREADS}"
                )));
            }
        }
        for (value, key) in [
            (self.train.epochs as usize, "train.epochs"),
            (self.train.keep, "train.keep"),
            (self.augment.len(), "the number of [[augment]] tables"),
        ] {
            if value == 0 {
                return Err(Error::config(format!("{key} must be at least 1")));
            }
        }
        if self.train.batch < 2 {
            return Err(Error::config(
                "train.batch must be at least 2: a single image has nothing to be compared with",
            ));
        }
        let (groups, parts) = (self.network.norm_groups, self.train.micro_batches.max(1));
        if !(self.train.batch / parts).is_multiple_of(groups) {
            return Err(Error::Config(format!(
                "network.norm_groups is {groups}, which does not divide the {} images that batch norm sees: change train.batch",
                self.train.batch / parts
            )));
        }
        let reading = self.data.reading();
        reading.check()?;
        self.augment.iter().try_for_each(Policy::check)?;
        self.augment.iter().try_for_each(|policy| policy.check_for(reading.format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::builtin_names;

    fn message(settings: &[&str]) -> String {
        let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
        Recipe::load("demo", &settings).unwrap_err().to_string()
    }

    #[test]
    fn every_builtin_recipe_loads_and_survives_its_own_toml() {
        for name in builtin_names() {
            let recipe = Recipe::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
            recipe.build_method().unwrap_or_else(|e| panic!("{name}: {e}"));
            let again = settings::read(&recipe.to_toml().parse().unwrap(), "").unwrap();
            assert_eq!(recipe, again, "{name}");
        }
    }

    #[test]
    fn mistakes_name_the_key_and_the_nearest_one() {
        assert!(message(&["train.epoch=3"]).contains("(did you mean `epochs`?)"));
        assert!(message(&["train.epochs=many"]).contains("invalid type: string \"many\""));
        assert!(message(&["train.epochs"]).contains("--set takes key.path=value"));
        assert!(message(&["train.batch=1"]).contains("train.batch must be at least 2"));
        assert!(message(&["network.norm_groups=3"]).contains("network.norm_groups is 3"));
        assert!(message(&["network.depth=20"]).contains("network.depth is 20"));
        let missing = Recipe::load("simclr-cifar", &[]).unwrap_err().to_string();
        assert!(missing.contains("no recipe file or built-in recipe simclr-cifar;"), "{missing}");
        let recipe = Recipe::load("demo", &["method.temprature=1".into()]).unwrap();
        let error = recipe.build_method().err().unwrap().to_string();
        assert!(error.contains("(did you mean `temperature`?)"), "{error}");
    }

    #[test]
    fn a_recipe_says_what_differs_from_its_base() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let text = "base = \"simclr-cifar10\"\n[optim.rule.sgd]\nmomentum = 0.8\nnesterov = false\n\
            weight_decay = 0\nexclude = \"nothing\"\n[augment]\nflip = 0.25\n";
        let recipe = Recipe::load(&file("a.toml", text), &["train.batch=64".into()]).unwrap();
        let base = Recipe::load("simclr-cifar10", &[]).unwrap();
        assert!(matches!(recipe.optim.rule, Rule::Sgd(sgd) if sgd.momentum == 0.8));
        assert_eq!((recipe.train.batch, recipe.train.epochs), (64, base.train.epochs));
        assert_eq!((recipe.augment[0].flip, recipe.augment[0].size), (0.25, 32));
        let own = file("circle.toml", "");
        std::fs::write(&own, format!("base = {own:?}")).unwrap();
        let error = Recipe::load(&own, &[]).unwrap_err().to_string();
        assert!(error.contains("at most 4 recipes may be based on one another"), "{error}");
    }

    #[test]
    fn a_number_is_a_string_where_a_string_is_wanted() {
        let load = |settings: &[&str]| {
            Recipe::load("demo", &settings.iter().map(|s| s.to_string()).collect::<Vec<_>>())
        };
        let recipe = load(&["data.path=2024", "data.labels=1e3", "train.init=0x10"]).unwrap();
        assert_eq!(recipe.data.path, "2024");
        assert_eq!(recipe.data.labels.as_deref(), Some("1e3"));
        assert_eq!(recipe.train.init.as_deref(), Some("0x10"));
        assert_eq!(load(&["data.path=1", "data.path=true"]).unwrap().data.path, "true");
        assert_eq!(load(&["data.path=\"2024\""]).unwrap().data.path, "2024");
        assert_eq!(load(&["data.path=[1]"]).unwrap().data.path, "[1]");
    }

    #[test]
    fn a_deep_key_an_absurd_count_and_a_wrong_share_are_refused_by_name() {
        let deep = format!("{}=1", vec!["a"; 100_000].join("."));
        let error = message(&[&deep]);
        assert!(error.contains("the key has 100000 parts"), "{error}");
        assert!(error.len() < 200, "{} characters", error.len());
        for key in ["train.threads", "train.loader_threads"] {
            let expected = format!("{key} is 1000000; it must be at most 1024");
            assert_eq!(message(&[&format!("{key}=1000000")]), expected);
        }
        assert!(message(&["data.max_skipped=2"]).starts_with("data.max_skipped is 2; it must be"));
    }

    #[test]
    fn a_tilde_is_the_home_folder() {
        let mut table = toml::toml! {
            a = "~/photos"
            b = "~user/x"
            c = ["~/y", 3]
            d = { e = "x/~/y" }
        };
        crate::settings::expand_home(&mut table, Some("/home/me/"));
        let expected = toml::toml! {
            a = "/home/me/photos"
            b = "~user/x"
            c = ["/home/me/y", 3]
            d = { e = "x/~/y" }
        };
        assert_eq!(table, expected);
    }

    #[test]
    fn a_base_is_looked_for_next_to_the_recipe_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        write("bases/own.toml", "base = \"deeper.toml\"\n[train]\nepochs = 3\n");
        write("bases/deeper.toml", "base = \"demo\"\n[train]\nbatch = 10\n");
        let short = write("short.toml", "base = \"bases/own.toml\"\nseed = 5\n");
        let recipe = Recipe::load(&short, &[]).unwrap();
        assert_eq!((recipe.seed, recipe.train.epochs, recipe.train.batch), (5, 3, 10));
        let lost = write("lost.toml", "base = \"nowhere.toml\"\n");
        let error = Recipe::load(&lost, &[]).unwrap_err().to_string();
        assert!(error.starts_with("no recipe file or built-in recipe nowhere.toml"), "{error}");
    }

    #[test]
    fn settings_reach_nested_tables_and_arrays() {
        let settings = ["train.epochs=7".to_string(), "augment.flip=0.25".into()];
        let recipe = Recipe::load("demo", &settings).unwrap();
        assert_eq!(recipe.train.epochs, 7);
        assert!(recipe.augment.iter().all(|p| p.flip == 0.25));
    }
}

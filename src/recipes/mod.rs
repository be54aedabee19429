//! Recipes: everything that decides a run, as one TOML file.

mod builtin;
mod load;

use serde::{Deserialize, Serialize};

use crate::data::Policy;
use crate::device::Precision;
use crate::error::{Error, Result};
use crate::methods::{self, Method};
use crate::nn::ResNetConfig;
use crate::optim::{Decay, LrRule, Rule, Schedule};
use crate::settings::{self, parsed, set};
pub use builtin::{builtin, builtin_names, builtin_studies, builtin_study};
use load::table_of;

/// A run's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What decides every random number.
    pub seed: u64,
    /// Which method, and its own settings.
    pub method: MethodSettings,
    /// Where images come from.
    pub data: DataSettings,
    /// The backbone.
    pub network: ResNetConfig,
    /// How weights move.
    pub optim: OptimSettings,
    /// How long, how much at once, and what is written.
    pub train: TrainSettings,
    /// What stops a run whose numbers went wrong.
    #[serde(default)]
    pub watch: WatchSettings,
    /// How views are made; one for all views, or one for each.
    pub augment: Vec<Policy>,
}

/// A method by name; the rest of its table is for the method to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSettings {
    /// A name of [`ALL`](crate::methods::ALL).
    pub name: String,
    /// Whatever else stands in the table.
    #[serde(flatten)]
    pub settings: toml::Table,
}

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// A folder, or `fashion-scattered` for the images that the program brings along.
    pub path: String,
    /// Use this many training images, spread over the set; 0 for all.
    #[serde(default)]
    pub limit: usize,
    /// Use this many held-out images, spread over the set; 0 for all.
    #[serde(default)]
    pub test_limit: usize,
    /// Train on the labelled ones of these images only: `10%` of each class, or a file that names them. See
    /// [`labelled`](crate::data::labelled).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
}

/// How weights move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimSettings {
    /// The base learning rate, before `lr_rule`.
    pub lr: f64,
    /// What the batch size makes of it.
    pub lr_rule: LrRule,
    /// Epochs of linear warm-up; may be a fraction.
    pub warmup_epochs: f64,
    /// Where the warm-up starts, as a rate that no rule scales; from zero without. See [`Schedule::warmup_from`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_from: Option<f64>,
    /// Where a cosine ends, as a rate that no rule scales.
    #[serde(default)]
    pub end_lr: f64,
    /// How the rate falls after the warm-up.
    #[serde(default)]
    pub decay: Decay,
    /// The update and its settings.
    pub rule: Rule,
}

/// How long, how much at once, and what is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Passes over the training images.
    pub epochs: u32,
    /// Images of a step, each in several views.
    pub batch: usize,
    /// Parts that a step is made in, for batches that do not fit into memory. Gradients stay those of the whole batch; batch norm
    /// sees a part.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub micro_batches: usize,
    /// kNN accuracy is measured every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub knn_every: u32,
    /// A checkpoint is written every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub checkpoint_every: u32,
    /// A checkpoint is written every this many steps, too; 0 for none within an epoch.
    #[serde(default)]
    pub checkpoint_every_steps: u64,
    /// A checkpoint is written when the last one is this many minutes old, too; 0 for none.
    #[serde(default)]
    pub checkpoint_every_minutes: f64,
    /// Checkpoints that are kept; at least 1.
    #[serde(default = "three")]
    pub keep: usize,
    /// What a GPU stores activations and multiplies in: `bf16` or `f32`. The CPU computes in f32.
    #[serde(default = "bf16")]
    pub precision: Precision,
    /// The views of this many first steps, and the first weights, are written to the run's `parity/`, for
    /// `benches/peers/parity.py`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dump_views: u64,
    /// Compute threads; 0 for one a core. Changes no result.
    #[serde(default)]
    pub threads: usize,
    /// Loader threads; 0 for one a core. Changes no result.
    #[serde(default)]
    pub loader_threads: usize,
    /// A weight file to start from, in torchvision's names: slots that it has are taken from it, the complete backbone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
}

/// What stops a run whose numbers went wrong, within an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchSettings {
    /// Embeddings have collapsed below this share of `1 / sqrt(d)`; healthy runs stay above 0.3.
    pub collapsed_std: f64,
    /// They have collapsed to a line below this effective rank: a batch norm that ends a head keeps the deviation up.
    pub collapsed_rank: f64,
    /// All images have one assignment below this many prototypes in use.
    pub collapsed_prototypes: f64,
    /// An epoch's mean loss, in multiples of the run's first (of 1 if that is less), from which the run diverges; 0 for never.
    pub diverged: f64,
    /// Say what is wrong and go on all the same.
    pub carry_on: bool,
    /// Write `report.html` after every epoch and at the end, with new pictures whenever kNN is measured.
    pub report: bool,
    /// Write the numbers of `metrics.jsonl` also as TensorBoard's event files.
    pub tensorboard: bool,
}

impl Default for WatchSettings {
    fn default() -> Self {
        Self {
            collapsed_std: 0.05,
            collapsed_rank: 1.3,
            collapsed_prototypes: 1.5,
            diverged: 10.0,
            carry_on: false,
            report: true,
            tensorboard: false,
        }
    }
}

fn one() -> usize {
    1
}

fn is_one(value: &usize) -> bool {
    *value == 1
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn three() -> usize {
    3
}

fn bf16() -> Precision {
    Precision::Bf16
}

impl Recipe {
    /// A recipe from a file, or from a name of [`builtin_names`](builtin_names), with `key.path=value` settings on top. A recipe may start
    /// with `base = "…"`, another one's name or file, and then says only what differs; `[augment]` differs in every view.
    ///
    /// # Errors
    /// When there is no such file or recipe, or it is not what it should be: the message names the key.
    pub fn load(name: &str, settings: &[String]) -> Result<Self> {
        Self::from_table(table_of(name, 0)?, settings)
    }

    /// A whole recipe from its text, with `key.path=value` settings on top; `origin` is what messages call it.
    ///
    /// # Errors
    /// When the text is not what it should be: the message names the key.
    pub fn parse(text: &str, origin: &str, settings: &[String]) -> Result<Self> {
        Self::from_table(parsed(text, origin)?, settings)
    }

    /// The recipe with `key.path=value` settings on top.
    ///
    /// # Errors
    /// When it is then no recipe: the message names the key.
    pub fn with(&self, settings: &[String]) -> Result<Self> {
        Self::from_table(self.to_toml().parse().expect("a recipe is TOML"), settings)
    }

    fn from_table(mut table: toml::Table, settings: &[String]) -> Result<Self> {
        for setting in settings {
            set(&mut table, setting)?;
        }
        settings::check_sizes(&table)?;
        let recipe: Self = settings::read(&table, "")?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Builds the recipe's method on the recipe's network.
    ///
    /// # Errors
    /// If no method has that name, or its settings do not fit.
    pub fn build_method(&self) -> Result<Box<dyn Method>> {
        methods::build(&self.method.name, &self.network, &self.method.settings)
    }

    /// The recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a recipe is plain data")
    }

    /// The policy of each of `views` views.
    ///
    /// # Errors
    /// When the recipe makes neither one view nor as many as needed.
    pub fn policies(&self, views: usize) -> Result<Vec<Policy>> {
        let repeat = |policy: &Policy| std::iter::repeat_n(policy.clone(), policy.repeat);
        let all: Vec<Policy> = self.augment.iter().flat_map(repeat).collect();
        match all.len() {
            1 => Ok(vec![all[0].clone(); views]),
            n if n == views => Ok(all),
            n => Err(Error::config(format!(
                "the recipe's [[augment]] tables make {n} views; this method needs 1 for all views or {views}"
            ))),
        }
    }

    /// The learning rate of a run over `images` images: `total = images * epochs / batch` steps.
    pub fn schedule(&self, images: usize) -> Schedule {
        let per_epoch = (images / self.train.batch) as u64;
        Schedule {
            peak: self.optim.lr_rule.apply(self.optim.lr, self.train.batch),
            warmup: (self.optim.warmup_epochs * per_epoch as f64).round() as u64,
            total: per_epoch * u64::from(self.train.epochs),
            warmup_from: self.optim.warmup_from,
            end: self.optim.end_lr,
            decay: self.optim.decay.clone(),
            per_epoch,
        }
    }

    fn check(&self) -> Result<()> {
        self.network.check()?;
        let positive = |value: f64, key: &str| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                Err(Error::config(format!("{key} is {value}, which must be 0 or more")))
            }
        };
        positive(self.optim.lr, "optim.lr")?;
        positive(self.optim.warmup_epochs, "optim.warmup_epochs")?;
        positive(self.optim.warmup_from.unwrap_or(0.0), "optim.warmup_from")?;
        positive(self.optim.end_lr, "optim.end_lr")?;
        positive(self.train.checkpoint_every_minutes, "train.checkpoint_every_minutes")?;
        positive(self.watch.collapsed_std, "watch.collapsed_std")?;
        positive(self.watch.collapsed_rank, "watch.collapsed_rank")?;
        positive(self.watch.collapsed_prototypes, "watch.collapsed_prototypes")?;
        positive(self.watch.diverged, "watch.diverged")?;
        for (value, key) in [
            (self.train.epochs as usize, "train.epochs"),
            (self.train.keep, "train.keep"),
            (self.augment.len(), "the number of [[augment]] tables"),
        ] {
            if value == 0 {
                return Err(Error::config(format!("{key} starts at 1")));
            }
        }
        if self.train.batch < 2 {
            return Err(Error::config("train.batch starts at 2: one image has no others"));
        }
        let (groups, parts) = (self.network.norm_groups, self.train.micro_batches.max(1));
        if !(self.train.batch / parts).is_multiple_of(groups) {
            return Err(Error::Config(format!(
                "network.norm_groups is {groups}, into which the {} images that batch norm sees cannot be cut: change train.batch",
                self.train.batch / parts
            )));
        }
        self.augment.iter().try_for_each(Policy::check)
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
        assert!(message(&["train.batch=1"]).contains("train.batch starts at 2"));
        assert!(message(&["network.norm_groups=3"]).contains("network.norm_groups is 3"));
        assert!(message(&["network.depth=20"]).contains("network.depth is 20"));
        let missing = Recipe::load("simclr-cifar", &[]).unwrap_err().to_string();
        assert!(missing.contains("there is no recipe file simclr-cifar"), "{missing}");
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
        assert!(error.contains("base must be another recipe"), "{error}");
    }

    #[test]
    fn settings_reach_nested_tables_and_arrays() {
        let settings = ["train.epochs=7".to_string(), "augment.flip=0.25".into()];
        let recipe = Recipe::load("demo", &settings).unwrap();
        assert_eq!(recipe.train.epochs, 7);
        assert!(recipe.augment.iter().all(|p| p.flip == 0.25));
    }
}

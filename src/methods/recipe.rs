//! Recipes: everything that decides a run, as one TOML file.

use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::data::Policy;
use crate::device::Precision;
use crate::error::{Error, Result};
use crate::nn::ResNetConfig;
use crate::optim::{Decay, LrRule, Rule, Schedule};

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
    /// The trunk.
    pub network: ResNetConfig,
    /// How weights move.
    pub optim: OptimSettings,
    /// How long, how much at once, and what is written.
    pub train: TrainSettings,
    /// How views are made; one for all views, or one for each.
    pub augment: Vec<Policy>,
}

/// A method by name; the rest of its table is for the method to read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodSettings {
    /// A name of [`ALL`](super::ALL).
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
    /// kNN accuracy is measured every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub knn_every: u32,
    /// A checkpoint is written every this many epochs and at the end; 0 for the end only.
    #[serde(default)]
    pub checkpoint_every: u32,
    /// Checkpoints that are kept; at least 1.
    #[serde(default = "three")]
    pub keep: usize,
    /// What a GPU stores activations and multiplies in: `bf16` or `f32`. The CPU computes in f32.
    #[serde(default = "bf16")]
    pub precision: Precision,
    /// Compute threads; 0 for one a core. Changes no result.
    #[serde(default)]
    pub threads: usize,
    /// Loader threads; 0 for one a core. Changes no result.
    #[serde(default)]
    pub loader_threads: usize,
    /// A weight file to start from, in torchvision's names: slots that it has are taken from it, the trunk whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
}

fn three() -> usize {
    3
}

fn bf16() -> Precision {
    Precision::Bf16
}

impl Recipe {
    /// A recipe from a file, or from a name of [`builtin_names`], with `key.path=value` settings on top.
    ///
    /// # Errors
    /// When there is no such file or recipe, or it is not what it should be: the message names the key.
    pub fn load(name: &str, settings: &[String]) -> Result<Self> {
        let (text, origin) = match builtin(name) {
            Some(text) => (text.to_owned(), name.to_owned()),
            None => (read(name)?, name.to_owned()),
        };
        let table: toml::Table =
            text.parse().map_err(|e| Error::format(&origin, format!("is not TOML: {e}")))?;
        Self::from_table(table, settings)
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
        let recipe: Self = self::table(&table, "")?;
        recipe.check()?;
        Ok(recipe)
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
        self.augment.iter().try_for_each(Policy::check)
    }
}

fn read(name: &str) -> Result<String> {
    if !Path::new(name).exists() {
        let known = builtin_names().collect::<Vec<_>>().join(", ");
        return Err(Error::Config(format!(
            "there is no recipe file {name}, nor a built-in recipe of that name; built in are: {known}"
        )));
    }
    std::fs::read_to_string(name).map_err(Error::io(name))
}

/// Sets `a.b.c=value` in a table; the value is TOML, or else a string.
fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let malformed = || {
        Error::config(format!("--set takes key.path=value, such as train.epochs=5, not {setting}"))
    };
    let (path, value) = setting.split_once('=').ok_or_else(malformed)?;
    let value = format!("v = {value}").parse::<toml::Table>().map_or_else(
        |_| toml::Value::String(value.into()),
        |mut t| t.remove("v").expect("set above"),
    );
    let keys: Vec<&str> = path.trim().split('.').collect();
    let (last, parents) = keys.split_last().expect("split gives at least one");
    // `augment.flip=0` reaches every table of an array, `augment.1.flip=0` one.
    fn walk(at: &mut toml::Value, path: &[&str], last: &str, value: &toml::Value) -> Option<()> {
        match (at, path) {
            (toml::Value::Array(items), [index, rest @ ..]) if index.parse::<usize>().is_ok() => {
                walk(items.get_mut(index.parse::<usize>().ok()?)?, rest, last, value)
            }
            (toml::Value::Array(items), path) => {
                items.iter_mut().try_for_each(|item| walk(item, path, last, value))
            }
            (toml::Value::Table(table), [key, rest @ ..]) => {
                let inner = table.entry(*key).or_insert(toml::Value::Table(toml::Table::new()));
                walk(inner, rest, last, value)
            }
            (toml::Value::Table(table), []) => {
                table.insert(last.into(), value.clone());
                Some(())
            }
            _ => None,
        }
    }
    let mut root = toml::Value::Table(std::mem::take(table));
    let done = walk(&mut root, parents, last, &value);
    if let toml::Value::Table(root) = root {
        *table = root;
    }
    done.ok_or_else(|| Error::config(format!("--set {setting}: the recipe has no table there")))
}

/// Reads a table, answering an unknown key with the nearest known one. `place` is the table's own name.
pub(super) fn table<T: DeserializeOwned>(table: &toml::Table, place: &str) -> Result<T> {
    T::deserialize(table.clone()).map_err(|error| {
        let message = error.to_string();
        let message = message.lines().map(str::trim).filter(|l| !l.is_empty());
        let message = message.collect::<Vec<_>>().join("; ");
        let place = if place.is_empty() { String::new() } else { format!("[{place}] ") };
        Error::Config(format!("recipe: {place}{message}{}", nearest(&message)))
    })
}

/// ` (did you mean …?)` for serde's "unknown field `x`, expected one of `a`, `b`".
fn nearest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown ") {
        return String::new();
    }
    let Some(given) = quoted.next() else { return String::new() };
    let closest = quoted.min_by_key(|known| distance(given, known));
    closest
        .filter(|known| distance(given, known) <= given.len().max(3) / 2 + 1)
        .map_or(String::new(), |known| format!(" (did you mean `{known}`?)"))
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replace = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replace.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

macro_rules! builtin {
    ($name:literal) => {
        ($name, include_str!(concat!("../../recipes/", $name, ".toml")))
    };
}

const BUILTIN: &[(&str, &str)] = &[
    builtin!("byol-cifar10"),
    builtin!("byol-cifar10-small"),
    builtin!("byol-imagenet"),
    builtin!("demo"),
    builtin!("moco-v1-imagenet"),
    builtin!("moco-v2-cifar10"),
    builtin!("moco-v2-cifar10-small"),
    builtin!("moco-v2-imagenet"),
    builtin!("simclr-cifar10"),
    builtin!("simclr-cifar10-small"),
    builtin!("simclr-imagenet"),
    builtin!("simclr-v2-cifar10"),
    builtin!("simclr-v2-cifar10-small"),
    builtin!("simclr-v2-distill-cifar10-small"),
    builtin!("simclr-v2-distill-imagenet"),
    builtin!("simclr-v2-finetune-cifar10-small"),
    builtin!("simclr-v2-finetune-imagenet"),
    builtin!("simclr-v2-imagenet-r152-3x"),
    builtin!("simclr-v2-imagenet-r50-1x"),
    builtin!("simsiam-cifar10"),
    builtin!("simsiam-cifar10-small"),
    builtin!("simsiam-imagenet"),
    builtin!("supervised-cifar10"),
    builtin!("supervised-cifar10-small"),
    builtin!("supervised-imagenet"),
    builtin!("swav-cifar10"),
    builtin!("swav-cifar10-small"),
    builtin!("swav-imagenet"),
    builtin!("swav-imagenet-256"),
];

/// Names of the recipes that the program brings along.
pub fn builtin_names() -> impl Iterator<Item = &'static str> {
    BUILTIN.iter().map(|(name, _)| *name)
}

/// The text of a built-in recipe.
pub fn builtin(name: &str) -> Option<&'static str> {
    BUILTIN.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(settings: &[&str]) -> String {
        let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
        Recipe::load("demo", &settings).unwrap_err().to_string()
    }

    #[test]
    fn every_builtin_recipe_loads_and_survives_its_own_toml() {
        for name in builtin_names() {
            let recipe = Recipe::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
            super::super::build(&recipe).unwrap_or_else(|e| panic!("{name}: {e}"));
            let again = table(&recipe.to_toml().parse().unwrap(), "").unwrap();
            assert_eq!(recipe, again, "{name}");
        }
    }

    #[test]
    fn mistakes_name_the_key_and_the_nearest_one() {
        assert!(message(&["train.epoch=3"]).contains("(did you mean `epochs`?)"));
        assert!(message(&["train.epochs=many"]).contains("invalid type: string \"many\""));
        assert!(message(&["train.epochs"]).contains("--set takes key.path=value"));
        assert!(message(&["train.batch=1"]).contains("train.batch starts at 2"));
        assert!(message(&["network.depth=20"]).contains("network.depth is 20"));
        let missing = Recipe::load("simclr-cifar", &[]).unwrap_err().to_string();
        assert!(missing.contains("there is no recipe file simclr-cifar"), "{missing}");
        let recipe = Recipe::load("demo", &["method.temprature=1".into()]).unwrap();
        let error = super::super::build(&recipe).err().unwrap().to_string();
        assert!(error.contains("(did you mean `temperature`?)"), "{error}");
    }

    #[test]
    fn settings_reach_nested_tables_and_arrays() {
        let settings = ["train.epochs=7".to_string(), "augment.flip=0.25".into()];
        let recipe = Recipe::load("demo", &settings).unwrap();
        assert_eq!(recipe.train.epochs, 7);
        assert!(recipe.augment.iter().all(|p| p.flip == 0.25));
    }
}

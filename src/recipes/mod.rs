//! Recipes: every setting that decides a run's result, as one TOML file.

mod builtin;
mod check;
mod data;
mod load;
mod measured;
mod normalise;
mod own;
mod source;
mod train;

use serde::{Deserialize, Serialize};

use crate::data::{Policy, Reading};
use crate::error::{Error, Result};
use crate::methods::{self, Method};
use crate::nn::ResNetConfig;
use crate::optim::Schedule;
use crate::settings::{self, parsed, set};
pub use builtin::{builtin, builtin_names, builtin_studies, builtin_study};
pub(crate) use check::MOST_THREADS;
pub use data::DataSettings;
pub(crate) use data::MAX_SKIPPED;
use load::table_of;
pub use measured::{MeasuredRun, measured_runs};
pub use normalise::with_normalise;
pub use own::{Choice, FEWEST_IMAGES, OWN_METHODS, OwnImages};
pub(crate) use own::{check_method, own_recipe, widths, wished_epochs};
pub use source::Source;
pub use train::{MethodSettings, OptimSettings, TrainSettings, WatchSettings};

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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Rule;

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

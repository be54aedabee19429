//! Where a recipe comes from, and in what it deviates from there.
//!
//! A figure that somebody published is a target of a recipe only if the recipe has the published settings, or says where it has
//! not. So a recipe may quote a figure only with `as_published = true` or with its `deviations`; [`Source::check`] refuses it
//! otherwise, and a setting that is changed with `--set` removes the figure ([`Source::forget_figure`]).

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The `[source]` table of a recipe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Source {
    /// The paper, and the part of it that has the settings: `arXiv:2011.10566, appendix D`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paper: Option<String>,
    /// The repository, its commit and the files that have the settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What was published for these settings: `92.6% online linear`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub figure: Option<String>,
    /// Whether no deviation from what was published is known.
    #[serde(skip_serializing_if = "is_false")]
    pub as_published: bool,
    /// What the settings, or this program, do otherwise than the source, each in a sentence.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deviations: Vec<String>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// The settings under which a recipe's figure stays its target: none of them changes the weights that a run ends with.
const WITHOUT_EFFECT: [&str; 13] = [
    "data.path",
    "data.max_skipped",
    "watch.",
    "train.threads",
    "train.loader_threads",
    "train.keep",
    "train.dump_views",
    "train.knn_every",
    "train.checkpoint_every",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_minutes",
    "train.precision",
    "seed",
];

impl Source {
    /// Checks that a figure stands next to `as_published` or to deviations, and that these two do not contradict each other.
    ///
    /// # Errors
    /// If not; the message names the keys.
    pub fn check(&self) -> Result<()> {
        let message = match (&self.figure, self.as_published, self.deviations.is_empty()) {
            (_, true, false) => {
                "source.as_published says that there is no deviation, and source.deviations lists some"
            }
            (Some(_), false, true) => {
                "source.figure is quoted without source.as_published = true or source.deviations"
            }
            (Some(_), ..) if self.paper.is_none() && self.code.is_none() => {
                "source.figure is quoted without source.paper or source.code, which say where it stands"
            }
            _ => return Ok(()),
        };
        Err(Error::config(message))
    }

    /// Removes the figure and the claim to be as published, which another setting makes untrue, unless all `settings`
    /// (`key.path=value`) are without effect on the weights.
    pub(super) fn forget_figure(&mut self, settings: &[String]) {
        let key = |setting: &str| setting.split('=').next().unwrap_or_default().trim().to_owned();
        let harmless = |setting: &String| {
            let key = key(setting);
            WITHOUT_EFFECT.iter().any(|known| match known.strip_suffix('.') {
                Some(table) => key.strip_prefix(table).is_some_and(|rest| rest.starts_with('.')),
                None => key == *known,
            })
        };
        if !settings.iter().all(harmless) {
            self.figure = None;
            self.as_published = false;
        }
    }
}

/// Makes the `[source]` of a recipe from its base's and its own. A figure belongs to the settings of one recipe and is never
/// taken over. A recipe with a paper or code of its own has another source than its base; one without shares the base's, and its
/// deviations come on top.
pub(super) fn inherit(base: &mut toml::Table, own: Option<toml::Value>) {
    let mut merged = base.remove("source").and_then(into_table).unwrap_or_default();
    merged.remove("figure");
    merged.remove("as_published");
    match own {
        Some(toml::Value::Table(own))
            if !own.contains_key("paper") && !own.contains_key("code") =>
        {
            for (key, value) in own {
                match (merged.get_mut(&key), value) {
                    (Some(toml::Value::Array(list)), toml::Value::Array(more)) => list.extend(more),
                    (_, value) => drop(merged.insert(key, value)),
                }
            }
        }
        Some(toml::Value::Table(own)) => merged = own,
        // Not a table: reading the recipe says so.
        Some(other) => return drop(base.insert("source".into(), other)),
        None => {}
    }
    if !merged.is_empty() {
        base.insert("source".into(), merged.into());
    }
}

fn into_table(value: toml::Value) -> Option<toml::Table> {
    match value {
        toml::Value::Table(table) => Some(table),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::{Recipe, builtin, builtin_names};

    /// Percentages and kNN shares in a text: `71.1%`, `.902`.
    fn quotes_a_figure(text: &str) -> bool {
        let digit_before = |at: usize| text[..at].ends_with(|c: char| c.is_ascii_digit());
        text.match_indices('%').any(|(at, _)| digit_before(at))
    }

    #[test]
    fn no_builtin_recipe_quotes_a_figure_without_its_deviations() {
        let (mut quoting, mut exact) = (0, 0);
        for name in builtin_names() {
            let source = Recipe::load(name, &[]).unwrap().source.unwrap_or_default();
            source.check().unwrap_or_else(|e| panic!("{name}: {e}"));
            // A figure in a comment would be out of the check's sight.
            let comments = builtin(name).unwrap().lines().filter(|line| line.starts_with('#'));
            for line in comments {
                let share = line.contains("% of ") || line.contains("% stage");
                assert!(share || !quotes_a_figure(line), "{name} quotes a figure in `{line}`");
            }
            quoting += usize::from(source.figure.is_some());
            exact += usize::from(source.as_published);
            // Every recipe says where it comes from, or that it is nobody's.
            assert!(
                source.paper.is_some() || source.code.is_some() || !source.deviations.is_empty(),
                "{name} has neither a source nor a word on why"
            );
        }
        println!(
            "recipes that quote a figure: {quoting}, of them without known deviation: {exact}"
        );
        assert!(quoting > 30, "{quoting}");
    }

    #[test]
    fn a_figure_without_deviations_is_refused_and_another_setting_removes_it() {
        let with = |source: &str| {
            let mut recipe: toml::Table = builtin("demo").unwrap().parse().unwrap();
            let own: toml::Table = source.parse().unwrap();
            recipe.insert("source".into(), own["source"].clone());
            Recipe::parse(&toml::to_string(&recipe).unwrap(), "a recipe", &[])
        };
        for (source, expected) in [
            ("[source]\npaper = \"p\"\nfigure = \"f\"", "without source.as_published"),
            ("[source]\nfigure = \"f\"\nas_published = true", "without source.paper"),
            ("[source]\nas_published = true\ndeviations = [\"d\"]", "lists some"),
            ("[source]\nfigures = \"f\"", "did you mean `figure`?"),
        ] {
            let error = with(source).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let recipe = with("[source]\npaper = \"p\"\nfigure = \"f\"\ndeviations = [\"d\"]").unwrap();
        let figure = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
            recipe.with(&settings).unwrap().source.unwrap().figure
        };
        assert_eq!(
            figure(&["data.path=x", "train.threads=2", "watch.report=false"]),
            Some("f".into())
        );
        assert_eq!(figure(&["data.path=x", "train.epochs=2"]), None);
        assert_eq!(figure(&["train.batch=8"]), None);
    }

    #[test]
    fn a_recipe_inherits_deviations_and_no_figure() {
        let merged = |own: &str| {
            let mut base: toml::Table =
                "[source]\npaper = \"p\"\nfigure = \"f\"\ndeviations = [\"a\"]".parse().unwrap();
            let own: toml::Table = own.parse().unwrap();
            inherit(&mut base, own.get("source").cloned());
            Source::deserialize(base["source"].clone()).unwrap()
        };
        let none = merged("");
        assert_eq!((none.paper.as_deref(), none.figure), (Some("p"), None));
        assert_eq!(none.deviations, ["a"]);
        let more = merged("[source]\nfigure = \"g\"\ndeviations = [\"b\"]");
        assert_eq!(
            (more.figure.as_deref(), more.deviations),
            (Some("g"), vec!["a".into(), "b".into()])
        );
        let other = merged("[source]\ncode = \"c\"\ndeviations = [\"b\"]");
        assert_eq!((other.paper, other.deviations), (None, vec!["b".to_owned()]));
    }
}

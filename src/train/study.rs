//! Studies: a question, a recipe, and arms that differ from it in a few settings. A study is data, as a recipe is.
//!
//! Each arm is an ordinary run in a folder of its own. An arm that collapses is a result; what stops a study is what stops a
//! run for other reasons. A study that was interrupted goes on with the arms that have no result yet.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::write_whole;
use crate::recipes::{self, Recipe, TrainSettings};
use crate::train::{Run, Watch, newest};

/// A question and the runs that answer it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// What is asked, in a sentence.
    pub question: String,
    /// Where it was asked before.
    pub source: String,
    /// The recipe of arms that name none.
    pub base: String,
    /// Settings of every arm, `key.path=value`.
    #[serde(default)]
    pub set: Vec<String>,
    /// What the table shows of each arm: names of numbers in its metrics, `seconds`, `memory_mib`.
    pub columns: Vec<String>,
    /// What is compared.
    #[serde(rename = "arm")]
    pub arms: Vec<Arm>,
}

/// One of the things compared.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// What it is called in the table.
    pub name: String,
    /// Its recipe, if not the study's.
    pub base: Option<String>,
    /// Settings on top of the study's.
    #[serde(default)]
    pub set: Vec<String>,
    /// The arm from whose last checkpoint it starts.
    pub after: Option<String>,
}

/// What came of one arm and seed, as `result.json` has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The arm.
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// The sentence of a run that was stopped, up to what to try; none if it went to its end.
    pub stopped: Option<String>,
    /// Numbers of its last epoch by name.
    pub values: BTreeMap<String, f64>,
    /// The recipe that gave them.
    recipe: String,
}

/// How a study is run.
pub struct StudyPlan<'a> {
    /// Folder of the results.
    pub out: &'a Path,
    /// Settings on top of every arm's.
    pub settings: &'a [String],
    /// Runs of each arm, seeds counting up from the recipe's.
    pub seeds: u64,
    /// Opens the device of a run: a fresh one each time, so that the most memory that it held is the run's own.
    pub device: &'a dyn Fn(&TrainSettings) -> Result<Device>,
    /// Has the last word on each recipe.
    pub adjust: &'a dyn Fn(&mut Recipe),
    /// Who watches a run of so many steps.
    pub watch: &'a dyn Fn(u64) -> Box<dyn Watch>,
    /// Is told what is being done.
    pub tell: &'a dyn Fn(&str),
}

impl Study {
    /// A study from a file, or from a name of [`builtin_studies`](recipes::builtin_studies).
    ///
    /// # Errors
    /// When there is no such file or study, or it is not what it should be.
    pub fn load(name: &str) -> Result<Self> {
        let text = match recipes::builtin_study(name) {
            Some(text) => text.to_owned(),
            None if Path::new(name).exists() => {
                std::fs::read_to_string(name).map_err(Error::io(name))?
            }
            None => {
                let known = recipes::builtin_studies().collect::<Vec<_>>().join(", ");
                return Err(Error::Config(format!(
                    "there is no study {name}; built in are: {known}"
                )));
            }
        };
        let study: Self = toml::from_str(&text)
            .map_err(|e| Error::Config(format!("study {name}: {}", e.message())))?;
        study.check(name)?;
        Ok(study)
    }

    fn check(&self, name: &str) -> Result<()> {
        for (i, arm) in self.arms.iter().enumerate() {
            let before = &self.arms[..i];
            if before.iter().any(|other| folder_name(&other.name) == folder_name(&arm.name)) {
                let name_of = &arm.name;
                return Err(Error::Config(format!("study {name}: two arms are named {name_of}")));
            }
            if let Some(after) = &arm.after
                && !before.iter().any(|other| other.name == *after)
            {
                return Err(Error::Config(format!(
                    "study {name}: {} starts after {after}, which is no arm before it",
                    arm.name
                )));
            }
        }
        Ok(())
    }

    /// The recipe of an arm, with `settings` on top.
    ///
    /// # Errors
    /// When a setting does not fit the recipe.
    pub fn recipe(&self, arm: &Arm, settings: &[String]) -> Result<Recipe> {
        let all = [&self.set, &arm.set, settings].map(|part: &[String]| part).concat();
        Recipe::load(arm.base.as_ref().unwrap_or(&self.base), &all)
    }

    /// Runs every arm that has no result yet, and writes `table.md` and `table.csv` after each. Returns all outcomes.
    ///
    /// # Errors
    /// When an arm cannot run, for another reason than numbers that went wrong; when the folder holds results of other settings.
    pub fn run(&self, plan: &StudyPlan<'_>) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        for arm in &self.arms {
            for seed in 0..plan.seeds {
                outcomes.push(self.cell(arm, seed, plan)?);
                for (name, text) in
                    [("table.md", self.markdown(&outcomes)), ("table.csv", self.csv(&outcomes))]
                {
                    write_whole(&plan.out.join(name), text.as_bytes())?;
                }
            }
        }
        Ok(outcomes)
    }

    /// One arm under one seed.
    fn cell(&self, arm: &Arm, seed: u64, plan: &StudyPlan<'_>) -> Result<Outcome> {
        let mut recipe = self.recipe(arm, plan.settings)?;
        recipe.seed += seed;
        (plan.adjust)(&mut recipe);
        let place = |arm: &str| plan.out.join(folder_name(arm)).join(format!("seed-{seed}"));
        let folder = place(&arm.name);
        if let Some(done) = finished(&folder, &recipe)? {
            (plan.tell)(&format!("{}, seed {}: done before", arm.name, done.seed));
            return Ok(done);
        }
        let mut outcome = Outcome {
            arm: arm.name.clone(),
            seed: recipe.seed,
            stopped: None,
            values: BTreeMap::new(),
            recipe: recipe.to_toml(),
        };
        if let Some(after) = &arm.after {
            match newest(&place(after)) {
                Ok(checkpoint) => recipe.train.init = Some(checkpoint.display().to_string()),
                Err(_) => {
                    outcome.stopped = Some(format!("{after} left no checkpoint"));
                    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
                    write_outcome(&folder, &outcome)?;
                    return Ok(outcome);
                }
            }
        }
        (plan.tell)(&format!("{}, seed {}", arm.name, recipe.seed));
        let device = (plan.device)(&recipe.train)?;
        let mut run = Run::new(&recipe, &device, Some(&folder))?;
        let start = Instant::now();
        let mut watch = (plan.watch)(run.schedule().total);
        match run.train(&mut *watch) {
            Ok(()) => {}
            Err(Error::Diverged(sentence)) => {
                outcome.stopped = sentence.split(':').next().map(str::to_owned);
            }
            Err(error) => return Err(error),
        }
        outcome.values = last_epoch(&folder)?;
        outcome.values.insert("seconds".into(), start.elapsed().as_secs_f64());
        let mib = device.memory_use().peak as f64 / (1 << 20) as f64;
        outcome.values.insert("memory_mib".into(), mib);
        write_outcome(&folder, &outcome)?;
        Ok(outcome)
    }

    /// The arms' rows: name, a cell for each column, how it ended.
    fn rows(&self, outcomes: &[Outcome]) -> Vec<Vec<String>> {
        let row = |arm: &Arm| {
            let own: Vec<&Outcome> = outcomes.iter().filter(|o| o.arm == arm.name).collect();
            let cell = |column: &String| {
                let values: Vec<f64> =
                    own.iter().filter_map(|o| o.values.get(column).copied()).collect();
                mean_and_deviation(column, &values)
            };
            let mut cells = vec![arm.name.clone()];
            cells.extend(self.columns.iter().map(cell));
            let mut ends: Vec<&str> = own.iter().filter_map(|o| o.stopped.as_deref()).collect();
            ends.dedup();
            cells.push(ends.join("; "));
            (!own.is_empty()).then_some(cells)
        };
        self.arms.iter().filter_map(row).collect()
    }

    fn header(&self) -> Vec<String> {
        let mut header = vec!["arm".to_owned()];
        header.extend(self.columns.iter().map(|column| column.replace('_', " ")));
        header.push("stopped".into());
        header
    }

    /// The table as Markdown, columns aligned, under the question and its source.
    pub fn markdown(&self, outcomes: &[Outcome]) -> String {
        let mut lines = vec![self.header()];
        lines.extend(self.rows(outcomes));
        let width = |column: usize| {
            lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        lines.insert(1, widths.iter().map(|&width| "-".repeat(width)).collect());
        let mut text = format!("{} ({})\n\n", self.question, self.source);
        for line in lines {
            let cells = line.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
            let _ = writeln!(text, "|{}", cells.collect::<String>()); // a string takes all
        }
        text
    }

    fn csv(&self, outcomes: &[Outcome]) -> String {
        let mut text = format!("arm,seed,{},stopped\n", self.columns.join(","));
        for outcome in outcomes {
            let Outcome { arm, seed, stopped, values, .. } = outcome;
            let value =
                |column| values.get(column).map_or(String::new(), |value| format!("{value}"));
            let cells = self.columns.iter().map(value).collect::<Vec<_>>().join(",");
            let stopped = stopped.as_deref().unwrap_or_default();
            let _ = writeln!(text, "{:?},{seed},{cells},{stopped:?}", arm); // a string takes all
        }
        text
    }
}

/// A name without what file systems do not like.
fn folder_name(arm: &str) -> String {
    arm.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
}

/// Shares in percent, small numbers to three digits, over several seeds with their standard deviation.
fn mean_and_deviation(column: &str, values: &[f64]) -> String {
    let Some(n) = (!values.is_empty()).then_some(values.len() as f64) else { return "-".into() };
    let mean = values.iter().sum::<f64>() / n;
    let percent = matches!(column, "knn" | "accuracy");
    let show = |value: f64| match value.abs() {
        _ if percent => format!("{:.1}", 100.0 * value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    };
    if values.len() < 2 {
        return show(mean);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    format!("{} ± {}", show(mean), show(variance.sqrt()))
}

/// The result in a folder, if there is one; what an interrupted run left there goes.
fn finished(folder: &Path, recipe: &Recipe) -> Result<Option<Outcome>> {
    let path = folder.join(RESULT);
    let Ok(text) = std::fs::read_to_string(&path) else {
        if folder.join("recipe.toml").exists() {
            std::fs::remove_dir_all(folder).map_err(Error::io(folder))?;
        }
        return Ok(None);
    };
    let outcome: Outcome = serde_json::from_str(&text)
        .map_err(|e| Error::format(&path, format!("is no result of a study: {e}")))?;
    if outcome.recipe != recipe.to_toml() {
        return Err(Error::format(
            &path,
            "is the result of other settings: choose another --out, or remove it",
        ));
    }
    Ok(Some(outcome))
}

const RESULT: &str = "result.json";

fn write_outcome(folder: &Path, outcome: &Outcome) -> Result<()> {
    let text = serde_json::to_string_pretty(outcome).expect("an outcome is plain data");
    write_whole(&folder.join(RESULT), text.as_bytes())
}

/// The numbers of the last epoch of a run's metrics, monitors among them; none if it did not finish one.
fn last_epoch(folder: &Path) -> Result<BTreeMap<String, f64>> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut values = BTreeMap::new();
    let records = text.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    let record = records.into_iter().find(|record: &serde_json::Value| record["epoch"].is_u64());
    let Some(serde_json::Value::Object(mut record)) = record else { return Ok(values) };
    if let Some(serde_json::Value::Object(monitors)) = record.remove("monitors") {
        record.extend(monitors);
    }
    for (name, value) in record {
        values.extend(value.as_f64().map(|value| (name, value)));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
        question = "?"
        source = "here"
        base = "demo"
        columns = ["knn", "loss"]
        [[arm]]
        name = "a"
        [[arm]]
        name = "b, longer"
        set = ["method.temperature=0.5"]
        after = "a"
    "#;

    fn outcome(arm: &str, seed: u64, knn: f64, stopped: Option<&str>) -> Outcome {
        let values = BTreeMap::from([("knn".to_owned(), knn)]);
        let stopped = stopped.map(String::from);
        Outcome { arm: arm.into(), seed, stopped, values, recipe: String::new() }
    }

    #[test]
    fn tables_show_means_and_what_stopped_a_run() {
        let study: Study = toml::from_str(TWO).unwrap();
        study.check("two").unwrap();
        let outcomes = [
            outcome("a", 1, 0.5, None),
            outcome("a", 2, 0.6, None),
            outcome("b, longer", 1, 0.1, Some("the embeddings collapsed in epoch 2")),
        ];
        let table = study.markdown(&outcomes);
        assert!(table.contains("| a         | 55.0 ± 7.1 | -    |"), "{table}");
        assert!(table.contains("collapsed in epoch 2 |"), "{table}");
        let csv = study.csv(&outcomes);
        assert!(csv.contains("\n\"b, longer\",1,0.1,,\"the embeddings"), "{csv}");
    }

    #[test]
    fn arms_start_after_arms_before_them() {
        let study: Study = toml::from_str(&TWO.replace("after = \"a\"", "after = \"c\"")).unwrap();
        let error = study.check("two").unwrap_err().to_string();
        assert!(error.contains("which is no arm before it"), "{error}");
    }
}

//! Studies: a question, a recipe, and arms that differ from it in a few settings. A study is data, like a recipe.
//!
//! Each arm and seed is an ordinary run in its own folder. A run that collapses or diverges is an outcome, which the table names
//! and leaves out of the means; any other error stops the study. An interrupted study continues with the arms that have no result
//! yet.
//!
//! One process at a time works in a study's folder, and a study replaces or deletes only files that it or its runs wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::device::Device;
use crate::error::{Error, Result, printable};
use crate::files::{create_folder, find, is_file, is_folder, is_partial, read_text, write_file};
use crate::recipes::{self, Recipe, TrainSettings};
use crate::train::images::checksums;
use crate::train::{Images, Run, Watch, folder, newest};

/// A question and the runs that answer it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// The question, in a sentence.
    pub question: String,
    /// The source of the question.
    pub source: String,
    /// The recipe of arms without one of their own.
    pub base: String,
    /// Settings for every arm, as `key.path=value`.
    #[serde(default)]
    pub set: Vec<String>,
    /// The columns of the table: names of numbers in the metrics, or `seconds` or `memory_mib`.
    pub columns: Vec<String>,
    /// The arms, which are compared.
    #[serde(rename = "arm")]
    pub arms: Vec<Arm>,
}

/// One arm of a study: the settings that are compared with those of the other arms.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Its name in the table.
    pub name: String,
    /// Its recipe, if it differs from the study's.
    pub base: Option<String>,
    /// Settings applied after the study's.
    #[serde(default)]
    pub set: Vec<String>,
    /// The arm whose last checkpoint it starts from.
    pub after: Option<String>,
}

/// The first name in a folder, hidden files such as the lock apart; `None` if there is none, or no folder.
fn first_entry(folder: &Path) -> Result<Option<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(printable(&entry.map_err(Error::io(folder))?.file_name()));
    }
    Ok(names.into_iter().filter(|name| !name.starts_with('.')).min())
}

/// The outcome of one arm and seed, as stored in `result.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The name of the arm.
    pub arm: String,
    /// The seed.
    pub seed: u64,
    /// Why the run stopped or has no usable result; `None` if it completed with finite losses.
    pub stopped: Option<String>,
    /// The numbers of its last epoch, by name.
    pub values: BTreeMap<String, f64>,
    /// The recipe of the run.
    recipe: String,
    /// Checksums of its training images; `None` in files of earlier versions, and of an arm that did not run.
    #[serde(default)]
    images: Option<[u32; 2]>,
}

/// How to run a study.
pub struct StudyPlan<'a> {
    /// The folder of the results.
    pub out: &'a Path,
    /// Settings applied after those of each arm.
    pub settings: &'a [String],
    /// The number of runs per arm; seeds count up from the recipe's.
    pub seeds: u64,
    /// Opens the device of a run: a new one for each, so that its peak memory is the run's own.
    pub device: &'a dyn Fn(&TrainSettings) -> Result<Device>,
    /// Adjusts each recipe at the end.
    pub adjust: &'a dyn Fn(&mut Recipe),
    /// Returns the watch of a run with the given number of steps.
    pub watch: &'a dyn Fn(u64) -> Box<dyn Watch>,
    /// Receives a line for each arm and seed.
    pub tell: &'a dyn Fn(&str),
}

impl Study {
    /// Loads a built-in study by its [name](recipes::builtin_studies), or a study from a file.
    ///
    /// # Errors
    /// If the name is unknown (the message lists the valid names), or the file is not a valid study.
    pub fn load(name: &str) -> Result<Self> {
        let text = match recipes::builtin_study(name) {
            Some(text) => text.to_owned(),
            None if find(Path::new(name))?.is_some() => {
                read_text(Path::new(name), "a study (TOML)")?
            }
            None => {
                let known = recipes::builtin_studies().collect::<Vec<_>>().join(", ");
                return Err(Error::Config(format!(
                    "unknown study {name}; built-in studies: {known}"
                )));
            }
        };
        let mut study: Self = toml::from_str(&text)
            .map_err(|e| Error::Config(format!("study {name}: {}", e.message())))?;
        if let Some(folder) = Path::new(name).parent() {
            // As for a recipe's base: next to the file that names it first.
            let bases = study.arms.iter_mut().filter_map(|arm| arm.base.as_mut());
            for base in bases.chain([&mut study.base]) {
                let beside = folder.join(&*base);
                if is_file(&beside)? {
                    *base = beside.to_string_lossy().into_owned();
                }
            }
        }
        study.check(name)?;
        Ok(study)
    }

    fn check(&self, name: &str) -> Result<()> {
        for (i, arm) in self.arms.iter().enumerate() {
            let before = &self.arms[..i];
            if before.iter().any(|other| folder_name(&other.name) == folder_name(&arm.name)) {
                let name_of = &arm.name;
                return Err(Error::Config(format!(
                    "study {name}: two arms have the name {name_of}"
                )));
            }
            if let Some(after) = &arm.after
                && !before.iter().any(|other| other.name == *after)
            {
                return Err(Error::Config(format!(
                    "study {name}: {} starts after {after}, which is not an earlier arm",
                    arm.name
                )));
            }
        }
        Ok(())
    }

    /// Returns the recipe of an arm with `settings` applied last.
    ///
    /// # Errors
    /// If a setting does not fit the recipe.
    pub fn recipe(&self, arm: &Arm, settings: &[String]) -> Result<Recipe> {
        let all = [&self.set, &arm.set, settings].map(|part: &[String]| part).concat();
        Recipe::load(arm.base.as_ref().unwrap_or(&self.base), &all)
    }

    /// Runs every arm and seed without a result, and writes `table.md` and `table.csv` after each. Returns all outcomes.
    ///
    /// # Errors
    /// If a run fails for another reason than a collapse or a divergence; if the folder holds results of other settings or files
    /// that neither the study nor its runs wrote; if another process works in it.
    pub fn run(&self, plan: &StudyPlan<'_>) -> Result<Vec<Outcome>> {
        // A mistake in the last arm's settings would cost the time of those before it.
        self.arms.iter().try_for_each(|arm| self.recipe(arm, plan.settings).map(drop))?;
        let _lock = self.claim(plan.out)?;
        let mut outcomes = Vec::new();
        for arm in &self.arms {
            for seed in 0..plan.seeds {
                let outcome = self.cell(arm, seed, plan, &outcomes)?;
                outcomes.push(outcome);
                self.write_tables(plan.out, &outcomes)?;
            }
        }
        self.unmeasured(&outcomes).iter().for_each(|sentence| (plan.tell)(sentence));
        Ok(outcomes)
    }

    /// A sentence for each column that no run has a number for.
    fn unmeasured(&self, outcomes: &[Outcome]) -> Vec<String> {
        let completed: Vec<_> = outcomes.iter().filter(|o| o.stopped.is_none()).collect();
        let known: BTreeSet<&str> = completed
            .iter()
            .flat_map(|outcome| outcome.values.keys().map(String::as_str))
            .collect();
        let missing = |column: &&String| !completed.is_empty() && !known.contains(column.as_str());
        let all = known.iter().copied().collect::<Vec<_>>().join(", ");
        let sentence = |column: &String| {
            format!(
                "the column {column} is empty: no run of this study has such a number; they have {all}"
            )
        };
        self.columns.iter().filter(missing).map(sentence).collect()
    }

    fn write_tables(&self, out: &Path, outcomes: &[Outcome]) -> Result<()> {
        let marker = out.join(MARKER);
        if find(&marker)?.is_none() {
            self.mark(out)?; // somebody removed it: without it the tables would be something else's
        }
        write_file(&out.join(TABLES[0]), self.markdown(outcomes).as_bytes())?;
        write_file(&out.join(TABLES[1]), self.csv(outcomes).as_bytes())
    }

    fn mark(&self, out: &Path) -> Result<()> {
        write_file(&out.join(MARKER), format!("{}\n", self.question).as_bytes())
    }

    /// Locks the study's folder and marks it as the study's own.
    fn claim(&self, out: &Path) -> Result<File> {
        self.is_marked(out)?; // before a lock file is left in a folder of something else
        create_folder(out)?;
        let lock = folder::lock(out)?;
        if !self.is_marked(out)? {
            self.mark(out)?;
        }
        Ok(lock)
    }

    /// Whether a folder is marked as this study's; an error if it holds anything and is not.
    fn is_marked(&self, out: &Path) -> Result<bool> {
        let marker = out.join(MARKER);
        match std::fs::read_to_string(&marker) {
            Ok(question) if question.trim_end() == self.question.trim_end() => Ok(true),
            Ok(_) => Err(Error::format(out, "holds another study: choose another --out")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let Some(name) = first_entry(out)? else { return Ok(false) };
                let reason = format!(
                    "holds {name}, which this study did not write: choose another --out, or move it away"
                );
                Err(Error::format(out, reason))
            }
            Err(error) => Err(Error::io(&marker)(error)),
        }
    }

    /// Runs one arm with one seed, unless it has a result. `before` holds the outcomes so far.
    fn cell(
        &self,
        arm: &Arm,
        seed: u64,
        plan: &StudyPlan<'_>,
        before: &[Outcome],
    ) -> Result<Outcome> {
        let mut recipe = self.recipe(arm, plan.settings)?;
        recipe.seed = recipe.seed.checked_add(seed).ok_or_else(|| {
            Error::Config(format!("seed {} is too large for {} seeds", recipe.seed, plan.seeds))
        })?;
        (plan.adjust)(&mut recipe);
        let place = |arm: &str| plan.out.join(folder_name(arm)).join(format!("seed-{seed}"));
        let folder = place(&arm.name);
        if let Some(outcome) = finished(&folder, &recipe)? {
            outcome.check_images(&recipe, &folder)?;
            (plan.tell)(&format!("{}, seed {}: done before", arm.name, outcome.seed));
            return Ok(outcome);
        }
        let mut outcome = Outcome {
            arm: arm.name.clone(),
            seed: recipe.seed,
            stopped: None,
            values: BTreeMap::new(),
            recipe: recipe.to_toml(),
            images: None,
        };
        if let Some(after) = &arm.after {
            // Outcomes are in the order of arms and seeds.
            let first = before.iter().filter(|o| o.arm == *after).nth(seed as usize);
            let stopped = first.is_some_and(|outcome| outcome.stopped.is_some());
            if stopped {
                outcome.stopped = Some(format!("{after} stopped"));
                create_folder(&folder)?;
                write_outcome(&folder, &outcome)?;
                return Ok(outcome);
            }
            recipe.train.init = Some(newest(&place(after))?.display().to_string());
        }
        (plan.tell)(&format!("{}, seed {}", arm.name, recipe.seed));
        let device = (plan.device)(&recipe.train)?;
        let mut run = Run::new(&recipe, &device, Some(&folder))?;
        outcome.images = run.progress.checksums;
        let start = Instant::now();
        let mut watch = (plan.watch)(run.schedule().total);
        match run.train(&mut *watch) {
            Ok(()) => {}
            Err(Error::Diverged(sentence) | Error::Collapsed(sentence)) => {
                // The rest of the sentence is advice.
                outcome.stopped = sentence.split(':').next().map(str::to_owned);
            }
            Err(error) => return Err(error),
        }
        // A run that stopped before its first step leaves no folder; that of a whole run is not made again if somebody removed it
        // with the weights, which a later arm may start from.
        if outcome.stopped.is_none() || is_folder(&folder)? {
            outcome.read_metrics(&folder.join("metrics.jsonl"))?;
        } else {
            create_folder(&folder)?;
        }
        outcome.values.insert("seconds".into(), start.elapsed().as_secs_f64());
        let mib = device.memory_use().peak as f64 / (1 << 20) as f64;
        outcome.values.insert("memory_mib".into(), mib);
        write_outcome(&folder, &outcome)?;
        Ok(outcome)
    }

    /// The rows of the arms: the name, a cell for each column, and what became of seeds without a usable result.
    ///
    /// A cell is over the seeds that completed: the numbers of a run that stopped are not comparable with them.
    fn rows(&self, outcomes: &[Outcome]) -> Vec<Vec<String>> {
        let row = |arm: &Arm| {
            let own: Vec<&Outcome> = outcomes.iter().filter(|o| o.arm == arm.name).collect();
            let completed: Vec<&&Outcome> = own.iter().filter(|o| o.stopped.is_none()).collect();
            let cell = |column: &String| {
                let values: Vec<f64> =
                    completed.iter().filter_map(|o| o.values.get(column).copied()).collect();
                let cell = mean_and_deviation(column, &values);
                match values.len() {
                    0 => cell,
                    n if n == completed.len() => cell,
                    n => format!("{cell} ({n} of {})", completed.len()),
                }
            };
            let mut cells = vec![arm.name.clone()];
            cells.extend(self.columns.iter().map(cell));
            cells.push(stops(&own));
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

    /// Returns the table in Markdown with aligned columns, under the question and its source.
    pub fn markdown(&self, outcomes: &[Outcome]) -> String {
        // A bar would end the cell.
        let cell = |cell: String| cell.replace('|', "\\|");
        let lines = std::iter::once(self.header()).chain(self.rows(outcomes));
        let mut lines: Vec<Vec<String>> =
            lines.map(|line| line.into_iter().map(cell).collect()).collect();
        let width = |column: usize| {
            lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        lines.insert(1, widths.iter().map(|&width| "-".repeat(width)).collect());
        let mut text = format!("{} ({})\n\n", self.question, self.source);
        for line in lines {
            let cells = line.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
            let _ = writeln!(text, "|{}", cells.collect::<String>()); // a String does not fail
        }
        text
    }

    fn csv(&self, outcomes: &[Outcome]) -> String {
        // RFC 4180: quotes are doubled.
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let mut text = format!("arm,seed,{},stopped\n", self.columns.join(","));
        for outcome in outcomes {
            let Outcome { arm, seed, stopped, values, .. } = outcome;
            let value =
                |column| values.get(column).map_or(String::new(), |value| format!("{value}"));
            let cells = self.columns.iter().map(value).collect::<Vec<_>>().join(",");
            let stopped = stopped.as_deref().unwrap_or_default();
            let (arm, stopped) = (quoted(arm), quoted(stopped));
            let _ = writeln!(text, "{arm},{seed},{cells},{stopped}"); // a String does not fail
        }
        text
    }
}

/// Says how many of an arm's runs stopped, and why; empty if none did.
fn stops(own: &[&Outcome]) -> String {
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in own.iter().filter_map(|outcome| outcome.stopped.as_deref()) {
        *reasons.entry(reason).or_default() += 1;
    }
    let all = own.len();
    let part = |(reason, count): (&str, usize)| match all {
        1 => reason.to_owned(),
        _ => format!("{count} of {all} seeds: {reason}"),
    };
    reasons.into_iter().map(part).collect::<Vec<_>>().join("; ")
}

/// Replaces characters that file systems may not accept.
fn folder_name(arm: &str) -> String {
    arm.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect()
}

/// Formats the mean: shares in percent, small numbers to three decimals; for several values with their standard deviation.
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

/// Returns the result in a folder, or `None` after removing what an interrupted run of the study left there.
fn finished(folder: &Path, recipe: &Recipe) -> Result<Option<Outcome>> {
    let path = folder.join(RESULT);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            remove_interrupted(folder, recipe)?;
            return Ok(None);
        }
        Err(error) => {
            let reason = format!("cannot be read ({error}): remove it to run this arm again");
            return Err(Error::format(&path, reason));
        }
    };
    let outcome: Outcome = serde_json::from_str(&text).map_err(|e| {
        let reason = format!("is not a study's result ({e}): remove it to run this arm again");
        Error::format(&path, reason)
    })?;
    if outcome.recipe != recipe.to_toml() {
        return Err(Error::format(
            &path,
            "is the result of other settings: choose another --out, or remove it",
        ));
    }
    Ok(Some(outcome))
}

/// Whether a file of this name in a run's folder was written by the run.
fn is_a_runs(name: &str) -> bool {
    const NAMES: [&str; 7] = [
        ".lock",
        "recipe.toml",
        "metrics.jsonl",
        "report.html",
        "gallery.json",
        "parity",
        "skipped.txt",
    ];
    NAMES.contains(&name)
        || name.starts_with("events.out.tfevents.")
        || name.ends_with(".safetensors")
            && (name.starts_with("step-") || name == "best.safetensors")
}

/// Removes a run that was interrupted, so that its arm starts again. Other files in its folder are the user's: they stay, and the
/// study refuses to go on.
fn remove_interrupted(folder: &Path, recipe: &Recipe) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io(folder))?.file_name();
        // What a killed process left half-written goes with the lock.
        if !is_partial(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    let refuse = |what: String| {
        let reason = format!("holds {what}: move it away, or choose another --out");
        Err(Error::format(folder, reason))
    };
    names.sort();
    if let Some(name) = names.iter().find(|name| !name.to_str().is_some_and(is_a_runs)) {
        return refuse(format!("{}, which no run of this study wrote", name.display()));
    }
    let file = folder.join("recipe.toml");
    if let Ok(text) = std::fs::read_to_string(&file) {
        let mut own = Recipe::parse(&text, &file.to_string_lossy(), &[])?;
        own.train.init = recipe.train.init.clone(); // an arm that starts after another gets it when it runs
        if own.to_toml() != recipe.to_toml() {
            return refuse("an unfinished run of other settings".into());
        }
    }
    let lock = folder::lock(folder)?; // refuses if another process trains there
    // The recipe goes last: if the removal is interrupted, what is left is still recognised.
    names.sort_by_key(|name| name == "recipe.toml");
    for name in names {
        let path = folder.join(name);
        let removed = match path.is_dir() && !path.is_symlink() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
        removed.map_err(Error::io(&path))?;
    }
    drop(lock);
    Ok(())
}

/// The result of one arm and seed, next to its run.
const RESULT: &str = "result.json";
/// The study's tables, and the file that marks a folder as a study's: it holds the question.
const TABLES: [&str; 2] = ["table.md", "table.csv"];
const MARKER: &str = "study.txt";

fn write_outcome(folder: &Path, outcome: &Outcome) -> Result<()> {
    let text = serde_json::to_string_pretty(outcome).expect("an outcome is plain data");
    write_file(&folder.join(RESULT), text.as_bytes())
}

impl Outcome {
    /// Reads the numbers of the last epoch, monitors included, from a run's metrics. A last loss that is NaN or infinite makes the
    /// run one without a usable result.
    /// Fails if the images are no longer those that the run was trained on. A set that is gone changes no result.
    fn check_images(&self, recipe: &Recipe, folder: &Path) -> Result<()> {
        let (Some(then), Ok(images)) = (self.images, Images::open(&recipe.data)) else {
            return Ok(());
        };
        let device = Device::cpu(recipe.train.threads)?;
        match checksums(&*images.train, recipe.seed, &device)? == then {
            true => Ok(()),
            false => Err(Error::format(
                &folder.join(RESULT),
                "is the result of other training images: restore them, choose another --out, or remove it",
            )),
        }
    }

    fn read_metrics(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let records = text.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
        let record = records.into_iter().find(|record: &Value| record["epoch"].is_u64());
        let Some(Value::Object(mut record)) = record else { return Ok(()) };
        // JSON has no NaN: it is null.
        if record.get("loss").is_some_and(Value::is_null) && self.stopped.is_none() {
            self.stopped = Some("the loss is NaN or infinite".into());
        }
        if let Some(Value::Object(monitors)) = record.remove("monitors") {
            record.extend(monitors);
        }
        for (name, value) in record {
            self.values.extend(value.as_f64().map(|value| (name, value)));
        }
        Ok(())
    }
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
        Outcome { arm: arm.into(), seed, stopped, values, recipe: String::new(), images: None }
    }

    #[test]
    fn means_are_over_the_seeds_that_completed_and_the_others_are_counted() {
        let study: Study = toml::from_str(TWO).unwrap();
        study.check("two").unwrap();
        let nan = Some("the loss is NaN or infinite");
        let outcomes = [
            outcome("a", 1, 0.5, None),
            outcome("a", 2, 0.1, nan),
            outcome("a", 3, 0.6, None),
            outcome("a", 4, 0.1, nan),
            outcome("b, longer", 1, 0.1, Some("the embeddings collapsed in epoch 2")),
        ];
        let table = study.markdown(&outcomes);
        let row = "| a         | 55.0 ± 7.1 | -    | 2 of 4 seeds: the loss is NaN or infinite |";
        assert!(table.contains(row), "{table}");
        assert!(table.contains("| b, longer | -          | -    | the embeddings coll"), "{table}");
        // The numbers of each run are in the other table.
        let csv = study.csv(&outcomes);
        assert!(csv.contains("\n\"b, longer\",1,0.1,,\"the embeddings"), "{csv}");
    }

    #[test]
    fn names_cannot_shift_the_columns_of_a_table() {
        let name = "5\", a|b";
        let text = TWO.replace("name = \"a\"", "name = '5\", a|b'").replace("after = \"a\"", "");
        let study: Study = toml::from_str(&text).unwrap();
        study.check("two").unwrap();
        let outcomes = [outcome(name, 1, 0.5, None)];
        let table = study.markdown(&outcomes);
        assert!(table.contains("| 5\", a\\|b | 50.0 | -    |         |"), "{table}");
        let csv = study.csv(&outcomes);
        assert!(csv.contains("\n\"5\"\", a|b\",1,0.5,,\"\"\n"), "{csv}");
        let row = csv::ReaderBuilder::new().from_reader(csv.as_bytes()).records().next();
        assert_eq!(&row.unwrap().unwrap()[0], name);
    }

    #[test]
    fn a_column_that_no_run_measured_is_named() {
        let study: Study = toml::from_str(TWO).unwrap();
        let said = study.unmeasured(&[outcome("a", 1, 0.5, None)]);
        assert_eq!(
            said,
            ["the column loss is empty: no run of this study has such a number; they have knn"]
        );
        assert!(study.unmeasured(&[outcome("a", 1, 0.5, Some("collapsed"))]).is_empty());
    }

    #[test]
    fn a_mean_over_some_of_the_seeds_says_so() {
        let study: Study = toml::from_str(TWO).unwrap();
        let mut outcomes = [1, 2, 3].map(|seed| outcome("a", seed, 0.5, None));
        outcomes[1].values.clear();
        let table = study.markdown(&outcomes);
        assert!(table.contains("| 50.0 ± 0.0 (2 of 3) |"), "{table}");
    }

    #[test]
    fn a_last_loss_of_nan_is_not_a_result() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metrics.jsonl");
        for (loss, stopped) in [("null", Some("the loss is NaN or infinite")), ("2.5", None)] {
            let first = "{\"epoch\":1,\"step\":3,\"loss\":null}\n";
            let last = "\"knn\":0.25,\"monitors\":{\"queue_age\":3.0}}\n{\"step\":7,\"lo";
            let text = format!("{first}{{\"epoch\":2,\"step\":6,\"loss\":{loss},{last}");
            std::fs::write(&file, text).unwrap();
            let mut outcome = outcome("a", 1, 0.0, None);
            outcome.read_metrics(&file).unwrap();
            assert_eq!(outcome.stopped.as_deref(), stopped);
            assert_eq!((outcome.values["knn"], outcome.values["queue_age"]), (0.25, 3.0));
        }
    }

    #[test]
    fn only_files_of_a_run_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let recipe = Recipe::load("demo", &[]).unwrap();
        let folder = root.path().join("seed-0");
        std::fs::create_dir(&folder).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        for name in ["metrics.jsonl", ".lock", "step-00000001.safetensors", "best.safetensors"] {
            write(name, "");
        }
        write("recipe.toml", &recipe.to_toml());
        write("notes.txt", "mine");
        let error = |recipe: &Recipe| finished(&folder, recipe).unwrap_err().to_string();
        assert!(error(&recipe).contains("holds notes.txt, which no run"), "{}", error(&recipe));
        std::fs::remove_file(folder.join("notes.txt")).unwrap();
        let other = Recipe::load("demo", &["seed=9".into()]).unwrap();
        assert!(error(&other).contains("unfinished run of other settings"), "{}", error(&other));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 5);
        {
            let _lock = folder::lock(&folder).unwrap();
            assert!(error(&recipe).contains("is in use"), "{}", error(&recipe));
        }
        assert!(finished(&folder, &recipe).unwrap().is_none());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        assert!(finished(&folder.join("missing"), &recipe).unwrap().is_none());
    }

    #[test]
    fn an_arm_starts_after_an_earlier_arm() {
        let study: Study = toml::from_str(&TWO.replace("after = \"a\"", "after = \"c\"")).unwrap();
        let error = study.check("two").unwrap_err().to_string();
        assert!(error.contains("which is not an earlier arm"), "{error}");
    }
}

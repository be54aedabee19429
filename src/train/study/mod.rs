//! Studies: a question, a recipe, and arms that differ from it in a few settings. A study is data, like a recipe.
//!
//! Each arm and seed is an ordinary run in its own folder. A run that collapses or diverges is an outcome, which the table names
//! and leaves out of the means; any other error stops the study. An interrupted study continues with the arms that have no result
//! yet.
//!
//! One process at a time works in a study's folder, and a study replaces or deletes only files that it or its runs wrote.

mod outcome;
mod table;

pub use outcome::Outcome;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Instant;

use serde::Deserialize;

use crate::device::Device;
use crate::error::{Error, Result, printable};
use crate::files::{Lock, create_folder, find, is_file, is_folder, read_text, write_file};
use crate::recipes::{self, Recipe, TrainSettings};
use crate::train::{Run, Watch, folder, newest};
use outcome::{finished, write_outcome};

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
    fn claim(&self, out: &Path) -> Result<Lock> {
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
            held_out: None,
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
        (outcome.images, outcome.held_out) = (run.progress.checksums, run.progress.held_out);
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
}

/// Replaces characters that file systems may not accept.
fn folder_name(arm: &str) -> String {
    arm.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect()
}

/// The study's tables, and the file that marks a folder as a study's: it holds the question.
const TABLES: [&str; 2] = ["table.md", "table.csv"];
const MARKER: &str = "study.txt";

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const TWO: &str = r#"
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

    #[test]
    fn an_arm_starts_after_an_earlier_arm() {
        let study: Study = toml::from_str(&TWO.replace("after = \"a\"", "after = \"c\"")).unwrap();
        let error = study.check("two").unwrap_err().to_string();
        assert!(error.contains("which is not an earlier arm"), "{error}");
    }
}

//! The outcome of one arm with one seed: its file, and what an interrupted run leaves in its place.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{is_partial, write_file};
use crate::recipes::Recipe;
use crate::train::images::checksums;
use crate::train::{Images, folder};

/// The result of one arm and seed, next to its run.
const RESULT: &str = "result.json";

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
    pub(super) recipe: String,
    /// Checksums of its training images; `None` in files of earlier versions, and of an arm that did not run.
    #[serde(default)]
    pub(super) images: Option<[u32; 2]>,
    /// The same of the held-out images, if there are any.
    #[serde(default)]
    pub(super) held_out: Option<[u32; 2]>,
}

impl Outcome {
    /// Fails if the images are no longer those that the run was trained on and measured with. A set that is gone changes no result.
    pub(super) fn check_images(&self, recipe: &Recipe, folder: &Path) -> Result<()> {
        let Ok(images) = Images::open(&recipe.data) else { return Ok(()) };
        let device = Device::cpu(recipe.train.threads)?;
        let parts = [
            ("training", self.images, Some(&images.train)),
            ("held-out", self.held_out, images.test.as_ref()),
        ];
        for (part, then, set) in parts {
            let Some(then) = then else { continue };
            let now = set.map(|set| checksums(&**set, recipe.seed, &device)).transpose()?;
            if now != Some(then) {
                return Err(Error::format(
                    folder.join(RESULT),
                    format!(
                        "is the result of other {part} images: restore them, choose another --out, or remove it"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Reads the numbers of the last epoch, monitors included, from a run's metrics. A last loss that is NaN or infinite makes the
    /// run one without a usable result.
    pub(super) fn read_metrics(&mut self, path: &Path) -> Result<()> {
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

/// Writes an outcome next to its run.
pub(super) fn write_outcome(folder: &Path, outcome: &Outcome) -> Result<()> {
    let text = serde_json::to_string_pretty(outcome).expect("an outcome is plain data");
    write_file(&folder.join(RESULT), text.as_bytes())
}

/// Returns the result in a folder, or `None` after removing what an interrupted run of the study left there.
pub(super) fn finished(folder: &Path, recipe: &Recipe) -> Result<Option<Outcome>> {
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn outcome(arm: &str, seed: u64, knn: f64, stopped: Option<&str>) -> Outcome {
        let values = BTreeMap::from([("knn".to_owned(), knn)]);
        let stopped = stopped.map(String::from);
        let (images, held_out) = (None, None);
        let recipe = String::new();
        Outcome { arm: arm.into(), seed, stopped, values, recipe, images, held_out }
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
}

//! `report.html`: what a run's folder has to tell, or several runs over each other, as one page without a network.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::Path;

use serde_json::{Value, json};

use super::folder::RECIPE;
use super::gallery;
use crate::error::{Error, Result};
use crate::weights::write_whole;

/// Its name in a run's folder.
pub const REPORT: &str = "report.html";

/// The page, to which [`DATA`] is what is to be shown.
const PAGE: &str = include_str!("report.html");
const DATA: &str = "@DATA@";

/// Points of a curve over steps; more are averaged.
const POINTS: usize = 1000;

/// Runs whose pictures are on a page, the first ones: each takes up to a megabyte.
const PICTURED: usize = 4;

/// Writes a [`report`] to a file, whole or not at all.
///
/// # Errors
/// As [`report`], and when the file cannot be written.
pub fn write_report(folders: &[impl AsRef<Path>], file: &Path) -> Result<()> {
    write_whole(file, report(folders)?.as_bytes())
}

/// The page on one run, or on several compared: curves, final figures and settings, from the recipe and `metrics.jsonl` in each
/// folder, and the pictures that lie there. A run under way may be read.
///
/// # Errors
/// When a folder holds no run, or a line of its metrics, other than an unfinished last one, is no JSON.
pub fn report(folders: &[impl AsRef<Path>]) -> Result<String> {
    let of = |(i, folder): (usize, &_)| run(AsRef::as_ref(folder), i < PICTURED);
    let runs: Vec<Value> = folders.iter().enumerate().map(of).collect::<Result<_>>()?;
    // Names of classes and files come from outside: none of them may end the script.
    let data = json!({ "runs": runs }).to_string().replace('<', "\\u003c");
    Ok(PAGE.replacen(DATA, &data, 1))
}

fn run(folder: &Path, pictured: bool) -> Result<Value> {
    let file = folder.join(RECIPE);
    let recipe = std::fs::read_to_string(&file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            Error::Config(format!("{}: holds no run (there is no {RECIPE})", folder.display()))
        }
        _ => Error::io(&file)(error),
    })?;
    let recipe: toml::Value =
        toml::from_str(&recipe).map_err(|error| Error::format(&file, error.message()))?;
    let mut settings = Vec::new();
    flatten("", &recipe, &mut settings);
    let (steps, epochs, stopped) = metrics(&folder.join("metrics.jsonl"))?;
    Ok(json!({
        "name": folder.display().to_string(),
        "settings": settings,
        "steps": averaged(&steps),
        "epochs": epochs,
        "stopped": stopped,
        "gallery": if pictured { gallery::read(folder)? } else { Value::Null },
    }))
}

/// Keys with dots and their values.
fn flatten(key: &str, value: &toml::Value, into: &mut Vec<(String, String)>) {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        toml::Value::Table(table) => {
            table.iter().for_each(|(name, value)| flatten(&inner(name), value, into));
        }
        toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
            for (i, value) in list.iter().enumerate() {
                flatten(&inner(&i.to_string()), value, into);
            }
        }
        toml::Value::String(text) => into.push((key.to_owned(), text.clone())),
        other => into.push((key.to_owned(), other.to_string())),
    }
}

/// Step, loss and learning rate of each step, the records of epochs as they are, and why the run stopped, if it did.
fn metrics(file: &Path) -> Result<(Vec<[f64; 3]>, Vec<Value>, Value)> {
    let (mut steps, mut epochs, mut stopped) = (Vec::new(), Vec::new(), Value::Null);
    let mut lines = BufReader::new(File::open(file).map_err(Error::io(file))?).lines().peekable();
    let mut at = 0;
    while let Some(line) = lines.next() {
        let line = line.map_err(Error::io(file))?;
        at += 1;
        let record: Value = match serde_json::from_str(&line) {
            Ok(record) => record,
            Err(_) if lines.peek().is_none() => break, // it is being written, or its writer was killed
            Err(error) => return Err(Error::format(file, format!("line {at}: {error}"))),
        };
        if record.get("epoch").is_some() {
            epochs.push(record);
        } else if let Some(sentence) = record.get("stopped") {
            stopped = sentence.clone();
        } else {
            // A loss that is not a number is null.
            steps.push(["step", "loss", "lr"].map(|key| record[key].as_f64().unwrap_or(f64::NAN)));
        }
    }
    Ok((steps, epochs, stopped))
}

/// Means of neighbours, [`POINTS`] at most.
fn averaged(steps: &[[f64; 3]]) -> Vec<[f64; 3]> {
    let together = steps.len().div_ceil(POINTS).max(1);
    let mean = |part: &[[f64; 3]]| {
        [0, 1, 2].map(|i| {
            // One loss that is not a number must not hide its neighbours.
            let numbers = part.iter().map(|row| row[i]).filter(|v| !v.is_nan());
            numbers.clone().sum::<f64>() / numbers.count() as f64
        })
    };
    steps.chunks(together).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn folder(at: &Path, name: &str, lr: f64, metrics: &str) -> PathBuf {
        let folder = at.join(name);
        std::fs::create_dir(&folder).unwrap();
        let recipe = format!(
            "seed = 1\n[method]\nname = \"</script><b>\"\n[optim]\nlr = {lr}\n[[augment]]\nsize = 32\n"
        );
        std::fs::write(folder.join(RECIPE), recipe).unwrap();
        std::fs::write(folder.join("metrics.jsonl"), metrics).unwrap();
        folder
    }

    /// The data of a page, as a browser's script reads it.
    fn data(page: &str) -> Value {
        let start = page.find("id=\"data\">").unwrap() + "id=\"data\">".len();
        let end = start + page[start..].find("</script>").unwrap();
        serde_json::from_str(&page[start..end]).unwrap()
    }

    #[test]
    fn a_page_holds_settings_means_of_steps_and_epochs_and_loads_nothing() {
        let root = tempfile::tempdir().unwrap();
        let mut lines: String = (1..=2500)
            .map(|step| format!("{{\"step\":{step},\"loss\":{},\"lr\":0.125}}\n", 2 * step))
            .collect();
        lines = lines.replace("\"loss\":10,", "\"loss\":null,");
        lines += "{\"epoch\":1,\"step\":2500,\"loss\":1.5,\"knn\":null,\"monitors\":{\"queue_age\":3.0}}\n{\"stopped\":\"Ctrl-C\"}\n{\"step\":2501,\"lo";
        let one = folder(root.path(), "one", 0.1, &lines);
        write_report(&[&one], &one.join(REPORT)).unwrap();
        let page = std::fs::read_to_string(one.join(REPORT)).unwrap();
        let run = &data(&page)["runs"][0];
        let steps = run["steps"].as_array().unwrap();
        assert_eq!((steps.len(), &steps[0]), (834, &json!([2.0, 4.0, 0.125])));
        assert_eq!(steps[1], json!([5.0, 10.0, 0.125])); // of 8, none and 12
        assert_eq!(run["epochs"][0]["monitors"]["queue_age"], 3.0);
        assert_eq!((&run["stopped"], &run["gallery"]), (&json!("Ctrl-C"), &Value::Null));
        let settings = run["settings"].as_array().unwrap();
        for pair in [["method.name", "</script><b>"], ["optim.lr", "0.1"], ["augment.0.size", "32"]]
        {
            assert!(settings.contains(&json!(pair)), "{settings:?}");
        }
        for load in ["src=", "href=", "@import", "url(h", "fetch("] {
            assert!(!page.contains(load), "{load}");
        }
        assert!(page.len() < 200_000);
        let two = folder(root.path(), "two", 0.2, "");
        assert_eq!(data(&report(&[&one, &two]).unwrap())["runs"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_run_is_told() {
        let root = tempfile::tempdir().unwrap();
        let told = report(&[root.path()]).unwrap_err().to_string();
        assert!(told.ends_with("holds no run (there is no recipe.toml)"), "{told}");
        let torn =
            folder(root.path(), "torn", 0.1, "{\"step\":1\n{\"step\":2,\"loss\":1,\"lr\":1}\n");
        let told = report(&[torn]).unwrap_err().to_string();
        assert!(told.contains("metrics.jsonl") && told.contains("line 1: "), "{told}");
    }
}

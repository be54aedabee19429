//! The report of a run, or of several runs compared: one HTML page that loads nothing and names no folder of the machine.

mod gallery;
mod names;

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::checkpoint;
use super::diagnosis::{Finding, History, diagnose};
use super::folder::RECIPE;
use super::resume::{Origin, origin};
use crate::error::{Error, Result};
use crate::files::write_file;
use crate::weights::WeightFile;

pub(super) use gallery::{Found, NEIGHBOURS, write as write_gallery};

/// The name of the report in a run's folder.
pub const REPORT: &str = "report.html";

/// The page; [`DATA`] in it is replaced by what it shows.
const PAGE: &str = include_str!("page.html");
const DATA: &str = "@DATA@";

/// The most points of a curve over steps; more steps are averaged.
const POINTS: usize = 1000;

/// The number of runs whose pictures are on a page, the first ones: the pictures of a run take up to a megabyte.
const PICTURED: usize = 4;

/// Writes a [`report`] to a file, completely or not at all.
///
/// # Errors
/// As [`report`], and if the file cannot be written.
pub fn write_report(folders: &[impl AsRef<Path>], file: &Path) -> Result<()> {
    write_file(file, report(folders)?.as_bytes())
}

/// Returns the page on one run, or on several compared: curves, final figures and settings from the recipe and `metrics.jsonl` in
/// each folder, and the run's pictures. The runs may still be training.
///
/// The page is safe to pass on: its content security policy forbids every request, all text from the runs is data to its script,
/// and absolute paths are reduced to what tells them apart.
///
/// # Errors
/// If a folder holds no run, if a line of its metrics other than an unfinished last one is not JSON, or if its pictures are not
/// what a run writes.
pub fn report(folders: &[impl AsRef<Path>]) -> Result<String> {
    let read = |(i, folder): (usize, &_)| RunData::read(AsRef::as_ref(folder), i < PICTURED);
    let mut runs: Vec<RunData> = folders.iter().enumerate().map(read).collect::<Result<_>>()?;
    shorten_settings(&mut runs);
    let paths: Vec<PathBuf> = folders.iter().map(|folder| full(folder.as_ref())).collect();
    let names = names::short(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    let runs: Vec<Value> = runs.into_iter().zip(names).map(|(run, name)| run.value(name)).collect();
    // Class and file names are input: none of them may end the script element.
    let data = json!({ "runs": runs }).to_string();
    let data =
        data.replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
    Ok(PAGE.replacen(DATA, &data, 1))
}

/// How the run in a folder goes or went, by its log so far: see [`diagnose`].
///
/// # Errors
/// As [`report`].
pub fn diagnosis(folder: &Path) -> Result<Vec<Finding>> {
    Ok(RunData::read(folder, false)?.diagnosis())
}

/// A folder's path from the root, so that `.` has a name, too.
fn full(folder: &Path) -> PathBuf {
    folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf())
}

/// Opens a regular file. A named pipe or a device in its place would block for ever.
fn open(file: &Path) -> std::io::Result<File> {
    match std::fs::metadata(file)?.is_file() {
        true => File::open(file),
        false => Err(std::io::Error::new(ErrorKind::InvalidInput, "is not a regular file")),
    }
}

/// What the page shows of a run.
struct RunData {
    settings: Vec<(String, String)>,
    metrics: Metrics,
    gallery: Value,
}

impl RunData {
    fn read(folder: &Path, pictured: bool) -> Result<Self> {
        let file = folder.join(RECIPE);
        let recipe = open(&file).and_then(std::io::read_to_string).map_err(|error| match error
            .kind()
        {
            ErrorKind::NotFound => {
                Error::Config(format!("{}: holds no run ({RECIPE} is missing)", folder.display()))
            }
            _ => Error::io(&file)(error),
        })?;
        let recipe: toml::Value =
            toml::from_str(&recipe).map_err(|error| Error::format(&file, error.message()))?;
        let mut settings = Vec::new();
        flatten("", &recipe, &mut settings);
        settings.extend(recorded(folder));
        Ok(Self {
            settings,
            metrics: Metrics::read(&folder.join("metrics.jsonl"))?,
            gallery: if pictured { gallery::read(folder)? } else { Value::Null },
        })
    }

    fn diagnosis(&self) -> Vec<Finding> {
        let Metrics { steps, epochs, stopped, .. } = &self.metrics;
        diagnose(&History { steps, epochs, stopped: stopped.as_deref() })
    }

    fn value(self, name: String) -> Value {
        let diagnosis = self.diagnosis();
        let Metrics { steps, epochs, stopped, not_finite } = self.metrics;
        let count = steps.len();
        json!({
            "name": name,
            "settings": self.settings,
            "steps": averaged(&steps),
            "notFinite": not_finite.map(|(first, losses)| json!({
                "first": first, "losses": losses, "steps": count,
            })),
            "epochs": epochs,
            "diagnosis": diagnosis,
            "stopped": stopped.map(|sentence| names::without_folders(&sentence)),
            "gallery": self.gallery,
        })
    }
}

/// What a run's newest checkpoint tells that its recipe does not: the precision of the device, and which images its path led to.
/// Nothing without a checkpoint that can be read: a page is made of what is there.
fn recorded(folder: &Path) -> Vec<(String, String)> {
    let newest = checkpoint::last(folder).ok().flatten();
    let file = newest.and_then(|newest| WeightFile::open(&newest).ok());
    let Origin { precision, training, held_out } =
        file.and_then(|file| origin(&file).ok()).unwrap_or_default();
    let images =
        |[names, pixels]: [u32; 2]| format!("names and labels {names:08x}, pixels {pixels:08x}");
    let rows = [
        ("computed in", precision.map(|precision| precision.to_string())),
        ("training images", training.map(images)),
        ("held-out images", held_out.map(images)),
    ];
    rows.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

/// Flattens a recipe into dotted keys and their values.
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

/// Reduces settings that are absolute paths to what tells them apart between the runs.
fn shorten_settings(runs: &mut [RunData]) {
    let is_path = |value: &str| Path::new(value).is_absolute() || value.starts_with("~/");
    let keys: Vec<String> = {
        let all = runs.iter().flat_map(|run| &run.settings);
        all.filter(|(_, value)| is_path(value)).map(|(key, _)| key.clone()).collect()
    };
    for key in keys {
        let mut values: Vec<&mut String> = runs
            .iter_mut()
            .flat_map(|run| &mut run.settings)
            .filter(|(other, value)| *other == key && is_path(value))
            .map(|(_, value)| value)
            .collect();
        let short =
            names::short(&values.iter().map(|value| Path::new(&**value)).collect::<Vec<_>>());
        values.iter_mut().zip(short).for_each(|(value, short)| **value = short);
    }
}

/// A run's `metrics.jsonl`.
#[derive(Default)]
struct Metrics {
    /// Step, loss and learning rate of each step; NaN where a value is missing.
    steps: Vec<[f64; 3]>,
    /// The records of the epochs, unchanged.
    epochs: Vec<Value>,
    /// Why the run stopped, if it did.
    stopped: Option<String>,
    /// The first step whose loss is NaN or infinite, and the number of such steps.
    not_finite: Option<(f64, u64)>,
}

impl Metrics {
    fn read(file: &Path) -> Result<Self> {
        let mut all = Self::default();
        let lines = BufReader::new(open(file).map_err(Error::io(file))?).lines();
        let mut lines = lines.enumerate().peekable();
        while let Some((i, line)) = lines.next() {
            let line = line.map_err(Error::io(file))?;
            match serde_json::from_str(&line) {
                Ok(record) => all.add(record),
                Err(_) if lines.peek().is_none() => break, // being written, or its writer was killed
                Err(error) => {
                    let reason = format!(
                        "line {}: {error}: remove this line, or resume the run, which does",
                        i + 1
                    );
                    return Err(Error::format(file, reason));
                }
            }
        }
        Ok(all)
    }

    fn add(&mut self, record: Value) {
        if record.get("epoch").is_some() {
            self.epochs.push(record);
        } else if let Some(sentence) = record.get("stopped") {
            self.stopped = sentence.as_str().map(str::to_owned);
        } else {
            // JSON has no NaN: a loss that is NaN or infinite is null.
            let row = ["step", "loss", "lr"].map(|key| record[key].as_f64().unwrap_or(f64::NAN));
            if !row[1].is_finite() {
                self.not_finite.get_or_insert((row[0], 0)).1 += 1;
            }
            self.steps.push(row);
        }
    }
}

/// Averages neighbouring steps down to at most [`POINTS`] points. NaN values are left out: one of them does not hide its
/// neighbours; the page counts them separately.
fn averaged(steps: &[[f64; 3]]) -> Vec<[f64; 3]> {
    let per_point = steps.len().div_ceil(POINTS).max(1);
    let mean = |part: &[[f64; 3]]| {
        [0, 1, 2].map(|i| {
            let numbers = part.iter().map(|row| row[i]).filter(|v| !v.is_nan());
            numbers.clone().sum::<f64>() / numbers.count() as f64
        })
    };
    steps.chunks(per_point).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(at: &Path, name: &str, settings: &str, metrics: &str) -> PathBuf {
        let folder = at.join(name);
        std::fs::create_dir(&folder).unwrap();
        let recipe = format!(
            "seed = 1\n{settings}\n[method]\nname = \"</script><b>\"\n[[augment]]\nsize = 32\n"
        );
        std::fs::write(folder.join(RECIPE), recipe).unwrap();
        std::fs::write(folder.join("metrics.jsonl"), metrics).unwrap();
        folder
    }

    /// The data of a page, as its script reads it.
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
        let one = folder(root.path(), "one", "[optim]\nlr = 0.1", &lines);
        write_report(&[&one], &one.join(REPORT)).unwrap();
        let page = std::fs::read_to_string(one.join(REPORT)).unwrap();
        let run = &data(&page)["runs"][0];
        let steps = run["steps"].as_array().unwrap();
        assert_eq!((steps.len(), &steps[0]), (834, &json!([2.0, 4.0, 0.125])));
        assert_eq!(steps[1], json!([5.0, 10.0, 0.125])); // of 8, NaN and 12
        assert_eq!(run["notFinite"], json!({ "first": 5.0, "losses": 1, "steps": 2500 }));
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
        let two = folder(root.path(), "two", "", "");
        let pair = data(&report(&[&one, &two]).unwrap());
        assert_eq!([&pair["runs"][0]["name"], &pair["runs"][1]["name"]], ["one", "two"]);
        assert_eq!(pair["runs"][1]["notFinite"], Value::Null);
    }

    #[test]
    fn folders_without_a_run_and_damaged_files_are_errors() {
        let root = tempfile::tempdir().unwrap();
        let error = report(&[root.path()]).unwrap_err().to_string();
        assert!(error.ends_with("holds no run (recipe.toml is missing)"), "{error}");
        let lines = "{\"step\":1\n{\"step\":2,\"loss\":1,\"lr\":1}\n";
        let damaged = folder(root.path(), "damaged", "", lines);
        let error = report(&[&damaged]).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl") && error.contains("line 1: "), "{error}");
        for name in ["gallery.json", RECIPE] {
            let special = folder(root.path(), &format!("with {name}"), "", "");
            let _ = std::fs::remove_file(special.join(name));
            std::fs::create_dir(special.join(name)).unwrap();
            let error = report(&[special]).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("is not a regular file"), "{error}");
        }
    }

    #[test]
    fn no_folder_of_the_machine_is_on_the_page() {
        let root = tempfile::tempdir().unwrap();
        let secret = root.path().display().to_string();
        let lines = format!("{{\"stopped\":\"{secret}/photos/ape.png: Permission denied\"}}\n");
        let settings = |part: &str| format!("[data]\npath = \"{secret}/{part}/photos\"");
        let runs = ["a", "b"].map(|name| folder(root.path(), name, &settings(name), &lines));
        let page = report(&runs).unwrap();
        assert!(!page.contains(&secret));
        let data = data(&page);
        assert_eq!(data["runs"][0]["stopped"], "ape.png: Permission denied");
        for (run, path) in [(0, "a/photos"), (1, "b/photos")] {
            let settings = data["runs"][run]["settings"].as_array().unwrap();
            assert!(settings.contains(&json!(["data.path", path])), "{settings:?}");
        }
    }

    /// A gallery with text in every place, and a sheet.
    fn gallery(text: &str, sheet: &str) -> Value {
        let sheet = json!({ "side": 4, "columns": 2, "data": sheet });
        json!({
            "epoch": 1,
            "classes": [text],
            "map": { "points": [[0.5, null, 0, text]], "sheet": sheet },
            "strips": {
                "rows": [{ "name": text, "label": 0, "answer": 0, "near": [[0.5, 0, text]] }],
                "sheet": sheet,
            },
            "confusion": [[0, 0, 1]],
            "views": { "shown": 1, "views": 2, "sheet": sheet },
        })
    }

    #[test]
    fn text_in_a_gallery_stays_text_and_its_absolute_names_lose_their_folders() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path(), "run", "", "");
        let write = |gallery: Value| std::fs::write(run.join("gallery.json"), gallery.to_string());
        let hostile = "</script><script>alert(1)</script><!--\u{2028}";
        write(gallery(hostile, "data:image/jpeg;base64,/9j/AA==")).unwrap();
        let page = report(&[&run]).unwrap();
        assert_eq!(page.matches("<script").count(), 2);
        assert!(!page.contains('\u{2028}'));
        assert_eq!(data(&page)["runs"][0]["gallery"]["classes"][0], hostile);
        write(gallery("/home/me/photos/0.png", "data:image/jpeg;base64,")).unwrap();
        let gallery = &data(&report(&[&run]).unwrap())["runs"][0]["gallery"];
        assert_eq!(gallery["map"]["points"][0], json!([0.5, null, 0, "0.png"]));
        assert_eq!(gallery["strips"]["rows"][0]["near"][0], json!([0.5, 0, "0.png"]));
    }

    #[test]
    fn a_gallery_that_is_not_a_runs_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let run = folder(root.path(), "run", "", "");
        let jpeg = "data:image/jpeg;base64,/9j/";
        let fetching = ["https://example.org/a.jpg", "data:image/jpeg;base64,AA);url(//x"];
        let mut galleries = fetching.map(|sheet| gallery("ape", sheet)).to_vec();
        galleries.push(json!({ "epoch": 1 }));
        galleries.push(json!([]));
        for (place, value) in [
            ("/map/points/0/2", 1),
            ("/confusion/0/1", 7),
            ("/map/sheet/columns", 0),
            ("/views/shown", 2),
            ("/strips/sheet/columns", 1),
        ] {
            let mut wrong = gallery("ape", jpeg);
            *wrong.pointer_mut(place).unwrap() = json!(value);
            galleries.push(wrong);
        }
        for gallery in galleries {
            std::fs::write(run.join("gallery.json"), gallery.to_string()).unwrap();
            let error = report(&[&run]).unwrap_err().to_string();
            assert!(error.contains("gallery.json: does not hold a run's pictures"), "{error}");
        }
    }

    /// FIPS 180-4.
    fn sha256(message: &[u8]) -> [u8; 32] {
        // The first 32 bits of the fractional parts of the square and cube roots of the primes.
        let is_prime = |n: &u128| (2..*n).all(|d| !n.is_multiple_of(d));
        let primes: Vec<u128> = (2..).filter(is_prime).take(64).collect();
        let root = |degree: u32, prime: u128| {
            let fits = |root: u128| root.pow(degree) <= prime << (32 * degree);
            (0..37)
                .rev()
                .fold(0, |root, bit| if fits(root | 1 << bit) { root | 1 << bit } else { root })
                as u32
        };
        let mut state: [u32; 8] = std::array::from_fn(|i| root(2, primes[i]));
        let constants: [u32; 64] = std::array::from_fn(|i| root(3, primes[i]));
        let mut padded = message.to_vec();
        padded.push(0x80);
        padded.resize((padded.len() + 8).next_multiple_of(64) - 8, 0);
        padded.extend((8 * message.len() as u64).to_be_bytes());
        for block in padded.chunks_exact(64) {
            let mut w: Vec<u32> =
                block.chunks_exact(4).map(|b| u32::from_be_bytes(b.try_into().unwrap())).collect();
            for i in 16..64 {
                let (a, b) = (w[i - 15], w[i - 2]);
                let s0 = a.rotate_right(7) ^ a.rotate_right(18) ^ a >> 3;
                let s1 = b.rotate_right(17) ^ b.rotate_right(19) ^ b >> 10;
                w.push(w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1));
            }
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
            for i in 0..64 {
                let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
                let one = [s1, e & f ^ !e & g, constants[i], w[i]];
                let one = one.into_iter().fold(h, u32::wrapping_add);
                let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
                let two = s0.wrapping_add(a & b ^ a & c ^ b & c);
                (h, g, f, e, d, c, b, a) =
                    (g, f, e, d.wrapping_add(one), c, b, a, one.wrapping_add(two));
            }
            let round = [a, b, c, d, e, f, g, h];
            state.iter_mut().zip(round).for_each(|(s, v)| *s = s.wrapping_add(v));
        }
        let mut out = [0; 32];
        out.chunks_exact_mut(4).zip(state).for_each(|(o, s)| o.copy_from_slice(&s.to_be_bytes()));
        out
    }

    /// A browser runs only the script and applies only the style whose hashes the policy names, and requests nothing.
    #[test]
    fn the_content_security_policy_names_the_pages_own_script_and_style() {
        use base64::Engine;
        let hash = |start: &str, end: &str| {
            let (_, rest) = PAGE.split_once(start).unwrap();
            let digest = sha256(rest.split_once(end).unwrap().0.as_bytes());
            format!("'sha256-{}'", base64::engine::general_purpose::STANDARD.encode(digest))
        };
        let (style, script) = (hash("<style>", "</style>"), hash("<script>", "</script>"));
        let policy = format!(
            "default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
        );
        assert!(PAGE.contains(&format!("content=\"{policy}\"")), "{policy}");
        // Before the first element that it governs.
        assert!(PAGE.find("Content-Security-Policy") < PAGE.find("<style>"));
    }
}

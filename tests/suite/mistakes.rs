//! Every mistake and fault ends in one line that names the thing and the remedy, and an exit code; no file is left half
//! written.

#[path = "mistakes/changed.rs"]
mod changed;
#[path = "mistakes/classes.rs"]
mod classes;
#[path = "mistakes/data.rs"]
mod data;
#[path = "mistakes/places.rs"]
mod places;
#[path = "mistakes/recipes.rs"]
mod recipes;
#[path = "mistakes/runs.rs"]
mod runs;
#[path = "mistakes/weights.rs"]
mod weights;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use selfsup::device::Device;
use selfsup::recipes::Recipe;
use selfsup::train::{EpochReport, Run, StepReport, Watch};

use crate::program::{selfsup, text};

const TINY: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "data.limit=16",
    "data.test_limit=8",
    "train.epochs=2",
    "train.batch=8",
];

/// Stops a run after its first step.
struct Stop(Arc<AtomicBool>);

impl Watch for Stop {
    fn step(&mut self, _: &StepReport) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// Trains a run in its own folder and stops it after one step.
fn stopped_run(folder: &Path) {
    let settings: Vec<String> = TINY.iter().map(|setting| setting.to_string()).collect();
    let recipe = Recipe::load("demo", &settings).unwrap();
    let mut run = Run::new(&recipe, &Device::cpu(1).unwrap(), Some(folder)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    run.stop_when(stop.clone());
    run.train(&mut Stop(stop)).unwrap_err();
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new("tests/fixtures").join(name)).unwrap()
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(entry).collect()
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn with_tiny<'a>(words: &[&'a str]) -> Vec<&'a str> {
    words.iter().copied().chain(TINY.iter().flat_map(|setting| ["--set", setting])).collect()
}

/// Fails unless the last line on stderr is `line`, stdout is empty, and the exit code is `code`.
fn check_refusal(output: &Output, words: &[&str], code: i32, line: &str) -> Result<(), String> {
    let said = text(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    let got = (last.strip_prefix("selfsup: ").unwrap_or(last), output.status.code());
    if got == (line, Some(code)) && !said.contains("panicked") && output.stdout.is_empty() {
        return Ok(());
    }
    Err(format!("{words:?}\n  got      {got:?}\n  expected {:?}", (line, Some(code))))
}

/// Words of a command, its exit code and the last line on stderr.
type Refused<'a> = (&'a [&'a str], i32, &'a str);

/// Runs commands in a folder, and fails unless each is refused with its line, and leaves none of `absent` behind.
fn check_refusals(root: &Path, cases: &[Refused], absent: &[&str]) {
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|(words, code, line)| {
            check_refusal(&selfsup(root, words), words, *code, line).err()
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for left in absent {
        assert!(!root.join(left).exists(), "a refused command leaves {left} behind");
    }
}

/// Three classes that any measure tells apart, by their hue: 8 training and 4 held-out images of each.
fn hues(root: &Path) {
    for (part, count) in [("train", 8), ("test", 4)] {
        for (class, colour) in
            [("ape", [220, 40, 40]), ("bee", [40, 220, 40]), ("cow", [40, 40, 220])]
        {
            let folder = root.join(part).join(class);
            std::fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let pixel = |x: u32, y: u32| {
                    image::Rgb(colour.map(|c: u8| c - 30 + ((7 * x + 13 * y + 5 * i) % 60) as u8))
                };
                let image = image::RgbImage::from_fn(24, 24, pixel);
                image.save(folder.join(format!("{i}.png"))).unwrap();
            }
        }
    }
}

/// Trains a run on `hues` in the folder `run`.
fn run_on_hues(root: &Path) {
    hues(&root.join("hue"));
    let own =
        ["data.path=hue", "watch.collapsed_std=0", "watch.collapsed_rank=0", "watch.diverged=0"];
    let own = own.iter().flat_map(|setting| ["--set", setting]);
    let words = ["train", "demo", "--device", "cpu", "--out", "run"];
    let words: Vec<&str> = with_tiny(&words).into_iter().chain(own).collect();
    let words = [&words[..], &["--set", "data.limit=0", "--set", "data.test_limit=0"]].concat();
    let output = selfsup(root, &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

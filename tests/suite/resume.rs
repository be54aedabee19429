//! A run that was stopped or killed and then resumed gives the same bits as a run that was never stopped.

#[path = "resume/folder.rs"]
mod folder;
#[path = "resume/images.rs"]
mod images;
#[path = "resume/settings.rs"]
mod settings;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use selfsup::Error;
use selfsup::device::{Device, Precision};
use selfsup::methods::ALL;
use selfsup::optim::{Adam, Rule};
use selfsup::recipes::Recipe;
use selfsup::train::{self, EpochReport, Paused, Run, StepReport, Watch};

use crate::recipes::{reduced, small_recipe, teacher};

/// Raises a flag at a step.
struct StopAt(u64, Arc<AtomicBool>);

impl Watch for StopAt {
    fn step(&mut self, report: &StepReport) {
        if report.step == self.0 {
            self.1.store(true, Ordering::Relaxed);
        }
    }
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// The tensors of a run's newest checkpoint, as bytes without the header, and its log without times and speeds.
pub fn outcome(folder: &Path) -> [Vec<u8>; 2] {
    let weights = std::fs::read(train::newest(folder).unwrap()).unwrap();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let line = line.as_object_mut().unwrap();
        line.remove("views_per_second");
        line.remove("waiting");
        line.remove("seconds");
        serde_json::to_string(line).unwrap() + "\n"
    });
    [weights[header..].to_vec(), lines.collect::<String>().into_bytes()]
}

/// A recipe of each method, with every kind of state that it can have.
fn recipes(folder: &Path, device: &Device) -> Vec<Recipe> {
    let mut recipes: Vec<Recipe> =
        ALL.iter().map(|entry| reduced(small_recipe(entry.name), device)).collect();
    for recipe in &mut recipes {
        (recipe.train.epochs, recipe.train.knn_every) = (2, 1);
        match &*recipe.method.name {
            "distill" => teacher(recipe, folder, device),
            "simclr-v2" => drop(recipe.method.settings.insert("memory".into(), 32.into())),
            "swav" => {
                recipe.method.settings.insert("queue".into(), 16.into());
                recipe.optim.rule = Rule::Adam(Adam::new(1e-4));
            }
            _ => {}
        }
    }
    recipes
}

#[test]
fn a_run_of_any_method_stopped_after_each_step_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu(1).unwrap().poisoned();
    for recipe in recipes(folder.path(), &device) {
        stopped_after_each_step(&recipe, folder.path(), &device, 4);
    }
    let in_bf16 = device.with_precision(Precision::Bf16).unwrap();
    let recipe = reduced(small_recipe("byol"), &in_bf16);
    let recipe = recipe.with(&["train.epochs=2".into(), "train.knn_every=1".into()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    stopped_after_each_step(&recipe, folder.path(), &in_bf16, 4);
    let paused = || Paused::open(&folder.path().join("byol-stopped"), &[]).unwrap();
    assert_eq!(paused().precision(), Some(Precision::Bf16));
    let error = Run::resume(paused(), &device).err().unwrap().to_string();
    assert!(error.contains("trained in bf16, and the device computes in f32"), "{error}");
}

/// 20 images are two batches of eight and a half; 60 images are seven, so three epochs become three and a half.
#[test]
fn a_schedule_of_all_images_ends_within_an_epoch_and_resumes_there() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu(1).unwrap().poisoned();
    let mut recipe = reduced(small_recipe("simclr"), &device);
    (recipe.data.limit, recipe.train.all_images) = (20, true);
    (recipe.train.epochs, recipe.train.knn_every) = (3, 1);
    stopped_after_each_step(&recipe, folder.path(), &device, 7);
    let lines =
        std::fs::read_to_string(folder.path().join("simclr-straight/metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().filter(|line| line.contains("\"knn\":")).count(), 4, "{lines}");
}

fn stopped_after_each_step(recipe: &Recipe, folder: &Path, device: &Device, steps: u64) {
    let name = &recipe.method.name;
    let [straight, stopped] =
        ["straight", "stopped"].map(|how| folder.join(format!("{name}-{how}")));
    let mut run = Run::new(recipe, device, Some(&straight)).unwrap();
    run.train(&mut StopAt(u64::MAX, Arc::default())).unwrap();
    let total = run.schedule().total;
    assert_eq!(total, steps, "{name}");
    let mut run = Run::new(recipe, device, Some(&stopped)).unwrap();
    for step in 1..=total {
        let flag = Arc::new(AtomicBool::new(false));
        run.stop_when(flag.clone());
        let sentence = match run.train(&mut StopAt(step, flag)) {
            Err(Error::Stopped(sentence)) => sentence,
            other => panic!("{name}: {other:?} at step {step}"),
        };
        let start =
            format!("stopped at step {step} of {steps}; continue with: selfsup train --resume ");
        assert!(sentence.starts_with(&start), "{sentence}");
        drop(run); // or its folder stays locked
        if let Some(file) = recipe.method.settings.get("teacher").map(|t| &t["file"]) {
            let _ = std::fs::remove_file(file.as_str().unwrap()); // it is in the checkpoint
        }
        run = Run::resume(Paused::open(&stopped, &[]).unwrap(), device).unwrap();
        assert_eq!(run.step(), step);
    }
    run.train(&mut StopAt(u64::MAX, Arc::default())).unwrap();
    let [got, want] = [stopped, straight].map(|folder| outcome(&folder));
    assert_eq!(String::from_utf8_lossy(&got[1]), String::from_utf8_lossy(&want[1]), "{name}");
    assert!(got[0] == want[0], "{name}: the weights differ");
}

/// Enough steps of a tiny network for a signal to arrive in the middle of them.
const SETTINGS: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "data.limit=800",
    "data.test_limit=40",
    "train.epochs=2",
    "train.batch=8",
    "train.knn_every=1",
    "train.checkpoint_every_steps=7",
    "train.threads=1",
    "train.loader_threads=1",
    // bf16, the default of processors that have instructions for it, makes so narrow a network collapse.
    "train.precision=f32",
];

struct Program {
    folder: PathBuf,
    child: Child,
}

impl Program {
    fn start(folder: &Path, words: &[&str]) -> Self {
        let child = Command::new(crate::program::path())
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { folder: folder.to_path_buf(), child }
    }

    /// Waits until the run has logged `lines` lines.
    fn wait_for(&mut self, lines: usize) {
        let metrics = self.folder.join("metrics.jsonl");
        while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < lines {
            assert!(self.child.try_wait().unwrap().is_none(), "it ended before {lines} lines");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// The exit code and standard error.
    fn end(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

/// The short form of `scripts/check-resume`.
#[test]
fn a_run_killed_and_stopped_by_signals_equals_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let [straight, stopped] = ["straight", "stopped"].map(|name| folder.path().join(name));
    let out = stopped.to_str().unwrap();
    let settings: Vec<&str> = SETTINGS.iter().flat_map(|setting| ["--set", setting]).collect();
    let train = |out| [&["train", "demo", "--device", "cpu", "--out", out], &settings[..]].concat();
    let resume = ["train", "--device", "cpu", "--resume", out];
    let (code, said) = Program::start(&straight, &train(straight.to_str().unwrap())).end();
    assert_eq!(code, Some(0), "{said}");

    let mut run = Program::start(&stopped, &train(out));
    for (lines, signal) in [(20, "KILL"), (45, "TERM"), (70, "INT")] {
        run.wait_for(lines);
        if signal == "TERM" {
            let (code, said) = Program::start(&stopped, &resume).end();
            let expected = format!(
                "selfsup: {out}: is in use: another process works in it; wait for it or stop it first\n"
            );
            assert_eq!((code, said), (Some(1), expected));
        }
        run.signal(signal);
        let (code, said) = run.end();
        if signal == "KILL" {
            assert_eq!(code, None, "{said}");
        } else {
            assert_eq!(code, Some(1), "{said}");
            let last = said.lines().last().unwrap();
            let end = format!(" of 200; continue with: selfsup train --resume {out}");
            assert!(
                last.starts_with("selfsup: stopped at step ") && last.ends_with(&end),
                "{said}"
            );
        }
        run = Program::start(&stopped, &resume);
    }
    let (code, said) = run.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("going on after step "), "{said}");
    let [got, want] = [&stopped, &straight].map(|folder| outcome(folder));
    assert_eq!(String::from_utf8_lossy(&got[1]), String::from_utf8_lossy(&want[1]));
    assert!(got[0] == want[0], "the weights differ");
    let left = std::fs::read_dir(&stopped).unwrap();
    let partial =
        left.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("partial"));
    assert_eq!(partial.count(), 0, "a partial file is left");
    assert!(stopped.join("best.safetensors").is_file());
}

/// Writes `count` images for each of two classes, dark and bright, and returns the folder.
fn write_split(folder: &Path, count: u8) {
    for (class, base) in [("dark", 20), ("bright", 180)] {
        let folder = folder.join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..count {
            let image = image::RgbImage::from_fn(16, 16, |x, y| {
                image::Rgb([base + i, base + x as u8, base + y as u8])
            });
            image.save(folder.join(format!("{i:03}.png"))).unwrap();
        }
    }
}

/// A recipe on a folder of images: two epochs of four steps, evaluated after each.
fn on_images(data: &Path, settings: &[&str]) -> Recipe {
    let small = [
        "network.width=2",
        "method.hidden=8",
        "method.embedding=8",
        "augment.size=16",
        "data.limit=0",
        "data.test_limit=0",
        "train.epochs=2",
        "train.batch=8",
        "train.knn_every=1",
        "watch.collapsed_std=0",
        "watch.collapsed_rank=0",
        "watch.diverged=0",
    ];
    let path = format!("data.path={}", data.display());
    let settings: Vec<String> =
        small.iter().chain(settings).map(|s| s.to_string()).chain([path]).collect();
    Recipe::load("demo", &settings).unwrap()
}

/// Calls a function at a step, and keeps the sentences for the user.
struct At<F: FnMut()>(u64, F, Vec<String>);

impl<F: FnMut()> Watch for At<F> {
    fn step(&mut self, report: &StepReport) {
        if report.step == self.0 {
            (self.1)();
        }
    }
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, sentence: &str) {
        self.2.push(sentence.to_owned());
    }
}

/// The lines of a run's log that tell of epochs.
fn epochs(folder: &Path) -> Vec<serde_json::Value> {
    let log = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["epoch"].is_u64()).collect()
}

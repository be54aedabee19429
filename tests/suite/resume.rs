//! A run that was stopped or killed and then resumed gives the same bits as a run that was never stopped.

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

#[test]
fn a_test_part_that_breaks_during_training_does_not_cost_the_training() {
    let root = tempfile::tempdir().unwrap();
    let [data, straight, broken] =
        ["data", "straight", "broken"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 40); // some are kept in memory from before the first step
    let recipe = on_images(&data, &[]);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&recipe, &device, Some(&straight)).unwrap();
    run.train(&mut StopAt(u64::MAX, Arc::default())).unwrap();

    let mut run = Run::new(&recipe, &device, Some(&broken)).unwrap();
    let test = data.join("test");
    let spoil = || {
        for class in ["dark", "bright"] {
            (0..40).for_each(|i| {
                std::fs::write(test.join(class).join(format!("{i:03}.png")), "broken").unwrap();
            });
        }
    };
    let error = run.train(&mut At(3, spoil, Vec::new())).unwrap_err().to_string();
    assert!(error.contains("held-out images can"), "{error}");
    assert!(train::newest(&broken).unwrap().ends_with("step-00000004.safetensors"));
    drop(run);

    write_split(&test, 40);
    let mut run = Run::resume(Paused::open(&broken, &[]).unwrap(), &device).unwrap();
    assert_eq!(run.step(), 4);
    run.train(&mut StopAt(u64::MAX, Arc::default())).unwrap();
    let [got, want] = [&broken, &straight].map(|folder| outcome(folder));
    assert_eq!(String::from_utf8_lossy(&got[1]), String::from_utf8_lossy(&want[1]));
    assert!(got[0] == want[0], "the weights differ");
}

#[test]
fn unreadable_images_are_counted_listed_and_limited() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 10);
    std::fs::write(data.join("test/dark/003.png"), "broken").unwrap();
    let device = Device::cpu(1).unwrap();
    let error = Run::new(&on_images(&data, &[]), &device, Some(&out)).err().unwrap().to_string();
    assert!(error.contains("1 of 20 held-out images tried cannot be read"), "{error}");
    assert!(!out.exists(), "a refused run leaves a folder");
    let recipe = on_images(&data, &["data.max_skipped=0.05"]);
    let mut run = Run::new(&recipe, &device, Some(&out)).unwrap();
    let mut watch = At(0, || (), Vec::new());
    run.train(&mut watch).unwrap();
    let named = watch.2.iter().filter(|note| note.starts_with("skipped held-out image "));
    assert_eq!(named.count(), 1, "{:?}", watch.2);
    for epoch in epochs(&out) {
        assert_eq!(epoch["skipped"]["held_out"], 1, "{epoch}");
        let right = epoch["knn"].as_f64().unwrap() * 19.0;
        assert!((right - right.round()).abs() < 1e-9, "kNN is of 19 images, not of {epoch}");
    }
    let list = std::fs::read_to_string(out.join("skipped.txt")).unwrap();
    assert!(list.starts_with("held-out\t") && list.contains("003.png"), "{list}");
}

#[test]
fn the_best_checkpoint_is_put_right_after_a_kill() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 4);
    let recipe = on_images(&data, &["train.epochs=1"]);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&recipe, &device, Some(&out)).unwrap();
    let mut watch = At(0, || (), Vec::new());
    run.train(&mut watch).unwrap();
    let chosen =
        "best.safetensors is the checkpoint of step 4, chosen by kNN on the held-out images";
    assert!(watch.2.iter().any(|note| note.starts_with(chosen)), "{:?}", watch.2);
    drop(run);
    let best = out.join("best.safetensors");
    let newest = std::fs::read(train::newest(&out).unwrap()).unwrap();
    assert!(std::fs::read(&best).unwrap() == newest);
    let spoils: [&dyn Fn(); 2] = [&|| std::fs::remove_file(&best).unwrap(), &|| {
        std::fs::remove_file(&best).unwrap();
        std::fs::write(&best, "older").unwrap();
    }];
    for spoil in spoils {
        spoil();
        drop(Run::resume(Paused::open(&out, &[]).unwrap(), &device).unwrap());
        assert!(std::fs::read(&best).unwrap() == newest);
    }
}

#[test]
fn other_images_or_labels_are_no_images_to_resume_with() {
    let root = tempfile::tempdir().unwrap();
    let [data, out, moved] = ["data", "run", "moved"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 4);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&on_images(&data, &[]), &device, Some(&out)).unwrap();
    run.train(&mut At(0, || (), Vec::new())).unwrap();
    drop(run);
    std::fs::rename(&data, &moved).unwrap();
    let resumed = || {
        let settings = [format!("data.path={}", moved.display())];
        Run::resume(Paused::open(&out, &settings).unwrap(), &device).map(drop)
    };
    resumed().unwrap(); // the same elsewhere
    let [dark, bright] = ["dark", "bright"].map(|class| moved.join("train").join(class));
    let exchange = |from: &Path, to: &Path| {
        std::fs::rename(from, root.path().join("between")).unwrap();
        std::fs::rename(to, from).unwrap();
        std::fs::rename(root.path().join("between"), to).unwrap();
    };
    // One image more of one class and one less of the other.
    std::fs::rename(dark.join("000.png"), bright.join("100.png")).unwrap();
    let said = resumed().unwrap_err().to_string();
    assert!(
        said.contains("other names or labels than those that the run was started with"),
        "{said}"
    );
    std::fs::rename(bright.join("100.png"), dark.join("000.png")).unwrap();
    resumed().unwrap();
    exchange(&dark, &bright); // the same names and labels
    let said = resumed().unwrap_err().to_string();
    assert!(said.contains("other pixels than those that the run was started with"), "{said}");
}

#[test]
fn a_log_that_is_removed_does_not_cost_the_run() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 4);
    let recipe = on_images(&data, &["train.epochs=2"]);
    let device = Device::cpu(1).unwrap();
    let log = out.join("metrics.jsonl");
    let mut run = Run::new(&recipe, &device, Some(&out)).unwrap();
    run.train(&mut At(5, || std::fs::remove_file(&log).unwrap(), Vec::new())).unwrap();
    drop(run);
    assert_eq!(epochs(&out).len(), 2, "the log is written again");
    std::fs::remove_file(&log).unwrap();
    let run = Run::resume(Paused::open(&out, &[]).unwrap(), &device).unwrap();
    assert!(run.has_ended() && log.is_file());
}

#[test]
fn a_resumed_run_refuses_settings_that_change_its_weights() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 4);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&on_images(&data, &[]), &device, Some(&out)).unwrap();
    let flag = Arc::new(AtomicBool::new(false));
    run.stop_when(flag.clone());
    run.train(&mut StopAt(3, flag)).unwrap_err();
    drop(run);
    for setting in [
        "train.micro_batches=4",
        "train.batch=16",
        "train.epochs=3",
        "train.precision=f32",
        "train.init=weights.safetensors",
        "data.limit=8",
        "data.validation=0.5",
        "seed=5",
        "augment.flip=0.1",
        "method.temperature=0.3",
        "optim.lr=0.1",
    ] {
        let refused = Paused::open(&out, &[setting.to_string()]).err();
        let refused = refused.unwrap_or_else(|| panic!("{setting} is accepted")).to_string();
        let key = setting.split('=').next().unwrap().replace("augment", "augment.0");
        assert!(refused.starts_with(&key) && refused.contains("another run"), "{refused}");
    }
    for setting in [
        "train.threads=2",
        "train.loader_threads=1",
        "train.keep=5",
        "train.knn_every=2",
        "train.checkpoint_every=1",
        "train.checkpoint_every_steps=3",
        "train.checkpoint_every_minutes=1",
        "data.max_skipped=0.5",
        "watch.report=false",
    ] {
        drop(
            Paused::open(&out, &[setting.to_string()]).unwrap_or_else(|e| panic!("{setting}: {e}")),
        );
    }
}

/// Before checkpoints noted their precision, every recipe said `bf16`, and a CPU trained in f32 all the same.
#[test]
fn a_run_of_an_earlier_version_goes_on_in_f32_on_a_cpu() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    write_split(&data.join("test"), 4);
    let device = Device::cpu(1).unwrap();
    let recipe = on_images(&data, &["train.precision=bf16"]);
    let stop = |mut run: Run, step| {
        let flag = Arc::new(AtomicBool::new(false));
        run.stop_when(flag.clone());
        run.train(&mut StopAt(step, flag)).unwrap_err();
    };
    stop(Run::new(&recipe, &device, Some(&out)).unwrap(), 2);
    let checkpoint = train::newest(&out).unwrap();
    let mut bytes = std::fs::read(&checkpoint).unwrap();
    let note = b"selfsup.precision";
    let at = bytes.windows(note.len()).position(|window| window == note).unwrap();
    bytes[at..][..note.len()].copy_from_slice(b"selfsup.forgotten");
    std::fs::write(&checkpoint, bytes).unwrap();
    assert_eq!(train::recipe_in(&checkpoint, &[]).unwrap().train.precision, None);
    let asked = ["train.precision=bf16".to_string()];
    let recipe = train::recipe_of(&out.join("recipe.toml"), &checkpoint, &asked).unwrap();
    assert_eq!(recipe.train.precision, Some(Precision::Bf16));
    let paused = || Paused::open(&out, &[]).unwrap();
    assert_eq!(paused().precision(), None);
    let in_bf16 = device.with_precision(Precision::Bf16).unwrap();
    let error = Run::resume(paused(), &in_bf16).err().unwrap().to_string();
    assert!(error.contains("trained in f32, and the device computes in bf16"), "{error}");
    stop(Run::resume(paused(), &device).unwrap(), 3);
    assert_eq!(paused().precision(), Some(Precision::F32));
    drop(Run::resume(paused(), &device).unwrap());
}

#[test]
fn a_new_run_replaces_no_file_that_was_there() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    write_split(&data.join("train"), 8);
    let device = Device::cpu(1).unwrap();
    let recipe = on_images(&data, &[]);
    for name in ["metrics.jsonl", "report.html", "best.safetensors", "step-00000001.safetensors"] {
        let out = root.path().join(name);
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(name), "precious").unwrap();
        let error = Run::new(&recipe, &device, Some(&out)).err().unwrap().to_string();
        assert!(error.contains("holds other files, such as"), "{error}");
        assert_eq!(std::fs::read_to_string(out.join(name)).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
    }
    let empty = root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    Run::new(&recipe, &device, Some(&empty)).unwrap();
}

#[test]
fn a_share_of_the_training_images_can_choose_the_best_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let [data, out] = ["data", "run"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 20);
    let recipe = on_images(&data, &["data.validation=0.2"]);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&recipe, &device, Some(&out)).unwrap();
    assert_eq!(run.images().train.len(), 32);
    let mut watch = At(0, || (), Vec::new());
    run.train(&mut watch).unwrap();
    let chosen = watch.2.iter().any(|note| note.ends_with("a share of the training split"));
    assert!(chosen, "{:?}", watch.2);
    let first = &epochs(&out)[0];
    assert!(first["validation"].is_f64() && first["knn"].is_null(), "{first}");
    assert_eq!(first["best_by"], "validation");
    assert!(out.join("best.safetensors").is_file());
}

#[cfg(unix)]
#[test]
fn a_run_writes_through_no_link_in_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let [data, out, victim] = ["data", "run", "victim"].map(|name| root.path().join(name));
    write_split(&data.join("train"), 16);
    let device = Device::cpu(1).unwrap();
    let mut run = Run::new(&on_images(&data, &[]), &device, Some(&out)).unwrap();
    let flag = Arc::new(AtomicBool::new(false));
    run.stop_when(flag.clone());
    run.train(&mut StopAt(3, flag)).unwrap_err();
    drop(run);
    std::fs::write(&victim, "precious").unwrap();
    for name in [".lock", "metrics.jsonl"] {
        let (file, kept) = (out.join(name), root.path().join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        std::os::unix::fs::symlink(&victim, &file).unwrap();
        let resumed = Paused::open(&out, &[]).and_then(|paused| Run::resume(paused, &device));
        let error = resumed.err().unwrap().to_string();
        assert!(error.contains("is a link or a special file"), "{name}: {error}");
        std::fs::remove_file(&file).unwrap();
        std::fs::rename(&kept, &file).unwrap();
    }
    for name in ["recipe.toml", "report.html", "step-00000008.safetensors", "best.safetensors"] {
        let _ = std::fs::remove_file(out.join(format!(".{name}.partial")));
        std::os::unix::fs::symlink(&victim, out.join(format!(".{name}.partial"))).unwrap();
    }
    let settings = ["train.keep=1".to_string()];
    let mut run = Run::resume(Paused::open(&out, &settings).unwrap(), &device).unwrap();
    run.train(&mut StopAt(u64::MAX, Arc::default())).unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
}

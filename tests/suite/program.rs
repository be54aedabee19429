//! The program as a user runs it, on small runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::compare::{close, report};
use crate::driver::with_driver;
use crate::resume::outcome;

/// Two epochs of a narrow network on a few of the bundled images.
const SMALL: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "data.limit=64",
    "data.test_limit=40",
    "train.epochs=2",
    "train.batch=16",
];

/// The program's path: next to the test binary in a bundle (`scripts/gpu-bundle`), else where cargo built it. Tests take it from here:
/// the folder in which cargo built is not on the machine where a bundle runs.
pub fn path() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| {
        let bundled = std::env::current_exe().unwrap().with_file_name("selfsup");
        let built = PathBuf::from(env!("CARGO_BIN_EXE_selfsup"));
        let path = if bundled.is_file() { bundled } else { built };
        path.into_os_string().into_string().expect("a path in UTF-8")
    })
}

/// The program.
pub fn program() -> Command {
    Command::new(path())
}

pub fn selfsup(folder: &Path, words: &[&str]) -> Output {
    program().current_dir(folder).args(words).output().expect("the program starts")
}

pub fn with_settings<'a>(words: &[&'a str], settings: &[&'a str]) -> Vec<&'a str> {
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    words.iter().copied().chain(settings).collect()
}

pub fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Trains a small run and returns its checkpoint's bytes and its metrics without times and speeds.
fn run(folder: &Path, name: &str, threads: usize, loader_threads: usize) -> (Vec<u8>, String) {
    let threads = format!("train.threads={threads}");
    let loader = format!("train.loader_threads={loader_threads}");
    let settings: Vec<&str> = SMALL.iter().copied().chain([&*threads, &*loader]).collect();
    let output = selfsup(
        folder,
        &with_settings(&["train", "demo", "--device", "cpu", "--out", name], &settings),
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The header is left out: it holds the resolved recipe with the numbers of threads, which must not affect weights.
    let [weights, metrics] = outcome(&folder.join(name));
    (weights, String::from_utf8(metrics).unwrap())
}

#[test]
fn one_seed_gives_the_same_bits_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let first = run(folder.path(), "a", 1, 1);
    assert!(first.0.len() > 10_000 && first.1.lines().count() == 2 * 4 + 2, "{}", first.1);
    for (name, threads, loader_threads) in [("b", 1, 1), ("c", 2, 1), ("d", 1, 2), ("e", 2, 2)] {
        let again = run(folder.path(), name, threads, loader_threads);
        assert!(again.0 == first.0, "{threads}, {loader_threads} threads: the weights differ");
        assert_eq!(again.1, first.1, "{threads}, {loader_threads} threads");
    }
}

#[test]
fn the_demo_prints_its_six_lines_and_keeps_its_run() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs");
    std::fs::create_dir_all(runs.join("demo")).unwrap();
    std::fs::write(runs.join("demo/recipe.toml"), "an earlier run").unwrap();
    let output = selfsup(folder.path(), &with_settings(&["demo"], SMALL));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    let mut expected = Vec::new();
    for what in ["kNN", "linear (10 labels per class)"] {
        for features in ["raw pixels", "random init", "trained"] {
            expected.push(format!("{what} {features}: "));
        }
    }
    assert_eq!(lines.len(), 6, "{lines:#?}");
    for (line, start) in lines.iter().zip(&expected) {
        let number = line.strip_prefix(start.as_str()).and_then(|rest| rest.strip_suffix('%'));
        let number: f64 = number.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        assert!((0.0..=100.0).contains(&number), "{line}");
    }
    // It keeps its run, and does not touch an earlier one.
    assert!(runs.join("demo-2/report.html").is_file());
    assert!(text(&output.stderr).trim_end().ends_with("report.html"));
    assert_eq!(std::fs::read_to_string(runs.join("demo/recipe.toml")).unwrap(), "an earlier run");
    assert_eq!(std::fs::read_dir(runs.join("demo")).unwrap().count(), 1);
}

/// A flat folder of small pictures without labels.
fn photos(root: &Path, count: u32) {
    std::fs::create_dir_all(root.join("photos")).unwrap();
    for i in 0..count {
        let pixel = |x: u32, y: u32| image::Rgb([(x * i) as u8, (y * 7) as u8, (x * y + i) as u8]);
        let image = image::RgbImage::from_fn(24, 20, pixel);
        image.save(root.join(format!("photos/{i:03}.png"))).unwrap();
    }
}

#[test]
fn a_folder_is_planned_and_trained_by_one_command() {
    let root = tempfile::tempdir().unwrap();
    photos(root.path(), 40);
    std::fs::copy(root.path().join("photos/000.png"), root.path().join("photos/copy.png")).unwrap();
    std::fs::write(root.path().join("photos/broken.png"), "broken").unwrap();
    let small = ["network.width=2", "method.hidden=8", "method.embedding=8", "train.epochs=2"];
    let words = with_settings(&["train", "photos", "--device", "cpu"], &small);
    let plan = selfsup(root.path(), &[&words[..], &["--plan"]].concat());
    assert!(plan.status.success(), "{}", text(&plan.stderr));
    let said = text(&plan.stdout);
    for line in [
        "photos: 42 images, in colour, shorter side 20 pixels, no labels",
        "1 of 42 images cannot be read and are left out; the first: ",
        "1 images have exactly the pixels of another one",
        "method simclr: ",
        "stem small: ",
        "crops 32 pixels: ",
        "batch 16: ",
        "network ResNet-18 of width 2: ",
        "epochs 2: as set",
        "best checkpoint by RankMe: ",
        "plan: 4 steps in 2 epochs, about ",
        "train: selfsup train photos --device cpu --set network.width=2",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(!root.path().join("runs").exists(), "a plan leaves nothing");
    let output = selfsup(root.path(), &words);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("chosen by the rank of its features (RankMe)"), "{said}");
    assert!(said.contains("; the plan was ") && said.contains("runs/photos/report.html"), "{said}");
    // The next command is one that works without labels.
    assert!(said.contains("by selfsup embed runs/photos IMAGES --out FILE"), "{said}");
    assert!(!said.contains("evaluate with: "), "{said}");
    for file in ["recipe.toml", "report.html", "best.safetensors", "step-00000004.safetensors"] {
        assert!(root.path().join("runs/photos").join(file).is_file(), "{file}");
    }
    // Its recipe is an ordinary one.
    let again = ["train", "runs/photos/recipe.toml", "--device", "cpu", "--out", "again"];
    assert!(selfsup(root.path(), &again).status.success());
    let weights = |name: &str| outcome(&root.path().join(name))[0].clone();
    assert_eq!(weights("runs/photos"), weights("again"));
}

#[test]
fn what_is_no_folder_to_train_on_is_said_before_anything_is_done() {
    let root = tempfile::tempdir().unwrap();
    photos(root.path(), 40);
    let at = |name: &str| root.path().join(name);
    for folder in ["empty", "three", "broken", "part/cat", "run"] {
        std::fs::create_dir_all(at(folder)).unwrap();
    }
    for i in 0..40 {
        std::fs::write(at("broken").join(format!("{i}.jpg")), "x").unwrap();
    }
    for (i, to) in ["three/0.png", "three/1.png", "three/2.png", "part/cat/0.png", "part/1.png"]
        .iter()
        .enumerate()
    {
        std::fs::copy(at(&format!("photos/{i:03}.png")), at(to)).unwrap();
    }
    std::fs::write(at("run/recipe.toml"), "").unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["empty"], "has neither class folders nor images"),
        (&["three"], "three: 3 images are too few to learn from; at least 32 are needed"),
        (&["broken"], "broken: 0 images can be read, 40 cannot: too few to learn from"),
        (&["part"], "has both class folders and images of its own"),
        (&["run"], "run: is the folder of a run: continue it with --resume"),
        (&["three/0.png"], "three/0.png: is an image; name the folder it lies in"),
        (&["nowhere", "--plan"], "nowhere: no such folder: check the path of the images"),
        (&["demo", "--budget", "2h"], "--budget is for a folder of images, and demo is a recipe"),
        (&["photos", "--budget", "2"], "expected a time above 0 such as 90s"),
        (&["photos", "--budget", "10ms"], "expected a time above 0 such as 90s"),
        (&["photos", "--method", "dino"], "unknown method dino; a folder can be trained by simclr"),
        (&["photos", "--out", "photos/run"], "photos/run: lies in the folder of the images"),
        (&["photos", "--set", "train.epoch=1"], "(did you mean `epochs`?)"),
        (&["photos", "--out", "run"], "run: already holds a run"),
        (&["."], "lies in the folder of the images"),
    ];
    for (words, sentence) in cases {
        let words = [&["train"], *words, &["--device", "cpu"]].concat();
        let output = selfsup(root.path(), &words);
        let said = text(&output.stderr);
        assert!(!output.status.success() && !said.contains("panicked"), "{words:?}: {said}");
        assert!(said.contains(sentence), "{words:?}: {said}");
    }
    assert!(!at("runs").exists() && std::fs::read_dir(at("photos")).unwrap().count() == 40);
}

#[test]
fn a_learning_rate_is_recommended_with_its_reason() {
    let root = tempfile::tempdir().unwrap();
    let words = ["tune-lr", "demo", "--device", "cpu", "--steps", "10"];
    let output = selfsup(root.path(), &with_settings(&words, SMALL));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    assert_eq!(lines.len(), 8, "{lines:#?}");
    assert!(lines[..7].iter().all(|line| line.contains("  loss ")), "{lines:#?}");
    assert!(lines[7].starts_with("optim.lr=") || lines[7].starts_with("at none"), "{lines:#?}");
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "a probe leaves nothing");
}

#[test]
fn a_run_is_evaluated_from_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), "run", 2, 2);
    let evaluated = |words: &[&str], starts: &[&str]| {
        let output = selfsup(folder.path(), words);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines: Vec<&str> = text(&output.stdout).lines().collect();
        assert_eq!(lines.len(), starts.len(), "{lines:#?}");
        for (line, start) in lines.iter().zip(starts) {
            assert!(line.starts_with(start) && line.ends_with('%'), "{lines:#?}, {start}");
        }
        (text(&output.stdout).to_owned(), text(&output.stderr).to_owned())
    };
    let (one, said) = evaluated(
        &["eval", "knn", "run", "--k", "20"],
        &["kNN raw pixels: ", "kNN random init: ", "kNN trained: "],
    );
    assert!(said.contains("64 training and 40 held-out images, k 20"), "{said}");
    // The line of a single setting is among those of a grid.
    let (grid, _) = evaluated(
        &["eval", "knn", "run", "--k", "5,20", "--temperature", "0.1,1"],
        &["kNN (k 5, temperature 0.1) raw pixels: "; 1]
            .into_iter()
            .chain(["kNN (k"; 11])
            .collect::<Vec<_>>(),
    );
    let last = |text: &str, of: &str| {
        let line = text.lines().find(|line| line.starts_with(of)).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(last(&grid, "kNN (k 20, temperature 0.1) trained"), last(&one, "kNN trained"));

    let (_, said) = evaluated(
        &["eval", "linear", "run", "--sweep", "--epochs", "2", "--labels", "50%"],
        &["linear (cached, learning rate ", "linear (cached, learning rate "],
    );
    assert!(said.contains("random init, learning rate 0.03: "), "{said}");
    evaluated(
        &["eval", "linear", "run", "--protocol", "moco", "--epochs", "1"],
        &["linear (moco, learning rate 30.0000) random init: ", "linear (moco, learning rate"],
    );
    let words =
        ["eval", "finetune", "run", "--labels", "30%", "--head-layers", "1", "--device", "cpu"];
    let (_, said) = evaluated(
        &with_settings(&words, &["train.epochs=1", "train.batch=8"]),
        &["fine-tuned random init: ", "fine-tuned trained: "],
    );
    assert!(
        said.contains("fine-tuned on 21 labelled images by lightly, 1 epochs, batch 8"),
        "{said}"
    );
    let files = ["recipe.toml", "metrics.jsonl", "step-00000008.safetensors"];
    assert!(files.iter().all(|file| folder.path().join("run").join(file).is_file()));
}

/// Two steps of the smallest network.
const TINY: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "data.limit=16",
    "data.test_limit=8",
    "train.epochs=1",
    "train.batch=8",
    "watch.quality=false",
];

/// Runs the program with a GPU available.
fn with_gpu(folder: &Path, words: &[&str]) -> Output {
    with_driver(&mut program())
        .current_dir(folder)
        .args(words)
        .output()
        .expect("the program starts")
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_run_on_a_gpu_moves_to_the_cpu_by_its_checkpoint_and_back() {
    let folder = tempfile::tempdir().unwrap();
    // Without --device it uses the GPU.
    let each = ["--set", "train.checkpoint_every_steps=1"];
    let train = with_settings(&["train", "demo", "--out", "run"], TINY);
    let output = with_gpu(folder.path(), &[&train[..], &each].concat());
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("device: GPU 0 (") && said.contains("), bf16"), "{said}");
    assert!(said.contains("images: all 16 lie on the GPU, 48.0 KiB"), "{said}");
    let metrics = std::fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let losses = metrics.lines().map(|line| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap()
    });
    let losses: Vec<f64> = losses.collect();
    // Two steps and their mean; each row has 15 candidates.
    assert_eq!(losses.len(), 3, "{metrics}");
    assert!(losses.iter().all(|&loss| loss > 0.0 && loss < 4.0 * 15_f64.ln()), "{losses:?}");

    // As if the run had been killed in its second step.
    let straight = outcome(&folder.path().join("run"));
    std::fs::remove_file(folder.path().join("run/step-00000002.safetensors")).unwrap();
    let output = with_gpu(folder.path(), &["train", "--resume", "run"]);
    assert!(text(&output.stderr).contains("going on after step 1"), "{}", text(&output.stderr));
    assert!(outcome(&folder.path().join("run")) == straight, "the resumed run differs");

    let evaluate = |device, precision| {
        let words = ["eval", "knn", "run", "--k", "5", "--device", device, "--set", precision];
        let output = with_gpu(folder.path(), &words);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout).lines().count(), 3, "{}", text(&output.stdout));
        text(&output.stdout).to_owned()
    };
    let cpu = evaluate("cpu", "train.precision=f32");
    assert_eq!(evaluate("cuda:0", "train.precision=f32"), cpu);
    evaluate("cpu", "train.precision=bf16");
    evaluate("cuda", "train.precision=bf16");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn the_demo_runs_on_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    // The probe's 4,500 steps on raw pixels take most of the time.
    let smallest = TINY.iter().copied().chain(["augment.size=8", "data.limit=8"]);
    let smallest: Vec<&str> = smallest.collect();
    let settings = with_settings(&["demo", "--device", "cuda:0"], &smallest);
    let output = with_gpu(folder.path(), &settings);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let lines: Vec<&str> = text(&output.stdout).lines().collect();
    assert!(lines.len() == 6 && lines.iter().all(|line| line.ends_with('%')), "{lines:#?}");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_in_f32_trains_to_the_weights_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |device| {
        let settings: Vec<&str> = TINY.iter().copied().chain(["train.precision=f32"]).collect();
        let words = ["train", "demo", "--device", device, "--out", device];
        let output = with_gpu(folder.path(), &with_settings(&words, &settings));
        assert!(output.status.success(), "{}", text(&output.stderr));
        let data = std::fs::read(folder.path().join(text(&output.stdout).trim())).unwrap();
        let file = safetensors::SafeTensors::deserialize(&data).unwrap();
        let number = |b: &[u8]| f64::from(f32::from_le_bytes(b.try_into().unwrap()));
        let mut tensors: Vec<(String, Vec<f64>)> = file
            .tensors()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.data().chunks_exact(4).map(number).collect()))
            .collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    let compare = |(got, want): ((String, Vec<f64>), (String, Vec<f64>))| {
        assert_eq!(got.0, want.0);
        // After two steps, rounding that flips a ReLU may show in momentum, not in weights.
        let tolerance = if got.0.starts_with("momentum.") { 1e-2 } else { 1e-4 };
        close(&got.0, &got.1, &want.1, tolerance)
    };
    let results = weights("cuda").into_iter().zip(weights("cpu")).map(compare).collect();
    report("two steps on a GPU and on the CPU", results);
}

#[test]
fn recipes_studies_and_devices_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let names = selfsup(folder.path(), &["recipes"]);
    assert!(
        text(&names.stdout)
            .lines()
            .any(|line| line.starts_with("simclr-imagenet ") && line.contains("69.1% linear"))
    );
    let recipe = selfsup(folder.path(), &["recipes", "demo"]);
    let recipe = text(&recipe.stdout);
    for part in
        ["[method]\nname = \"simclr\"", "\n# deviation: ", "\n# steps: 780 of 64", "\n# measured: "]
    {
        assert!(recipe.contains(part), "{recipe}");
    }
    // What is printed is a recipe.
    selfsup::recipes::Recipe::parse(recipe, "stdout", &[]).unwrap();
    let studies = selfsup(folder.path(), &["study"]);
    assert!(text(&studies.stdout).contains("\nbyol-target: What may BYOL's target be?\n"));
    let devices = selfsup(folder.path(), &["devices"]);
    assert!(text(&devices.stdout).starts_with("cpu: "));
}

#[test]
fn a_missing_gpu_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let output = with_gpu(folder.path(), &["train", "demo", "--device", "cuda:77"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("there is no GPU 77"), "{said}");
    assert!(!folder.path().join("runs").exists(), "a refused run leaves a folder behind");
}

//! The program as a user runs it, on small runs.

use std::path::Path;
use std::process::{Command, Output};

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

/// The program: next to the test binary in a bundle (`scripts/gpu-bundle`), else where cargo built it.
pub fn program() -> Command {
    let bundled = std::env::current_exe().unwrap().with_file_name("selfsup");
    let built = Path::new(env!("CARGO_BIN_EXE_selfsup"));
    Command::new(if bundled.is_file() { &bundled } else { built })
}

pub fn selfsup(folder: &Path, words: &[&str]) -> Output {
    program().current_dir(folder).args(words).output().expect("the program starts")
}

fn with_settings<'a>(words: &[&'a str], settings: &[&'a str]) -> Vec<&'a str> {
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
fn the_demo_prints_its_six_lines_and_nothing_else_on_stdout() {
    let folder = tempfile::tempdir().unwrap();
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
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the demo leaves no files");
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
    assert!(text(&names.stdout).lines().any(|line| line == "simclr-imagenet"));
    let recipe = selfsup(folder.path(), &["recipes", "demo"]);
    assert!(text(&recipe.stdout).contains("[method]\nname = \"simclr\""));
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

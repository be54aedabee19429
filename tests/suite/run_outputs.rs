//! The files that a run writes for its user: the report with pictures, also after a stop; event files; a trace.

use std::path::Path;

use serde_json::Value;

use crate::driver::with_driver;
use crate::program::{program, selfsup, text};

const TINY: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "data.limit=64",
    "data.test_limit=40",
    "train.batch=16",
];

fn train(folder: &Path, words: &[&str], settings: &[&str]) -> std::process::Output {
    let set = TINY.iter().chain(settings).flat_map(|setting| ["--set", setting]);
    let all: Vec<&str> = ["train", "demo"].iter().chain(words).copied().chain(set).collect();
    selfsup(folder, &all)
}

/// The data of a report, as its script reads it.
fn data(page: &str) -> Value {
    let (_, rest) = page.split_once("id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn a_run_writes_a_report_with_pictures_and_event_files_for_tensorboard() {
    let root = tempfile::tempdir().unwrap();
    let settings = ["train.epochs=2", "train.knn_every=1", "watch.tensorboard=true"];
    let output = train(root.path(), &["--device", "cpu", "--out", "run"], &settings);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = std::fs::read_to_string(root.path().join("run/report.html")).unwrap();
    let run = &data(&page)["runs"][0];
    assert_eq!((run["epochs"].as_array().unwrap().len(), &run["stopped"]), (2, &Value::Null));
    assert!(run["epochs"][1]["uniformity"].as_f64().unwrap() <= 0.0);
    let quality = &run["epochs"][1]["quality"];
    assert!(quality["rank_me"].as_f64() > Some(1.0) && quality["lidar"].is_f64(), "{quality}");
    assert!((0.0..=1.0).contains(&quality["matched"].as_f64().unwrap()), "{quality}");
    assert!(!run["diagnosis"].as_array().unwrap().is_empty(), "{run}");
    for phase in ["training", "evaluation"] {
        assert!(run["epochs"][1]["seconds"][phase].as_f64().unwrap() > 0.0, "{phase}");
    }
    let gallery = &run["gallery"];
    assert_eq!(gallery["epoch"], 2);
    let points = gallery["map"]["points"].as_array().unwrap();
    assert_eq!((points.len(), points[0].as_array().unwrap().len()), (40, 4));
    assert_eq!(gallery["strips"]["rows"].as_array().unwrap().len(), 10);
    assert_eq!(gallery["strips"]["rows"][3]["near"].as_array().unwrap().len(), 8);
    // Every held-out image is in kNN's confusion matrix, and the diagonal gives the accuracy.
    let confusion = gallery["confusion"].as_array().unwrap();
    let sum = |right: bool| -> u64 {
        let those = confusion.iter().filter(|c| !right || c[0] == c[1]);
        those.map(|c| c[2].as_u64().unwrap()).sum()
    };
    assert_eq!(sum(false), 40);
    assert_eq!(run["epochs"][1]["knn"].as_f64().unwrap(), sum(true) as f64 / 40.0);
    for sheet in ["map", "strips", "views"] {
        let picture = gallery[sheet]["sheet"]["data"].as_str().unwrap();
        assert!(picture.starts_with("data:image/jpeg;base64,/9j/"), "{sheet}: {picture:.40}");
    }
    let events =
        |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().contains("tfevents");
    let files = std::fs::read_dir(root.path().join("run")).unwrap().map(Result::unwrap);
    assert_eq!(files.filter(events).count(), 1);
    let without = ["train.epochs=1", "watch.report=false"];
    let output = train(root.path(), &["--device", "cpu", "--out", "bare"], &without);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for name in ["report.html", "gallery.json"] {
        assert!(!root.path().join("bare").join(name).exists(), "{name}");
    }
}

#[test]
fn a_run_that_diverged_says_so_in_its_report() {
    let root = tempfile::tempdir().unwrap();
    let wrong = ["train.epochs=3", "optim.lr=1e9", "optim.warmup_epochs=0"];
    let output = train(root.path(), &["--device", "cpu", "--out", "run"], &wrong);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let page = std::fs::read_to_string(root.path().join("run/report.html")).unwrap();
    let stopped = data(&page)["runs"][0]["stopped"].as_str().unwrap().to_owned();
    assert!(text(&output.stderr).contains(&stopped), "{stopped}");
    let told = selfsup(root.path(), &["report", "run"]);
    assert_eq!(text(&told.stdout).trim(), "run/report.html");
    assert_eq!(selfsup(root.path(), &["report", "nowhere"]).status.code(), Some(2));
}

/// The spans of a row, sorted by begin.
fn spans(trace: &Value, row: &str) -> Vec<(String, f64, f64)> {
    let all = trace["traceEvents"].as_array().unwrap();
    let of = |event: &&Value| event["ph"] == "X" && event["cat"] == row;
    let span = |event: &Value| {
        let [begin, long] = ["ts", "dur"].map(|key| event[key].as_f64().unwrap());
        (event["name"].as_str().unwrap().to_owned(), begin, begin + long)
    };
    let mut found: Vec<_> = all.iter().filter(of).map(span).collect();
    found.sort_by(|a, b| a.1.total_cmp(&b.1));
    found
}

fn check_trace(trace: &Value) {
    let phases = spans(trace, "phases");
    let times = |name: &str| phases.iter().filter(|phase| phase.0 == name).count();
    for name in ["wait for images", "forward", "backward", "optimizer", "after the update"] {
        assert_eq!(times(name), 2, "{name}: {phases:?}");
    }
    let operations = spans(trace, "operations");
    for name in ["conv2d", "conv2d backward", "batch_norm", "nt_xent", "nt_xent backward"] {
        assert!(operations.iter().any(|operation| operation.0 == name), "{name}");
    }
    // Operations follow each other, and those of the backward pass lie in it.
    for pair in operations.windows(2) {
        assert!(pair[0].2 <= pair[1].1 + 1e-3, "{pair:?}");
    }
    for (name, begin, end) in operations.iter().filter(|(name, ..)| name.ends_with(" backward")) {
        let inside = |phase: &&(String, f64, f64)| phase.1 <= *begin && *end <= phase.2;
        let found: Vec<&str> = phases.iter().filter(inside).map(|phase| &*phase.0).collect();
        assert_eq!(found, ["backward"], "{name}");
    }
}

#[test]
fn a_trace_has_the_phases_and_operations_of_its_steps() {
    let root = tempfile::tempdir().unwrap();
    let words = ["--device", "cpu", "--out", "run", "--trace", "trace.json", "--trace-steps", "2"];
    let output = train(root.path(), &words, &["train.epochs=2"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("trace.json: 2 steps"), "{}", text(&output.stderr));
    let trace = std::fs::read(root.path().join("trace.json")).unwrap();
    let trace = serde_json::from_slice(&trace).unwrap();
    check_trace(&trace);
    assert_eq!(spans(&trace, "GPU kernels"), []);
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_trace_has_a_gpus_kernels_by_its_own_clock() {
    let root = tempfile::tempdir().unwrap();
    let words = [
        "train",
        "demo",
        "--device",
        "cuda",
        "--out",
        "run",
        "--trace",
        "trace.json",
        "--trace-steps",
        "2",
    ];
    let set = TINY
        .iter()
        .chain(&["train.epochs=2", "watch.quality=false"])
        .flat_map(|setting| ["--set", setting]);
    let mut command = program();
    with_driver(command.current_dir(root.path()).args(words).args(set));
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let trace = std::fs::read(root.path().join("trace.json")).unwrap();
    let trace: Value = serde_json::from_slice(&trace).unwrap();
    check_trace(&trace);
    let kernels = spans(&trace, "GPU kernels");
    for name in ["batch_norm_apply_bf16", "nt_xent_sums", "nt_xent_gradient_2"] {
        assert!(kernels.iter().any(|kernel| kernel.0 == name), "{name}");
    }
    for pair in kernels.windows(2) {
        assert!(pair[0].2 <= pair[1].1 + 1.0, "kernels of one stream follow each other: {pair:?}");
    }
}

//! `selfsup bench`: every case runs on the CPU and on a GPU, and `--paper` prints rooflines without a device. No test asserts a speed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use selfsup::arena::{Arena, Layout};
use selfsup::bench::{Bench, Chip, Extent, Peers, Unit, Work, cases};
use selfsup::device::{Device, Precision};
use selfsup::tensor::{DType, Tensor};
use selfsup::{ops, tape};
use serde_json::Value;

use crate::driver::{alone, gpu};
use crate::program::{selfsup, text};

/// One line of JSON for each case.
fn rows(words: &[&str]) -> Vec<Value> {
    let output = selfsup(Path::new("."), words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_case_runs_on_the_cpu() {
    let device = Device::cpu(2).unwrap();
    for case in cases(&Extent::TINY, DType::F32, "") {
        case.prepare(&device)();
    }
    let words = ["bench", "sinkhorn", "--tiny", "--json", "--device", "cpu", "--seconds", "0.001"];
    let rows = rows(&words);
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    let number = |key: &str| row[key].as_f64().unwrap();
    assert!(number("roofline") > 0.0 && number("share") > 0.0, "{row}");
    let [low, median, high] = [0, 1, 2].map(|i| row["hot"][i].as_f64().unwrap());
    assert!(0.0 < low && low <= median && median <= high, "{row}");
}

/// One case for each kernel is enough.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn cases_of_all_kernels_run_on_a_gpu() {
    let mut seen = BTreeSet::new();
    for (precision, dtype) in [(Precision::Bf16, DType::Bf16), (Precision::F32, DType::F32)] {
        let device = gpu(precision);
        for case in cases(&Extent::TINY, dtype, "") {
            let before = seen.len();
            seen.extend(case.launched.iter().map(|launched| launched.kernel.clone()));
            if seen.len() > before {
                case.prepare(&device)();
                device.wait();
                device.check().unwrap_or_else(|e| panic!("{}: {e}", case.name));
            }
        }
    }
}

/// What the host takes for launches is no time of a GPU: each case is captured, and timed by CUDA events around replays.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn cases_are_replayed_on_a_gpu() {
    alone("benches::cases_are_replayed_on_a_gpu", |driver| {
        driver.check(false);
        let chip = Chip { cache: 1 << 12, ..Chip::known("H200").unwrap() };
        let counts =
            || ["cuGraphLaunch", "cuLaunchKernel", "cuGraphExecDestroy"].map(|of| driver.count(of));
        let mut seen = BTreeSet::new();
        for (precision, dtype) in [(Precision::Bf16, DType::Bf16), (Precision::F32, DType::F32)] {
            let device = gpu(precision);
            let mut bench = Bench::against(&device, chip.clone(), Duration::from_nanos(1));
            for case in cases(&Extent::TINY, dtype, "") {
                let family = case.name.split(' ').next().unwrap().to_owned();
                let way = case.name.split(' ').nth(1).unwrap_or_default().to_owned();
                if !seen.insert((family, way)) {
                    continue;
                }
                let before = counts();
                let timing = case.measure(&mut bench, &device);
                let timing = timing.unwrap_or_else(|e| panic!("{}: {e}", case.name));
                let after = counts();
                let [replays, _, graphs] = [0, 1, 2].map(|i| after[i] - before[i]);
                assert!(timing.runs == 5 && timing.hot.median >= 0.0, "{}: {timing:?}", case.name);
                // Two and one before them, five hot and five cold.
                let want = if case.is_replayed() { (13, 2) } else { (0, 0) };
                assert_eq!((replays, graphs), want, "{}", case.name);
            }
        }
        assert!(seen.len() > 20, "{} kinds of cases", seen.len());
    });
}

/// A replayed case runs what a launched one does, as often as it says.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_replayed_run_counts_each_of_its_runs() {
    alone("benches::a_replayed_run_counts_each_of_its_runs", |driver| {
        driver.check(false);
        let device = gpu(Precision::F32);
        let chip = Chip { cache: 1 << 12, ..Chip::known("H200").unwrap() };
        let mut bench = Bench::against(&device, chip, Duration::from_nanos(1));
        let from = Tensor::from_slice(&device, [64], &[1.0_f32; 64]);
        let (mut launched, before) = (0, driver.count("kernel:relu_f32"));
        let arena = Arena::new(&Arc::new(Layout::new()), &device, 0);
        let timing = bench.measure_replayed(|| {
            launched += 1;
            tape::evaluate(&arena, |tape| ops::relu(&tape.input(&from))).unwrap();
        });
        let timing = timing.unwrap();
        let runs = driver.count("kernel:relu_f32") - before;
        // Two launched; one captured and replayed twice, and again cold; the rest in a graph of many, warmed up once.
        let many = launched - 3;
        assert_eq!(runs as usize, 2 + 2 + timing.runs + many * 6, "{launched} {timing:?}");
        assert!(many > 1, "a small kernel is many in a graph");
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_launched_case_is_timed_by_events() {
    let device = gpu(Precision::Bf16);
    let chip = Chip { cache: 1 << 12, ..Chip::known("H200").unwrap() };
    let mut bench = Bench::against(&device, chip, Duration::from_nanos(1));
    let case = &cases(&Extent::TINY, DType::Bf16, "soft_cross_entropy")[0];
    let timing = bench.measure(case.prepare(&device)).unwrap();
    assert!(timing.runs == 5 && timing.hot.median >= 0.0, "{timing:?}");
}

#[test]
fn paper_runs_without_a_device_and_a_filter_that_matches_nothing_is_an_error() {
    let all = rows(&["bench", "--paper", "--json"]);
    assert_eq!(all.len(), cases(&Extent::GPU, DType::Bf16, "").len());
    for row in all {
        let share = row["share"].as_f64().unwrap();
        assert!(share > 0.0 && share < 1.0, "{row}");
    }
    let output = selfsup(Path::new("."), &["bench", "conv2d", "sideways"]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(said.contains("no case has all of the words `conv2d sideways`"), "{said}");
}

/// Both libraries compute what the cases compute, so their tables of functions and our layouts are right; no speed is asserted.
#[test]
#[cfg_attr(no_peers, ignore = "needs reference libraries: run scripts/fetch-peers")]
fn reference_libraries_compute_the_same() {
    let words = ["bench", "--tiny", "--json", "--device", "cpu", "--threads", "2"];
    let against = ["--seconds", "0.001", "--against", "onednn", "--against", "blas"];
    let rows = rows(&[&words[..], &against[..]].concat());
    let (mut beside, mut lacking) = (0, 0);
    for row in &rows {
        if row["lacks"].is_string() {
            lacking += 1;
            continue;
        }
        beside += 1;
        assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
        for side in ["error", "peer_error"] {
            let [max, l2] = ["max", "l2"].map(|key| row[side][key].as_f64().unwrap());
            assert!(max < 1e-5 && l2 < 1e-5, "{row}");
        }
    }
    // All convolutions, and what else each has; a BLAS has the 1x1 layers of stride 1 and the linear ones.
    assert!(beside > 110 && lacking > 20, "{beside} cases beside a library, {lacking} without");
}

/// Compiles C++ to a shared object.
fn library(source: &Path, to: &Path) -> String {
    let mut compiler = std::process::Command::new("g++");
    let built = compiler.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-o"]).args([to, source]);
    assert!(built.status().expect("g++, which the stand-in driver needs too").success());
    to.display().to_string()
}

/// The libraries of a GPU are stand-ins, too: they show that operands, layouts and order of arguments are those of the headers, in
/// both precisions and for every kind of problem.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn libraries_of_a_gpu_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path =
        library(Path::new("tests/fixtures/gpu_libraries.cpp"), &folder.path().join("libcudnn.so"));
    let names = [format!("cudnn={path}"), format!("cublaslt={path}")];
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for (precision, dtype, tolerance) in
        [(Precision::F32, DType::F32, 1e-5), (Precision::Bf16, DType::Bf16, 2e-2)]
    {
        let device = gpu(precision);
        let peers = Peers::open(&names, &device).unwrap();
        assert_eq!(peers.names().collect::<Vec<_>>(), ["cuDNN 9.10.2", "cuBLASLt 13.0.2"]);
        let (mut seen, mut beside) = (BTreeSet::new(), [0, 0]);
        for case in cases(&Extent::TINY, dtype, "") {
            // One case of each kind and filter.
            let words = case
                .name
                .split_whitespace()
                .filter(|word| !word.contains("->") && !word.starts_with(char::is_numeric));
            let filter = case.name.split_whitespace().last().filter(|word| word.contains('/'));
            if !seen.insert(words.chain(filter).collect::<Vec<_>>().join(" ")) {
                continue;
            }
            for (i, compared) in
                peers.compare(&case, Duration::ZERO).unwrap().into_iter().enumerate()
            {
                let Ok(found) = compared.outcome else { continue };
                beside[i] += 1;
                assert!(found.ratio > 0.0, "{}: {found:?}", case.name);
                let [ours, theirs] = found.errors;
                assert!(ours.max < tolerance && ours.l2 < tolerance, "{}: {found:?}", case.name);
                // A ReLU of a sum that was rounded to bf16 may let a gradient pass that in f64 it does not: a few values are wrong.
                let few = if precision == Precision::Bf16 { 0.1 } else { tolerance };
                assert!(theirs.l2 < few, "{}: {found:?}", case.name);
            }
        }
        println!("{dtype:?}: {beside:?} cases beside cuDNN and cuBLASLt");
        assert!(beside[0] >= 18 && beside[1] >= 4, "{beside:?}");
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_library_of_a_gpu_that_cannot_serve_is_refused_in_one_sentence() {
    let (folder, device) = (tempfile::tempdir().unwrap(), gpu(Precision::Bf16));
    let said = |named: &str| Peers::open(&[named], &device).expect_err("no library").to_string();
    let made = |name: &str, text: &str| {
        let source = folder.path().join("library.cpp");
        std::fs::write(&source, text).unwrap();
        library(&source, &folder.path().join(name))
    };
    let refused = |named: &str, words: &str| {
        let said = said(named);
        assert!(said.contains(words) && !said.trim_end().contains('\n'), "{named}: {said}");
    };
    let other = made("other.so", "int other;");
    refused(&format!("cudnn={other}"), "other.so is no cuDNN: it lacks `cudnnGetVersion`");
    refused(&format!("cublaslt={other}"), "other.so lacks `cublasLtGetVersion`: it is no cuBLASLt");
    let version = |version: usize| {
        format!("extern \"C\" unsigned long cudnnGetVersion() {{ return {version}; }}")
    };
    refused(
        &format!("cudnn={}", made("old.so", &version(7605))),
        "is cuDNN 7.6.5; this program speaks to 8 and 9",
    );
    refused(
        &format!("cudnn={}", made("cut.so", &version(8907))),
        "is cuDNN 8.9.7, but lacks `cudnn",
    );
    let all = std::fs::read_to_string("tests/fixtures/gpu_libraries.cpp").unwrap();
    let idle = all.replace("return *handle = new int, OK;", "return *handle = nullptr, 1;");
    assert_ne!(idle, all);
    let idle = made("idle.so", &idle);
    refused(&format!("cudnn={idle}"), "cuDNN 9.10.2 cannot use GPU 0");
    refused(&format!("cublaslt={idle}"), "cuBLASLt 13.0.2 cannot use GPU 0");
    let old = made("old_lt.so", &all.replace("return 130002;", "return 110300;"));
    refused(
        &format!("cublaslt={old}"),
        "is cuBLASLt 11.3.0; this program speaks to 11.4.2 and later",
    );
    refused("cudnn=nowhere.so", "cuDNN: there is no file nowhere.so");
    refused("onednn", "--against onednn compares on the CPU in f32, and this is GPU 0");
}

#[test]
fn an_earlier_result_is_a_gate() {
    let folder = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| {
        let fixed = ["bench", "softmax", "--tiny", "--device", "cpu", "--seconds", "0.001"];
        selfsup(folder.path(), &[&fixed[..], words].concat())
    };
    let earlier = run(&["--json"]).stdout;
    std::fs::write(folder.path().join("earlier.json"), &earlier).unwrap();
    let beside = run(&["--against", "earlier.json", "--json", "--fail-below", "0.000001"]);
    assert!(beside.status.success(), "{}", text(&beside.stderr));
    let row: Value = serde_json::from_str(text(&beside.stdout).trim()).unwrap();
    assert!(row["ratio"].as_f64().unwrap() > 0.0 && row["noise"].as_f64().unwrap() >= 0.0, "{row}");

    let said = |words: &[&str], code: i32| {
        let output = run(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}");
        text(&output.stderr).to_owned()
    };
    let slow = said(&["--against", "earlier.json", "--fail-below", "1000000"], 1);
    assert!(slow.contains("1 of 1 cases are below 1000000: softmax"), "{slow}");
    std::fs::write(folder.path().join("other.json"), "{}\n").unwrap();
    let other = said(&["--against", "other.json"], 1);
    assert!(other.contains("other.json: line 1 is no result of `selfsup bench --json`"), "{other}");
    let bf16 = text(&earlier).replace("\"f32\"", "\"bf16\"");
    std::fs::write(folder.path().join("bf16.json"), bf16).unwrap();
    let bf16 = said(&["--against", "bf16.json"], 1);
    assert!(bf16.contains("has none of these cases in f32"), "{bf16}");
    let both = said(&["--against", "earlier.json", "--against", "onednn"], 2);
    assert!(both.contains("not with both at once"), "{both}");
    let nowhere = said(&["--against", "onednn=nowhere.so"], 1);
    assert!(nowhere.contains("oneDNN: there is no file nowhere.so"), "{nowhere}");
}

#[test]
fn a_custom_kernel_is_compared_with_the_same_roofline() {
    let device = Device::cpu(1).unwrap();
    let mut bench = Bench::new(&device, Duration::from_millis(1)).unwrap();
    let work = Work { operations: 1e3, bytes: 0.0 };
    let mut runs = 0;
    let timing = bench.measure(|| runs += 1).unwrap();
    // Once to warm up, once to estimate the number of runs, then hot and cold.
    assert_eq!(runs, 2 + 2 * timing.runs);
    let roofline = work.roofline(bench.chip(), Unit::Matrix);
    assert!((roofline - 1e3 / bench.chip().gemm).abs() < 1e-12);
    assert_eq!(bench.share(&work, Unit::Matrix, 2.0 * roofline), 0.5);
}

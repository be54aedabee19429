//! The self-test of a device, and that training runs its short form once for each GPU model.

use std::path::Path;
use std::process::Output;

use selfsup::check::{self, Verdict, WIDER};
use selfsup::device::{Device, Precision};

use crate::driver::{on_stand_in, with_driver};
use crate::golden::Goldens;
use crate::program::{program, with_settings};

#[test]
fn the_short_self_test_of_the_processor_finds_nothing_wrong() {
    for precision in [Precision::F32, Precision::Bf16] {
        let device = Device::cpu(2).unwrap().with_precision(precision).unwrap();
        let mut told = Vec::new();
        let report = check::quick(&device, &mut |part| told.push(part.clone()));
        println!("{}", report.text());
        assert!(report.passed(), "{}", report.text());
        assert_eq!(told, report.parts);
        let figure = report.parts.iter().find_map(|part| match &part.verdict {
            Verdict::Right(figure) if part.name.starts_with("primitives") => Some(figure.clone()),
            _ => None,
        });
        assert!(figure.unwrap().starts_with("28 primitives"), "{}", report.text());
    }
}

/// The program has no goldens, so it holds the tolerances that they widen.
#[test]
fn the_self_test_allows_what_the_suite_allows() {
    let goldens = Goldens::open("primitives");
    let mut wide: Vec<&str> = Vec::new();
    for name in goldens.names() {
        let tolerance = goldens.record(name).tolerance(1e-5);
        if tolerance > 1e-5 {
            let (_, allowed) =
                WIDER.iter().find(|(known, _)| *known == name).unwrap_or_else(|| {
                    panic!("{name} needs {tolerance:.1e}: a row in WIDER of src/check/mod.rs")
                });
            let fits = tolerance..=1.1 * tolerance;
            assert!(fits.contains(allowed), "{name}: {allowed:.1e} is not {tolerance:.1e}");
            wide.push(name);
        }
    }
    assert_eq!(wide.len(), WIDER.len(), "{wide:?}");
}

/// Trains one step on the GPU of this run with the self-test, and with this cache folder.
fn train(folder: &Path, out: &str, cache: &Path, fail: &str) -> Output {
    let settings = [
        "network.width=2",
        "method.hidden=8",
        "method.embedding=8",
        "augment.size=8",
        "data.limit=4",
        "data.test_limit=4",
        "train.epochs=1",
        "train.batch=4",
        "train.knn_every=0",
        "watch.quality=false",
        "watch.report=false",
    ];
    let words = with_settings(&["train", "demo", "--out", out, "--device", "cuda"], &settings);
    let mut program = program();
    if !fail.is_empty() {
        program.env("SELFSUP_STAND_IN_FAIL", fail);
    }
    with_driver(&mut program)
        .env_remove("SELFSUP_CHECK")
        .env("XDG_CACHE_HOME", cache)
        .current_dir(folder)
        .args(words)
        .output()
        .unwrap()
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn training_proves_a_gpu_model_once_and_refuses_one_that_computes_wrongly() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let proved = "first use of this GPU model";

    let first = train(folder.path(), "first", &cache, "");
    println!("{}", told(&first));
    assert!(first.status.success() && told(&first).contains(proved), "{}", told(&first));
    let remembered = std::fs::read_to_string(cache.join("selfsup/checked-gpus.txt")).unwrap();
    assert!(remembered.starts_with(&format!("selfsup {}, ", env!("CARGO_PKG_VERSION"))));
    let second = train(folder.path(), "second", &cache, "");
    assert!(second.status.success() && !told(&second).contains(proved), "{}", told(&second));

    on_stand_in(
        "check::training_proves_a_gpu_model_once_and_refuses_one_that_computes_wrongly",
        || {
            // A real GPU computes nothing wrong on request. A cache that cannot be written is no error; a kernel that fails is one,
            // before anything is trained.
            let nowhere = Path::new("/dev/null");
            let wrong = train(folder.path(), "wrong", nowhere, "kernel:conform_warp:1:719");
            let told = told(&wrong);
            assert!(
                told.contains("fails this program's self-test") && told.contains("warp"),
                "{told}"
            );
            assert_eq!(wrong.status.code(), Some(1), "{told}");
            assert!(!folder.path().join("wrong").exists(), "{told}");
        },
    );
}

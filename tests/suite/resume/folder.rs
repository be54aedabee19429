//! The folder of a run: its files are put right, and none of somebody else is replaced or written through.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use selfsup::device::Device;
use selfsup::train::{self, Paused, Run};

use super::{At, StopAt, epochs, on_images, write_split};

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

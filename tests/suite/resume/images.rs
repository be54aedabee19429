//! The images of a run: they break while it trains, cannot be read, are others when it is resumed, or choose its best checkpoint.

use std::path::Path;
use std::sync::Arc;

use selfsup::device::Device;
use selfsup::train::{self, Paused, Run};

use super::{At, StopAt, epochs, on_images, outcome, write_split};

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

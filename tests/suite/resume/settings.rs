//! The settings of a run: which may be others when it is resumed, and the precision of runs that did not note it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use selfsup::device::{Device, Precision};
use selfsup::train::{self, Paused, Run};

use super::{StopAt, on_images, write_split};

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

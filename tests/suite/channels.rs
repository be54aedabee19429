//! Images of other channels and bits than RGB of 8 bits, from the files to an exported network, through the program.

use std::path::Path;

use safetensors::SafeTensors;

use crate::driver::with_driver;
use crate::program::{program, selfsup, text};

/// An array of `[n, side, side, channels]` of 16 bits, with a pattern for each image.
fn stack(path: &Path, [n, side, channels]: [usize; 3]) {
    let shape = format!("({n}, {side}, {side}, {channels})");
    let header = format!("{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut file = b"\x93NUMPY\x01\0".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    for i in 0..n * side * side * channels {
        let (image, place) = (i / (side * side * channels), i % (side * side * channels));
        let (x, c) = (place / channels % side, place % channels);
        let value = (i * 7919 % 257) + 400 * ((x * (1 + image % 5) + c * image) % 9);
        file.extend((value as u16).to_le_bytes());
    }
    std::fs::write(path, file).unwrap();
}

/// Half an epoch's worth of steps of the smallest network.
const TINY: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "augment.pixels=float",
    "train.epochs=2",
    "train.batch=8",
    "train.checkpoint_every=1",
    "data.channels=4",
    "data.bits=16",
    "data.range=[0, 4095]",
    "data.axes=nhwc",
    "augment.jitter.per_channel=true",
    "augment.channel_drop=0.2",
];

fn with<'a>(words: &[&'a str], settings: &[&'a str]) -> Vec<&'a str> {
    words.iter().copied().chain(settings.iter().flat_map(|s| ["--set", s])).collect()
}

fn shape(file: &Path, name: &str) -> Vec<usize> {
    let bytes = std::fs::read(file).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().shape().to_vec()
}

#[test]
fn images_of_four_channels_of_16_bits_train_resume_embed_pack_and_export() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    std::fs::create_dir(at("bands")).unwrap();
    stack(&at("bands/a.npy"), [20, 20, 4]);
    let run = |words: &[&str]| {
        let output = selfsup(root.path(), words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stderr).to_owned()
    };
    let data = ["data.path=bands"];
    let settings: Vec<&str> = TINY.iter().chain(&data).copied().collect();
    let cpu = ["--device", "cpu"];
    run(&[&with(&["train", "demo", "--out", "run"], &settings)[..], &cpu].concat());
    // Resumed after the first epoch, it ends with the same bits.
    let end = std::fs::read(at("run/step-00000004.safetensors")).unwrap();
    let short = [&settings[..], &["train.epochs=2"]].concat();
    run(&[&with(&["train", "demo", "--out", "cut"], &short)[..], &cpu].concat());
    std::fs::remove_file(at("cut/step-00000004.safetensors")).unwrap();
    run(&["train", "--resume", "cut", "--device", "cpu"]);
    let again = std::fs::read(at("cut/step-00000004.safetensors")).unwrap();
    let weights = |file: &[u8]| {
        let file = SafeTensors::deserialize(file).unwrap();
        let name = "backbone.conv1.weight";
        file.tensor(name).unwrap().data().to_vec()
    };
    assert!(weights(&end) == weights(&again));
    assert_eq!(shape(&at("run/step-00000004.safetensors"), "backbone.conv1.weight"), [2, 4, 3, 3]);
    run(&["embed", "run", "bands", "--out", "features.safetensors", "--device", "cpu"]);
    assert_eq!(shape(&at("features.safetensors"), "features"), [20, 16]);
    run(&["export", "run", "--out", "backbone.safetensors"]);
    assert_eq!(shape(&at("backbone.safetensors"), "conv1.weight"), [2, 4, 3, 3]);
    run(&["export", "run", "--onnx", "--out", "backbone.onnx"]);
    // Packed, the same images give the same features.
    run(&["pack", "bands", "--out", "packed", "--set", "data.axes=nhwc"]);
    run(&["embed", "run", "packed", "--out", "again.safetensors", "--device", "cpu"]);
    let values = |name: &str| {
        let bytes = std::fs::read(at(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensor("features").unwrap().data().to_vec()
    };
    assert!(values("features.safetensors") == values("again.safetensors"));
    // Stretched when they are packed, they are not stretched again.
    let stretched = ["data.axes=nhwc", "data.range=[0, 4095]"];
    run(&with(&["pack", "bands", "--out", "stretched"], &stretched));
    run(&["embed", "run", "stretched", "--out", "same.safetensors", "--device", "cpu"]);
    assert!(values("features.safetensors") == values("same.safetensors"));
    let measured = |set: &str, settings: &[&str]| {
        let output = selfsup(root.path(), &with(&["stats", set, "--json"], settings));
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).to_owned()
    };
    let of_folder = measured("bands", &stretched);
    assert!(of_folder.contains(r#""range":[0.0,4095.0]"#), "{of_folder}");
    assert_eq!(measured("stretched", &stretched[1..]), of_folder);
    assert_eq!(measured("stretched", &[]), of_folder); // the pack knows its range
    let other = selfsup(root.path(), &with(&["stats", "stretched"], &["data.range=[0, 65535]"]));
    let said = text(&other.stderr);
    assert!(
        !other.status.success()
            && said.contains("stretched from data.range=[0, 4095] when they were packed"),
        "{said}"
    );
    // Weights over three channels start a run over four, and it is said how.
    let rgb = ["network.width=2", "method.hidden=8", "method.embedding=8", "augment.size=16"];
    let rgb =
        [&rgb[..], &["data.limit=16", "data.test_limit=8", "train.epochs=1", "train.batch=8"]]
            .concat();
    run(&[&with(&["train", "demo", "--out", "rgb"], &rgb)[..], &cpu].concat());
    run(&["export", "rgb", "--out", "rgb.safetensors"]);
    let init = [&settings[..], &["train.init=rgb.safetensors", "train.epochs=1"]].concat();
    let said = run(&[&with(&["train", "demo", "--out", "init"], &init)[..], &cpu].concat());
    assert!(said.contains("they are repeated in turn and scaled by 3/4"), "{said}");
}

#[test]
fn mistakes_about_channels_are_errors_before_the_first_step() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("bands")).unwrap();
    stack(&root.path().join("bands/a.npy"), [20, 8, 4]);
    let settings: Vec<&str> = TINY.iter().copied().chain(["data.path=bands"]).collect();
    for (setting, expected) in [
        ("augment.jitter.hue=0.1", "jitter.hue = 0.1 is defined for red, green and blue"),
        ("augment.pixels=u8", "need pixels = \"float\""),
        ("data.channels=5", "has 4 channels, and data.channels is 5"),
        ("data.bits=8", "data.range needs data.bits=16"),
        ("data.axes=hwc", "is an array [20, 8, 8, 4], and data.axes is \"hwc\""),
    ] {
        let output =
            selfsup(root.path(), &with(&["train", "demo"], &[&settings[..], &[setting]].concat()));
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{setting}: {said}");
    }
    let output = selfsup(root.path(), &["train", "bands", "--plan"]);
    let said = text(&output.stderr);
    assert!(said.contains("arrays are read if data.axes says what their axes are"), "{said}");
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn images_of_four_channels_train_on_a_gpu() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("bands")).unwrap();
    stack(&root.path().join("bands/a.npy"), [16, 12, 4]);
    let more = ["data.path=bands", "train.epochs=1", "watch.quality=false"];
    let settings: Vec<&str> = TINY.iter().chain(&more).copied().collect();
    let output = with_driver(&mut program())
        .current_dir(root.path())
        .args(with(&["train", "demo", "--out", "run"], &settings))
        .output()
        .expect("the program starts");
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("images: all 16 lie on the GPU, 18.0 KiB"), "{said}");
    let file = root.path().join("run/step-00000002.safetensors");
    assert_eq!(shape(&file, "backbone.conv1.weight"), [2, 4, 3, 3]);
}

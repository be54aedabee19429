//! Weight files that are damaged, of another network, or hold no numbers.

use std::path::Path;

use super::{Refused, check_refusals, run_on_hues, stopped_run, with_tiny, write};
use crate::program::{selfsup, text};

/// A safetensors file with this header, followed by `bytes` zeros.
fn weights(header: &str, bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    file
}

#[test]
fn mistakes_with_weight_files_end_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    stopped_run(&root.join("run"));
    let whole = std::fs::read(root.join("run/step-00000001.safetensors")).unwrap();
    let write = |name: &str, bytes: &[u8]| write(root, name, bytes);
    write("short.safetensors", &whole[..whole.len() - 7]);
    write("stub.safetensors", b"PK");
    write("text.safetensors", b"this is a text, not a file of weights");
    write("mixed/a.jpg", b"");
    let slot = |shape: &str, to: u64| {
        format!(
            "{{\"conv1.weight\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{to}]}}}}"
        )
    };
    write("vast.safetensors", &weights(&slot("[9223372036854775807,9,9,9]", 16), 16));
    write("small.safetensors", &weights(&slot("[2,3,3,3]", 16), 16));
    write("far.safetensors", &weights(&slot("[2,3,3,3]", 216), 16));
    write("other.safetensors", &weights(&slot("[2,3,3,3]", 216), 216));
    let init = |file: &'static str| ["train", "demo", "--out", "new", "--set", file];
    let cases: &[Refused] = &[
        (
            &init("train.init=none.safetensors"),
            1,
            "none.safetensors: No such file or directory (os error 2)",
        ),
        (
            &init("train.init=stub.safetensors"),
            1,
            "stub.safetensors: truncated or corrupt safetensors file: its length is 2 bytes",
        ),
        (
            &init("train.init=text.safetensors"),
            1,
            "text.safetensors: truncated or corrupt safetensors file: it declares a header of 2338328219631577204 bytes, but its length is 37 bytes",
        ),
        (
            &init("train.init=short.safetensors"),
            1,
            "short.safetensors: truncated or corrupt safetensors file: its header declares 93056 bytes of tensors, but 93049 follow it",
        ),
        (
            &init("train.init=vast.safetensors"),
            1,
            "vast.safetensors: truncated or corrupt safetensors file: its header cannot be read (overflow computing buffer size from shape and/or element type)",
        ),
        (
            &init("train.init=small.safetensors"),
            1,
            "small.safetensors: truncated or corrupt safetensors file: its header cannot be read (invalid shape, data type, or offset for tensor)",
        ),
        (
            &init("train.init=far.safetensors"),
            1,
            "far.safetensors: truncated or corrupt safetensors file: its header declares 216 bytes of tensors, but 16 follow it",
        ),
        (
            &init("train.init=other.safetensors"),
            1,
            "other.safetensors: conv1.weight is F32 [2, 3, 3, 3]; this network has F32 [16, 3, 3, 3]",
        ),
        (
            &init("train.init=run/step-00000001.safetensors"),
            1,
            "run/step-00000001.safetensors: backbone.conv1.weight is F32 [2, 3, 3, 3]; this network has F32 [16, 3, 3, 3]",
        ),
        (
            &["eval", "knn", "other.safetensors"],
            1,
            "other.safetensors: is not a checkpoint: its header has no selfsup.recipe",
        ),
        (
            &[
                "embed",
                "mixed",
                "--out",
                "x.npy",
                "--weights",
                "other.safetensors",
                "--arch",
                "vit",
            ],
            2,
            "unknown architecture vit; known architectures: resnet18, resnet34, resnet50, resnet101, resnet152, wide_resnet50_2, wide_resnet101_2",
        ),
        (
            &[
                "embed",
                "mixed",
                "--out",
                "x.npy",
                "--weights",
                "other.safetensors",
                "--arch",
                "resnet18",
            ],
            1,
            "other.safetensors: conv1.weight is F32 [2, 3, 3, 3]; this network has F32 [64, 3, 7, 7]",
        ),
    ];
    check_refusals(root, cases, &["new", "x.npy", "x.tsv"]);
}

/// Rewrites a safetensors file, the first values of a tensor changed.
fn change(from: &Path, to: &Path, name: &str, values: &[f32]) {
    let data = std::fs::read(from).unwrap();
    let file = safetensors::SafeTensors::deserialize(&data).unwrap();
    let tensor = file.tensor(name).unwrap().data().as_ptr();
    let at = tensor as usize - data.as_ptr() as usize;
    let mut changed = data.clone();
    for (place, value) in changed[at..].chunks_exact_mut(4).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    // As in a file of another program: a checksum would tell.
    if let Some(note) = changed.windows(13).position(|part| part == b"selfsup.crc32") {
        changed[note..note + 13].copy_from_slice(b"anothers.note");
    }
    std::fs::write(to, changed).unwrap();
}

#[test]
fn a_changed_bit_in_a_checkpoint_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    let checkpoint = root.join("run/step-00000006.safetensors");
    let mut bytes = std::fs::read(&checkpoint).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 0x10;
    std::fs::write(&checkpoint, bytes).unwrap();
    for words in [
        &["eval", "knn", "run", "--device", "cpu"][..],
        &["export", "run", "--out", "x.safetensors"],
        &["train", "--resume", "run", "--device", "cpu"],
        &["train", "demo", "--out", "new", "--set", "train.init=run/step-00000006.safetensors"],
    ] {
        let output = selfsup(root, words);
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{words:?}");
        let what = "step-00000006.safetensors: truncated or corrupt safetensors file: the checksum of its tensors is ";
        assert!(said.contains(what), "{words:?}: {said}");
        let remedy = "; remove it to resume from the one before it";
        assert_eq!(said.contains(remedy), words.contains(&"--resume"), "{said}");
    }
}

#[test]
fn weights_that_are_not_finite_give_no_figure() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    let whole = root.join("run/step-00000006.safetensors");
    let variance = "backbone.layer1.0.bn1.running_var";
    for (file, name, value, sentence) in [
        (
            "nan.safetensors",
            "backbone.conv1.weight",
            f32::NAN,
            "backbone.conv1.weight has 1 of 54 numbers that are NaN or infinite",
        ),
        (
            "infinite.safetensors",
            "backbone.bn1.weight",
            f32::INFINITY,
            "backbone.bn1.weight has 1 of 2 numbers that are NaN",
        ),
        (
            "variance.safetensors",
            variance,
            -0.5,
            "running_var is a running variance and negative (-0.5",
        ),
    ] {
        change(&whole, &root.join(file), name, &[value]);
        let init = format!("train.init={file}");
        let train =
            with_tiny(&["train", "demo", "--out", "new", "--device", "cpu", "--set", &init]);
        for words in [
            &["eval", "knn", file, "--device", "cpu"][..],
            &["eval", "linear", file, "--epochs", "1", "--device", "cpu"],
            &["eval", "finetune", file, "--device", "cpu"],
            &["embed", file, "hue", "--out", "x.npy", "--device", "cpu"],
            &["export", file, "--out", "x.safetensors"],
            &train,
        ] {
            let output = selfsup(root, words);
            let said = text(&output.stderr);
            let last = said.lines().last().unwrap_or_default();
            assert_eq!(
                (output.status.code(), output.stdout.len()),
                (Some(1), 0),
                "{words:?}: {said}"
            );
            assert!(last.contains(sentence) && !said.contains("panicked"), "{words:?}: {last}");
        }
    }
    for left in ["x.npy", "x.safetensors", "new"] {
        assert!(!root.join(left).exists(), "{left}");
    }
}

#[test]
fn a_figure_of_dead_features_is_called_chance() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    let whole = root.join("run/step-00000006.safetensors");
    change(&whole, &root.join("still.safetensors"), "backbone.bn1.weight", &[0.0; 2]);
    change(
        &root.join("still.safetensors"),
        &root.join("dead.safetensors"),
        "backbone.bn1.bias",
        &[-1.0; 2],
    );
    let told = "trained: all 24 training images have the same features (collapsed or dead)";
    for (file, dead) in [(whole.to_str().unwrap(), false), ("dead.safetensors", true)] {
        let output = selfsup(root, &["eval", "knn", file, "--device", "cpu"]);
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(said.contains(told), dead, "{file}: {said}");
    }
}

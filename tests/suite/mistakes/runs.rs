//! Folders of runs, and the outputs of commands: nothing is replaced or lost by mistake.

use std::fs::File;
use std::process::Command;

use super::{
    Refused, check_refusal, check_refusals, files, fixture, run_on_hues, stopped_run, write,
};
use crate::program::{selfsup, text};

/// A safetensors file of this header alone.
fn header(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

#[test]
fn mistakes_with_runs_end_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    stopped_run(&root.join("run"));
    let write = |name: &str, bytes: &[u8]| write(root, name, bytes);
    let recipe = std::fs::read(root.join("run/recipe.toml")).unwrap();
    for (name, note) in
        [("newer", "{\"__metadata__\":{\"selfsup.format\":\"2\"}}"), ("older", "{}")]
    {
        write(&format!("{name}/recipe.toml"), &recipe);
        write(&format!("{name}/step-00000001.safetensors"), &header(note));
    }
    write("alien/train-00000.pack", b"");
    (0..9).for_each(|i| write(&format!("nine/{i}.jpg"), &fixture("colour.jpg")));
    write("mixed/a.jpg", &fixture("colour.jpg"));
    let kept = files(&root.join("run"));
    let cases: &[Refused] = &[
        (
            &["train", "demo", "--out", "run"],
            1,
            "run: already holds a run: choose another --out, or continue it with --resume",
        ),
        (
            &["train", "demo", "--out", "alien"],
            1,
            "alien: holds other files, such as train-00000.pack: choose another --out",
        ),
        (
            &["train", "--resume", "mixed"],
            1,
            "mixed: holds no run to resume (it has no recipe.toml)",
        ),
        (
            &["train", "--resume", "run", "--set", "optim.lr=0.5"],
            2,
            "optim.lr was 0.4 and is now 0.5, which makes another run: start it with --out; a resumed run may change only data.path, data.max_skipped, data.gpu_memory, watch.* and, of train, threads, loader_threads, recompute, keep, dump_views, knn_every, checkpoint_every, checkpoint_every_steps and checkpoint_every_minutes",
        ),
        (
            &["train", "--resume", "run", "--set", "network.depth=34"],
            2,
            "network.depth was 18 and is now 34, which makes another run: start it with --out; a resumed run may change only data.path, data.max_skipped, data.gpu_memory, watch.* and, of train, threads, loader_threads, recompute, keep, dump_views, knn_every, checkpoint_every, checkpoint_every_steps and checkpoint_every_minutes",
        ),
        (
            &["train", "--resume", "run", "--set", "data.path=nine"],
            2,
            "nine: the run was started with 16 training images, and the set now has 9: restore the images, or start another run",
        ),
        (
            &["train", "--resume", "newer"],
            1,
            "newer/step-00000001.safetensors: has format 2, and this program reads 1: use the newer one that wrote it",
        ),
        (
            &["train", "--resume", "older"],
            1,
            "older/step-00000001.safetensors: is not a checkpoint to resume from: its header has no format version",
        ),
        (
            &["eval", "knn", "mixed"],
            2,
            "mixed: neither a run's folder (it has no recipe.toml) nor a checkpoint",
        ),
        (
            &["embed", "run", "mixed", "--out", "features.csv"],
            2,
            "features.csv: the file's name must end in .npy or .safetensors",
        ),
        (
            &["embed", "mixed", "--out", "features.npy"],
            2,
            "embed takes a run and a folder of images, or a folder of images with --weights and --arch",
        ),
    ];
    check_refusals(root, cases, &["runs", "features.csv", "features.npy"]);
    assert_eq!(
        files(&root.join("run")).keys().collect::<Vec<_>>(),
        kept.keys().collect::<Vec<_>>()
    );
}

/// A limit on the size of files simulates a full disk.
#[test]
fn a_full_disk_leaves_the_previous_checkpoint_intact() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    stopped_run(&run);
    let kept = files(&run)["step-00000001.safetensors"].clone();
    let words = "trap '' XFSZ; ulimit -f 16; exec \"$0\" train --resume run --device cpu";
    let output = Command::new("sh")
        .args(["-c", words, crate::program::path()])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let line = "run/step-00000004.safetensors: cannot be written (File too large (os error 27)): make room; files written earlier are complete";
    check_refusal(&output, &[words], 1, line).unwrap();
    let left = files(&run);
    let names: Vec<&str> = left.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [".lock", "metrics.jsonl", "recipe.toml", "report.html", "step-00000001.safetensors"]
    );
    assert!(left["step-00000001.safetensors"] == kept);
    let output = selfsup(folder.path(), &["train", "--resume", "run", "--device", "cpu"]);
    assert!(output.status.success(), "{}", text(&output.stderr));

    if let Ok(full) = File::options().write(true).open("/dev/full") {
        let output = Command::new(crate::program::path())
            .arg("recipes")
            .stdout(full.try_clone().unwrap())
            .output()
            .unwrap();
        let line = "standard output: No space left on device (os error 28)";
        check_refusal(&output, &["recipes"], 1, line).unwrap();
        for words in [&["--help"][..], &["--version"], &["train", "--help"]] {
            let full = full.try_clone().unwrap();
            let output =
                Command::new(crate::program::path()).args(words).stdout(full).output().unwrap();
            check_refusal(&output, words, 1, line).unwrap();
        }
    }
}

#[test]
fn outputs_are_checked_before_the_work_and_replace_only_their_own_kind() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    std::fs::write(root.join("precious.npy"), "precious").unwrap();
    std::fs::write(root.join("table.tsv"), "precious").unwrap();
    // An image or labels of somebody's, and weights from elsewhere.
    std::fs::write(root.join("array.npy"), b"\x93NUMPY\x01\0").unwrap();
    std::fs::write(root.join("theirs.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let before = files(&root.join("run"));
    let embed = |out: &'static str| vec!["embed", "run", "hue", "--device", "cpu", "--out", out];
    for (words, sentence) in [
        (embed("nowhere/f.npy"), "there is no folder nowhere: create it first"),
        (embed("f.csv"), "the file's name must end in .npy or .safetensors"),
        (embed("hue"), "the file's name must end in"),
        (embed("precious.npy"), "is there already, and another kind of file: choose another --out"),
        (embed("table.npy"), "table.tsv: is there already, and another kind of file"),
        (embed("array.npy"), "is there already, and nothing says that this program wrote it"),
        (embed("theirs.safetensors"), "nothing says that this program wrote it"),
        (
            vec!["export", "run", "--out", "theirs.safetensors"],
            "nothing says that this program wrote it: choose another --out",
        ),
        (embed("run/step-00000006.safetensors"), "is a run's checkpoint: choose another --out"),
        (
            vec!["export", "run", "--out", "run/step-00000006.safetensors"],
            "is a run's checkpoint: choose another --out",
        ),
        (
            vec!["export", "run", "--out", "run/recipe.toml"],
            "is there already, and another kind of file",
        ),
        (
            vec!["report", "run", "--out", "hue/train/ape/0.png"],
            "is there already, and another kind of file: choose another --out",
        ),
        (vec!["report", "run", "--out", "run/metrics.jsonl"], "another kind of file"),
        (vec!["report", "run", "--out", "hue"], "is a folder: name a file to write"),
        (vec!["report", "run", "--out", "no/r.html"], "there is no folder no: create it first"),
        (
            vec!["train", "demo", "--trace", "hue/train/ape/0.png", "--out", "new"],
            "another kind of file",
        ),
        (
            vec!["study", "simclr-head", "--out", "run"],
            "which this study did not write: choose another --out",
        ),
        (
            vec!["eval", "finetune", "run", "--out", "run", "--device", "cpu"],
            "already holds a run: choose another --out",
        ),
        (
            vec!["eval", "finetune", "run", "--out", "hue", "--device", "cpu"],
            "holds other files, such as ",
        ),
    ] {
        let output = selfsup(root, &words);
        let said = text(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{words:?}: {said}");
        assert!(said.lines().last().unwrap().contains(sentence), "{words:?}: {said}");
        let begun = ["images at", "\nepoch", "device: "].iter().any(|work| said.contains(work));
        assert!(!begun, "{words:?}: {said}");
    }
    assert_eq!(files(&root.join("run")), before);
    // What these commands have written themselves is replaced.
    let report = || vec!["report", "run", "--out", "r.html"];
    let export = || vec!["export", "run"];
    for words in [embed("f.npy"), embed("f.npy"), export(), export(), report(), report()] {
        let output = selfsup(root, &words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    }
}

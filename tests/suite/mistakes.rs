//! Every mistake and fault ends in one line that names the thing and the remedy, and an exit code; no file is left half
//! written.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use selfsup::data::{PackSettings, Stored, pack};
use selfsup::device::Device;
use selfsup::recipes::{Recipe, builtin_names};
use selfsup::train::{EpochReport, Run, StepReport, Watch};

use crate::program::{selfsup, text};

const TINY: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "data.limit=16",
    "data.test_limit=8",
    "train.epochs=2",
    "train.batch=8",
];

/// Stops a run after its first step.
struct Stop(Arc<AtomicBool>);

impl Watch for Stop {
    fn step(&mut self, _: &StepReport) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// Trains a run in its own folder and stops it after one step.
fn stopped_run(folder: &Path) {
    let settings: Vec<String> = TINY.iter().map(|setting| setting.to_string()).collect();
    let recipe = Recipe::load("demo", &settings).unwrap();
    let mut run = Run::new(&recipe, &Device::cpu(1).unwrap(), Some(folder)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    run.stop_when(stop.clone());
    run.train(&mut Stop(stop)).unwrap_err();
}

/// A safetensors file with this header, followed by `bytes` zeros.
fn weights(header: &str, bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    file
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(entry).collect()
}

/// Writes the files that the mistakes refer to.
fn prepare(root: &Path) {
    let write = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    stopped_run(&root.join("run"));
    let whole = std::fs::read(root.join("run/step-00000001.safetensors")).unwrap();
    write("bad.toml", b"seed = ");
    write("short.safetensors", &whole[..whole.len() - 7]);
    write("stub.safetensors", b"PK");
    write("text.safetensors", b"this is a text, not a file of weights");
    let slot = |shape: &str, to: u64| {
        format!(
            "{{\"conv1.weight\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{to}]}}}}"
        )
    };
    write("vast.safetensors", &weights(&slot("[9223372036854775807,9,9,9]", 16), 16));
    write("small.safetensors", &weights(&slot("[2,3,3,3]", 16), 16));
    write("far.safetensors", &weights(&slot("[2,3,3,3]", 216), 16));
    write("other.safetensors", &weights(&slot("[2,3,3,3]", 216), 216));
    write("newer/recipe.toml", &std::fs::read(root.join("run/recipe.toml")).unwrap());
    let note = "{\"__metadata__\":{\"selfsup.format\":\"2\"}}";
    write("newer/step-00000001.safetensors", &weights(note, 0));
    write("older/recipe.toml", &std::fs::read(root.join("run/recipe.toml")).unwrap());
    write("older/step-00000001.safetensors", &weights("{}", 0));
    let colour = fixture("colour.jpg");
    write("hollow/train/cat/a.jpg", &colour);
    std::fs::create_dir_all(root.join("hollow/train/dog")).unwrap();
    let mut bomb = fixture("grey.jpg");
    let frame = bomb.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    bomb[frame + 5..frame + 9].fill(0xFF);
    for (name, bytes) in [
        ("bomb", &*bomb),
        ("empty", b""),
        ("ends", &colour[..colour.len() - 6]),
        ("gif", b"GIF89a"),
        ("head", &colour[..30]),
    ] {
        write(&format!("broken/{name}.jpg"), bytes);
        write(&format!("mixed/{name}.jpg"), bytes);
    }
    (0..16).for_each(|i| write(&format!("mixed/good-{i}.jpg"), &colour));
    (0..9).for_each(|i| write(&format!("nine/{i}.jpg"), &colour));
    let stored = Stored::Files { quality: 95 };
    let settings = PackSettings { size: None, stored, file_bytes: 1 << 20 };
    pack(&root.join("nine"), &root.join("packed"), &settings, |_, _| ()).unwrap();
    let packed = std::fs::read(root.join("packed/train-00000.pack")).unwrap();
    write("cut/train-00000.pack", &packed[..packed.len() - 5]);
    write("alien/train-00000.pack", &[b' '; 99]);
    write("gap/train-00001.pack", &packed);
    write("future/train-00000.pack", &[&packed[..8], &[3], &packed[9..]].concat());
}

fn with_tiny<'a>(words: &[&'a str]) -> Vec<&'a str> {
    words.iter().copied().chain(TINY.iter().flat_map(|setting| ["--set", setting])).collect()
}

/// Fails unless the last line on stderr is `line`, stdout is empty, and the exit code is `code`.
fn check_refusal(output: &Output, words: &[&str], code: i32, line: &str) -> Result<(), String> {
    let said = text(&output.stderr);
    let last = said.lines().last().unwrap_or_default();
    let got = (last.strip_prefix("selfsup: ").unwrap_or(last), output.status.code());
    if got == (line, Some(code)) && !said.contains("panicked") && output.stdout.is_empty() {
        return Ok(());
    }
    Err(format!("{words:?}\n  got      {got:?}\n  expected {:?}", (line, Some(code))))
}

#[test]
fn every_mistake_ends_in_a_sentence_and_an_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let known = builtin_names().collect::<Vec<_>>().join(", ");
    let no_recipe = format!("no recipe file or built-in recipe no-such; built-in recipes: {known}");
    let no_builtin = format!("unknown recipe nothing; built-in recipes: {known}");
    let kept = files(&root.join("run"));
    let packed = std::fs::read(root.join("packed/train-00000.pack")).unwrap();
    let index_at = u64::from_le_bytes(packed[40..48].try_into().unwrap()) as usize;
    let cut = format!(
        "cut/train-00000.pack: is a truncated or corrupt pack file: its header announces an index of {} bytes at {index_at}, and it has {} bytes: copy the set again, or pack the images again",
        packed.len() - index_at,
        packed.len() - 5
    );
    let init = |file: &'static str| ["train", "demo", "--out", "new", "--set", file];
    let cases: &[(&[&str], i32, &str)] = &[
        (&["train", "no-such"], 2, &no_recipe),
        (&["recipes", "nothing"], 2, &no_builtin),
        (
            &["train", "bad.toml"],
            1,
            "bad.toml: not valid TOML: TOML parse error at line 1, column 8; string values must be quoted, expected literal string",
        ),
        (
            &["train", "demo", "--set", "train.epoch=1"],
            2,
            "recipe: unknown field `epoch`, expected one of `epochs`, `batch`, `micro_batches`, `knn_every`, `checkpoint_every`, `checkpoint_every_steps`, `checkpoint_every_minutes`, `keep`, `precision`, `dump_views`, `threads`, `loader_threads`, `init`; in `train` (did you mean `epochs`?)",
        ),
        (
            &["train", "demo", "--set", "train.epochs"],
            2,
            "--set takes key.path=value, such as train.epochs=5, not train.epochs",
        ),
        (
            &["train", "demo", "--set", "train.batch=20000"],
            2,
            "a batch of 20000 is larger than the set of 10000 images: lower the batch size",
        ),
        (
            &["train", "demo", "--set", "data.path=nowhere"],
            1,
            "nowhere: no such file or folder: check the path of the data set",
        ),
        (
            &["train", "demo", "--set", "data.path=hollow"],
            1,
            "hollow/train/dog: is a class folder without images (jpg, jpeg, jpe, jfif, png) in it: fill it or remove it",
        ),
        (
            &["train", "demo", "--set", "data.path=broken", "--set", "train.batch=2"],
            1,
            "broken: none of its 5 training images can be read; the first: broken/bomb.jpg: has 65535 x 65535 pixels; the limit is 178956970 in all",
        ),
        (
            &[
                "train",
                "supervised-cifar10-small",
                "--device",
                "cpu",
                "--set",
                "data.path=fashion-scattered",
                "--set",
                "method.classes=3",
            ],
            2,
            "an image has class 9, and method.classes is 3: supervised training needs a labelled set",
        ),
        (
            &["train", "demo", "--set", "data.path=alien"],
            1,
            "alien/train-00000.pack: is a truncated or corrupt pack file: it does not begin as one: copy the set again, or pack the images again",
        ),
        (
            &["train", "demo", "--set", "data.path=future"],
            1,
            "future/train-00000.pack: has format 3, and this program reads up to 2: read it with the program that wrote it, or pack the images again",
        ),
        (
            &["train", "demo", "--set", "data.path=gap"],
            1,
            "gap/train-00000.pack: is missing: copy the set again, or pack the images again",
        ),
        (&["train", "demo", "--set", "data.path=cut"], 1, &cut),
        (
            &["pack", "nine", "--out", "packed"],
            1,
            "packed: is not empty: choose another folder to pack into, or empty it",
        ),
        (
            &["pack", "nine", "--out", "bad.toml"],
            1,
            "bad.toml: is a file: choose another folder to pack into",
        ),
        (
            &["pack", "nowhere", "--out", "new"],
            1,
            "nowhere: no such folder: check the path of the images",
        ),
        (
            &["pack", "broken", "--out", "new"],
            1,
            "broken: none of its 5 images can be read; the first: broken/bomb.jpg: has 65535 x 65535 pixels; the limit is 178956970 in all",
        ),
        (
            &["train", "demo", "--set", "method.name=simcrl"],
            2,
            "unknown method simcrl; known methods: byol, distill, moco, simclr, simclr-v2, simsiam, supervised, swav",
        ),
        (
            &["train", "demo", "--out", "run"],
            1,
            "run: already holds a run: choose another --out, or continue it with --resume",
        ),
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
            "optim.lr was 0.4 and is now 0.5, which makes another run: start it with --out; a resumed run may change only data.path, data.max_skipped, watch.* and, of train, threads, loader_threads, keep, dump_views, knn_every, checkpoint_every, checkpoint_every_steps and checkpoint_every_minutes",
        ),
        (
            &["train", "--resume", "run", "--set", "network.depth=34"],
            2,
            "network.depth was 18 and is now 34, which makes another run: start it with --out; a resumed run may change only data.path, data.max_skipped, watch.* and, of train, threads, loader_threads, keep, dump_views, knn_every, checkpoint_every, checkpoint_every_steps and checkpoint_every_minutes",
        ),
        (
            &["train", "--resume", "run", "--set", "data.path=nine"],
            2,
            "nine: the run was started with 16 training images, and the set now has 9: restore the images, or start another run",
        ),
        (
            &["train", "--resume", "newer"],
            1,
            "newer/step-00000001.safetensors: has format 2, and this program reads 1: resume with the newer one that wrote it",
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
            &["eval", "knn", "other.safetensors"],
            1,
            "other.safetensors: is not a checkpoint: its header has no selfsup.recipe",
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
    let wrong: Vec<String> = cases
        .iter()
        .filter_map(|(words, code, line)| {
            check_refusal(&selfsup(root, words), words, *code, line).err()
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(
        files(&root.join("run")).keys().collect::<Vec<_>>(),
        kept.keys().collect::<Vec<_>>()
    );
    for left in [
        "runs/demo",
        "runs/supervised-cifar10-small",
        "new",
        "x.npy",
        "x.tsv",
        "features.csv",
        "features.npy",
    ] {
        assert!(!root.join(left).exists(), "a refused command leaves {left} behind");
    }
    for (words, sentence) in [
        (&["train", "demo", "--device", "gpu"][..], "expected cpu, cuda or cuda:N with N from 0"),
        (&["train", "demo", "--set", "train.precision=fp8"], "unknown variant `fp8`"),
        (&["eval", "knn", "run", "--k", "0"], "0 is not in 1.."),
        (&["pack", "nine", "--out", "x", "--quality", "80"], "not provided"),
        (&["pack", "nine", "--out", "x", "--raw", "--quality", "80"], "cannot be used with"),
        (&["train"], "the following required arguments were not provided"),
        (&["train", "demo", "--resume", "run"], "cannot be used with"),
        (&["fly"], "unrecognized subcommand 'fly'"),
    ] {
        let output = selfsup(root, words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(sentence) && output.stdout.is_empty(), "{words:?}: {said}");
    }
}

#[test]
fn broken_images_are_skipped_counted_and_named_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    prepare(folder.path());
    let ours = ["data.path=mixed", "data.limit=0", "data.max_skipped=1", "train.batch=7"]
        .map(|setting| ["--set", setting])
        .concat();
    let train = with_tiny(&["train", "demo", "--device", "cpu", "--out", "new"]);
    let output = selfsup(folder.path(), &[&train[..], &ours].concat());
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let mut skipped: Vec<&str> =
        said.lines().filter(|line| line.starts_with("skipped image ")).collect();
    skipped.sort_unstable(); // those that the first epoch met come first
    let expected = [
        "skipped image 0: mixed/bomb.jpg: has 65535 x 65535 pixels; the limit is 178956970 in all",
        "skipped image 1: mixed/empty.jpg: is empty (0 bytes)",
        "skipped image 20: mixed/head.jpg: is a JPEG file that ends early: copy or download it again",
        "skipped image 2: mixed/ends.jpg: is a JPEG file that ends early: copy or download it again",
        "skipped image 3: mixed/gif.jpg: is neither a JPEG nor a PNG file",
    ];
    assert_eq!(skipped, expected, "{said}");
    let list = std::fs::read_to_string(folder.path().join("new/skipped.txt")).unwrap();
    assert_eq!(list.lines().count(), 5, "{list}");
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
        .args(["-c", words, env!("CARGO_BIN_EXE_selfsup")])
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
        let output = Command::new(env!("CARGO_BIN_EXE_selfsup"))
            .arg("recipes")
            .stdout(full)
            .output()
            .unwrap();
        let line = "standard output: No space left on device (os error 28)";
        check_refusal(&output, &["recipes"], 1, line).unwrap();
    }
}

#[test]
fn a_run_can_be_told_to_carry_on() {
    let folder = tempfile::tempdir().unwrap();
    let wild = ["optim.lr=1e30", "optim.warmup_epochs=0"].map(|setting| ["--set", setting]);
    let train = |more: &[&'static str]| {
        let words = [&["train", "demo", "--device", "cpu"], &wild.concat()[..], more].concat();
        selfsup(folder.path(), &with_tiny(&words))
    };
    let output = train(&["--out", "a"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    let advice = ": lower optim.lr or lengthen optim.warmup_epochs; watch.carry_on=true continues all the same";
    assert!(last.starts_with("selfsup: the loss became ") && last.ends_with(advice), "{said}");
    let output = train(&["--out", "b", "--set", "watch.carry_on=true"]);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("\nthe loss became "), "{said}");
}

/// Three classes that any measure tells apart, by their hue: 8 training and 4 held-out images of each.
fn hues(root: &Path) {
    for (part, count) in [("train", 8), ("test", 4)] {
        for (class, colour) in
            [("ape", [220, 40, 40]), ("bee", [40, 220, 40]), ("cow", [40, 40, 220])]
        {
            let folder = root.join(part).join(class);
            std::fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let pixel = |x: u32, y: u32| {
                    image::Rgb(colour.map(|c: u8| c - 30 + ((7 * x + 13 * y + 5 * i) % 60) as u8))
                };
                let image = image::RgbImage::from_fn(24, 24, pixel);
                image.save(folder.join(format!("{i}.png"))).unwrap();
            }
        }
    }
}

/// Trains a run on `hues` in the folder `run`.
fn run_on_hues(root: &Path) {
    hues(&root.join("hue"));
    let own =
        ["data.path=hue", "watch.collapsed_std=0", "watch.collapsed_rank=0", "watch.diverged=0"];
    let own = own.iter().flat_map(|setting| ["--set", setting]);
    let words = ["train", "demo", "--device", "cpu", "--out", "run"];
    let words: Vec<&str> = with_tiny(&words).into_iter().chain(own).collect();
    let words = [&words[..], &["--set", "data.limit=0", "--set", "data.test_limit=0"]].concat();
    let output = selfsup(root, &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

fn spoil(root: &Path, part: &str, count: usize) {
    let mut spoilt = 0;
    for class in ["ape", "bee", "cow"] {
        for i in 0..8 {
            let path = root.join(part).join(class).join(format!("{i}.png"));
            if path.exists() && spoilt < count {
                std::fs::write(&path, "no image").unwrap();
                spoilt += 1;
            }
        }
    }
    assert_eq!(spoilt, count);
}

const EVALUATIONS: [&[&str]; 3] = [
    &["eval", "knn", "run", "--k", "5"],
    &["eval", "linear", "run", "--epochs", "1"],
    &["eval", "finetune", "run", "--set", "train.epochs=1", "--set", "train.batch=8"],
];

#[test]
fn an_evaluation_counts_only_what_it_has_read() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    let evaluate = |words: &[&str], set: &str, more: &[&str]| {
        let set = format!("data.path={set}");
        let words = [words, &["--device", "cpu", "--set", &set], more].concat();
        let output = selfsup(root, &words);
        let said = text(&output.stderr).to_owned();
        assert!(!said.contains("panicked"), "{words:?}: {said}");
        (output.status.code(), text(&output.stdout).to_owned(), said)
    };
    // No part, no labels, no readable image: a sentence and no figure.
    for (name, part, count) in [("no-test", "test", 12), ("no-train", "train", 24)] {
        hues(&root.join(name));
        spoil(&root.join(name), part, count);
    }
    hues(&root.join("only-train"));
    std::fs::remove_dir_all(root.join("only-train/test")).unwrap();
    hues(&root.join("flat-test"));
    for class in ["ape", "bee", "cow"] {
        let part = root.join("flat-test/test");
        std::fs::rename(part.join(class).join("0.png"), part.join(format!("{class}.png"))).unwrap();
        std::fs::remove_dir_all(part.join(class)).unwrap();
    }
    for words in EVALUATIONS {
        for (set, sentence) in [
            ("no-test", "images can be read; the first: "),
            ("no-train", "images can be read; the first: "),
            ("only-train", "evaluation needs labelled held-out images"),
            ("flat-test", "label"),
            ("gone", "no such file or folder"),
        ] {
            let (code, figures, said) = evaluate(words, set, &[]);
            assert!(matches!(code, Some(1 | 2)), "{words:?} of {set}: {code:?}, {said}");
            assert_eq!(figures, "", "{words:?} of {set}");
            let last = said.lines().last().unwrap();
            assert!(last.contains(sentence), "{words:?} of {set}: {last}");
        }
    }
    // Three of twelve cannot be read: counted, named, listed; an error, unless that many are allowed.
    hues(&root.join("some"));
    spoil(&root.join("some"), "test", 3);
    for words in EVALUATIONS {
        let (code, figures, said) = evaluate(words, "some", &[]);
        assert_eq!((code, &*figures), (Some(1), ""), "{words:?}: {said}");
        assert!(
            said.contains("9 of 12 held-out images; 3 could not be read:\n"),
            "{words:?}: {said}"
        );
        assert!(
            said.contains("ape/1.png") && said.ends_with("or allow it with --max-skipped 0.25\n"),
            "{said}"
        );
        let list = std::fs::read_to_string(root.join("run/eval-skipped.txt")).unwrap();
        assert_eq!(list.lines().count(), 3, "{list}");
        let (code, figures, said) = evaluate(words, "some", &["--max-skipped", "0.25"]);
        assert_eq!(code, Some(0), "{words:?}: {said}");
        assert!(figures.lines().count() >= 2, "{words:?}: {figures}");
    }
    let (_, _, said) = evaluate(EVALUATIONS[0], "some", &["--max-skipped", "0.25"]);
    assert!(said.contains("24 training and 9 held-out images"), "{said}");
    let (_, json, _) = evaluate(EVALUATIONS[0], "some", &["--max-skipped", "0.25", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["held_out"], &json["skipped"]["held_out"]), (&9.into(), &3.into()), "{json}");
    // The other commands likewise.
    hues(&root.join("many"));
    spoil(&root.join("many"), "train", 12);
    for (words, left) in [
        (&["embed", "run", "many", "--out", "f.npy", "--device", "cpu"][..], "f.npy"),
        (&["pack", "many", "--out", "packed"], "packed"),
    ] {
        let output = selfsup(root, words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(
            said.contains(" could not be read:\n") && said.contains("\n  2 more; the list is in "),
            "{said}"
        );
        assert!(!root.join(left).exists(), "{words:?} leaves {left} behind");
        let output = selfsup(root, &[words, &["--max-skipped", "0.5"]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(root.join(left).exists());
    }
}

/// Rewrites a safetensors file, the values of a tensor changed.
fn change(from: &Path, to: &Path, name: &str, value: f32) {
    let data = std::fs::read(from).unwrap();
    let file = safetensors::SafeTensors::deserialize(&data).unwrap();
    let tensor = file.tensor(name).unwrap().data().as_ptr();
    let at = tensor as usize - data.as_ptr() as usize;
    let mut changed = data.clone();
    changed[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(to, changed).unwrap();
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
        change(&whole, &root.join(file), name, value);
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
fn outputs_are_checked_before_the_work_and_replace_only_their_own_kind() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    std::fs::write(root.join("precious.npy"), "precious").unwrap();
    std::fs::write(root.join("table.tsv"), "precious").unwrap();
    let before = files(&root.join("run"));
    let embed = |out: &'static str| vec!["embed", "run", "hue", "--device", "cpu", "--out", out];
    for (words, sentence) in [
        (embed("nowhere/f.npy"), "there is no folder nowhere: create it first"),
        (embed("f.csv"), "the file's name must end in .npy or .safetensors"),
        (embed("hue"), "the file's name must end in"),
        (embed("precious.npy"), "is there already, and another kind of file: choose another --out"),
        (embed("table.npy"), "table.tsv: is there already, and another kind of file"),
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
            vec!["eval", "finetune", "run", "--out", "run", "--device", "cpu"],
            "already holds a run: choose another --out",
        ),
        (
            vec!["eval", "finetune", "run", "--out", "hue", "--device", "cpu"],
            "is not empty: choose another --out",
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
    for words in [embed("f.npy"), embed("f.npy"), vec!["export", "run"], vec!["export", "run"]] {
        let output = selfsup(root, &words);
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    }
}

#[test]
fn settings_of_the_environment_and_of_the_shell_are_understood_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    hues(&root.join("2024"));
    let train = |set: &str, home: &Path| {
        let words = with_tiny(&["train", "demo", "--device", "cpu"]);
        let own = ["--set", set, "--out", "run", "--set", "train.epochs=1"];
        let _ = std::fs::remove_dir_all(root.join("run"));
        let output = Command::new(env!("CARGO_BIN_EXE_selfsup"))
            .current_dir(root)
            .env("HOME", home)
            .args([&words[..], &own].concat())
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr).to_owned())
    };
    for set in ["data.path=2024", "data.path=~/2024"] {
        let (code, said) = train(set, root);
        assert_eq!(code, Some(0), "{set}: {said}");
    }
    let deep = format!("{}=1", vec!["a"; 20_000].join("."));
    for (set, sentence) in [
        (&*deep, "the key has 20000 parts"),
        ("train.threads=1000000", "train.threads is 1000000; it must be at most 1024"),
        ("train.loader_threads=99999", "train.loader_threads is 99999; it must be at most 1024"),
    ] {
        let (code, said) = train(set, root);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(sentence) && !said.contains("panicked"), "{said}");
    }
    for (isa, sentence) in [
        ("avx1024", "SELFSUP_ISA is `avx1024`; it must be portable, avx2 or avx512"),
        ("", "SELFSUP_ISA is ``; it must be"),
    ] {
        let program = || {
            let mut program = Command::new(env!("CARGO_BIN_EXE_selfsup"));
            program.current_dir(root).env("SELFSUP_ISA", isa);
            program
        };
        for words in [&["devices"][..], &["demo"], &["bench", "conv2d"]] {
            let output = program().args(words).output().unwrap();
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
            assert!(said.contains(sentence) && !said.contains("panicked"), "{words:?}: {said}");
        }
    }
}

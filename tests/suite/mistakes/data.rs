//! Folders, packs and images that are damaged, empty or not what they seem.

use std::path::Path;

use selfsup::data::{PackSettings, Stored, pack};

use super::{Refused, check_refusals, fixture, hues, run_on_hues, with_tiny, write};
use crate::program::{selfsup, text};

/// Writes folders of images, of which some or all are broken.
fn prepare(root: &Path) {
    let write = |name: &str, bytes: &[u8]| write(root, name, bytes);
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
}

/// Writes packs, whole and damaged; returns the line that says what is wrong with `cut`.
fn prepare_packs(root: &Path) -> String {
    let write = |name: &str, bytes: &[u8]| write(root, name, bytes);
    (0..9).for_each(|i| write(&format!("nine/{i}.jpg"), &fixture("colour.jpg")));
    let stored = Stored::Files { quality: 95 };
    let settings = PackSettings {
        reading: Default::default(),
        labels: None,
        size: None,
        stored,
        file_bytes: 1 << 20,
    };
    pack(&root.join("nine"), &root.join("packed"), &settings, |_, _| ()).unwrap();
    let packed = std::fs::read(root.join("packed/train-00000.pack")).unwrap();
    write("cut/train-00000.pack", &packed[..packed.len() - 5]);
    write("alien/train-00000.pack", &[b' '; 99]);
    write("gap/train-00001.pack", &packed);
    write("future/train-00000.pack", &[&packed[..8], &[4], &packed[9..]].concat());
    let index_at = u64::from_le_bytes(packed[40..48].try_into().unwrap()) as usize;
    format!(
        "cut/train-00000.pack: is a truncated or corrupt pack file: its header announces an index of {} bytes at {index_at}, and it has {} bytes: copy the set again, or pack the images again",
        packed.len() - index_at,
        packed.len() - 5
    )
}

#[test]
fn mistakes_with_data_sets_end_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    write(root, "bad.toml", b"seed = ");
    #[cfg(unix)]
    std::os::unix::fs::symlink("nowhere/at/all", root.join("dangling")).unwrap();
    let cut = prepare_packs(root);
    let cases: &[Refused] = &[
        (
            &["train", "demo", "--set", "data.path=nowhere"],
            1,
            "nowhere: no such file or folder: check the path of the data set",
        ),
        (
            &["train", "demo", "--set", "data.path=hollow"],
            1,
            "hollow/train/dog: is a class folder without images (jpg, jpeg, jpe, jfif, png, tif, tiff, webp, bmp) in it: fill it or remove it",
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
            "an image has class 9, counted from 0, and method.classes is 3: set it to the number of classes",
        ),
        (
            &["train", "demo", "--set", "data.path=alien"],
            1,
            "alien/train-00000.pack: is a truncated or corrupt pack file: it does not begin as one: copy the set again, or pack the images again",
        ),
        (
            &["train", "demo", "--set", "data.path=future"],
            1,
            "future/train-00000.pack: has format 4, and this program reads up to 3: read it with the program that wrote it, or pack the images again",
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
            &["pack", "nine", "--out", "dangling"],
            1,
            "dangling: is a link to a folder that is missing: create that folder, or remove the link",
        ),
        (
            &[
                "train",
                "demo",
                "--set",
                "data.path=nine",
                "--set",
                "train.batch=8",
                "--out",
                "dangling",
            ],
            1,
            "dangling: is a link to a folder that is missing: create that folder, or remove the link",
        ),
        (
            &["pack", "nowhere", "--out", "new"],
            1,
            "nowhere: no such folder: check the path of the images",
        ),
        (
            &["pack", "broken/bomb.jpg", "--out", "new"],
            1,
            "broken/bomb.jpg: is a file: name the folder that the images are in",
        ),
        (
            &["pack", "broken", "--out", "new"],
            1,
            "broken: none of its 5 images can be read; the first: broken/bomb.jpg: has 65535 x 65535 pixels; the limit is 178956970 in all",
        ),
    ];
    check_refusals(root, cases, &["runs", "new"]);
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
        "skipped image 3: mixed/gif.jpg: is no JPEG, PNG, WebP, BMP or TIFF file",
    ];
    assert_eq!(skipped, expected, "{said}");
    let list = std::fs::read_to_string(folder.path().join("new/skipped.txt")).unwrap();
    assert_eq!(list.lines().count(), 5, "{list}");
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
            (
                "only-train",
                "evaluation needs labelled held-out images: class folders in test/ or val/, or data.path=SET for a set that has them",
            ),
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

/// Copies a folder of folders of files.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() { copy(&path, &to) } else { assert!(std::fs::copy(&path, to).is_ok()) }
    }
}

/// The number that a table of embedded images has for a class.
fn number_of(table: &Path, class: &str) -> Vec<String> {
    let table = std::fs::read_to_string(table).unwrap();
    let rows = table.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let mut numbers: Vec<String> =
        rows.filter(|row| row[2] == class).map(|row| row[1].to_owned()).collect();
    numbers.dedup();
    numbers
}

#[test]
fn a_class_keeps_its_number_where_a_part_lacks_one_or_has_one_more() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    run_on_hues(root);
    let [less, more, alike] = ["less", "more", "alike"].map(|name| {
        copy(&root.join("hue"), &root.join(name));
        root.join(name).join("test")
    });
    std::fs::remove_dir_all(less.join("ape")).unwrap();
    copy(&more.join("ape"), &more.join("aaa"));
    std::fs::rename(alike.join("ape"), alike.join("Ape")).unwrap();
    let eval = |set: &str| {
        let set = format!("data.path={set}");
        selfsup(root, &["eval", "knn", "run", "--k", "5", "--device", "cpu", "--set", &set])
    };
    // All colours are told apart; four of the sixteen images of `more` have a class without training images.
    for (set, line) in
        [("hue", "100.0%"), ("less", "100.0%"), ("more", "75.0%"), ("hue/../less", "100.0%")]
    {
        let output = eval(set);
        let figures = text(&output.stdout);
        assert!(figures.contains(&format!("kNN raw pixels: {line}\n")), "{set}: {figures}");
        let told = text(&output.stderr).contains("class aaa has no training images: 4 images");
        assert_eq!(told, set == "more", "{}", text(&output.stderr));
    }
    let output = eval("alike");
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
    assert!(said.contains("has class Ape, and the train split has class ape"), "{said}");
    let packed = selfsup(root, &["pack", "less", "--out", "packed"]);
    assert!(packed.status.success(), "{}", text(&packed.stderr));
    for set in ["less", "more", "packed"] {
        for split in ["train", "test"] {
            let words =
                ["embed", "run", set, "--split", split, "--out", "f.npy", "--device", "cpu"];
            let output = selfsup(root, &words);
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert_eq!(number_of(&root.join("f.tsv"), "bee"), ["1"], "{set}, {split}");
        }
    }
}

#[test]
fn a_run_in_the_folder_of_its_images_is_resumed_and_its_pictures_are_no_images() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    (0..9).for_each(|i| write(root, &format!("{i}.jpg"), &fixture("colour.jpg")));
    let own =
        ["data.path=.", "watch.collapsed_std=0", "watch.collapsed_rank=0", "train.dump_views=1"];
    let own = own.iter().flat_map(|setting| ["--set", setting]);
    let train: Vec<&str> = with_tiny(&["train", "demo"]).into_iter().chain(own).collect();
    let resume = ["train", "--resume", "runs/demo"];
    let embed = ["embed", "runs/demo", ".", "--out", "f.npy"];
    for words in [&train[..], &resume, &embed] {
        let output = selfsup(root, &[words, &["--device", "cpu"]].concat());
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    }
    let table = std::fs::read_to_string(root.join("f.tsv")).unwrap();
    let files: Vec<&str> =
        table.lines().skip(1).map(|line| line.split('\t').next().unwrap()).collect();
    assert_eq!(files, (0..9).map(|i| format!("{i}.jpg")).collect::<Vec<_>>());
}

/// ImageNet's validation images come without class folders: a run on such a set is trained to its end.
#[test]
fn a_held_out_part_without_labels_costs_no_run() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    hues(&root.join("set"));
    for (i, class) in ["ape", "bee", "cow"].iter().enumerate() {
        let part = root.join("set/test");
        std::fs::rename(part.join(class).join("0.png"), part.join(format!("{i}.png"))).unwrap();
        std::fs::remove_dir_all(part.join(class)).unwrap();
    }
    let own = ["data.path=set", "data.limit=0", "watch.collapsed_std=0", "watch.collapsed_rank=0"];
    let own: Vec<&str> = own.iter().flat_map(|setting| ["--set", setting]).collect();
    let words = with_tiny(&["train", "demo", "--device", "cpu", "--out", "run"]);
    let output = selfsup(root, &[&words[..], &own].concat());
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("have no labels, so nothing is"), "{said}");
    assert_eq!(text(&output.stdout), "run/step-00000006.safetensors\n");
}

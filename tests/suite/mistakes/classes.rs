//! A classifier's outputs mean the classes that it was trained on, or it starts anew, or is refused.

use std::path::Path;

use super::{check_refusals, hues};
use crate::program::{selfsup, text, with_settings};

const SUPERVISED: &[&str] = &[
    "network.width=2",
    "method.classes=3",
    "augment.size=16",
    "data.path=set",
    "data.limit=0",
    "data.test_limit=0",
    "train.epochs=12",
    "train.batch=8",
];

fn said(root: &Path, words: &[&str]) -> [String; 2] {
    let output = selfsup(root, words);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    [&output.stdout, &output.stderr].map(|said| text(said).to_owned())
}

/// A supervised run in `teacher` on three classes of hues in `set`, and the same images in `renamed`, where `ape` is `zebra`.
fn teacher(root: &Path) {
    for set in ["set", "renamed"] {
        hues(&root.join(set));
    }
    for part in ["train", "test"] {
        let ape = root.join("renamed").join(part).join("ape");
        std::fs::rename(&ape, ape.with_file_name("zebra")).unwrap();
    }
    let words = ["train", "supervised-cifar10-small", "--device", "cpu", "--out", "teacher"];
    said(root, &with_settings(&words, SUPERVISED));
}

#[test]
fn a_fine_tuned_classifier_is_a_new_one() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    teacher(root);
    for set in ["set", "renamed"] {
        // At a rate of 0 nothing is learnt: a classifier of zeros takes one class for all.
        let settings = ["optim.lr=0", "train.epochs=1", &format!("data.path={set}")];
        let words = ["eval", "finetune", "teacher", "--protocol", "simclr-v2", "--device", "cpu"];
        let [found, told] = said(root, &with_settings(&words, &settings));
        assert!(found.contains("fine-tuned trained: 33.3%"), "{set}: {found}");
        assert!(told.contains("loss 1.099"), "{set}: {told}");
    }
    // A run starts from a classifier of as many classes, and without one of others.
    let weights =
        std::fs::read_dir(root.join("teacher")).unwrap().map(|entry| entry.unwrap().path());
    let weights = weights.filter(|path| path.to_string_lossy().contains("step-")).max().unwrap();
    let init = format!("train.init={}", weights.display());
    let still = ["optim.lr=0", "train.epochs=1", &init];
    let words = ["train", "supervised-cifar10-small", "--device", "cpu", "--out", "again"];
    let words = with_settings(&words, SUPERVISED);
    let [_, told] = said(root, &with_settings(&words, &still));
    assert!(!told.contains("its classifier"), "{told}");
    std::fs::remove_dir_all(root.join("again")).unwrap();
    let [_, told] =
        said(root, &with_settings(&with_settings(&words, &still), &["method.classes=5"]));
    let sentence = "its classifier tells 3 classes apart, and this run 5: a new one is trained";
    assert!(told.contains(sentence), "{told}");
    std::fs::remove_dir_all(root.join("again")).unwrap();
    let renamed = with_settings(&words, &["data.path=renamed"]);
    let [_, told] = said(root, &with_settings(&renamed, &still));
    let sentence = "its classifier was trained with class 0 \"ape\", which is \"bee\" here: a new one is trained";
    assert!(told.contains(sentence), "{told}");
}

#[test]
fn a_student_has_its_teachers_classes_and_pixels() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    teacher(root);
    let mut weights = std::fs::read_dir(root.join("teacher")).unwrap();
    let weights = weights.find_map(|entry| {
        let path = entry.unwrap().path();
        path.to_string_lossy().contains("step-").then_some(path)
    });
    let weights = weights.unwrap();
    let weights = weights.strip_prefix(root).unwrap().display();
    let file = format!("method.teacher.file={weights}");
    let settings = [
        "network.width=2",
        "method.student.classes=3",
        "method.teacher.network.width=2",
        "method.teacher.network.zero_init_residual=false",
        "method.teacher.head_layers=0",
        "augment.size=16",
        "data.limit=0",
        "data.test_limit=0",
        "train.epochs=1",
        "train.batch=8",
        &file,
    ];
    let words = ["train", "simclr-v2-distill-cifar10-small", "--device", "cpu", "--out", "student"];
    let student = with_settings(&words, &settings);
    let renamed = with_settings(&student, &["data.path=renamed"]);
    let classes = format!(
        "{weights}: the teacher was trained with class 0 \"ape\", which is \"bee\" here: a student learns its classes in their order, so \
         train it on images of the same classes or of none"
    );
    let other = ["data.path=set", "augment.0.normalise={mean=[0.5,0.5,0.5],std=[0.5,0.5,0.5]}"];
    let other = with_settings(&student, &other);
    let pixels = format!(
        "{weights}: the teacher was trained on pixels normalised by mean [0.4914, 0.4822, 0.4465] and std [0.2023, 0.1994, 0.201], and \
         sees the student's, which are normalised by mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]: set augment.0.normalise as it was"
    );
    check_refusals(root, &[(&renamed, 1, &classes), (&other, 1, &pixels)], &["student"]);
    said(root, &with_settings(&student, &["data.path=set"]));
}

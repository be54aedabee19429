//! Recognises the data set at a path.

use std::path::Path;

use super::cifar::Cifar;
use super::folder::Folder;
use super::idx::Idx;
use super::listing::class_names;
use super::pack::Pack;
use super::source::{Source, Split};
use crate::error::{Error, Result};

/// Names of the folders that may hold a split.
pub(super) fn folders(split: Split) -> &'static [&'static str] {
    match split {
        Split::Train => &["train"],
        Split::Test => &["test", "val", "valid"],
    }
}

/// Opens the images of a split at `path`: what [`super::pack`] wrote, CIFAR-10 or CIFAR-100 binary files, idx files, a folder
/// that holds `train/` and `test/` (or `val/`, `valid/`), or a folder of class folders or of images without labels, which is a
/// training split.
///
/// Classes are numbered by name, alike for all splits of a set: the training split's classes come first, classes that only
/// the held-out split has follow, and [`Source::notes`] names them.
///
/// # Errors
/// If nothing is there, nothing is recognised, the split is missing, what is recognised is damaged, or the splits' classes
/// differ by case only or altogether.
pub fn open(path: &Path, split: Split) -> Result<Box<dyn Source>> {
    if !path.exists() {
        return Err(Error::format(path, "no such file or folder: check the path of the data set"));
    }
    if !path.is_dir() {
        return Err(not_recognised(path, "is a file; name the folder it lies in"));
    }
    if Pack::is_at(path) {
        return Ok(Box::new(Pack::open(path, split)?));
    }
    if Cifar::is_at(path) {
        return Ok(Box::new(Cifar::open(path, split)?));
    }
    if Idx::is_at(path) {
        return Ok(Box::new(Idx::open(path, split)?));
    }
    let holds =
        |split| folders(split).iter().map(|name| path.join(name)).find(|folder| folder.is_dir());
    if let Some(folder) = holds(split) {
        let images = Folder::open(&folder)?;
        return Ok(Box::new(match holds(Split::Train) {
            Some(train) if split != Split::Train => {
                images.with_classes_of(&folder, &class_names(&train)?)?
            }
            _ => images,
        }));
    }
    if holds(Split::Train).or(holds(Split::Test)).is_some() {
        let names: Vec<_> = folders(split).iter().map(|name| format!("{name}/")).collect();
        return Err(Error::format(
            path,
            format!("has no {}: the {split} split is missing", names.join(" or ")),
        ));
    }
    let folder = Folder::open(path)
        .map_err(|e| not_recognised(path, &format!("is not a data set ({e})")))?;
    match (split, folder.classes().is_empty()) {
        (Split::Train, _) => Ok(Box::new(folder)),
        (Split::Test, true) => Err(Error::format(
            path,
            "is a folder of images without labels, which has a train split only: evaluate on another set",
        )),
        (Split::Test, false) => Err(Error::format(
            path,
            "has class folders but no test/, val/ or valid/: put the class folders into train/ and test/ to hold some out",
        )),
    }
}

fn not_recognised(path: &Path, what: &str) -> Error {
    let reason = format!(
        "{what}; recognised are: a folder with train/ and test/ (or val/, valid/), each with a folder of JPEG or PNG files per class; \
         what `selfsup pack` wrote; the CIFAR-10 or CIFAR-100 binary files; idx files (train-images-idx3-ubyte[.gz] and so on); \
         a folder of class folders, or of images without labels (train split only)"
    );
    Error::format(path, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path, bytes: &[u8]) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn every_layout_is_recognised() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let mut record = vec![3; 3073];
        record[0] = 9;
        touch(&at("cifar/data_batch_1.bin"), &record);
        touch(&at("cifar/cifar-10-batches-bin/x"), b"");
        touch(&at("cifar/test_batch.bin"), &record);
        touch(
            &at("idx/t10k-images-idx3-ubyte"),
            &[0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7],
        );
        touch(&at("folders/val/cat/a.jpg"), b"");
        touch(&at("folders/train/cat/a.jpg"), b"");
        touch(&at("classes/cat/a.jpg"), b"");
        touch(&at("flat/a.png"), b"");
        touch(&at("flat/b.png"), b"");
        for (name, split, length, classes) in [
            ("cifar", Split::Test, 1, 10),
            ("idx", Split::Test, 1, 0),
            ("folders", Split::Test, 1, 1),
            ("folders", Split::Train, 1, 1),
            ("classes", Split::Train, 1, 1),
            ("flat", Split::Train, 2, 0),
        ] {
            let set = open(&at(name), split).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!((set.len(), set.classes().len()), (length, classes), "{name}");
        }
    }

    #[test]
    fn all_parts_number_classes_by_the_names_of_the_training_part() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for name in ["train/ape", "train/bee", "train/cow", "valid/aaa", "valid/bee", "valid/cow"] {
            touch(&at(&format!("set/{name}/1.png")), b"");
        }
        let [train, test] =
            [Split::Train, Split::Test].map(|split| open(&at("set"), split).unwrap());
        let labels = |set: &dyn Source| -> Vec<_> {
            (0..set.len()).map(|i| set.label(i).unwrap()).collect()
        };
        assert_eq!((labels(&*train), labels(&*test)), (vec![0, 1, 2], vec![3, 1, 2]));
        assert_eq!((train.classes().len(), test.classes()[3].as_str()), (3, "aaa"));
        assert!(
            test.notes()[0]
                .ends_with("class aaa has no training images: 1 images count as never right")
        );
        touch(&at("set/valid/Ape/1.png"), b"");
        let said = open(&at("set"), Split::Test).err().unwrap().to_string();
        assert!(said.contains("has class Ape, and the train split has class ape"), "{said}");
    }

    #[test]
    fn the_message_for_an_unknown_folder_lists_the_known_layouts() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        touch(&at("text/readme.txt"), b"hello");
        touch(&at("only-train/train/cat/a.jpg"), b"");
        touch(&at("flat/a.png"), b"");
        touch(&at("classes/cat/a.jpg"), b"");
        for (name, split, expected) in [
            ("nowhere", Split::Train, "nowhere: no such file or folder"),
            (
                "text",
                Split::Train,
                "recognised are: a folder with train/ and test/ (or val/, valid/)",
            ),
            ("flat/a.png", Split::Train, "is a file; name the folder it lies in"),
            (
                "only-train",
                Split::Test,
                "has no test/ or val/ or valid/: the test split is missing",
            ),
            ("flat", Split::Test, "has a train split only"),
            ("classes", Split::Test, "put the class folders into train/ and test/"),
        ] {
            let message = open(&at(name), split).err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

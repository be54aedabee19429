//! Recognises the data set at a path.

use std::path::{Path, PathBuf};

use super::cifar::Cifar;
use super::decode::Reading;
use super::folder::Folder;
use super::idx::Idx;
use super::listing::{
    Listing, class_names, has_loose_images, name_of, seems_to_hold_images, sub_folders,
};
use super::pack::Pack;
use super::source::{Format, Source, Split};
use super::table::LabelTable;
use crate::error::{Error, Result, printable};
use crate::files::{find, is_folder};

/// Names of the folders that may hold a split.
pub(super) fn folders(split: Split) -> &'static [&'static str] {
    match split {
        Split::Train => &["train"],
        Split::Test => &["test", "val", "valid", "validation"],
    }
}

/// Names of all folders that may hold a split.
const SPLITS: [&str; 5] = ["train", "test", "val", "valid", "validation"];

/// Names that others give to the splits of a set, in lower case, without what separates words and without a year behind.
const LIKE_SPLITS: [&[&str]; 2] = [
    &["train", "training", "trainset", "trainingset", "trainimages", "trainingimages", "trainval"],
    &[
        "test",
        "testing",
        "testset",
        "testimages",
        "val",
        "valid",
        "validation",
        "valset",
        "valimages",
        "validationset",
        "holdout",
        "heldout",
        "dev",
        "eval",
        "evaluation",
    ],
];

/// The folders of a set's splits.
pub(super) struct SplitFolders {
    pub(super) train: Option<PathBuf>,
    /// The held-out split comes first; others of its kind are not used.
    pub(super) held_out: Vec<PathBuf>,
    /// Folders next to the splits that hold images.
    beside: Vec<PathBuf>,
}

impl SplitFolders {
    /// Finds the folders of a set's splits; `None` if there are none, so that the folder itself is the training split.
    ///
    /// Of several folders that may be the held-out split, the first with classes is: ImageNet's test images come without
    /// labels, its validation images have them.
    ///
    /// # Errors
    /// If the folders cannot be read, or it is unclear which of them are splits.
    pub(super) fn of(path: &Path) -> Result<Option<Self>> {
        let there = |split| -> Result<Vec<PathBuf>> {
            let all = folders(split).iter().map(|name| path.join(name));
            all.filter_map(|folder| match is_folder(&folder) {
                Ok(there) => there.then_some(Ok(folder)),
                Err(error) => Some(Err(error)),
            })
            .collect()
        };
        let train = there(Split::Train)?.into_iter().next();
        let mut held_out = there(Split::Test)?;
        let mut beside = sub_folders(path)?;
        beside.retain(|folder| !SPLITS.iter().any(|part| *folder == path.join(part)));
        if train.is_none() && held_out.is_empty() {
            return like_splits(path, &beside).map_or(Ok(None), Err);
        }
        beside.retain(|folder| seems_to_hold_images(folder));
        if held_out.len() > 1 {
            let has_classes =
                |folder: &PathBuf| class_names(folder, false).is_ok_and(|c| !c.is_empty());
            held_out.sort_by_key(|folder| !has_classes(folder));
        }
        if let (Some(train), [], [other, ..]) = (&train, &*held_out, &*beside)
            && has_loose_images(train)?
        {
            let reason = format!(
                "has folders of images train/ and {}/: is `train` the training split, or a class? Name the folder train/ itself as the set, \
                 or put the class folders into a folder train/",
                name_of(other)
            );
            return Err(Error::format(path, reason));
        }
        Ok(Some(Self { train, held_out, beside }))
    }

    /// The folder of a split, if there is one.
    fn folder(&self, split: Split) -> Option<&Path> {
        match split {
            Split::Train => self.train.as_deref(),
            Split::Test => self.held_out.first().map(PathBuf::as_path),
        }
    }

    /// Opens the folder of a split with the classes of a table, which may name images of the others, too.
    pub(super) fn labelled(
        &self,
        folder: &Path,
        reading: &Reading,
        table: &LabelTable,
    ) -> Result<Folder> {
        let mut others = Vec::new();
        for other in self.train.iter().chain(&self.held_out).filter(|other| *other != folder) {
            let listed = Listing::of(other, reading.axes.is_some())?.files;
            others.extend(listed.iter().map(|(file, _)| printable(file.as_os_str())));
        }
        Folder::open_as(folder, reading)?.labelled_by(table, &others, None)
    }

    /// A sentence on the folders of images that are no splits.
    pub(super) fn note(&self) -> Option<String> {
        let first = printable(self.beside.first()?.as_os_str());
        let count = self.beside.len();
        Some(format!(
            "folders of images next to the splits, which are not read: {count}, such as {first}"
        ))
    }
}

/// A sentence on splits that could be the held-out one; the first of them is.
pub(super) fn not_used(mut splits: impl Iterator<Item = String>) -> Option<String> {
    let (first, other) = (splits.next()?, splits.next()?);
    let others: Vec<String> = [other].into_iter().chain(splits).collect();
    let (others, are) = match &others[..] {
        [one] => (one.clone(), "is"),
        all => (all.join(", "), "are"),
    };
    Some(format!("{first} is the held-out split, and {others} {are} not read"))
}

/// The error of a folder in which folders have names like those of splits, of both or all of them: read as classes, training images
/// and held-out ones would be mixed.
fn like_splits(path: &Path, folders: &[PathBuf]) -> Option<Error> {
    let names: Vec<String> = folders.iter().map(|folder| name_of(folder)).collect();
    let is_like = |name: &str, split: usize| {
        let name = name.to_lowercase().replace(['_', '-', ' '], "");
        LIKE_SPLITS[split].contains(&name.trim_end_matches(|c: char| c.is_ascii_digit()))
    };
    let [train, held_out] = [0, 1].map(|split| names.iter().any(|name| is_like(name, split)));
    let all = names.iter().all(|name| is_like(name, 0) || is_like(name, 1));
    if !train || !(all || held_out) {
        return None;
    }
    let reason = format!(
        "has folders with names like those of a set's splits ({}): rename them to train/ and test/ (or val/, validation/) if they are the splits; \
         if they are classes, put them into a folder train/",
        names.join(", ")
    );
    Some(Error::format(path, reason))
}

/// Opens the images of a split at `path`: what [`super::pack`] wrote, CIFAR-10 or CIFAR-100 binary files, idx files, a folder
/// that holds `train/` and `test/` (or `val/`, `valid/`, `validation/`), or a folder of class folders or of images without
/// labels, which is a training split.
///
/// Classes are numbered by name, alike for all splits of a set: the training split's classes come first, classes that only
/// the held-out split has follow, and [`Source::notes`] names them.
///
/// # Errors
/// If nothing is there, nothing is recognised, the split is missing, what is recognised is damaged, or the splits' classes
/// differ by case only or altogether.
pub fn open(path: &Path, split: Split) -> Result<Box<dyn Source>> {
    open_as(path, split, &Reading::default())
}

/// As [`open`], with images of the channels and bits that a reading asks for.
///
/// # Errors
/// As [`open`], and if the set has other channels or bits.
pub fn open_as(path: &Path, split: Split, reading: &Reading) -> Result<Box<dyn Source>> {
    open_labelled(path, split, reading, None)
}

/// As [`open_as`], with the classes of a table in place of those of folders; images without a class there are left out. In a folder
/// without splits a column of the table may say which images are held out.
///
/// # Errors
/// As [`open_as`]; if the set is no folder of image files, a row of the table names several images, two rows give an image different
/// classes, or no row names an image of the split.
pub fn open_labelled(
    path: &Path,
    split: Split,
    reading: &Reading,
    table: Option<&LabelTable>,
) -> Result<Box<dyn Source>> {
    reading.check()?;
    let source = match table {
        None => recognised(path, split, reading)?,
        Some(table) => labelled(path, split, reading, table)?,
    };
    let (has, wanted) = (source.format(), reading.format);
    if has != wanted {
        let Format { channels, bits } = has;
        return Err(Error::format(
            path,
            format!(
                "has images of {has}, and {wanted} are asked for: set data.channels={channels} and data.bits={bits}"
            ),
        ));
    }
    Ok(source)
}

/// Opens a split of a folder whose classes stand in a table.
fn labelled(
    path: &Path,
    split: Split,
    reading: &Reading,
    table: &LabelTable,
) -> Result<Box<dyn Source>> {
    let found = find(path)?.ok_or_else(|| nothing_at(path))?;
    if !found.is_dir() || Pack::is_at(path)? || Cifar::is_at(path)? || Idx::is_at(path)? {
        return Err(Error::format(
            path,
            "has no image files of its own, which a table of labels names: leave data.labels out, or set data.labels= to nothing",
        ));
    }
    let of_split: &dyn Fn(Split) -> Result<Folder> = match SplitFolders::of(path)? {
        Some(splits) => &move |split| {
            let folder = splits.folder(split).ok_or_else(|| without(path, split))?;
            splits.labelled(folder, reading, table)
        },
        None if !table.has_splits() && split == Split::Test => {
            return Err(Error::format(
                path,
                "has no test/, val/, valid/ or validation/, and the table of labels no column `split`: the test split is missing",
            ));
        }
        None => &|split| labelled_part(path, split, reading, table),
    };
    let images = of_split(split)?;
    if split == Split::Train {
        return Ok(Box::new(images));
    }
    match of_split(Split::Train) {
        Ok(training) => Ok(Box::new(images.beside(&training, table)?)),
        Err(error @ Error::Io { .. }) => Err(error),
        // Without training images there is nothing to compare with; who needs them opens them.
        Err(_) => Ok(Box::new(images)),
    }
}

/// Opens the images of a folder without splits that a table says belong to one; all with a class if it does not say.
pub(super) fn labelled_part(
    path: &Path,
    split: Split,
    reading: &Reading,
    table: &LabelTable,
) -> Result<Folder> {
    let split = table.has_splits().then_some(split);
    Folder::open_as(path, reading)?.labelled_by(table, &[], split)
}

fn nothing_at(path: &Path) -> Error {
    Error::format(path, "no such file or folder: check the path of the data set")
}

fn without(path: &Path, split: Split) -> Error {
    let names: Vec<_> = folders(split).iter().map(|name| format!("{name}/")).collect();
    Error::format(path, format!("has no {}: the {split} split is missing", names.join(" or ")))
}

fn recognised(path: &Path, split: Split, reading: &Reading) -> Result<Box<dyn Source>> {
    if path.as_os_str().is_empty() {
        return Err(Error::config("data.path is empty: name the folder of the images"));
    }
    let Some(found) = find(path)? else {
        return Err(nothing_at(path));
    };
    if !found.is_dir() {
        return Err(not_recognised(path, "is a file; name the folder it lies in"));
    }
    if Pack::is_at(path)? {
        alone(path, "a pack")?;
        return Ok(Box::new(Pack::open(path, split)?.in_range(path, reading.range)?));
    }
    if Cifar::is_at(path)? {
        alone(path, "CIFAR's binary files")?;
        return Ok(Box::new(Cifar::open(path, split)?));
    }
    if Idx::is_at(path)? {
        alone(path, "idx files")?;
        return Ok(Box::new(Idx::open(path, split)?));
    }
    if let Some(splits) = SplitFolders::of(path)? {
        let Some(folder) = splits.folder(split) else { return Err(without(path, split)) };
        let mut images = Folder::open_as(folder, reading)?;
        if split == Split::Train {
            return Ok(Box::new(images.with_note(splits.note())));
        }
        if let Some(train) = &splits.train {
            images =
                images.with_classes_of(folder, &class_names(train, reading.axes.is_some())?)?;
        }
        let held_out = splits.held_out.iter().map(|folder| printable(folder.as_os_str()));
        return Ok(Box::new(images.with_note(not_used(held_out))));
    }
    let folder = Folder::open_as(path, reading).map_err(|e| match e {
        Error::Io { .. } => e, // the disk or the network, not the set
        _ => not_recognised(path, &format!("is not a data set ({e})")),
    })?;
    whole(path)?;
    match (split, folder.classes().is_empty()) {
        (Split::Train, _) => Ok(Box::new(folder)),
        (Split::Test, true) => Err(Error::format(
            path,
            "is a folder of images without labels, which has a train split only: evaluate on another set",
        )),
        (Split::Test, false) => Err(Error::format(
            path,
            "has class folders but no test/, val/, valid/ or validation/: put the class folders into train/ and test/ to hold some out",
        )),
    }
}

/// Fails if folders of images lie beside files that hold a set: only one of the two would be read.
fn alone(path: &Path, what: &str) -> Result<()> {
    let beside = |folder: &&PathBuf| {
        SPLITS.iter().any(|split| **folder == path.join(split)) && seems_to_hold_images(folder)
    };
    match sub_folders(path)?.iter().find(beside) {
        None => Ok(()),
        Some(folder) => Err(Error::format(
            path,
            format!(
                "holds {what} and a folder of images, {}/: which is the set? Move one of them away",
                name_of(folder)
            ),
        )),
    }
}

/// Fails if a class folder holds splits of its own, as an archive's top folder does: its training and held-out images would be mixed in
/// one class.
fn whole(path: &Path) -> Result<()> {
    for class in sub_folders(path)? {
        let Ok(Some(SplitFolders { train: Some(_), held_out, .. })) = SplitFolders::of(&class)
        else {
            continue;
        };
        if let [held_out, ..] = &held_out[..] {
            return Err(Error::format(
                path,
                format!(
                    "has the folder {}/, which holds splits of its own (train/ and {}/): name it as the set (data.path={}), or, if it is a \
                     class, move its images into one folder",
                    name_of(&class),
                    name_of(held_out),
                    printable(class.as_os_str())
                ),
            ));
        }
    }
    Ok(())
}

fn not_recognised(path: &Path, what: &str) -> Error {
    let reason = format!(
        "{what}; recognised are: a folder with train/ and test/ (or val/, valid/, validation/), each with a folder of images (JPEG, PNG, TIFF, WebP, BMP) per class; \
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
    fn folders_named_like_splits_are_not_taken_for_classes() {
        let root = tempfile::tempdir().unwrap();
        for (i, (names, refused)) in [
            (&["Train", "Test", "extra"][..], true),
            (&["training", "holdout"], true),
            (&["train2017", "val2017", "annotations"], true),
            (&["train_images", "test_images"], true),
            (&["Training"], true),
            (&["training", "cat", "dog"], false), // a shoe, say
            (&["dev", "cat"], false),
        ]
        .into_iter()
        .enumerate()
        {
            let set = root.path().join(i.to_string());
            names.iter().for_each(|name| touch(&set.join(name).join("cat/1.png"), b""));
            let said = open(&set, Split::Train).err().map_or(String::new(), |e| e.to_string());
            assert_eq!(
                said.contains("names like those of a set's splits"),
                refused,
                "{names:?}: {said}"
            );
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
                "recognised are: a folder with train/ and test/ (or val/, valid/, validation/)",
            ),
            ("flat/a.png", Split::Train, "is a file; name the folder it lies in"),
            (
                "only-train",
                Split::Test,
                "has no test/ or val/ or valid/ or validation/: the test split is missing",
            ),
            ("flat", Split::Test, "has a train split only"),
            ("classes", Split::Test, "put the class folders into train/ and test/"),
        ] {
            let message = open(&at(name), split).err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

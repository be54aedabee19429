//! CIFAR-10 and CIFAR-100 in their binary form.
//!
//! A record is the label bytes (CIFAR-10: one; CIFAR-100: coarse, then fine; the fine one is used)
//! followed by three planes of 32 x 32 bytes, red, green, blue (<https://www.cs.toronto.edu/~kriz/cifar.html>).
//! The set is held in memory, 150 MB at most. Files are recognised in the folder given or in the folder of their
//! archive below it.

use std::path::{Path, PathBuf};

use super::source::{Image, Source, Split};
use crate::error::{Error, Result, printable};
use crate::files::is_file;

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

/// The differences between the two sets.
struct Kind {
    folder: &'static str,
    train: &'static [&'static str],
    test: &'static [&'static str],
    names: &'static str,
    label_bytes: usize,
    classes: usize,
}

const TEN: Kind = Kind {
    folder: "cifar-10-batches-bin",
    train: &[
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_3.bin",
        "data_batch_4.bin",
        "data_batch_5.bin",
    ],
    test: &["test_batch.bin"],
    names: "batches.meta.txt",
    label_bytes: 1,
    classes: 10,
};

const HUNDRED: Kind = Kind {
    folder: "cifar-100-binary",
    train: &["train.bin"],
    test: &["test.bin"],
    names: "fine_label_names.txt",
    label_bytes: 2,
    classes: 100,
};

/// A split of CIFAR-10 or CIFAR-100.
pub struct Cifar {
    /// The records of all files, one after the other.
    records: Vec<u8>,
    label_bytes: usize,
    classes: Vec<String>,
    /// Each file with the number of images up to its end, for [`Source::name`].
    files: Vec<(PathBuf, usize)>,
}

impl Cifar {
    /// Returns whether a folder (or the archive's folder below it) holds files of either set.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn is_at(path: &Path) -> Result<bool> {
        Ok(find(path)?.is_some())
    }

    /// Reads a split; CIFAR-10 and CIFAR-100 are told apart by their file names.
    ///
    /// # Errors
    /// If there is no file of either set, a file of the split is missing or truncated, or a label is out of range.
    pub fn open(path: &Path, split: Split) -> Result<Self> {
        let (folder, kind) = find(path)?.ok_or_else(|| {
            Error::format(
                path,
                "no CIFAR binary files here (data_batch_1.bin … test_batch.bin, or train.bin and test.bin): \
                 unpack cifar-10-binary.tar.gz or cifar-100-binary.tar.gz and name the folder",
            )
        })?;
        let record = kind.label_bytes + 3 * PLANE;
        let (mut records, mut files) = (Vec::new(), Vec::new());
        for file in if split == Split::Train { kind.train } else { kind.test } {
            let file = folder.join(file);
            let bytes = match is_file(&file)? {
                true => std::fs::read(&file).map_err(Error::io(&file))?,
                false => {
                    return Err(Error::format(
                        &file,
                        "is missing, and the set is not whole without it: unpack the archive again",
                    ));
                }
            };
            if bytes.is_empty() || bytes.len() % record != 0 {
                let reason = format!(
                    "holds {} bytes, which is not a multiple of {record}, the size of a record: \
                     the file is truncated, download it again",
                    bytes.len()
                );
                return Err(Error::format(&file, reason));
            }
            let wrong = bytes
                .chunks_exact(record)
                .position(|r| r[kind.label_bytes - 1] as usize >= kind.classes);
            if let Some(at) = wrong {
                let reason = format!(
                    "record {at} has label {}, but there are {} classes: \
                     the file is corrupt or another set's, download it again",
                    bytes[at * record + kind.label_bytes - 1],
                    kind.classes
                );
                return Err(Error::format(&file, reason));
            }
            records.extend_from_slice(&bytes);
            files.push((file, records.len() / record));
        }
        let classes = class_names(&folder.join(kind.names), kind.classes)?;
        Ok(Self { records, label_bytes: kind.label_bytes, classes, files })
    }

    fn record(&self, index: usize) -> &[u8] {
        let size = self.label_bytes + 3 * PLANE;
        &self.records[index * size..][..size]
    }
}

fn find(path: &Path) -> Result<Option<(PathBuf, &'static Kind)>> {
    for kind in [&TEN, &HUNDRED] {
        for folder in [path.to_path_buf(), path.join(kind.folder)] {
            for file in kind.train.iter().chain(kind.test) {
                if is_file(&folder.join(file))? {
                    return Ok(Some((folder, kind)));
                }
            }
        }
    }
    Ok(None)
}

/// Reads the names next to the data; numbers if that small file is missing.
fn class_names(file: &Path, count: usize) -> Result<Vec<String>> {
    let text =
        if is_file(file)? { std::fs::read(file).map_err(Error::io(file))? } else { Vec::new() };
    let text = String::from_utf8(text).unwrap_or_default();
    let names: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(Into::into).collect();
    Ok(if names.len() == count { names } else { (0..count).map(|i| i.to_string()).collect() })
}

impl Source for Cifar {
    fn len(&self) -> usize {
        self.records.len() / (self.label_bytes + 3 * PLANE)
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        let planes = &self.record(index)[self.label_bytes..];
        into.resize(SIDE, SIDE);
        for (i, pixel) in into.pixels.chunks_exact_mut(3).enumerate() {
            pixel.copy_from_slice(&[planes[i], planes[PLANE + i], planes[2 * PLANE + i]]);
        }
        Ok(())
    }

    fn size(&self, _: usize) -> Result<[usize; 2]> {
        Ok([SIDE; 2])
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(u32::from(self.record(index)[self.label_bytes - 1]))
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        let place = self.files.iter().position(|&(_, end)| index < end).unwrap_or(0);
        let before = if place == 0 { 0 } else { self.files[place - 1].1 };
        format!("{}, image {}", printable(self.files[place].0.as_os_str()), index - before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two records whose pixel bytes count up from the label.
    fn records(labels: &[&[u8]]) -> Vec<u8> {
        labels
            .iter()
            .flat_map(|l| {
                l.iter().copied().chain((0..3072).map(|i| (i / 1024 * 50 + i % 1024 % 7) as u8))
            })
            .collect()
    }

    #[test]
    fn both_sets_are_read_with_their_fine_labels_and_names() {
        let folder = tempfile::tempdir().unwrap();
        let hundred = folder.path().join("cifar-100-binary");
        std::fs::create_dir(&hundred).unwrap();
        std::fs::write(hundred.join("train.bin"), records(&[&[3, 42], &[1, 99]])).unwrap();
        std::fs::write(hundred.join("test.bin"), records(&[&[0, 5]])).unwrap();
        let set = Cifar::open(folder.path(), Split::Train).unwrap();
        assert_eq!((set.len(), set.label(0), set.label(1)), (2, Some(42), Some(99)));
        assert_eq!(set.classes()[99], "99");
        let mut image = Image::default();
        set.read(1, &mut image).unwrap();
        assert_eq!((image.width, image.height, &image.pixels[3..6]), (32, 32, &[1, 51, 101][..]));
        assert!(set.name(1).ends_with("train.bin, image 1"));
        assert_eq!(Cifar::open(folder.path(), Split::Test).unwrap().label(0), Some(5));
    }

    #[test]
    fn names_count_within_a_file() {
        let folder = tempfile::tempdir().unwrap();
        for file in TEN.train {
            std::fs::write(folder.path().join(file), records(&[&[1], &[2]])).unwrap();
        }
        std::fs::write(folder.path().join(TEN.names), "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n").unwrap();
        let set = Cifar::open(folder.path(), Split::Train).unwrap();
        assert_eq!((set.len(), set.classes()[9].as_str()), (10, "j"));
        assert!(set.name(3).ends_with("data_batch_2.bin, image 1"), "{}", set.name(3));
    }

    #[test]
    fn errors_name_the_fault_of_a_file_and_the_remedy() {
        let good = records(&[&[1]]);
        let cases: [(Option<Vec<u8>>, &str); 4] = [
            (None, "test_batch.bin: is missing, and the set is not whole without it"),
            (
                Some(vec![]),
                "test_batch.bin: holds 0 bytes, which is not a multiple of 3073, the size of a record",
            ),
            (Some(good[..3000].to_vec()), "the file is truncated, download it again"),
            (Some(records(&[&[1], &[10]])), "record 1 has label 10, but there are 10 classes"),
        ];
        for (bytes, expected) in cases {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("data_batch_1.bin"), &good).unwrap();
            if let Some(bytes) = bytes {
                std::fs::write(folder.path().join("test_batch.bin"), bytes).unwrap();
            }
            let message =
                Cifar::open(folder.path(), Split::Test).err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
        let message = Cifar::open(tempfile::tempdir().unwrap().path(), Split::Test)
            .err()
            .unwrap()
            .to_string();
        assert!(message.contains("no CIFAR binary files here"), "{message}");
    }
}

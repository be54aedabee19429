//! MNIST's idx files: grey images and labels, gzipped or not.
//!
//! A file is the magic `0 0 8 rank`, `rank` big-endian sizes and the bytes (<http://yann.lecun.com/exdb/mnist>).
//! Images have rank 3 (`[n, h, w]`), labels rank 1; grey becomes RGB with three equal channels. The set is held
//! in memory. The demo's set is embedded in the program.

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::classes;
use super::source::{Image, Source, Split};
use crate::error::{Error, Result, printable};
use crate::files::is_file;

/// The most bytes of a file, unpacked: a guard against corrupt or malicious ones.
const UNPACKED_LIMIT: u64 = 4 << 30;

/// Names of the image and the label file of each split; `.gz` may follow.
const FILES: [[&str; 2]; 4] = [
    ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
    ["train-images.idx3-ubyte", "train-labels.idx1-ubyte"],
    ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
    ["test-images-idx3-ubyte", "test-labels-idx1-ubyte"],
];

const FASHION: [&str; 10] = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
];

/// Grey images from an idx file.
pub struct Idx {
    pixels: Vec<u8>,
    width: usize,
    height: usize,
    labels: Option<Vec<u8>>,
    classes: Vec<String>,
    notes: Vec<String>,
    file: PathBuf,
}

impl Idx {
    /// Returns whether a folder holds idx files of images.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn is_at(folder: &Path) -> Result<bool> {
        for [images, _] in FILES {
            if find(folder, images)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads a split of a folder with idx files under their usual names. Classes of the test split that the training split lacks
    /// are named in [`Source::notes`].
    ///
    /// # Errors
    /// As [`Idx::from_files`]; also if the folder has no images of that split.
    pub fn open(folder: &Path, split: Split) -> Result<Self> {
        let candidates = if split == Split::Train { &FILES[..2] } else { &FILES[2..] };
        for [images, labels] in candidates {
            if let Some(images) = find(folder, images)? {
                let mut set = Self::from_files(&images, find(folder, labels)?.as_deref())?;
                if split == Split::Test {
                    set.note_classes_beyond(folder)?;
                }
                return Ok(set);
            }
        }
        let wanted: Vec<_> =
            candidates.iter().map(|[images, _]| format!("{images}[.gz]")).collect();
        let reason = format!(
            "has idx files, but none of the {split} part: looked for {}",
            wanted.join(", ")
        );
        Err(Error::format(folder, reason))
    }

    /// Takes note of labels that no image of the training split has.
    fn note_classes_beyond(&mut self, folder: &Path) -> Result<()> {
        let [first, second] = [&FILES[0], &FILES[1]].map(|[_, labels]| find(folder, labels));
        let Some(path) = first?.or(second?) else { return Ok(()) };
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let (_, labels) = parse::<1>(&path, &bytes, "labels")?;
        let own: Vec<u32> = self.labels.iter().flatten().copied().map(u32::from).collect();
        // A training split may have labels that this one does not.
        let training = labels.iter().map(|&label| u32::from(label));
        let training = training.filter(|&label| (label as usize) < self.classes.len());
        self.notes.extend(classes::compare(&self.file, &self.classes, training, &own)?);
        Ok(())
    }

    /// Reads a file of images and, if given, one of labels.
    ///
    /// # Errors
    /// If a file cannot be read, is corrupt, or the two do not belong together.
    pub fn from_files(images: &Path, labels: Option<&Path>) -> Result<Self> {
        let bytes = std::fs::read(images).map_err(Error::io(images))?;
        let labels = match labels {
            Some(path) => Some((path, std::fs::read(path).map_err(Error::io(path))?)),
            None => None,
        };
        Self::from_bytes(
            (images, &bytes),
            labels.as_ref().map(|(path, bytes)| (*path, bytes.as_slice())),
        )
    }

    /// Reads images and labels from the contents of files, gzipped or not; the paths are for messages only.
    ///
    /// # Errors
    /// If the contents are corrupt or do not belong together.
    pub fn from_bytes(images: (&Path, &[u8]), labels: Option<(&Path, &[u8])>) -> Result<Self> {
        let (file, bytes) = images;
        let (dims, pixels) = parse::<3>(file, bytes, "images")?;
        let [count, height, width] = dims;
        if count == 0 || height == 0 || width == 0 {
            return Err(Error::format(
                file,
                format!("holds {count} images of {width} x {height} pixels"),
            ));
        }
        let labels = match labels {
            Some((path, bytes)) => {
                let ([labelled], labels) = parse::<1>(path, bytes, "labels")?;
                if labelled != count {
                    let reason = format!(
                        "holds {labelled} labels, but {} holds {count} images: the two files do not belong together",
                        file.display()
                    );
                    return Err(Error::format(path, reason));
                }
                Some(labels)
            }
            None => None,
        };
        let highest = labels.iter().flatten().max().copied();
        let classes = highest.map_or(0, |label| usize::from(label) + 1);
        Ok(Self {
            pixels,
            width,
            height,
            labels,
            classes: (0..classes).map(|i| i.to_string()).collect(),
            notes: Vec::new(),
            file: file.to_path_buf(),
        })
    }

    /// Names the classes.
    ///
    /// # Errors
    /// If a label has no name.
    pub fn with_classes(
        mut self,
        names: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Self> {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        if names.len() < self.classes.len() {
            let reason = format!(
                "has label {}, but there are {} classes",
                self.classes.len() - 1,
                names.len()
            );
            return Err(Error::format(&self.file, reason));
        }
        self.classes = names;
        Ok(self)
    }
}

/// Returns the demo's set: 10,000 and 2,000 images of Fashion-MNIST, 32 x 32, each scattered over its canvas once.
///
/// See `assets/fashion-scattered/README.md` for its origin, its licence (MIT) and how it was made.
pub fn fashion_scattered(split: Split) -> Idx {
    macro_rules! asset {
        ($name:literal) => {
            (
                Path::new(concat!("fashion-scattered/", $name)),
                include_bytes!(concat!("../../assets/fashion-scattered/", $name)).as_slice(),
            )
        };
    }
    let (images, labels) = match split {
        Split::Train => {
            (asset!("train-images-idx3-ubyte.gz"), asset!("train-labels-idx1-ubyte.gz"))
        }
        Split::Test => (asset!("test-images-idx3-ubyte.gz"), asset!("test-labels-idx1-ubyte.gz")),
    };
    Idx::from_bytes(images, Some(labels))
        .and_then(|set| set.with_classes(FASHION))
        .expect("the embedded files are complete: a test reads them")
}

fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    for path in [folder.join(name), folder.join(format!("{name}.gz"))] {
        if is_file(&path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Reads the sizes and contents of an idx file of unsigned bytes. Memory is taken for what the header announces, and no more.
fn parse<const RANK: usize>(
    path: &Path,
    bytes: &[u8],
    what: &str,
) -> Result<([usize; RANK], Vec<u8>)> {
    if bytes.is_empty() {
        return Err(Error::format(path, "is empty: download it again"));
    }
    let mut bytes = Cow::Borrowed(bytes);
    let header = 4 + 4 * RANK;
    if bytes.starts_with(&[0x1F, 0x8B]) {
        let mut reader = flate2::read::MultiGzDecoder::new(&*bytes);
        let mut unpacked = Vec::new();
        let mut unpack = |into: &mut Vec<u8>, most: u64| {
            reader.by_ref().take(most).read_to_end(into).map_err(|e| {
                Error::format(path, format!("cannot be unpacked ({e}): the file is truncated or corrupt, download it again"))
            })
        };
        unpack(&mut unpacked, header as u64)?;
        // A byte more than the header announces shows that there is too much.
        let announced = unpacked.get(4..header).map_or(0, |dims| length_of(dims).saturating_add(1));
        if announced > u128::from(UNPACKED_LIMIT) {
            let reason = format!(
                "announces {} bytes of {what}, more than the limit of {UNPACKED_LIMIT}",
                announced - 1
            );
            return Err(Error::format(path, reason));
        }
        unpack(&mut unpacked, announced as u64)?;
        bytes = Cow::Owned(unpacked);
    }
    if bytes.len() < 4 || bytes[..4] != [0, 0, 8, RANK as u8] {
        let reason = format!(
            "starts with {:02x?}, not with [00, 00, 08, {RANK:02x}] as an idx file of {what} does",
            &bytes[..bytes.len().min(4)]
        );
        return Err(Error::format(path, reason));
    }
    let truncated = |wanted: u128| {
        let reason = format!(
            "holds {} bytes of {wanted}: the file is truncated, download it again",
            bytes.len()
        );
        Error::format(path, reason)
    };
    if bytes.len() < header {
        return Err(truncated(header as u128));
    }
    let mut dims = [0; RANK];
    for (dim, word) in dims.iter_mut().zip(bytes[4..header].chunks_exact(4)) {
        *dim = u32::from_be_bytes([word[0], word[1], word[2], word[3]]) as usize;
    }
    let wanted = header as u128 + length_of(&bytes[4..header]);
    if (bytes.len() as u128) < wanted {
        return Err(truncated(wanted));
    }
    if bytes.len() as u128 > wanted {
        let extra = bytes.len() as u128 - wanted;
        let more = if extra == 1 { "at least 1 byte".into() } else { format!("{extra} bytes") };
        return Err(Error::format(path, format!("has {more} more than its header says")));
    }
    let mut bytes = bytes.into_owned();
    bytes.drain(..header);
    Ok((dims, bytes))
}

/// The product of the sizes in a header: 128 bits, because three sizes of 32 bits from a corrupt header overflow 64.
fn length_of(dims: &[u8]) -> u128 {
    let sizes = dims.as_chunks::<4>().0.iter();
    sizes.map(|&size| u128::from(u32::from_be_bytes(size))).product()
}

impl Source for Idx {
    fn len(&self) -> usize {
        self.pixels.len() / (self.width * self.height)
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        let size = self.width * self.height;
        into.resize(self.width, self.height);
        let grey = &self.pixels[index * size..][..size];
        for (pixel, &value) in into.pixels.chunks_exact_mut(3).zip(grey) {
            pixel.fill(value);
        }
        Ok(())
    }

    fn size(&self, _: usize) -> Result<[usize; 2]> {
        Ok([self.width, self.height])
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.as_ref().map(|labels| u32::from(labels[index]))
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        format!("{}, image {index}", printable(self.file.as_os_str()))
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn idx(dims: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        bytes.extend(dims.iter().flat_map(|d| d.to_be_bytes()));
        bytes.extend(values);
        bytes
    }

    fn gzipped(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn gzipped_or_not_a_file_reads_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let images = idx(&[2, 1, 2], &[10, 20, 30, 40]);
        std::fs::write(folder.path().join("train-images-idx3-ubyte"), &images).unwrap();
        std::fs::write(
            folder.path().join("train-labels-idx1-ubyte.gz"),
            gzipped(&idx(&[2], &[4, 1])),
        )
        .unwrap();
        std::fs::write(folder.path().join("t10k-images-idx3-ubyte.gz"), gzipped(&images)).unwrap();
        let (mut a, mut b) = (Image::default(), Image::default());
        let train = Idx::open(folder.path(), Split::Train).unwrap();
        let test = Idx::open(folder.path(), Split::Test).unwrap();
        train.read(1, &mut a).unwrap();
        test.read(1, &mut b).unwrap();
        assert_eq!((a.width, a.height, &a.pixels[..]), (2, 1, &[30, 30, 30, 40, 40, 40][..]));
        assert_eq!(a, b);
        // Several members in one file, as pigz and cat make them.
        let two = [gzipped(&images[..9]), gzipped(&images[9..])].concat();
        let joined = Idx::from_bytes((Path::new("x"), &two), None).unwrap();
        joined.read(1, &mut b).unwrap();
        assert_eq!(a, b);
        assert_eq!((train.label(0), train.classes().len(), test.label(0)), (Some(4), 5, None));
    }

    #[test]
    fn the_embedded_set_is_complete() {
        for (split, count) in [(Split::Train, 10_000), (Split::Test, 2_000)] {
            let set = fashion_scattered(split);
            assert_eq!(
                (set.len(), set.width, set.height, set.classes().len()),
                (count, 32, 32, 10)
            );
            assert!((0..count).all(|i| set.label(i).unwrap() < 10));
        }
    }

    #[test]
    fn errors_name_the_fault_of_a_file() {
        let good = idx(&[2, 1, 2], &[1, 2, 3, 4]);
        let labels = idx(&[2], &[1, 2]);
        let packed = gzipped(&good);
        let huge = idx(&[u32::MAX, u32::MAX, u32::MAX], &[]);
        let (huge_packed, long) = (gzipped(&huge), gzipped(&idx(&[2, 1, 2], &[0; 9])));
        let cases: [(&[u8], &[u8], &str); 11] = [
            (&huge_packed, &labels, "more than the limit of 4294967296"),
            (&long, &labels, "images: has at least 1 byte more than its header says"),
            (&[], &labels, "images: is empty: download it again"),
            (&[1, 2], &labels, "starts with [01, 02], not with [00, 00, 08, 03]"),
            (&labels, &labels, "images: starts with [00, 00, 08, 01]"),
            (&good, &good, "labels: starts with [00, 00, 08, 03], not with [00, 00, 08, 01]"),
            (&good[..18], &labels, "holds 18 bytes of 20: the file is truncated"),
            (&good[..6], &labels, "holds 6 bytes of 16: the file is truncated"),
            (&huge, &labels, "the file is truncated"),
            (&packed[..packed.len() - 9], &labels, "cannot be unpacked"),
            (&good, &idx(&[1], &[1]), "labels: holds 1 labels, but images holds 2 images"),
        ];
        for (images, labels, expected) in cases {
            let read =
                Idx::from_bytes((Path::new("images"), images), Some((Path::new("labels"), labels)));
            let message = read.err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
        let named =
            Idx::from_bytes((Path::new("images"), &good), Some((Path::new("labels"), &labels)))
                .and_then(|set| set.with_classes(["a", "b"]));
        assert!(named.err().unwrap().to_string().contains("has label 2, but there are 2 classes"));
        assert!(Idx::from_files(Path::new("/nowhere/x"), None).is_err());
    }
}

//! A set of images packed into few large files.
//!
//! A folder of a million files takes long to list and, from a disk, longer to read; here the names and offsets of a set are
//! one index, and an image is one read at a known offset. Files are read by position, not mapped: if one is truncated
//! during a run, a read fails and the image is skipped, while access to a mapped page would end the program.

mod format;
mod manifest;
mod write;

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use format::{
    Entry, FORMAT, HEADER, Header, Index, Kind, LONGEST_NAME, MAGIC, WITH_SAMPLES,
    WITHOUT_MANIFEST, file_name, number_of,
};
pub(super) use manifest::MANIFEST;
use manifest::Manifest;
pub use write::{PackSettings, Packed, Stored, pack, pack_if};

use super::cache::Cache;
use super::classes;
use super::decode::{PIXEL_LIMIT, Reading, decode, stretch};
use super::open::{folders, not_used};
use super::source::{Format, Image, Source, Split};
use crate::error::{Error, Result, printable};
use crate::files::is_file;

/// Images in files that [`pack`] wrote.
pub struct Pack {
    shards: Vec<Shard>,
    images: usize,
    classes: Vec<String>,
    /// For each class in the files, its place in `classes`.
    numbers: Vec<u32>,
    notes: Vec<String>,
    cache: Cache,
    /// Of all its images.
    format: Format,
    /// The values that become 0 and the largest sample, of 16 bits, if that is still to be done.
    range: Option<[f64; 2]>,
    /// Those that did when the images were packed.
    packed_range: Option<[f64; 2]>,
}

/// One file of a split.
struct Shard {
    path: PathBuf,
    file: File,
    /// Images in the files before it.
    first: usize,
    index: Index,
}

impl Pack {
    /// Returns whether a folder holds packed images, complete or not.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn is_at(folder: &Path) -> Result<bool> {
        Ok(is_file(&folder.join(MANIFEST))? || !left_by_a_pack(folder)?.is_empty())
    }

    /// Opens a split of a folder with packed images: reads the indices of its files. Classes have the numbers of the
    /// training split; classes that it lacks come after them.
    ///
    /// # Errors
    /// If the pack is unfinished or lacks the split, a file is missing, damaged or of a newer format, or a class differs from
    /// one of the training split by case only.
    pub fn open(folder: &Path, split: Split) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        let mut found = Vec::new();
        for name in folders(split) {
            if let Some(pack) = Self::open_split(folder, name, manifest.as_ref())? {
                found.push((name, pack));
            }
        }
        // As in a folder: of several splits that may be the held-out one, the first with classes is.
        found.sort_by_key(|(_, pack)| pack.classes.is_empty());
        let note = not_used(found.iter().map(|(name, _)| printable(folder.join(name).as_os_str())));
        if let Some((name, mut pack)) = found.into_iter().next() {
            pack.notes.extend(note);
            pack.packed_range = manifest.and_then(|manifest| manifest.range);
            return match split {
                Split::Train => Ok(pack),
                Split::Test => pack.with_classes_of_train(folder, name),
            };
        }
        if manifest.is_none() && left_by_a_pack(folder)?.iter().any(|name| name.starts_with('.')) {
            return Err(unfinished(folder)?);
        }
        let wanted: Vec<_> = folders(split).iter().map(|name| file_name(name, 0)).collect();
        let reason = format!(
            "has packed images, but no {}: the {split} split is missing",
            wanted.join(" or ")
        );
        Err(Error::format(folder, reason))
    }

    /// Opens the split that is named `split`; `None` if the pack does not have it.
    fn open_split(folder: &Path, split: &str, manifest: Option<&Manifest>) -> Result<Option<Self>> {
        let numbers = numbers(folder, split)?;
        let listed = match manifest {
            Some(manifest) => match manifest.splits.get(split) {
                Some(listed) => Some(listed),
                None => return Ok(None),
            },
            None if numbers.is_empty() => return Ok(None),
            None => None,
        };
        let missing = |number: u32| {
            let path = folder.join(file_name(split, number));
            Error::format(path, format!("is missing: {REMEDY}"))
        };
        let (mut shards, mut images, mut ended) = (Vec::<Shard>::new(), 0, false);
        for (&number, expected) in numbers.iter().zip(0..) {
            if number != expected {
                return Err(missing(expected));
            }
            let path = folder.join(file_name(split, number));
            let (file, format, header, index) = read(&path)?;
            if manifest.is_none() && format != WITHOUT_MANIFEST {
                return Err(unfinished(folder)?);
            }
            let follows = shards.last().is_none_or(|before| before.index.classes == index.classes);
            if ended || !follows || header.number != number || header.first != images as u64 {
                let reason = format!("does not belong to the files before it: {REMEDY}");
                return Err(Error::format(path, reason));
            }
            let first = images;
            images += index.entries.len();
            ended = header.last;
            shards.push(Shard { path, file, first, index });
        }
        if !ended {
            return Err(missing(shards.len() as u32));
        }
        if let Some(listed) = listed
            && (listed.files as usize, listed.images) != (shards.len(), images as u64)
        {
            let reason = format!(
                "lists {} images in {} files of the split {split}, and there are {images} in {}: {REMEDY}",
                listed.images,
                listed.files,
                shards.len()
            );
            return Err(Error::format(folder.join(MANIFEST), reason));
        }
        let format = shards[0].index.entries[0].kind.format();
        for shard in &shards {
            if shard.index.entries.iter().any(|entry| entry.kind.format() != format) {
                let reason =
                    format!("has images of other channels or bits than {format}: {REMEDY}");
                return Err(Error::format(&shard.path, reason));
            }
        }
        let classes = shards[0].index.classes.clone();
        let numbers = (0..classes.len() as u32).collect();
        Ok(Some(Self {
            shards,
            images,
            classes,
            numbers,
            notes: Vec::new(),
            cache: Cache::new(images),
            format,
            range: None,
            packed_range: None,
        }))
    }

    /// Numbers the classes of the held-out split, named `split`, as the training split of the pack does.
    fn with_classes_of_train(mut self, folder: &Path, split: &str) -> Result<Self> {
        let first = folder.join(file_name("train", 0));
        if self.classes.is_empty() || !is_file(&first)? {
            return Ok(self);
        }
        let (_, _, _, train) = read(&first)?;
        let path = folder.join(split);
        let merged = classes::merge(&path, &train.classes, &self.classes)?;
        (self.classes, self.numbers) = (merged.classes.clone(), merged.numbers.clone());
        let labels: Vec<u32> = (0..self.images).filter_map(|i| self.label(i)).collect();
        self.notes.extend(merged.note(&path, labels.into_iter()));
        Ok(self)
    }

    /// Sets how many bytes of decoded images are kept in memory (default: 1 GiB); 0 keeps none.
    pub fn with_cache(mut self, bytes: usize) -> Self {
        self.cache.limit(bytes);
        self
    }

    /// The values that became 0 and the largest sample when the images were packed, if they were stretched.
    pub(super) fn packed_range(&self) -> Option<[f64; 2]> {
        self.packed_range
    }

    /// Stretches these values of images of 16 bits to the whole range of samples, unless that was done when they were packed.
    ///
    /// # Errors
    /// If they were stretched from another range then.
    pub(super) fn in_range(mut self, folder: &Path, range: Option<[f64; 2]>) -> Result<Self> {
        match (self.packed_range, range) {
            (None, _) => self.range = range,
            (Some(packed), Some(range)) if packed == range => {}
            (Some([low, high]), None) => self.notes.push(format!(
                "{}: samples were stretched from data.range=[{low}, {high}] when they were packed",
                printable(folder.as_os_str())
            )),
            (Some([low, high]), Some([from, to])) => {
                let reason = format!(
                    "holds samples that were stretched from data.range=[{low}, {high}] when they were packed, and data.range=[{from}, {to}] is asked for: \
                     set data.range=[{low}, {high}], or pack the images again"
                );
                return Err(Error::format(folder, reason));
            }
        }
        Ok(self)
    }

    /// The file that holds an image, and its position there.
    fn place(&self, index: usize) -> (&Shard, usize) {
        assert!(index < self.images, "image {index} of a pack of {}", self.images);
        let shard = self.shards.partition_point(|shard| shard.first <= index) - 1;
        let shard = &self.shards[shard];
        (shard, index - shard.first)
    }

    fn entry(&self, index: usize) -> &Entry {
        let (shard, place) = self.place(index);
        &shard.index.entries[place]
    }
}

/// The remedy for a damaged set.
const REMEDY: &str = "copy the set again, or pack the images again";

/// Names of a pack's files in a folder, and of the partial files of one that was stopped.
fn left_by_a_pack(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let of_a_split = |split: &&str| {
            let partial = name.strip_prefix('.').is_some_and(|rest| {
                rest.strip_prefix(*split)
                    .is_some_and(|rest| rest.starts_with('-') && rest.contains(".pack."))
            });
            partial || number_of(name, split).is_some()
        };
        if [Split::Train, Split::Test].into_iter().flat_map(folders).any(of_a_split) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The error of a pack without a manifest.
fn unfinished(folder: &Path) -> Result<Error> {
    let files = left_by_a_pack(folder)?;
    let first = files
        .first()
        .map_or(String::new(), |name| format!(" ({name} and {} more)", files.len() - 1));
    let reason = format!(
        "holds a pack that was stopped before it was complete{first}: there is no {MANIFEST}; delete these files and pack the images again"
    );
    Ok(Error::format(folder, reason))
}

/// The numbers of a split's files in ascending order.
fn numbers(folder: &Path, split: &str) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name();
        numbers.extend(name.to_str().and_then(|name| number_of(name, split)));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Opens a file and reads its format, header and index; nothing is allocated that its length does not allow.
fn read(path: &Path) -> Result<(File, u32, Header, Index)> {
    let damaged = |what: String| {
        Error::format(path, format!("is a truncated or corrupt pack file: {what}: {REMEDY}"))
    };
    let file = File::open(path).map_err(Error::io(path))?;
    let length = file.metadata().map_err(Error::io(path))?.len();
    if length < HEADER as u64 {
        return Err(damaged(format!("it has {length} bytes")));
    }
    let mut header = [0; HEADER];
    read_at(&file, path, 0, &mut header).map_err(Error::io(path))?;
    if header[..MAGIC.len()] != MAGIC {
        return Err(damaged("it does not begin as one".into()));
    }
    // Before the checksum: another format may have it elsewhere.
    let format = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if ![WITHOUT_MANIFEST, FORMAT, WITH_SAMPLES].contains(&format) {
        let reason = format!(
            "has format {format}, and this program reads up to {WITH_SAMPLES}: read it with the program that wrote it, or pack the images again"
        );
        return Err(Error::format(path, reason));
    }
    let header = Header::from_bytes(&header, length).map_err(damaged)?;
    // A sparse file can be of any length, so the header's word is checked before memory is taken for the index.
    if header.index_length / LONGEST_NAME > header.count.saturating_add(header.count / 8 + 1024) {
        let (count, length) = (header.count, header.index_length);
        return Err(damaged(format!(
            "its header announces an index of {length} bytes for {count} images"
        )));
    }
    let mut index = buffer(path, header.index_length)?;
    read_at(&file, path, header.index_at, &mut index).map_err(Error::io(path))?;
    let index = Index::from_bytes(&index, &header).map_err(damaged)?;
    Ok((file, format, header, index))
}

/// A buffer of so many zeros; an error if there is no memory for it.
fn buffer(path: &Path, length: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reserved =
        usize::try_from(length).is_ok_and(|length| bytes.try_reserve_exact(length).is_ok());
    if !reserved {
        return Err(Error::format(
            path,
            format!("needs {length} bytes of memory, which are not to be had"),
        ));
    }
    bytes.resize(length as usize, 0);
    Ok(bytes)
}

/// Fills a buffer from an offset in a file; many threads may at a time.
#[cfg(unix)]
fn read_at(file: &File, _: &Path, at: u64, into: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, at)
}

/// Fills a buffer from an offset in a file; many threads may at a time, because each call opens a handle of its own.
#[cfg(not(unix))]
fn read_at(_: &File, path: &Path, at: u64, into: &mut [u8]) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(into)
}

impl Source for Pack {
    fn format(&self) -> Format {
        self.format
    }

    fn len(&self) -> usize {
        self.images
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        if let Some(kept) = self.cache.get(index) {
            into.clone_from(kept);
            return Ok(());
        }
        let (shard, place) = self.place(index);
        let entry = &shard.index.entries[place];
        let size = [entry.width, entry.height].map(|side| side as usize);
        let fill = |bytes: &mut [u8]| {
            let path = &shard.path;
            read_at(&shard.file, path, entry.at, bytes).map_err(|e| match e.kind() {
                // A file that was truncated since is damaged; anything else is an error of the disk.
                ErrorKind::UnexpectedEof => {
                    Error::format(self.name(index), format!("the file ends early: {REMEDY}"))
                }
                _ => Error::io(self.name(index))(e),
            })?;
            if crc32fast::hash(bytes) == entry.crc {
                return Ok(());
            }
            let reason = format!("does not have the checksum that the index names: {REMEDY}");
            Err(Error::format(self.name(index), reason))
        };
        match entry.kind {
            Kind::Raw | Kind::Samples(_) => {
                into.reshape(size[0], size[1], entry.kind.format());
                fill(&mut into.pixels)?;
                if let Some(range) = self.range {
                    stretch(&mut into.pixels, range);
                }
                Ok(())
            }
            Kind::File => {
                let mut bytes = buffer(&shard.path, entry.length)?;
                fill(&mut bytes)?;
                let name = self.name(index);
                decode(Path::new(&name), &bytes, &Reading::default(), into)?;
                if [into.width, into.height] != size {
                    let reason = format!(
                        "has {} x {} pixels, and the index says {} x {}: {REMEDY}",
                        into.width, into.height, size[0], size[1]
                    );
                    return Err(Error::format(name, reason));
                }
                self.cache.keep(index, into);
                Ok(())
            }
        }
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        let entry = self.entry(index);
        Ok([entry.width, entry.height].map(|side| side as usize))
    }

    fn label(&self, index: usize) -> Option<u32> {
        (!self.classes.is_empty()).then(|| self.numbers[self.entry(index).label as usize])
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        let (shard, place) = self.place(index);
        format!("{}/{}", printable(shard.path.as_os_str()), shard.index.names.get(place))
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

//! A set of images packed into few large files.
//!
//! A folder of a million files takes long to list and, from a disk, longer to read; here a set's names and places are one
//! index and an image one read at a known place. Files are read by position, not mapped: where one is cut short under a run,
//! a read fails and the image is skipped, while a mapped page would end the program.

mod format;
mod write;

use std::fs::File;
use std::path::{Path, PathBuf};

use format::{Entry, FORMAT, HEADER, Header, Index, Kind, MAGIC, file_name, number_of};
pub use write::{PackSettings, Packed, Stored, pack};

use super::cache::Cache;
use super::decode::{PIXEL_LIMIT, decode};
use super::open::folders;
use super::source::{Image, Source, Split};
use crate::error::{Error, Result};

/// Images in files that [`pack`] wrote.
pub struct Pack {
    shards: Vec<Shard>,
    images: usize,
    cache: Cache,
}

/// One of a set's files.
struct Shard {
    path: PathBuf,
    file: File,
    /// Images in the files before it.
    first: usize,
    index: Index,
}

impl Pack {
    /// Whether a folder holds packed images.
    pub fn is_at(folder: &Path) -> bool {
        [Split::Train, Split::Test]
            .into_iter()
            .flat_map(folders)
            .any(|part| numbers(folder, part).is_ok_and(|numbers| !numbers.is_empty()))
    }

    /// Opens a split of a folder with packed images: reads the indices of its files.
    ///
    /// # Errors
    /// When there is none, a file of it is missing, or one is damaged or of a newer format.
    pub fn open(folder: &Path, split: Split) -> Result<Self> {
        for part in folders(split) {
            let numbers = numbers(folder, part)?;
            if !numbers.is_empty() {
                return Self::of(folder, part, &numbers);
            }
        }
        let wanted: Vec<_> = folders(split).iter().map(|part| file_name(part, 0)).collect();
        let reason = format!(
            "has packed images, but no {}: the {split} part is missing",
            wanted.join(" or ")
        );
        Err(Error::format(folder, reason))
    }

    fn of(folder: &Path, part: &str, numbers: &[u32]) -> Result<Self> {
        let missing = |number: u32| {
            let path = folder.join(file_name(part, number));
            Error::format(path, format!("is missing: {REMEDY}"))
        };
        let (mut shards, mut images, mut ended) = (Vec::<Shard>::new(), 0, false);
        for (&number, expected) in numbers.iter().zip(0..) {
            if number != expected {
                return Err(missing(expected));
            }
            let path = folder.join(file_name(part, number));
            let (file, header, index) = read(&path)?;
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
        Ok(Self { shards, images, cache: Cache::new(images) })
    }

    /// Sets how many bytes of decoded images are kept in memory (1 GiB unless said otherwise); 0 keeps none.
    pub fn with_cache(mut self, bytes: usize) -> Self {
        self.cache.limit(bytes);
        self
    }

    /// The file that an image is in, and its place there.
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

/// What helps a damaged set.
const REMEDY: &str = "copy the set again, or pack the images again";

/// The numbers of a part's files, rising.
fn numbers(folder: &Path, part: &str) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name();
        numbers.extend(name.to_str().and_then(|name| number_of(name, part)));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Opens a file and reads what it says of itself; nothing is allocated that its length does not allow.
fn read(path: &Path) -> Result<(File, Header, Index)> {
    let damaged = |what: String| {
        Error::format(path, format!("is no whole file of packed images: {what}: {REMEDY}"))
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
    if format != FORMAT {
        let reason = format!(
            "has format {format}, and this program reads {FORMAT}: read it with the one that wrote it, or pack the images again"
        );
        return Err(Error::format(path, reason));
    }
    let header = Header::from_bytes(&header, length).map_err(damaged)?;
    let mut index = vec![0; header.index_length as usize]; // at most the file's length
    read_at(&file, path, header.index_at, &mut index).map_err(Error::io(path))?;
    let index = Index::from_bytes(&index, &header).map_err(damaged)?;
    Ok((file, header, index))
}

/// Fills a buffer from a place in a file; many threads may.
#[cfg(unix)]
fn read_at(file: &File, _: &Path, at: u64, into: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, at)
}

/// Fills a buffer from a place in a file; many threads may, as each call has a handle of its own.
#[cfg(not(unix))]
fn read_at(_: &File, path: &Path, at: u64, into: &mut [u8]) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(into)
}

impl Source for Pack {
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
            read_at(&shard.file, path, entry.at, bytes).map_err(Error::io(self.name(index)))?;
            if crc32fast::hash(bytes) == entry.crc {
                return Ok(());
            }
            let reason = format!("does not have the checksum that the index names: {REMEDY}");
            Err(Error::format(self.name(index), reason))
        };
        match entry.kind {
            Kind::Raw => {
                into.resize(size[0], size[1]);
                fill(&mut into.pixels)
            }
            Kind::File => {
                let mut bytes = vec![0; entry.length as usize]; // at most the file's length
                fill(&mut bytes)?;
                let name = self.name(index);
                decode(Path::new(&name), &bytes, into)?;
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
        (!self.classes().is_empty()).then(|| self.entry(index).label)
    }

    fn classes(&self) -> &[String] {
        &self.shards[0].index.classes
    }

    fn name(&self, index: usize) -> String {
        let (shard, place) = self.place(index);
        format!("{}/{}", shard.path.display(), shard.index.names.get(place))
    }
}

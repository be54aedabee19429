//! The directories of a TIFF file, one for each page, and the whole numbers in them.
//!
//! The crate `tiff` reads directories, too, but only after it has made a picture of the first, which panics or fails over much that
//! is no fault, and it takes 32 bytes for every number.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

use super::Found;

/// The entries of a directory that mean something here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    ImageWidth = 256,
    ImageLength = 257,
    BitsPerSample = 258,
    Compression = 259,
    PhotometricInterpretation = 262,
    FillOrder = 266,
    StripOffsets = 273,
    Orientation = 274,
    SamplesPerPixel = 277,
    RowsPerStrip = 278,
    StripByteCounts = 279,
    PlanarConfiguration = 284,
    Predictor = 317,
    TileWidth = 322,
    TileLength = 323,
    TileOffsets = 324,
    TileByteCounts = 325,
    ExtraSamples = 338,
    SampleFormat = 339,
}

/// The most entries of a directory; the standard has fewer tags.
const MOST_ENTRIES: u64 = 4096;

/// The most bytes of an entry's numbers: places of eight million tiles.
const MOST_BYTES: u64 = 64 << 20;

/// A file whose header is read.
pub struct Tiff<R> {
    pub file: R,
    pub big_endian: bool,
    /// Whether it is BigTIFF, whose places have eight bytes.
    is_big: bool,
    /// Where the first directory stands.
    pub first: u64,
}

/// The entries of a page.
pub struct Directory {
    /// By tag: kind of number, how many, and the bytes that hold them or their place.
    entries: BTreeMap<u16, (u64, u64, Vec<u8>)>,
    /// Where the next one stands; `None` behind the last.
    pub next: Option<u64>,
}

pub fn damaged(what: impl std::fmt::Display) -> String {
    format!("is a damaged TIFF file: {what}")
}

fn failed(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged("it ends early"),
        _ => format!("cannot be read: {error}"),
    }
}

impl<R: Read + Seek> Tiff<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// If it is of no TIFF file.
    pub fn open(file: R) -> Found<Self> {
        let mut tiff = Self { file, big_endian: false, is_big: false, first: 0 };
        let start = tiff.bytes(0, 8)?;
        tiff.big_endian = start[0] == b'M';
        tiff.is_big = tiff.number(&start[2..4]) == 43;
        tiff.first = match tiff.is_big {
            true if tiff.number(&start[4..6]) != 8 => return Err(damaged("places of odd sizes")),
            true => {
                let place = tiff.bytes(8, 8)?;
                tiff.number(&place)
            }
            false => tiff.number(&start[4..8]),
        };
        Ok(tiff)
    }

    fn number(&self, bytes: &[u8]) -> u64 {
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        match self.big_endian {
            true => bytes.iter().fold(0, add),
            false => bytes.iter().rev().fold(0, add),
        }
    }

    /// Takes no more memory than the file has bytes.
    fn bytes(&mut self, at: u64, len: u64) -> Found<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(at)).map_err(failed)?;
        self.file.by_ref().take(len).read_to_end(&mut bytes).map_err(failed)?;
        if (bytes.len() as u64) < len {
            return Err(damaged("it ends early"));
        }
        Ok(bytes)
    }

    /// Reads the directory at a place.
    ///
    /// # Errors
    /// If there is none, or it gives a tag two different values: programs differ in which they take.
    pub fn directory(&mut self, at: u64) -> Found<Directory> {
        let (counted, entry, place) = if self.is_big { (8, 20, 8) } else { (2, 12, 4) };
        let count = self.bytes(at, counted)?;
        let count = self.number(&count);
        if count > MOST_ENTRIES {
            return Err(damaged(format!("a directory of {count} entries")));
        }
        // A place near the largest number has failed above.
        let bytes = self.bytes(at + counted, count * entry + place)?;
        let (listed, next) = bytes.split_at((count * entry) as usize);
        let next = Some(self.number(next)).filter(|&next| next != 0);
        let mut entries = BTreeMap::new();
        for bytes in listed.chunks_exact(entry as usize) {
            let (counts, value) = bytes[4..].split_at(bytes.len() - 4 - place as usize);
            let tag = self.number(&bytes[..2]) as u16;
            let found = (self.number(&bytes[2..4]), self.number(counts), value.to_vec());
            let before = entries.insert(tag, found);
            if before.is_some_and(|before| before != entries[&tag]) {
                return Err(damaged(format!("two values of tag {tag}")));
            }
        }
        Ok(Directory { entries, next })
    }

    /// The numbers of an entry, if there is one.
    ///
    /// # Errors
    /// If they are not whole numbers without a sign, or not in the file.
    pub fn all(&mut self, directory: &Directory, tag: Tag) -> Found<Option<Vec<u64>>> {
        let Some((kind, count, value)) = directory.entries.get(&(tag as u16)) else {
            return Ok(None);
        };
        let size = match kind {
            1 | 7 => 1,
            3 => 2,
            4 | 13 => 4,
            16 | 18 => 8,
            _ => return Err(damaged(format!("{tag:?} is no whole number"))),
        };
        let Some(len) = count.checked_mul(size).filter(|&len| len <= MOST_BYTES) else {
            return Err(damaged(format!("{count} values of {tag:?}")));
        };
        let bytes = match len > value.len() as u64 {
            true => self.bytes(self.number(value), len)?,
            false => value[..len as usize].to_vec(),
        };
        Ok(Some(bytes.chunks_exact(size as usize).map(|bytes| self.number(bytes)).collect()))
    }
}

impl Directory {
    pub fn has(&self, tag: Tag) -> bool {
        self.entries.contains_key(&(tag as u16))
    }
}

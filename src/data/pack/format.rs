//! The layout of a pack file.
//!
//! A split is `SPLIT-00000.pack`, `SPLIT-00001.pack` and so on, where SPLIT is `train`, `test`, `val` or `valid`. Each file is a
//! header, the bytes of the images one after another, and an index; all numbers are little-endian. The manifest
//! (`pack.json`) lists the splits of a finished pack; files of format 1 have none.
//!
//! | header | bytes |
//! |---|---|
//! | magic | 8 |
//! | format | u32 |
//! | whether it is the split's last file | u32 |
//! | its number in the split, from 0 | u32 |
//! | crc32 of the index | u32 |
//! | images in the files before it | u64 |
//! | images in it | u64 |
//! | where its index begins, and how long it is | 2 u64 |
//! | zero | u32 |
//! | crc32 of the header so far | u32 |
//!
//! The index has an entry for each image (offset and number of its bytes: u64; width, height, class, crc32 of the bytes,
//! kind: u32; a kind above 1 is samples of a format, see [`Kind`]), then the number of classes (u32) and their names, then the names of the images; a name is its length (u32)
//! and UTF-8. Nothing may follow.

use crate::data::decode::MOST_CHANNELS;
use crate::data::source::Format;

/// The first bytes of a file; text never begins so.
pub const MAGIC: [u8; 8] = *b"\x89selfpk\n";
/// The format that is written for images of RGB of 8 bits.
pub const FORMAT: u32 = 2;
/// The format that is written for images of other channels or bits: the same layout, with a kind that older programs do not know.
pub const WITH_SAMPLES: u32 = 3;
/// An older format that is read, too: the same layout, and its packs have no manifest.
pub const WITHOUT_MANIFEST: u32 = 1;
/// Bytes of an entry with its name, at most: an index that is longer than its images allow is not read.
pub const LONGEST_NAME: u64 = 1 << 16;
/// Bytes of a header.
pub const HEADER: usize = 64;
/// Bytes of an image's entry in the index.
const ENTRY: usize = 36;

/// The name of a file of a split.
pub fn file_name(split: &str, number: u32) -> String {
    format!("{split}-{number:05}.pack")
}

/// The number of a file, if its name is that of a file of the split.
pub fn number_of(name: &str, split: &str) -> Option<u32> {
    let digits = name.strip_prefix(split)?.strip_prefix('-')?.strip_suffix(".pack")?;
    digits.parse().ok().filter(|&number| file_name(split, number) == name)
}

/// The header of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Whether images have other channels or bits than RGB of 8 bits.
    pub samples: bool,
    pub last: bool,
    pub number: u32,
    pub index_crc: u32,
    /// Images in the files before it.
    pub first: u64,
    /// Images in it.
    pub count: u64,
    pub index_at: u64,
    pub index_length: u64,
}

impl Header {
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = MAGIC.to_vec();
        let format = if self.samples { WITH_SAMPLES } else { FORMAT };
        for number in [format, u32::from(self.last), self.number, self.index_crc] {
            bytes.extend(number.to_le_bytes());
        }
        for number in [self.first, self.count, self.index_at, self.index_length] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend([0; 4]);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes.try_into().expect("the fields have a fixed length")
    }

    /// Reads the header of a file of `length` bytes. The error is the end of a sentence.
    pub fn from_bytes(bytes: &[u8; HEADER], length: u64) -> Result<Self, String> {
        let (rest, crc) = bytes.split_at(HEADER - 4);
        let mut fields = Fields(rest);
        let mut read = || {
            fields.take(MAGIC.len())?;
            let [format, last, number, index_crc] = [(); 4].map(|()| fields.u32());
            let [first, count, index_at, index_length] = [(); 4].map(|()| fields.u64());
            Some(Self {
                samples: format? == WITH_SAMPLES,
                last: last? != 0,
                number: number?,
                index_crc: index_crc?,
                first: first?,
                count: count?,
                index_at: index_at?,
                index_length: index_length?,
            })
        };
        let header = read().expect("the fields have a fixed length");
        if crc32fast::hash(rest).to_le_bytes() != crc {
            return Err("its header does not have the checksum that it names".into());
        }
        let announced = header.index_at.checked_add(header.index_length);
        if announced != Some(length) || header.index_at < HEADER as u64 {
            return Err(format!(
                "its header announces an index of {} bytes at {}, and it has {length} bytes",
                header.index_length, header.index_at
            ));
        }
        Ok(header)
    }
}

/// How an image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[height, width, 3]` bytes: 0 in a file.
    Raw,
    /// An image file: 1 in a file.
    File,
    /// `[height, width, channels]` samples, those of 16 bits little-endian: in a file 2, and from the ninth bit on the channels,
    /// from the 25th on the bits.
    Samples(Format),
}

impl Kind {
    fn to_number(self) -> u32 {
        match self {
            Self::Raw => 0,
            Self::File => 1,
            Self::Samples(Format { channels, bits }) => {
                2 | (channels as u32) << 8 | (bits as u32) << 24
            }
        }
    }

    fn from_number(number: u32) -> Option<Self> {
        let (channels, bits) = ((number >> 8 & 0xFFFF) as usize, (number >> 24) as usize);
        let known = (1..=MOST_CHANNELS).contains(&channels) && [8, 16].contains(&bits);
        match number & 0xFF {
            0 if number == 0 => Some(Self::Raw),
            1 if number == 1 => Some(Self::File),
            2 if known => Some(Self::Samples(Format { channels, bits })),
            _ => None,
        }
    }

    /// What the image's samples are.
    pub fn format(self) -> Format {
        match self {
            Self::Samples(format) => format,
            _ => Format::RGB,
        }
    }
}

/// Where an image lies, its size and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Offset of its first byte in the file.
    pub at: u64,
    /// In bytes.
    pub length: u64,
    pub width: u32,
    pub height: u32,
    /// The index of its class; 0 if there are no classes.
    pub label: u32,
    pub crc: u32,
    pub kind: Kind,
}

impl Entry {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = [self.at, self.length].map(u64::to_le_bytes).concat();
        for number in [self.width, self.height, self.label, self.crc, self.kind.to_number()] {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// Reads an entry and checks its numbers against the file's size and the number of classes.
    fn read(fields: &mut Fields<'_>, header: &Header, classes: usize) -> Result<Self, String> {
        let [at, length] =
            [(); 2].map(|()| fields.u64().expect("the length of the index was checked"));
        let [width, height, label, crc, kind] =
            [(); 5].map(|()| fields.u32().expect("the length of the index was checked"));
        let kind = Kind::from_number(kind).ok_or_else(|| format!("is of unknown kind {kind}"))?;
        if at < HEADER as u64 || at.checked_add(length).is_none_or(|end| end > header.index_at) {
            let end = header.index_at;
            return Err(format!(
                "has {length} bytes at {at}; images lie from byte {HEADER} to {end}"
            ));
        }
        let pixels = u64::from(width) * u64::from(height);
        if pixels == 0 || pixels > super::PIXEL_LIMIT as u64 {
            return Err(format!("has {width} x {height} pixels"));
        }
        if kind != Kind::File && length != kind.format().bytes() as u64 * pixels {
            return Err(format!("has {width} x {height} pixels in {length} bytes"));
        }
        if label as usize >= classes.max(1) {
            return Err(format!("is of class {label} of {classes}"));
        }
        Ok(Self { at, length, width, height, label, crc, kind })
    }
}

/// Many names in one string, for sets of millions of images.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    text: String,
    ends: Vec<usize>,
}

impl Names {
    pub fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(self.text.len());
    }

    pub fn get(&self, index: usize) -> &str {
        let from = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[from..self.ends[index]]
    }
}

/// The index of a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index {
    pub entries: Vec<Entry>,
    pub classes: Vec<String>,
    pub names: Names,
}

impl Index {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.entries.iter().flat_map(|entry| entry.to_bytes()).collect();
        bytes.extend((self.classes.len() as u32).to_le_bytes());
        let names = (0..self.entries.len()).map(|i| self.names.get(i));
        for name in self.classes.iter().map(String::as_str).chain(names) {
            bytes.extend((name.len() as u32).to_le_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes
    }

    /// Reads the index of a file with this header. The error is the end of a sentence.
    pub fn from_bytes(bytes: &[u8], header: &Header) -> Result<Self, String> {
        let short = || "its index ends early".to_string();
        if crc32fast::hash(bytes) != header.index_crc {
            return Err("its index does not have the checksum that its header names".into());
        }
        let count = usize::try_from(header.count).map_err(|_| short())?;
        let entries = count.checked_mul(ENTRY).and_then(|size| bytes.split_at_checked(size));
        let (entries, names) = entries.ok_or_else(short)?;
        let mut fields = Fields(names);
        let mut index = Self::default();
        let classes = fields.u32().ok_or_else(short)?;
        for _ in 0..classes {
            index.classes.push(fields.text().ok_or_else(short)?.to_owned());
        }
        let mut of_entries = Fields(entries);
        index.entries.reserve(count);
        for i in 0..count {
            let name = fields.text().ok_or_else(short)?;
            index.names.push(name);
            let entry = Entry::read(&mut of_entries, header, index.classes.len());
            index.entries.push(entry.map_err(|what| format!("image {i} ({name}) {what}"))?);
        }
        if !fields.0.is_empty() {
            return Err(format!("its index has {} bytes too many", fields.0.len()));
        }
        if count == 0 {
            return Err("it holds no images".into());
        }
        Ok(index)
    }
}

/// Reads numbers and names one after another; `None` at the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 were taken")))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 were taken")))
    }

    /// A name; `None` also if it is not UTF-8.
    fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        std::str::from_utf8(self.take(length as usize)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> (Index, Header) {
        let entry =
            Entry { at: 64, length: 12, width: 2, height: 2, label: 1, crc: 7, kind: Kind::Raw };
        let mut index = Index { classes: vec!["cat".into(), "dög".into()], ..Index::default() };
        for (i, name) in ["cat/a.png", "dög/b.png"].into_iter().enumerate() {
            index.entries.push(Entry { at: 64 + 12 * i as u64, ..entry });
            index.names.push(name);
        }
        let header = Header {
            samples: false,
            last: true,
            number: 3,
            index_crc: 0,
            first: 90,
            count: 2,
            index_at: 88,
            index_length: 0,
        };
        (index, header)
    }

    /// Reads an index with the checksum that it has.
    fn read(bytes: &[u8], header: &Header) -> Result<Index, String> {
        let header = Header { index_crc: crc32fast::hash(bytes), ..*header };
        Index::from_bytes(bytes, &header)
    }

    #[test]
    fn a_written_index_is_read_back() {
        let (index, header) = index();
        let bytes = index.to_bytes();
        let header = Header { index_length: bytes.len() as u64, ..header };
        let length = 88 + bytes.len() as u64;
        assert_eq!(Header::from_bytes(&header.to_bytes(), length), Ok(header));
        let read = read(&bytes, &header).unwrap();
        assert_eq!(read, index);
        assert_eq!((read.names.get(0), read.names.get(1)), ("cat/a.png", "dög/b.png"));
        for (name, number) in [
            ("train-00012.pack", Some(12)),
            ("train-123456.pack", Some(123_456)),
            ("train-000012.pack", None),
            ("train-+0012.pack", None),
            ("train-.pack", None),
            ("test-00012.pack", None),
        ] {
            assert_eq!(number_of(name, "train"), number, "{name}");
        }
    }

    /// A valid checksum proves nothing about the numbers.
    #[test]
    fn an_index_with_a_valid_checksum_is_checked_all_the_same() {
        let (good, header) = index();
        let with = |change: &dyn Fn(&mut Entry)| {
            let (mut index, _) = index();
            change(&mut index.entries[1]);
            read(&index.to_bytes(), &header).unwrap_err()
        };
        type Change<'a> = &'a dyn Fn(&mut Entry);
        let cases: [(Change, &str); 7] = [
            (&|e| e.at = 77, "has 12 bytes at 77; images lie from byte 64 to 88"),
            (&|e| e.at = 63, "has 12 bytes at 63; images lie from byte 64 to 88"),
            (
                &|e| e.at = u64::MAX,
                "has 12 bytes at 18446744073709551615; images lie from byte 64 to 88",
            ),
            (&|e| e.width = 3, "has 3 x 2 pixels in 12 bytes"),
            (&|e| e.height = 0, "has 2 x 0 pixels"),
            (&|e| (e.width, e.height) = (u32::MAX, u32::MAX), "has 4294967295 x 4294967295 pixels"),
            (&|e| e.label = 2, "is of class 2 of 2"),
        ];
        for (change, expected) in cases {
            assert_eq!(with(change), format!("image 1 (dög/b.png) {expected}"));
        }
        let bytes = good.to_bytes();
        let mut kind = bytes.clone();
        kind[2 * ENTRY - 4] = 9;
        assert_eq!(read(&kind, &header).unwrap_err(), "image 1 (dög/b.png) is of unknown kind 9");
        for length in 0..bytes.len() {
            assert_eq!(read(&bytes[..length], &header).unwrap_err(), "its index ends early");
        }
        let more = [&bytes[..], &[0]].concat();
        assert_eq!(read(&more, &header).unwrap_err(), "its index has 1 bytes too many");
        for count in [3, 1 << 40, u64::MAX] {
            let header = Header { count, ..header };
            assert_eq!(read(&bytes, &header).unwrap_err(), "its index ends early");
        }
        let none = Header { count: 0, ..header };
        assert_eq!(read(&[0; 4], &none).unwrap_err(), "it holds no images");
        for (index_at, index_length) in [(88, 1), (0, 100), (u64::MAX, 101), (60, 40)] {
            let bytes = Header { index_at, index_length, ..header }.to_bytes();
            let said = Header::from_bytes(&bytes, 100).unwrap_err();
            let expected = format!(
                "its header announces an index of {index_length} bytes at {index_at}, and it has 100 bytes"
            );
            assert_eq!(said, expected);
        }
    }
}

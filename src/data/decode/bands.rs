//! A TIFF file all of whose bands are read.
//!
//! Satellite images are written as RGB pages with further samples (near infrared, say) that are no alpha channel, and the crate
//! `tiff` leaves such samples out. Here a page of this kind is presented to it as a grey one of several samples, which it reads
//! whole; samples are the same in both.

use std::collections::HashSet;
use std::io::{self, Read, Seek, SeekFrom};

/// The photometric interpretations of the standard: grey whose 0 is black, and RGB.
const GREY: u16 = 1;
const RGB: u64 = 2;

/// Entries of a directory that are looked at; the standard has fewer tags.
const MOST_ENTRIES: u64 = 4096;

/// A file in which the interpretation of some pages is another than on disk.
pub struct AllBands<R> {
    file: R,
    /// The place of the next byte.
    at: u64,
    /// Where interpretations stand that are to be read as grey.
    grey: Vec<u64>,
    order: Order,
}

#[derive(Clone, Copy)]
enum Order {
    Little,
    Big,
}

impl Order {
    fn number(self, bytes: &[u8]) -> u64 {
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        match self {
            Order::Little => bytes.iter().rev().fold(0, add),
            Order::Big => bytes.iter().fold(0, add),
        }
    }
}

/// The first value of an entry, and where it stands.
struct Value {
    value: u64,
    at: u64,
}

impl<R: Read + Seek> AllBands<R> {
    /// Looks through the directories of the first `pages` pages. What is damaged is left for the decoder to say.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn new(mut file: R, pages: usize) -> io::Result<Self> {
        file.seek(SeekFrom::Start(0))?;
        let mut start = [0; 16];
        let len = fill(&mut file, &mut start)?;
        let order = if start[0] == b'M' { Order::Big } else { Order::Little };
        let is_big = order.number(&start[2..4]) == 43;
        let mut next = if is_big { order.number(&start[8..]) } else { order.number(&start[4..8]) };
        let mut all = Self { file, at: 0, grey: Vec::new(), order };
        let mut seen = HashSet::new();
        while len >= 8 && next != 0 && seen.len() < pages && seen.insert(next) {
            match all.directory(next, is_big)? {
                Some(after) => next = after,
                None => break,
            }
        }
        all.seek(SeekFrom::Start(0))?;
        Ok(all)
    }

    /// Takes note of the page whose directory stands at `at`; returns where the next one stands, `None` if this one is damaged.
    fn directory(&mut self, at: u64, is_big: bool) -> io::Result<Option<u64>> {
        let (counted, entry, pointer) = if is_big { (8, 20, 8) } else { (2, 12, 4) };
        let count = match self.bytes_at(at, counted)? {
            Some(bytes) => self.order.number(&bytes),
            None => return Ok(None),
        };
        if count > MOST_ENTRIES {
            return Ok(None);
        }
        let first = at + counted as u64;
        let Some(bytes) = self.bytes_at(first, count as usize * entry + pointer)? else {
            return Ok(None);
        };
        let (entries, after) = bytes.split_at(count as usize * entry);
        let mut tags = [None, None, None];
        for (i, bytes) in entries.chunks_exact(entry).enumerate() {
            let tag = self.order.number(&bytes[..2]);
            let Some(place) = [262, 277, 338].iter().position(|known| *known == tag) else {
                continue;
            };
            tags[place] = self.first_value(bytes, first + (i * entry) as u64)?;
        }
        let [interpretation, samples, extra] = tags;
        if let (Some(interpretation), Some(Value { value: samples @ 4.., .. })) =
            (interpretation, samples)
        {
            // Of four, the crate reads all if the file has no word on the fourth, or calls it alpha.
            let is_read = samples == 4 && extra.is_none_or(|extra| [1, 2].contains(&extra.value));
            if interpretation.value == RGB && !is_read {
                self.grey.push(interpretation.at);
            }
        }
        Ok(Some(self.order.number(after)))
    }

    /// The first value of an entry that stands at `at`, if it is a whole number.
    fn first_value(&mut self, entry: &[u8], at: u64) -> io::Result<Option<Value>> {
        let size: usize = match self.order.number(&entry[2..4]) {
            1 => 1,
            3 => 2,
            4 => 4,
            _ => return Ok(None),
        };
        let inline = if entry.len() == 20 { 12 } else { 8 };
        let count = self.order.number(&entry[4..inline]);
        if count.saturating_mul(size as u64) <= (entry.len() - inline) as u64 {
            let value = self.order.number(&entry[inline..][..size]);
            return Ok(Some(Value { value, at: at + inline as u64 }));
        }
        let at = self.order.number(&entry[inline..]);
        let value = self.bytes_at(at, size)?.map(|bytes| self.order.number(&bytes));
        Ok(value.map(|value| Value { value, at }))
    }

    /// Bytes of the file; `None` if it ends before.
    fn bytes_at(&mut self, at: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
        self.file.seek(SeekFrom::Start(at))?;
        let mut bytes = vec![0; len];
        Ok((fill(&mut self.file, &mut bytes)? == len).then_some(bytes))
    }
}

/// Reads until the buffer is full or the file ends; returns how many bytes there were.
fn fill(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

impl<R: Read> Read for AllBands<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(buffer)?;
        let grey = match self.order {
            Order::Little => GREY.to_le_bytes(),
            Order::Big => GREY.to_be_bytes(),
        };
        for (i, byte) in self.grey.iter().flat_map(|&at| (at..).zip(grey)) {
            if let Some(place) = i.checked_sub(self.at).filter(|&place| place < len as u64) {
                buffer[place as usize] = byte;
            }
        }
        self.at += len as u64;
        Ok(len)
    }
}

impl<R: Seek> Seek for AllBands<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = self.file.seek(to)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use tiff::encoder::colortype::{RGB8, RGB16};
    use tiff::encoder::{Rational, TiffEncoder};
    use tiff::tags::{ExtraSamples, ResolutionUnit, Tag};

    use super::super::tiff::{look, read};
    use super::super::{Reading, Values};
    use super::*;
    use crate::data::Format;

    const SIZE: [u32; 2] = [5, 3];

    /// An RGB file with further samples; sample `i` of all is `i`.
    fn rgb_and(extra: &[ExtraSamples], big: bool) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        let samples: Vec<u16> = (0..15 * (3 + extra.len() as u16)).collect();
        macro_rules! write {
            ($encoder:expr) => {{
                let mut encoder = $encoder.unwrap();
                let mut image = encoder.new_image::<RGB16>(SIZE[0], SIZE[1]).unwrap();
                image.extra_samples(extra).unwrap();
                image.resolution(ResolutionUnit::Inch, Rational { n: 1, d: 1 });
                image.write_data(&samples).unwrap();
            }};
        }
        match big {
            true => write!(TiffEncoder::new_big(&mut file)),
            false => write!(TiffEncoder::new(&mut file)),
        }
        file.into_inner()
    }

    #[test]
    fn bands_beyond_rgb_are_read() {
        use ExtraSamples::{AssociatedAlpha, Unspecified};
        for big in [false, true] {
            for (extra, alpha) in [
                (&[Unspecified][..], false),
                (&[AssociatedAlpha][..], true),
                (&[Unspecified, Unspecified][..], false),
                (&[AssociatedAlpha, Unspecified][..], false),
                (&[Unspecified; 5][..], false),
            ] {
                let file = rgb_and(extra, big);
                let channels = 3 + extra.len();
                let native = look(Cursor::new(&file)).unwrap();
                assert_eq!((native.channels, native.bits, native.alpha), (channels, 16, alpha));
                let reading =
                    Reading { format: Format { channels, bits: 16 }, ..Reading::default() };
                let image = read(Cursor::new(&file), 0, &reading).unwrap();
                let Values::U16(values) = &image.values else { panic!("{extra:?}") };
                assert_eq!(
                    (image.size, image.channels),
                    (SIZE.map(|side| side as usize), channels)
                );
                assert!(values.iter().copied().eq(0..15 * channels as u16), "{extra:?}");
            }
        }
    }

    #[test]
    fn the_other_bytes_stay_and_odd_reads_are_right() {
        let file = rgb_and(&[ExtraSamples::Unspecified], false);
        let mut all = AllBands::new(Cursor::new(&file), 1).unwrap();
        let at = all.grey[0] as usize;
        assert_eq!((all.grey.len(), &file[at..at + 2]), (1, &[2, 0][..]));
        let mut expected = file.clone();
        expected[at] = 1;
        for step in [1, 2, 3, 7, file.len()] {
            all.seek(SeekFrom::Start(0)).unwrap();
            let mut read = vec![0; file.len()];
            for part in read.chunks_mut(step) {
                assert_eq!(fill(&mut all, part).unwrap(), part.len());
            }
            assert!(read == expected, "{step}");
        }
        all.seek(SeekFrom::Start(at as u64 + 1)).unwrap();
        assert_eq!(all.bytes_at(at as u64, 2).unwrap().unwrap(), [2, 0]); // the file itself
    }

    #[test]
    fn damaged_files_end_the_walk() {
        let file = rgb_and(&[ExtraSamples::Unspecified], false);
        for len in 0..file.len() {
            let mut all = AllBands::new(Cursor::new(&file[..len]), usize::MAX).unwrap();
            assert_eq!(io::copy(&mut all, &mut io::sink()).unwrap(), len as u64);
        }
        // A directory that names itself as the next.
        let mut circle = file.clone();
        let directory = u32::from_le_bytes(circle[4..8].try_into().unwrap()) as usize;
        let count = usize::from(u16::from_le_bytes([circle[directory], circle[directory + 1]]));
        let next = directory + 2 + 12 * count;
        circle[next..next + 4].copy_from_slice(&(directory as u32).to_le_bytes());
        assert_eq!(AllBands::new(Cursor::new(&circle), usize::MAX).unwrap().grey.len(), 1);
        // Pictures in RGB alone are as on disk.
        let mut plain = Cursor::new(Vec::new());
        let mut encoder = TiffEncoder::new(&mut plain).unwrap();
        let mut image = encoder.new_image::<RGB8>(SIZE[0], SIZE[1]).unwrap();
        image.encoder().write_tag(Tag::Artist, "a").unwrap();
        image.write_data(&[7; 45]).unwrap();
        assert!(AllBands::new(plain, usize::MAX).unwrap().grey.is_empty());
    }
}

//! Packs the images of a folder into few large files.

use std::cell::RefCell;
use std::fs::{File, TryLockError};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::iter::Peekable;
use std::path::{Path, PathBuf};

use jpeg_encoder::{ColorType, Encoder};
use rayon::prelude::*;

use super::format::{Entry, HEADER, Header, Index, Kind, file_name};
use super::manifest::{MANIFEST, Manifest, SplitInfo};
use super::{Pack, left_by_a_pack};
use crate::data::augment::{Buffers, CropBox, Filter, Resize};
use crate::data::batch::Skipped;
use crate::data::cifar::Cifar;
use crate::data::decode::{Reading, decode, decode_page};
use crate::data::folder::Folder;
use crate::data::idx::Idx;
use crate::data::open::{SplitFolders, folders, labelled_part};
use crate::data::source::{Format, Image, Source, Split};
use crate::data::table::LabelTable;
use crate::error::{Error, Result};
use crate::files::{Lock, create_folder, find, is_folder, replace_file, write_error, write_file};

/// Images per thread that are prepared before they are written in order; bounds the memory.
const AHEAD: usize = 4;

/// How images are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The bytes of their files; images that are made smaller become JPEG of this quality, 1 to 100.
    Files {
        /// On libjpeg's scale.
        quality: u8,
    },
    /// Decoded, three bytes per pixel: training has nothing to decode.
    Raw,
}

/// How to pack.
#[derive(Clone, Debug, PartialEq)]
pub struct PackSettings {
    /// How the files are read. Images of other channels or bits than RGB of 8 bits are stored as samples, whatever `stored` says.
    pub reading: Reading,
    /// The classes of the files, in place of those of class folders; files without one are left out.
    pub labels: Option<LabelTable>,
    /// The shorter side of larger images in the pack, in pixels; smaller images stay as they are.
    pub size: Option<usize>,
    /// How images are stored.
    pub stored: Stored,
    /// The most bytes of images per file, unless a single image has more.
    pub file_bytes: u64,
}

/// The result of [`pack`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Number of images.
    pub images: usize,
    /// The files of images, in order; the manifest is not among them.
    pub files: Vec<PathBuf>,
    /// Bytes of all of these.
    pub bytes: u64,
    /// Broken images, which were left out.
    pub skipped: Vec<Skipped>,
    /// Sentences on what is in the folder and was not packed.
    pub notes: Vec<String>,
}

/// An image, ready to be written.
struct Record {
    bytes: Vec<u8>,
    name: String,
    /// Complete but for its offset.
    entry: Entry,
}

/// Packs the images of `from` into the folder `to`, which is created: each of the splits `train/`, `test/`, `val/` and
/// `valid/` or `validation/`, or `from` itself as the training split. The same images and settings give the same bytes. `progress` is called
/// with the number of images done and their total.
///
/// A manifest is written last, so a pack that was stopped is never taken for a complete one.
///
/// # Errors
/// If `from` is not a folder of images, a file cannot be read, no image of a split can be decoded, `to` is not empty, or the
/// disk is full. What was written until then is removed.
pub fn pack(
    from: &Path,
    to: &Path,
    settings: &PackSettings,
    progress: impl FnMut(usize, usize),
) -> Result<Packed> {
    pack_if(from, to, settings, progress, |_| Ok(()))
}

/// Like [`pack`], and calls `accept` before the manifest is written, when all images are packed or left out.
///
/// # Errors
/// As [`pack`], and those of `accept`.
pub fn pack_if(
    from: &Path,
    to: &Path,
    settings: &PackSettings,
    progress: impl FnMut(usize, usize),
    accept: impl FnOnce(&Packed) -> Result<()>,
) -> Result<Packed> {
    let (splits, note) = open_splits(from, settings)?;
    let _lock = prepare(to)?;
    let mut packed = Packed { notes: note.into_iter().collect(), ..Packed::default() };
    let packing = pack_splits(&splits, to, settings, progress, &mut packed).and_then(|manifest| {
        accept(&packed)?;
        write_file(&to.join(MANIFEST), &manifest.to_bytes())
    });
    if let Err(error) = packing {
        // Best effort: the first error is the one to report.
        packed.files.iter().for_each(|file| drop(std::fs::remove_file(file)));
        let _ = std::fs::remove_dir(to); // removes it only if it is empty
        return Err(error);
    }
    Ok(packed)
}

/// A split's name, its folder and its images.
type OpenSplit = (&'static str, PathBuf, Folder);

/// Lists the images of all splits; the second value is a sentence on folders of images that are not read.
fn open_splits(from: &Path, settings: &PackSettings) -> Result<(Vec<OpenSplit>, Option<String>)> {
    settings.check()?;
    if find(from)?.is_none() {
        return Err(Error::format(from, "no such folder: check the path of the images"));
    }
    if !is_folder(from)? {
        return Err(Error::format(from, "is a file: name the folder that the images are in"));
    }
    if Cifar::is_at(from)? || Idx::is_at(from)? {
        return Err(Error::format(
            from,
            "holds CIFAR's binary files or idx files, which are read as fast as a pack: train on them as they are",
        ));
    }
    if Pack::is_at(from)? {
        return Err(Error::format(
            from,
            "is packed already: pack the folder that the images came from",
        ));
    }
    let found = SplitFolders::of(from)?;
    let note = found.as_ref().and_then(SplitFolders::note);
    let mut splits: Vec<(&str, PathBuf)> = Vec::new();
    match found {
        Some(SplitFolders { train, held_out, .. }) => {
            let split = |name: &&'static str| (*name, from.join(name));
            let there =
                |folder: &PathBuf| train.as_ref() == Some(folder) || held_out.contains(folder);
            let all = [Split::Train, Split::Test].into_iter().flat_map(folders);
            splits.extend(all.map(split).filter(|(_, folder)| there(folder)));
        }
        None => splits.push(("train", from.to_path_buf())),
    }
    if let Some(table) = &settings.labels {
        return Ok((labelled_splits(from, &splits, settings, table)?, note));
    }
    let mut opened: Vec<OpenSplit> = Vec::new();
    for (split, folder) in splits {
        let mut images = Folder::open_as(&folder, &settings.reading)?;
        if let Some(("train", _, train)) = opened.first() {
            images = images.with_classes_of(&folder, train.classes())?;
        }
        opened.push((split, folder, images));
    }
    Ok((opened, note))
}

/// Lists the images of all splits with the classes of a table, which says which are held out if no folders do.
fn labelled_splits(
    from: &Path,
    splits: &[(&'static str, PathBuf)],
    settings: &PackSettings,
    table: &LabelTable,
) -> Result<Vec<OpenSplit>> {
    let reading = &settings.reading;
    if let Some(found) = SplitFolders::of(from)? {
        let open = |(split, folder): &(&'static str, PathBuf)| {
            Ok((*split, folder.clone(), found.labelled(folder, reading, table)?))
        };
        return splits.iter().map(open).collect();
    }
    let both = [("train", Split::Train), ("test", Split::Test)];
    let there = |(_, split): &(_, Split)| *split == Split::Train || table.names(*split);
    let open =
        |(name, split)| Ok((name, from.to_path_buf(), labelled_part(from, split, reading, table)?));
    both.into_iter().filter(there).map(open).collect()
}

/// Writes the files of all splits; returns the manifest.
fn pack_splits(
    splits: &[OpenSplit],
    to: &Path,
    settings: &PackSettings,
    mut progress: impl FnMut(usize, usize),
    packed: &mut Packed,
) -> Result<Manifest> {
    let total = splits.iter().map(|(_, _, images)| images.len()).sum();
    let mut before = 0;
    let mut manifest = Manifest { range: settings.reading.range, ..Manifest::default() };
    for (split, folder, images) in splits {
        let seen = |count| progress(before + count, total);
        let files_before = (packed.files.len(), packed.images);
        let left_out = packed.skipped.len();
        let any = pack_split(images, (to, split), settings, seen, packed)?;
        if let Some(Skipped { reason, .. }) = packed.skipped.get(left_out).filter(|_| !any) {
            let count = images.len();
            let reason = format!("none of its {count} images can be read; the first: {reason}");
            return Err(Error::format(folder, reason));
        }
        packed.notes.extend(images.notes().iter().cloned());
        before += images.len();
        let files = (packed.files.len() - files_before.0) as u32;
        let images = (packed.images - files_before.1) as u64;
        manifest.splits.insert((*split).to_owned(), SplitInfo { files, images });
    }
    Ok(manifest)
}

impl PackSettings {
    fn check(&self) -> Result<()> {
        self.reading.check()?;
        if self.size == Some(0) {
            return Err(Error::config("images cannot be packed at 0 pixels"));
        }
        if let Stored::Files { quality } = self.stored
            && !(1..=100).contains(&quality)
        {
            return Err(Error::config(format!("JPEG's quality is 1 to 100, not {quality}")));
        }
        Ok(())
    }
}

/// Creates the folder, or checks that it is empty. Returns the lock on it.
fn prepare(to: &Path) -> Result<Option<Lock>> {
    if find(to)?.is_some_and(|found| !found.is_dir()) {
        return Err(Error::format(to, "is a file: choose another folder to pack into"));
    }
    create_folder(to)?;
    // The folder itself is locked, so that no file remains. Not every system and file system can.
    let lock = match File::open(to).ok().map(Lock::take) {
        Some(Err(TryLockError::WouldBlock)) => {
            return Err(Error::format(
                to,
                "is in use: another process packs into it; wait for it, or choose another folder to pack into",
            ));
        }
        lock => lock.and_then(Result::ok),
    };
    match std::fs::read_dir(to).map_err(Error::io(to))?.next() {
        None => Ok(lock),
        Some(_) => {
            let left = left_by_a_pack(to)?;
            let reason = match left.first() {
                Some(first) if Manifest::read(to)?.is_none() => format!(
                    "holds what is left of a pack that was stopped ({}): delete it, or choose another folder to pack into",
                    if left.len() == 1 {
                        first.clone()
                    } else {
                        format!("{first} and {} more files", left.len() - 1)
                    }
                ),
                _ => "is not empty: choose another folder to pack into, or empty it".into(),
            };
            Err(Error::format(to, reason))
        }
    }
}

/// Writes the files of a split. Returns whether there are any.
fn pack_split(
    images: &Folder,
    (to, split): (&Path, &str),
    settings: &PackSettings,
    mut seen: impl FnMut(usize),
    packed: &mut Packed,
) -> Result<bool> {
    let Packed { images: count, files, bytes, skipped, .. } = packed;
    let places: Vec<usize> = (0..images.len()).collect();
    let failure = RefCell::new(None);
    let records = places.chunks(AHEAD * rayon::current_num_threads()).flat_map(|places| {
        let make = |scratch: &mut Scratch, &place: &usize| {
            (place, record(images, place, settings, scratch))
        };
        let records: Vec<_> = places.par_iter().map_init(Scratch::default, make).collect();
        seen(places[places.len() - 1] + 1);
        records
    });
    // Ends at the first error that is not a broken image.
    let readable = records.map_while(|(place, record)| match record {
        Ok(record) => Some(Some(record)),
        Err(error) => match Skipped::new(place, error) {
            Ok(broken) => {
                skipped.push(broken);
                Some(None)
            }
            Err(error) => {
                *failure.borrow_mut() = Some(error);
                None
            }
        },
    });
    let mut records = readable.flatten().peekable();
    let (mut number, mut first) = (0, 0);
    while records.peek().is_some() {
        let path = to.join(file_name(split, number));
        replace_file(&path, |partial| {
            let file = File::create(partial).map_err(|e| write_error(&path, e))?;
            let samples = !settings.reading.is_rgb();
            let begun = Header { samples, number, first, ..Header::default() };
            let written = write(file, begun, images.classes(), settings.file_bytes, &mut records);
            let (held, size) = written.map_err(|e| write_error(&path, e))?;
            if let Some(error) = failure.take() {
                return Err(error);
            }
            first += held;
            *bytes += size;
            Ok(())
        })?;
        files.push(path);
        number += 1;
    }
    if let Some(error) = failure.take() {
        return Err(error);
    }
    *count += first as usize;
    Ok(number > 0)
}

/// Writes one file: images while they fit, then the index, then the header. Returns the number of its images and bytes.
fn write(
    file: File,
    mut header: Header,
    classes: &[String],
    limit: u64,
    records: &mut Peekable<impl Iterator<Item = Record>>,
) -> std::io::Result<(u64, u64)> {
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&[0; HEADER])?;
    let mut index = Index { classes: classes.to_vec(), ..Index::default() };
    let mut at = HEADER as u64;
    let end = at.saturating_add(limit);
    while let Some(record) =
        records.next_if(|next| index.entries.is_empty() || at + next.entry.length <= end)
    {
        file.write_all(&record.bytes)?;
        index.entries.push(Entry { at, ..record.entry });
        index.names.push(&record.name);
        at += record.entry.length;
    }
    let bytes = index.to_bytes();
    file.write_all(&bytes)?;
    header.last = records.peek().is_none();
    header.count = index.entries.len() as u64;
    header.index_at = at;
    header.index_length = bytes.len() as u64;
    header.index_crc = crc32fast::hash(&bytes);
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&header.to_bytes())?;
    file.flush()?;
    Ok((header.count, at + header.index_length))
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    image: Image,
    smaller: Image,
    resize: Buffers,
    tile: Vec<[u8; 4]>,
    floats: Vec<[f32; 4]>,
}

/// Prepares an image to be written. It is decoded in any case, so that a broken one is found here and not during a run.
fn record(
    images: &Folder,
    place: usize,
    settings: &PackSettings,
    scratch: &mut Scratch,
) -> Result<Record> {
    let path = images.file(place);
    let (reading, page) = (images.reading(), images.page(place));
    let mut bytes = match page {
        Some(_) => Vec::new(),
        None => std::fs::read(path).map_err(Error::io(path))?,
    };
    match page {
        Some(page) => decode_page(path, page, reading, &mut scratch.image)?,
        None => decode(path, &bytes, reading, &mut scratch.image)?,
    }
    let shrunk = settings.size.filter(|&size| scratch.image.width.min(scratch.image.height) > size);
    if let Some(size) = shrunk {
        shrink(size, scratch);
    }
    let image = if shrunk.is_some() { &scratch.smaller } else { &scratch.image };
    let kind = match settings.stored {
        _ if !reading.is_rgb() => {
            bytes.clone_from(&image.pixels);
            Kind::Samples(image.format)
        }
        Stored::Files { quality } if shrunk.is_some() => {
            bytes = jpeg(path, image, quality)?;
            Kind::File
        }
        // The pack's reader knows neither pages nor axes.
        Stored::Files { .. } if page.is_none() && reading.pages.is_none() && !is_array(&bytes) => {
            Kind::File
        }
        _ => {
            bytes.clone_from(&image.pixels);
            Kind::Raw
        }
    };
    let label = images.label(place).unwrap_or_default();
    let name = images.name_in_folder(place);
    let (crc, length) = (crc32fast::hash(&bytes), bytes.len() as u64);
    let [width, height] = [image.width, image.height].map(|side| side as u32);
    let entry = Entry { at: 0, length, width, height, label, crc, kind };
    Ok(Record { bytes, name, entry })
}

fn jpeg(path: &Path, image: &Image, quality: u8) -> Result<Vec<u8>> {
    let failed = |what: String| Error::format(path, format!("cannot be written as JPEG: {what}"));
    let side = |side: usize| {
        u16::try_from(side).map_err(|_| failed(format!("{side} pixels are more than 65535")))
    };
    let (width, height) = (side(image.width)?, side(image.height)?);
    let mut bytes = Vec::new();
    Encoder::new(&mut bytes, quality)
        .encode(&image.pixels, width, height, ColorType::Rgb)
        .map_err(|e| failed(e.to_string()))?;
    Ok(bytes)
}

/// Resamples the image so that its shorter side is `size`, as torchvision's `Resize` over Pillow does (bilinear, antialiased,
/// the longer side truncated).
fn shrink(size: usize, scratch: &mut Scratch) {
    let Scratch { image, smaller, resize, tile, floats } = scratch;
    let [width, height] = [image.width, image.height];
    let short = width.min(height);
    let target = [width, height].map(|side| size * side / short);
    let wide = width >= height;
    let format = image.format;
    smaller.reshape(target[0], target[1], format);
    let longest = target[0].max(target[1]);
    // A resize makes squares: tiles along the longer side, of which the last overlaps the one before it.
    for from in (0..longest).step_by(size).map(|from| from.min(longest - size)) {
        let first = if wide { [from, 0] } else { [0, from] };
        let crop = CropBox { left: 0, top: 0, width, height };
        let (filter, antialias, flip) = (Filter::Bilinear, true, false);
        let by = Resize { crop, target, first, size, filter, antialias, flip };
        let at = |row: usize| (first[1] + row) * target[0] + first[0];
        if format == Format::RGB {
            by.to_u8(image, resize, tile);
            for (row, pixels) in tile.chunks_exact(size).enumerate() {
                let to = smaller.pixels[3 * at(row)..].as_chunks_mut::<3>().0;
                to.iter_mut().zip(pixels).for_each(|(to, &[r, g, b, _])| *to = [r, g, b]);
            }
            continue;
        }
        for channel in (0..format.channels).step_by(3) {
            by.to_float_from(image, channel, resize, floats);
            for (row, pixels) in floats.chunks_exact(size).enumerate() {
                let to = &mut smaller.pixels[at(row) * format.bytes()..];
                for (to, pixel) in to.chunks_exact_mut(format.bytes()).zip(pixels) {
                    let most = (format.channels - channel).min(3);
                    for (c, value) in (channel..).zip(&pixel[..most]) {
                        match format.bits {
                            8 => to[c] = (value * 255.0).round() as u8,
                            _ => to[2 * c..2 * c + 2]
                                .copy_from_slice(&((value * 65535.0).round() as u16).to_le_bytes()),
                        }
                    }
                }
            }
        }
    }
}

/// Whether the bytes of a file are those of a NumPy array.
fn is_array(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x93NUMPY")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smaller_image_has_no_seams_and_the_right_sides() {
        let mut scratch = Scratch::default();
        for (sides, expected) in [([31, 9], [17, 5]), ([9, 31], [5, 17]), ([9, 9], [5, 5])] {
            scratch.image.resize(sides[0], sides[1]);
            let pixels = scratch.image.pixels.iter_mut().zip(0..);
            pixels.for_each(|(v, i): (_, usize)| *v = (i * i * 37 % 251) as u8);
            shrink(5, &mut scratch);
            let Scratch { image, smaller, resize, tile, .. } = &mut scratch;
            assert_eq!([smaller.width, smaller.height], expected);
            let crop = CropBox { left: 0, top: 0, width: sides[0], height: sides[1] };
            // Every square of it, wherever it begins.
            for at in 0..=expected[0].max(expected[1]) - 5 {
                let first = if sides[0] > sides[1] { [at, 0] } else { [0, at] };
                let (filter, antialias, flip) = (Filter::Bilinear, true, false);
                Resize { crop, target: expected, first, size: 5, filter, antialias, flip }
                    .to_u8(image, resize, tile);
                for (i, &[r, g, b, _]) in tile.iter().enumerate() {
                    let place = (first[1] + i / 5) * expected[0] + first[0] + i % 5;
                    assert_eq!(smaller.pixels[3 * place..][..3], [r, g, b], "{sides:?}, {at}, {i}");
                }
            }
        }
    }
}

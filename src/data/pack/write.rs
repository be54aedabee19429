//! Packing: a folder's images into few large files.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::iter::Peekable;
use std::path::{Path, PathBuf};

use jpeg_encoder::{ColorType, Encoder};
use rayon::prelude::*;

use super::format::{Entry, HEADER, Header, Index, Kind, file_name};
use crate::data::augment::{Buffers, CropBox, Filter, Resize};
use crate::data::batch::Skipped;
use crate::data::decode::decode;
use crate::data::folder::{self, Folder};
use crate::data::open::folders;
use crate::data::source::{Image, Source, Split};
use crate::error::{Error, Result};
use crate::files::{no_room, whole};

/// Images that are made per thread before they are written, in order: what bounds the memory.
const AHEAD: usize = 4;

/// How images are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The bytes of their files; where they are made smaller, JPEG of this quality, 1 to 100.
    Files {
        /// libjpeg's scale.
        quality: u8,
    },
    /// Decoded, three bytes a pixel: nothing is left to decode while training.
    Raw,
}

/// How to pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackSettings {
    /// What the shorter side of larger images becomes, in pixels; smaller ones stay as they are.
    pub size: Option<usize>,
    /// How images are kept.
    pub stored: Stored,
    /// The most bytes of images in a file, unless one image alone has more.
    pub file_bytes: u64,
}

/// What has been packed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// How many.
    pub images: usize,
    /// In order.
    pub files: Vec<PathBuf>,
    /// Of all of these.
    pub bytes: u64,
    /// Those that cannot be read, which were left out.
    pub skipped: Vec<Skipped>,
}

/// An image, ready to be written.
struct Record {
    bytes: Vec<u8>,
    name: String,
    /// Without its place.
    entry: Entry,
}

/// Packs the images of `from` into the folder `to`, which is made: each of the parts `train/`, `test/` and `val/`, or `from` itself,
/// as its training part. The same images and settings give the same bytes. `done` hears how many images of how many have been
/// seen to.
///
/// # Errors
/// When `from` is no folder of images, none of a part can be read, `to` is not empty, or there is no room.
pub fn pack(
    from: &Path,
    to: &Path,
    settings: &PackSettings,
    mut done: impl FnMut(usize, usize),
) -> Result<Packed> {
    settings.check()?;
    if !from.exists() {
        return Err(Error::format(from, "no such folder: check the path of the images"));
    }
    let parts = [Split::Train, Split::Test].into_iter().flat_map(folders);
    let mut parts: Vec<_> =
        parts.map(|part| (*part, from.join(part))).filter(|(_, folder)| folder.is_dir()).collect();
    if parts.is_empty() {
        parts.push(("train", from.to_path_buf()));
    }
    let opened = parts.iter().map(|(part, folder)| Ok((*part, folder, Folder::open(folder)?)));
    let parts: Vec<_> = opened.collect::<Result<_>>()?;
    prepare(to)?;
    let total = parts.iter().map(|(_, _, images)| images.len()).sum();
    let (mut packed, mut before) = (Packed::default(), 0);
    for (part, folder, images) in &parts {
        let seen = |count| done(before + count, total);
        let left_out = packed.skipped.len();
        let any = pack_part(images, (to, part), settings, seen, &mut packed);
        let wrote = any.and_then(|any| match packed.skipped.get(left_out) {
            Some(Skipped { reason, .. }) if !any => {
                let count = images.len();
                let reason = format!("none of its {count} images can be read; the first: {reason}");
                Err(Error::format(folder, reason))
            }
            _ => Ok(()),
        });
        if wrote.is_err() {
            let _ = std::fs::remove_dir(to); // goes only if nothing is in it
        }
        wrote?;
        before += images.len();
    }
    Ok(packed)
}

impl PackSettings {
    fn check(&self) -> Result<()> {
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

/// Makes the folder, or finds it empty.
fn prepare(to: &Path) -> Result<()> {
    if to.exists() && !to.is_dir() {
        return Err(Error::format(to, "is a file: choose another folder to pack into"));
    }
    std::fs::create_dir_all(to).map_err(Error::io(to))?;
    match std::fs::read_dir(to).map_err(Error::io(to))?.next() {
        None => Ok(()),
        Some(_) => {
            let reason = "is not empty: choose another folder to pack into, or empty it";
            Err(Error::format(to, reason))
        }
    }
}

/// Writes the files of a part; whether there is any.
fn pack_part(
    images: &Folder,
    (to, part): (&Path, &str),
    settings: &PackSettings,
    mut seen: impl FnMut(usize),
    packed: &mut Packed,
) -> Result<bool> {
    let Packed { images: count, files, bytes, skipped } = packed;
    let places: Vec<usize> = (0..images.len()).collect();
    let made = places.chunks(AHEAD * rayon::current_num_threads()).flat_map(|places| {
        let make = |scratch: &mut Scratch, &place: &usize| {
            (place, record(images, place, settings, scratch))
        };
        let records: Vec<_> = places.par_iter().map_init(Scratch::default, make).collect();
        seen(places[places.len() - 1] + 1);
        records
    });
    let whole_ones = made.filter_map(|(place, record)| match record {
        Ok(record) => Some(record),
        Err(e) => {
            skipped.push(Skipped { index: place as u32, reason: e.to_string() });
            None
        }
    });
    let mut records = whole_ones.peekable();
    let (mut number, mut first) = (0, 0);
    while records.peek().is_some() {
        let path = to.join(file_name(part, number));
        whole(&path, |partial| {
            let file = File::create(partial).map_err(|e| no_room(&path, e))?;
            let begun = Header { number, first, ..Header::default() };
            let written = write(file, begun, images.classes(), settings.file_bytes, &mut records);
            let (held, size) = written.map_err(|e| no_room(&path, e))?;
            first += held;
            *bytes += size;
            Ok(())
        })?;
        files.push(path);
        number += 1;
    }
    *count += first as usize;
    Ok(number > 0)
}

/// Writes one file: images while they fit, then the index, then the header. Says how many images and bytes it has.
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
}

/// An image as it is to be written. It is decoded in any case: a broken one is found here, not in the middle of a run.
fn record(
    images: &Folder,
    place: usize,
    settings: &PackSettings,
    scratch: &mut Scratch,
) -> Result<Record> {
    let path = images.file(place);
    let mut bytes = std::fs::read(path).map_err(Error::io(path))?;
    decode(path, &bytes, &mut scratch.image)?;
    let shrunk = settings.size.filter(|&size| scratch.image.width.min(scratch.image.height) > size);
    if let Some(size) = shrunk {
        shrink(size, scratch);
    }
    let image = if shrunk.is_some() { &scratch.smaller } else { &scratch.image };
    let kind = match settings.stored {
        Stored::Raw => {
            bytes.clone_from(&image.pixels);
            Kind::Raw
        }
        Stored::Files { quality } => {
            if shrunk.is_some() {
                bytes = jpeg(path, image, quality)?;
            }
            Kind::File
        }
    };
    let label = images.label(place).unwrap_or_default();
    let file = folder::file_name(path);
    let name = match images.classes().get(label as usize) {
        Some(class) => format!("{class}/{file}"),
        None => file,
    };
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
    let Scratch { image, smaller, resize, tile } = scratch;
    let [width, height] = [image.width, image.height];
    let short = width.min(height);
    let target = [width, height].map(|side| size * side / short);
    let wide = width >= height;
    smaller.resize(target[0], target[1]);
    let longest = target[0].max(target[1]);
    // A resize makes squares: along the longer side, the last one over part of the one before it.
    for from in (0..longest).step_by(size).map(|from| from.min(longest - size)) {
        let first = if wide { [from, 0] } else { [0, from] };
        let crop = CropBox { left: 0, top: 0, width, height };
        let (filter, antialias, flip) = (Filter::Bilinear, true, false);
        Resize { crop, whole: target, first, size, filter, antialias, flip }
            .to_u8(image, resize, tile);
        for (row, pixels) in tile.chunks_exact(size).enumerate() {
            let to = (first[1] + row) * target[0] + first[0];
            let to = smaller.pixels[3 * to..].as_chunks_mut::<3>().0;
            to.iter_mut().zip(pixels).for_each(|(to, &[r, g, b, _])| *to = [r, g, b]);
        }
    }
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
            let Scratch { image, smaller, resize, tile } = &mut scratch;
            assert_eq!([smaller.width, smaller.height], expected);
            let crop = CropBox { left: 0, top: 0, width: sides[0], height: sides[1] };
            // Every square of it, wherever it begins.
            for at in 0..=expected[0].max(expected[1]) - 5 {
                let first = if sides[0] > sides[1] { [at, 0] } else { [0, at] };
                let (filter, antialias, flip) = (Filter::Bilinear, true, false);
                Resize { crop, whole: expected, first, size: 5, filter, antialias, flip }
                    .to_u8(image, resize, tile);
                for (i, &[r, g, b, _]) in tile.iter().enumerate() {
                    let place = (first[1] + i / 5) * expected[0] + first[0] + i % 5;
                    assert_eq!(smaller.pixels[3 * place..][..3], [r, g, b], "{sides:?}, {at}, {i}");
                }
            }
        }
    }
}

//! What the directory of a page says: size, samples, and where and how its strips or tiles are stored.
//!
//! What is not known for certain is refused.

use std::io::{Read, Seek};

use super::super::samples::MOST_CHANNELS;
use super::super::{PIXEL_LIMIT, check_size};
use super::Found;
use super::directory::{Directory, Tag, Tiff, damaged};

/// How the strips or tiles of a page are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Lzw,
    Deflate,
    PackBits,
}

/// What samples were replaced by before they were packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predictor {
    None,
    /// Their differences to the samples on the left.
    Differences,
    /// The differences of their bytes, the upper bytes of a row first.
    FloatBytes,
}

/// A page whose directory was understood.
#[derive(Debug)]
pub struct Page {
    /// Width and height as they are stored.
    pub size: [usize; 2],
    /// Samples of a pixel.
    pub channels: usize,
    /// Bits of a sample: 8, 16, or 32 of a float.
    pub bits: usize,
    /// Whether the last sample is an alpha channel.
    pub alpha: bool,
    /// Whether the colours were multiplied by it.
    pub premultiplied: bool,
    /// Whether 0 is white.
    pub inverted: bool,
    /// How the page is turned to be shown, 1 (as it is stored) to 8.
    pub orientation: usize,
    pub chunks: Chunks,
}

/// The strips or tiles of a page.
#[derive(Debug)]
pub struct Chunks {
    /// Width and height of each.
    pub size: [usize; 2],
    /// Whether they are tiles, which have this size at the edges of the image, too.
    pub tiled: bool,
    /// Numbers of samples that are stored apart: 1 if they lie side by side in a pixel.
    pub planes: usize,
    /// Places of the chunks in the file, row by row, plane by plane.
    pub offsets: Vec<u64>,
    /// Their bytes in the file; those of what is not packed are not needed.
    pub counts: Vec<u64>,
    pub packing: Packing,
    pub predictor: Predictor,
    /// Whether the first pixel has the lowest bits of a byte: the bits of each byte are reversed.
    pub reversed: bool,
    pub big_endian: bool,
}

/// The kinds of further samples that are alpha: one that the colours were multiplied by, and one that they were not.
const ASSOCIATED: u64 = 1;
const UNASSOCIATED: u64 = 2;

/// A directory's values.
struct Tags<'a, R> {
    tiff: &'a mut Tiff<R>,
    directory: &'a Directory,
}

impl<R: Read + Seek> Tags<'_, R> {
    fn all(&mut self, tag: Tag) -> Found<Option<Vec<u64>>> {
        self.tiff.all(self.directory, tag)
    }

    fn one(&mut self, tag: Tag) -> Found<Option<u64>> {
        match self.all(tag)?.as_deref() {
            None => Ok(None),
            Some(&[value]) => Ok(Some(value)),
            Some(values) => Err(damaged(format!("{} values of {tag:?}", values.len()))),
        }
    }

    fn or(&mut self, tag: Tag, absent: u64) -> Found<u64> {
        Ok(self.one(tag)?.unwrap_or(absent))
    }

    fn side(&mut self, tag: Tag) -> Found<usize> {
        let side = self.one(tag)?.ok_or_else(|| lacks(tag))?;
        Ok(usize::try_from(side).unwrap_or(usize::MAX))
    }

    /// The value that a tag gives to all samples; an error if it gives them different ones.
    fn of_samples(&mut self, tag: Tag, absent: u64, samples: usize) -> Found<u64> {
        let values = self.all(tag)?.unwrap_or_else(|| vec![absent]);
        let Some(&first) = values.first().filter(|_| [1, samples].contains(&values.len())) else {
            return Err(damaged(format!("{} values of {tag:?}", values.len())));
        };
        match values.iter().all(|&value| value == first) {
            true => Ok(first),
            false => Err(format!("is a TIFF file whose samples differ in {tag:?}: {values:?}")),
        }
    }
}

fn lacks(tag: Tag) -> String {
    damaged(format!("it has no {tag:?}"))
}

impl Page {
    /// The page of a directory.
    pub fn of<R: Read + Seek>(tiff: &mut Tiff<R>, directory: &Directory) -> Found<Self> {
        let big_endian = tiff.big_endian;
        let mut tags = Tags { tiff, directory };
        let size = [tags.side(Tag::ImageWidth)?, tags.side(Tag::ImageLength)?];
        check_size(size[0], size[1])?;
        let samples = tags.or(Tag::SamplesPerPixel, 1)?;
        let channels = usize::try_from(samples).unwrap_or(usize::MAX);
        if !(1..=MOST_CHANNELS).contains(&channels) {
            return Err(format!("has {channels} channels; the most is {MOST_CHANNELS}"));
        }
        let bits = bits_of(&mut tags, channels)?;
        if size[0] * size[1] * channels * (bits / 8) > 4 * PIXEL_LIMIT {
            return Err("is a TIFF file that is too large".into());
        }
        let (colours, white_is_zero) = interpretation(&mut tags)?;
        let extra = tags.all(Tag::ExtraSamples)?.unwrap_or_default();
        if channels < colours + extra.len() {
            return Err(damaged(format!(
                "it has {channels} samples a pixel, {} of them beside {colours} of colour",
                extra.len()
            )));
        }
        if white_is_zero && channels > 1 {
            return Err(format!("is a TIFF file of {channels} channels whose 0 is white"));
        }
        // A further sample need not be alpha: only what the file calls so is.
        let last = extra.last().copied();
        let orientation = match tags.or(Tag::Orientation, 1)? {
            turned @ 2..=8 => turned as usize,
            _ => 1,
        };
        Ok(Self {
            size,
            channels,
            bits,
            alpha: [Some(ASSOCIATED), Some(UNASSOCIATED)].contains(&last),
            premultiplied: last == Some(ASSOCIATED),
            // Floats are quantities, and which of them is shown as white is a matter of display. So Pillow takes them.
            inverted: white_is_zero && bits != 32,
            orientation,
            chunks: Chunks::of(&mut tags, size, channels, bits, big_endian)?,
        })
    }

    /// Width and height as the page is shown.
    pub fn shown(&self) -> [usize; 2] {
        let [width, height] = self.size;
        if self.orientation > 4 { [height, width] } else { [width, height] }
    }
}

/// Bits of a sample, if samples of this kind are read.
fn bits_of(tags: &mut Tags<'_, impl Read + Seek>, channels: usize) -> Found<usize> {
    let bits = tags.of_samples(Tag::BitsPerSample, 1, channels)?;
    let kind = match tags.of_samples(Tag::SampleFormat, 1, channels)? {
        1 => "unsigned integers",
        2 => "signed integers",
        3 => "floats",
        _ => "samples of an unknown kind",
    };
    match (kind, bits) {
        ("unsigned integers", 8 | 16) | ("floats", 32) => Ok(bits as usize),
        _ => Err(format!(
            "is a TIFF file of {bits} bits a sample, {kind}, which are not read: 8 and 16 bits without a sign and 32-bit floats are"
        )),
    }
}

/// How many samples are grey or colour, and whether 0 is white.
fn interpretation(tags: &mut Tags<'_, impl Read + Seek>) -> Found<(usize, bool)> {
    let name = match tags.one(Tag::PhotometricInterpretation)? {
        Some(0) => return Ok((1, true)),
        Some(1) => return Ok((1, false)),
        Some(2) => return Ok((3, false)),
        Some(3) => "with a palette".into(),
        Some(4) => "that is a mask".into(),
        Some(5) => "in CMYK".into(),
        Some(6) => "in YCbCr".into(),
        Some(8..=10) => "in Lab".into(),
        Some(32803) => "of a sensor's raw samples".into(),
        Some(other) => format!("of interpretation {other}"),
        None => return Err(lacks(Tag::PhotometricInterpretation)),
    };
    Err(format!("is a TIFF file {name}, which is not read: grey and RGB are"))
}

/// How the page is packed.
fn packing(tags: &mut Tags<'_, impl Read + Seek>) -> Found<Packing> {
    let name = match tags.or(Tag::Compression, 1)? {
        1 => return Ok(Packing::Plain),
        5 => return Ok(Packing::Lzw),
        8 | 32946 => return Ok(Packing::Deflate),
        32773 => return Ok(Packing::PackBits),
        2..=4 => "fax".into(),
        6 | 7 => "JPEG".into(),
        34712 | 33003 | 33005 => "JPEG 2000".into(),
        34887 => "LERC".into(),
        34925 => "LZMA".into(),
        50000 => "Zstandard".into(),
        50001 => "WebP".into(),
        50002 | 52546 => "JPEG XL".into(),
        other => format!("method {other}"),
    };
    Err(format!(
        "is a TIFF file packed by {name}, which is not read: LZW, Deflate, PackBits and none are"
    ))
}

fn predictor(
    tags: &mut Tags<'_, impl Read + Seek>,
    packing: Packing,
    bits: usize,
) -> Found<Predictor> {
    let found = tags.or(Tag::Predictor, 1)?;
    if found != 1 && [Packing::Plain, Packing::PackBits].contains(&packing) {
        // libtiff passes over it, other programs do not.
        return Err("is a TIFF file with a predictor, but neither LZW nor Deflate".into());
    }
    match found {
        1 => Ok(Predictor::None),
        2 => Ok(Predictor::Differences),
        3 if bits == 32 => Ok(Predictor::FloatBytes),
        other => Err(format!("is a TIFF file with the predictor {other}, which is not read")),
    }
}

impl Chunks {
    fn of(
        tags: &mut Tags<'_, impl Read + Seek>,
        [width, height]: [usize; 2],
        channels: usize,
        bits: usize,
        big_endian: bool,
    ) -> Found<Self> {
        let planes = match tags.or(Tag::PlanarConfiguration, 1)? {
            1 => 1,
            2 => channels,
            other => return Err(damaged(format!("planar configuration {other}"))),
        };
        let tiled = tags.directory.has(Tag::TileOffsets);
        let (size, offsets, counts) = match tiled {
            true => {
                let size = [tags.side(Tag::TileWidth)?, tags.side(Tag::TileLength)?];
                (size, Tag::TileOffsets, Tag::TileByteCounts)
            }
            false => {
                let rows = tags.or(Tag::RowsPerStrip, height as u64)?.min(height as u64);
                ([width, rows as usize], Tag::StripOffsets, Tag::StripByteCounts)
            }
        };
        // Tiles may reach beyond the image, but not so far that a small file takes much memory, or days.
        let padded = |side: usize, chunk: usize| side.checked_next_multiple_of(chunk);
        let bytes =
            padded(width, size[0]).zip(padded(height, size[1])).and_then(|(width, height)| {
                width.checked_mul(height)?.checked_mul(channels * bits / 8)
            });
        if bytes.is_none_or(|bytes| bytes > 5 * PIXEL_LIMIT) {
            return Err(format!("is a TIFF file with tiles of {} x {} pixels", size[0], size[1]));
        }
        let needed = width.div_ceil(size[0]) * height.div_ceil(size[1]) * planes;
        let packing = packing(tags)?;
        let offsets = tags.all(offsets)?.ok_or_else(|| lacks(offsets))?;
        let counts = match packing {
            Packing::Plain => vec![0; needed],
            _ => tags.all(counts)?.ok_or_else(|| lacks(counts))?,
        };
        // More of them than there is room for would have to be guessed at, too.
        let there = if counts.len() < needed { counts.len() } else { offsets.len() };
        if there != needed {
            return Err(damaged(format!(
                "it has {there} strips or tiles where {needed} are expected"
            )));
        }
        let reversed = match tags.or(Tag::FillOrder, 1)? {
            1 => false,
            2 => true,
            other => return Err(damaged(format!("fill order {other}"))),
        };
        let predictor = predictor(tags, packing, bits)?;
        Ok(Self { size, tiled, planes, offsets, counts, packing, predictor, reversed, big_endian })
    }
}

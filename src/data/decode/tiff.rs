//! TIFF files of any number of channels, of 8 and 16 bits and of 32-bit floats, through the crate `tiff`.

use std::io::{Read, Seek};

use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;
use tiff::{ColorType, TiffError};

use super::bands::AllBands;
use super::samples::{MOST_CHANNELS, Native, Pages, Reading, Samples, Values};
use super::{PIXEL_LIMIT, check_size};

/// The most pages of a file that are counted.
const MOST_PAGES: usize = 1 << 20;

type Found<T> = std::result::Result<T, String>;

/// Whether a file begins as TIFF or BigTIFF does.
pub fn is(start: &[u8]) -> bool {
    matches!(start, [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..])
}

fn damaged(error: TiffError) -> String {
    match error {
        TiffError::UnsupportedError(what) => {
            format!("is a TIFF file of a kind that is not read: {what}")
        }
        TiffError::IntSizeError | TiffError::LimitsExceeded => {
            "is a TIFF file that is too large".into()
        }
        other => format!("is a damaged TIFF file: {other}"),
    }
}

/// A decoder at its first page, with limits that a hostile file cannot exceed; of the first `pages` all bands are read.
fn open<R: Read + Seek>(file: R, pages: usize) -> Found<Decoder<AllBands<R>>> {
    let mut limits = Limits::default();
    limits.decoding_buffer_size = 4 * PIXEL_LIMIT;
    limits.intermediate_buffer_size = 4 * PIXEL_LIMIT;
    limits.ifd_value_size = 16 << 20;
    let file = AllBands::new(file, pages).map_err(|error| damaged(error.into()))?;
    Ok(Decoder::new(file).map_err(damaged)?.with_limits(limits))
}

/// Channels, bits and alpha of the page; an error if it cannot be read.
fn native<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<Native> {
    let colour = decoder.colortype().map_err(damaged)?;
    let (mut channels, bits, mut alpha) = match colour {
        ColorType::Gray(bits) => (1, bits, false),
        ColorType::GrayA(bits) => (2, bits, true),
        ColorType::RGB(bits) => (3, bits, false),
        ColorType::RGBA(bits) => (4, bits, true),
        ColorType::Multiband { bit_depth, num_samples } => (num_samples as usize, bit_depth, false),
        other => return Err(format!("is a TIFF file in {other:?}, which is not read")),
    };
    // Further samples of a grey or RGB page count as channels, whatever the crate calls the first of them.
    let samples: Option<usize> =
        decoder.find_tag_unsigned(Tag::SamplesPerPixel).map_err(damaged)?;
    if let Some(samples) = samples.filter(|&samples| samples != channels) {
        (channels, alpha) = (samples, false);
    }
    // A fourth band need not be one: only what the file calls alpha is.
    let extra: Option<Vec<u64>> = decoder
        .find_tag(Tag::ExtraSamples)
        .and_then(|tag| tag.map(|tag| tag.into_u64_vec()).transpose())
        .map_err(damaged)?;
    alpha &= extra.is_some_and(|extra| extra.last().is_some_and(|kind| [1, 2].contains(kind)));
    if !(1..=MOST_CHANNELS).contains(&channels) {
        return Err(format!("has {channels} channels; the most is {MOST_CHANNELS}"));
    }
    if ![8, 16, 32].contains(&bits) {
        return Err(format!("is a TIFF file of {bits} bits a sample, which are not read"));
    }
    Ok(Native { channels, bits: bits.into(), alpha, pages: 1 })
}

/// Width and height of the page.
fn size_of<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<[usize; 2]> {
    let (width, height) = decoder.dimensions().map_err(damaged)?;
    let [width, height] = [width as usize, height as usize];
    check_size(width, height)?;
    Ok([width, height])
}

/// Number of pages.
fn pages<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<usize> {
    let mut pages = 1;
    while decoder.more_images() {
        if pages == MOST_PAGES {
            return Err(format!("has more than {MOST_PAGES} pages"));
        }
        decoder.next_image().map_err(damaged)?;
        pages += 1;
    }
    Ok(pages)
}

/// What a file holds.
pub fn look<R: Read + Seek>(file: R) -> Found<Native> {
    let mut decoder = open(file, 1)?;
    size_of(&mut decoder)?;
    let native = native(&mut decoder)?;
    Ok(Native { pages: pages(&mut decoder)?, ..native })
}

/// Width and height of a page.
pub fn size<R: Read + Seek>(file: R, page: usize) -> Found<[usize; 2]> {
    let mut decoder = open(file, 0)?;
    if page > 0 {
        decoder.seek_to_image(page).map_err(damaged)?;
    }
    size_of(&mut decoder)
}

/// Reads the image of a file, or its page `page` if pages are images.
pub fn read<R: Read + Seek>(file: R, page: usize, reading: &Reading) -> Found<Samples> {
    let pages = if reading.pages == Some(Pages::Channels) { MOST_PAGES } else { page + 1 };
    let mut decoder = open(file, pages)?;
    if page > 0 {
        decoder.seek_to_image(page).map_err(damaged)?;
    }
    let first = read_page(&mut decoder)?;
    if reading.pages == Some(Pages::Images) || !decoder.more_images() {
        return Ok(first);
    }
    if reading.pages.is_none() {
        return Err(
            "has several pages: set data.pages=\"channels\" if they are channels of one image, or data.pages=\"images\"".into(),
        );
    }
    let mut all = vec![first];
    while decoder.more_images() {
        decoder.next_image().map_err(damaged)?;
        let channels: usize = all.iter().map(|page| page.channels).sum();
        // Before the next page takes memory.
        if channels >= reading.format.channels {
            return Err(format!(
                "has more channels than {channels}, and data.channels is {}",
                reading.format.channels
            ));
        }
        let next = read_page(&mut decoder)?;
        if next.size != all[0].size {
            return Err(
                "has pages of different sizes, which cannot be channels of one image".into()
            );
        }
        all.push(next);
    }
    joined(&all)
}

fn read_page<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<Samples> {
    let size = size_of(decoder)?;
    let Native { channels, alpha, .. } = native(decoder)?;
    let count = size[0] * size[1] * channels;
    let mut values = DecodingResult::U8(Vec::new());
    let layout = decoder.read_image_to_buffer(&mut values).map_err(damaged)?;
    let values = match values {
        DecodingResult::U8(values) => Values::U8(values),
        DecodingResult::U16(values) => Values::U16(values),
        DecodingResult::F32(values) => Values::F32(values),
        _ => return Err("is a TIFF file of a sample type that is not read: 8 and 16 bits without a sign and 32-bit floats are".into()),
    };
    let values = match layout.planes {
        0 | 1 => values,
        planes => interleaved(values, planes),
    };
    let there = match &values {
        Values::U8(values) => values.len(),
        Values::U16(values) => values.len(),
        Values::F32(values) => values.len(),
    };
    if there != count {
        return Err(format!("is a TIFF file of {there} samples where {count} are expected"));
    }
    Ok(Samples { size, channels, alpha, values })
}

/// Planes one after another become channels of pixels.
fn interleaved(values: Values, planes: usize) -> Values {
    fn of<T: Copy>(values: &[T], planes: usize) -> Vec<T> {
        let pixels = values.len() / planes;
        (0..pixels * planes).map(|i| values[i % planes * pixels + i / planes]).collect()
    }
    match values {
        Values::U8(values) => Values::U8(of(&values, planes)),
        Values::U16(values) => Values::U16(of(&values, planes)),
        Values::F32(values) => Values::F32(of(&values, planes)),
    }
}

/// Pages become channels.
fn joined(pages: &[Samples]) -> Found<Samples> {
    fn of<T: Copy>(pages: &[(&[T], usize)], pixels: usize) -> Vec<T> {
        let channels: usize = pages.iter().map(|(_, channels)| channels).sum();
        let mut all = Vec::with_capacity(pixels * channels);
        for pixel in 0..pixels {
            for (values, channels) in pages {
                all.extend_from_slice(&values[pixel * channels..][..*channels]);
            }
        }
        all
    }
    let (size, channels) = (pages[0].size, pages.iter().map(|page| page.channels).sum());
    let pixels = size[0] * size[1];
    macro_rules! all {
        ($kind:ident) => {
            pages
                .iter()
                .map(|page| match &page.values {
                    Values::$kind(values) => Some((values.as_slice(), page.channels)),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()
                .map(|pages| Values::$kind(of(&pages, pixels)))
        };
    }
    let values = match &pages[0].values {
        Values::U8(_) => all!(U8),
        Values::U16(_) => all!(U16),
        Values::F32(_) => all!(F32),
    };
    let values = values
        .ok_or("has pages of different sample types, which cannot be channels of one image")?;
    Ok(Samples { size, channels, alpha: false, values })
}

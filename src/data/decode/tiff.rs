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
    alpha &= kind_of_last_sample(decoder)?.is_some_and(|kind| [ASSOCIATED, 2].contains(&kind));
    if !(1..=MOST_CHANNELS).contains(&channels) {
        return Err(format!("has {channels} channels; the most is {MOST_CHANNELS}"));
    }
    if ![8, 16, 32].contains(&bits) {
        return Err(format!("is a TIFF file of {bits} bits a sample, which are not read"));
    }
    Ok(Native { channels, bits: bits.into(), alpha, pages: 1 })
}

/// The kind of an alpha channel that the colours were multiplied by.
const ASSOCIATED: u64 = 1;

/// What the file calls the last of the samples beside grey or RGB.
fn kind_of_last_sample<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<Option<u64>> {
    let kinds: Option<Vec<u64>> = decoder
        .find_tag(Tag::ExtraSamples)
        .and_then(|tag| tag.map(|tag| tag.into_u64_vec()).transpose())
        .map_err(damaged)?;
    Ok(kinds.and_then(|kinds| kinds.last().copied()))
}

/// Width and height of the page as it is stored.
fn stored_size<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<[usize; 2]> {
    let (width, height) = decoder.dimensions().map_err(damaged)?;
    let [width, height] = [width as usize, height as usize];
    check_size(width, height)?;
    Ok([width, height])
}

/// Width and height of the page as it is shown.
fn size_of<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<[usize; 2]> {
    let [width, height] = stored_size(decoder)?;
    Ok(if orientation(decoder)? > 4 { [height, width] } else { [width, height] })
}

/// How the page is turned to be shown, 1 (as it is stored) to 8. Pillow turns TIFF files, and no others, when it reads them.
fn orientation<R: Read + Seek>(decoder: &mut Decoder<R>) -> Found<usize> {
    let found: Option<usize> = decoder.find_tag_unsigned(Tag::Orientation).map_err(damaged)?;
    Ok(found.filter(|orientation| (2..=8).contains(orientation)).unwrap_or(1))
}

/// Turns `[height, width, channels]` as an orientation says.
fn turned<T: Copy>(
    values: &[T],
    [width, height]: [usize; 2],
    channels: usize,
    orientation: usize,
) -> Vec<T> {
    let swaps = orientation > 4;
    let [across, down] = if swaps { [height, width] } else { [width, height] };
    let mut all = Vec::with_capacity(values.len());
    for y in 0..down {
        for x in 0..across {
            let [from_left, from_top] = if swaps { [y, x] } else { [x, y] };
            let column = match orientation {
                2 | 3 | 7 | 8 => width - 1 - from_left,
                _ => from_left,
            };
            let row = match orientation {
                3 | 4 | 6 | 7 => height - 1 - from_top,
                _ => from_top,
            };
            all.extend_from_slice(&values[(row * width + column) * channels..][..channels]);
        }
    }
    all
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
    let size = stored_size(decoder)?;
    let Native { channels, alpha, .. } = native(decoder)?;
    let premultiplied = alpha && kind_of_last_sample(decoder)? == Some(ASSOCIATED);
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
    let values = match orientation(decoder)? {
        1 => values,
        how => match values {
            Values::U8(values) => Values::U8(turned(&values, size, channels, how)),
            Values::U16(values) => Values::U16(turned(&values, size, channels, how)),
            Values::F32(values) => Values::F32(turned(&values, size, channels, how)),
        },
    };
    let size = size_of(decoder)?;
    Ok(Samples { size, channels, alpha, premultiplied, values })
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
    Ok(Samples { size, channels, alpha: false, premultiplied: false, values })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use tiff::encoder::TiffEncoder;
    use tiff::encoder::colortype::{Gray8, RGB8};
    use tiff::tags::ExtraSamples;

    use super::super::{Format, Image};
    use super::*;

    #[test]
    fn pages_are_turned_as_pillow_turns_them() {
        // 1 2 3
        // 4 5 6
        for (orientation, expected, swaps) in [
            (1_u16, [1, 2, 3, 4, 5, 6], false),
            (2, [3, 2, 1, 6, 5, 4], false),
            (3, [6, 5, 4, 3, 2, 1], false),
            (4, [4, 5, 6, 1, 2, 3], false),
            (5, [1, 4, 2, 5, 3, 6], true),
            (6, [4, 1, 5, 2, 6, 3], true),
            (7, [6, 3, 5, 2, 4, 1], true),
            (8, [3, 6, 2, 5, 1, 4], true),
            (9, [1, 2, 3, 4, 5, 6], false),
        ] {
            let mut file = Cursor::new(Vec::new());
            let mut encoder = TiffEncoder::new(&mut file).unwrap();
            let mut image = encoder.new_image::<Gray8>(3, 2).unwrap();
            image.encoder().write_tag(Tag::Orientation, orientation).unwrap();
            image.write_data(&[1, 2, 3, 4, 5, 6]).unwrap();
            let bytes = file.into_inner();
            let read = read(Cursor::new(&bytes), 0, &Reading::default()).unwrap();
            let shown = if swaps { [2, 3] } else { [3, 2] };
            assert_eq!((read.size, size(Cursor::new(&bytes), 0).unwrap()), (shown, shown));
            let Values::U8(values) = read.values else { panic!("of 8 bits") };
            assert_eq!(values, expected, "{orientation}");
        }
    }

    #[test]
    fn colours_that_were_multiplied_by_alpha_are_divided_when_it_is_dropped() {
        let pixels = [[100, 50, 7, 255], [100, 50, 7, 128], [9, 0, 255, 10], [3, 2, 1, 0]];
        let write = |kind| {
            let mut file = Cursor::new(Vec::new());
            let mut encoder = TiffEncoder::new(&mut file).unwrap();
            let mut image = encoder.new_image::<RGB8>(4, 1).unwrap();
            image.extra_samples(&[kind]).unwrap();
            image.write_data(&pixels.concat()).unwrap();
            file.into_inner()
        };
        let rgb = |bytes: &[u8], channels| {
            let format = Format { channels, bits: 8 };
            let (reading, mut image) = (Reading { format, ..Reading::default() }, Image::default());
            let read = read(Cursor::new(bytes), 0, &reading).unwrap();
            read.convert(&reading, &mut image).unwrap();
            image.pixels
        };
        let associated = write(ExtraSamples::AssociatedAlpha);
        // Pillow 13.0: Image.open(...).convert("RGB").
        assert_eq!(rgb(&associated, 3), [100, 50, 7, 199, 99, 13, 229, 0, 255, 0, 0, 0]);
        assert_eq!(rgb(&associated, 4), pixels.concat());
        let plain: Vec<u8> = pixels.iter().flat_map(|pixel| pixel[..3].to_vec()).collect();
        assert_eq!(rgb(&write(ExtraSamples::UnassociatedAlpha), 3), plain);
    }
}

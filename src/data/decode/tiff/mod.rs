//! TIFF files of any number of channels, of 8 and 16 bits and of 32-bit floats.
//!
//! `directory` reads the numbers in a file, `page` says what they mean, and `chunks` reads the samples.

mod chunks;
mod directory;
mod page;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io::{Read, Seek};

use chunks::Sample;
use directory::Tiff;
use page::Page;

use super::Place;
use super::samples::{MOST_CHANNELS, Native, Pages, Reading, Samples, Values};

/// The most pages of a file that are counted.
const MOST_PAGES: usize = 1 << 20;

type Found<T> = std::result::Result<T, String>;

/// Whether a file begins as TIFF or BigTIFF does.
pub fn is(start: &[u8]) -> bool {
    matches!(start, [b'I', b'I', 42 | 43, 0, ..] | [b'M', b'M', 0, 42 | 43, ..])
}

/// Where the directories of all pages stand; an error if there are more than `most`.
fn directories<R: Read + Seek>(tiff: &mut Tiff<R>, most: usize) -> Found<Vec<u64>> {
    let mut next = Some(tiff.first);
    let (mut all, mut seen) = (Vec::new(), HashSet::new());
    while let Some(at) = next {
        if all.len() == most {
            return Err(format!("has more than {most} pages"));
        }
        if !seen.insert(at) {
            return Err("is a damaged TIFF file: its pages go round in a circle".into());
        }
        all.push(at);
        next = tiff.directory(at)?.next;
    }
    Ok(all)
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

/// What a file holds.
pub fn look<R: Read + Seek>(file: R) -> Found<Native> {
    let mut tiff = Tiff::open(file)?;
    let Page { channels, bits, alpha, .. } = page_at(&mut tiff, None)?;
    let pages = directories(&mut tiff, MOST_PAGES)?.len();
    Ok(Native { channels, bits, alpha, pages })
}

/// The places of all pages, with which each is found without a walk through those before it.
pub fn places<R: Read + Seek>(file: R) -> Found<Vec<Place>> {
    let all = directories(&mut Tiff::open(file)?, MOST_PAGES)?;
    Ok(all.into_iter().enumerate().map(|(number, at)| Place { number, at }).collect())
}

/// The page whose directory stands at a place, or the first.
fn page_at<R: Read + Seek>(tiff: &mut Tiff<R>, at: Option<u64>) -> Found<Page> {
    let directory = tiff.directory(at.unwrap_or(tiff.first))?;
    Page::of(tiff, &directory)
}

/// Width and height of a page, of the first if none is named.
pub fn size<R: Read + Seek>(file: R, place: Option<Place>) -> Found<[usize; 2]> {
    page_at(&mut Tiff::open(file)?, place.map(|place| place.at)).map(|page| page.shown())
}

/// Reads the image of a file, or one of its pages if pages are images.
pub fn read<R: Read + Seek>(file: R, place: Option<Place>, reading: &Reading) -> Found<Samples> {
    let mut tiff = Tiff::open(file)?;
    let first = read_page(&mut tiff, place.map(|place| place.at))?;
    if place.is_some() {
        return Ok(first);
    }
    let has_more = tiff.directory(tiff.first)?.next.is_some();
    if reading.pages == Some(Pages::Images) || !has_more {
        return Ok(first);
    }
    if reading.pages.is_none() {
        return Err(
            "has several pages: set data.pages=\"channels\" if they are channels of one image, or data.pages=\"images\"".into(),
        );
    }
    let mut all = vec![first];
    // No more than are channels, since a page has one at least.
    for at in directories(&mut tiff, MOST_CHANNELS)?.into_iter().skip(1) {
        let channels: usize = all.iter().map(|page| page.channels).sum();
        // Before the next page takes memory.
        if channels >= reading.format.channels {
            return Err(format!(
                "has more channels than {channels}, and data.channels is {}",
                reading.format.channels
            ));
        }
        let next = read_page(&mut tiff, Some(at))?;
        if next.size != all[0].size {
            return Err(
                "has pages of different sizes, which cannot be channels of one image".into()
            );
        }
        all.push(next);
    }
    joined(&all)
}

fn read_page<R: Read + Seek>(tiff: &mut Tiff<R>, at: Option<u64>) -> Found<Samples> {
    fn of<T: Sample>(file: &mut (impl Read + Seek), page: &Page) -> Found<Vec<T>> {
        let values = chunks::read(file, page)?;
        Ok(match page.orientation {
            1 => values,
            how => turned(&values, page.size, page.channels, how),
        })
    }
    let page = page_at(tiff, at)?;
    let file = &mut tiff.file;
    let values = match page.bits {
        8 => Values::U8(of(file, &page)?),
        16 => Values::U16(of(file, &page)?),
        _ => Values::F32(of(file, &page)?),
    };
    let Page { channels, alpha, premultiplied, .. } = page;
    Ok(Samples { size: page.shown(), channels, alpha, premultiplied, values })
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

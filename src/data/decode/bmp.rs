//! BMP files, through the crate `image`, which runs of equal pixels do not pass through.

use std::borrow::Cow;
use std::io::Cursor;

use image::ImageDecoder;

use super::check_size;
use super::samples::{Samples, Values};

type Found<T> = std::result::Result<T, String>;

type Decoder<'a> = image::codecs::bmp::BmpDecoder<Cursor<&'a [u8]>>;

fn damaged(what: impl std::fmt::Display) -> String {
    format!("is a damaged BMP file: {what}")
}

fn refused(error: image::ImageError) -> String {
    match error {
        image::ImageError::Unsupported(what) => {
            format!("is a BMP file of a kind that is not read: {what}")
        }
        other => damaged(other),
    }
}

/// What stands in the headers, as far as it says where pixels lie and how.
struct Header {
    /// Where pixels begin, by the file.
    offset: usize,
    /// Where the header ends, with the masks of colours that may follow.
    end: usize,
    /// Where the palette ends.
    palette_end: usize,
    bits: usize,
    compression: usize,
}

const RLE8: usize = 1;
const RLE4: usize = 2;
const BIT_FIELDS: usize = 3;

/// A number of two or four bytes.
fn number(bytes: &[u8], at: usize, len: usize) -> Found<usize> {
    let bytes = bytes.get(at..at + len).ok_or_else(|| damaged("it ends early"))?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
}

impl Header {
    fn of(bytes: &[u8]) -> Found<Self> {
        let (offset, len) = (number(bytes, 10, 4)?, number(bytes, 14, 4)?);
        let is_old = len == 12;
        let bits = number(bytes, if is_old { 24 } else { 28 }, 2)?;
        let compression = if is_old { 0 } else { number(bytes, 30, 4)? };
        let colours = if is_old { 0 } else { number(bytes, 46, 4)? };
        let has_masks = len == 40 && compression == BIT_FIELDS;
        let end = 14 + len + if has_masks { 12 } else { 0 };
        let palette = match (bits, colours) {
            (9.., _) => 0,
            (_, 0) => 1 << bits,
            (_, colours) => colours,
        };
        let palette_end = end + palette * if is_old { 3 } else { 4 };
        Ok(Self { offset, end, palette_end, bits, compression })
    }

    /// Where pixels are. Some programs leave the offset 0, others forget the palette; Pillow takes what follows the headers then.
    fn pixels(&self) -> Found<usize> {
        match self.offset {
            0 => Ok(self.palette_end),
            offset if offset < self.end => Err(damaged("its pixels begin inside of its header")),
            offset if offset == self.end && self.bits <= 8 => Ok(self.palette_end),
            offset => Ok(offset),
        }
    }
}

/// The file with the place of its pixels put right.
fn corrected<'a>(bytes: &'a [u8], header: &Header) -> Found<Cow<'a, [u8]>> {
    let pixels = header.pixels()?;
    if pixels == header.offset {
        return Ok(bytes.into());
    }
    let mut bytes = bytes.to_vec();
    let pixels = u32::try_from(pixels).map_err(|_| damaged("its palette is too large"))?;
    bytes[10..14].copy_from_slice(&pixels.to_le_bytes());
    Ok(bytes.into())
}

fn opened(bytes: &[u8]) -> Found<(Decoder<'_>, [usize; 2])> {
    let decoder = Decoder::new(Cursor::new(bytes)).map_err(refused)?;
    let (width, height) = decoder.dimensions();
    let size = [width as usize, height as usize];
    check_size(size[0], size[1])?;
    Ok((decoder, size))
}

/// Width and height.
pub fn size(bytes: &[u8]) -> Found<[usize; 2]> {
    opened(bytes).map(|(_, size)| size)
}

/// Reads an image.
pub fn read(bytes: &[u8]) -> Found<Samples> {
    let header = Header::of(bytes)?;
    let bytes = corrected(bytes, &header)?;
    let (decoder, size) = opened(&bytes)?;
    if let Some(palette) = decoder.get_palette()
        && [RLE8, RLE4].contains(&header.compression)
    {
        let packed = bytes.get(header.pixels()?..).unwrap_or_default();
        let pixels = runs(packed, size, header.compression == RLE4)?;
        let values = pixels.iter().flat_map(|&pixel| palette[usize::from(pixel)]).collect();
        let (channels, values) = (3, Values::U8(values));
        return Ok(Samples { size, channels, alpha: false, premultiplied: false, values });
    }
    let channels = usize::from(decoder.color_type().channel_count());
    let mut values = vec![0; size[0] * size[1] * channels];
    decoder.read_image(&mut values).map_err(refused)?;
    let (alpha, values) = (channels == 4, Values::U8(values));
    Ok(Samples { size, channels, alpha, premultiplied: false, values })
}

/// Unpacks runs of pixels of 8 or 4 bits, the lowest row first. The crate `image` makes skipped pixels black, where they have the first
/// colour, and takes the rest of a picture that ends early for black, too.
fn runs(mut packed: &[u8], [width, height]: [usize; 2], four_bits: bool) -> Found<Vec<u8>> {
    let early = || damaged("its runs of pixels end early");
    let beyond = || damaged("its runs of pixels leave the image");
    let mut pixels = vec![0; width * height];
    let (mut x, mut y) = (0, 0);
    while y < height && !(y == height - 1 && x == width) {
        let [count, what, rest @ ..] = packed else { return Err(early()) };
        packed = rest;
        let start = (height - 1 - y) * width + x;
        match (usize::from(*count), *what) {
            (0, 0) => (x, y) = (0, y + 1),
            (0, 1) => return Err(early()),
            (0, 2) => {
                let [right, up, rest @ ..] = packed else { return Err(early()) };
                (x, y, packed) = (x + usize::from(*right), y + usize::from(*up), rest);
                if x > width || y >= height {
                    return Err(beyond());
                }
            }
            (0, count) => {
                let count = usize::from(count);
                let len = if four_bits { count.div_ceil(2) } else { count };
                if x + count > width {
                    return Err(beyond());
                }
                let copied = packed.get(..len).ok_or_else(early)?;
                for (i, to) in pixels[start..start + count].iter_mut().enumerate() {
                    *to = match (four_bits, i % 2) {
                        (false, _) => copied[i],
                        (true, 0) => copied[i / 2] >> 4,
                        (true, _) => copied[i / 2] & 15,
                    };
                }
                // They fill words of two bytes.
                packed = packed.get(len.next_multiple_of(2)..).unwrap_or_default();
                x += count;
            }
            (count, value) => {
                // ImageMagick writes runs that are too long for their row.
                let count = count.min(width - x);
                let both = if four_bits { [value >> 4, value & 15] } else { [value; 2] };
                let to = pixels[start..start + count].iter_mut();
                to.zip(both.into_iter().cycle()).for_each(|(to, value)| *to = value);
                x += count;
            }
        }
    }
    Ok(pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLUE: [u8; 3] = [0, 0, 9];
    const RED: [u8; 3] = [7, 0, 0];

    /// A picture of 3 x 2 with a palette of blue and red, and the offset of its pixels, absent or as the file says.
    fn file(bits: u16, compression: u32, offset: Option<u32>, data: &[u8]) -> Vec<u8> {
        let mut file = b"BM".to_vec();
        let numbers = [0, 0, offset.unwrap_or(62), 40, 3, 2];
        file.extend(numbers.map(u32::to_le_bytes).concat());
        file.extend([1, bits].map(u16::to_le_bytes).concat());
        file.extend([compression, 0, 0, 0, 2, 0].map(u32::to_le_bytes).concat());
        for [red, green, blue] in [BLUE, RED] {
            file.extend([blue, green, red, 0]);
        }
        file.extend(data);
        file
    }

    fn pixels(file: &[u8]) -> Found<Vec<[u8; 3]>> {
        let Samples { values: Values::U8(values), .. } = read(file)? else { panic!("of 8 bits") };
        Ok(values.as_chunks::<3>().0.to_vec())
    }

    #[test]
    fn pixels_lie_behind_the_palette_if_the_file_does_not_say_where() {
        let data = [0, 1, 0, 0, 1, 0, 0, 0];
        let expected = [RED, BLUE, BLUE, BLUE, RED, BLUE];
        for offset in [None, Some(0), Some(54)] {
            assert_eq!(pixels(&file(8, 0, offset, &data)).unwrap(), expected, "{offset:?}");
        }
        let said = pixels(&file(8, 0, Some(20), &data)).unwrap_err();
        assert!(said.ends_with("its pixels begin inside of its header"), "{said}");
    }

    #[test]
    fn skipped_pixels_have_the_first_colour() {
        let all = [RED, BLUE, BLUE, RED, RED, BLUE];
        for (bits, data, expected) in [
            (8, &[2, 1, 0, 0, 1, 1, 0, 0, 0, 1][..], all), // rows that end early
            (8, &[2, 1, 0, 2, 1, 0, 0, 0, 1, 1, 0, 2, 2, 0, 0, 1], all), // steps to the right
            (8, &[0, 3, 1, 1, 0, 99, 0, 0, 1, 1, 2, 0], all), // pixels as they are, and no end
            (8, &[2, 1, 99, 0, 0, 0, 1, 1, 99, 0], all),   // runs beyond the row
            (8, &[0, 0, 3, 1], [RED, RED, RED, BLUE, BLUE, BLUE]), // a row of nothing
            (4, &[2, 0x11, 0, 0, 1, 0x10, 2, 0], all),
            (4, &[0, 3, 0x11, 0x09, 0, 0, 3, 0x10, 0, 1], [RED, BLUE, RED, RED, RED, BLUE]),
        ] {
            let compression = if bits == 4 { 2 } else { 1 };
            let read = pixels(&file(bits, compression, None, data));
            assert_eq!(read.unwrap(), expected, "{data:?}");
        }
    }

    #[test]
    fn runs_that_end_early_or_leave_the_image_are_refused() {
        for (data, expected) in [
            (&[3, 1, 0, 0, 0, 1][..], "end early"),
            (&[3, 1, 0, 0, 1, 1, 0, 1], "end early"),
            (&[3, 1, 0, 0, 1], "end early"),
            (&[3, 1, 0, 0, 0, 3, 1], "end early"),
            (&[0, 4, 1, 1, 1, 1], "leave the image"),
            (&[0, 2, 4, 0], "leave the image"),
            (&[0, 2, 0, 2], "leave the image"),
        ] {
            let said = pixels(&file(8, 1, None, data)).unwrap_err();
            assert!(said.contains(expected), "expected `{expected}` in `{said}`");
        }
    }
}

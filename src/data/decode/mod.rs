//! Decodes image files: JPEG, PNG, WebP, BMP, TIFF and NumPy arrays.
//!
//! Read as RGB of 8 bits, grey, palette, alpha, 16-bit PNG, CMYK and YCCK images are converted; alpha is dropped, not blended, the
//! upper byte of 16 bits is kept, and embedded colour profiles and orientations are ignored, as in Pillow's `convert("RGB")`. As there,
//! TIFF files are the exception: they are turned as their orientation says, and colours that were multiplied by alpha are divided. (Of
//! 16-bit grey, Pillow clips all but the lowest 256 levels to white; here it is treated as colour. Of a BMP file of 16 bits a pixel,
//! levels differ by at most one from Pillow's, which rounds them down.) Any other [`Reading`] takes the
//! channels and bits as they are in the file, and refuses what it would have to guess. Sizes are checked before anything is decoded.
//! A JPEG file that ends early is an error, not a picture with a grey lower part.

mod bmp;
mod jpeg;
mod npy;
mod samples;
mod tiff;
mod webp;

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

pub use samples::{Axes, MOST_CHANNELS, Native, Pages, Reading, Samples, Values, stretch};

use super::source::{Format, Image};
use crate::error::{Error, Result};

/// The most pixels an image may have: Pillow's limit against decompression bombs.
pub const PIXEL_LIMIT: usize = 178_956_970;

/// The most bytes of a PNG file's chunks besides pixels, unpacked.
const CHUNK_LIMIT: usize = 64 << 20;

/// Where one image of a file that holds several is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its number in the file.
    pub number: usize,
    /// Where a page's directory stands; a walk to it through those before it would take long in a file of thousands.
    at: u64,
}

/// A format, by the first bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Jpeg,
    Png,
    WebP,
    Bmp,
    Tiff,
    Npy,
}

/// The format of a file; the first bytes decide, not the file's name.
fn kind(bytes: &[u8]) -> Result<Kind, String> {
    Ok(match bytes {
        [] => return Err("is empty (0 bytes)".into()),
        [0xFF, 0xD8, ..] => Kind::Jpeg,
        [0x89, b'P', b'N', b'G', ..] => Kind::Png,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Kind::WebP,
        [b'B', b'M', ..] => Kind::Bmp,
        bytes if tiff::is(bytes) => Kind::Tiff,
        bytes if npy::is(bytes) => Kind::Npy,
        _ => return Err("is no JPEG, PNG, WebP, BMP or TIFF file".into()),
    })
}

/// No decoder here is known to panic. If one does, the panic must not end a run that skips broken files.
fn guarded<T>(path: &Path, decode: impl FnOnce() -> Result<T, String>) -> Result<T> {
    let decoded = catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err("cannot be decoded: the decoder panicked".to_string()));
    decoded.map_err(|reason| Error::format(path, reason))
}

/// Decodes the contents of an image file; the first bytes decide the format, not the file's name.
///
/// # Errors
/// When they are of no format that is read, damaged, too large, or not what the reading asks for; the message names `path`.
pub fn decode(path: &Path, bytes: &[u8], reading: &Reading, into: &mut Image) -> Result<()> {
    guarded(path, || match kind(bytes)? {
        Kind::Jpeg if reading.is_rgb() => jpeg(bytes, into),
        Kind::Png if reading.is_rgb() => png(bytes, into),
        Kind::Jpeg => jpeg_samples(bytes)?.convert(reading, into),
        Kind::Png => png_samples(bytes)?.convert(reading, into),
        Kind::WebP => webp::read(bytes)?.convert(reading, into),
        Kind::Bmp => bmp::read(bytes)?.convert(reading, into),
        Kind::Tiff => tiff::read(Cursor::new(bytes), None, reading)?.convert(reading, into),
        Kind::Npy => npy::read(Cursor::new(bytes), 0, reading.axes)?.convert(reading, into),
    })
}

/// Reads one image of a file that holds several: a page of a TIFF file, an image of an array. Only it is read from the disk.
///
/// # Errors
/// As [`decode`], and if the file cannot be read.
pub fn decode_page(path: &Path, page: Place, reading: &Reading, into: &mut Image) -> Result<()> {
    let (kind, file) = opened(path)?;
    guarded(path, || match kind? {
        Kind::Tiff => tiff::read(file, Some(page), reading)?.convert(reading, into),
        Kind::Npy => npy::read(file, page.number, reading.axes)?.convert(reading, into),
        _ => Err("has changed: it was a file of several images".into()),
    })
}

/// A file and the format that its first bytes say.
fn opened(path: &Path) -> Result<(Result<Kind, String>, BufReader<File>)> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let mut start = Vec::new();
    file.by_ref().take(16).read_to_end(&mut start).map_err(Error::io(path))?;
    file.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    Ok((kind(&start), file))
}

/// Places of the images in a file, if pages are images, or the array has an axis `n`; none if the file is one image.
///
/// # Errors
/// As [`size`].
pub fn images(path: &Path, reading: &Reading) -> Result<Vec<Place>> {
    let (kind, file) = opened(path)?;
    let all = guarded(path, || match kind? {
        Kind::Tiff if reading.pages == Some(Pages::Images) => tiff::places(file),
        Kind::Npy => {
            let count = npy::look(file, reading.axes)?.pages;
            Ok((0..count).map(|number| Place { number, at: 0 }).collect())
        }
        _ => Ok(Vec::new()),
    })?;
    Ok(if all.len() == 1 { Vec::new() } else { all })
}

/// Width and height of an image, from the headers of its file.
///
/// # Errors
/// As [`decode`]; what is damaged behind the headers goes unnoticed.
pub fn size(path: &Path, bytes: &[u8], reading: &Reading) -> Result<[usize; 2]> {
    guarded(path, || match kind(bytes)? {
        Kind::Jpeg => jpeg_header(bytes).map(|decoder| decoder.size()),
        Kind::Png => png_header(bytes).map(|reader| sides(reader.info())),
        Kind::WebP => webp::size(bytes),
        Kind::Bmp => bmp::size(bytes),
        Kind::Tiff => tiff::size(Cursor::new(bytes), None),
        Kind::Npy => npy::size(Cursor::new(bytes), reading.axes),
    })
}

/// As [`size`], of one image of a file that holds several.
///
/// # Errors
/// As [`decode_page`].
pub fn page_size(path: &Path, page: Place, reading: &Reading) -> Result<[usize; 2]> {
    let (kind, file) = opened(path)?;
    guarded(path, || match kind? {
        Kind::Tiff => tiff::size(file, Some(page)),
        Kind::Npy => npy::size(file, reading.axes),
        _ => Err("has changed: it was a file of several images".into()),
    })
}

/// What a file holds, from its headers.
///
/// # Errors
/// As [`size`].
pub fn native(path: &Path, axes: Option<Axes>) -> Result<Native> {
    let bytes = || std::fs::read(path).map_err(Error::io(path));
    let rgb = Native { channels: 3, bits: 8, alpha: false, pages: 1 };
    let (kind, file) = opened(path)?;
    let kind = kind.map_err(|reason| Error::format(path, reason))?;
    let bytes = if matches!(kind, Kind::Tiff | Kind::Npy) { Vec::new() } else { bytes()? };
    guarded(path, || {
        Ok(match kind {
            Kind::Jpeg => {
                let channels = if jpeg_header(&bytes)?.is_grey() { 1 } else { 3 };
                Native { channels, ..rgb }
            }
            Kind::Png => {
                let (kind, depth) = png_header(&bytes)?.output_color_type();
                let alpha = matches!(kind, png::ColorType::GrayscaleAlpha | png::ColorType::Rgba);
                let bits = if depth == png::BitDepth::Sixteen { 16 } else { 8 };
                Native { channels: kind.samples(), bits, alpha, pages: 1 }
            }
            Kind::WebP | Kind::Bmp => rgb,
            Kind::Tiff => tiff::look(file)?,
            Kind::Npy => npy::look(file, axes)?,
        })
    })
}

/// The least and the largest sample of an image.
///
/// # Errors
/// As [`decode_page`].
pub fn extent(path: &Path, page: Option<Place>, reading: &Reading) -> Result<[f64; 2]> {
    let (kind, mut file) = opened(path)?;
    guarded(path, || match kind? {
        Kind::Tiff => Ok(tiff::read(file, page, reading)?.extent()),
        Kind::Npy => {
            let number = page.unwrap_or_default().number;
            Ok(npy::read(file, number, reading.axes)?.extent())
        }
        Kind::Png => {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
            Ok(png_samples(&bytes)?.extent())
        }
        _ => Err("has no samples of more than 8 bits".into()),
    })
}

/// Checks a size before anything is decoded.
fn check_size(width: usize, height: usize) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("has {width} x {height} pixels"));
    }
    if width.checked_mul(height).is_none_or(|pixels| pixels > PIXEL_LIMIT) {
        return Err(format!("has {width} x {height} pixels; the limit is {PIXEL_LIMIT} in all"));
    }
    Ok(())
}

fn jpeg(bytes: &[u8], into: &mut Image) -> Result<(), String> {
    let decoder = jpeg_header(bytes)?;
    [into.width, into.height] = decoder.size();
    into.format = Format::RGB;
    decoder.decode(&mut into.pixels).map_err(|fault| fault.to_string())
}

/// A decoder that has read the headers, of a size within the limit.
fn jpeg_header(bytes: &[u8]) -> Result<jpeg::Decoder<'_>, String> {
    let decoder = jpeg::Decoder::new(bytes).map_err(|fault| fault.to_string())?;
    let [width, height] = decoder.size();
    check_size(width, height)?;
    Ok(decoder)
}

/// A reader that is past the headers, of a size within the limit; it yields 8 or 16 bits a sample.
fn png_header(bytes: &[u8]) -> Result<png::Reader<Cursor<&[u8]>>, String> {
    let limits = png::Limits { bytes: CHUNK_LIMIT };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    // They are not used, and unpacked they can be a thousand times as large as the file.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(png::Transformations::EXPAND);
    // The crate passes over that of the pixels by default.
    decoder.ignore_checksums(false);
    let [width, height] = sides(decoder.read_header_info().map_err(damaged_png)?);
    check_size(width, height)?;
    // Rows count, too: at most 8 bytes a pixel, and two of them.
    decoder.set_limits(png::Limits { bytes: CHUNK_LIMIT + 16 * width });
    decoder.read_info().map_err(damaged_png)
}

/// Width and height.
fn sides(info: &png::Info<'_>) -> [usize; 2] {
    [info.width as usize, info.height as usize]
}

fn damaged_png(e: png::DecodingError) -> String {
    format!("is a damaged PNG file: {e}")
}

fn png(bytes: &[u8], into: &mut Image) -> Result<(), String> {
    let mut reader = png_header(bytes)?;
    let [width, height] = sides(reader.info());
    into.resize(width, height);
    let (kind, depth) = reader.output_color_type();
    if (kind, depth) == (png::ColorType::Rgb, png::BitDepth::Eight) {
        return reader.next_frame(&mut into.pixels).map(drop).map_err(damaged_png);
    }
    let length = reader.output_buffer_size().ok_or("is too large for this machine")?;
    let mut samples = vec![0; length];
    reader.next_frame(&mut samples).map_err(damaged_png)?;
    // 16-bit samples are big-endian: the upper byte comes first.
    let bytes = if depth == png::BitDepth::Sixteen { 2 } else { 1 };
    // Offsets of red, green and blue in a pixel.
    let rgb = if kind.samples() < 3 { [0; 3] } else { [0, bytes, 2 * bytes] };
    let pixels = samples.chunks_exact(kind.samples() * bytes);
    for (to, from) in into.pixels.chunks_exact_mut(3).zip(pixels) {
        to.copy_from_slice(&rgb.map(|at| from[at]));
    }
    Ok(())
}

/// A JPEG file's own channels: one if it is grey.
fn jpeg_samples(bytes: &[u8]) -> Result<Samples, String> {
    let decoder = jpeg_header(bytes)?;
    let (size, is_grey) = (decoder.size(), decoder.is_grey());
    let mut pixels = Vec::new();
    decoder.decode(&mut pixels).map_err(|fault| fault.to_string())?;
    let (channels, values) = match is_grey {
        true => (1, pixels.into_iter().step_by(3).collect()),
        false => (3, pixels),
    };
    Ok(Samples { size, channels, alpha: false, premultiplied: false, values: Values::U8(values) })
}

/// A PNG file's own channels and bits; a palette is looked up.
fn png_samples(bytes: &[u8]) -> Result<Samples, String> {
    let mut reader = png_header(bytes)?;
    let size = sides(reader.info());
    let (kind, depth) = reader.output_color_type();
    let length = reader.output_buffer_size().ok_or("is too large for this machine")?;
    let mut bytes = vec![0; length];
    reader.next_frame(&mut bytes).map_err(damaged_png)?;
    let values = match depth {
        png::BitDepth::Sixteen => {
            Values::U16(bytes.as_chunks::<2>().0.iter().map(|&b| u16::from_be_bytes(b)).collect())
        }
        _ => Values::U8(bytes),
    };
    let alpha = matches!(kind, png::ColorType::GrayscaleAlpha | png::ColorType::Rgba);
    Ok(Samples { size, channels: kind.samples(), alpha, premultiplied: false, values })
}

#[cfg(test)]
mod tests {
    use png::{BitDepth, ColorType};

    use super::*;

    const RGB: Reading = Reading { format: Format::RGB, range: None, pages: None, axes: None };

    fn encode(pixels: &[u8], kind: ColorType, depth: BitDepth) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 2, 1);
        encoder.set_color(kind);
        encoder.set_depth(depth);
        encoder.write_header().unwrap().write_image_data(pixels).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Image {
        let mut image = Image::default();
        decode(Path::new("x"), bytes, &RGB, &mut image).unwrap();
        assert_eq!(size(Path::new("x"), bytes, &RGB).unwrap(), [image.width, image.height]);
        image
    }

    fn fixture(name: &str) -> Vec<u8> {
        let path = Path::new("tests/fixtures").join(name);
        std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        let cases: [(&[u8], ColorType, [u8; 6]); 4] = [
            (&[7, 200], ColorType::Grayscale, [7, 7, 7, 200, 200, 200]),
            (&[1, 2, 3, 4, 5, 6], ColorType::Rgb, [1, 2, 3, 4, 5, 6]),
            (&[1, 2, 3, 0, 5, 6, 7, 128], ColorType::Rgba, [1, 2, 3, 5, 6, 7]),
            (&[9, 0, 8, 255], ColorType::GrayscaleAlpha, [9, 9, 9, 8, 8, 8]),
        ];
        for (pixels, kind, expected) in cases {
            assert_eq!(read(&encode(pixels, kind, BitDepth::Eight)).pixels, expected, "{kind:?}");
            // The lower bytes count for nothing: Pillow 11.3 does not round.
            let deep: Vec<u8> = pixels.iter().flat_map(|&upper| [upper, 255 - upper]).collect();
            assert_eq!(
                read(&encode(&deep, kind, BitDepth::Sixteen)).pixels,
                expected,
                "{kind:?}, 16 bits"
            );
        }
        assert_eq!(read(&fixture("palette.png")).pixels, [255, 0, 0, 0, 0, 255]);
    }

    /// Puts the checksum of the PNG chunk at `start` right.
    fn with_crc(file: &mut [u8], start: usize) {
        let length = u32::from_be_bytes(file[start..start + 4].try_into().unwrap()) as usize;
        let end = start + 8 + length;
        let mut crc = flate2::Crc::new();
        crc.update(&file[start + 4..end]);
        file[end..end + 4].copy_from_slice(&crc.sum().to_be_bytes());
    }

    #[test]
    fn png_pixels_without_their_checksum_are_refused() {
        for (pixels, kind) in
            [(&[1, 2][..], ColorType::Grayscale), (&[1, 2, 3, 4, 5, 6], ColorType::Rgb)]
        {
            let mut file = encode(pixels, kind, BitDepth::Eight);
            let start = file.windows(4).position(|name| name == b"IDAT").unwrap() - 4;
            let length = u32::from_be_bytes(file[start..start + 4].try_into().unwrap()) as usize;
            file[start + 8 + length - 1] ^= 1;
            with_crc(&mut file, start);
            let grey = Reading { format: Format { channels: 1, bits: 8 }, ..RGB };
            for reading in [RGB, grey] {
                let said = decode(Path::new("x"), &file, &reading, &mut Image::default());
                let said = said.unwrap_err().to_string();
                assert!(said.contains("is a damaged PNG file"), "{kind:?}: {said}");
            }
        }
    }

    #[test]
    fn every_kind_of_jpeg_becomes_rgb() {
        // Each fixture is 16 x 8 of one colour, made by Pillow (tests/fixtures/README.md).
        for (name, expected) in [
            ("grey.jpg", [120, 120, 120]),
            ("colour.jpg", [200, 100, 50]),
            ("progressive.jpg", [200, 100, 50]),
            ("cmyk.jpg", [200, 100, 50]),
        ] {
            let image = read(&fixture(name));
            assert_eq!((image.width, image.height), (16, 8), "{name}");
            let worst = image
                .pixels
                .chunks_exact(3)
                .flat_map(|p| (0..3).map(|c| p[c].abs_diff(expected[c])))
                .max();
            assert!(
                worst <= Some(3),
                "{name}: {worst:?} levels from {expected:?}, got {:?}",
                &image.pixels[..3]
            );
        }
    }

    #[test]
    fn errors_say_what_is_wrong_with_an_image() {
        let png = encode(&[1, 2], ColorType::Grayscale, BitDepth::Eight);
        let jpeg = fixture("grey.jpg");
        // A size of 2^31 - 1 squared in the header.
        let mut bomb = png.clone();
        bomb[16..24].copy_from_slice(&[0x7F, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF]);
        with_crc(&mut bomb, 8);
        let mut wide = jpeg.clone();
        let frame = wide.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        wide[frame + 5..frame + 9].fill(0xFF);
        let cases: [(&[u8], &str); 7] = [
            (b"", "cat.jpg: is empty (0 bytes)"),
            (b"GIF89a", "is no JPEG, PNG, WebP, BMP or TIFF file"),
            (&png[..png.len() - 20], "is a damaged PNG file"),
            (&jpeg[..jpeg.len() - 6], "is a JPEG file that ends early"),
            (&jpeg[..20], "is a JPEG file that ends early"),
            (&bomb, "the limit is 178956970 in all"),
            (&wide, "has 65535 x 65535 pixels"),
        ];
        for (bytes, expected) in cases {
            let message = decode(Path::new("cat.jpg"), bytes, &RGB, &mut Image::default())
                .expect_err(expected)
                .to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

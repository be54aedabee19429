//! Decodes JPEG and PNG files to RGB.
//!
//! Grey, palette, alpha, 16-bit, CMYK and YCCK images are converted; alpha is dropped, not blended, and embedded
//! colour profiles and orientations are ignored, as in Pillow's `convert("RGB")`. Sizes are checked before anything is
//! decoded. A JPEG file that ends early is an error, not a picture with a grey lower part.

mod jpeg;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::ImageDecoder;
use image::codecs::png::PngDecoder;

use super::source::Image;
use crate::error::{Error, Result};

/// The most pixels an image may have: Pillow's limit against decompression bombs.
pub const PIXEL_LIMIT: usize = 178_956_970;

/// The most bytes of a PNG file's colour profile and other texts, unpacked: pixels are counted apart.
const TEXT_LIMIT: u64 = 64 << 20;

/// Decodes the contents of an image file; the first bytes decide the format, not the file's name.
///
/// # Errors
/// When they are neither JPEG nor PNG, damaged, or too large; the message names `path`.
pub fn decode(path: &Path, bytes: &[u8], into: &mut Image) -> Result<()> {
    let decoded = || match bytes {
        [] => Err("is empty (0 bytes)".to_string()),
        [0xFF, 0xD8, ..] => jpeg(bytes, into),
        [0x89, b'P', b'N', b'G', ..] => png(bytes, into),
        _ => Err("is neither a JPEG nor a PNG file".to_string()),
    };
    // No decoder here is known to panic. If one does, the panic must not end a run that skips broken files.
    let decoded = catch_unwind(AssertUnwindSafe(decoded))
        .unwrap_or_else(|_| Err("cannot be decoded: the decoder panicked".to_string()));
    decoded.map_err(|reason| Error::format(path, reason))
}

/// Width and height that the headers of an image file say.
///
/// # Errors
/// As [`decode`]; what is damaged behind the headers goes unnoticed.
pub fn size(path: &Path, bytes: &[u8]) -> Result<[usize; 2]> {
    let size = match bytes {
        [0xFF, 0xD8, ..] => jpeg_header(bytes).map(|decoder| decoder.size()),
        [0x89, b'P', b'N', b'G', ..] => png_header(bytes).map(|decoder| sides(&decoder)),
        // Whatever else it is, decoding says what.
        _ => return decode(path, bytes, &mut Image::default()).map(|()| [0; 2]),
    };
    size.map_err(|reason| Error::format(path, reason))
}

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
    decoder.decode(&mut into.pixels).map_err(|fault| fault.to_string())
}

/// A decoder that has read the headers, of a size within the limit.
fn jpeg_header(bytes: &[u8]) -> Result<jpeg::Decoder<'_>, String> {
    let decoder = jpeg::Decoder::new(bytes).map_err(|fault| fault.to_string())?;
    let [width, height] = decoder.size();
    check_size(width, height)?;
    Ok(decoder)
}

/// A decoder that has read the headers.
fn png_header(bytes: &[u8]) -> Result<PngDecoder<Cursor<&[u8]>>, String> {
    // The decoder reads a colour profile before it says the size: the size is checked first, where the format has it.
    let side = |at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, |bytes| u32::from_be_bytes(bytes) as usize)
    };
    let (width, height) = (side(16), side(20));
    if bytes.get(12..16) == Some(b"IHDR") {
        check_size(width, height)?;
    }
    let mut limits = image::Limits::no_limits();
    // Rows count, too: at most 8 bytes a pixel, and two of them.
    limits.max_alloc = Some(TEXT_LIMIT + 16 * width as u64);
    let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(damaged_png)?;
    let [width, height] = sides(&decoder);
    check_size(width, height)?;
    Ok(decoder)
}

/// Width and height.
fn sides(decoder: &impl ImageDecoder) -> [usize; 2] {
    let (width, height) = decoder.dimensions();
    [width as usize, height as usize]
}

fn damaged_png(e: image::ImageError) -> String {
    format!("is a damaged PNG file: {e}")
}

fn png(bytes: &[u8], into: &mut Image) -> Result<(), String> {
    let decoder = png_header(bytes)?;
    let [width, height] = sides(&decoder);
    let decoded = image::DynamicImage::from_decoder(decoder).map_err(damaged_png)?;
    // Moves the pixels where they are RGB already, as in most files.
    let rgb = decoded.into_rgb8();
    into.resize(width, height);
    into.pixels.copy_from_slice(rgb.as_raw());
    Ok(())
}

#[cfg(test)]
mod tests {
    use image::{ColorType, ExtendedColorType, ImageEncoder};

    use super::*;

    fn encode(pixels: &[u8], kind: ColorType) -> Vec<u8> {
        let mut bytes = Vec::new();
        image::codecs::png::PngEncoder::new(&mut bytes)
            .write_image(pixels, 2, 1, ExtendedColorType::from(kind))
            .unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Image {
        let mut image = Image::default();
        decode(Path::new("x"), bytes, &mut image).unwrap();
        assert_eq!(size(Path::new("x"), bytes).unwrap(), [image.width, image.height]);
        image
    }

    fn fixture(name: &str) -> Vec<u8> {
        let path = Path::new("tests/fixtures").join(name);
        std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        let cases: [(&[u8], ColorType, [u8; 6]); 4] = [
            (&[7, 200], ColorType::L8, [7, 7, 7, 200, 200, 200]),
            (&[1, 2, 3, 4, 5, 6], ColorType::Rgb8, [1, 2, 3, 4, 5, 6]),
            (&[1, 2, 3, 0, 5, 6, 7, 128], ColorType::Rgba8, [1, 2, 3, 5, 6, 7]),
            (&[9, 0, 8, 255], ColorType::La8, [9, 9, 9, 8, 8, 8]),
        ];
        for (pixels, kind, expected) in cases {
            assert_eq!(read(&encode(pixels, kind)).pixels, expected, "{kind:?}");
        }
        let deep: Vec<u8> = [0u16, 0x8080, 0xFFFF, 0x0101, 0xFE00, 0x7FFF]
            .iter()
            .flat_map(|v| v.to_ne_bytes())
            .collect();
        assert_eq!(read(&encode(&deep, ColorType::Rgb16)).pixels[..4], [0, 128, 255, 1]);
        assert_eq!(read(&fixture("palette.png")).pixels, [255, 0, 0, 0, 0, 255]);
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
        let png = encode(&[1, 2], ColorType::L8);
        let jpeg = fixture("grey.jpg");
        // A size of 2^31 - 1 squared in the header, with its checksum (of `IHDR` and what follows) put right.
        let mut bomb = png.clone();
        bomb[16..24].copy_from_slice(&[0x7F, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF]);
        let mut crc = flate2::Crc::new();
        crc.update(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        let mut wide = jpeg.clone();
        let frame = wide.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        wide[frame + 5..frame + 9].fill(0xFF);
        let cases: [(&[u8], &str); 7] = [
            (b"", "cat.jpg: is empty (0 bytes)"),
            (b"GIF89a", "is neither a JPEG nor a PNG file"),
            (&png[..png.len() - 20], "is a damaged PNG file"),
            (&jpeg[..jpeg.len() - 6], "is a JPEG file that ends early"),
            (&jpeg[..20], "is a JPEG file that ends early"),
            (&bomb, "the limit is 178956970 in all"),
            (&wide, "has 65535 x 65535 pixels"),
        ];
        for (bytes, expected) in cases {
            let message = decode(Path::new("cat.jpg"), bytes, &mut Image::default())
                .expect_err(expected)
                .to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

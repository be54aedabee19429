//! Decodes JPEG and PNG files to RGB.
//!
//! Grey, palette, alpha, 16-bit, CMYK and YCCK images are converted; alpha is dropped, not blended, the upper byte of 16 bits
//! is kept, and embedded colour profiles and orientations are ignored, as in Pillow's `convert("RGB")`. (Of 16-bit grey,
//! Pillow clips all but the lowest 256 levels to white; here it is treated as colour.) Sizes are checked before anything is
//! decoded. A JPEG file that ends early is an error, not a picture with a grey lower part.

mod jpeg;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::source::Image;
use crate::error::{Error, Result};

/// The most pixels an image may have: Pillow's limit against decompression bombs.
pub const PIXEL_LIMIT: usize = 178_956_970;

/// The most bytes of a PNG file's chunks besides pixels, unpacked.
const CHUNK_LIMIT: usize = 64 << 20;

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
        [0x89, b'P', b'N', b'G', ..] => png_header(bytes).map(|reader| sides(reader.info())),
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

/// A reader that is past the headers, of a size within the limit; it yields 8 or 16 bits a sample.
fn png_header(bytes: &[u8]) -> Result<png::Reader<Cursor<&[u8]>>, String> {
    let limits = png::Limits { bytes: CHUNK_LIMIT };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    // They are not used, and unpacked they can be a thousand times as large as the file.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(png::Transformations::EXPAND);
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

#[cfg(test)]
mod tests {
    use png::{BitDepth, ColorType};

    use super::*;

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

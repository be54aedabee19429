//! WebP files, through the crate `image-webp`; of an animation the first picture.

use std::borrow::Cow;
use std::io::Cursor;

use super::samples::{Samples, Values};
use super::{CHUNK_LIMIT, check_size};

type Found<T> = std::result::Result<T, String>;

type Decoder<'a> = image_webp::WebPDecoder<Cursor<&'a [u8]>>;

fn damaged(e: image_webp::DecodingError) -> String {
    format!("is a damaged WebP file: {e}")
}

fn opened(bytes: &[u8]) -> Found<(Decoder<'_>, [usize; 2])> {
    // The crate does not mind if the last chunk's end is missing.
    if let Some([a, b, c, d]) = bytes.get(4..8)
        && u32::from_le_bytes([*a, *b, *c, *d]) as usize > bytes.len() - 8
    {
        return Err("is a WebP file that ends early".into());
    }
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(damaged)?;
    decoder.set_memory_limit(CHUNK_LIMIT);
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
    let bytes = without_blending(bytes);
    let (mut decoder, size) = opened(&bytes)?;
    let alpha = decoder.has_alpha();
    let length = decoder.output_buffer_size().ok_or("is too large for this machine")?;
    let mut values = vec![0; length];
    decoder.read_image(&mut values).map_err(damaged)?;
    let (channels, values) = (if alpha { 4 } else { 3 }, Values::U8(values));
    Ok(Samples { size, channels, alpha, premultiplied: false, values })
}

/// The file with its first picture marked as one that replaces what is there. Nothing is, but the crate would blend the picture with
/// it, which rounds and makes what is transparent black; libwebp does not blend the first picture.
fn without_blending(bytes: &[u8]) -> Cow<'_, [u8]> {
    const REPLACES: u8 = 2;
    let mut at = 12;
    while let Some([a, b, c, d, w, x, y, z]) = bytes.get(at..at + 8) {
        let len = u32::from_le_bytes([*w, *x, *y, *z]) as usize;
        let flags = at + 8 + 15;
        if [*a, *b, *c, *d] == *b"ANMF" {
            return match bytes.get(flags) {
                Some(found) if found & REPLACES == 0 => {
                    let mut bytes = bytes.to_vec();
                    bytes[flags] |= REPLACES;
                    bytes.into()
                }
                _ => bytes.into(),
            };
        }
        at = at.saturating_add(8 + len.next_multiple_of(2));
        if at > bytes.len() {
            break;
        }
    }
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chunk of a RIFF file.
    fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let mut all = name.to_vec();
        all.extend((data.len() as u32).to_le_bytes());
        all.extend(data);
        all.resize(all.len().next_multiple_of(2), 0);
        all
    }

    #[test]
    fn the_first_picture_of_an_animation_is_as_it_is_stored() {
        // Opaque, half and fully transparent; a picture of its own, and in a corner of a larger animation.
        let pixels = [[10, 20, 30, 255], [201, 101, 51, 128], [7, 8, 9, 0], [1, 2, 3, 1]];
        let mut still = Vec::new();
        image_webp::WebPEncoder::new(&mut still)
            .encode(&pixels.concat(), 2, 2, image_webp::ColorType::Rgba8)
            .unwrap();
        let at = still.windows(4).position(|name| name == b"VP8L").unwrap();
        for side in [2, 4] {
            let mut frame = vec![0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 100, 0, 0, 0];
            frame.extend(&still[at..]);
            let mut all = b"WEBP".to_vec();
            all.extend(chunk(b"VP8X", &[0x12, 0, 0, 0, side - 1, 0, 0, side - 1, 0, 0]));
            all.extend(chunk(b"ANIM", &[255, 255, 255, 255, 0, 0]));
            all.extend([chunk(b"ANMF", &frame), chunk(b"ANMF", &frame)].concat());
            let file = chunk(b"RIFF", &all);
            let read = read(&file).unwrap();
            let Values::U8(values) = &read.values else { panic!("of 8 bits") };
            let side = usize::from(side);
            assert_eq!((read.size, read.channels), ([side; 2], 4));
            for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                assert_eq!(values[4 * (y * side + x)..][..4], pixels[2 * y + x]);
            }
            assert!(side == 2 || values[8..16] == [0; 8], "black beside it");
            for len in 0..file.len() {
                assert!(super::read(&file[..len]).is_err(), "{len}");
            }
        }
    }
}

//! From the strips or tiles of a page to its samples.
//!
//! The crate `tiff` reads these, too, but takes padding for damage (tiles in LZW), panics (tiles in planes), drops samples beside
//! RGB and does not know reversed bits. flate2 and weezl unpack; what is done here is to put samples in their places.

use std::io::{Read, Seek, SeekFrom};

use super::super::PIXEL_LIMIT;
use super::Found;
use super::directory::damaged;
use super::page::{Packing, Page, Predictor};

/// A sample as it stands in a file.
pub trait Sample: Copy + Default {
    const BYTES: usize;
    /// From `BYTES` bytes.
    fn of(bytes: &[u8], big_endian: bool) -> Self;
    /// The sum of two bit patterns, which undoes a difference.
    fn plus(self, other: Self) -> Self;
    /// White for black.
    fn inverted(self) -> Self;
}

impl Sample for u8 {
    const BYTES: usize = 1;

    fn of(bytes: &[u8], _: bool) -> Self {
        bytes[0]
    }

    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }

    fn inverted(self) -> Self {
        !self
    }
}

impl Sample for u16 {
    const BYTES: usize = 2;

    fn of(bytes: &[u8], big_endian: bool) -> Self {
        let bytes = [bytes[0], bytes[1]];
        if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    }

    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }

    fn inverted(self) -> Self {
        !self
    }
}

impl Sample for f32 {
    const BYTES: usize = 4;

    fn of(bytes: &[u8], big_endian: bool) -> Self {
        let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if big_endian { f32::from_be_bytes(bytes) } else { f32::from_le_bytes(bytes) }
    }

    fn plus(self, other: Self) -> Self {
        Self::from_bits(self.to_bits().wrapping_add(other.to_bits()))
    }

    fn inverted(self) -> Self {
        self
    }
}

/// Samples of a page, `[height, width, channels]` as they are stored.
pub fn read<T: Sample>(file: &mut (impl Read + Seek), page: &Page) -> Found<Vec<T>> {
    let ([width, height], channels, chunks) = (page.size, page.channels, &page.chunks);
    let [across, down] = [width.div_ceil(chunks.size[0]), height.div_ceil(chunks.size[1])];
    // Samples of a pixel of a chunk.
    let beside = channels / chunks.planes;
    let row_bytes = chunks.size[0] * beside * T::BYTES;
    let mut all = vec![T::default(); width * height * channels];
    let (mut packed, mut bytes, mut row) = (Vec::new(), Vec::new(), Vec::<T>::new());
    for index in 0..chunks.planes * down * across {
        let (plane, place) = (index / (down * across), index % (down * across));
        let [left, top] = [place % across * chunks.size[0], place / across * chunks.size[1]];
        let [columns, rows] = [chunks.size[0].min(width - left), chunks.size[1].min(height - top)];
        // What reaches beyond the image is unpacked, too: damage often shows at the end only.
        let whole = chunks.tiled && chunks.packing != Packing::Plain;
        let stored = if whole { chunks.size[1] } else { rows };
        unpack(file, page, index, stored * row_bytes, (&mut packed, &mut bytes))?;
        for (y, bytes) in bytes.chunks_exact_mut(row_bytes).take(rows).enumerate() {
            samples(bytes, page, beside, columns, &mut row);
            let start = ((top + y) * width + left) * channels + plane;
            if chunks.planes == 1 {
                let len = columns * channels;
                all[start..start + len].copy_from_slice(&row[..len]);
            } else {
                let to = all[start..].iter_mut().step_by(channels);
                to.zip(&row[..columns]).for_each(|(to, value)| *to = *value);
            }
        }
    }
    if page.inverted {
        all.iter_mut().for_each(|value| *value = value.inverted());
    }
    Ok(all)
}

/// The first samples of a chunk's row: those of `columns` pixels.
fn samples<T: Sample>(
    bytes: &mut [u8],
    page: &Page,
    beside: usize,
    columns: usize,
    row: &mut Vec<T>,
) {
    row.clear();
    if page.chunks.predictor == Predictor::FloatBytes {
        for i in beside..bytes.len() {
            bytes[i] = bytes[i].wrapping_add(bytes[i - beside]);
        }
        let count = bytes.len() / T::BYTES;
        let mut sample = [0; 8];
        row.extend((0..columns * beside).map(|i| {
            (0..T::BYTES).for_each(|byte| sample[byte] = bytes[byte * count + i]);
            T::of(&sample, true)
        }));
        return;
    }
    let big_endian = page.chunks.big_endian;
    let values = bytes.chunks_exact(T::BYTES).take(columns * beside);
    row.extend(values.map(|bytes| T::of(bytes, big_endian)));
    if page.chunks.predictor == Predictor::Differences {
        for i in beside..row.len() {
            row[i] = row[i].plus(row[i - beside]);
        }
    }
}

/// Reads `len` bytes of a chunk, unpacked, into the second buffer.
fn unpack(
    file: &mut (impl Read + Seek),
    page: &Page,
    index: usize,
    len: usize,
    (packed, bytes): (&mut Vec<u8>, &mut Vec<u8>),
) -> Found<()> {
    let chunks = &page.chunks;
    let (at, count) = (chunks.offsets[index], chunks.counts[index]);
    let is_plain = chunks.packing == Packing::Plain;
    // Such are the places of tiles that were never written.
    if at < 8 || (count == 0 && !is_plain) {
        return Err("is a TIFF file some of whose strips or tiles have no data".into());
    }
    if count > 4 * PIXEL_LIMIT as u64 {
        return Err("is a TIFF file that is too large".into());
    }
    let failed = |error: std::io::Error| format!("cannot be read: {error}");
    file.seek(SeekFrom::Start(at)).map_err(failed)?;
    let from_file = if is_plain { &mut *bytes } else { &mut *packed };
    from_file.clear();
    let most = if is_plain { len as u64 } else { count };
    file.by_ref().take(most).read_to_end(from_file).map_err(failed)?;
    if chunks.reversed {
        from_file.iter_mut().for_each(|byte| *byte = byte.reverse_bits());
    }
    match chunks.packing {
        Packing::Plain => {}
        Packing::Lzw => lzw(packed, len, bytes)?,
        Packing::PackBits => pack_bits(packed, len, bytes),
        Packing::Deflate => {
            bytes.clear();
            // One byte more, since the checksum counts only when the end is reached.
            flate2::read::ZlibDecoder::new(packed.as_slice())
                .take(len as u64 + 1)
                .read_to_end(bytes)
                .map_err(damaged)?;
        }
    }
    if bytes.len() < len {
        return Err("is a TIFF file that ends early, or one of its strips or tiles does".into());
    }
    bytes.truncate(len);
    Ok(())
}

fn lzw(packed: &[u8], len: usize, bytes: &mut Vec<u8>) -> Found<()> {
    // Codes of the final standard begin with one of nine bits, 256, whose upper eight are 128.
    if let [0, second, ..] = packed
        && second & 1 == 1
    {
        return Err("is a TIFF file in the LZW of before TIFF 6.0, which is not read".into());
    }
    bytes.clear();
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8);
    let (mut from, mut to) = (0, 0);
    while to < len {
        // A little at a time: the file may claim more than it holds.
        bytes.resize(len.min(to + (1 << 16)), 0);
        let step = decoder.decode_bytes(&packed[from..], &mut bytes[to..]);
        from += step.consumed_in;
        to += step.consumed_out;
        match step.status {
            Ok(weezl::LzwStatus::Ok) if step.consumed_in + step.consumed_out > 0 => {}
            Ok(_) => break,
            Err(error) => return Err(damaged(error)),
        }
    }
    bytes.truncate(to);
    Ok(())
}

fn pack_bits(mut packed: &[u8], len: usize, bytes: &mut Vec<u8>) {
    bytes.clear();
    while bytes.len() < len {
        match packed {
            // A byte without meaning.
            [128, rest @ ..] => packed = rest,
            [run @ 129..=255, value, rest @ ..] => {
                bytes.resize(bytes.len() + 257 - usize::from(*run), *value);
                packed = rest;
            }
            [count, rest @ ..] => {
                let (copied, rest) = rest.split_at(rest.len().min(usize::from(*count) + 1));
                bytes.extend(copied);
                packed = rest;
            }
            [] => return,
        }
    }
}

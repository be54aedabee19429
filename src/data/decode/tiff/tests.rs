use std::io::Cursor;

use tiff::encoder::colortype::{Gray8, RGB8, RGB16};
use tiff::encoder::{Rational, TiffEncoder};
use tiff::tags::{ExtraSamples, ResolutionUnit, Tag};

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
        let read = read(Cursor::new(&bytes), None, &Reading::default()).unwrap();
        let shown = if swaps { [2, 3] } else { [3, 2] };
        assert_eq!((read.size, size(Cursor::new(&bytes), None).unwrap()), (shown, shown));
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
        let read = read(Cursor::new(bytes), None, &reading).unwrap();
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

const SIZE: [u32; 2] = [5, 3];

/// An RGB file with further samples; sample `i` of all is `i`.
fn rgb_and(extra: &[ExtraSamples], big: bool) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    let samples: Vec<u16> = (0..15 * (3 + extra.len() as u16)).collect();
    macro_rules! write {
        ($encoder:expr) => {{
            let mut encoder = $encoder.unwrap();
            let mut image = encoder.new_image::<RGB16>(SIZE[0], SIZE[1]).unwrap();
            image.extra_samples(extra).unwrap();
            image.resolution(ResolutionUnit::Inch, Rational { n: 1, d: 1 });
            image.write_data(&samples).unwrap();
        }};
    }
    match big {
        true => write!(TiffEncoder::new_big(&mut file)),
        false => write!(TiffEncoder::new(&mut file)),
    }
    file.into_inner()
}

#[test]
fn bands_beyond_rgb_are_read() {
    use ExtraSamples::{AssociatedAlpha, Unspecified};
    for big in [false, true] {
        for (extra, alpha) in [
            (&[Unspecified][..], false),
            (&[AssociatedAlpha][..], true),
            (&[Unspecified, Unspecified][..], false),
            (&[AssociatedAlpha, Unspecified][..], false),
            (&[Unspecified; 5][..], false),
        ] {
            let file = rgb_and(extra, big);
            let channels = 3 + extra.len();
            let native = look(Cursor::new(&file)).unwrap();
            assert_eq!((native.channels, native.bits, native.alpha), (channels, 16, alpha));
            let reading = Reading { format: Format { channels, bits: 16 }, ..Reading::default() };
            let image = read(Cursor::new(&file), None, &reading).unwrap();
            let Values::U16(values) = &image.values else { panic!("{extra:?}") };
            assert_eq!((image.size, image.channels), (SIZE.map(|side| side as usize), channels));
            assert!(values.iter().copied().eq(0..15 * channels as u16), "{extra:?}");
        }
    }
}

/// A page of 5 x 3 pixels to be written: its samples, and how they are stored.
#[derive(Clone)]
struct Written {
    channels: usize,
    bits: usize,
    /// `[height, width, channels]`, little-endian.
    samples: Vec<u8>,
    tile: Option<[usize; 2]>,
    planes: bool,
    compression: u16,
    predictor: u16,
    /// Further entries of the directory: a tag and its short numbers.
    more: Vec<(u16, Vec<u16>)>,
}

impl Written {
    fn of(channels: usize, bits: usize) -> Self {
        let count = 15 * channels as u32;
        let samples: Vec<u8> = match bits {
            8 => (0..count).map(|i| (i * 17 + i % 5) as u8).collect(),
            16 => (0..count).flat_map(|i| ((i * 4099 + i % 7) as u16).to_le_bytes()).collect(),
            _ => (0..count).flat_map(|i| (i as f32 * 0.37 - 2.0).to_le_bytes()).collect(),
        };
        let (tile, more) = (None, Vec::new());
        Self { channels, bits, samples, tile, planes: false, compression: 1, predictor: 1, more }
    }

    fn has(&self, tag: u16, value: u16) -> bool {
        self.more.iter().any(|(found, values)| *found == tag && values[0] == value)
    }

    /// The bytes of a chunk, packed.
    fn packed(
        &self,
        plane: usize,
        [left, top]: [usize; 2],
        [width, height]: [usize; 2],
    ) -> Vec<u8> {
        let (bytes, beside) = (self.bits / 8, if self.planes { 1 } else { self.channels });
        let mut all = Vec::new();
        for y in top..top + height {
            let mut row = Vec::new();
            for (x, channel) in (left..left + width).flat_map(|x| (0..beside).map(move |c| (x, c)))
            {
                let at = ((y * 5 + x) * self.channels + plane + channel) * bytes;
                // What reaches beyond the image is not zero.
                match x < 5 && y < 3 {
                    true => row.extend(&self.samples[at..at + bytes]),
                    false => row.extend(std::iter::repeat_n(0xAB, bytes)),
                }
            }
            all.extend(self.predicted(row, beside));
        }
        let mut packed = match self.compression {
            1 => all,
            5 => weezl::encode::Encoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8)
                .encode(&all)
                .unwrap(),
            8 => {
                let mut file =
                    flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
                std::io::Write::write_all(&mut file, &all).unwrap();
                file.finish().unwrap()
            }
            _ => all
                .chunks(100)
                .flat_map(|part| [&[128, part.len() as u8 - 1], part].concat())
                .collect(),
        };
        if self.has(266, 2) {
            packed.iter_mut().for_each(|byte| *byte = byte.reverse_bits());
        }
        packed
    }

    fn predicted(&self, row: Vec<u8>, beside: usize) -> Vec<u8> {
        let bytes = self.bits / 8;
        match self.predictor {
            2 => {
                let number = |at: usize| {
                    let bytes = row[at * bytes..][..bytes].iter().rev();
                    bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
                };
                let before = |i: usize| i.checked_sub(beside).map_or(0, number);
                let differences =
                    (0..row.len() / bytes).map(|i| number(i).wrapping_sub(before(i)).to_le_bytes());
                differences.flat_map(|number| number[..bytes].to_vec()).collect()
            }
            3 => {
                let count = row.len() / bytes;
                let apart: Vec<u8> = (0..row.len())
                    .map(|i| row[i % count * bytes + (bytes - 1 - i / count)])
                    .collect();
                let before = |i: usize| i.checked_sub(beside).map_or(0, |at| apart[at]);
                (0..row.len()).map(|i| apart[i].wrapping_sub(before(i))).collect()
            }
            _ => row,
        }
    }

    fn file(&self) -> Vec<u8> {
        Self::pages(std::slice::from_ref(self))
    }

    fn pages(pages: &[Self]) -> Vec<u8> {
        let (mut file, mut next) = (b"II*\0\0\0\0\0".to_vec(), 4);
        for page in pages {
            let [width, height] = page.tile.unwrap_or([5, 2]);
            let (mut offsets, mut counts) = (Vec::new(), Vec::new());
            for plane in 0..if page.planes { page.channels } else { 1 } {
                for top in (0..3).step_by(height) {
                    for left in (0..5).step_by(width) {
                        let rows = if page.tile.is_some() { height } else { height.min(3 - top) };
                        let packed = page.packed(plane, [left, top], [width, rows]);
                        offsets.push(file.len() as u32);
                        counts.push(packed.len() as u32);
                        file.extend(packed);
                    }
                }
            }
            let short = |values: &[u16]| (3, values.iter().flat_map(|v| v.to_le_bytes()).collect());
            let long = |values: &[u32]| (4, values.iter().flat_map(|v| v.to_le_bytes()).collect());
            let format = if page.bits == 32 { 3 } else { 1 };
            let mut entries: Vec<(u16, (u16, Vec<u8>))> = vec![
                (256, long(&[5])),
                (257, long(&[3])),
                (258, short(&vec![page.bits as u16; page.channels])),
                (259, short(&[page.compression])),
                (277, short(&[page.channels as u16])),
                (284, short(&[1 + u16::from(page.planes)])),
                (317, short(&[page.predictor])),
                (339, short(&vec![format; page.channels])),
            ];
            if !page.more.iter().any(|(tag, _)| *tag == 262) {
                entries.push((262, short(&[1])));
            }
            entries.extend(page.more.iter().map(|(tag, values)| (*tag, short(values))));
            match page.tile {
                Some([width, height]) => entries.extend([
                    (322, long(&[width as u32])),
                    (323, long(&[height as u32])),
                    (324, long(&offsets)),
                    (325, long(&counts)),
                ]),
                None => entries.extend([
                    (273, long(&offsets)),
                    (278, long(&[height as u32])),
                    (279, long(&counts)),
                ]),
            }
            entries.sort_by_key(|(tag, _)| *tag);
            let mut directory = (entries.len() as u16).to_le_bytes().to_vec();
            for (tag, (kind, bytes)) in entries {
                let count = bytes.len() as u32 / if kind == 3 { 2 } else { 4 };
                directory.extend([tag, kind].map(u16::to_le_bytes).concat());
                directory.extend(count.to_le_bytes());
                match bytes.len() <= 4 {
                    true => directory.extend([bytes, vec![0; 4]].concat()[..4].to_vec()),
                    false => {
                        directory.extend((file.len() as u32).to_le_bytes());
                        file.extend(bytes);
                    }
                }
            }
            let at = (file.len() as u32).to_le_bytes();
            file[next..next + 4].copy_from_slice(&at);
            file.extend(directory);
            next = file.len();
            file.extend([0; 4]);
        }
        file
    }
}

/// The samples of a file's first page, little-endian.
fn bytes_of(file: &[u8], pages: Option<Pages>) -> Found<Vec<u8>> {
    let format = Format { channels: 256, bits: 8 };
    let read = read(Cursor::new(file), None, &Reading { pages, format, ..Reading::default() })?;
    Ok(match read.values {
        Values::U8(values) => values,
        Values::U16(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Values::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    })
}

#[test]
fn strips_and_tiles_are_put_together_however_they_are_stored() {
    for (channels, bits) in [(1, 8), (3, 8), (4, 8), (2, 16), (3, 16), (1, 32), (3, 32)] {
        for (compression, predictor) in [(1, 1), (5, 1), (5, 2), (8, 1), (8, 2), (8, 3), (32773, 1)]
        {
            if predictor == 3 && bits != 32 {
                continue;
            }
            // Strips, tiles that reach beyond the image, that fit one side, and that hold more than all of it.
            for tile in [None, Some([2, 2]), Some([5, 2]), Some([16, 16]), Some([1, 3])] {
                for (planes, order) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
                    let more = vec![(266, vec![order])];
                    let page = Written {
                        tile,
                        planes,
                        compression,
                        predictor,
                        more,
                        ..Written::of(channels, bits)
                    };
                    let case = (channels, bits, compression, predictor, tile, planes, order);
                    assert_eq!(bytes_of(&page.file(), None).unwrap(), page.samples, "{case:?}");
                }
            }
        }
    }
}

#[test]
fn grey_beside_alpha_is_one_channel() {
    for (kind, alpha) in [(0, false), (1, true), (2, true)] {
        let page = Written { more: vec![(338, vec![kind])], ..Written::of(2, 8) };
        let file = page.file();
        let native = look(Cursor::new(&file)).unwrap();
        assert_eq!((native.channels, native.alpha), (2, alpha));
        let rgb = |channels| {
            let format = Format { channels, bits: 8 };
            let reading = Reading { format, ..Reading::default() };
            let mut image = Image::default();
            let read = read(Cursor::new(&file), None, &reading)?;
            read.convert(&reading, &mut image).map(|()| image.pixels)
        };
        assert_eq!(rgb(2).unwrap(), page.samples);
        if alpha {
            let grey = page.samples.chunks(2).map(|pixel| match (kind, pixel[1]) {
                (2, _) => pixel[0],
                (_, 0) => 0,
                (_, alpha) => (u32::from(pixel[0]) * 255 / u32::from(alpha)).min(255) as u8,
            });
            let three: Vec<u8> = grey.flat_map(|value| [value; 3]).collect();
            assert_eq!(rgb(3).unwrap(), three, "{kind}");
        } else {
            assert!(rgb(3).unwrap_err().contains("has 2 channels"));
        }
    }
    // The last of many bands, too.
    let page = Written { more: vec![(338, vec![0, 0, 0, 2])], ..Written::of(5, 16) };
    assert!(look(Cursor::new(page.file())).unwrap().alpha);
}

#[test]
fn white_may_be_zero_but_not_of_floats() {
    let white = |bits| Written { more: vec![(262, vec![0])], ..Written::of(1, bits) };
    for bits in [8, 16] {
        let expected: Vec<u8> = white(bits).samples.iter().map(|byte| !byte).collect();
        assert_eq!(bytes_of(&white(bits).file(), None).unwrap(), expected, "{bits}");
    }
    // As Pillow reads them: floats are quantities.
    assert_eq!(bytes_of(&white(32).file(), None).unwrap(), white(32).samples);
    let two = Written { more: vec![(262, vec![0])], ..Written::of(2, 8) };
    assert!(bytes_of(&two.file(), None).unwrap_err().contains("2 channels whose 0 is white"));
}

#[test]
fn what_is_not_read_is_named() {
    let with = |tag, value| Written { more: vec![(tag, vec![value])], ..Written::of(1, 8) };
    let rgb = |tag, value| Written { more: vec![(tag, vec![value])], ..Written::of(3, 8) };
    let packed = |compression, predictor| Written { compression, predictor, ..Written::of(1, 8) };
    for (page, expected) in [
        (with(262, 3), "with a palette, which is not read"),
        (rgb(262, 6), "in YCbCr, which is not read"),
        (with(266, 3), "fill order 3"),
        (packed(7, 1), "packed by JPEG, which is not read"),
        (packed(50000, 1), "packed by Zstandard, which is not read"),
        (packed(32773, 2), "with a predictor, but neither LZW nor Deflate"),
        (packed(8, 3), "with the predictor 3, which is not read"),
        (Written { tile: Some([1 << 30, 16]), ..Written::of(1, 8) }, "tiles of 1073741824 x 16"),
    ] {
        // A tile of that size is not written.
        let mut small = page.clone();
        small.tile = page.tile.map(|_| [16, 16]);
        let mut file = small.file();
        if page.tile.is_some() {
            let at = file.windows(4).position(|bytes| bytes == [66, 1, 4, 0]).unwrap();
            file[at + 8..at + 12].copy_from_slice(&(1_u32 << 30).to_le_bytes());
        }
        let said = bytes_of(&file, None).unwrap_err();
        assert!(said.contains(expected), "expected `{expected}` in `{said}`");
    }
    // Codes of the old LZW begin with the lower bits; a checksum that is wrong; a tile that was never written.
    let tiled = |compression| Written { tile: Some([16, 16]), compression, ..Written::of(1, 8) };
    let changed = |page: &Written, change: fn(&mut Vec<u8>, usize)| {
        let (mut file, packed) = (page.file(), page.packed(0, [0, 0], [16, 16]));
        let at = file.windows(packed.len()).position(|part| part == packed).unwrap();
        change(&mut file, at + packed.len());
        bytes_of(&file, None)
    };
    let old = |file: &mut Vec<u8>, _: usize| file[8..10].copy_from_slice(&[0, 1]);
    assert!(changed(&tiled(5), old).unwrap_err().contains("LZW of before TIFF 6.0"));
    assert!(changed(&tiled(8), |file, end| file[end - 1] ^= 1).unwrap_err().contains("damaged"));
    let empty = |file: &mut Vec<u8>, _: usize| {
        let at = file.windows(4).position(|bytes| bytes == [68, 1, 4, 0]).unwrap();
        file[at + 8..at + 12].fill(0);
    };
    assert!(changed(&tiled(1), empty).unwrap_err().contains("tiles have no data"));
}

#[test]
fn pages_are_found_at_their_places() {
    let pages: Vec<Written> = (1..=4).map(|channels| Written::of(channels, 8)).collect();
    let file = Written::pages(&pages);
    let places = places(Cursor::new(&file)).unwrap();
    assert_eq!((places.len(), look(Cursor::new(&file)).unwrap().pages), (4, 4));
    for (place, page) in places.into_iter().zip(&pages) {
        let reading = Reading { pages: Some(Pages::Images), ..Reading::default() };
        let read = read(Cursor::new(&file), Some(place), &reading).unwrap();
        let Values::U8(values) = read.values else { panic!("of 8 bits") };
        assert_eq!((read.channels, &values), (page.channels, &page.samples));
        assert_eq!(size(Cursor::new(&file), Some(place)).unwrap(), [5, 3]);
    }
    assert_eq!(bytes_of(&file, Some(Pages::Images)).unwrap(), pages[0].samples);
}

#[test]
fn damaged_files_are_refused_without_a_panic() {
    for (compression, planes, tile) in
        [(1, false, None), (5, true, Some([2, 2])), (8, false, None), (32773, true, None)]
    {
        let page = Written { compression, planes, tile, ..Written::of(3, 8) };
        let file = Written::pages(&[page.clone(), page]);
        for len in 0..file.len() {
            assert!(bytes_of(&file[..len], Some(Pages::Channels)).is_err(), "{len}");
        }
        for at in 0..file.len() {
            for change in [1, 0x80, 0xFF] {
                let mut other = file.clone();
                other[at] ^= change;
                let _ = bytes_of(&other, Some(Pages::Channels));
                let _ = places(Cursor::new(&other));
            }
        }
    }
}

#[test]
fn directories_are_taken_at_their_word_only_if_it_is_one() {
    let page = Written { more: vec![(274, vec![1])], ..Written::of(1, 8) };
    let file = Written::pages(&[page.clone(), page.clone()]);
    let place = |tag: u16| {
        let entry = [tag, 3].map(u16::to_le_bytes).concat();
        file.windows(4).position(|bytes| bytes == entry).unwrap()
    };
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        bytes_of(&file, Some(Pages::Channels))
    };
    assert!(bytes_of(&file, Some(Pages::Channels)).is_ok());
    // The last page names the first as the next.
    let circle = changed(file.len() - 4, &file[4..8]).unwrap_err();
    assert!(circle.contains("its pages go round in a circle"), "{circle}");
    // A second width, beside the width of 5.
    let twice = changed(place(274), &[0, 1, 3, 0, 1, 0, 0, 0, 4]).unwrap_err();
    assert!(twice.contains("two values of tag 256"), "{twice}");
    let float = changed(place(274) + 2, &[11]).unwrap_err();
    assert!(float.contains("Orientation is no whole number"), "{float}");
    // What is not packed needs no word on its bytes.
    let at = file.windows(4).position(|bytes| bytes == [23, 1, 4, 0]).unwrap();
    assert!(changed(at, &[0xE8, 3]).is_ok());
}

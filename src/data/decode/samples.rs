//! From the samples of a file to those of an image: as many channels and bits as the reading asks for, or a refusal.

use serde::{Deserialize, Serialize};

use crate::data::source::{Format, Image};
use crate::error::{Error, Result};

/// The most channels that images may have.
pub const MOST_CHANNELS: usize = 256;

/// How the files of a set are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Channels and bits of the images. RGB of 8 bits is what every JPEG, PNG, WebP and BMP file can be read as.
    pub format: Format,
    /// The values that become 0 and the largest sample; values outside are clipped. For images of 16 bits only; needed for floats.
    pub range: Option<[f64; 2]>,
    /// What the pages of a TIFF file are; a file of several is refused if absent.
    pub pages: Option<Pages>,
    /// The axes of a NumPy array; such files are not read if absent.
    pub axes: Option<Axes>,
}

impl Default for Reading {
    fn default() -> Self {
        Self { format: Format::RGB, range: None, pages: None, axes: None }
    }
}

/// What the pages of a TIFF file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// Channels of one image, in order.
    Channels,
    /// Images of their own.
    Images,
}

/// The axes of a NumPy array, in order: `n` numbers images, `h` and `w` are rows and columns, `c` channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // their names say it
pub enum Axes {
    Hw,
    Hwc,
    Chw,
    Nhw,
    Nhwc,
    Nchw,
}

impl Axes {
    /// The letters, in order.
    pub fn letters(self) -> &'static str {
        match self {
            Self::Hw => "hw",
            Self::Hwc => "hwc",
            Self::Chw => "chw",
            Self::Nhw => "nhw",
            Self::Nhwc => "nhwc",
            Self::Nchw => "nchw",
        }
    }
}

impl Reading {
    /// Whether images are RGB of 8 bits, whatever their files hold.
    pub fn is_rgb(&self) -> bool {
        self.format == Format::RGB
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// If one is out of range; the message names its key in a recipe.
    pub fn check(&self) -> Result<()> {
        let Format { channels, bits } = self.format;
        if !(1..=MOST_CHANNELS).contains(&channels) {
            return Err(Error::Config(format!(
                "data.channels is {channels}; it must be 1 to {MOST_CHANNELS}"
            )));
        }
        if ![8, 16].contains(&bits) {
            let floats = if bits == 32 { " (floats become 16 bits by data.range)" } else { "" };
            return Err(Error::Config(format!("data.bits is {bits}; it must be 8 or 16{floats}")));
        }
        match self.range {
            Some(_) if bits == 8 => {
                Err(Error::config("data.range needs data.bits=16: in 8 bits levels would be lost"))
            }
            Some([low, high]) if !(low < high && low.is_finite() && high.is_finite()) => {
                Err(Error::Config(format!(
                    "data.range is [{low}, {high}]; it must rise, and be finite"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// The samples of a file or an array in the type that it has.
#[derive(Debug)]
pub enum Values {
    /// Of 8 bits.
    U8(Vec<u8>),
    /// Of 16 bits.
    U16(Vec<u16>),
    /// Floats.
    F32(Vec<f32>),
}

/// The image of a file or an array, before it is read as a set's format.
#[derive(Debug)]
pub struct Samples {
    /// Width and height in pixels.
    pub size: [usize; 2],
    /// Samples of a pixel.
    pub channels: usize,
    /// Whether the last channel is an alpha channel, which is dropped unless it is asked for.
    pub alpha: bool,
    /// Whether the colours were multiplied by alpha, which is undone when alpha is dropped.
    pub premultiplied: bool,
    /// `[height, width, channels]`.
    pub values: Values,
}

/// Channels and bits that a file has; 32 bits are floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Native {
    /// Samples of a pixel.
    pub channels: usize,
    /// Bits of a sample.
    pub bits: usize,
    /// Whether the last channel is an alpha channel.
    pub alpha: bool,
    /// Images in the file, or pages.
    pub pages: usize,
}

impl Samples {
    /// Writes the image as the reading asks for.
    ///
    /// # Errors
    /// If it has other channels or bits, floats that are not finite, or floats and no range; the end of a sentence about the file.
    pub fn convert(&self, reading: &Reading, into: &mut Image) -> std::result::Result<(), String> {
        let from = self.channels;
        let wanted = reading.format.channels;
        // For each wanted channel, its place in a pixel of the file.
        let colours = from - usize::from(self.alpha);
        let places: Vec<usize> = if wanted == from || wanted == colours {
            (0..wanted).collect()
        } else if wanted == 3 && colours == 1 {
            vec![0; 3]
        } else {
            return Err(format!(
                "has {from} channel{}, and data.channels is {wanted}",
                if from == 1 { "" } else { "s" }
            ));
        };
        let [width, height] = self.size;
        into.reshape(width, height, reading.format);
        let samples = into.pixels.as_mut_slice();
        let divided = match (&self.values, self.premultiplied && wanted != from) {
            // What is opaque is 1, or the range's end: nobody says.
            (Values::F32(_), true) => {
                return Err(format!(
                    "has floats that were multiplied by alpha: set data.channels={from}"
                ));
            }
            (_, drops_alpha) => drops_alpha.then(|| self.divided()),
        };
        match (divided.as_ref().unwrap_or(&self.values), reading.format.bits) {
            (Values::U8(values), 8) => {
                let pixels = samples.chunks_exact_mut(wanted).zip(values.chunks_exact(from));
                pixels.for_each(|(to, pixel)| pick(to, pixel, &places));
                Ok(())
            }
            (Values::U16(_), 8) => Err("has samples of 16 bits: set data.bits=16".into()),
            (Values::F32(_), 8) => Err(FLOATS.into()),
            (Values::U8(values), _) => {
                let scaled = scale(reading.range);
                write(samples, values, from, &places, |v| match &scaled {
                    Some(scaled) => scaled(f64::from(v)),
                    None => u16::from(v) * 257,
                });
                Ok(())
            }
            (Values::U16(values), _) => {
                let scaled = scale(reading.range);
                write(samples, values, from, &places, |v| match &scaled {
                    Some(scaled) => scaled(f64::from(v)),
                    None => v,
                });
                Ok(())
            }
            (Values::F32(values), _) => {
                let Some(scaled) = scale(reading.range) else { return Err(FLOATS.into()) };
                let odd = values.iter().filter(|v| !v.is_finite()).count();
                if odd > 0 {
                    return Err(format!("has {odd} samples that are not finite numbers"));
                }
                write(samples, values, from, &places, |v| scaled(f64::from(v)));
                Ok(())
            }
        }
    }

    /// The values, their colours divided by alpha, as Pillow does it: rounded down, and at most the largest.
    fn divided(&self) -> Values {
        fn of<T: Copy + Into<u64> + TryFrom<u64>>(
            values: &[T],
            channels: usize,
            most: u64,
        ) -> Vec<T> {
            let mut values = values.to_vec();
            for pixel in values.chunks_exact_mut(channels) {
                let Some((alpha, colours)) = pixel.split_last_mut() else { continue };
                let alpha: u64 = (*alpha).into();
                for value in colours {
                    // Black where nothing is seen.
                    let divided = ((*value).into() * most).checked_div(alpha).unwrap_or(0);
                    *value = T::try_from(divided.min(most)).unwrap_or(*value);
                }
            }
            values
        }
        match &self.values {
            Values::U8(values) => Values::U8(of(values, self.channels, 255)),
            Values::U16(values) => Values::U16(of(values, self.channels, 65535)),
            Values::F32(values) => Values::F32(values.clone()),
        }
    }

    /// The least and the largest sample, for a range; NaN and infinite ones aside.
    pub fn extent(&self) -> [f64; 2] {
        fn of(values: impl Iterator<Item = f64>) -> [f64; 2] {
            values
                .filter(|v| v.is_finite())
                .fold([f64::INFINITY, f64::NEG_INFINITY], |[a, b], v| [a.min(v), b.max(v)])
        }
        match &self.values {
            Values::U8(values) => of(values.iter().map(|&v| f64::from(v))),
            Values::U16(values) => of(values.iter().map(|&v| f64::from(v))),
            Values::F32(values) => of(values.iter().map(|&v| f64::from(v))),
        }
    }
}

const FLOATS: &str =
    "has floats: set data.bits=16 and data.range=[LOW, HIGH], the values that are black and white";

fn pick<T: Copy>(to: &mut [T], pixel: &[T], places: &[usize]) {
    to.iter_mut().zip(places).for_each(|(to, &at)| *to = pixel[at]);
}

/// Maps a range to 16 bits; `None` if there is none.
fn scale(range: Option<[f64; 2]>) -> Option<impl Fn(f64) -> u16> {
    let [low, high] = range?;
    let factor = 65535.0 / (high - low);
    Some(move |v: f64| ((v - low) * factor).round().clamp(0.0, 65535.0) as u16)
}

/// Writes samples of 16 bits.
fn write<T: Copy>(
    into: &mut [u8],
    values: &[T],
    channels: usize,
    places: &[usize],
    to_16_bits: impl Fn(T) -> u16,
) {
    let pixels = into.chunks_exact_mut(2 * places.len()).zip(values.chunks_exact(channels));
    for (to, pixel) in pixels {
        for (to, &at) in to.as_chunks_mut::<2>().0.iter_mut().zip(places) {
            *to = to_16_bits(pixel[at]).to_le_bytes();
        }
    }
}

/// Maps a range of samples of 16 bits to all of them.
pub fn stretch(pixels: &mut [u8], range: [f64; 2]) {
    let scaled = scale(Some(range)).expect("a range is given");
    for sample in pixels.as_chunks_mut::<2>().0 {
        *sample = scaled(f64::from(u16::from_le_bytes(*sample))).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::decode::{decode, native, size};

    /// A TIFF file of pages of samples of 16 bits, or of floats, without compression: `[width, height, channels]` and the bytes.
    fn tiff(pages: &[([u32; 3], Vec<u8>)], floats: bool) -> Vec<u8> {
        let mut file = b"II*\0".to_vec();
        let mut next = 4;
        file.extend([0; 4]);
        for ([width, height, channels], bytes) in pages {
            let data = file.len() as u32;
            file.extend(bytes);
            let depths = file.len() as u32;
            let depth: u16 = if floats { 32 } else { 16 };
            (0..*channels).for_each(|_| file.extend(depth.to_le_bytes()));
            let formats = file.len() as u32;
            let kind: u16 = if floats { 3 } else { 1 };
            (0..*channels).for_each(|_| file.extend(kind.to_le_bytes()));
            let directory = file.len() as u32;
            file[next..next + 4].copy_from_slice(&directory.to_le_bytes());
            // Arrays of one or two shorts lie in the entry itself.
            let inline = |at: u32, value: u16| match channels {
                1 => u32::from(value),
                2 => u32::from(value) * 0x1_0001,
                _ => at,
            };
            let entries: [(u16, u16, u32, u32); 10] = [
                (256, 4, 1, *width),
                (257, 4, 1, *height),
                (258, 3, *channels, inline(depths, depth)),
                (259, 3, 1, 1),
                (262, 3, 1, 1),
                (273, 4, 1, data),
                (277, 3, 1, *channels),
                (278, 4, 1, *height),
                (279, 4, 1, bytes.len() as u32),
                (339, 3, *channels, inline(formats, kind)),
            ];
            file.extend((entries.len() as u16).to_le_bytes());
            for (tag, kind, count, value) in entries {
                file.extend([tag, kind].map(u16::to_le_bytes).concat());
                file.extend([count, value].map(u32::to_le_bytes).concat());
            }
            next = file.len();
            file.extend([0; 4]);
        }
        file
    }

    fn shorts(values: &[u16]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn npy(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut file = b"\x93NUMPY\x01\0".to_vec();
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }

    fn reading(channels: usize, bits: usize) -> Reading {
        Reading { format: Format { channels, bits }, ..Reading::default() }
    }

    fn read(bytes: &[u8], reading: &Reading) -> std::result::Result<Vec<u8>, String> {
        let mut image = Image::default();
        decode(Path::new("a"), bytes, reading, &mut image).map_err(|e| e.to_string())?;
        assert_eq!(size(Path::new("a"), bytes, reading).unwrap(), [image.width, image.height]);
        assert_eq!(image.format, reading.format);
        Ok(image.pixels)
    }

    #[test]
    fn samples_keep_their_channels_and_bits() {
        let four = tiff(&[([2, 1, 4], shorts(&[1, 2, 3, 4, 50_000, 6, 7, 65_535]))], false);
        let as_is = shorts(&[1, 2, 3, 4, 50_000, 6, 7, 65_535]);
        assert_eq!(read(&four, &reading(4, 16)).unwrap(), as_is);
        let range = Some([0.0, 4095.0]);
        let stretched = read(&four, &Reading { range, ..reading(4, 16) }).unwrap();
        assert_eq!(stretched, shorts(&[16, 32, 48, 64, 65_535, 96, 112, 65_535]));
        let array = npy("<u2", "(1, 2, 4)", &as_is);
        let axes = |axes, channels| Reading { axes: Some(axes), ..reading(channels, 16) };
        assert_eq!(read(&array, &axes(Axes::Hwc, 4)).unwrap(), as_is);
        // Two rows of four columns in one channel, column by channel.
        assert_eq!(
            read(&npy("<u2", "(4, 2, 1)", &as_is), &axes(Axes::Chw, 4)).unwrap(),
            shorts(&[1, 3, 50_000, 7, 2, 4, 6, 65_535])
        );
        let eight = npy("|u1", "(1, 2)", &[7, 255]);
        assert_eq!(read(&eight, &axes(Axes::Hw, 1)).unwrap(), shorts(&[7 * 257, 65_535]));
        let one = Reading { axes: Some(Axes::Hw), ..reading(1, 8) };
        assert_eq!(read(&eight, &one).unwrap(), [7, 255]);
        let floats: Vec<u8> = [0.5f32, -1.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let floats = tiff(&[([2, 1, 1], floats)], true);
        let range = Some([-1.0, 1.0]);
        let mapped = read(&floats, &Reading { range, ..reading(1, 16) }).unwrap();
        assert_eq!(mapped, shorts(&[49_151, 0]));
    }

    #[test]
    fn pages_are_channels_or_images_as_asked() {
        let page = |v: u16| ([1, 1, 1], shorts(&[v]));
        let file = tiff(&[page(5), page(6)], false);
        let said = read(&file, &reading(2, 16)).unwrap_err();
        assert!(said.contains("has several pages: set data.pages=\"channels\""), "{said}");
        let channels = Reading { pages: Some(Pages::Channels), ..reading(2, 16) };
        assert_eq!(read(&file, &channels).unwrap(), shorts(&[5, 6]));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.tif"), &file).unwrap();
        std::fs::write(folder.path().join("b.tif"), tiff(&[page(7)], false)).unwrap();
        let each = Reading { pages: Some(Pages::Images), ..reading(1, 16) };
        let set = crate::data::Folder::open_as(folder.path(), &each).unwrap();
        use crate::data::Source;
        let values: Vec<Vec<u8>> = (0..set.len())
            .map(|i| {
                let mut image = Image::default();
                set.read(i, &mut image).unwrap();
                image.pixels
            })
            .collect();
        assert_eq!(values, [5, 6, 7].map(|v| shorts(&[v])));
        assert!(set.name(1).ends_with("a.tif[1]") && set.name(2).ends_with("b.tif"));
        let found = native(&folder.path().join("a.tif"), None).unwrap();
        assert_eq!((found.channels, found.bits, found.pages), (1, 16, 2));
    }

    #[test]
    fn what_would_have_to_be_guessed_is_refused_by_name() {
        let four = tiff(&[([1, 1, 4], shorts(&[1, 2, 3, 4]))], false);
        let nan = [f32::NAN, 1.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let nan = tiff(&[([2, 1, 1], nan)], true);
        let array = npy("<u2", "(1, 1)", &[1, 0]);
        let with = |axes| Reading { axes: Some(axes), ..reading(1, 16) };
        let range = Some([0.0, 1.0]);
        let mut bomb = four.clone();
        let at = bomb.windows(4).position(|w| w == [0, 1, 4, 0]).unwrap();
        bomb[at + 8..at + 12].copy_from_slice(&u32::MAX.to_le_bytes());
        for (bytes, reading, expected) in [
            (&four, reading(3, 8), "a: has 4 channels, and data.channels is 3"),
            (&four, reading(4, 8), "has samples of 16 bits: set data.bits=16"),
            (&nan, reading(1, 16), "has floats: set data.bits=16 and data.range="),
            (&nan, Reading { range, ..reading(1, 16) }, "has 1 samples that are not finite"),
            (&array, reading(1, 16), "say with data.axes what its axes are"),
            (&array, with(Axes::Hwc), "is an array [1, 1], and data.axes is \"hwc\""),
            (&npy("<u2", "(9000, 9000)", &[0; 4]), with(Axes::Hw), "that ends early: it has"),
            (&npy("<f8", "(1, 1)", &[0; 8]), with(Axes::Hw), "is an array of <f8, and uint8"),
            (&four[..60].to_vec(), reading(4, 16), "TIFF file"),
            (&bomb, reading(4, 16), "pixels; the limit is"),
        ] {
            let said = read(bytes, &reading).unwrap_err();
            assert!(said.contains(expected), "expected `{expected}` in `{said}`");
        }
        assert!(reading(0, 8).check().is_err() && reading(3, 32).check().is_err());
        assert!(Reading { range, ..reading(3, 8) }.check().is_err());
    }
}

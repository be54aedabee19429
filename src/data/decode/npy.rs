//! NumPy arrays (`.npy`, numpy.lib.format versions 1 to 3) as images, in C order, of `u1`, `u2` and `f4`.

use std::io::{Read, Seek, SeekFrom};

use super::check_size;
use super::samples::{Axes, MOST_CHANNELS, Native, Samples, Values};

type Found<T> = std::result::Result<T, String>;

/// The longest header that is read.
const HEADER_LIMIT: usize = 1 << 16;

/// Whether a file begins as an array does.
pub fn is(start: &[u8]) -> bool {
    start.starts_with(b"\x93NUMPY")
}

/// The type of an array's elements.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    U8,
    U16 { big: bool },
    F32 { big: bool },
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 { .. } => 2,
            Self::F32 { .. } => 4,
        }
    }
}

/// An array whose header is read.
struct Array {
    kind: Kind,
    /// Sizes of images, rows, columns and channels.
    images: usize,
    size: [usize; 2],
    channels: usize,
    /// Whether channels come before rows.
    planes: bool,
    /// Offset of the first element.
    data: u64,
}

fn cut(e: std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "is an array that ends early".into(),
        _ => format!("cannot be read: {e}"),
    }
}

/// The text behind a key of the header, which is a literal of Python.
fn entry<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = header.split_once(&format!("'{key}':"))?;
    Some(rest.trim_start())
}

impl Array {
    fn open<R: Read + Seek>(file: &mut R, axes: Option<Axes>) -> Found<Self> {
        let axes = axes.ok_or("is an array of NumPy: say with data.axes what its axes are (hw, hwc, chw, nhw, nhwc, nchw)")?;
        let mut start = [0; 10];
        file.read_exact(&mut start).map_err(cut)?;
        let (length, begin) = match start[6] {
            1 => (usize::from(u16::from_le_bytes([start[8], start[9]])), 10),
            2 | 3 => {
                let mut more = [0; 2];
                file.read_exact(&mut more).map_err(cut)?;
                let length = u32::from_le_bytes([start[8], start[9], more[0], more[1]]);
                (length as usize, 12)
            }
            version => {
                return Err(format!("is an array of NumPy's format {version}, which is not read"));
            }
        };
        if length > HEADER_LIMIT {
            return Err(format!("is an array with a header of {length} bytes"));
        }
        let mut header = vec![0; length];
        file.read_exact(&mut header).map_err(cut)?;
        let header = String::from_utf8_lossy(&header).replace('"', "'");
        let damaged = || "is an array of NumPy with a damaged header".to_owned();
        if !entry(&header, "fortran_order").ok_or_else(damaged)?.starts_with("False") {
            return Err(
                "is an array in Fortran's order: save it with numpy.ascontiguousarray".into()
            );
        }
        let text = entry(&header, "descr").and_then(|text| text.strip_prefix('\''));
        let (kind, _) = text.and_then(|text| text.split_once('\'')).ok_or_else(damaged)?;
        let kind = match kind {
            "|u1" | "<u1" | ">u1" | "=u1" | "u1" => Kind::U8,
            "<u2" => Kind::U16 { big: false },
            ">u2" => Kind::U16 { big: true },
            "<f4" => Kind::F32 { big: false },
            ">f4" => Kind::F32 { big: true },
            other => {
                return Err(format!(
                    "is an array of {other}, and uint8, uint16 and float32 are read"
                ));
            }
        };
        let text = entry(&header, "shape").and_then(|text| text.strip_prefix('('));
        let (shape, _) = text.and_then(|text| text.split_once(')')).ok_or_else(damaged)?;
        let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
        let shape: Vec<usize> =
            sides.map(|side| side.parse().map_err(|_| damaged())).collect::<Found<_>>()?;
        let letters = axes.letters();
        if shape.len() != letters.len() {
            return Err(format!("is an array {shape:?}, and data.axes is \"{letters}\""));
        }
        let side = |letter| letters.find(letter).map_or(1, |at| shape[at]);
        let (images, channels, size) = (side('n'), side('c'), [side('w'), side('h')]);
        check_size(size[0], size[1])?;
        if images == 0 || !(1..=MOST_CHANNELS).contains(&channels) {
            return Err(format!(
                "is an array {shape:?} of {images} images of {channels} channels; the most channels are {MOST_CHANNELS}"
            ));
        }
        let array = Self {
            kind,
            images,
            size,
            channels,
            planes: letters.contains("ch"),
            data: (begin + length) as u64,
        };
        // Before memory is taken for what a header announces.
        let there = file.seek(SeekFrom::End(0)).map_err(cut)?;
        let needed = (array.image_bytes() as u64).checked_mul(images as u64);
        if needed.and_then(|needed| needed.checked_add(array.data)).is_none_or(|end| end > there) {
            return Err(format!("is an array {shape:?} that ends early: it has {there} bytes"));
        }
        Ok(array)
    }

    fn image_bytes(&self) -> usize {
        self.size[0] * self.size[1] * self.channels * self.kind.bytes()
    }
}

/// What a file holds.
pub fn look<R: Read + Seek>(mut file: R, axes: Option<Axes>) -> Found<Native> {
    let array = Array::open(&mut file, axes)?;
    let (channels, bits) = (array.channels, 8 * array.kind.bytes());
    Ok(Native { channels, bits, alpha: false, pages: array.images })
}

/// Width and height of an image.
pub fn size<R: Read + Seek>(mut file: R, axes: Option<Axes>) -> Found<[usize; 2]> {
    Array::open(&mut file, axes).map(|array| array.size)
}

/// Reads image `index`.
pub fn read<R: Read + Seek>(mut file: R, index: usize, axes: Option<Axes>) -> Found<Samples> {
    let array = Array::open(&mut file, axes)?;
    if index >= array.images {
        return Err(format!("has {} images, and image {index} is wanted", array.images));
    }
    let length = array.image_bytes();
    file.seek(SeekFrom::Start(array.data + index as u64 * length as u64)).map_err(cut)?;
    let mut bytes = Vec::new();
    if bytes.try_reserve_exact(length).is_err() {
        return Err(format!("needs {length} bytes of memory, which are not to be had"));
    }
    bytes.resize(length, 0);
    file.read_exact(&mut bytes).map_err(cut)?;
    let (pixels, channels) = (array.size[0] * array.size[1], array.channels);
    // Of each sample of a pixel in turn, its place in the array.
    let place = |i: usize| if array.planes { i % channels * pixels + i / channels } else { i };
    let all = 0..pixels * channels;
    let values = match array.kind {
        Kind::U8 => Values::U8(all.map(|i| bytes[place(i)]).collect()),
        Kind::U16 { big } => {
            let number = if big { u16::from_be_bytes } else { u16::from_le_bytes };
            let chunks = bytes.as_chunks::<2>().0;
            Values::U16(all.map(|i| number(chunks[place(i)])).collect())
        }
        Kind::F32 { big } => {
            let number = if big { f32::from_be_bytes } else { f32::from_le_bytes };
            let chunks = bytes.as_chunks::<4>().0;
            Values::F32(all.map(|i| number(chunks[place(i)])).collect())
        }
    };
    Ok(Samples { size: array.size, channels, alpha: false, premultiplied: false, values })
}

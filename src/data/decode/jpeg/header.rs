//! The markers of a JPEG file: frame, tables and scans.

use super::fault::{Fault, Result};
use super::huffman::Definition;

/// From the order of the file, which is a zigzag, to row-major order.
pub const NATURAL: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// The most blocks of 8 x 8 that an interleaved scan may have in a unit (Section B.2.3 of the standard).
const BLOCKS_IN_UNIT: usize = 10;

/// A colour component of a frame.
#[derive(Clone, Debug)]
pub struct Component {
    pub id: u8,
    /// Sampling factors: blocks in a unit, across and down.
    pub factors: [usize; 2],
    /// Which quantization table.
    pub quant: usize,
    /// Samples across and down.
    pub size: [usize; 2],
    /// Blocks across and down that hold samples.
    pub blocks: [usize; 2],
    /// Blocks across and down in complete units.
    pub padded: [usize; 2],
}

/// How a file's image is laid out.
#[derive(Clone, Debug)]
pub struct Frame {
    pub progressive: bool,
    pub width: usize,
    pub height: usize,
    pub components: Vec<Component>,
    /// The largest sampling factors.
    pub factors: [usize; 2],
    /// Interleaved units across and down.
    pub units: [usize; 2],
}

/// A scan: some components, and which coefficients and bits of them.
#[derive(Clone, Debug)]
pub struct Scan {
    /// Index of a component, its DC and its AC table.
    pub parts: Vec<(usize, usize, usize)>,
    /// The first and the last coefficient.
    pub band: [usize; 2],
    /// The lowest bit that earlier scans gave; 0 if none did.
    pub high: u32,
    /// The lowest bit that this scan gives.
    pub low: u32,
}

/// How the components are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Grey,
    YCbCr,
    Rgb,
    Cmyk,
    Ycck,
}

/// Reads a file from marker to marker.
pub struct Reader<'a> {
    pub bytes: &'a [u8],
    pub at: usize,
    pub frame: Frame,
    /// In row-major order.
    pub quant: [Option<[u16; 64]>; 4],
    pub dc: [Option<Definition>; 4],
    pub ac: [Option<Definition>; 4],
    /// Units between two restart markers; 0 if there are none.
    pub restart: usize,
    jfif: bool,
    /// The colour transform that Adobe's marker names.
    adobe: Option<u8>,
}

impl<'a> Reader<'a> {
    /// Reads up to the frame's header.
    ///
    /// # Errors
    /// If the file is damaged or of a kind that is not supported.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let [dc, ac] = [const { [const { None }; 4] }; 2];
        let frame = Frame {
            progressive: false,
            width: 0,
            height: 0,
            components: Vec::new(),
            factors: [1; 2],
            units: [0; 2],
        };
        let at = 2;
        let (quant, restart, jfif, adobe) = ([None; 4], 0, false, None);
        let mut reader = Self { bytes, at, frame, quant, dc, ac, restart, jfif, adobe };
        loop {
            match reader.marker()? {
                0xDA => return Err(Fault::damaged("a scan comes before the frame")),
                0xD9 => return Err(Fault::damaged("there is no image in it")),
                code if is_frame(code) => {
                    let segment = reader.segment()?;
                    reader.frame = read_frame(code, segment)?;
                    return Ok(reader);
                }
                code => reader.other(code)?,
            }
        }
    }

    /// Reads up to the data of the next scan; `None` at the end of the image, however often it is asked.
    ///
    /// # Errors
    /// If the file ends or is damaged.
    pub fn next_scan(&mut self) -> Result<Option<Scan>> {
        loop {
            match self.marker()? {
                0xD9 => {
                    self.at -= 2;
                    return Ok(None);
                }
                0xDA => {
                    let segment = self.segment()?;
                    return self.read_scan(segment).map(Some);
                }
                code if is_frame(code) => return Err(Fault::damaged("it has a second frame")),
                code => self.other(code)?,
            }
        }
    }

    /// How the components are to be read, by libjpeg's rules.
    pub fn colour(&self) -> Result<Colour> {
        let ids: Vec<u8> = self.frame.components.iter().map(|c| c.id).collect();
        Ok(match (ids.len(), self.adobe) {
            (1, _) => Colour::Grey,
            (3, _) if self.jfif => Colour::YCbCr,
            (3, Some(0)) => Colour::Rgb,
            (3, None) if ids == *b"RGB" => Colour::Rgb,
            (3, _) => Colour::YCbCr,
            (4, None | Some(0)) => Colour::Cmyk,
            (4, _) => Colour::Ycck,
            _ => return Err(Fault::Unsupported(COMPONENTS)),
        })
    }

    /// The code of the next marker. Other bytes before it are skipped, as libjpeg does.
    fn marker(&mut self) -> Result<u8> {
        loop {
            let rest = self.bytes.get(self.at..).ok_or(Fault::EndsEarly)?;
            let to_mark = rest.iter().position(|&b| b == 0xFF).ok_or(Fault::EndsEarly)?;
            let fill = rest[to_mark..].iter().position(|&b| b != 0xFF).ok_or(Fault::EndsEarly)?;
            self.at += to_mark + fill + 1;
            match rest[to_mark + fill] {
                // Stuffed data, restart markers and a marker for temporary use: nothing follows them.
                0 | 1 | 0xD0..=0xD7 => {}
                code => return Ok(code),
            }
        }
    }

    /// The contents of the marker's segment.
    fn segment(&mut self) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).ok_or(Fault::EndsEarly)?;
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk().ok_or(Fault::EndsEarly)?));
        if length < 2 {
            return Err(Fault::damaged("a segment has an impossible length"));
        }
        self.at += length;
        rest.get(2..length).ok_or(Fault::EndsEarly)
    }

    /// A segment that is neither frame nor scan.
    fn other(&mut self, code: u8) -> Result<()> {
        if code == 0xD8 {
            return Err(Fault::damaged("a second image begins inside it"));
        }
        let segment = self.segment()?;
        match code {
            0xC4 => self.read_huffman(segment)?,
            0xDB => self.read_quant(segment)?,
            0xDD => {
                let interval = segment.try_into().map_err(|_| wrong_length("restart"))?;
                self.restart = usize::from(u16::from_be_bytes(interval));
            }
            0xE0 => self.jfif |= segment.starts_with(b"JFIF\0") && segment.len() >= 14,
            0xEE if segment.starts_with(b"Adobe") && segment.len() >= 12 => {
                self.adobe = Some(segment[11]);
            }
            _ => {}
        }
        Ok(())
    }

    fn read_huffman(&mut self, mut segment: &[u8]) -> Result<()> {
        while let Some((&class, rest)) = segment.split_first() {
            let short = || too_short("Huffman");
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or_else(short)?;
            let total = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest.split_at_checked(total).ok_or_else(short)?;
            if total > 256 {
                return Err(Fault::damaged("a Huffman table has more than 256 codes"));
            }
            let tables = if class & 0x10 == 0 { &mut self.dc } else { &mut self.ac };
            let table = tables.get_mut(usize::from(class & 0xEF));
            let table = table.ok_or_else(|| Fault::damaged("a Huffman table beyond the fourth"))?;
            *table = Some(Definition::new(*counts, symbols));
            segment = rest;
        }
        Ok(())
    }

    fn read_quant(&mut self, mut segment: &[u8]) -> Result<()> {
        while let Some((&class, rest)) = segment.split_first() {
            let bytes = if class >> 4 == 0 { 1 } else { 2 };
            let (values, rest) =
                rest.split_at_checked(64 * bytes).ok_or_else(|| too_short("quantization"))?;
            let mut table = [0; 64];
            for (value, place) in values.chunks_exact(bytes).zip(NATURAL) {
                table[usize::from(place)] =
                    value.iter().fold(0, |sum, &byte| sum << 8 | u16::from(byte));
            }
            *self.quant.get_mut(usize::from(class & 15)).ok_or_else(no_quant)? = Some(table);
            segment = rest;
        }
        Ok(())
    }

    fn read_scan(&self, segment: &[u8]) -> Result<Scan> {
        let short = || too_short("scan");
        let (&count, rest) = segment.split_first().ok_or_else(short)?;
        let (named, rest) = rest.split_at_checked(2 * usize::from(count)).ok_or_else(short)?;
        let &[first, last, bits] = rest else { return Err(wrong_length("scan")) };
        let mut parts: Vec<(usize, usize, usize)> = Vec::new();
        for pair in named.chunks_exact(2) {
            let index = self.frame.components.iter().position(|c| c.id == pair[0]);
            let index = index.ok_or_else(|| Fault::damaged("a scan names an unknown component"))?;
            if parts.iter().any(|part| part.0 == index) {
                return Err(Fault::damaged("a scan names a component twice"));
            }
            parts.push((index, usize::from(pair[1] >> 4), usize::from(pair[1] & 15)));
        }
        let blocks = |part: &(usize, usize, usize)| -> usize {
            self.frame.components[part.0].factors.iter().product()
        };
        if parts.is_empty() {
            return Err(Fault::damaged("a scan has no components"));
        }
        if parts.len() > 1 && parts.iter().map(blocks).sum::<usize>() > BLOCKS_IN_UNIT {
            return Err(Fault::damaged("a scan has more than ten blocks in a unit"));
        }
        // A sequential scan has all coefficients and bits; libjpeg only warns of others.
        let (band, high, low) = if self.frame.progressive {
            let (high, low) = (u32::from(bits >> 4), u32::from(bits & 15));
            let band = [usize::from(first), usize::from(last)];
            let sound = match band {
                [0, last] => last == 0,
                [first, last] => first <= last && last < 64 && parts.len() == 1,
            };
            if !sound || low > 13 || (high != 0 && low + 1 != high) {
                return Err(Fault::damaged("a progressive scan has impossible parameters"));
            }
            (band, high, low)
        } else {
            ([0, 63], 0, 0)
        };
        Ok(Scan { parts, band, high, low })
    }
}

/// True if a marker begins a frame, or is reserved for one; [`read_frame`] refuses those that are not supported.
fn is_frame(code: u8) -> bool {
    matches!(code, 0xC0..=0xCF) && !matches!(code, 0xC4 | 0xCC)
}

fn read_frame(code: u8, segment: &[u8]) -> Result<Frame> {
    let short = || too_short("frame");
    let (&[precision, h1, h0, w1, w0, count], rest) =
        segment.split_first_chunk::<6>().ok_or_else(short)?;
    let (height, width) = (u16::from_be_bytes([h1, h0]), u16::from_be_bytes([w1, w0]));
    match code {
        0xC0..=0xC2 => {}
        0xC3 => return Err(Fault::Unsupported(LOSSLESS)),
        0xC9 | 0xCA => return Err(Fault::Unsupported(ARITHMETIC)),
        _ => return Err(Fault::Unsupported(HIERARCHICAL)),
    }
    match precision {
        8 => {}
        12 => return Err(Fault::Unsupported(DEEP)),
        _ => return Err(Fault::damaged(format!("it claims {precision} bits per sample"))),
    }
    if height == 0 && width != 0 {
        return Err(Fault::Unsupported(NO_HEIGHT));
    }
    if !matches!(count, 1 | 3 | 4) {
        return Err(Fault::Unsupported(COMPONENTS));
    }
    let named = rest;
    if named.len() != 3 * usize::from(count) {
        return Err(wrong_length("frame"));
    }
    let mut components: Vec<Component> = Vec::new();
    let mut largest = [1, 1];
    for part in named.chunks_exact(3) {
        let factors = [usize::from(part[1] >> 4), usize::from(part[1] & 15)];
        if factors.iter().any(|factor| !(1..=4).contains(factor)) {
            return Err(Fault::damaged("a component has an impossible sampling factor"));
        }
        if components.iter().any(|c| c.id == part[0]) {
            return Err(Fault::damaged("two components have the same name"));
        }
        largest = [0, 1].map(|i| largest[i].max(factors[i]));
        let (id, quant) = (part[0], usize::from(part[2]));
        let nothing = [0; 2];
        components.push(Component {
            id,
            factors,
            quant,
            size: nothing,
            blocks: nothing,
            padded: nothing,
        });
    }
    let image = [usize::from(width), usize::from(height)];
    let units = [0, 1].map(|i| image[i].div_ceil(8 * largest[i]));
    for component in &mut components {
        let factors = component.factors;
        if largest[0] % factors[0] != 0 || largest[1] % factors[1] != 0 {
            return Err(Fault::Unsupported(FRACTIONAL));
        }
        component.size = [0, 1].map(|i| (image[i] * factors[i]).div_ceil(largest[i]));
        component.blocks = component.size.map(|samples| samples.div_ceil(8));
        component.padded = [0, 1].map(|i| units[i] * factors[i]);
    }
    let progressive = code == 0xC2;
    Ok(Frame {
        progressive,
        width: image[0],
        height: image[1],
        components,
        factors: largest,
        units,
    })
}

const ARITHMETIC: &str =
    "with arithmetic coding, which is not supported: convert it with `jpegtran IN > OUT`";
const LOSSLESS: &str =
    "of the lossless kind, which is not supported: convert it to baseline JPEG or PNG";
const HIERARCHICAL: &str =
    "of the hierarchical kind, which is not supported: convert it to baseline JPEG or PNG";
const DEEP: &str =
    "with 12 bits per sample, which is not supported: convert it to 8 bits, or to PNG";
const NO_HEIGHT: &str =
    "that gives its height after the image, which is not supported: convert it to baseline JPEG";
const FRACTIONAL: &str = "with sampling factors that do not divide each other, which is not supported: convert it to 4:4:4";
const COMPONENTS: &str =
    "with a number of components other than 1, 3 or 4: convert it to a grey or colour image";

fn too_short(what: &str) -> Fault {
    Fault::damaged(format!("a {what} segment is too short"))
}

fn wrong_length(what: &str) -> Fault {
    Fault::damaged(format!("a {what} segment has a wrong length"))
}

pub fn no_quant() -> Fault {
    Fault::damaged("it lacks a quantization table")
}

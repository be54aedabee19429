//! Baseline and progressive JPEG to RGB: the pixels of libjpeg-turbo, and so of Pillow and torchvision, to the bit.
//!
//! Reads Huffman-coded files of 8 bits with 1, 3 or 4 components, sampling factors that divide each other, and any scans
//! and restart markers. Other kinds (arithmetic coding, 12 bits, lossless, hierarchical) are named and refused, and so
//! are files that lack data: an image is right or an error. Bytes after the image are ignored.
//!
//! A decoder of our own, because none in Rust gave these pixels (`benches/results/2026-11-28-jpeg.md`). Its arithmetic
//! follows libjpeg-turbo, which is based in part on the work of the Independent JPEG Group.

mod bits;
mod fault;
mod header;
mod huffman;
mod idct;
mod output;
mod scan;

use std::cell::RefCell;

use bits::ScanData;
pub use fault::Fault;
use fault::Result;
use header::{Reader, Scan, no_quant};
use huffman::Table;
use scan::{Part, Plane};

/// Memory that a thread keeps from image to image, in bytes: enough for photos of 2 megapixels.
const KEPT: usize = 8 << 20;

/// The most scans that are read of a progressive file, which bounds the time that a hostile file takes: encoders write about ten.
const SCAN_LIMIT: usize = 1000;

/// Marks a coefficient that no scan has given yet.
const UNKNOWN: u32 = u32::MAX;

/// Buffers that a thread uses again, because fresh memory for each image costs page faults.
#[derive(Default)]
struct Scratch {
    data: ScanData,
    planes: Vec<Plane>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A file whose headers are read.
pub struct Decoder<'a> {
    reader: Reader<'a>,
}

impl<'a> Decoder<'a> {
    /// Reads the headers of a file that begins with the marker of a JPEG file.
    ///
    /// # Errors
    /// If the file is damaged or of a kind that is not supported.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        Ok(Self { reader: Reader::new(bytes)? })
    }

    /// Width and height.
    pub fn size(&self) -> [usize; 2] {
        [self.reader.frame.width, self.reader.frame.height]
    }

    /// Whether it has one component.
    pub fn is_grey(&self) -> bool {
        self.reader.frame.components.len() == 1
    }

    /// Decodes the image into `[height, width, 3]` values.
    ///
    /// # Errors
    /// If the file is damaged or ends early.
    pub fn decode(mut self, pixels: &mut Vec<u8>) -> Result<()> {
        self.check_length()?;
        let mut scratch = SCRATCH.take();
        let decoded = self.decode_with(&mut scratch, pixels);
        if scratch.planes.iter().map(|plane| plane.samples.len()).sum::<usize>() <= KEPT {
            SCRATCH.set(scratch);
        }
        decoded
    }

    fn decode_with(&mut self, scratch: &mut Scratch, pixels: &mut Vec<u8>) -> Result<()> {
        if self.reader.frame.progressive {
            self.progressive(scratch)?;
        } else {
            self.sequential(scratch)?;
        }
        // Pillow also refuses a file without its end marker: what was cut may have been more than the marker. A further scan
        // would change the image, or belongs to another one.
        if self.reader.next_scan()?.is_some() {
            return Err(Fault::damaged("it has a scan after its image is complete"));
        }
        let frame = &self.reader.frame;
        pixels.resize(3 * frame.width * frame.height, 0);
        output::to_rgb(frame, self.reader.colour()?, &scratch.planes, pixels);
        Ok(())
    }

    /// Refuses, before memory is taken, a file that is too short for the size it claims: a code has a bit at least, and
    /// a block a code in a progressive file, two in a sequential one.
    fn check_length(&self) -> Result<()> {
        let frame = &self.reader.frame;
        let blocks: usize = frame.components.iter().map(|c| c.blocks[0] * c.blocks[1]).sum();
        let codes = if frame.progressive { blocks } else { 2 * blocks };
        if codes / 8 > self.reader.bytes.len() { Err(Fault::EndsEarly) } else { Ok(()) }
    }

    /// Gives each component a plane, whose samples are unspecified.
    fn lay_out(&self, planes: &mut Vec<Plane>) {
        let components = &self.reader.frame.components;
        planes.resize_with(components.len(), Plane::default);
        for (plane, component) in planes.iter_mut().zip(components) {
            plane.stride = 8 * component.padded[0];
            plane.samples.resize(plane.stride * 8 * component.padded[1], 0);
        }
    }

    /// Fills the planes from a sequential file.
    fn sequential(&mut self, Scratch { data, planes }: &mut Scratch) -> Result<()> {
        self.lay_out(planes);
        let mut missing = vec![true; planes.len()];
        while missing.contains(&true) {
            let scan = self
                .reader
                .next_scan()?
                .ok_or_else(|| Fault::damaged("it lacks the scan of a colour component"))?;
            if scan.parts.iter().any(|part| !missing[part.0]) {
                return Err(Fault::damaged("two scans have the same colour component"));
            }
            self.reader.at = data.read(self.reader.bytes, self.reader.at);
            let tables = self.tables(&scan)?;
            let parts = self.parts(&scan, &tables)?;
            let reader = &self.reader;
            scan::sequential(&reader.frame, &parts, reader.restart, data, planes)?;
            scan.parts.iter().for_each(|part| missing[part.0] = false);
        }
        Ok(())
    }

    /// Fills the planes from a progressive file.
    fn progressive(&mut self, Scratch { data, planes }: &mut Scratch) -> Result<()> {
        let components = &self.reader.frame.components;
        let blocks = |c: &header::Component| vec![[0i16; 64]; c.padded[0] * c.padded[1]];
        let mut coefficients: Vec<_> = components.iter().map(blocks).collect();
        // For each component and coefficient, the lowest bit known so far; and the quantization tables at its first scan.
        let mut known = vec![[UNKNOWN; 64]; components.len()];
        let mut quants = vec![None; components.len()];
        for count in 0.. {
            if known.iter().flatten().all(|&bit| bit == 0) {
                break;
            }
            if count == SCAN_LIMIT {
                return Err(Fault::damaged(format!("it has more than {SCAN_LIMIT} scans")));
            }
            let Some(scan) = self.reader.next_scan()? else { break };
            self.reader.at = data.read(self.reader.bytes, self.reader.at);
            let tables = self.tables(&scan)?;
            let parts = self.parts(&scan, &tables)?;
            let reader = &self.reader;
            scan::progressive(
                &reader.frame,
                &scan,
                &parts,
                reader.restart,
                data,
                &mut coefficients,
            )?;
            for part in &parts {
                known[part.component][scan.band[0]..=scan.band[1]].fill(scan.low);
                quants[part.component].get_or_insert(part.quant);
            }
        }
        // libjpeg smooths blocks whose first coefficients are incomplete, and takes others for 0.
        if known.iter().any(|bits| bits[..10].iter().any(|&bit| bit != 0)) {
            return Err(Fault::Unsupported("without its last scans: copy or download it again"));
        }
        self.lay_out(planes);
        for ((plane, quant), coefficients) in planes.iter_mut().zip(&quants).zip(&coefficients) {
            scan::samples(coefficients, quant.as_ref().ok_or_else(no_quant)?, plane);
        }
        Ok(())
    }

    /// The Huffman tables that a scan names: DC and AC of each part, where they are defined.
    fn tables(&self, scan: &Scan) -> Result<Vec<[Option<Table>; 2]>> {
        let reader = &self.reader;
        // As in libjpeg, a sequential file may leave out the standard's tables, a progressive one may not.
        let standard = (!reader.frame.progressive).then(huffman::standard);
        let build = |definitions: &[Option<huffman::Definition>; 4], index: usize, dc: bool| {
            let left_out = standard.as_ref().and_then(|all| all[usize::from(!dc)].get(index));
            let definition = definitions.get(index).and_then(Option::as_ref).or(left_out);
            definition.map(|definition| Table::new(definition, dc)).transpose()
        };
        let [first, last] = scan.band;
        scan.parts
            .iter()
            .map(|&(_, dc, ac)| {
                let dc =
                    if first == 0 && scan.high == 0 { build(&reader.dc, dc, true)? } else { None };
                let ac = if last > 0 { build(&reader.ac, ac, false)? } else { None };
                Ok([dc, ac])
            })
            .collect()
    }

    fn parts<'t>(&self, scan: &Scan, tables: &'t [[Option<Table>; 2]]) -> Result<Vec<Part<'t>>> {
        let reader = &self.reader;
        let part =
            |(&(component, _, _), tables): (&(usize, usize, usize), &'t [Option<Table>; 2])| {
                let quant = reader.quant.get(reader.frame.components[component].quant);
                let quant = quant.and_then(Option::as_ref).ok_or_else(no_quant)?;
                let [dc, ac] = [tables[0].as_ref(), tables[1].as_ref()];
                Ok(Part { component, dc, ac, quant: quant.map(i32::from) })
            };
        scan.parts.iter().zip(tables).map(part).collect()
    }
}

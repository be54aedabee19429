//! Scans: from entropy-coded data to coefficients, and on to samples.

use multiversion::multiversion;

use super::bits::{Bits, ScanData, Segment};
use super::fault::{Fault, Result};
use super::header::{Frame, NATURAL, Scan};
use super::huffman::Table;
use super::idct::{idct, idct_of_mean};

/// The samples of a component, in complete units.
#[derive(Default)]
pub struct Plane {
    pub samples: Vec<u8>,
    /// Samples from a row to the next.
    pub stride: usize,
}

/// A component that takes part in a scan, and how it is decoded.
pub struct Part<'a> {
    /// Index of the component.
    pub component: usize,
    pub dc: Option<&'a Table>,
    pub ac: Option<&'a Table>,
    /// Row-major quantization table.
    pub quant: [i32; 64],
}

/// Which blocks the units of a scan are made of.
struct Layout {
    /// Units across and down.
    units: [usize; 2],
    /// For each part, blocks across and down in a unit.
    blocks: Vec<[usize; 2]>,
}

impl Layout {
    /// A scan of one component has a block in a unit, and only those that hold samples.
    fn new(frame: &Frame, parts: &[Part]) -> Self {
        let component = |part: &Part| &frame.components[part.component];
        match parts {
            [only] => Self { units: component(only).blocks, blocks: vec![[1, 1]] },
            _ => Self {
                units: frame.units,
                blocks: parts.iter().map(|part| component(part).factors).collect(),
            },
        }
    }
}

/// Follows the restart markers of a scan.
struct Restarts<'a> {
    data: &'a ScanData,
    /// Units between two markers; 0 if there are none.
    interval: usize,
    /// Index of the segment that is read.
    segment: usize,
    /// Units left in it.
    left: usize,
}

impl<'a> Restarts<'a> {
    fn new(data: &'a ScanData, interval: usize) -> (Self, Bits<'a>) {
        let left = if interval == 0 { usize::MAX } else { interval };
        (Self { data, interval, segment: 0, left }, data.bits(data.segments[0]))
    }

    /// Counts a unit; at a restart, a reader for what follows.
    #[inline(always)]
    fn before_unit(&mut self, bits: &Bits) -> Result<Option<Bits<'a>>> {
        if self.left > 0 {
            self.left -= 1;
            return Ok(None);
        }
        self.restart(bits.overrun()).map(Some)
    }

    #[cold]
    #[inline(never)]
    fn restart(&mut self, overrun: bool) -> Result<Bits<'a>> {
        if overrun {
            return Err(Fault::EndsEarly);
        }
        let wanted = (self.segment & 7) as u8;
        self.segment += 1;
        self.left = self.interval - 1;
        match self.data.segments.get(self.segment) {
            Some(&next @ Segment { restart, .. }) if restart == Some(wanted) => {
                Ok(self.data.bits(next))
            }
            Some(_) => Err(Fault::damaged("restart markers are out of order")),
            None => Err(Fault::EndsEarly),
        }
    }
}

/// That nothing was read beyond the data.
#[inline(always)]
fn check(bits: &Bits) -> Result<()> {
    if bits.overrun() { Err(Fault::EndsEarly) } else { Ok(()) }
}

/// A table that a scan needs.
fn needed(table: Option<&Table>) -> Result<&Table> {
    table.ok_or_else(|| Fault::damaged("it lacks a Huffman table"))
}

/// Decodes a scan of a sequential file to samples.
///
/// # Errors
/// If the data end early or are damaged.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
pub fn sequential(
    frame: &Frame,
    parts: &[Part],
    restart: usize,
    data: &ScanData,
    planes: &mut [Plane],
) -> Result<()> {
    let layout = Layout::new(frame, parts);
    let (mut restarts, mut bits) = Restarts::new(data, restart);
    let tables = parts
        .iter()
        .map(|part| Ok((needed(part.dc)?, needed(part.ac)?)))
        .collect::<Result<Vec<_>>>()?;
    let mut means = [0i32; 4];
    let mut block = [0i16; 64];
    for y in 0..layout.units[1] {
        for x in 0..layout.units[0] {
            if let Some(next) = restarts.before_unit(&bits)? {
                (bits, means) = (next, [0; 4]);
            }
            for (i, part) in parts.iter().enumerate() {
                let [across, down] = layout.blocks[i];
                let (dc, ac) = tables[i];
                let plane = &mut planes[part.component];
                let stride = plane.stride;
                for row in 0..down {
                    for column in 0..across {
                        let last = sequential_block(&mut bits, dc, ac, &mut means[i], &mut block);
                        let Ok(last) = last else {
                            return check(&bits).and(last.map(|_| ()));
                        };
                        let at = (y * down + row) * 8 * stride + (x * across + column) * 8;
                        let into = &mut plane.samples[at..];
                        if last == 0 {
                            idct_of_mean(block[0], part.quant[0], into, stride);
                        } else {
                            idct(&block, &part.quant, into, stride);
                            block = [0; 64];
                        }
                    }
                }
            }
        }
        check(&bits)?;
    }
    Ok(())
}

/// Decodes a block into coefficients that are 0 but for the first, and returns the position of the last in the file's
/// order.
#[inline(always)]
fn sequential_block(
    bits: &mut Bits,
    dc: &Table,
    ac: &Table,
    mean: &mut i32,
    block: &mut [i16; 64],
) -> Result<usize> {
    bits.refill();
    let symbol = dc.next(bits)?;
    *mean = mean.wrapping_add(symbol.value(bits));
    block[0] = *mean as i16;
    let mut at = 0;
    while at < 63 {
        bits.refill_if_low();
        let symbol = ac.next(bits)?;
        let value = symbol.value(bits);
        if value != 0 {
            at += symbol.run() + 1;
            let place = NATURAL.get(at).ok_or_else(beyond)?;
            block[usize::from(*place & 63)] = value as i16;
        } else if symbol.run() == 15 {
            at += 16;
        } else {
            break;
        }
    }
    Ok(at)
}

#[cold]
fn beyond() -> Fault {
    Fault::damaged("a block has more than 64 coefficients")
}

/// Adds a scan of a progressive file to coefficients, which are row-major by block; blocks are in rows of `padded`.
///
/// # Errors
/// If the data end early or are damaged.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
pub fn progressive(
    frame: &Frame,
    scan: &Scan,
    parts: &[Part],
    restart: usize,
    data: &ScanData,
    coefficients: &mut [Vec<[i16; 64]>],
) -> Result<()> {
    let layout = Layout::new(frame, parts);
    let (mut restarts, mut bits) = Restarts::new(data, restart);
    let mut means = [0i32; 4];
    let mut empty = 0u32;
    let (first, refines) = (scan.band[0] == 0, scan.high != 0);
    // A refinement of the first coefficients has no codes.
    let tables = parts
        .iter()
        .map(|part| {
            if !first {
                needed(part.ac).map(Some)
            } else if refines {
                Ok(None)
            } else {
                needed(part.dc).map(Some)
            }
        })
        .collect::<Result<Vec<_>>>()?;
    for y in 0..layout.units[1] {
        for x in 0..layout.units[0] {
            if let Some(next) = restarts.before_unit(&bits)? {
                (bits, means, empty) = (next, [0; 4], 0);
            }
            for (i, part) in parts.iter().enumerate() {
                let [across, down] = layout.blocks[i];
                let padded = frame.components[part.component].padded[0];
                for row in 0..down {
                    for column in 0..across {
                        let at = (y * down + row) * padded + x * across + column;
                        let block = &mut coefficients[part.component][at];
                        let done = match tables[i] {
                            None => {
                                bits.refill_if_low();
                                block[0] |= (bits.take(1) << scan.low) as i16;
                                Ok(())
                            }
                            Some(dc) if first => {
                                bits.refill_if_low();
                                dc.next(&mut bits).map(|symbol| {
                                    means[i] = means[i].wrapping_add(symbol.value(&mut bits));
                                    block[0] = (means[i] << scan.low) as i16;
                                })
                            }
                            Some(ac) if refines => {
                                refine_band(&mut bits, ac, scan, &mut empty, block)
                            }
                            Some(ac) => first_of_band(&mut bits, ac, scan, &mut empty, block),
                        };
                        if done.is_err() {
                            return check(&bits).and(done);
                        }
                    }
                }
            }
        }
        check(&bits)?;
    }
    Ok(())
}

/// The first bits of coefficients after the mean.
#[inline(always)]
fn first_of_band(
    bits: &mut Bits,
    ac: &Table,
    scan: &Scan,
    empty: &mut u32,
    block: &mut [i16; 64],
) -> Result<()> {
    if *empty > 0 {
        *empty -= 1;
        return Ok(());
    }
    let [mut at, last] = scan.band;
    while at <= last {
        bits.refill_if_low();
        let symbol = ac.next(bits)?;
        let (run, value) = (symbol.run(), symbol.value(bits));
        if value != 0 {
            at += run;
            let place = NATURAL.get(at).ok_or_else(beyond)?;
            block[usize::from(*place & 63)] = (value << scan.low) as i16;
            at += 1;
        } else if run == 15 {
            at += 16;
        } else {
            *empty = run_of_empty(bits, run) - 1;
            break;
        }
    }
    Ok(())
}

/// The length of a run of empty blocks, this one included.
#[inline(always)]
fn run_of_empty(bits: &mut Bits, exponent: usize) -> u32 {
    let exponent = exponent as u32;
    1 << exponent | if exponent > 0 { bits.take(exponent) } else { 0 }
}

/// A further bit of coefficients after the mean: of those that have bits already, and new ones.
#[inline(always)]
fn refine_band(
    bits: &mut Bits,
    ac: &Table,
    scan: &Scan,
    empty: &mut u32,
    block: &mut [i16; 64],
) -> Result<()> {
    let [mut at, last] = scan.band;
    let bit = 1i16 << scan.low;
    if *empty == 0 {
        while at <= last {
            bits.refill_if_low();
            let symbol = ac.next(bits)?;
            let (mut run, value) = (symbol.run(), symbol.value(bits));
            if value == 0 && run != 15 {
                *empty = run_of_empty(bits, run);
                break;
            }
            if value.abs() > 1 {
                return Err(Fault::damaged("a refinement adds more than a bit"));
            }
            // Past coefficients that have bits, and `run` that stay 0.
            while at <= last {
                let coefficient = &mut block[usize::from(NATURAL[at] & 63)];
                if *coefficient != 0 {
                    refine(bits, bit, coefficient);
                } else if run == 0 {
                    *coefficient = value as i16 * bit;
                    break;
                } else {
                    run -= 1;
                }
                at += 1;
            }
            if at > last && value != 0 {
                return Err(beyond());
            }
            at += 1;
        }
    }
    if *empty > 0 {
        for place in NATURAL.iter().take(last + 1).skip(at) {
            let coefficient = &mut block[usize::from(*place & 63)];
            if *coefficient != 0 {
                refine(bits, bit, coefficient);
            }
        }
        *empty -= 1;
    }
    Ok(())
}

/// Reads whether a coefficient's absolute value grows by `bit`.
#[inline(always)]
fn refine(bits: &mut Bits, bit: i16, coefficient: &mut i16) {
    bits.refill_if_low();
    if bits.take(1) == 1 && *coefficient & bit == 0 {
        *coefficient = coefficient.wrapping_add(if *coefficient >= 0 { bit } else { -bit });
    }
}

/// The samples of a progressive file's component.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
pub fn samples(coefficients: &[[i16; 64]], quant: &[i32; 64], plane: &mut Plane) {
    let stride = plane.stride;
    let blocks = stride / 8;
    for (row, line) in coefficients.chunks_exact(blocks).enumerate() {
        for (column, block) in line.iter().enumerate() {
            let into = &mut plane.samples[row * 8 * stride + column * 8..];
            if block[1..].iter().all(|&c| c == 0) {
                idct_of_mean(block[0], quant[0], into, stride);
            } else {
                idct(block, quant, into, stride);
            }
        }
    }
}

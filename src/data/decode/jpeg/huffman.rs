//! Huffman tables of JPEG files, as a table look-up over the next bits.

use super::bits::Bits;
use super::fault::{Fault, Result};

/// Bits that the fast look-up covers: longer codes, under one in a hundred, take the slow path.
const FAST_BITS: u32 = 10;

/// A table as a file defines it: how many codes there are of each length, and the symbols in order of their codes.
#[derive(Clone)]
pub struct Definition {
    counts: [u8; 16],
    symbols: Vec<u8>,
}

impl Definition {
    /// `symbols` are as many as `counts` says.
    pub fn new(counts: [u8; 16], symbols: &[u8]) -> Self {
        Self { counts, symbols: symbols.to_vec() }
    }
}

/// A decoded symbol: a number of zero coefficients, then a coefficient of a number of bits.
#[derive(Clone, Copy)]
pub struct Symbol(u32);

impl Symbol {
    /// Packs the bits consumed by the look-up (8 bits), the run (4), the size (4) and the value (16).
    fn new(consumed: u32, run: u32, size: u32, value: i32) -> Self {
        Self(consumed | run << 8 | size << 12 | (value as u32) << 16)
    }

    /// Zero coefficients before this one; in a progressive scan also the exponent of a run of empty blocks.
    #[inline(always)]
    pub fn run(self) -> usize {
        (self.0 >> 8 & 15) as usize
    }

    /// The coefficient, or 0 if the symbol codes none. Reads its bits if the look-up did not cover them: the reader
    /// must hold 15 more.
    #[inline(always)]
    pub fn value(self, bits: &mut Bits) -> i32 {
        let size = self.0 >> 12 & 15;
        if size == 0 { self.0 as i32 >> 16 } else { extend(bits.take(size), size) }
    }
}

/// The signed value of `size` raw bits (Figure F.12 of the standard).
#[inline(always)]
fn extend(raw: u32, size: u32) -> i32 {
    let raw = raw as i32;
    if raw < 1 << (size - 1) { raw - (1 << size) + 1 } else { raw }
}

/// A table ready to decode with.
pub struct Table {
    /// By the next [`FAST_BITS`] bits; no bits consumed marks a longer code.
    fast: [Symbol; 1 << FAST_BITS],
    /// For each length, the first 16-bit prefix that is beyond its codes.
    beyond: [u32; 17],
    /// For each length, what to add to a code to get its symbol's index.
    offset: [i32; 17],
    symbols: [u8; 256],
}

impl Table {
    /// # Errors
    /// If the lengths describe no Huffman code, or a DC table has sizes beyond 15 bits.
    pub fn new(from: &Definition, dc: bool) -> Result<Self> {
        let mut table = Table {
            fast: [Symbol(0); 1 << FAST_BITS],
            beyond: [0; 17],
            offset: [0; 17],
            symbols: [0; 256],
        };
        let bad = || Fault::damaged("a Huffman table is no Huffman code");
        table.symbols.get_mut(..from.symbols.len()).ok_or_else(bad)?.copy_from_slice(&from.symbols);
        if dc && from.symbols.iter().any(|&size| size > 15) {
            return Err(bad());
        }
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = u32::from(from.counts[length as usize - 1]);
            table.offset[length as usize] = index as i32 - code as i32;
            for symbol in from.symbols.iter().skip(index).take(count as usize) {
                if length <= FAST_BITS {
                    table.fill(code, length, *symbol);
                }
                code += 1;
            }
            index += count as usize;
            // A code of ones alone is not allowed; libjpeg refuses it as well.
            if code >= 1 << length && count > 0 {
                return Err(bad());
            }
            table.beyond[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(table)
    }

    /// Enters a code that is short enough for the fast look-up, with its value where that fits as well.
    fn fill(&mut self, code: u32, length: u32, symbol: u8) {
        let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        let spare = FAST_BITS - length;
        let first = (code << spare) as usize;
        for rest in 0..1u32 << spare {
            let entry = if size == 0 {
                Symbol::new(length, run, 0, 0)
            } else if size <= spare {
                Symbol::new(length + size, run, 0, extend(rest >> (spare - size), size))
            } else {
                Symbol::new(length, run, size, 0)
            };
            if let Some(place) = self.fast.get_mut(first + rest as usize) {
                *place = entry;
            }
        }
    }

    /// The next symbol. The reader must hold 16 bits.
    ///
    /// # Errors
    /// If the bits are no code of the table.
    #[inline(always)]
    pub fn next(&self, bits: &mut Bits) -> Result<Symbol> {
        let symbol = self.fast[bits.peek(FAST_BITS) as usize];
        let consumed = symbol.0 & 0xFF;
        if consumed == 0 {
            let (symbol, length) = self
                .long(bits.peek(16))
                .ok_or_else(|| Fault::damaged("an invalid Huffman code"))?;
            bits.skip(length);
            return Ok(symbol);
        }
        bits.skip(consumed);
        Ok(symbol)
    }

    /// The symbol whose code begins the next 16 bits and is too long for the fast look-up, and its length.
    #[cold]
    #[inline(never)]
    fn long(&self, ahead: u32) -> Option<(Symbol, u32)> {
        let mut lengths = FAST_BITS + 1..=16;
        let length = lengths.find(|&length| ahead < self.beyond[length as usize])?;
        let index = (ahead >> (16 - length)) as i32 + self.offset[length as usize];
        let symbol = u32::from(*self.symbols.get(usize::try_from(index).ok()?)?);
        Some((Symbol::new(0, symbol >> 4, symbol & 15, 0), length))
    }
}

/// The tables of Annex K of the standard, which frames of Motion JPEG leave out: DC and AC, each for luma and chroma.
pub fn standard() -> [[Definition; 2]; 2] {
    let sizes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
    let dc = [
        [0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ];
    let ac = [
        ([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 0x7D], &AC_LUMA),
        ([0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 0x77], &AC_CHROMA),
    ];
    [
        dc.map(|counts| Definition::new(counts, &sizes)),
        ac.map(|(counts, symbols)| Definition::new(counts, symbols)),
    ]
}

/// Table K.5 of the standard.
const AC_LUMA: [u8; 162] = [
    0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07,
    0x22, 0x71, 0x14, 0x32, 0x81, 0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0,
    0x24, 0x33, 0x62, 0x72, 0x82, 0x09, 0x0A, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x25, 0x26, 0x27, 0x28,
    0x29, 0x2A, 0x34, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49,
    0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69,
    0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89,
    0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7,
    0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3, 0xC4, 0xC5,
    0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2,
    0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8,
    0xF9, 0xFA,
];

/// Table K.6 of the standard.
const AC_CHROMA: [u8; 162] = [
    0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71,
    0x13, 0x22, 0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xA1, 0xB1, 0xC1, 0x09, 0x23, 0x33, 0x52, 0xF0,
    0x15, 0x62, 0x72, 0xD1, 0x0A, 0x16, 0x24, 0x34, 0xE1, 0x25, 0xF1, 0x17, 0x18, 0x19, 0x1A, 0x26,
    0x27, 0x28, 0x29, 0x2A, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
    0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68,
    0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87,
    0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3, 0xA4, 0xA5,
    0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
    0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA,
    0xE2, 0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8,
    0xF9, 0xFA,
];

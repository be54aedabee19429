//! The entropy-coded data of a scan: stuffed bytes removed, cut at restart markers, read bit by bit.

/// Zeros after the data, so that what an overrun reads does not depend on an earlier image.
const ZEROS: usize = 16;

/// The data of a scan between two markers.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Where it begins in [`ScanData::bytes`].
    start: usize,
    /// Where it ends.
    end: usize,
    /// The number of the restart marker before it; `None` for the first.
    pub restart: Option<u8>,
}

/// The data of a scan without stuffed bytes and markers.
#[derive(Default)]
pub struct ScanData {
    bytes: Vec<u8>,
    pub segments: Vec<Segment>,
}

impl ScanData {
    /// Reads the data that begins at `at`, up to a marker other than a restart marker or to the end of the file, and
    /// returns the position of what follows.
    pub fn read(&mut self, file: &[u8], mut at: usize) -> usize {
        self.segments.clear();
        // The longest it can get, and zeros after it, which an overrun reads.
        let most = file.len() - at.min(file.len()) + ZEROS;
        if self.bytes.len() < most {
            self.bytes.resize(most, 0);
        }
        let (mut start, mut end, mut restart) = (0, 0, None);
        loop {
            let plain = before_marker(&file[at.min(file.len())..]);
            self.bytes[end..end + plain].copy_from_slice(&file[at..at + plain]);
            at += plain;
            end += plain;
            match file.get(at..at + 2) {
                Some([_, 0]) => {
                    self.bytes[end] = 0xFF;
                    end += 1;
                    at += 2;
                }
                // A marker may be preceded by any number of these.
                Some([_, 0xFF]) => at += 1,
                Some([_, code @ 0xD0..=0xD7]) => {
                    self.segments.push(Segment { start, end, restart });
                    restart = Some(code - 0xD0);
                    start = end;
                    at += 2;
                }
                _ => break,
            }
        }
        self.segments.push(Segment { start, end, restart });
        self.bytes[end..end + ZEROS].fill(0);
        at
    }

    /// A reader at the beginning of a segment.
    pub fn bits(&self, segment: Segment) -> Bits<'_> {
        Bits { bytes: &self.bytes, at: segment.start, end: segment.end, buffer: 0, held: 0 }
    }
}

/// How many bytes there are before the first 0xFF.
fn before_marker(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(word) = bytes[at..].first_chunk::<8>() {
        // The lowest byte of 0xFF is the lowest byte of 0 in the complement; higher ones may be false.
        let inverse = !u64::from_le_bytes(*word);
        let found = inverse.wrapping_sub(0x0101_0101_0101_0101) & !inverse & 0x8080_8080_8080_8080;
        if found != 0 {
            return at + (found.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    at + bytes[at..].iter().position(|&byte| byte == 0xFF).unwrap_or(bytes.len() - at)
}

/// The next eight bytes where there are fewer, with zeros for those that are missing.
#[cold]
#[inline(never)]
fn word_at_end(bytes: &[u8], at: usize) -> u64 {
    let rest = bytes.get(at..).unwrap_or_default();
    rest.iter().zip(0u32..).fold(0, |word, (&byte, i)| word | u64::from(byte) << (56 - 8 * i))
}

/// Reads a segment bit by bit. Beyond its end bits are arbitrary and [`Bits::overrun`] holds.
pub struct Bits<'a> {
    bytes: &'a [u8],
    /// The next byte to load.
    at: usize,
    end: usize,
    /// The next bits, from the highest on.
    buffer: u64,
    /// How many of them have been counted as loaded; the bits below them are those of the next byte, or 0.
    held: u32,
}

impl Bits<'_> {
    /// Loads bits until at least 56 are held.
    ///
    /// No call that is not inlined gets the reader's address, here and in [`super::huffman`]: it would no longer live in
    /// registers.
    #[inline(always)]
    pub fn refill(&mut self) {
        let word = match self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<8>()) {
            Some(word) => u64::from_be_bytes(*word),
            None => word_at_end(self.bytes, self.at),
        };
        self.buffer |= word >> self.held;
        self.at += ((63 - self.held) >> 3) as usize;
        self.held |= 56;
    }

    /// Loads bits if fewer than 32 are held, which is enough for a code and its value.
    #[inline(always)]
    pub fn refill_if_low(&mut self) {
        if self.held < 32 {
            self.refill();
        }
    }

    /// The next `count` bits, 1 to 16.
    #[inline(always)]
    pub fn peek(&self, count: u32) -> u32 {
        (self.buffer >> (64 - count)) as u32
    }

    #[inline(always)]
    pub fn skip(&mut self, count: u32) {
        self.buffer <<= count;
        self.held -= count;
    }

    /// Reads `count` bits, 1 to 16, which must be held.
    #[inline(always)]
    pub fn take(&mut self, count: u32) -> u32 {
        let taken = self.peek(count);
        self.skip(count);
        taken
    }

    /// True if more bits were read than the segment has.
    #[inline(always)]
    pub fn overrun(&self) -> bool {
        8 * self.at > 8 * self.end + self.held as usize
    }
}

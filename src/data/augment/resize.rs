//! Resamples a part of an image, across and then down.
//!
//! An output pixel at `x` looks at the input around `(x + 1/2) * in / out` through a filter whose support is
//! widened by the scale when shrinking (antialiasing); weights outside the input are left out and the rest
//! normalised. In 8 bits this is Pillow's `ImagingResample` to the bit: weights rounded to 22 bits after the
//! point, values rounded to 8 bits between the passes (python-pillow/Pillow, src/libImaging/Resample.c). Compared
//! with Pillow 11.3, which always goes across first; Pillow 13 sometimes goes down first, and then differs by a
//! level (bilinear) or a few (bicubic, on noise). The input ends at the crop's border, as after `Image.crop`.

use std::ops::Range;

use multiversion::multiversion;

use super::params::CropBox;
use super::policy::Filter;
use crate::data::source::{Format, Image};

/// Bits after the point of a weight: 32, less 8 for the value and 2 for the sign and a sum above 1.
const PRECISION: u32 = 32 - 8 - 2;

/// A resampling: the part of the image, the target, and the filter.
pub struct Resize {
    /// The part of the image.
    pub crop: CropBox,
    /// Width and height of the target, of which only a square is made.
    pub target: [usize; 2],
    /// First column and row of that square in the target.
    pub first: [usize; 2],
    /// Side of the square.
    pub size: usize,
    /// The filter.
    pub filter: Filter,
    /// Whether shrinking widens the filter.
    pub antialias: bool,
    /// Whether the result is mirrored.
    pub flip: bool,
}

/// Buffers of a resize, used again and again.
#[derive(Debug, Default)]
pub struct Buffers {
    across: Weights,
    down: Weights,
    line: Vec<[u8; 4]>,
    rows: Vec<[u8; 4]>,
    sums: Vec<i32>,
    line_float: Vec<[f32; 4]>,
    rows_float: Vec<[f32; 4]>,
}

/// For each output pixel of an axis, the first input pixel and the same number of weights from there on, some of which may
/// be zero.
#[derive(Debug, Default)]
struct Weights {
    /// Weights per output pixel.
    taps: usize,
    first: Vec<usize>,
    exact: Vec<f64>,
    fixed: Vec<i32>,
    float: Vec<f32>,
}

impl Weights {
    fn set(
        &mut self,
        input: usize,
        output: usize,
        wanted: Range<usize>,
        filter: Filter,
        antialias: bool,
    ) {
        let scale = input as f64 / output as f64;
        let stretch = if antialias { scale.max(1.0) } else { 1.0 };
        let support = stretch * if filter == Filter::Bilinear { 1.0 } else { 2.0 };
        let span = |x: usize| {
            let center = (x as f64 + 0.5) * scale;
            // Truncation, as a C cast does; negative numbers end at zero.
            let from = (center - support + 0.5).max(0.0) as usize;
            (center, from, ((center + support + 0.5) as usize).min(input))
        };
        let taps = wanted.clone().map(&span).map(|(_, from, to)| to - from).max();
        self.taps = taps.unwrap_or(0);
        self.first.clear();
        self.exact.clear();
        for x in wanted {
            let (center, from, to) = span(x);
            // A shorter span, at the image's end, starts earlier: with zeros.
            let first = from.min(input - self.taps);
            let start = self.exact.len() + (from - first);
            self.exact.resize(start, 0.0);
            for i in from..to {
                self.exact.push(weight(filter, (i as f64 - center + 0.5) * (1.0 / stretch)));
            }
            let sum: f64 = self.exact[start..].iter().sum();
            if sum != 0.0 {
                self.exact[start..].iter_mut().for_each(|w| *w /= sum);
            }
            self.first.push(first);
            self.exact.resize(self.first.len() * self.taps, 0.0);
        }
    }

    fn round(&mut self) {
        let one = f64::from(1u32 << PRECISION);
        self.fixed.clear();
        self.fixed.extend(self.exact.iter().map(|w| (w * one + 0.5f64.copysign(*w)) as i32));
    }

    fn narrow(&mut self) {
        self.float.clear();
        self.float.extend(self.exact.iter().map(|&w| w as f32));
    }

    /// The input pixels that the output pixels look at.
    fn span(&self) -> Range<usize> {
        let first = self.first.iter().copied().min().unwrap_or(0);
        first..self.first.iter().copied().max().unwrap_or(0) + self.taps
    }

    /// First input pixel and weights of each output pixel.
    fn each<'a, T>(&'a self, weights: &'a [T]) -> impl Iterator<Item = (usize, &'a [T])> {
        self.first.iter().copied().zip(weights.chunks_exact(self.taps))
    }
}

fn weight(filter: Filter, x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    match filter {
        Filter::Bilinear => (1.0 - x).max(0.0),
        Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        Filter::Bicubic => 0.0,
    }
}

/// Pixels of resampled rows that are in memory at a time: 16 MiB in 8 bits, 64 MiB in float.
const ROW_PIXELS: usize = 4 << 20;

/// Weights of an axis that are in memory at a time.
const WEIGHTS: usize = 1 << 20;

impl Resize {
    /// Resamples in 8 bits; `out` becomes `size * size` pixels, the fourth channel zero.
    ///
    /// Memory is bounded whatever the image's sides: output rows are made in blocks whose input rows fit a budget, and an
    /// output row that alone needs more sums up its input rows piece by piece.
    pub fn to_u8(&self, image: &Image, buffers: &mut Buffers, out: &mut Vec<[u8; 4]>) {
        let Buffers { across, down, line: pixels, rows, sums, .. } = buffers;
        let size = self.size;
        out.resize(size * size, [0; 4]);
        for block in self.blocks(1) {
            self.set(down, 1, block.clone());
            down.round();
            let out = &mut out[block.start * size..block.end * size];
            let span = down.span();
            let several = self.in_pieces(&span);
            if several {
                sums.clear();
                sums.resize(4 * size, HALF);
            }
            for piece in self.pieces(span.clone()) {
                rows.resize(piece.len() * size, [0; 4]);
                for columns in self.blocks(0) {
                    self.set(across, 0, columns.clone());
                    across.round();
                    let wanted = across.span();
                    pixels.resize(wanted.len(), [0; 4]);
                    let lines = self.lines(image, piece.clone(), &wanted);
                    for (row, line) in rows.chunks_exact_mut(size).zip(lines) {
                        for (pixel, &[r, g, b]) in pixels.iter_mut().zip(line.as_chunks::<3>().0) {
                            *pixel = [r, g, b, 0];
                        }
                        across_u8(pixels, wanted.start, across, &mut row[columns.clone()]);
                    }
                }
                if self.flip {
                    rows.chunks_exact_mut(size).for_each(<[_]>::reverse);
                }
                if several {
                    let weights = &down.fixed[piece.start - span.start..];
                    for (row, &weight) in rows.chunks_exact(size).zip(weights) {
                        for (sum, &value) in sums.iter_mut().zip(row.as_flattened()) {
                            *sum += i32::from(value) * weight;
                        }
                    }
                } else {
                    down_u8(
                        rows.as_flattened(),
                        span.start,
                        down,
                        out.as_flattened_mut(),
                        4 * size,
                    );
                }
            }
            if several {
                out.as_flattened_mut()
                    .iter_mut()
                    .zip(&*sums)
                    .for_each(|(to, &sum)| *to = to_8_bits(sum));
            }
        }
    }

    /// Resamples in float, values in `[0, 1]`, clipped; `out` becomes `size * size` pixels, the fourth channel zero. Memory is
    /// bounded as in [`Resize::to_u8`].
    pub fn to_float(&self, image: &Image, buffers: &mut Buffers, out: &mut Vec<[f32; 4]>) {
        self.to_float_from(image, 0, buffers, out);
    }

    /// As [`Resize::to_float`], of the three channels of an image of any format from channel `first` on; those beyond its last are
    /// zero.
    pub fn to_float_from(
        &self,
        image: &Image,
        first: usize,
        buffers: &mut Buffers,
        out: &mut Vec<[f32; 4]>,
    ) {
        let Buffers { across, down, line_float: pixels, rows_float: rows, .. } = buffers;
        let size = self.size;
        out.resize(size * size, [0.0; 4]);
        for block in self.blocks(1) {
            self.set(down, 1, block.clone());
            down.narrow();
            let out = &mut out[block.start * size..block.end * size];
            let span = down.span();
            let several = self.in_pieces(&span);
            if several {
                out.fill([0.0; 4]);
            }
            for piece in self.pieces(span.clone()) {
                rows.resize(piece.len() * size, [0.0; 4]);
                for columns in self.blocks(0) {
                    self.set(across, 0, columns.clone());
                    across.narrow();
                    let wanted = across.span();
                    pixels.resize(wanted.len(), [0.0; 4]);
                    let lines = self.lines(image, piece.clone(), &wanted);
                    for (row, line) in rows.chunks_exact_mut(size).zip(lines) {
                        to_units(image.format, first, line, pixels);
                        across_float(pixels, wanted.start, across, &mut row[columns.clone()]);
                    }
                }
                if self.flip {
                    rows.chunks_exact_mut(size).for_each(<[_]>::reverse);
                }
                if several {
                    let weights = &down.float[piece.start - span.start..];
                    for (row, &weight) in rows.chunks_exact(size).zip(weights) {
                        for (sum, &value) in
                            out.as_flattened_mut().iter_mut().zip(row.as_flattened())
                        {
                            *sum += value * weight;
                        }
                    }
                } else {
                    down_float(
                        rows.as_flattened(),
                        span.start,
                        down,
                        out.as_flattened_mut(),
                        4 * size,
                    );
                }
            }
            if several {
                out.as_flattened_mut().iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
            }
        }
    }

    /// Input and output length of an axis: 0 across, 1 down.
    fn lengths(&self, axis: usize) -> (usize, usize) {
        ([self.crop.width, self.crop.height][axis], self.target[axis])
    }

    /// Sets the weights of the wanted output pixels `block` of an axis.
    fn set(&self, weights: &mut Weights, axis: usize, block: Range<usize>) {
        let (input, output) = self.lengths(axis);
        let first = self.first[axis];
        weights.set(
            input,
            output,
            first + block.start..first + block.end,
            self.filter,
            self.antialias,
        );
    }

    /// The wanted output pixels of an axis in blocks: one block for images of ordinary sides.
    fn blocks(&self, axis: usize) -> impl Iterator<Item = Range<usize>> {
        let (input, output) = self.lengths(axis);
        let (size, scale) = (self.size, input as f64 / output as f64);
        // The widest filter looks two output pixels to either side.
        let taps = 4.0 * scale.max(1.0) + 2.0;
        let by_weights = (WEIGHTS as f64 / taps) as usize;
        let by_rows = if axis == 0 { size } else { (self.rows_at_once() as f64 / scale) as usize };
        let length = by_weights.min(by_rows.saturating_sub(4)).clamp(1, size);
        (0..size).step_by(length).map(move |from| from..(from + length).min(size))
    }

    /// Whether the input rows of a block need several pieces to fit the budget. A block's rows are estimated, so somewhat more
    /// than the budget is one piece: only an output row that alone needs more is summed up piece by piece.
    fn in_pieces(&self, rows: &Range<usize>) -> bool {
        rows.len() > 2 * self.rows_at_once()
    }

    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let most = if self.in_pieces(&rows) { self.rows_at_once() } else { rows.len().max(1) };
        rows.clone().step_by(most).map(move |from| from..(from + most).min(rows.end))
    }

    fn rows_at_once(&self) -> usize {
        (ROW_PIXELS / self.size).max(1)
    }

    /// The columns `columns` of the crop's rows `rows`.
    fn lines<'a>(
        &self,
        image: &'a Image,
        rows: Range<usize>,
        columns: &Range<usize>,
    ) -> impl Iterator<Item = &'a [u8]> {
        let (left, width) = (self.crop.left + columns.start, columns.len());
        let pixel = image.format.bytes();
        let lines = image.pixels.chunks_exact(image.width * pixel);
        let lines = lines.skip(self.crop.top + rows.start).take(rows.len());
        lines.map(move |row| &row[left * pixel..][..width * pixel])
    }
}

/// Three channels of a line's pixels, from `first` on, between 0 and 1; zeros beyond the last.
fn to_units(format: Format, first: usize, line: &[u8], pixels: &mut [[f32; 4]]) {
    if format == Format::RGB {
        for (pixel, &[r, g, b]) in pixels.iter_mut().zip(line.as_chunks::<3>().0) {
            *pixel = [r, g, b, 0].map(|v| f32::from(v) / 255.0);
        }
        return;
    }
    let count = (format.channels - first).min(3);
    let samples = line.chunks_exact(format.bytes());
    for (pixel, samples) in pixels.iter_mut().zip(samples) {
        *pixel = [0.0; 4];
        for (c, value) in pixel[..count].iter_mut().enumerate() {
            *value = match format.bits {
                8 => f32::from(samples[first + c]) / 255.0,
                _ => {
                    let at = 2 * (first + c);
                    f32::from(u16::from_le_bytes([samples[at], samples[at + 1]])) / 65535.0
                }
            };
        }
    }
}

/// Half a level: truncation then rounds.
const HALF: i32 = 1 << (PRECISION - 1);

#[inline(always)]
fn to_8_bits(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn across_u8(line: &[[u8; 4]], offset: usize, weights: &Weights, out: &mut [[u8; 4]]) {
    for (out, (from, weights)) in out.iter_mut().zip(weights.each(&weights.fixed)) {
        let mut sum = [HALF; 4];
        for (value, &weight) in line[from - offset..].iter().zip(weights) {
            for c in 0..4 {
                sum[c] += i32::from(value[c]) * weight;
            }
        }
        let [r, g, b, _] = sum.map(to_8_bits);
        *out = [r, g, b, 0];
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn across_float(line: &[[f32; 4]], offset: usize, weights: &Weights, out: &mut [[f32; 4]]) {
    for (out, (from, weights)) in out.iter_mut().zip(weights.each(&weights.float)) {
        let mut sum = [0.0; 4];
        for (value, &weight) in line[from - offset..].iter().zip(weights) {
            for c in 0..4 {
                sum[c] += value[c] * weight;
            }
        }
        *out = sum;
    }
}

/// Values of a row that are summed in registers at a time.
const BLOCK: usize = 32;

/// Sums rows of `width` values, of which the first is the crop's row `offset`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn down_u8(rows: &[u8], offset: usize, weights: &Weights, out: &mut [u8], width: usize) {
    for (out, (from, weights)) in out.chunks_exact_mut(width).zip(weights.each(&weights.fixed)) {
        let rows = &rows[(from - offset) * width..];
        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        for (i, out) in blocks.iter_mut().enumerate() {
            let mut sums = [HALF; BLOCK];
            for (t, &weight) in weights.iter().enumerate() {
                let row = rows[t * width + i * BLOCK..].first_chunk::<BLOCK>();
                for (sum, &value) in sums.iter_mut().zip(row.expect("as long as the output")) {
                    *sum += i32::from(value) * weight;
                }
            }
            *out = sums.map(to_8_bits);
        }
        let first = width - rest.len();
        for (i, out) in rest.iter_mut().enumerate() {
            let values = rows[first + i..].iter().step_by(width);
            let products = values.zip(weights).map(|(&value, weight)| i32::from(value) * weight);
            *out = to_8_bits(HALF + products.sum::<i32>());
        }
    }
}

/// Sums rows of `width` values, of which the first is the crop's row `offset`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn down_float(rows: &[f32], offset: usize, weights: &Weights, out: &mut [f32], width: usize) {
    for (out, (from, weights)) in out.chunks_exact_mut(width).zip(weights.each(&weights.float)) {
        out.fill(0.0);
        for (row, &weight) in rows[(from - offset) * width..].chunks_exact(width).zip(weights) {
            for (sum, &value) in out.iter_mut().zip(row) {
                *sum += value * weight;
            }
        }
        out.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(width: usize, height: usize) -> Image {
        Image {
            format: Format::RGB,
            width,
            height,
            pixels: (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect(),
        }
    }

    fn resize(crop: CropBox, size: usize) -> Resize {
        let (filter, antialias) = (Filter::Bilinear, true);
        Resize { crop, target: [size; 2], first: [0; 2], size, filter, antialias, flip: false }
    }

    #[test]
    fn bounded_memory_changes_no_bit() {
        // So tall or wide that rows or weights are made in blocks and in pieces.
        for (width, height, size, target, first) in [
            (1, 3_000_000, 3, [3, 3], [0, 0]),
            (2, 2_500_000, 2, [2, 1_000_000], [0, 400_000]),
            (3_000_000, 1, 3, [3, 3], [0, 0]),
            (1_000_000, 2, 2, [700_000, 2], [500_000, 0]),
        ] {
            let image = ramp(width, height);
            let crop = CropBox { left: 0, top: 0, width, height };
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let resize = Resize { target, first, filter, flip: true, ..resize(crop, size) };
                let (mut buffers, mut bytes, mut floats) =
                    (Buffers::default(), Vec::new(), Vec::new());
                resize.to_u8(&image, &mut buffers, &mut bytes);
                resize.to_float(&image, &mut buffers, &mut floats);
                let held = buffers.rows.capacity() + buffers.rows_float.capacity();
                assert!(held <= 8 * ROW_PIXELS, "{held} pixels");
                let (mut across, mut down) = (Weights::default(), Weights::default());
                resize.set(&mut across, 0, 0..size);
                resize.set(&mut down, 1, 0..size);
                let value = |x: usize, y: usize, c: usize| -> f64 {
                    let row = |t: usize| {
                        let line = &image.pixels[(down.first[y] + t) * width * 3..][..width * 3];
                        let taps = &across.exact[x * across.taps..][..across.taps];
                        taps.iter()
                            .enumerate()
                            .map(|(i, w)| w * f64::from(line[(across.first[x] + i) * 3 + c]))
                            .sum::<f64>()
                    };
                    let taps = &down.exact[y * down.taps..][..down.taps];
                    taps.iter().enumerate().map(|(t, w)| w * row(t)).sum()
                };
                for (x, y, c) in (0..size * size * 3).map(|i| (i / 3 % size, i / 3 / size, i % 3)) {
                    let (want, at) = (value(x, y, c).clamp(0.0, 255.0), y * size + size - 1 - x);
                    // Weights of 22 bits: over many taps their rounding is a level or more.
                    let far = (f64::from(bytes[at][c]) - want).abs();
                    let near = (f64::from(floats[at][c]) * 255.0 - want).abs();
                    assert!(near < 0.5, "{width} x {height}: {near} at {x}, {y}");
                    assert!(
                        far < 2.0 || across.taps.max(down.taps) > 100_000,
                        "{width} x {height}: {far} at {x}, {y}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_crop_of_the_right_size_is_copied_whatever_the_filter() {
        let image = ramp(9, 7);
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            let crop = CropBox { left: 2, top: 1, width: 5, height: 5 };
            let (mut buffers, mut bytes, mut floats) = (Buffers::default(), Vec::new(), Vec::new());
            let mut resize = Resize { filter, ..resize(crop, 5) };
            resize.to_u8(&image, &mut buffers, &mut bytes);
            let mut at = |x: usize, y: usize, flip: bool| {
                resize.flip = flip;
                resize.to_float(&image, &mut buffers, &mut floats);
                (
                    bytes[y * 5 + x],
                    floats[y * 5 + if flip { 4 - x } else { x }].map(|v| (v * 255.0).round() as u8),
                )
            };
            for (x, y) in [(0, 0), (4, 4), (3, 1)] {
                let i = ((y + 1) * 9 + x + 2) * 3;
                let expected = [image.pixels[i], image.pixels[i + 1], image.pixels[i + 2], 0];
                assert_eq!(at(x, y, false), (expected, expected));
                assert_eq!(at(x, y, true), (expected, expected));
            }
        }
    }

    #[test]
    fn shrinking_to_one_pixel_is_a_mean_under_the_triangle() {
        let image = Image {
            format: Format::RGB,
            width: 4,
            height: 1,
            pixels: [0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240].into(),
        };
        let crop = CropBox { left: 0, top: 0, width: 4, height: 1 };
        let mut out = Vec::new();
        resize(crop, 1).to_u8(&image, &mut Buffers::default(), &mut out);
        assert_eq!(out, [[120, 120, 120, 0]]);
    }

    #[test]
    fn both_arithmetics_agree_to_a_level() {
        // In the middle of the range: 8-bit values are clipped between the passes too.
        let mut image = ramp(23, 31);
        image.pixels.iter_mut().for_each(|v| *v = 80 + *v / 3);
        for (crop, size, filter, antialias) in [
            (CropBox { left: 3, top: 2, width: 17, height: 29 }, 8, Filter::Bilinear, true),
            (CropBox { left: 0, top: 0, width: 23, height: 31 }, 40, Filter::Bicubic, true),
            (CropBox { left: 5, top: 5, width: 1, height: 2 }, 16, Filter::Bicubic, false),
        ] {
            let (mut buffers, mut bytes, mut floats) = (Buffers::default(), Vec::new(), Vec::new());
            let resize = Resize { filter, antialias, ..resize(crop, size) };
            resize.to_u8(&image, &mut buffers, &mut bytes);
            resize.to_float(&image, &mut buffers, &mut floats);
            for (b, f) in bytes.as_flattened().iter().zip(floats.as_flattened()) {
                assert!((f32::from(*b) - f * 255.0).abs() < 2.0, "{b} and {}", f * 255.0);
            }
        }
    }
}

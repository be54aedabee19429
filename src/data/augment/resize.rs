//! Resampling a part of an image, across and then down.
//!
//! An output pixel at `x` looks at the input around `(x + 1/2) * in / out` through a filter whose support is
//! widened by the scale when shrinking (antialiasing); weights outside the input are left out and the rest
//! normalised. In 8 bits this is Pillow's `ImagingResample` to the bit: weights rounded to 22 bits after the
//! point, values rounded to 8 bits between the passes (python-pillow/Pillow, src/libImaging/Resample.c). Compared
//! with Pillow 11.3, which always goes across first; Pillow 13 sometimes goes down first, and then differs by a
//! level (bilinear) or a few (bicubic, on noise). The input ends at the crop's border, as after `Image.crop`.

use multiversion::multiversion;

use super::params::CropBox;
use super::policy::Filter;
use crate::data::source::Image;

/// Bits after the point of a weight: 32, less 8 for the value and 2 for the sign and a sum above 1.
const PRECISION: u32 = 32 - 8 - 2;

/// What to resample to what.
pub struct Resize {
    /// The part of the image.
    pub crop: CropBox,
    /// Width and height that the part would have as a whole.
    pub whole: [usize; 2],
    /// Of that, the first column and row that are wanted.
    pub first: [usize; 2],
    /// Side of the square that is wanted.
    pub size: usize,
    /// How.
    pub filter: Filter,
    /// Whether shrinking widens the filter.
    pub antialias: bool,
    /// Whether the result is mirrored.
    pub flip: bool,
}

/// Buffers of a resize.
#[derive(Debug, Default)]
pub struct Buffers {
    across: Weights,
    down: Weights,
    line: Vec<[u8; 4]>,
    rows: Vec<[u8; 4]>,
    line_float: Vec<[f32; 4]>,
    rows_float: Vec<[f32; 4]>,
}

/// For each output pixel of an axis, the first input pixel and the same number of weights from there on, the last of which
/// may be zero.
#[derive(Debug, Default)]
struct Weights {
    /// Weights of each output pixel.
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
        wanted: std::ops::Range<usize>,
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

impl Resize {
    /// Resamples in 8 bits; `out` takes `size * size` pixels, the fourth channel zero.
    pub fn to_u8(&self, image: &Image, buffers: &mut Buffers, out: &mut Vec<[u8; 4]>) {
        let Buffers { across, down, line: pixels, rows, .. } = buffers;
        self.weights(across, down);
        across.round();
        down.round();
        let size = self.size;
        rows.resize(self.crop.height * size, [0; 4]);
        pixels.resize(self.crop.width, [0; 4]);
        for (row, line) in rows.chunks_exact_mut(size).zip(self.lines(image)) {
            for (pixel, &[r, g, b]) in pixels.iter_mut().zip(line.as_chunks::<3>().0) {
                *pixel = [r, g, b, 0];
            }
            across_u8(pixels, across, row);
            if self.flip {
                row.reverse();
            }
        }
        out.resize(size * size, [0; 4]);
        down_u8(rows.as_flattened(), down, out.as_flattened_mut(), 4 * size);
    }

    /// Resamples in float, values in `[0, 1]`, clipped; `out` takes `size * size` pixels, the fourth channel zero.
    pub fn to_float(&self, image: &Image, buffers: &mut Buffers, out: &mut Vec<[f32; 4]>) {
        let Buffers { across, down, line_float: pixels, rows_float: rows, .. } = buffers;
        self.weights(across, down);
        across.narrow();
        down.narrow();
        let size = self.size;
        rows.resize(self.crop.height * size, [0.0; 4]);
        pixels.resize(self.crop.width, [0.0; 4]);
        for (row, line) in rows.chunks_exact_mut(size).zip(self.lines(image)) {
            for (pixel, &[r, g, b]) in pixels.iter_mut().zip(line.as_chunks::<3>().0) {
                *pixel = [r, g, b, 0].map(|v| f32::from(v) / 255.0);
            }
            across_float(pixels, across, row);
            if self.flip {
                row.reverse();
            }
        }
        out.resize(size * size, [0.0; 4]);
        down_float(rows.as_flattened(), down, out.as_flattened_mut(), 4 * size);
    }

    fn weights(&self, across: &mut Weights, down: &mut Weights) {
        let wanted = |axis: usize| self.first[axis]..self.first[axis] + self.size;
        across.set(self.crop.width, self.whole[0], wanted(0), self.filter, self.antialias);
        down.set(self.crop.height, self.whole[1], wanted(1), self.filter, self.antialias);
    }

    /// The crop's rows.
    fn lines<'a>(&self, image: &'a Image) -> impl Iterator<Item = &'a [u8]> {
        let crop = self.crop;
        let rows = image.pixels.chunks_exact(image.width * 3).skip(crop.top).take(crop.height);
        rows.map(move |row| &row[crop.left * 3..][..crop.width * 3])
    }
}

/// Half a level, so that what follows rounds.
const HALF: i32 = 1 << (PRECISION - 1);

#[inline(always)]
fn to_8_bits(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn across_u8(line: &[[u8; 4]], weights: &Weights, out: &mut [[u8; 4]]) {
    for (out, (from, weights)) in out.iter_mut().zip(weights.each(&weights.fixed)) {
        let mut sum = [HALF; 4];
        for (value, &weight) in line[from..].iter().zip(weights) {
            for c in 0..4 {
                sum[c] += i32::from(value[c]) * weight;
            }
        }
        let [r, g, b, _] = sum.map(to_8_bits);
        *out = [r, g, b, 0];
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn across_float(line: &[[f32; 4]], weights: &Weights, out: &mut [[f32; 4]]) {
    for (out, (from, weights)) in out.iter_mut().zip(weights.each(&weights.float)) {
        let mut sum = [0.0; 4];
        for (value, &weight) in line[from..].iter().zip(weights) {
            for c in 0..4 {
                sum[c] += value[c] * weight;
            }
        }
        *out = sum;
    }
}

/// Values of a row that are summed in registers.
const BLOCK: usize = 32;

/// Rows of `width` values.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn down_u8(rows: &[u8], weights: &Weights, out: &mut [u8], width: usize) {
    for (out, (from, weights)) in out.chunks_exact_mut(width).zip(weights.each(&weights.fixed)) {
        let rows = &rows[from * width..];
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

/// Rows of `width` values.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn down_float(rows: &[f32], weights: &Weights, out: &mut [f32], width: usize) {
    for (out, (from, weights)) in out.chunks_exact_mut(width).zip(weights.each(&weights.float)) {
        out.fill(0.0);
        for (row, &weight) in rows[from * width..].chunks_exact(width).zip(weights) {
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
            width,
            height,
            pixels: (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect(),
        }
    }

    fn resize(crop: CropBox, size: usize) -> Resize {
        let (filter, antialias) = (Filter::Bilinear, true);
        Resize { crop, whole: [size; 2], first: [0; 2], size, filter, antialias, flip: false }
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

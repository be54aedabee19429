//! Resampling a part of an image, across and then down.
//!
//! An output pixel at `x` looks at the input around `(x + 1/2) * in / out` through a filter whose support is
//! widened by the scale when shrinking (antialiasing); weights outside the input are left out and the rest
//! normalised. In 8 bits this is Pillow's `ImagingResample` to the bit: weights rounded to 22 bits after the
//! point, values rounded to 8 bits between the passes (python-pillow/Pillow, src/libImaging/Resample.c). Compared
//! with Pillow 11.3, which always goes across first; Pillow 13 sometimes goes down first, and then differs by a
//! level (bilinear) or a few (bicubic, on noise). The input ends at the crop's border, as after `Image.crop`.
//! Floor 5.

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
    rows: Vec<[u8; 4]>,
    sums: Vec<i32>,
    rows_float: Vec<[f32; 4]>,
}

/// For each output pixel of an axis, the first input pixel and one weight for each from there on.
#[derive(Debug, Default)]
struct Weights {
    /// First input pixel, and where its weights end in the lists below.
    spans: Vec<(usize, usize)>,
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
        self.spans.clear();
        self.exact.clear();
        let scale = input as f64 / output as f64;
        let stretch = if antialias { scale.max(1.0) } else { 1.0 };
        let support = stretch * if filter == Filter::Bilinear { 1.0 } else { 2.0 };
        for x in wanted {
            let center = (x as f64 + 0.5) * scale;
            // Truncation, as a C cast does; negative numbers end at zero.
            let from = (center - support + 0.5).max(0.0) as usize;
            let to = ((center + support + 0.5) as usize).min(input);
            let start = self.exact.len();
            for i in from..to {
                self.exact.push(weight(filter, (i as f64 - center + 0.5) * (1.0 / stretch)));
            }
            let sum: f64 = self.exact[start..].iter().sum();
            if sum != 0.0 {
                self.exact[start..].iter_mut().for_each(|w| *w /= sum);
            }
            self.spans.push((from, self.exact.len()));
        }
    }

    fn round(&mut self) {
        let one = f64::from(1u32 << PRECISION);
        // `round` takes halves away from zero, as Pillow's +-0.5 and truncation do.
        self.fixed.clear();
        self.fixed.extend(self.exact.iter().map(|w| (w * one).round() as i32));
    }

    fn narrow(&mut self) {
        self.float.clear();
        self.float.extend(self.exact.iter().map(|&w| w as f32));
    }

    /// First input pixel and weights of each output pixel.
    fn each<'a, T>(&'a self, weights: &'a [T]) -> impl Iterator<Item = (usize, &'a [T])> {
        let starts = std::iter::once(0).chain(self.spans.iter().map(|&(_, end)| end));
        self.spans.iter().zip(starts).map(|(&(from, end), start)| (from, &weights[start..end]))
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
        let Buffers { across, down, rows, sums, .. } = buffers;
        self.weights(across, down);
        across.round();
        down.round();
        let size = self.size;
        rows.resize(self.crop.height * size, [0; 4]);
        for (row, line) in rows.chunks_exact_mut(size).zip(self.lines(image)) {
            for (pixel, (from, weights)) in row.iter_mut().zip(across.each(&across.fixed)) {
                let mut sum = [1 << (PRECISION - 1); 3];
                for (value, &weight) in line[3 * from..].chunks_exact(3).zip(weights) {
                    for c in 0..3 {
                        sum[c] += i32::from(value[c]) * weight;
                    }
                }
                let [r, g, b] = sum.map(to_8_bits);
                *pixel = [r, g, b, 0];
            }
            if self.flip {
                row.reverse();
            }
        }
        out.resize(size * size, [0; 4]);
        sums.resize(size * 4, 0);
        for (out, (from, weights)) in out.chunks_exact_mut(size).zip(down.each(&down.fixed)) {
            sums.fill(1 << (PRECISION - 1));
            for (row, &weight) in rows[from * size..].chunks_exact(size).zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(row.as_flattened()) {
                    *sum += i32::from(value) * weight;
                }
            }
            for (value, &sum) in out.as_flattened_mut().iter_mut().zip(sums.iter()) {
                *value = to_8_bits(sum);
            }
        }
    }

    /// Resamples in float, values in `[0, 1]`, clipped; `out` takes `size * size` pixels, the fourth channel zero.
    pub fn to_float(&self, image: &Image, buffers: &mut Buffers, out: &mut Vec<[f32; 4]>) {
        let Buffers { across, down, rows_float: rows, .. } = buffers;
        self.weights(across, down);
        across.narrow();
        down.narrow();
        let size = self.size;
        rows.resize(self.crop.height * size, [0.0; 4]);
        for (row, line) in rows.chunks_exact_mut(size).zip(self.lines(image)) {
            for (pixel, (from, weights)) in row.iter_mut().zip(across.each(&across.float)) {
                let mut sum = [0.0; 4];
                for (value, &weight) in line[3 * from..].chunks_exact(3).zip(weights) {
                    for c in 0..3 {
                        sum[c] += f32::from(value[c]) / 255.0 * weight;
                    }
                }
                *pixel = sum;
            }
            if self.flip {
                row.reverse();
            }
        }
        out.resize(size * size, [0.0; 4]);
        for (out, (from, weights)) in out.chunks_exact_mut(size).zip(down.each(&down.float)) {
            let out = out.as_flattened_mut();
            out.fill(0.0);
            for (row, &weight) in rows[from * size..].chunks_exact(size).zip(weights) {
                for (sum, &value) in out.iter_mut().zip(row.as_flattened()) {
                    *sum += value * weight;
                }
            }
            out.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
        }
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

fn to_8_bits(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
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

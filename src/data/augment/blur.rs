//! The two blurs of the published methods.
//!
//! [`gaussian`] samples `exp(-x^2 / (2 sigma^2))` at `2 r + 1` integers, normalises, and convolves across and
//! down with zeros outside the image, so that borders darken (simclr:data_util.py `gaussian_blur`, padding SAME).
//! [`pillow`] is Pillow's `GaussianBlur`, to the bit: three box blurs of a fractional radius with borders
//! repeated, 8-bit in between (src/libImaging/BoxBlur.c; Gwosdek et al., 2011). Pixels have four channels, the
//! fourth zero.

use multiversion::multiversion;

use super::colour::clipped;

/// Buffers of a blur, used again and again.
#[derive(Debug, Default)]
pub struct Buffers {
    kernel: Vec<f32>,
    row: Vec<[f32; 4]>,
    floats: Vec<[f32; 4]>,
    bytes: Vec<[u8; 4]>,
    sums: Vec<u32>,
}

/// Radius in pixels of the sampled Gaussian for a crop: `int(size / 10 / 2)`, 11 at 224.
pub fn radius(size: usize) -> usize {
    size / 20
}

/// The sampled Gaussian's weights for a crop of `size` pixels, `2 radius(size) + 1` of them. `sigma > 0`, in pixels.
pub fn weights(size: usize, sigma: f32, into: &mut Vec<f32>) {
    let radius = radius(size);
    let first = into.len();
    into.extend((0..=2 * radius).map(|i| {
        let x = i as f32 - radius as f32;
        (-x * x / (2.0 * sigma * sigma)).exp()
    }));
    let sum: f32 = into[first..].iter().sum();
    into[first..].iter_mut().for_each(|w| *w /= sum);
}

/// Blurs a square of `size * size` pixels. `sigma > 0`, in pixels.
pub fn gaussian(pixels: &mut [[f32; 4]], size: usize, sigma: f32, buffers: &mut Buffers) {
    let Buffers { kernel, row: padded, floats: across, .. } = buffers;
    let radius = radius(size);
    kernel.clear();
    weights(size, sigma, kernel);
    // Zeros outside the image add nothing to a sum.
    let outside = radius * size;
    across.clear();
    across.resize(size * size + 2 * outside, [0.0; 4]);
    padded.clear();
    padded.resize(size + 2 * radius, [0.0; 4]);
    let rows = pixels.chunks_exact(size).zip(across[outside..].chunks_exact_mut(size));
    for (row, out) in rows {
        padded[radius..][..size].copy_from_slice(row);
        weighted(padded.as_flattened(), 4, kernel, out.as_flattened_mut());
    }
    for (row, out) in pixels.chunks_exact_mut(size).enumerate() {
        let rows = &across[row * size..][..(2 * radius + 1) * size];
        weighted(rows.as_flattened(), 4 * size, kernel, out.as_flattened_mut());
    }
}

/// `out[i] = sum over t of weights[t] * values[i + t * stride]`, added from the first on.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn weighted(values: &[f32], stride: usize, weights: &[f32], out: &mut [f32]) {
    let (blocks, rest) = out.as_chunks_mut::<32>();
    for (i, block) in blocks.iter_mut().enumerate() {
        let mut sums = [0.0; 32];
        for (t, &weight) in weights.iter().enumerate() {
            let values = values[32 * i + t * stride..].first_chunk::<32>().expect("one a tap");
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value * weight;
            }
        }
        *block = sums;
    }
    let first = 32 * blocks.len();
    for (i, out) in rest.iter_mut().enumerate() {
        let taps = weights.iter().zip(values[first + i..].iter().step_by(stride));
        *out = taps.fold(0.0, |sum, (weight, value)| sum + value * weight);
    }
}

/// Blurs a square of `size * size` 8-bit pixels as Pillow does. `sigma > 0`, in pixels.
pub fn pillow(pixels: &mut [[u8; 4]], size: usize, sigma: f32, buffers: &mut Buffers) {
    let Buffers { bytes: other, sums, .. } = buffers;
    other.resize(size * size, [0; 4]);
    let shape = BoxBlur::of(sigma);
    // The blur runs down the columns, so that whole rows are vectors; across is down in the transposed image.
    let mut down = |from: &mut [[u8; 4]], to: &mut [[u8; 4]]| {
        box_blur(from.as_flattened(), to.as_flattened_mut(), 4 * size, shape, sums);
    };
    for _ in 0..2 {
        transpose(pixels, other, size);
        down(other, pixels);
        down(pixels, other);
        down(other, pixels);
    }
}

/// Box blurs that approximate a Gaussian.
const PASSES: usize = 3;

/// A box of fractional radius: whole pixels, and a share of the two beyond them.
#[derive(Clone, Copy, Debug)]
pub struct BoxBlur {
    /// Radius in whole pixels.
    pub whole: u32,
    /// Weight of a pixel in the box, in units of 2^-24.
    pub weight: u32,
    /// Weight of a pixel beyond it, in units of 2^-24.
    pub fraction: u32,
}

impl BoxBlur {
    /// Returns the box that has standard deviation `sigma > 0` when it is applied three times.
    pub fn of(sigma: f32) -> Self {
        let radius = box_radius(sigma);
        let whole = radius as u32;
        let weight = (16_777_216.0 / (radius * 2.0 + 1.0)) as u32;
        Self { whole, weight, fraction: (16_777_216 - (whole * 2 + 1) * weight) / 2 }
    }
}

/// Returns the radius of the box that has standard deviation `sigma` when it is applied three times.
fn box_radius(sigma: f32) -> f32 {
    // f32 and f64 as in the C code, where the literals are doubles.
    let variance = sigma * sigma / PASSES as f32;
    let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
    let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
    let share = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance);
    whole + share / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)))
}

const _: () = assert!(PASSES == 3, "`pillow` unrolls them");

/// Transposes a square.
fn transpose(pixels: &[[u8; 4]], out: &mut [[u8; 4]], size: usize) {
    const TILE: usize = 8; // rows and columns at a time, so that few lines of the cache are in use
    for top in (0..size).step_by(TILE) {
        for left in (0..size).step_by(TILE) {
            for y in top..size.min(top + TILE) {
                for x in left..size.min(left + TILE) {
                    out[x * size + y] = pixels[y * size + x];
                }
            }
        }
    }
}

/// One box blur over places of `lanes` values each: a running sum, and a fraction of the two values beyond it.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn box_blur(input: &[u8], output: &mut [u8], lanes: usize, shape: BoxBlur, sums: &mut Vec<u32>) {
    let last = input.len() / lanes - 1;
    let BoxBlur { whole, weight, fraction } = shape;
    let whole = whole as usize;
    let place = |i: usize| &input[i * lanes..][..lanes];
    // The sum around the place before the first, where everything up to it is the first.
    sums.clear();
    sums.extend(place(0).iter().map(|&v| u32::from(v) * (whole as u32 + 1)));
    for i in 0..whole {
        sums.iter_mut().zip(place(i.min(last))).for_each(|(sum, &v)| *sum += u32::from(v));
    }
    for (i, out) in output.chunks_exact_mut(lanes).enumerate() {
        let (behind, ahead) = (place(i.saturating_sub(whole + 1)), place((i + whole).min(last)));
        let beyond = place((i + whole + 1).min(last));
        let values = behind.iter().zip(ahead).zip(beyond);
        for ((sum, out), ((&behind, &ahead), &beyond)) in sums.iter_mut().zip(out).zip(values) {
            // Wraps below zero only in between: what leaves the box was added before.
            *sum = sum.wrapping_add(u32::from(ahead)).wrapping_sub(u32::from(behind));
            let bulk = *sum * weight + (u32::from(behind) + u32::from(beyond)) * fraction;
            *out = ((bulk + (1 << 23)) >> 24) as u8;
        }
    }
}

/// Blurs 8-bit pixels with the sampled Gaussian, rounded.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn gaussian_u8(
    pixels: &mut [[u8; 4]],
    size: usize,
    sigma: f32,
    floats: &mut Vec<[f32; 4]>,
    buffers: &mut Buffers,
) {
    floats.resize(size * size, [0.0; 4]);
    for (float, byte) in floats.as_flattened_mut().iter_mut().zip(pixels.as_flattened()) {
        *float = f32::from(*byte);
    }
    gaussian(floats, size, sigma, buffers);
    for (byte, float) in pixels.as_flattened_mut().iter_mut().zip(floats.as_flattened()) {
        *byte = clipped(*float + 0.5) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_becomes_a_gaussian_and_borders_darken() {
        let size = 40; // radius 2
        let mut point = vec![[0.0; 4]; size * size];
        point[20 * size + 20] = [1.0; 4];
        gaussian(&mut point, size, 1.0, &mut Buffers::default());
        let weights = [-2.0f32, -1.0, 0.0, 1.0, 2.0].map(|x| (-x * x / 2.0).exp());
        let sum: f32 = weights.iter().sum();
        for (dy, dx) in [(0, 0), (1, 2), (2, 2), (4, 3)] {
            let expected = weights[dy] * weights[dx] / (sum * sum);
            let got = point[(18 + dy) * size + 18 + dx][1];
            assert!((got - expected).abs() < 1e-6, "got {got}, expected {expected}");
        }
        assert_eq!(point[20 * size + 23], [0.0; 4]);
        let mut white = vec![[1.0; 4]; size * size];
        gaussian(&mut white, size, 1.0, &mut Buffers::default());
        let edge = (weights[2] + weights[3] + weights[4]) / sum;
        assert!(
            (white[0][0] - edge * edge).abs() < 1e-6
                && (white[20 * size + 20][0] - 1.0).abs() < 1e-6
        );
    }

    #[test]
    fn the_number_of_taps_is_the_published_one() {
        assert_eq!([224, 96, 32, 19].map(|size| 2 * radius(size) + 1), [23, 9, 3, 1]);
    }

    #[test]
    fn box_blurs_keep_a_flat_image_and_the_sum_of_a_point() {
        for sigma in [0.1, 0.8, 2.0, 20.0] {
            let mut flat = vec![[200, 3, 255, 0]; 81];
            pillow(&mut flat, 9, sigma, &mut Buffers::default());
            assert_eq!(flat, vec![[200, 3, 255, 0]; 81], "sigma {sigma}");
        }
        let mut point = vec![[0; 4]; 31 * 31];
        point[15 * 31 + 15] = [255; 4];
        pillow(&mut point, 31, 1.0, &mut Buffers::default());
        let sum: u32 = point.iter().map(|p| u32::from(p[0])).sum();
        assert!((240..265).contains(&sum), "{sum}");
        assert!(point[15 * 31 + 15][0].abs_diff(41) <= 2, "{}", point[15 * 31 + 15][0]); // 255 / (2 pi)
    }
}

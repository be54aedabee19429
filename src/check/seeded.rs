//! Numbers from a seed, by a formula shared with `scripts/make-goldens`, so that goldens need not store their inputs.
//!
//! A seed is the FNV-1a hash of a text that names the purpose of the numbers. Number `i` is the top 24 bits of splitmix64
//! (Steele et al. 2014) at `seed + (i + 1) γ`, a multiple of 2^-23 in `[-1, 1)`: exact in f32 and in f64.

use crate::device::Device;
use crate::tensor::Tensor;

/// The seed of a text: FNV-1a, 64 bits.
pub fn seed(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The 64 bits of number `i` of a seed.
pub fn bits(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The nearest f32, as an f64.
pub fn rounded(value: f64) -> f64 {
    f64::from(value as f32)
}

/// `count` numbers in `[-1, 1)`.
pub fn unit(seed: u64, count: usize) -> Vec<f64> {
    let number = |i| (bits(seed, i) >> 40) as f64 / f64::from(1 << 23) - 1.0;
    (0..count as u64).map(number).collect()
}

/// Numbers in `[mean - spread, mean + spread)`, f32 values.
pub fn around(seed: u64, count: usize, mean: f64, spread: f64) -> Vec<f64> {
    unit(seed, count).into_iter().map(|u| rounded(mean + spread * u)).collect()
}

/// Numbers at least 0.1 away from zero, the kink of a ReLU.
pub fn off_zero(seed: u64, count: usize) -> Vec<f64> {
    let push = |u: f64| rounded(if u < 0.0 { 0.9 * u - 0.1 } else { 0.9 * u + 0.1 });
    unit(seed, count).into_iter().map(push).collect()
}

/// Equally spaced numbers in random order. No two are close, so rounding does not decide a maximum.
pub fn distinct(seed: u64, count: usize) -> Vec<f64> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&i| bits(seed, i as u64));
    let mut values = vec![0.0; count];
    for (rank, i) in order.into_iter().enumerate() {
        values[i] = rounded((2 * rank + 1) as f64 / count as f64 - 1.0);
    }
    values
}

/// Numbers with few distinct values, so that maxima tie.
pub fn tied(seed: u64, count: usize) -> Vec<f64> {
    unit(seed, count).into_iter().map(|u| (2.0 * u).floor() / 2.0).collect()
}

/// Rows of `d` numbers, normalised to unit length in f32.
pub fn unit_rows(seed: u64, rows: usize, d: usize) -> Vec<f64> {
    let mut values = unit(seed, rows * d);
    for row in values.chunks_exact_mut(d) {
        let norm = row.iter().fold(0.0, |sum, v| sum + v * v).sqrt();
        row.iter_mut().for_each(|v| *v = rounded(*v / norm));
    }
    values
}

/// Indices in `0..below`.
pub fn indices(seed: u64, count: usize, below: usize) -> Vec<usize> {
    (0..count as u64).map(|i| (bits(seed, i) % below as u64) as usize).collect()
}

/// Seeded images `[n, h, w, 4]`, the fourth channel zero.
pub fn images(device: &Device, what: &str, [n, h, w]: [usize; 3]) -> Tensor {
    let values = unit(seed(what), n * h * w * 3);
    Tensor::from_f64(device, [n, h, w, 4], &pad_channels(&values, 3, 4))
}

/// Pixels of `from` channels with zeros up to `to` channels.
pub fn pad_channels(values: &[f64], from: usize, to: usize) -> Vec<f64> {
    let pad = |pixel: &[f64]| -> Vec<f64> {
        pixel.iter().copied().chain(std::iter::repeat_n(0.0, to - from)).collect()
    };
    values.chunks_exact(from).flat_map(pad).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formula_gives_the_published_outputs_of_splitmix64_and_fnv() {
        // The first outputs of splitmix64 seeded with 0 and of FNV-1a, as their authors publish them.
        assert_eq!(bits(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(bits(0, 1), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(seed("a"), 0xaf63_dc4c_8601_ec8c);
    }
}

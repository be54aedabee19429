//! Seeded numbers and comparisons.

use half::bf16;

/// A float type in which kernels store values.
pub trait Float: Copy + Default + 'static {
    const NAME: &str;
    /// Relative tolerance of the L2 norm.
    const TOLERANCE: f64;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
}

impl Float for f32 {
    const NAME: &str = "f32";
    const TOLERANCE: f64 = 1e-5;
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Float for bf16 {
    const NAME: &str = "bf16";
    const TOLERANCE: f64 = 1e-2;
    fn from_f64(x: f64) -> Self {
        bf16::from_f64(x)
    }
    fn to_f64(self) -> f64 {
        bf16::to_f64(self)
    }
}

/// Seeded numbers in -1..1, none close to zero.
pub fn noise<T: Float>(n: usize, seed: u64) -> Vec<T> {
    bits(n, seed)
        .iter()
        .map(|b| {
            let x = f64::from(*b) / f64::from(u32::MAX) * 2.0 - 1.0;
            T::from_f64(if x.abs() < 0.01 { 0.5 } else { x })
        })
        .collect()
}

/// Random bits (splitmix64).
pub fn bits(n: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 32) as u32
    };
    (0..n).map(|_| next()).collect()
}

/// Fails unless the relative L2 error is within `tolerance` and every element is within 16 `tolerance` of the largest. NaN fails.
#[track_caller]
pub fn close<T: Float>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let most = want.iter().fold(0.0_f64, |m, w| m.max(w.abs()));
    let mut error = 0.0;
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let d = (g.to_f64() - w).abs();
        assert!(
            d <= 16.0 * tolerance * most + 1e-30,
            "{what}: element {i} is {}, not {w}",
            g.to_f64()
        );
        error += d * d;
    }
    assert!(
        error.sqrt() <= tolerance * norm + 1e-30,
        "{what}: L2 error {} of {norm}",
        error.sqrt()
    );
}

/// Labels in 0..k, always the same.
pub fn labels(n: usize, k: usize) -> Vec<i32> {
    bits(n, 99).iter().map(|b| (*b as usize % k) as i32).collect()
}

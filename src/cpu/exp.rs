//! A vectorised `e^x` of f32. libm computes one number at a time, and the losses need hundreds of thousands.
//!
//! Cody and Waite's range reduction, `x = n ln 2 + r`, and a polynomial for `e^r` with the coefficients of Cephes' `expf`;
//! within 2 units in the last place. Without fused multiply-adds, so that every instruction set gives the same bits.

use multiversion::multiversion;

/// Partial sums of a sum, added in order at the end.
const LANES: usize = 16;

/// `e^v`; 0 up to -104, infinite from 88.8. NaN propagates.
#[inline(always)]
pub(crate) fn exp(v: f32) -> f32 {
    /// 1.5 * 2^23: adding a number to it rounds the number to an integer, which then occupies the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // Not `clamp`: these comparisons are false for NaN, which therefore propagates.
    let v = if v < -110.0 { -110.0 } else { v };
    let v = if v > 90.0 { 90.0 } else { v };
    let shifted = v * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts. The first has few bits, so that its product with an integer is exact.
    let r = v - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // 2^n in two factors, because 2^n leaves f32's range slightly before the result does.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(n >> 1) * power(n - (n >> 1))
}

/// `Σ exp(factor x - shift)`, arguments and sums in f64.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub(crate) fn sum_of_exp(x: &[f32], factor: f64, shift: f64) -> f64 {
    let mut sums = [0.0_f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            sums[lane] += f64::from(exp((f64::from(x[lane]) * factor - shift) as f32));
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(exp((f64::from(x) * factor - shift) as f32));
    }
    sums.iter().sum()
}

/// `y = exp(factor x - shift)`, arguments in f64.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub(crate) fn exp_into(y: &mut [f32], x: &[f32], factor: f64, shift: f64) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = exp((f64::from(x) * factor - shift) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in -10_400_000..=8_872_000 {
            let v = i as f32 * 1e-5;
            let (got, exact) = (f64::from(exp(v)), f64::from(v).exp());
            // The unit in the last place of subnormal numbers is 2^-149.
            let unit = (exact * 2.0_f64.powi(-23)).max(2.0_f64.powi(-149));
            worst = worst.max((got - exact).abs() / unit);
        }
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn exp_underflows_to_zero_and_overflows_to_infinity() {
        assert_eq!([0.0, -0.0].map(exp), [1.0; 2]);
        assert_eq!([-105.0, -1e30, f32::NEG_INFINITY].map(exp), [0.0; 3]);
        assert_eq!([88.8, 1e30, f32::INFINITY].map(exp), [f32::INFINITY; 3]);
        assert!(exp(88.7).is_finite() && exp(f32::NAN).is_nan());
        let x = [0.5, -1.0, f32::NEG_INFINITY];
        let mut y = [0.0; 3];
        exp_into(&mut y, &x, 2.0, 1.0);
        assert_eq!(y, [1.0, exp(-3.0), 0.0]);
        let many = vec![0.0; 37];
        assert_eq!(sum_of_exp(&many, 1.0, 0.0), 37.0);
    }
}

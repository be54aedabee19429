//! Between bf16 and f32: exact one way, rounded to nearest, ties to even, the other.

use crate::cpu::parallel::Each;
use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

/// Elements of a parallel task.
const CHUNK: usize = 1 << 16;

/// `to = from`, in parallel.
///
/// # Panics
/// If the lengths differ.
pub fn widen(to: &mut [f32], from: &[bf16]) {
    assert_eq!(to.len(), from.len(), "widen: elements of output and input");
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    chunks.each(|(to, from)| widen_sequential(to, bits(from)));
}

/// `to = from`, each rounded to the nearest bf16, in parallel. NaN stays NaN.
///
/// # Panics
/// If the lengths differ.
pub fn round(to: &mut [bf16], from: &[f32]) {
    assert_eq!(to.len(), from.len(), "round: elements of output and input");
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    chunks.each(|(to, from)| round_sequential(bits_mut(to), from));
}

/// The bits of a slice: loops over integers become whole vectors.
pub(super) fn bits(x: &[bf16]) -> &[u16] {
    bytemuck::cast_slice(x)
}

pub(super) fn bits_mut(x: &mut [bf16]) -> &mut [u16] {
    bytemuck::cast_slice_mut(x)
}

/// The bits of the bf16 nearest to `x`, ties to even.
#[inline(always)]
pub(crate) fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could carry a NaN's bits into infinity or zero.
    (if x.is_nan() { bits >> 16 | 0x40 } else { nearest }) as u16
}

/// The value of a bf16 with these bits.
#[inline(always)]
pub(crate) fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
pub(super) fn widen_sequential(to: &mut [f32], from: &[u16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widened(*from);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
pub(super) fn round_sequential(to: &mut [u16], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = rounded(*from);
    }
}

/// `to = round(to + from)`.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2+fma"))]
pub(super) fn add_rounded_sequential(to: &mut [u16], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = rounded(widened(*to) + from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_survives_and_values_between_go_to_the_nearest_even() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let (mut wide, mut back) = (vec![0.0; all.len()], vec![bf16::ZERO; all.len()]);
        widen(&mut wide, &all);
        round(&mut back, &wide);
        for (back, all) in back.iter().zip(&all) {
            let same = back.to_bits() == all.to_bits() || (back.is_nan() && all.is_nan());
            assert!(same, "{:x} became {:x}", all.to_bits(), back.to_bits());
        }
        // Around every value: a little less than half a step, half, a little more.
        let between: Vec<f32> = (0..=u16::MAX)
            .flat_map(|top| [0x0001, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (top, low)))
            .map(|(top, low): (u16, u32)| f32::from_bits(u32::from(top) << 16 | low))
            .collect();
        let mut rounded = vec![bf16::ZERO; between.len()];
        round(&mut rounded, &between);
        for (rounded, x) in rounded.iter().zip(between) {
            let expected = bf16::from_f32(x);
            let same =
                rounded.to_bits() == expected.to_bits() || (rounded.is_nan() && expected.is_nan());
            assert!(same, "{x}: {rounded}, expected {expected}");
        }
    }

    #[test]
    fn sums_are_rounded_once() {
        let mut to = [bf16::ONE.to_bits(); 3];
        add_rounded_sequential(&mut to, &[1.0, f32::EPSILON, -1.0]);
        assert_eq!(to.map(widened), [2.0, 1.0, 0.0]);
    }
}

//! Loops over rows, generic over the CPU's types and the reference device's f64.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::ops::l2_normalize::EPS;
use crate::tensor::Float;

fn dot<T: Float>(a: &[T], b: &[T]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.widen() * b.widen()).sum()
}

/// Returns `1 / max(|x|, eps)`, and whether the norm is below eps and thus a constant.
fn inverse_norm<T: Float>(x: &[T]) -> (f64, bool) {
    let norm = dot(x, x).sqrt();
    (1.0 / norm.max(EPS), norm < EPS)
}

/// Returns the sum of the rows' cosines, in row order.
pub(super) fn sum_of_cosines<T: Float>(p: &[T], z: &[T], d: usize) -> f64 {
    let rows = p.chunks_exact(d).zip(z.chunks_exact(d));
    rows.map(|(p, z)| dot(p, z) * inverse_norm(p).0 * inverse_norm(z).0).sum()
}

/// Fills `dx = scale (ô - c x̂) / |x|`, where `o` is the other side.
pub(super) fn gradient<T: Float>(dx: &mut [T], x: &[T], other: &[T], d: usize, scale: f64) {
    let rows = dx.par_chunks_mut(d).zip(x.par_chunks(d)).zip(other.par_chunks(d));
    rows.each(|((dx, x), other)| {
        let ((inverse, constant), (inverse_other, _)) = (inverse_norm(x), inverse_norm(other));
        let cosine = if constant { 0.0 } else { dot(x, other) * inverse * inverse_other };
        for (dx, (x, other)) in dx.iter_mut().zip(x.iter().zip(other)) {
            let along = other.widen() * inverse_other - cosine * x.widen() * inverse;
            *dx = T::narrow(scale * inverse * along);
        }
    });
}

//! Loops over images, generic over the CPU's types and the reference device's f64, with sums in f64.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::tensor::Float;

/// Number of elements in one of `rows` images.
fn image<T>(x: &[T], rows: usize) -> usize {
    x.len() / rows.max(1)
}

pub(super) fn mean<T: Float>(g: &mut [T], x: &[T], c: usize) {
    let image = image(x, g.len() / c);
    let pixels = image / (2 * c);
    g.par_chunks_mut(c).zip(x.par_chunks(image.max(1))).each(|(g, x)| {
        let mut sums = vec![0.0; c];
        for stream in x.chunks_exact(c) {
            sums.iter_mut().zip(stream).for_each(|(sum, x)| *sum += x.widen());
        }
        g.iter_mut().zip(sums).for_each(|(g, sum)| *g = T::narrow(sum / pixels as f64));
    });
}

pub(super) fn mean_gradient<T: Float>(dx: &mut [T], dg: &[T], c: usize) {
    let image = image(dx, dg.len() / c);
    let pixels = image / (2 * c);
    dx.par_chunks_mut(image.max(1)).zip(dg.par_chunks(c)).each(|(dx, dg)| {
        for stream in dx.chunks_exact_mut(c) {
            let pairs = stream.iter_mut().zip(dg);
            pairs.for_each(|(dx, dg)| *dx = T::narrow(dg.widen() / pixels as f64));
        }
    });
}

/// Returns the weight of stream 0 for each channel.
fn weights<T: Float>(logits: &[T], c: usize) -> Vec<f64> {
    let (first, second) = logits.split_at(c);
    let sigmoid = |(a, b): (&T, &T)| 1.0 / (1.0 + (b.widen() - a.widen()).exp());
    first.iter().zip(second).map(sigmoid).collect()
}

pub(super) fn select<T: Float>(y: &mut [T], x: &[T], logits: &[T], c: usize) {
    let rows = logits.len() / (2 * c);
    let (out, image) = (image(y, rows).max(1), image(x, rows).max(1));
    let images = y.par_chunks_mut(out).zip(x.par_chunks(image)).zip(logits.par_chunks(2 * c));
    images.each(|((y, x), logits)| {
        let weights = weights(logits, c);
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
            for (j, (y, a)) in y.iter_mut().zip(&weights).enumerate() {
                *y = T::narrow(a * x[j].widen() + (1.0 - a) * x[c + j].widen());
            }
        }
    });
}

pub(super) fn select_gradient<T: Float>(
    [dx, dlogits]: [&mut [T]; 2],
    [dy, x, logits]: [&[T]; 3],
    c: usize,
) {
    let rows = logits.len() / (2 * c);
    let (out, image) = (image(dy, rows).max(1), image(x, rows).max(1));
    let inputs = dy.par_chunks(out).zip(x.par_chunks(image)).zip(logits.par_chunks(2 * c));
    let outputs = dx.par_chunks_mut(image).zip(dlogits.par_chunks_mut(2 * c));
    outputs.zip(inputs).each(|((dx, dlogits), ((dy, x), logits))| {
        let weights = weights(logits, c);
        let mut sums = vec![0.0; c];
        let pixels = dx.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c));
        for ((dx, x), dy) in pixels.zip(dy.chunks_exact(c)) {
            for j in 0..c {
                let (a, dy) = (weights[j], dy[j].widen());
                dx[j] = T::narrow(a * dy);
                dx[c + j] = T::narrow((1.0 - a) * dy);
                sums[j] += dy * (x[j].widen() - x[c + j].widen());
            }
        }
        for j in 0..c {
            let d = weights[j] * (1.0 - weights[j]) * sums[j];
            dlogits[j] = T::narrow(d);
            dlogits[c + j] = T::narrow(-d);
        }
    });
}

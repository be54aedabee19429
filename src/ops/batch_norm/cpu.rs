//! The path for f32 and bf16, which computes in f32. Statistics need one read of the input: each chunk of rows stays in cache
//! while its mean and its squared deviations are computed, and chunks are merged in order (Chan, Golub and LeVeque 1979) in f64.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{BatchNormDims, RUNNING_WEIGHT, Saved};
use crate::tensor::{Activation, CHUNK, Tensor};

/// Rows in a parallel task: about 64 KiB of one operand.
fn chunk_rows(c: usize) -> usize {
    (CHUNK / c.max(1)).max(1)
}

fn chunks(dims: BatchNormDims) -> usize {
    dims.rows.div_ceil(chunk_rows(dims.c))
}

/// Minimum length of the inner loop over channels: 16 vectors. A loop over 16 channels ends before it reaches full speed, and
/// its sums depend on each other.
const WIDE: usize = 256;

/// Width of the wide row that several rows of `c` channels are read as.
fn width(c: usize) -> usize {
    c * (WIDE / c.max(1)).max(1)
}

/// Repeats each of the `N` lines of `[N, c]` to the width of a wide row.
fn repeated(lines: &[f32], c: usize) -> Vec<f32> {
    lines.chunks_exact(c.max(1)).flat_map(|line| line.repeat(width(c) / c)).collect()
}

/// Sums over wide rows: `f` adds to sums of their width, which are then reduced to `totals` of `c` channels.
fn sum_wide<const N: usize>(mut totals: [&mut [f32]; N], f: impl FnOnce([&mut [f32]; N])) {
    let c = totals[0].len();
    totals.iter_mut().for_each(|total| total.fill(0.0));
    if width(c) == c {
        return f(totals);
    }
    let mut sums = [[0.0; WIDE]; N];
    f(sums.each_mut().map(|sums| &mut sums[..width(c)]));
    for (total, sums) in totals.into_iter().zip(&sums) {
        for row in sums[..width(c)].chunks_exact(c) {
            total.iter_mut().zip(row).for_each(|(total, sum)| *total += sum);
        }
    }
}

/// Length of the workspace of [`moments`], which holds the moments of all chunks.
pub(super) fn partial_len(dims: BatchNormDims) -> usize {
    dims.groups * chunks(dims) * 2 * dims.c
}

/// Mean and biased variance of each group, `[groups, c]`.
pub(super) fn moments<T: Activation>(
    mean: &mut [f32],
    variance: &mut [f32],
    partial: &mut [f32],
    x: &[T],
    dims: BatchNormDims,
) {
    let c = dims.c;
    if dims.len() == 0 {
        mean.fill(0.0);
        variance.fill(0.0);
        return;
    }
    let rows = chunk_rows(c);
    let per_group = x.par_chunks(dims.len()).flat_map(|group| group.par_chunks(rows * c));
    let tasks: Vec<&[T]> = per_group.collect();
    partial.par_chunks_mut(2 * c).zip(tasks).each(|(partial, x)| {
        let (mean, m2) = partial.split_at_mut(c);
        chunk_moments(mean, m2, x);
    });
    let of_groups = mean.par_chunks_mut(c).zip(variance.par_chunks_mut(c));
    of_groups.zip(partial.par_chunks(chunks(dims) * 2 * c)).each(|((mean, variance), partial)| {
        let lines = mean.par_chunks_mut(LINE).zip(variance.par_chunks_mut(LINE));
        lines.enumerate().each(|(i, (mean, variance))| {
            merge_moments(mean, variance, partial, i * LINE, dims);
        });
    });
}

/// Channels whose chunks one task merges: a cache line of each.
const LINE: usize = 16;

/// Merges the moments of a group's chunks, in order, for the channels from `first` on.
fn merge_moments(
    mean: &mut [f32],
    variance: &mut [f32],
    partial: &[f32],
    first: usize,
    dims: BatchNormDims,
) {
    let (c, rows) = (dims.c, chunk_rows(dims.c));
    let (mut seen, mut mu, mut m2) = (0.0_f64, [0.0_f64; LINE], [0.0_f64; LINE]);
    for (i, chunk) in partial.chunks_exact(2 * c).enumerate() {
        let m = rows.min(dims.rows - i * rows) as f64;
        let (means, squares) = chunk.split_at(c);
        let own = means[first..][..mean.len()].iter().zip(&squares[first..]);
        for ((mu, m2), (&own_mean, &own_m2)) in mu.iter_mut().zip(&mut m2).zip(own) {
            let delta = f64::from(own_mean) - *mu;
            *m2 += f64::from(own_m2) + delta * delta * seen * m / (seen + m);
            *mu += delta * m / (seen + m);
        }
        seen += m;
    }
    for ((mean, variance), (mu, m2)) in mean.iter_mut().zip(variance).zip(mu.iter().zip(m2)) {
        *mean = *mu as f32;
        *variance = (m2 / seen) as f32;
    }
}

/// Mean of the rows of a chunk, and the sum of their squared deviations.
fn chunk_moments<T: Activation>(mean: &mut [f32], m2: &mut [f32], x: &[T]) {
    let scale = mean.len() as f32 / x.len() as f32;
    sum_wide([&mut *mean], |[sum]| add_rows(sum, x));
    mean.iter_mut().for_each(|mean| *mean *= scale);
    let mean = repeated(mean, mean.len());
    sum_wide([m2], |[m2]| add_squares(m2, x, &mean));
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_rows<T: Activation>(sum: &mut [f32], x: &[T]) {
    for row in x.chunks(sum.len()) {
        for (sum, x) in sum.iter_mut().zip(row) {
            *sum += x.load();
        }
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_squares<T: Activation>(m2: &mut [f32], x: &[T], mean: &[f32]) {
    for row in x.chunks(m2.len()) {
        for ((m2, x), mean) in m2.iter_mut().zip(row).zip(mean) {
            let deviation = x.load() - mean;
            *m2 += deviation * deviation;
        }
    }
}

/// `y = relu((x - mean) inv_std gain + shift + residual)`.
pub(super) fn apply<T: Activation>(
    y: &mut [T],
    saved: &Saved,
    residual: Option<&Tensor>,
    relu: bool,
) {
    let residual = residual.map(Tensor::data::<T>);
    let (lines, width) = (forward_lines(saved), width(saved.dims.c));
    for_chunks(y, saved.dims, |g, at, y| {
        let lines = &lines[3 * g * width..][..3 * width];
        let x = &saved.x.data::<T>()[at..][..y.len()];
        let residual = residual.map(|r| &r[at..][..x.len()]);
        apply_rows(y, x, residual, lines, relu);
    });
}

/// For each group the mean, a and b of `y = a (x - mean) + b`, repeated to the width of a wide row. `a x + (b - a mean)` would
/// lose digits if the mean is far from zero.
fn forward_lines(saved: &Saved) -> Vec<f32> {
    let BatchNormDims { groups, c, .. } = saved.dims;
    let shift = saved.shift.as_ref().map(Tensor::data::<f32>);
    let mut lines = vec![0.0; 3 * groups * c];
    for (g, line) in lines.chunks_exact_mut((3 * c).max(1)).enumerate() {
        let (scale, mean) = scale_and_mean(saved, g);
        for j in 0..c {
            line[j] = mean[j];
            line[c + j] = scale(j);
            line[2 * c + j] = shift.map_or(0.0, |s| s[j]);
        }
    }
    repeated(&lines, c)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn apply_rows<T: Activation>(
    y: &mut [T],
    x: &[T],
    residual: Option<&[T]>,
    lines: &[f32],
    relu: bool,
) {
    let width = lines.len() / 3;
    let (mean, lines) = lines.split_at(width);
    let (a, b) = lines.split_at(width);
    let least = if relu { 0.0 } else { f32::NEG_INFINITY };
    let clip = |v: f32| T::store(if v < least { least } else { v }); // unlike `max`, propagates NaN
    let line = || mean.iter().zip(a).zip(b);
    match residual {
        None => {
            for (y, x) in y.chunks_mut(width).zip(x.chunks(width)) {
                for ((y, x), ((mean, a), b)) in y.iter_mut().zip(x).zip(line()) {
                    *y = clip((x.load() - mean) * a + b);
                }
            }
        }
        Some(r) => {
            let inputs = x.chunks(width).zip(r.chunks(width));
            for (y, (x, r)) in y.chunks_mut(width).zip(inputs) {
                for (((y, x), r), ((mean, a), b)) in y.iter_mut().zip(x).zip(r).zip(line()) {
                    *y = clip((x.load() - mean) * a + b + r.load());
                }
            }
        }
    }
}

/// Fills `sums [groups, 2, c]` with Σ dz and Σ dz x̂: sums over a chunk in f32, their total in f64. If `rectified`, `dz` is the
/// gradient of the ReLU's output, and the ReLU's mask is recomputed from `x`.
pub(super) fn backward_sums<T: Activation>(
    sums: &mut [f32],
    dz: &[T],
    saved: &Saved,
    rectified: bool,
) {
    let c = saved.dims.c;
    let chunks = dz.chunks(saved.dims.len().max(1)).flat_map(|g| row_chunks(g, c)).collect();
    let (lines, width) = (forward_lines(saved), width(c));
    sum_chunks(sums, chunks, saved, |sum, dot, dz: &[T], (group, x, mean, inv_std)| {
        if !rectified {
            return chunk_sums(sum, dot, dz, x, mean, inv_std);
        }
        let lines = &lines[3 * group * width..][..3 * width];
        sum_wide([sum, &mut *dot], |[sum, dot]| add_rectified_products(sum, dot, dz, x, lines));
        dot.iter_mut().zip(inv_std).for_each(|(dot, inv_std)| *dot *= inv_std);
    });
}

/// `dz` where `y > 0`, otherwise 0. As a function, so that `dz` is loaded in either case: a load under a condition keeps the
/// compiler from whole vectors.
#[inline(always)]
fn if_positive(y: f32, dz: f32) -> f32 {
    if y > 0.0 { dz } else { 0.0 }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_rectified_products<T: Activation>(
    sum: &mut [f32],
    dot: &mut [f32],
    dz: &[T],
    x: &[T],
    lines: &[f32],
) {
    let width = sum.len();
    let (mean, lines) = lines.split_at(width);
    let (a, b) = lines.split_at(width);
    for (dz, x) in dz.chunks(width).zip(x.chunks(width)) {
        let out = sum.iter_mut().zip(dot.iter_mut());
        let line = mean.iter().zip(a).zip(b);
        for ((((sum, dot), dz), x), ((mean, a), b)) in out.zip(dz).zip(x).zip(line) {
            let deviation = x.load() - mean;
            let dz = if_positive(deviation * a + b, dz.load()); // the same bits as `y`
            *sum += dz;
            *dot += dz * deviation;
        }
    }
}

/// Sets `dz` to zero where `y <= 0`, and computes [`backward_sums`] in the same pass.
pub(super) fn mask_and_sum<T: Activation>(sums: &mut [f32], dz: &mut [T], y: &[T], saved: &Saved) {
    let c = saved.dims.c;
    let group = saved.dims.len().max(1);
    let outputs = y.chunks(group).flat_map(|g| row_chunks(g, c));
    let chunk = chunk_rows(c) * c.max(1);
    let chunks = dz.chunks_mut(group).flat_map(|g| g.chunks_mut(chunk)).zip(outputs).collect();
    let both = |sum: &mut [f32], dot: &mut [f32], (dz, y): (&mut [T], &[T]), at: Place<'_, T>| {
        let (_, x, mean, inv_std) = at;
        let mean = repeated(mean, mean.len());
        sum_wide([sum, &mut *dot], |[sum, dot]| mask_and_add_products(sum, dot, dz, [y, x], &mean));
        dot.iter_mut().zip(inv_std).for_each(|(dot, inv_std)| *dot *= inv_std);
    };
    sum_chunks(sums, chunks, saved, both);
}

/// Chunks of complete rows of one group.
fn row_chunks<T>(group: &[T], c: usize) -> impl Iterator<Item = &[T]> {
    group.chunks(chunk_rows(c) * c.max(1))
}

/// The group of a chunk, its `x`, and mean and `1 / std` of the group.
type Place<'a, T> = (usize, &'a [T], &'a [f32], &'a [f32]);

/// Calls `f(sum, dot, part, place)` for each chunk of rows in parallel, then adds up `sum` and `dot` of all chunks in order.
fn sum_chunks<T: Activation, P: Send>(
    sums: &mut [f32],
    parts: Vec<P>,
    saved: &Saved,
    f: impl Fn(&mut [f32], &mut [f32], P, Place<'_, T>) + Sync,
) {
    let dims = saved.dims;
    let c = dims.c;
    if dims.len() == 0 {
        sums.fill(0.0);
        return;
    }
    let mut partial = Tensor::floats(saved.x.device(), [partial_len(dims)]);
    let (rows, per_group) = (chunk_rows(c), chunks(dims));
    let tasks = partial.data_mut::<f32>().par_chunks_mut(2 * c).zip(parts);
    tasks.enumerate().each(|(i, (partial, part))| {
        let (group, chunk) = (i / per_group, i % per_group);
        let at = group * dims.len() + chunk * rows * c;
        let len = (rows.min(dims.rows - chunk * rows)) * c;
        let x = &saved.x.data::<T>()[at..][..len];
        let mean = &saved.mean.data::<f32>()[group * c..][..c];
        let inv_std = &saved.inv_std.data::<f32>()[group * c..][..c];
        let (sum, dot) = partial.split_at_mut(c);
        f(sum, dot, part, (group, x, mean, inv_std));
    });
    let partial = partial.data::<f32>().par_chunks(per_group * 2 * c);
    sums.par_chunks_mut(2 * c).zip(partial).each(|(sums, partial)| {
        sums.par_chunks_mut(LINE).enumerate().each(|(i, sums)| {
            let mut totals = [0.0_f64; LINE];
            for chunk in partial.chunks_exact(2 * c) {
                let own = &chunk[i * LINE..][..sums.len()];
                totals.iter_mut().zip(own).for_each(|(total, &sum)| *total += f64::from(sum));
            }
            sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = total as f32);
        });
    });
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn mask_and_add_products<T: Activation>(
    sum: &mut [f32],
    dot: &mut [f32],
    dz: &mut [T],
    [y, x]: [&[T]; 2],
    mean: &[f32],
) {
    let width = sum.len();
    for (dz, (y, x)) in dz.chunks_mut(width).zip(y.chunks(width).zip(x.chunks(width))) {
        let out = sum.iter_mut().zip(dot.iter_mut());
        for ((((sum, dot), dz), (y, x)), mean) in out.zip(dz).zip(y.iter().zip(x)).zip(mean) {
            let kept = if_positive(y.load(), dz.load());
            *dz = T::store(kept);
            *sum += kept;
            *dot += kept * (x.load() - mean);
        }
    }
}

fn chunk_sums<T: Activation>(
    sum: &mut [f32],
    dot: &mut [f32],
    dz: &[T],
    x: &[T],
    mean: &[f32],
    inv_std: &[f32],
) {
    let mean = repeated(mean, mean.len());
    sum_wide([sum, &mut *dot], |[sum, dot]| add_products(sum, dot, dz, x, &mean));
    for (dot, inv_std) in dot.iter_mut().zip(inv_std) {
        *dot *= inv_std;
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn add_products<T: Activation>(sum: &mut [f32], dot: &mut [f32], dz: &[T], x: &[T], mean: &[f32]) {
    let width = sum.len();
    for (dz, x) in dz.chunks(width).zip(x.chunks(width)) {
        let out = sum.iter_mut().zip(dot.iter_mut());
        for ((((sum, dot), dz), x), mean) in out.zip(dz).zip(x).zip(mean) {
            *sum += dz.load();
            *dot += dz.load() * (x.load() - mean);
        }
    }
}

pub(super) fn sum_groups(total: &mut [f32], sums: &[f32], which: usize) {
    let c = total.len();
    total.fill(0.0);
    for group in sums.chunks_exact((2 * c).max(1)) {
        for (total, sum) in total.iter_mut().zip(&group[which * c..]) {
            *total += sum;
        }
    }
}

pub(super) fn input_gradient<T: Activation>(
    dx: &mut [T],
    dz: &[T],
    sums: &[f32],
    saved: &Saved,
    accumulate: bool,
) {
    let (lines, width) = (backward_lines(sums, saved), width(saved.dims.c));
    for_chunks(dx, saved.dims, |g, at, dx| {
        let line = &lines[3 * g * width..][..3 * width];
        let x = &saved.x.data::<T>()[at..][..dx.len()];
        input_gradient_rows(dx, &dz[at..][..x.len()], x, line, accumulate);
    });
}

/// [`input_gradient`] of batch norm and ReLU, in place: `dx` holds the gradient of the ReLU's output on entry.
pub(super) fn rectified_input_gradient<T: Activation>(dx: &mut [T], sums: &[f32], saved: &Saved) {
    let (forward, backward) = (forward_lines(saved), backward_lines(sums, saved));
    let width = width(saved.dims.c);
    for_chunks(dx, saved.dims, |g, at, dx| {
        let [forward, backward] = [&forward, &backward].map(|l| &l[3 * g * width..][..3 * width]);
        let x = &saved.x.data::<T>()[at..][..dx.len()];
        rectified_input_gradient_rows(dx, x, forward, backward);
    });
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn rectified_input_gradient_rows<T: Activation>(
    dx: &mut [T],
    x: &[T],
    forward: &[f32],
    backward: &[f32],
) {
    let width = forward.len() / 3;
    let (mean, forward) = forward.split_at(width);
    let (a, b) = forward.split_at(width);
    let (to_dz, rest) = backward.split_at(width);
    let (to_x, constant) = rest.split_at(width);
    for (dx, x) in dx.chunks_mut(width).zip(x.chunks(width)) {
        let line = mean.iter().zip(a).zip(b).zip(to_dz.iter().zip(to_x).zip(constant));
        for ((dx, x), (((mean, a), b), ((to_dz, to_x), constant))) in dx.iter_mut().zip(x).zip(line)
        {
            let x = x.load();
            let dz = if_positive((x - mean) * a + b, dx.load());
            *dx = T::store(to_dz * dz + to_x * x + constant);
        }
    }
}

/// For each group a, b and d of `dx = a dz + b x + d`, repeated to the width of a wide row.
fn backward_lines(sums: &[f32], saved: &Saved) -> Vec<f32> {
    let BatchNormDims { groups, c, .. } = saved.dims;
    let rows = saved.dims.all_rows();
    let mut lines = vec![0.0; 3 * groups * c];
    for (g, line) in lines.chunks_exact_mut((3 * c).max(1)).enumerate() {
        let (scale, mean) = scale_and_mean(saved, g);
        let inv_std = &saved.inv_std.data::<f32>()[g * c..];
        let (sum, dot) = sums[2 * g * c..][..2 * c].split_at(c);
        for j in 0..c {
            let a = scale(j);
            let b = -a * inv_std[j] * dot[j] / rows as f32;
            line[j] = a;
            line[c + j] = b;
            line[2 * c + j] = -a * sum[j] / rows as f32 - b * mean[j];
        }
    }
    repeated(&lines, c)
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn input_gradient_rows<T: Activation>(
    dx: &mut [T],
    dz: &[T],
    x: &[T],
    line: &[f32],
    accumulate: bool,
) {
    let width = line.len() / 3;
    let (a, rest) = line.split_at(width);
    let (b, d) = rest.split_at(width);
    let inputs = dz.chunks(width).zip(x.chunks(width));
    for (dx, (dz, x)) in dx.chunks_mut(width).zip(inputs) {
        let line = a.iter().zip(b).zip(d);
        for (((dx, dz), x), ((a, b), d)) in dx.iter_mut().zip(dz).zip(x).zip(line) {
            let value = a * dz.load() + b * x.load() + d;
            *dx = T::store(if accumulate { dx.load() + value } else { value });
        }
    }
}

pub(super) fn move_running(running: &mut [f32], batch: &[f32], factor: f64) {
    let c = running.len();
    let groups = batch.len() / c.max(1);
    let weight = RUNNING_WEIGHT * factor / groups as f64;
    for (j, running) in running.iter_mut().enumerate() {
        let sum: f64 = batch.iter().skip(j).step_by(c).map(|&b| f64::from(b)).sum();
        *running = (f64::from(*running) * (1.0 - RUNNING_WEIGHT) + weight * sum) as f32;
    }
}

/// `gain inv_std` of a channel as a function, and the means, of one group.
fn scale_and_mean(saved: &Saved, group: usize) -> (impl Fn(usize) -> f32 + '_, &[f32]) {
    let c = saved.dims.c;
    let inv_std = &saved.inv_std.data::<f32>()[group * c..];
    let gain = saved.gain.as_ref().map(Tensor::data::<f32>);
    (move |j| inv_std[j] * gain.map_or(1.0, |g| g[j]), &saved.mean.data()[group * c..])
}

/// Calls `f(group, first element, rows)` for chunks of rows in parallel.
fn for_chunks<T: Send>(
    out: &mut [T],
    dims: BatchNormDims,
    f: impl Fn(usize, usize, &mut [T]) + Sync,
) {
    if dims.len() == 0 {
        return;
    }
    let chunk = chunk_rows(dims.c) * dims.c;
    out.par_chunks_mut(dims.len()).enumerate().each(|(g, out)| {
        out.par_chunks_mut(chunk).enumerate().each(|(i, rows)| {
            f(g, g * dims.len() + i * chunk, rows);
        });
    });
}

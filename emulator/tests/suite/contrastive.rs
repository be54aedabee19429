//! Losses over similarities, and the split into bf16 terms that they read, against their definitions in f64.

use half::bf16;

use crate::losses::{accumulated, by_rows, dot, int, long, mean_loss, unit_rows, wide};
use crate::numbers::{close, noise};
use crate::stage::{Memory, Stage, Value};

/// Logits from three or two terms have an error of about 2^-24 / T or 2^-16 / T, which is the relative error of exponentials.
fn tolerance(terms: usize, temperature: f64) -> f64 {
    let bits = if terms == 3 { 22 } else { 16 };
    (1.0 / 2.0_f64.powi(bits) / temperature).max(1e-5)
}

/// Splits rows into bf16 terms; returns the terms and their pitch.
pub fn split(stage: &Stage, x: &[f32], d: usize, terms: usize) -> (Memory<bf16>, usize) {
    let (rows, pitch) = (x.len() / d, d.next_multiple_of(8));
    let (x, terms_) = (stage.upload(x), stage.room::<bf16>(terms * rows * pitch));
    let arguments = [(&terms_).into(), (&x).into(), long(rows), int(d), int(pitch), int(terms)];
    stage.launch("split_rows", [2, 1, 1], [64, 1, 1], 0, &arguments);
    (terms_, pitch)
}

/// Each term is the bf16 nearest to the remainder, and zero beyond column `d`.
#[test]
fn rows_split_into_terms() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (rows, d, count) in [(1, 1, 1), (3, 7, 2), (5, 8, 3), (2, 131, 3)] {
            let x: Vec<f32> = noise(rows * d, 9);
            let (terms, pitch) = split(&stage, &x, d, count);
            let terms = terms.read(&stage);
            for (i, t) in (0..rows).flat_map(|i| (0..pitch).map(move |t| (i, t))) {
                let mut rest = if t < d { x[i * d + t] } else { 0.0 };
                for p in 0..count {
                    let term = terms[(p * rows + i) * pitch + t];
                    assert_eq!(term, bf16::from_f32(rest), "[{rows}, {d}]: term {p}");
                    rest -= term.to_f32();
                }
            }
        }
    }
}

/// NT-Xent of unit rows `z [rows, d]` in f64: the log-sum-exp and the loss of each row, and the gradient of their sum over T.
struct NtXent {
    lse: Vec<f64>,
    row_losses: Vec<f64>,
    dz: Vec<f64>,
}

impl NtXent {
    fn of(z: &[f32], d: usize, temperature: f64) -> Self {
        let (z, rows) = (wide(z), z.len() / d);
        let logit = |i: usize, j: usize| dot(&z[i * d..][..d], &z[j * d..][..d]) / temperature;
        let positive = |i: usize| (i + rows / 2) % rows;
        let others = |i: usize| (0..rows).filter(move |&j| j != i);
        let lse = |i: usize| {
            let max = others(i).map(|j| logit(i, j)).fold(f64::NEG_INFINITY, f64::max);
            others(i).map(|j| (logit(i, j) - max).exp()).sum::<f64>().ln() + max
        };
        let lse: Vec<f64> = (0..rows).map(lse).collect();
        let row_losses = (0..rows).map(|i| lse[i] - logit(i, positive(i))).collect();
        let mut dz = vec![0.0; rows * d];
        for i in 0..rows {
            for j in others(i) {
                let target = if j == positive(i) { 2.0 } else { 0.0 };
                let weight = (logit(i, j) - lse[i]).exp() + (logit(i, j) - lse[j]).exp() - target;
                (0..d).for_each(|t| dz[i * d + t] += weight / temperature * z[j * d + t]);
            }
        }
        Self { lse, row_losses, dz }
    }
}

/// NT-Xent with sums over groups of `group` tiles, or online over `128 group` columns at a low temperature and on one of several
/// `ranks`. The gradient is split-K, with `columns_per_split` columns in each split.
fn nt_xent(
    stage: &Stage,
    [all, d, terms]: [usize; 3],
    ranks: usize,
    temperature: f64,
    group: usize,
    columns_per_split: usize,
) {
    let z = unit_rows(all, d, 3);
    let exact = NtXent::of(&z, d, temperature);
    let (of_all, pitch) = split(stage, &z, d, terms);
    let (half, share) = (all / 2, all / 2 / ranks);
    for first in (0..half).step_by(share) {
        let what = format!("nt_xent [{all}, {d}] from {first} at {temperature}, {terms} terms");
        let rows = 2 * share;
        // The own part of rows of all ranks, `width` values each.
        let own = |values: &[f64], width: usize| {
            let view = |v: usize| &values[(v * half + first) * width..][..share * width];
            [view(0), view(1)].concat()
        };
        let own_z: Vec<f32> = own(&wide(&z), d).iter().map(|&v| v as f32).collect();
        let (z_, dy_) = (stage.upload(&own_z), stage.upload(&[0.7_f32]));
        let (terms_, _) = split(stage, &own_z, d, terms);
        let tiles = [rows, all].map(|count| count.div_ceil(128));
        let groups = tiles[1].div_ceil(group);
        let (maxima, sums) = (stage.room::<f32>(groups * rows), stage.room::<f32>(groups * rows));
        let inv_t = || Value::from(1.0 / temperature);
        let places = || [int(rows), int(all), int(first)];
        let online = temperature < 0.025 || ranks > 1;
        if online {
            let mut arguments: Vec<Value> = [&maxima, &sums].map(Value::from).into();
            arguments.extend([(&terms_).into(), (&of_all).into()]);
            arguments.extend(places());
            arguments.extend([int(pitch), int(terms), int(128 * group), inv_t()]);
            let grid = [tiles[0] as u32, groups as u32, 1];
            stage.launch("nt_xent_sums_online", grid, [128, 1, 1], 0, &arguments);
        } else {
            let mut arguments: Vec<Value> = vec![(&sums).into(), (&terms_).into(), int(rows)];
            arguments.extend([int(pitch), int(terms), int(group), inv_t()]);
            let grid = [(groups * (groups + 1) / 2) as u32, 1, 1];
            stage.launch("nt_xent_sums", grid, [128, 1, 1], 0, &arguments);
        }
        let (lse_, losses_) = (stage.room::<f32>(rows), stage.room::<f32>(rows));
        let maxima = if online { Value::from(&maxima) } else { 0_u64.into() };
        let mut arguments: Vec<Value> = [&lse_, &losses_].map(Value::from).into();
        arguments.extend([maxima, (&sums).into(), (&z_).into()]);
        arguments.extend([int(rows), int(d), int(groups), inv_t()]);
        by_rows(stage, "nt_xent_finish", rows, &arguments);
        let row_losses = own(&exact.row_losses, 1);
        let loss = row_losses.iter().sum::<f64>() / rows as f64;
        close(&format!("{what}: lse"), &lse_.read(stage), &own(&exact.lse, 1), 1e-5);
        close(&format!("{what}: row losses"), &losses_.read(stage), &row_losses, 1e-5);
        close(&what, &mean_loss(stage, &losses_), &[loss], 1e-5);

        let splits = all.div_ceil(columns_per_split);
        let partial = stage.room::<f32>(splits * rows * d);
        let lse: Vec<f32> = exact.lse.iter().map(|&v| v as f32).collect();
        let lse_ = stage.upload(&lse);
        let mut arguments: Vec<Value> = vec![(&partial).into(), (&terms_).into()];
        arguments.extend([(&of_all).into(), (&lse_).into(), (&dy_).into()]);
        arguments.extend(places());
        arguments.extend([int(d), int(pitch), int(columns_per_split), inv_t()]);
        let grid = [rows.div_ceil(64), d.div_ceil(128), splits].map(|size| size as u32);
        stage.launch(&format!("nt_xent_gradient_{terms}"), grid, [128, 1, 1], 0, &arguments);
        let old: Vec<f32> = noise(rows * d, 4);
        let dz_ = stage.upload(&old);
        let arguments =
            [(&dz_).into(), (&partial).into(), int(splits), long(rows * d), Value::from(1)];
        stage.launch("split_k_reduce_f32", [2, 1, 1], [64, 1, 1], 0, &arguments);
        let scale = f64::from(0.7_f32) / rows as f64;
        let dz: Vec<f64> = own(&exact.dz, d).iter().map(|v| scale * v).collect();
        let tolerance = tolerance(terms, temperature);
        close(&format!("{what}: dz"), &dz_.read(stage), &accumulated(&old, &dz), tolerance);
    }
}

#[test]
fn nt_xent_at_any_temperature() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for sizes in [[4, 1, 3], [6, 5, 2], [62, 64, 2], [128, 7, 3], [130, 131, 2]] {
            nt_xent(&stage, sizes, 1, 0.5, 1, 64);
            nt_xent(&stage, sizes, 1, 0.01, 1, 128);
        }
        nt_xent(&stage, [66, 16, 3], 1, 0.025, 1, 64);
        nt_xent(&stage, [386, 8, 2], 1, 0.5, 2, 192); // four tiles in two groups
    }
}

/// The rows and gradients of one of several ranks, whose rows and positives lie in any tile, and on both sides of a tile's edge.
#[test]
fn nt_xent_of_a_share_of_the_rows() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (sizes, ranks) in [([4, 3, 3], 2), ([66, 16, 2], 3), ([260, 8, 2], 2), ([252, 5, 3], 7)]
        {
            nt_xent(&stage, sizes, ranks, 0.5, 1, 64);
            nt_xent(&stage, sizes, ranks, 0.1, 2, 128);
        }
    }
}

/// InfoNCE with a queue of `m` rows; the rows in the range `own`, if any, are keys of the batch itself, in which the queries are those
/// from number `first` on of `batch`.
fn info_nce(
    stage: &Stage,
    [n, m, d]: [usize; 3],
    [batch, first]: [usize; 2],
    own: [usize; 2],
    temperature: f64,
    terms: usize,
    columns_per_split: usize,
) {
    let what = format!("info_nce [{n}, {d}] of {m}, own {own:?}, at {temperature}, {terms} terms");
    let (q, k, queue) = (unit_rows(n, d, 3), unit_rows(n, d, 4), unit_rows(m, d, 5));
    let (q_, k_) = (stage.upload(&q), stage.upload(&k));
    let ((of_q, pitch), (of_queue, _)) =
        (split(stage, &q, d, terms), split(stage, &queue, d, terms));
    let (own_, dy_) = (stage.upload(&own.map(|o| o as i32)), stage.upload(&[0.7_f32]));
    let own_ = || if own == [0, 0] { 0_u64.into() } else { Value::from(&own_) };
    let inv_t = || Value::from(1.0 / temperature);
    let splits = m.div_ceil(columns_per_split);
    let (maxima, sums) = (stage.room::<f32>(splits * n), stage.room::<f32>(splits * n));
    let mut arguments: Vec<Value> = vec![(&maxima).into(), (&sums).into(), (&of_q).into()];
    arguments.extend([(&of_queue).into(), own_(), int(n), int(m)]);
    arguments.extend([int(batch), int(first), int(pitch), int(terms)]);
    arguments.extend([int(columns_per_split), inv_t()]);
    let grid = [n.div_ceil(128) as u32, splits as u32, 1];
    stage.launch("info_nce_sums", grid, [128, 1, 1], 0, &arguments);
    let (lse_, losses_) = (stage.room::<f32>(n), stage.room::<f32>(n));
    let mut arguments: Vec<Value> =
        [&lse_, &losses_, &maxima, &sums, &q_, &k_].map(Value::from).into();
    arguments.extend([int(n), int(d), int(splits), inv_t()]);
    by_rows(stage, "info_nce_finish", n, &arguments);

    let (q, k, queue) = (wide(&q), wide(&k), wide(&queue));
    let row = |x: &[f64], i: usize| x[i * d..][..d].to_vec();
    let positive = |i: usize| dot(&row(&q, i), &row(&k, i)) / temperature;
    let logit = |i: usize, j: usize| dot(&row(&q, i), &row(&queue, j)) / temperature;
    let skips =
        |i: usize, j: usize| (own[0]..own[1]).contains(&j) && (j - own[0]) % batch == first + i;
    let others = |i: usize| (0..m).filter(move |&j| !skips(i, j));
    let lse = |i: usize| {
        let max = others(i).map(|j| logit(i, j)).fold(positive(i), f64::max);
        let sum = others(i).map(|j| (logit(i, j) - max).exp()).sum::<f64>();
        ((positive(i) - max).exp() + sum).ln() + max
    };
    let lse: Vec<f64> = (0..n).map(lse).collect();
    let row_losses: Vec<f64> = (0..n).map(|i| lse[i] - positive(i)).collect();
    let tolerance = tolerance(terms, temperature);
    close(&format!("{what}: lse"), &lse_.read(stage), &lse, tolerance);
    close(&format!("{what}: row losses"), &losses_.read(stage), &row_losses, tolerance);

    let partial = stage.room::<f32>(splits * n * d);
    let mut arguments: Vec<Value> = vec![(&partial).into(), (&of_q).into(), (&of_queue).into()];
    arguments.extend([own_(), (&lse_).into(), (&dy_).into()]);
    arguments.extend([int(n), int(m), int(batch), int(first), int(d), int(pitch)]);
    arguments.extend([int(columns_per_split), inv_t()]);
    let grid = [n.div_ceil(64), d.div_ceil(128), splits].map(|size| size as u32);
    stage.launch(&format!("info_nce_gradient_{terms}"), grid, [128, 1, 1], 0, &arguments);
    let (dq_, dk_) = (stage.room::<f32>(n * d), stage.room::<f32>(n * d));
    let mut arguments: Vec<Value> = [&dq_, &partial, &q_, &k_, &lse_, &dy_].map(Value::from).into();
    arguments.extend([int(n), int(d), int(splits), inv_t()]);
    by_rows(stage, "info_nce_query_finish", n, &arguments);
    let mut arguments: Vec<Value> = [&dk_, &q_, &k_, &lse_, &dy_].map(Value::from).into();
    arguments.extend([int(n), int(d), inv_t()]);
    by_rows(stage, "info_nce_key_gradient", n, &arguments);
    let scale = f64::from(0.7_f32) / (n as f64 * temperature);
    let (mut dq, mut dk) = (vec![0.0; n * d], vec![0.0; n * d]);
    for i in 0..n {
        let own = scale * ((positive(i) - lse[i]).exp() - 1.0);
        for t in 0..d {
            let term = |j: usize| (logit(i, j) - lse[i]).exp() * queue[j * d + t];
            dq[i * d + t] = own * k[i * d + t] + scale * others(i).map(term).sum::<f64>();
            dk[i * d + t] = own * q[i * d + t];
        }
    }
    close(&format!("{what}: dq"), &dq_.read(stage), &dq, tolerance);
    close(&format!("{what}: dk"), &dk_.read(stage), &dk, tolerance);
}

#[test]
fn info_nce_with_a_queue() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for sizes in [[1, 1, 2], [3, 7, 5], [65, 130, 31], [2, 63, 131]] {
            info_nce(&stage, sizes, [sizes[0], 0], [0, 0], 0.2, 2, 128);
            info_nce(&stage, sizes, [sizes[0], 0], [0, 0], 0.01, 3, 256);
        }
        info_nce(&stage, [3, 70, 5], [3, 0], [4, 10], 0.2, 3, 128);
        info_nce(&stage, [64, 128, 9], [64, 0], [0, 128], 0.01, 3, 128);
        info_nce(&stage, [2, 2, 4], [2, 0], [0, 2], 0.2, 2, 128);
        // The second of two ranks, and the last of three.
        info_nce(&stage, [3, 70, 5], [6, 3], [4, 16], 0.2, 3, 128);
        info_nce(&stage, [40, 300, 9], [120, 80], [30, 270], 0.2, 2, 128);
    }
}

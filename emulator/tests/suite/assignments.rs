//! Sinkhorn assignments and nearest neighbours against their definitions in f64.

use half::bf16;

use crate::contrastive::split;
use crate::numbers::{Float, close, noise};
use crate::stage::{Memory, Stage, Value};

fn int(x: usize) -> Value {
    Value::from(x as i32)
}

fn long(x: usize) -> Value {
    Value::from(x as i64)
}

/// Three iterations over scores that are `raised` by so much.
fn sinkhorn<T: Float>(stage: &Stage, b: usize, k: usize, epsilon: f64, raised: f64) {
    let iterations = 3;
    let what = format!("sinkhorn_{} [{b}, {k}] at {epsilon}, raised by {raised}", T::NAME);
    let scores: Vec<T> = noise(b * k, 1);
    let scores: Vec<T> = scores.iter().map(|s| T::from_f64(s.to_f64() + raised)).collect();
    let scores_ = stage.upload(&scores);
    let (maxima, max) = (stage.room::<f32>(3), stage.room::<f32>(1));
    let (q, u) = (stage.room::<f32>(b * k), stage.room::<f64>(k));
    let per_chunk = 13;
    let chunks = b.div_ceil(per_chunk);
    let (partial, sums) = (stage.room::<f64>(chunks * k), stage.room::<f64>(k));
    let flat = |name: &str, grid: usize, arguments: &[Value]| {
        stage.launch(name, [grid as u32, 1, 1], [256, 1, 1], 0, arguments);
    };
    let largest = format!("sinkhorn_max_{}", T::NAME);
    flat(&largest, 3, &[(&maxima).into(), (&scores_).into(), long(b * k)]);
    flat("sinkhorn_max_f32", 1, &[(&max).into(), (&maxima).into(), long(3)]);
    let inv_epsilon = || Value::from((1.0 / epsilon) as f32);
    for iteration in 0..iterations {
        let u_ = if iteration == 0 { 0_u64.into() } else { Value::from(&u) };
        let mut arguments: Vec<Value> = vec![(&partial).into(), (&scores_).into(), (&max).into()];
        arguments.extend([u_, int(b), int(k), int(per_chunk), (b as f64).into(), inv_epsilon()]);
        flat(&format!("sinkhorn_columns_{}", T::NAME), chunks, &arguments);
        let share = |to: &Memory<f64>, from: &Memory<f64>, chunks: usize, parts: f64| {
            let arguments = [to.into(), from.into(), int(chunks), int(k), parts.into()];
            let grid = [k.div_ceil(32) as u32, 1, 1];
            stage.launch("sinkhorn_column_factors", grid, [32, 8, 1], 0, &arguments);
        };
        if iteration % 2 == 0 {
            share(&u, &partial, chunks, k as f64);
        } else {
            // As in a process group: the sums first, then the shares.
            share(&sums, &partial, chunks, 0.0);
            share(&u, &sums, 1, k as f64);
        }
    }
    let mut arguments: Vec<Value> = vec![(&q).into(), (&scores_).into(), (&max).into()];
    arguments.extend([(&u).into(), int(b), int(k), (b as f64).into(), inv_epsilon()]);
    flat(&format!("sinkhorn_assign_{}", T::NAME), b.div_ceil(8), &arguments);
    let got = q.read(stage);

    let scores: Vec<f64> = scores.iter().map(|s| s.to_f64()).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    assert_eq!(f64::from(max.read(stage)[0]), most, "{what}: the largest");
    let mut q: Vec<f64> = scores.iter().map(|s| ((s - most) / epsilon).exp()).collect();
    for _ in 0..iterations {
        let columns: Vec<f64> = (0..k).map(|j| q.iter().skip(j).step_by(k).sum()).collect();
        for row in q.chunks_exact_mut(k) {
            row.iter_mut().zip(&columns).for_each(|(q, sum)| *q /= k as f64 * sum);
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|q| *q /= b as f64 * sum);
        }
    }
    let want: Vec<f64> = q.iter().map(|q| q * b as f64).collect();
    close(&what, &got, &want, 1e-5);
}

#[test]
fn sinkhorn_assignments() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (b, k) in [(1, 1), (7, 13), (14, 257), (53, 8), (3, 300)] {
            sinkhorn::<f32>(&stage, b, k, 0.05, 0.0);
            sinkhorn::<bf16>(&stage, b, k, 0.5, 0.0);
        }
        // Exponentials of such scores are beyond f32: only differences from the largest are computed with.
        sinkhorn::<f32>(&stage, 7, 13, 0.05, 5.0);
    }
}

#[test]
fn a_prototype_whose_column_underflows_gets_no_assignment() {
    let stage = Stage::take(true);
    let scores = stage.upload(&[-200.0_f32, 0.0, -200.0, 0.0]);
    let (max, u, partial) = (stage.upload(&[0.0_f32]), stage.room::<f64>(2), stage.room::<f64>(2));
    let mut arguments: Vec<Value> = vec![(&partial).into(), (&scores).into(), (&max).into()];
    arguments.extend([0_u64.into(), int(2), int(2), int(2), 2.0_f64.into(), 1.0_f32.into()]);
    stage.launch("sinkhorn_columns_f32", [1, 1, 1], [256, 1, 1], 0, &arguments);
    let arguments = [(&u).into(), (&partial).into(), int(1), int(2), 2.0_f64.into()];
    stage.launch("sinkhorn_column_factors", [1, 1, 1], [32, 8, 1], 0, &arguments);
    assert_eq!(u.read(&stage), [0.0, 0.25]);
}

fn unit_rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut rows: Vec<f32> = noise(n * d, seed);
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    }
    rows
}

/// Nearest neighbours of `n` queries among `m` bank rows, with the bank in chunks; `flat` makes many similarities equal.
fn neighbours(stage: &Stage, [n, m, d, k]: [usize; 4], chunk: usize, flat: bool) {
    let what = format!("knn of {n} among {m}, k {k}, chunks of {chunk}");
    let rows = |n: usize, seed: u64| {
        let mut rows = unit_rows(n, d, seed);
        if flat {
            // Exact in any order of summation, of both signs, and often equal.
            rows.iter_mut().for_each(|v| *v = (*v * 4.0).round() / 4.0);
        }
        rows
    };
    let (queries, bank) = (rows(n, 1), rows(m, 2));
    let (queries_, pitch) = split(stage, &queries, d, 3);
    let (values, indices) = (stage.room::<f32>(n * k), stage.room::<i32>(n * k));
    let mut similar = vec![0.0_f32; n * m];
    for first in (0..m).step_by(chunk) {
        stage.seed(first as u64 + 1); // candidates are buffered in a random order
        let columns = chunk.min(m - first);
        let s = stage.room::<f32>(n * columns);
        let (chunk_, _) = split(stage, &bank[first * d..][..columns * d], d, 3);
        let mut arguments: Vec<Value> = vec![(&s).into(), (&queries_).into(), (&chunk_).into()];
        arguments.extend([n, columns, pitch, 3].map(int));
        let grid = [(n.div_ceil(128) * columns.div_ceil(128)) as u32, 1, 1];
        stage.launch("knn_similarities", grid, [128, 1, 1], 0, &arguments);
        let mut arguments: Vec<Value> = vec![(&values).into(), (&indices).into(), (&s).into()];
        arguments.extend([n, first, columns, k, usize::from(first > 0)].map(int));
        stage.launch("knn_top_k", [n.div_ceil(2) as u32, 1, 1], [256, 1, 1], 0, &arguments);
        for (i, row) in s.read(stage).chunks_exact(columns).enumerate() {
            similar[i * m + first..][..columns].copy_from_slice(row);
        }
    }

    let exact = |i: usize, j: usize| {
        let pairs = queries[i * d..][..d].iter().zip(&bank[j * d..][..d]);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    let want: Vec<f64> = (0..n * m).map(|e| exact(e / m, e % m)).collect();
    close(&what, &similar, &want, 1e-5);
    let (values, indices) = (values.read(stage), indices.read(stage));
    for i in 0..n {
        // The selection must be exact for the computed similarities.
        let similar = &similar[i * m..][..m];
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by(|&a, &b| similar[b].total_cmp(&similar[a]).then(a.cmp(&b)));
        order.truncate(k);
        let mut want: Vec<i32> = order.iter().map(|&j| j as i32).collect();
        let mut want_values: Vec<f32> = order.iter().map(|&j| similar[j]).collect();
        want.resize(k, -1);
        want_values.resize(k, f32::NEG_INFINITY);
        assert_eq!(indices[i * k..][..k], want, "{what}: neighbours of {i}");
        assert_eq!(values[i * k..][..k], want_values, "{what}: similarities of {i}");
    }
}

#[test]
fn neighbours_are_exact() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        neighbours(&stage, [1, 1, 1, 1], 64, false);
        neighbours(&stage, [3, 5, 7, 8], 4, false); // k exceeds the bank
        neighbours(&stage, [5, 701, 16, 200], 701, false);
        neighbours(&stage, [3, 1031, 5, 256], 400, false);
        neighbours(&stage, [2, 1031, 3, 255], 257, true);
        neighbours(&stage, [2, 97, 4, 1], 31, true);
        neighbours(&stage, [65, 130, 9, 13], 65, false);
    }
}

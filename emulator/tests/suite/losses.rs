//! Row normalisation and losses over rows against their definitions in f64.

use half::bf16;

use crate::numbers::{Float, close, labels, noise};
use crate::stage::{Memory, Stage, Value};

pub fn int(x: usize) -> Value {
    Value::from(x as i32)
}

pub fn long(x: usize) -> Value {
    Value::from(x as i64)
}

/// A launch with one warp per row.
pub fn by_rows(stage: &Stage, name: &str, rows: usize, arguments: &[Value]) {
    stage.launch(name, [rows.div_ceil(4) as u32, 1, 1], [128, 1, 1], 0, arguments);
}

/// The loss: the mean of the row losses.
pub fn mean_loss(stage: &Stage, row_losses: &Memory<f32>) -> Vec<f32> {
    let loss = stage.room::<f32>(1);
    let arguments = [(&loss).into(), row_losses.into(), int(row_losses.len)];
    stage.launch("row_losses_mean", [1, 1, 1], [256, 1, 1], 0, &arguments);
    loss.read(stage)
}

pub fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Seeded unit rows, rounded to f32.
pub fn unit_rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut rows: Vec<f32> = noise(n * d, seed);
    for row in rows.chunks_exact_mut(d) {
        let norm = dot(&wide(row), &wide(row)).sqrt();
        row.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
    }
    rows
}

/// Scales a row of up to 400 numbers to a norm below the eps of `l2_normalize`, but not to zero.
const TINY: f64 = 5e-14;

/// The accumulated gradient: `old + new`.
pub fn accumulated(old: &[f32], new: &[f64]) -> Vec<f64> {
    old.iter().zip(new).map(|(a, b)| f64::from(*a) + b).collect()
}

fn l2_normalize<In: Float>(stage: &Stage, n: usize, d: usize) {
    let suffix = In::NAME;
    let what = format!("l2_normalize_{suffix} [{n}, {d}]");
    let mut x: Vec<In> = noise(n * d, 1);
    x[..d].iter_mut().for_each(|v| *v = In::from_f64(v.to_f64() * TINY));
    let dy: Vec<f32> = noise(n * d, 2);
    let (x_, dy_) = (stage.upload(&x), stage.upload(&dy));
    let (y_, norms_) = (stage.room::<f32>(n * d), stage.room::<f32>(n));
    let arguments = [(&y_).into(), (&norms_).into(), (&x_).into(), long(n), int(d)];
    by_rows(stage, &format!("l2_normalize_{suffix}"), n, &arguments);
    let (x, dy, y) = (wide(&x), wide(&dy), wide(&y_.read(stage)));
    let norm = |i: usize| dot(&x[i * d..][..d], &x[i * d..][..d]).sqrt();
    let want: Vec<f64> = (0..n * d).map(|e| x[e] / norm(e / d).max(1e-12)).collect();
    close(&what, &y_.read(stage), &want, 1e-5);
    close(&what, &norms_.read(stage), &(0..n).map(norm).collect::<Vec<_>>(), 1e-5);

    // Computed from the rounded outputs, which the kernel reads.
    let gradient = |e: usize| {
        let row = e / d * d..e / d * d + d;
        let along = if norm(e / d) > 1e-12 { dot(&y[row.clone()], &dy[row]) } else { 0.0 };
        (dy[e] - y[e] * along) / norm(e / d).max(1e-12)
    };
    let want: Vec<f64> = (0..n * d).map(gradient).collect();
    let dx_ = stage.room::<In>(n * d);
    let mut arguments: Vec<Value> = vec![(&dx_).into(), (&dy_).into(), (&y_).into()];
    arguments.extend([(&norms_).into(), long(n), int(d)]);
    by_rows(stage, &format!("l2_normalize_backward_{suffix}"), n, &arguments);
    let got = dx_.read(stage);
    // Rows below eps have a gradient of 1e12, which would hide errors in the others.
    close(&format!("{what}: dx below eps"), &got[..d], &want[..d], In::TOLERANCE);
    close(&format!("{what}: dx"), &got[d..], &want[d..], In::TOLERANCE);
}

const ROW_SHAPES: [(usize, usize); 6] = [(1, 1), (2, 3), (5, 8), (7, 31), (3, 257), (37, 128)];

#[test]
fn l2_normalize_of_rows() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (n, d) in ROW_SHAPES {
            l2_normalize::<f32>(&stage, n, d);
            l2_normalize::<bf16>(&stage, n, d);
        }
    }
}

#[test]
fn rows_are_normalized_in_place() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (n, d) in ROW_SHAPES {
            let mut x: Vec<f32> = noise(n * d, 1);
            x[..d].iter_mut().for_each(|v| *v *= TINY as f32);
            let (x_, copy_) = (stage.upload(&x), stage.room::<bf16>(n * d));
            let arguments = [(&x_).into(), (&copy_).into(), long(n), int(d)];
            by_rows(&stage, "normalize_rows", n, &arguments);
            let x = wide(&x);
            let norm = |i: usize| dot(&x[i * d..][..d], &x[i * d..][..d]).sqrt().max(1e-12);
            let want: Vec<f64> = (0..n * d).map(|e| x[e] / norm(e / d)).collect();
            let got = x_.read(&stage);
            close(&format!("normalize_rows [{n}, {d}]"), &got, &want, 1e-6);
            let copy: Vec<bf16> = got.iter().map(|v| bf16::from_f32(*v)).collect();
            assert_eq!(copy_.read(&stage), copy);
        }
    }
}

fn cross_entropy<T: Float>(stage: &Stage, n: usize, k: usize) {
    let what = format!("cross_entropy_{} [{n}, {k}]", T::NAME);
    let x: Vec<T> =
        noise::<f32>(n * k, 5).iter().map(|v| T::from_f64(f64::from(*v) * 9.0 + 200.0)).collect();
    let labels = labels(n, k);
    let (x_, labels_, dy_) = (stage.upload(&x), stage.upload(&labels), stage.upload(&[0.7_f32]));
    let losses_ = stage.room::<f32>(n);
    let arguments = [(&losses_).into(), (&x_).into(), (&labels_).into(), long(n), int(k)];
    by_rows(stage, &format!("cross_entropy_{}", T::NAME), n, &arguments);
    let x = wide(&x);
    let lse = |i: usize| {
        let row = &x[i * k..][..k];
        row.iter().map(|v| (v - 200.0).exp()).sum::<f64>().ln() + 200.0
    };
    let row_losses: Vec<f64> = (0..n).map(|i| lse(i) - x[i * k + labels[i] as usize]).collect();
    close(&what, &losses_.read(stage), &row_losses, 1e-5);
    let loss = row_losses.iter().sum::<f64>() / n as f64;
    close(&what, &mean_loss(stage, &losses_), &[loss], 1e-5);

    let dx_ = stage.room::<T>(n * k);
    let mut want = vec![0.0; n * k];
    for e in 0..n * k {
        let target = f64::from(labels[e / k] as usize == e % k);
        want[e] = ((x[e] - lse(e / k)).exp() - target) * f64::from(0.7_f32) / n as f64;
    }
    let mut arguments: Vec<Value> = vec![(&dx_).into(), (&x_).into(), (&labels_).into()];
    arguments.extend([(&dy_).into(), long(n), int(k)]);
    by_rows(stage, &format!("cross_entropy_backward_{}", T::NAME), n, &arguments);
    close(&format!("{what}: dx"), &dx_.read(stage), &want, T::TOLERANCE);
}

#[test]
fn cross_entropy_of_labels() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (n, k) in ROW_SHAPES {
            cross_entropy::<f32>(&stage, n, k);
            cross_entropy::<bf16>(&stage, n, k);
        }
    }
}

#[test]
fn a_label_out_of_range_makes_the_loss_nan() {
    let stage = Stage::take(true);
    let (x, labels) = (stage.upload(&noise::<f32>(15, 1)), stage.upload(&[4, 5, -1]));
    let (losses, dx) = (stage.room::<f32>(3), stage.room::<f32>(15));
    by_rows(
        &stage,
        "cross_entropy_f32",
        3,
        &[(&losses).into(), (&x).into(), (&labels).into(), long(3), int(5)],
    );
    assert_eq!(
        losses.read(&stage).iter().map(|l| l.is_nan()).collect::<Vec<_>>(),
        [false, true, true]
    );
    let dy = stage.upload(&[1.0_f32]);
    let mut arguments: Vec<Value> = vec![(&dx).into(), (&x).into(), (&labels).into()];
    arguments.extend([(&dy).into(), long(3), int(5)]);
    by_rows(&stage, "cross_entropy_backward_f32", 3, &arguments);
    let dx = dx.read(&stage);
    assert!(dx[..5].iter().all(|v| v.is_finite()) && dx[5..].iter().all(|v| v.is_nan()));
}

fn neg_cosine<T: Float>(stage: &Stage, n: usize, d: usize) {
    let what = format!("neg_cosine_{} [{n}, {d}]", T::NAME);
    let (mut p, z): (Vec<T>, Vec<T>) = (noise(n * d, 7), noise(n * d, 8));
    if n > 2 {
        p[..d].iter_mut().for_each(|v| *v = T::from_f64(v.to_f64() * TINY));
    }
    let (p_, z_, dy_) = (stage.upload(&p), stage.upload(&z), stage.upload(&[0.7_f32]));
    let losses_ = stage.room::<f32>(n);
    let arguments = [(&losses_).into(), (&p_).into(), (&z_).into(), long(n), int(d)];
    by_rows(stage, &format!("neg_cosine_{}", T::NAME), n, &arguments);
    let (p, z) = (wide(&p), wide(&z));
    fn row(x: &[f64], i: usize, d: usize) -> &[f64] {
        &x[i * d..][..d]
    }
    let norm = |x: &[f64], i: usize| dot(row(x, i, d), row(x, i, d)).sqrt();
    let cosine = |i: usize| {
        let below = norm(&p, i).max(1e-12) * norm(&z, i).max(1e-12);
        dot(row(&p, i, d), row(&z, i, d)) / below
    };
    let row_losses: Vec<f64> = (0..n).map(|i| -cosine(i)).collect();
    close(&what, &losses_.read(stage), &row_losses, 1e-5);
    for (side, x_, x, other_, other) in [("p", &p_, &p, &z_, &z), ("z", &z_, &z, &p_, &p)] {
        let dx_ = stage.room::<T>(n * d);
        let gradient = |e: usize| {
            let i = e / d;
            let (own, far) = (norm(x, i).max(1e-12), norm(other, i).max(1e-12));
            let along = if norm(x, i) < 1e-12 { 0.0 } else { cosine(i) * x[e] / own };
            -(other[e] / far - along) / own * f64::from(0.7_f32) / n as f64
        };
        let mut arguments: Vec<Value> = vec![(&dx_).into(), x_.into(), other_.into()];
        arguments.extend([(&dy_).into(), long(n), int(d)]);
        by_rows(stage, &format!("neg_cosine_backward_{}", T::NAME), n, &arguments);
        let want: Vec<f64> = (0..n * d).map(gradient).collect();
        let (got, what) = (dx_.read(stage), format!("{what}: d{side}"));
        // A row below eps has a gradient of 1e12, which would hide errors in the others.
        close(&what, &got[..d], &want[..d], T::TOLERANCE);
        if n > 1 {
            close(&what, &got[d..], &want[d..], T::TOLERANCE);
        }
    }
}

#[test]
fn neg_cosine_of_rows() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        // With d = 1 the gradient is zero except for rounding.
        for (n, d) in ROW_SHAPES.into_iter().filter(|(_, d)| *d > 1) {
            neg_cosine::<f32>(&stage, n, d);
            neg_cosine::<bf16>(&stage, n, d);
        }
    }
}

fn soft_cross_entropy<T: Float>(stage: &Stage, n: usize, k: usize, temperature: f64) {
    let what = format!("soft_cross_entropy_{} [{n}, {k}] at {temperature}", T::NAME);
    let x: Vec<T> = noise(n * k, 9);
    let q: Vec<f32> = noise::<f32>(n * k, 10).iter().map(|v| v.abs()).collect();
    let (x_, q_, dy_) = (stage.upload(&x), stage.upload(&q), stage.upload(&[0.7_f32]));
    let losses_ = stage.room::<f32>(n);
    let inv_t = || Value::from(1.0 / temperature);
    let arguments = [(&losses_).into(), (&x_).into(), (&q_).into(), long(n), int(k), inv_t()];
    by_rows(stage, &format!("soft_cross_entropy_{}", T::NAME), n, &arguments);
    let (x, q) = (wide(&x), wide(&q));
    let lse = |i: usize| {
        let row = x[i * k..][..k].iter();
        row.map(|v| ((v - 1.0) / temperature).exp()).sum::<f64>().ln() + 1.0 / temperature
    };
    let lse: Vec<f64> = (0..n).map(lse).collect();
    let term = |e: usize| q[e] * (lse[e / k] - x[e] / temperature);
    let row_losses: Vec<f64> = (0..n).map(|i| (i * k..(i + 1) * k).map(term).sum()).collect();
    close(&what, &losses_.read(stage), &row_losses, 1e-5);

    let softmax: Vec<f64> = (0..n * k).map(|e| (x[e] / temperature - lse[e / k]).exp()).collect();
    let y_ = stage.room::<f32>(n * k);
    let arguments = [(&y_).into(), (&x_).into(), long(n), int(k), inv_t()];
    by_rows(stage, &format!("softmax_{}", T::NAME), n, &arguments);
    // The relative error of an exponential is the absolute error of its logit, about 2^-24 / T.
    let tolerance = (1.0 / 2.0_f64.powi(22) / temperature).max(1e-5);
    close(&format!("{what}: softmax"), &y_.read(stage), &softmax, tolerance);

    let dx_ = stage.room::<T>(n * k);
    let scale = f64::from(0.7_f32) / (n as f64 * temperature);
    let gradient = |e: usize| {
        let mass = q[e / k * k..][..k].iter().sum::<f64>();
        scale * (mass * softmax[e] - q[e])
    };
    let mut arguments: Vec<Value> = vec![(&dx_).into(), (&x_).into(), (&q_).into()];
    arguments.extend([(&dy_).into(), long(n), int(k), inv_t()]);
    by_rows(stage, &format!("soft_cross_entropy_backward_{}", T::NAME), n, &arguments);
    let want: Vec<f64> = (0..n * k).map(gradient).collect();
    close(&format!("{what}: dx"), &dx_.read(stage), &want, T::TOLERANCE);
}

#[test]
fn soft_cross_entropy_at_a_temperature() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        // With k = 1 the gradient is zero except for rounding.
        for (n, k) in ROW_SHAPES.into_iter().filter(|(_, k)| *k > 1) {
            for temperature in [1.0, 0.1] {
                soft_cross_entropy::<f32>(&stage, n, k, temperature);
                soft_cross_entropy::<bf16>(&stage, n, k, temperature);
            }
        }
    }
}

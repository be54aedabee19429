//! Selective kernels against their definition in f64.

use half::bf16;

use crate::numbers::{Float, close, noise};
use crate::stage::{Stage, Value};

fn selective_kernel<T: Float>(stage: &Stage, n: usize, pixels: usize, c: usize) {
    let name = |op: &str| format!("stream_{op}_{}", T::NAME);
    let what = |op: &str| format!("{} [{n}, {pixels}, 2 x {c}]", name(op));
    let wide = |x: &[T]| x.iter().map(|v| v.to_f64()).collect::<Vec<f64>>();
    let (x, logits, dy, dg): (Vec<T>, Vec<T>, Vec<T>, Vec<T>) = (
        noise(n * pixels * 2 * c, 1),
        noise(n * 2 * c, 2),
        noise(n * pixels * c, 3),
        noise(n * c, 4),
    );
    let (x_, logits_, dy_, dg_) =
        (stage.upload(&x), stage.upload(&logits), stage.upload(&dy), stage.upload(&dg));
    let vectors = c.div_ceil(16 / size_of::<T>()) as u32;
    let launch = |op: &str, mut arguments: Vec<Value>| {
        arguments.extend([Value::from(pixels as i64), Value::from(c as i32)]);
        let grid = [vectors.div_ceil(32), n as u32, 1];
        stage.launch(&name(op), grid, [32, 8, 1], 0, &arguments);
    };
    let at = |i: usize, p: usize, stream: usize, j: usize| ((i * pixels + p) * 2 + stream) * c + j;
    let (x, logits, dy, dg) = (wide(&x), wide(&logits), wide(&dy), wide(&dg));
    let weight = |i: usize, j: usize| {
        1.0 / (1.0 + (logits[(2 * i + 1) * c + j] - logits[2 * i * c + j]).exp())
    };

    let g_ = stage.room::<T>(n * c);
    launch("mean", vec![(&g_).into(), (&x_).into()]);
    let mean = |e: usize| {
        let (i, j) = (e / c, e % c);
        (0..pixels).map(|p| x[at(i, p, 0, j)] + x[at(i, p, 1, j)]).sum::<f64>() / pixels as f64
    };
    close(&what("mean"), &g_.read(stage), &(0..n * c).map(mean).collect::<Vec<_>>(), T::TOLERANCE);

    let y_ = stage.room::<T>(n * pixels * c);
    launch("select", vec![(&y_).into(), (&x_).into(), (&logits_).into()]);
    let select = |e: usize| {
        let (i, p, j) = (e / c / pixels, e / c % pixels, e % c);
        let a = weight(i, j);
        a * x[at(i, p, 0, j)] + (1.0 - a) * x[at(i, p, 1, j)]
    };
    let want: Vec<f64> = (0..n * pixels * c).map(select).collect();
    close(&what("select"), &y_.read(stage), &want, T::TOLERANCE);

    let (dx_, dlogits_) = (stage.room::<T>(x.len()), stage.room::<T>(logits.len()));
    let mut want_dx = vec![0.0; x.len()];
    let mut want_dlogits = vec![0.0; logits.len()];
    for i in 0..n {
        for j in 0..c {
            let a = weight(i, j);
            let mut sum = 0.0;
            for p in 0..pixels {
                let d = dy[(i * pixels + p) * c + j];
                want_dx[at(i, p, 0, j)] = a * d;
                want_dx[at(i, p, 1, j)] = (1.0 - a) * d;
                sum += d * (x[at(i, p, 0, j)] - x[at(i, p, 1, j)]);
            }
            want_dlogits[2 * i * c + j] = a * (1.0 - a) * sum;
            want_dlogits[(2 * i + 1) * c + j] = -a * (1.0 - a) * sum;
        }
    }
    let mut arguments: Vec<Value> = vec![(&dx_).into(), (&dlogits_).into(), (&dy_).into()];
    arguments.extend([(&x_).into(), (&logits_).into()]);
    launch("select_backward", arguments);
    close(&what("select: dx"), &dx_.read(stage), &want_dx, T::TOLERANCE);
    close(&what("select: dlogits"), &dlogits_.read(stage), &want_dlogits, T::TOLERANCE);

    launch("mean_backward", vec![(&dx_).into(), (&dg_).into()]);
    let want: Vec<f64> =
        (0..x.len()).map(|e| dg[e / (2 * c * pixels) * c + e % c] / pixels as f64).collect();
    close(&what("mean: dx"), &dx_.read(stage), &want, T::TOLERANCE);
}

#[test]
fn selective_kernels_of_any_size() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (n, pixels, c) in
            [(1, 1, 1), (2, 9, 3), (3, 8, 8), (1, 7, 131), (2, 25, 64), (2, 1, 259)]
        {
            selective_kernel::<f32>(&stage, n, pixels, c);
            selective_kernel::<bf16>(&stage, n, pixels, c);
        }
    }
}

//! Elementwise and batch-norm kernels against plain f64 host code, at odd sizes, plain and instrumented.

use half::bf16;

use crate::numbers::{Float, close, noise};
use crate::stage::{Memory, Stage, Value};

/// One launch over a flat array.
fn flat(stage: &Stage, name: &str, arguments: &[Value]) {
    stage.launch(name, [3, 1, 1], [64, 1, 1], 0, arguments);
}

const LENGTHS: [usize; 8] = [1, 2, 3, 7, 8, 9, 127, 2053];

fn elementwise<T: Float>(checked: bool) {
    let stage = Stage::take(checked);
    let name = |op: &str| format!("{op}_{}", T::NAME);
    for n in LENGTHS {
        let (a, mut b): (Vec<T>, Vec<T>) = (noise(n, 1), noise(n, 2));
        // Half of the outputs of a ReLU are zeros, which pass no gradient.
        b.iter_mut().step_by(2).for_each(|value| *value = T::from_f64(0.0));
        let (da, db) = (stage.upload(&a), stage.upload(&b));
        let y: Memory<T> = stage.room(n);
        let len = || Value::from(n as i64);
        let check = |op: &str, want: &dyn Fn(usize) -> f64| {
            let want: Vec<f64> = (0..n).map(want).collect();
            close(&format!("{} of {n}", name(op)), &y.read(&stage), &want, T::TOLERANCE);
        };

        flat(&stage, &name("relu"), &[(&y).into(), (&da).into(), len()]);
        check("relu", &|i| a[i].to_f64().max(0.0));
        flat(&stage, &name("add"), &[(&y).into(), (&da).into(), (&db).into(), len()]);
        check("add", &|i| a[i].to_f64() + b[i].to_f64());
        flat(&stage, &name("scale"), &[(&y).into(), (&db).into(), 0.5_f32.into(), len()]);
        check("scale", &|i| 0.5 * b[i].to_f64());
        flat(&stage, &name("relu_backward"), &[(&y).into(), (&da).into(), (&db).into(), len()]);
        check("relu_backward", &|i| if b[i].to_f64() > 0.0 { a[i].to_f64() } else { 0.0 });
        flat(&stage, &name("fill"), &[(&y).into(), (-1.5_f32).into(), len()]);
        check("fill", &|_| -1.5);
    }
}

#[test]
fn elementwise_f32() {
    elementwise::<f32>(false);
    elementwise::<f32>(true);
}

#[test]
fn elementwise_bf16() {
    elementwise::<bf16>(false);
    elementwise::<bf16>(true);
}

#[test]
fn casts_round_to_nearest_even() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for n in LENGTHS {
            let mut x: Vec<f32> = noise(n, 3);
            x[0] = 1.0 + 1.0 / 256.0; // a tie
            let dx = stage.upload(&x);
            let (narrow, wide): (Memory<bf16>, Memory<f32>) = (stage.room(n), stage.room(n));
            flat(&stage, "cast_f32_to_bf16", &[(&narrow).into(), (&dx).into(), (n as i64).into()]);
            let want: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
            assert_eq!(narrow.read(&stage), want);
            flat(
                &stage,
                "cast_bf16_to_f32",
                &[(&wide).into(), (&narrow).into(), (n as i64).into()],
            );
            let want: Vec<f32> = want.iter().map(|x| x.to_f32()).collect();
            assert_eq!(wide.read(&stage), want);
        }
    }
}

#[test]
fn casts_keep_special_values() {
    let x = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        -0.0,
        1e-40,
        1.0 + 1.0 / 256.0,
    ];
    // A NaN becomes the device's canonical NaN; a value above the largest bf16 becomes infinity; a tie rounds to even.
    let want = [0x7fff, 0x7fff, 0x7f80, 0xff80, 0x7f80, 0x8000, 0x0001, 0x3f80];
    for checked in [false, true] {
        let stage = Stage::take(checked);
        let (dx, y) = (stage.upload(&x), stage.room::<u16>(x.len()));
        flat(&stage, "cast_f32_to_bf16", &[(&y).into(), (&dx).into(), (x.len() as i64).into()]);
        assert_eq!(y.read(&stage), want);
        let (dx, y) = (stage.upload(&x[..2]), stage.room::<f32>(2));
        flat(&stage, "relu_f32", &[(&y).into(), (&dx).into(), 2_i64.into()]);
        assert!(y.read(&stage).iter().all(|y| y.is_nan()), "relu hides a NaN");
    }
}

/// Batch norm forward and backward of `groups` times `rows` rows of `c` channels, with a mean far from zero. Without a
/// residual the backward pass gets no `y`, and derives the ReLU's mask from `x`. Runs of `run` chunks are merged before the end.
fn batch_norm<T: Float>(
    stage: &Stage,
    [groups, rows, c]: [usize; 3],
    run: usize,
    with_residual: bool,
) {
    let what = format!("batch norm of {groups} x {rows} x {c}");
    let name = |kernel: &str| format!("batch_norm_{kernel}_{}", T::NAME);
    let n = groups * rows * c;
    let x: Vec<T> = noise::<f32>(n, 1).iter().map(|x| T::from_f64(f64::from(*x) + 3.0)).collect();
    let (mut residual, dy): (Vec<T>, Vec<T>) = (noise(n, 2), noise(n, 3));
    if !with_residual {
        residual.fill(T::from_f64(0.0));
    }
    let optional =
        |memory: &Memory<T>| if with_residual { memory.into() } else { Value::from(0_u64) };
    let (gain, shift): (Vec<f32>, Vec<f32>) = (noise(c, 4), noise(c, 5));
    let (dx_, dresidual_) = (stage.room::<T>(n), stage.room::<T>(n));
    let (x_, residual_, dy_) = (stage.upload(&x), stage.upload(&residual), stage.upload(&dy));
    let (gain_, shift_) = (stage.upload(&gain), stage.upload(&shift));
    let (mean_, inv_std_) = (stage.room::<f32>(groups * c), stage.room::<f32>(groups * c));
    let running: Vec<f32> = noise(c, 6);
    let (running_mean, running_variance) = (stage.upload(&running), stage.upload(&running));

    // The launch layout that batch_norm.cu describes.
    let vectors = c.div_ceil(16 / size_of::<T>()) as u32;
    let across = vectors.next_power_of_two().min(32);
    let per_chunk = 37;
    let chunks = rows.div_ceil(per_chunk);
    let grid = [vectors.div_ceil(across), chunks as u32, groups as u32];
    let block = [across, 128 / across, 1];
    let partial = stage.room::<f32>(groups * chunks * 2 * c);
    let sums = stage.room::<f32>(groups * 2 * c);
    let int = |x: usize| Value::from(x as i32);
    let sizes = || [Value::from(rows as i64), int(per_chunk), int(c)];
    let per_channel = [c.div_ceil(8) as u32, 1, 1];
    let down = [8, chunks.next_power_of_two() as u32, 1];

    let mut arguments = vec![(&partial).into(), (&x_).into()];
    arguments.extend(sizes());
    stage.launch(&name("moments"), grid, block, 0, &arguments);
    let runs = chunks.div_ceil(run);
    let merged = stage.room::<f32>(groups * runs * 2 * c);
    if run > 1 {
        let grid = [c.div_ceil(8) as u32, runs as u32, groups as u32];
        let mut arguments = vec![(&merged).into(), (&partial).into(), int(chunks), int(run)];
        arguments.extend(sizes());
        stage.launch("batch_norm_merge", grid, [8, 4, 1], 0, &arguments);
    }
    let moments = if run > 1 { &merged } else { &partial };
    let mut arguments: Vec<Value> =
        [&mean_, &inv_std_, &running_mean, &running_variance, moments].map(Value::from).into();
    arguments.extend([int(groups), int(runs), (rows as i64).into(), int(run * per_chunk), int(c)]);
    arguments.extend([0.1_f32.into(), 1e-5_f32.into()]);
    stage.launch("batch_norm_finish", per_channel, down, 0, &arguments);
    let y_ = stage.room::<T>(n);
    let mut arguments: Vec<Value> = vec![(&y_).into(), (&x_).into(), optional(&residual_)];
    arguments.extend([&mean_, &inv_std_, &gain_, &shift_].map(Value::from));
    arguments.extend(sizes());
    arguments.push(1.into());
    stage.launch(&name("apply"), grid, block, 0, &arguments);

    let at = |g: usize, i: usize, j: usize| (g * rows + i) * c + j;
    let (mut want_y, mut want_mean, mut x_hat) =
        (vec![0.0; n], vec![0.0; groups * c], vec![0.0; n]);
    let mut inv_std = vec![0.0; groups * c];
    let mut moved = [vec![0.0; c], vec![0.0; c]];
    for g in 0..groups {
        for j in 0..c {
            let channel: Vec<f64> = (0..rows).map(|i| x[at(g, i, j)].to_f64()).collect();
            let mean = channel.iter().sum::<f64>() / rows as f64;
            let m2 = channel.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
            want_mean[g * c + j] = mean;
            inv_std[g * c + j] = 1.0 / (m2 / rows as f64 + 1e-5).sqrt();
            moved[0][j] += 0.1 * mean / groups as f64;
            moved[1][j] += 0.1 * m2 / (rows as f64 - 1.0).max(1.0) / groups as f64;
            for i in 0..rows {
                let e = at(g, i, j);
                x_hat[e] = (x[e].to_f64() - mean) * inv_std[g * c + j];
                let z = x_hat[e] * f64::from(gain[j]) + f64::from(shift[j]) + residual[e].to_f64();
                want_y[e] = z.max(0.0);
            }
        }
    }
    close(&format!("{what}: mean"), &mean_.read(stage), &want_mean, 1e-5);
    close(&format!("{what}: inv_std"), &inv_std_.read(stage), &inv_std, 1e-5);
    let y = y_.read(stage);
    close(&format!("{what}: y"), &y, &want_y, T::TOLERANCE);
    for (running_, moved) in [(&running_mean, &moved[0]), (&running_variance, &moved[1])] {
        let want: Vec<f64> =
            running.iter().zip(moved).map(|(r, m)| 0.9 * f64::from(*r) + m).collect();
        close(&format!("{what}: running"), &running_.read(stage), &want, 1e-5);
    }

    let mut arguments: Vec<Value> =
        vec![(&partial).into(), (&dy_).into(), optional(&y_), (&x_).into()];
    arguments.extend([&mean_, &inv_std_, &gain_, &shift_].map(Value::from));
    arguments.extend(sizes());
    arguments.push(1.into());
    stage.launch(&name("backward_sums"), grid, block, 0, &arguments);
    let (dshift_, dgain_) = (stage.room::<f32>(c), stage.upload(&gain));
    let mut arguments: Vec<Value> = [&sums, &dshift_, &dgain_, &partial].map(Value::from).into();
    arguments.extend([int(groups), int(chunks), int(c), 2.into()]);
    stage.launch("batch_norm_backward_finish", per_channel, down, 0, &arguments);
    let mut arguments: Vec<Value> = [&dx_, &dresidual_, &dy_].map(Value::from).into();
    arguments.extend([optional(&y_), (&x_).into()]);
    arguments.extend([&mean_, &inv_std_, &gain_, &shift_, &sums].map(Value::from));
    arguments.extend(sizes());
    arguments.extend([1.into(), 0.into()]);
    stage.launch(&name("backward_apply"), grid, block, 0, &arguments);

    let dz: Vec<f64> =
        dy.iter().zip(&y).map(|(d, y)| if y.to_f64() > 0.0 { d.to_f64() } else { 0.0 }).collect();
    let (mut want_dx, mut want_dshift) = (vec![0.0; n], vec![0.0; c]);
    let mut want_dgain: Vec<f64> = gain.iter().map(|g| f64::from(*g)).collect();
    for g in 0..groups {
        for j in 0..c {
            let sum = (0..rows).map(|i| dz[at(g, i, j)]).sum::<f64>();
            let dot = (0..rows).map(|i| dz[at(g, i, j)] * x_hat[at(g, i, j)]).sum::<f64>();
            want_dshift[j] += sum;
            want_dgain[j] += dot;
            for i in 0..rows {
                let e = at(g, i, j);
                let m = rows as f64;
                let inner = dz[e] - sum / m - x_hat[e] * dot / m;
                want_dx[e] = f64::from(gain[j]) * inv_std[g * c + j] * inner;
            }
        }
    }
    close(&format!("{what}: dshift"), &dshift_.read(stage), &want_dshift, 1e-5);
    close(&format!("{what}: dgain"), &dgain_.read(stage), &want_dgain, 1e-5);
    // One row has no variance: only rounding errors remain.
    if rows > 1 {
        close(&format!("{what}: dx"), &dx_.read(stage), &want_dx, T::TOLERANCE);
    }
    close(&format!("{what}: dresidual"), &dresidual_.read(stage), &dz, T::TOLERANCE);
}

fn batch_norms<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (groups, rows, c) in [
            (1, 1, 1),
            (1, 5, 3),
            (2, 37, 8),
            (3, 38, 17),
            (1, 151, 68),
            (2, 300, 64),
            (2, 75, 131),
        ] {
            for run in [1, 3] {
                batch_norm::<T>(&stage, [groups, rows, c], run, c % 2 == 1);
            }
        }
    }
}

#[test]
fn batch_norm_f32() {
    batch_norms::<f32>();
}

#[test]
fn batch_norm_bf16() {
    batch_norms::<bf16>();
}

/// Parts of a sum of squares, of differences and without the second operand, added up in order.
#[test]
fn squares_are_summed_in_f64() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for n in LENGTHS {
            let (x, y): (Vec<f32>, Vec<f32>) = (noise(n, 11), noise(n, 12));
            let (dx, dy) = (stage.upload(&x), stage.upload(&y));
            for (blocks, with) in [(1, true), (3, true), (3, false)] {
                let parts: Memory<f64> = stage.room(blocks as usize);
                let other: Value = if with { (&dy).into() } else { 0_u64.into() };
                let arguments = [(&parts).into(), (&dx).into(), other, (n as i64).into()];
                stage.launch("sum_squares", [blocks, 1, 1], [256, 1, 1], 0, &arguments);
                let got: f64 = parts.read(&stage).iter().sum();
                let square = |(x, y): (&f32, &f32)| {
                    (f64::from(*x) - if with { f64::from(*y) } else { 0.0 }).powi(2)
                };
                let want: f64 = x.iter().zip(&y).map(square).sum();
                assert!((got - want).abs() <= 1e-13 * want, "{n}, {blocks}: {got}, not {want}");
            }
        }
        let bad = stage.upload(&[1.0, f32::NAN, 2.0]);
        let parts: Memory<f64> = stage.room(1);
        let arguments = [(&parts).into(), (&bad).into(), 0_u64.into(), 3_i64.into()];
        stage.launch("sum_squares", [1, 1, 1], [256, 1, 1], 0, &arguments);
        assert!(parts.read(&stage)[0].is_nan());
    }
}

//! GEMM kernels against plain f64 host code: every tile, at and around its edges, plain and instrumented.

use half::bf16;

use crate::conv2d::moments_of;
use crate::numbers::{Float, close, noise};
use crate::stage::{Memory, Stage, Value};

/// Which operands of a GEMM are transposed.
#[derive(Clone, Copy, Debug)]
enum Transposition {
    Nt,
    Nn,
    Tn,
}

/// A kernel and its tile.
type Form = (&'static str, [usize; 2]);

/// The kernels that accept a GEMM, as the head of matmul.cu says.
fn forms<In: Float>(transposition: Transposition, [m, n, k]: [usize; 3]) -> Vec<Form> {
    if In::NAME == "f32" {
        return vec![("f32", [64, 64])];
    }
    let small = ("bf16_64x64", [64, 64]);
    let large = ("bf16_128x128", [128, 128]);
    let (row_lengths, half) = match transposition {
        Transposition::Nt => ([k, k], ("bf16_128x64", [128, 64])),
        Transposition::Nn => ([k, n], ("bf16_128x64", [128, 64])),
        Transposition::Tn => ([m, n], ("bf16_64x128", [64, 128])),
    };
    let aligned = row_lengths.iter().all(|length| length.is_multiple_of(8));
    if aligned { vec![small, large, half] } else { vec![small] }
}

/// One GEMM to `[m, n]`: `Nt` with a bias, the others also accumulated onto the result; then by split-K if the result is f32.
fn gemm<In: Float, Out: Float>(stage: &Stage, transposition: Transposition, [m, n, k]: [usize; 3]) {
    let (a, b): (Vec<In>, Vec<In>) = (noise(m * k, 1), noise(k * n, 2));
    let bias: Vec<f32> = noise(n, 3);
    let (da, db, dbias) = (stage.upload(&a), stage.upload(&b), stage.upload(&bias));
    let mut want = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            let term = |l: usize| {
                let x = if matches!(transposition, Transposition::Tn) {
                    a[l * m + i]
                } else {
                    a[i * k + l]
                };
                let y = if matches!(transposition, Transposition::Nt) {
                    b[j * k + l]
                } else {
                    b[l * n + j]
                };
                x.to_f64() * y.to_f64()
            };
            want[i * n + j] = (0..k).map(term).sum::<f64>();
        }
    }
    let with_bias: Vec<f64> = (0..m * n).map(|e| want[e] + f64::from(bias[e % n])).collect();
    let is_nt = matches!(transposition, Transposition::Nt);
    for (kernel, tile) in forms::<In>(transposition, [m, n, k]) {
        let name = format!("matmul_{}_{kernel}", format!("{transposition:?}").to_lowercase());
        let what = format!("{name} {m} x {n} x {k} to {}", Out::NAME);
        let tiles = (m.div_ceil(tile[0]) * n.div_ceil(tile[1])) as u32;
        let has_moments = In::NAME == "bf16" && Out::NAME == "bf16" && is_nt;
        let moments = stage.room::<f32>(m.div_ceil(tile[0]) * 2 * n);
        let launch = |c: Value, bias: Value, splits: usize, k_per_split: usize, accumulate: i32| {
            let mut arguments = vec![c, (&da).into(), (&db).into()];
            if In::NAME == "bf16" {
                // The bf16 and the f32 output, one of which is null.
                arguments.insert(if Out::NAME == "f32" { 0 } else { 1 }, 0_u64.into());
            }
            if is_nt {
                arguments.push(bias);
                if In::NAME == "bf16" {
                    arguments.push(if has_moments { (&moments).into() } else { 0_u64.into() });
                }
            }
            arguments.extend([m, n, k, k_per_split].map(|size| Value::from(size as i32)));
            if !is_nt {
                arguments.push(accumulate.into());
            }
            let threads = if In::NAME == "bf16" { 128 } else { 256 };
            let grid = [tiles, 1, splits as u32];
            stage.launch(&name, grid, [threads, 1, 1], 0, &arguments);
        };
        let c: Memory<Out> = stage.room(m * n);
        launch((&c).into(), (&dbias).into(), 1, k, 0);
        let first = c.read(stage);
        close(&what, &first, if is_nt { &with_bias } else { &want }, Out::TOLERANCE);
        if has_moments {
            let want = moments_of(&first, n, tile[0]);
            close(&format!("{what}: moments"), &moments.read(stage), &want, 1e-5);
        }
        if !is_nt {
            launch((&c).into(), 0_u64.into(), 1, k, 1);
            let twice: Vec<f64> = (0..m * n).map(|e| first[e].to_f64() + want[e]).collect();
            close(&format!("{what}, accumulated"), &c.read(stage), &twice, Out::TOLERANCE);
        }
        if Out::NAME == "bf16" {
            continue;
        }
        let splits = k.div_ceil(32);
        let partial: Memory<f32> = stage.room(splits * m * n);
        launch((&partial).into(), 0_u64.into(), splits, 32, 0);
        let (sum, sum_bf16) = (stage.room::<f32>(m * n), stage.room::<bf16>(m * n));
        // A thread for each element, and a thread for each run of the splits of one.
        for block in [[64, 1, 1], [16, 4, 1], [32, 16, 1]] {
            let what = format!("{what}, split-K by {block:?}");
            for (y, dtype) in [(Value::from(&sum), "f32"), ((&sum_bf16).into(), "bf16")] {
                let count = Value::from((m * n) as i64);
                let arguments = [y, (&partial).into(), (splits as i32).into(), count, 0.into()];
                stage.launch(&format!("split_k_reduce_{dtype}"), [3, 1, 1], block, 0, &arguments);
            }
            close(&what, &sum.read(stage), &want, 1e-5);
            close(&what, &sum_bf16.read(stage), &want, bf16::TOLERANCE);
            let more = [(&sum).into(), (&partial).into(), (splits as i32).into()];
            let more = [&more[..], &[Value::from((m * n) as i64), 1.into()]].concat();
            stage.launch("split_k_reduce_f32", [3, 1, 1], block, 0, &more);
            let twice: Vec<f64> = want.iter().map(|w| 2.0 * w).collect();
            close(&format!("{what}, added"), &sum.read(stage), &twice, 1e-5);
        }
    }
}

#[test]
fn gemms_of_any_size() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for transposition in [Transposition::Nt, Transposition::Nn, Transposition::Tn] {
            // The last five are one off a tile in rows, columns and depth, with few and many steps.
            for size in [
                [1, 1, 1],
                [7, 5, 3],
                [64, 64, 32],
                [65, 72, 40],
                [8, 136, 97],
                [131, 16, 64],
                [128, 128, 8],
                [127, 65, 104],
                [129, 64, 24],
                [72, 129, 160],
                [136, 120, 33],
            ] {
                gemm::<bf16, bf16>(&stage, transposition, size);
                gemm::<bf16, f32>(&stage, transposition, size);
                gemm::<f32, f32>(&stage, transposition, size);
            }
        }
    }
}

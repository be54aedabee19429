//! Kernels that move rows: bit-exact for any length and alignment.

use half::bf16;

use crate::numbers::{Float, bits, close, noise};
use crate::stage::{Stage, Value};

fn int(x: usize) -> Value {
    Value::from(x as i32)
}

fn long(x: usize) -> Value {
    Value::from(x as i64)
}

/// The launch layout that rows.cu describes.
fn launch(stage: &Stage, name: &str, rows: usize, arguments: &[Value]) {
    stage.launch(name, [rows.div_ceil(8).max(2) as u32 - 1, 1, 1], [4, 8, 1], 0, arguments);
}

const LENGTHS: [usize; 6] = [1, 3, 7, 8, 40, 131];

fn bit_equal<T: Float>(what: &str, got: &[T], want: &[T]) {
    let (got, want): (Vec<f64>, Vec<f64>) =
        (got.iter().map(|v| v.to_f64()).collect(), want.iter().map(|v| v.to_f64()).collect());
    assert_eq!(got, want, "{what}");
}

fn moves<T: Float>(stage: &Stage, length: usize) {
    let name = |op: &str| format!("{op}_{}", T::NAME);
    let what = |op: &str| format!("{} of {length}", name(op));
    let (n, m) = (37, 11);
    let x: Vec<T> = noise(m * length, 1);
    let x_ = stage.upload(&x);
    let row = |x: &[T], i: usize| x[i * length..][..length].to_vec();
    let index: Vec<i32> = bits(n, 2).iter().map(|b| (b % 9) as i32).collect(); // some rows are never picked
    let index_ = stage.upload(&index);

    let y_ = stage.room::<T>(n * length);
    let mut arguments: Vec<Value> = vec![(&y_).into(), (&x_).into(), (&index_).into()];
    arguments.extend([int(n), int(m), long(length)]);
    launch(stage, &name("gather_rows"), n, &arguments);
    let want: Vec<T> = index.iter().flat_map(|&i| row(&x, i as usize)).collect();
    bit_equal(&what("gather_rows"), &y_.read(stage), &want);

    let dy: Vec<T> = noise(n * length, 3);
    let (dy_, dx_) = (stage.upload(&dy), stage.room::<T>(m * length));
    let mut arguments: Vec<Value> = vec![(&dx_).into(), (&dy_).into(), (&index_).into()];
    arguments.extend([int(n), int(m), long(length)]);
    stage.launch(&name("scatter_rows"), [3, 1, 1], [32, 1, 1], 0, &arguments);
    let mut want = vec![0.0; m * length];
    for (e, v) in dy.iter().enumerate() {
        want[index[e / length] as usize * length + e % length] += v.to_f64();
    }
    close(&what("scatter_rows"), &dx_.read(stage), &want, T::TOLERANCE);

    // A queue whose position is on the device, wrapping around its end.
    let rows: Vec<T> = noise(4 * length, 8);
    let (queue_, rows_, at_) = (stage.upload(&x), stage.upload(&rows), stage.upload(&[9_i32]));
    let mut arguments: Vec<Value> = vec![(&queue_).into(), (&rows_).into(), (&at_).into()];
    arguments.extend([int(4), int(m), long(length)]);
    launch(stage, &name("write_rows"), 4, &arguments);
    let mut want = x.clone();
    for i in 0..4 {
        want[(9 + i) % m * length..][..length].copy_from_slice(&rows[i * length..][..length]);
    }
    bit_equal(&what("write_rows"), &queue_.read(stage), &want);

    for n in [1, 4, m] {
        let rows: Vec<T> = noise(n * length, 9);
        let (queue_, rows_) = (stage.upload(&x), stage.upload(&rows));
        let arguments = [(&queue_).into(), (&rows_).into(), int(n), int(m), long(length)];
        launch(stage, &name("push_rows"), n, &arguments);
        let want: Vec<T> = rows.iter().chain(&x).copied().take(m * length).collect();
        bit_equal(&what("push_rows"), &queue_.read(stage), &want);
    }
}

#[test]
fn rows_move_bit_exactly() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for length in LENGTHS {
            moves::<f32>(&stage, length);
            moves::<bf16>(&stage, length);
        }
    }
}

#[test]
fn a_row_out_of_range_is_nan() {
    let stage = Stage::take(true);
    let (x, index) = (stage.upload(&noise::<bf16>(6, 1)), stage.upload(&[1, 2]));
    let y = stage.room::<bf16>(6);
    let mut arguments: Vec<Value> = vec![(&y).into(), (&x).into(), (&index).into()];
    arguments.extend([int(2), int(2), long(3)]);
    launch(&stage, "gather_rows_bf16", 2, &arguments);
    assert_eq!(
        y.read(&stage).iter().map(|v| v.is_nan()).collect::<Vec<_>>(),
        [false, false, false, true, true, true]
    );
}

/// A byte counts once for each launch that reads it and once for each that writes it, however many threads do; shared memory and
/// arguments are not counted.
#[test]
fn bytes_that_a_kernel_moves_are_counted() {
    let stage = Stage::take(true);
    let index = [3, 3, 0, 5, 0]; // three distinct rows
    for length in LENGTHS {
        let (x, index) = (stage.upload(&noise::<bf16>(7 * length, 1)), stage.upload(&index));
        let y = stage.room::<bf16>(5 * length);
        let moved =
            || ["read", "written"].map(|way| stage.count(&format!("{way}:gather_rows_bf16")));
        let mut arguments: Vec<Value> = vec![(&y).into(), (&x).into(), (&index).into()];
        arguments.extend([int(5), int(7), long(length)]);
        for _ in 0..2 {
            let before = moved();
            launch(&stage, "gather_rows_bf16", 5, &arguments);
            y.read(&stage);
            let now = moved();
            let by = [0, 1].map(|way| now[way] - before[way]);
            assert_eq!(by, [3 * 2 * length as u64 + 5 * 4, 5 * 2 * length as u64], "{length}");
        }
    }
    // What the output holds is read, too, if it is added to.
    let (y, partial) = (stage.upload(&noise::<f32>(33, 2)), stage.upload(&noise::<f32>(3 * 33, 3)));
    let arguments = [(&y).into(), (&partial).into(), int(3), long(33), int(1)];
    stage.launch("split_k_reduce_f32", [2, 1, 1], [32, 1, 1], 0, &arguments);
    y.read(&stage);
    let moved = ["read", "written"].map(|way| stage.count(&format!("{way}:split_k_reduce_f32")));
    assert_eq!(moved, [4 * 4 * 33, 4 * 33]);
}

fn transposes<T: Float>(stage: &Stage, rows: usize, columns: usize) {
    let name = format!("transpose_{}", T::NAME);
    let x: Vec<T> = noise(rows * columns, 5);
    let (x_, y_) = (stage.upload(&x), stage.room::<T>(rows * columns));
    let grid = [rows.div_ceil(32) as u32, columns.div_ceil(32) as u32, 1];
    let arguments = [(&y_).into(), (&x_).into(), long(rows), long(columns)];
    stage.launch(&name, grid, [32, 8, 1], 0, &arguments);
    let column = |j: usize| x.iter().copied().skip(j).step_by(columns);
    let want: Vec<T> = (0..columns).flat_map(column).collect();
    bit_equal(&format!("{name} of [{rows}, {columns}]"), &y_.read(stage), &want);
}

#[test]
fn matrices_are_transposed() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (rows, columns) in
            [(1, 1), (1, 70), (70, 1), (32, 32), (31, 33), (33, 31), (64, 7), (13, 97)]
        {
            transposes::<f32>(&stage, rows, columns);
            transposes::<bf16>(&stage, rows, columns);
        }
    }
}

//! Gathers, slices and concatenates rows; the only arithmetic is the sum of gradients.
//!
//! A row is everything under one index of the outermost dimension: an image or an embedding.

use super::cuda;
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{DType, Element, Float, Tensor, by_activation};
use crate::tensor::{add_into, row_shape};

/// Gathers rows: row `i` of the result is row `index[i]` of `x [m, …]`. `index [n]` is i32 and may repeat or omit rows. MoCo
/// uses this to shuffle the images of the keys and to restore the order of the keys.
///
/// A GPU cannot report an index that is out of range: that row is NaN, and its gradient is lost.
///
/// # Panics
/// If `x` is a scalar or, on the host, an index is out of range.
#[track_caller]
pub fn gather_rows<'t>(x: &Var<'t>, index: &Tensor) -> Var<'t> {
    let rows = *x.shape().first().expect("gather_rows: a scalar has no rows");
    let [n] = index.dims("gather_rows: the index");
    let device = x.tape().device();
    index.expect_on(device, "gather_rows");
    if device.kind() != DeviceKind::Cuda {
        let bad = index.data::<i32>().iter().find(|&&i| i < 0 || i as usize >= rows);
        assert!(bad.is_none(), "gather_rows: row {} of {rows}", bad.unwrap_or(&0));
    }
    let mut y = Tensor::empty(device, x.value().dtype(), row_shape(x.shape(), n));
    match device.kind() {
        DeviceKind::Cpu => {
            by_activation!(y.dtype(), T => pick::<T>(&mut y, x.value(), index.data()));
        }
        DeviceKind::Cuda => cuda::gather(&mut y, x.value(), index),
        DeviceKind::Reference => pick::<f64>(&mut y, x.value(), index.data()),
    }
    let (x_id, shape, index) = (x.id(), *x.shape(), index.clone());
    x.tape().record("gather_rows", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let on_cpu = device.kind() == DeviceKind::Cpu;
        // On a CPU the sums of repeated rows are in f32, which `add` rounds.
        let mut dx = Tensor::empty(device, if on_cpu { DType::F32 } else { dy.dtype() }, shape);
        match device.kind() {
            DeviceKind::Cpu => scatter::<f32>(&mut dx, &dy.cast(DType::F32), index.data()),
            DeviceKind::Cuda => cuda::scatter(&mut dx, &dy, &index),
            DeviceKind::Reference => scatter::<f64>(&mut dx, &dy, index.data()),
        }
        gradients.add(x_id, dx);
    })
}

fn pick<T: Element>(y: &mut Tensor, x: &Tensor, index: &[i32]) {
    let row = x.len() / x.shape()[0].max(1);
    let (y, x) = (y.data_mut::<T>(), x.data::<T>());
    for (y, &i) in y.chunks_exact_mut(row.max(1)).zip(index) {
        y.copy_from_slice(&x[i as usize * row..][..row]);
    }
}

/// Adds in the order of the index, so that the sum over a repeated row has one order.
fn scatter<T: Float>(dx: &mut Tensor, dy: &Tensor, index: &[i32]) {
    let row = dx.len() / dx.shape()[0].max(1);
    let (dx, dy) = (dx.data_mut::<T>(), dy.data::<T>());
    dx.fill(T::narrow(0.0));
    for (dy, &i) in dy.chunks_exact(row.max(1)).zip(index) {
        for (dx, dy) in dx[i as usize * row..][..row].iter_mut().zip(dy) {
            *dx = T::narrow(dx.widen() + dy.widen());
        }
    }
}

/// Returns rows `from..from + count` of `x [m, …]`, which share its memory.
///
/// # Panics
/// If `x` has fewer rows.
#[track_caller]
pub fn slice_rows<'t>(x: &Var<'t>, from: usize, count: usize) -> Var<'t> {
    let rows = *x.shape().first().expect("slice_rows: a scalar has no rows");
    assert!(
        from.checked_add(count).is_some_and(|end| end <= rows),
        "slice_rows: {count} rows from row {from} on of {rows}"
    );
    let y = x.value().rows(from, count);
    let (x_id, shape) = (x.id(), *x.shape());
    let offset = from * y.len().checked_div(count).unwrap_or(0);
    x.tape().record("slice_rows", y, &[x], move |dy, gradients| {
        let device = dy.device().clone();
        if let Some((mut dx, accumulate)) = gradients.target(x_id, &shape) {
            if !accumulate {
                dx.fill(0.0);
            }
            add_into(&device, &mut dx.slice(offset, *dy.shape()), &dy);
        }
    })
}

/// Concatenates the rows of all `parts`, which must agree in all dimensions but the outermost.
///
/// # Panics
/// If `parts` is empty or their rows differ in shape.
#[track_caller]
pub fn concat_rows<'t>(parts: &[Var<'t>]) -> Var<'t> {
    let first = parts.first().expect("concat_rows: no parts");
    for part in parts {
        first.tape().expect_inputs("concat_rows", &[part]);
        assert!(!part.shape().is_empty(), "concat_rows: a scalar has no rows");
        assert_eq!(part.shape()[1..], first.shape()[1..], "concat_rows: rows of different shapes");
    }
    let values: Vec<&Tensor> = parts.iter().map(Var::value).collect();
    let y = concat(&values);
    let places: Vec<_> = parts.iter().map(|part| (part.id(), part.shape()[0])).collect();
    let inputs: Vec<&Var<'t>> = parts.iter().collect();
    first.tape().record("concat_rows", y, &inputs, move |dy, gradients| {
        let mut from = 0;
        for &(id, count) in &places {
            gradients.add(id, dy.rows(from, count));
            from += count;
        }
    })
}

/// [`concat_rows`] for tensors, without a gradient.
#[track_caller]
fn concat(parts: &[&Tensor]) -> Tensor {
    let rows = parts.iter().map(|part| part.shape()[0]).sum();
    let mut y =
        Tensor::empty(parts[0].device(), parts[0].dtype(), row_shape(parts[0].shape(), rows));
    let mut from = 0;
    for part in parts {
        assert_eq!(part.dtype(), y.dtype(), "concat_rows: rows of two types");
        y.view_mut().slice(from, *part.shape()).copy_from(part);
        from += part.len();
    }
    y
}

/// Overwrites rows `at..` of `to [m, …]` with `rows [n, …]`, as a queue takes keys. `at` is one i32 on the device, so that a
/// replayed step reads its current value.
///
/// A GPU wraps around at the end; the host panics.
///
/// # Panics
/// If shapes or types differ, another tensor shares the memory of `to`, or, on the host, the rows do not fit.
#[track_caller]
pub fn write_rows(to: &mut Tensor, at: &Tensor, rows: &Tensor) {
    check_rows("write_rows", to, rows);
    at.expect_on(to.device(), "write_rows");
    assert_eq!(at.len(), 1, "write_rows: the position must be one element, not {:?}", at.shape());
    if to.device().kind() == DeviceKind::Cuda {
        return cuda::write(to, at, rows);
    }
    let at = at.data::<i32>()[0];
    assert!(
        at >= 0 && at as usize + rows.shape()[0] <= to.shape()[0],
        "write_rows: {} rows from row {at} on into {:?}",
        rows.shape()[0],
        to.shape()
    );
    let offset = at as usize * to.shape()[1..].iter().product::<usize>();
    to.view_mut().slice(offset, *rows.shape()).copy_from(rows);
}

/// Inserts `rows [n, …]` at the front of `queue [m, …]` and moves the others back by `n`; the oldest drop out.
///
/// # Panics
/// If shapes or types differ, the rows do not fit, or another tensor shares the queue's memory.
#[track_caller]
pub fn push_rows(queue: &mut Tensor, rows: &Tensor) {
    check_rows("push_rows", queue, rows);
    let keep = queue.len() - rows.len();
    match queue.device().kind() {
        DeviceKind::Cpu => by_activation!(queue.dtype(), T => {
            queue.data_mut::<T>().copy_within(..keep, rows.len());
        }),
        DeviceKind::Cuda => return cuda::push(queue, rows),
        DeviceKind::Reference => queue.data_mut::<f64>().copy_within(..keep, rows.len()),
    }
    queue.view_mut().slice(0, *rows.shape()).copy_from(rows);
}

/// Panics unless `rows` can be written into `to`.
#[track_caller]
fn check_rows(what: &str, to: &Tensor, rows: &Tensor) {
    rows.expect_on(to.device(), what);
    assert!(!to.shape().is_empty() && !rows.shape().is_empty(), "{what}: a scalar has no rows");
    assert_eq!(to.shape()[1..], rows.shape()[1..], "{what}: rows of different shapes");
    assert_eq!(to.dtype(), rows.dtype(), "{what}: rows of two types");
    assert!(
        rows.shape()[0] <= to.shape()[0],
        "{what}: {} rows into {:?}",
        rows.shape()[0],
        to.shape()
    );
}

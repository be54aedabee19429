//! Rows picked, cut out and put together; no arithmetic but the sums of gradients.
//!
//! A row is all that lies under one index of the outermost size, an image as well as an embedding.

use super::cuda;
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Element, Float, Tensor};
use crate::tensor::{add_into, row_shape};

/// Row `i` of the result is row `index[i]` of `x [m, …]`; `index [n]` is of i32, and its rows may come several times or
/// never. MoCo shuffles the keys' images so, and puts their keys back in order.
///
/// A GPU cannot tell the host of an index that is out of range: its row is NaN then, and its gradient is lost.
///
/// # Panics
/// When `x` has no rows' size or, on the host, an index is out of range.
#[track_caller]
pub fn gather_rows<'t>(x: &Var<'t>, index: &Tensor) -> Var<'t> {
    let rows = *x.shape().first().expect("gather_rows: a scalar has no rows");
    let [n] = index.dims("gather_rows: the index");
    let device = x.tape().device();
    if device.kind() != DeviceKind::Cuda {
        let bad = index.data::<i32>().iter().find(|&&i| i < 0 || i as usize >= rows);
        assert!(bad.is_none(), "gather_rows: row {} of {rows}", bad.unwrap_or(&0));
    }
    let mut y = Tensor::empty(device, x.value().dtype(), row_shape(x.shape(), n));
    match device.kind() {
        DeviceKind::Cpu => pick::<f32>(&mut y, x.value(), index.data()),
        DeviceKind::Cuda => cuda::gather(&mut y, x.value(), index),
        DeviceKind::Reference => pick::<f64>(&mut y, x.value(), index.data()),
    }
    let (x_id, shape, index) = (x.id(), *x.shape(), index.clone());
    x.tape().record("gather_rows", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let mut dx = Tensor::empty(device, dy.dtype(), shape);
        match device.kind() {
            DeviceKind::Cpu => scatter::<f32>(&mut dx, &dy, index.data()),
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

/// In the order of the index, so that rows picked twice are summed in one order.
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

/// Rows `from..from + count` of `x [m, …]`, sharing its memory.
///
/// # Panics
/// When there are not so many rows.
#[track_caller]
pub fn slice_rows<'t>(x: &Var<'t>, from: usize, count: usize) -> Var<'t> {
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

/// The rows of all `parts`, one after another; the parts agree in all sizes but the outermost.
///
/// # Panics
/// When there are no parts or their rows differ in shape.
#[track_caller]
pub fn concat_rows<'t>(parts: &[Var<'t>]) -> Var<'t> {
    let first = parts.first().expect("concat_rows: of no parts");
    let inner = &first.shape()[1..];
    for part in parts {
        assert_eq!(&part.shape()[1..], inner, "concat_rows: rows of different shapes");
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

/// [`concat_rows`] of tensors; no gradient.
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

/// Overwrites rows `at..` of `to [m, …]` with `rows [n, …]`: how a queue takes keys. `at` is one i32 on the device, so that a
/// step that is replayed finds the place of its turn there.
///
/// A GPU goes on at the front where rows reach past the end; on the host that is a mistake.
///
/// # Panics
/// When shapes or types differ, another tensor shares `to`'s memory, or, on the host, the rows do not fit.
#[track_caller]
pub fn write_rows(to: &mut Tensor, at: &Tensor, rows: &Tensor) {
    check_rows("write_rows", to, rows);
    assert_eq!(at.len(), 1, "write_rows: the place is one number, not {:?}", at.shape());
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

/// Moves the rows of `queue [m, …]` back by as many as `rows [n, …]` has, and puts these in front; the oldest leave.
///
/// # Panics
/// When shapes or types differ, the rows do not fit, or another tensor shares the queue's memory.
#[track_caller]
pub fn push_rows(queue: &mut Tensor, rows: &Tensor) {
    check_rows("push_rows", queue, rows);
    let keep = queue.len() - rows.len();
    match queue.device().kind() {
        DeviceKind::Cpu => queue.data_mut::<f32>().copy_within(..keep, rows.len()),
        DeviceKind::Cuda => return cuda::push(queue, rows),
        DeviceKind::Reference => queue.data_mut::<f64>().copy_within(..keep, rows.len()),
    }
    queue.view_mut().slice(0, *rows.shape()).copy_from(rows);
}

/// Fails unless `rows` can be written into `to`.
#[track_caller]
fn check_rows(what: &str, to: &Tensor, rows: &Tensor) {
    assert_eq!(to.shape()[1..], rows.shape()[1..], "{what}: rows of different shapes");
    assert_eq!(to.dtype(), rows.dtype(), "{what}: rows of two types");
    assert!(
        rows.shape()[0] <= to.shape()[0],
        "{what}: {} rows into {:?}",
        rows.shape()[0],
        to.shape()
    );
}

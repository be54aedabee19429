//! Rows picked, cut out and put together; no arithmetic but the sums of gradients.
//!
//! A row is all that lies under one index of the outermost size, an image as well as an embedding.

use crate::device::DeviceKind;
use crate::ops::add_into;
use crate::tape::Var;
use crate::tensor::{DType, Element, Float, Shape, Tensor};

pub(super) fn row_shape(shape: &Shape, rows: usize) -> Shape {
    let mut sizes = shape.to_vec();
    sizes[0] = rows;
    sizes.as_slice().into()
}

/// Row `i` of the result is row `index[i]` of `x [m, …]`; `index [n]` is of i32, and its rows may come several times or
/// never. MoCo shuffles the keys' images so, and puts their keys back in order.
///
/// # Panics
/// When `x` has no rows' size or an index is out of range.
#[track_caller]
pub fn gather_rows<'t>(x: &Var<'t>, index: &Tensor) -> Var<'t> {
    let rows = *x.shape().first().expect("gather_rows: a scalar has no rows");
    let [n] = index.dims("gather_rows: the index");
    if x.tape().device().kind() == DeviceKind::Cuda {
        crate::ops::no_cuda("rows");
    }
    let bad = index.data::<i32>().iter().find(|&&i| i < 0 || i as usize >= rows);
    assert!(bad.is_none(), "gather_rows: row {} of {rows}", bad.unwrap_or(&0));
    let mut y = Tensor::empty(x.tape().device(), x.value().dtype(), row_shape(x.shape(), n));
    match x.value().dtype() {
        DType::F64 => pick::<f64>(&mut y, x.value(), index.data()),
        _ => pick::<f32>(&mut y, x.value(), index.data()),
    }
    let (x_id, shape, index) = (x.id(), *x.shape(), index.clone());
    x.tape().record("gather_rows", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let mut dx = Tensor::floats(device, shape);
        match device.kind() {
            DeviceKind::Cpu => scatter::<f32>(&mut dx, &dy, index.data()),
            DeviceKind::Cuda => crate::ops::no_cuda("rows"),
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
    if parts[0].device().kind() == DeviceKind::Cuda {
        crate::ops::no_cuda("rows");
    }
    let rows = parts.iter().map(|part| part.shape()[0]).sum();
    let mut y =
        Tensor::empty(parts[0].device(), parts[0].dtype(), row_shape(parts[0].shape(), rows));
    let mut from = 0;
    for part in parts {
        write_rows(&mut y, from, part);
        from += part.shape()[0];
    }
    y
}

/// Overwrites rows `from..` of `to [m, …]` with `rows [n, …]`: how a queue takes keys.
///
/// # Panics
/// When they do not fit, or another tensor shares `to`'s memory.
#[track_caller]
pub fn write_rows(to: &mut Tensor, from: usize, rows: &Tensor) {
    assert_eq!(to.shape()[1..], rows.shape()[1..], "write_rows: rows of different shapes");
    assert!(
        from + rows.shape()[0] <= to.shape()[0],
        "write_rows: {} rows from row {from} on into {:?}",
        rows.shape()[0],
        to.shape()
    );
    let offset = from * to.shape()[1..].iter().product::<usize>();
    match to.dtype() {
        DType::F32 => to.data_mut::<f32>()[offset..][..rows.len()].copy_from_slice(rows.data()),
        DType::F64 => to.data_mut::<f64>()[offset..][..rows.len()].copy_from_slice(rows.data()),
        DType::I32 => to.data_mut::<i32>()[offset..][..rows.len()].copy_from_slice(rows.data()),
        DType::Bf16 => crate::ops::no_cuda("rows"),
    }
}

/// Moves the rows of `queue [m, …]` back by as many as `rows [n, …]` has, and puts these in front; the oldest leave.
///
/// # Panics
/// When they do not fit, or another tensor shares the queue's memory.
#[track_caller]
pub fn push_rows(queue: &mut Tensor, rows: &Tensor) {
    assert_eq!(queue.shape()[1..], rows.shape()[1..], "push_rows: rows of different shapes");
    assert!(rows.shape()[0] <= queue.shape()[0], "push_rows: more rows than the queue holds");
    let keep = queue.len() - rows.len();
    match queue.dtype() {
        DType::F32 => queue.data_mut::<f32>().copy_within(..keep, rows.len()),
        DType::F64 => queue.data_mut::<f64>().copy_within(..keep, rows.len()),
        DType::I32 => queue.data_mut::<i32>().copy_within(..keep, rows.len()),
        DType::Bf16 => crate::ops::no_cuda("rows"),
    }
    write_rows(queue, 0, rows);
}

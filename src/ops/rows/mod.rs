//! Moving rows: between the order of micro-batches and that of views, by index, in and out of queues; no arithmetic.

mod gather;

pub use gather::{concat_rows, gather_rows, push_rows, slice_rows, write_rows};

use crate::tensor::{DType, Element, Tensor};

/// Micro-batches, each `[views * m, d]` view after view, as one `[views * n, d]`, view after view.
///
/// # Panics
/// When the parts differ in shape or their rows are no multiple of `views`.
#[track_caller]
pub(crate) fn interleave_views(parts: &[Tensor], views: usize) -> Tensor {
    let [rows, d] = parts.first().expect("micro-batches: there are none").dims("embeddings");
    assert!(rows % views == 0, "micro-batches: {rows} rows are not {views} equal views");
    assert!(
        parts.iter().all(|p| p.shape() == parts[0].shape()),
        "micro-batches must have one shape"
    );
    let mut all = Tensor::empty(parts[0].device(), parts[0].dtype(), [rows * parts.len(), d]);
    match all.dtype() {
        DType::F32 => interleave::<f32>(&mut all, parts, views),
        DType::F64 => interleave::<f64>(&mut all, parts, views),
        DType::I32 => interleave::<i32>(&mut all, parts, views),
    }
    all
}

fn interleave<T: Element>(all: &mut Tensor, parts: &[Tensor], views: usize) {
    let block = parts[0].len() / views;
    for (place, out) in all.data_mut::<T>().chunks_exact_mut(block).enumerate() {
        let (view, part) = (place / parts.len(), place % parts.len());
        out.copy_from_slice(&parts[part].data::<T>()[view * block..][..block]);
    }
}

/// The rows of micro-batch `index` of `count`, out of all rows: the inverse of [`interleave_views`].
pub(crate) fn pick_views(all: &Tensor, views: usize, count: usize, index: usize) -> Tensor {
    let [rows, d] = all.dims("embeddings");
    let mut part = Tensor::empty(all.device(), all.dtype(), [rows / count, d]);
    match all.dtype() {
        DType::F32 => pick::<f32>(&mut part, all, views, count, index),
        DType::F64 => pick::<f64>(&mut part, all, views, count, index),
        DType::I32 => pick::<i32>(&mut part, all, views, count, index),
    }
    part
}

fn pick<T: Element>(part: &mut Tensor, all: &Tensor, views: usize, count: usize, index: usize) {
    let block = part.len() / views;
    for (view, out) in part.data_mut::<T>().chunks_exact_mut(block).enumerate() {
        out.copy_from_slice(&all.data::<T>()[(view * count + index) * block..][..block]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn picking_undoes_interleaving() {
        let device = Device::reference();
        let part = |i: f64| {
            let rows: Vec<f64> = (0..12).map(|r| 100.0 * i + f64::from(r)).collect();
            Tensor::from_f64(&device, [4, 3], &rows)
        };
        let parts = [part(0.0), part(1.0), part(2.0)];
        let all = interleave_views(&parts, 2);
        // View 0 of all three parts comes before view 1 of any.
        assert_eq!(all.data::<f64>()[0..3], [0.0, 1.0, 2.0]);
        assert_eq!(all.data::<f64>()[6..9], [100.0, 101.0, 102.0]);
        assert_eq!(all.data::<f64>()[18..21], [6.0, 7.0, 8.0]);
        for (i, part) in parts.iter().enumerate() {
            assert_eq!(pick_views(&all, 2, 3, i).to_f64(), part.to_f64());
        }
    }
}

//! Row orders of several views: micro-batches and the full batch.

use super::{DType, Element, Shape, Tensor};
use crate::device::{DeviceKind, Group, Reduce, Reduction};

pub(crate) fn row_shape(shape: &Shape, rows: usize) -> Shape {
    let mut sizes = shape.to_vec();
    sizes[0] = rows;
    sizes.as_slice().into()
}

/// Joins micro-batches, each `[views * m, …]` view after view, into one `[views * n, …]`, view after view.
///
/// # Panics
/// If there are no parts, they differ in shape, or their rows are not a multiple of `views`.
#[track_caller]
pub(crate) fn interleave_views(parts: &[Tensor], views: usize) -> Tensor {
    let first = parts.first().expect("micro-batches: none given");
    let rows = first.shape()[0];
    let d = first.len() / rows.max(1);
    assert!(
        rows.is_multiple_of(views),
        "micro-batches: {rows} rows cannot be split into {views} equal views"
    );
    assert!(
        parts.iter().all(|p| p.shape() == parts[0].shape()),
        "micro-batches: the shapes differ"
    );
    let shape = row_shape(first.shape(), rows * parts.len());
    let mut all = Tensor::empty(first.device(), first.dtype(), shape);
    let (count, block) = (parts.len(), rows / views);
    for i in 0..count * views {
        let (view, part) = (i / count, i % count);
        let rows = parts[part].rows(view * block, block);
        let to = all.view_mut().slice(i * block * d, *rows.shape());
        { to }.copy_from(&rows);
    }
    all
}

/// The rows of micro-batch `index` of `count` out of all rows `[views * n, …]` (images or embeddings): the inverse of
/// [`interleave_views`].
pub(crate) fn pick_views(all: &Tensor, views: usize, count: usize, index: usize) -> Tensor {
    let rows = all.shape()[0];
    let (block, d) = (rows / count / views, all.len() / rows.max(1));
    let mut part = Tensor::empty(all.device(), all.dtype(), row_shape(all.shape(), rows / count));
    for view in 0..views {
        let rows = all.rows((view * count + index) * block, block);
        let to = part.view_mut().slice(view * block * d, *rows.shape());
        { to }.copy_from(&rows);
    }
    part
}

/// Gathers the rows of all ranks, each `[views * m, …]` view after view, into those of the batch, `[views * n, …]`. Where a rank
/// holds a share of each of `count` micro-batches, `views * count` in place of `views` gives the rows in the batch's order.
pub(crate) fn gather_views(
    own: &Tensor,
    views: usize,
    group: &Group,
    what: &'static str,
) -> Tensor {
    /// The rows of one rank after those of another.
    fn gathered<T: Element + Reduce>(own: &Tensor, group: &Group, what: &'static str) -> Tensor {
        let device = own.device();
        let shape = row_shape(own.shape(), own.shape()[0] * group.size());
        if device.kind() != DeviceKind::Cuda {
            let all = group.all_gather(what, own.data::<T>()).unwrap_or_default();
            return Tensor::from_slice(device, shape, &all);
        }
        let mut all = Tensor::empty(device, T::DTYPE, shape);
        let (from, to) = (own.device_in::<T>(), all.device_out());
        group.all_gather_on_gpu(what, device, from, to, own.len());
        all
    }
    if group.size() == 1 {
        return own.clone();
    }
    let all = match own.dtype() {
        DType::Bf16 => gathered::<half::bf16>(own, group, what),
        DType::F32 => gathered::<f32>(own, group, what),
        DType::F64 => gathered::<f64>(own, group, what),
        DType::I32 => gathered::<i32>(own, group, what),
    };
    if views == 1 {
        return all;
    }
    let rows = own.shape()[0];
    let parts: Vec<Tensor> = (0..group.size()).map(|rank| all.rows(rank * rows, rows)).collect();
    interleave_views(&parts, views)
}

/// Replaces a tensor by its sum over the ranks.
pub(crate) fn sum_over_ranks(tensor: &mut Tensor, group: &Group, what: &'static str) {
    reduce_over_ranks(tensor, group, what, Reduction::Sum);
}

/// Replaces a tensor of floats by its mean over the ranks.
pub(crate) fn mean_over_ranks(tensor: &mut Tensor, group: &Group, what: &'static str) {
    reduce_over_ranks(tensor, group, what, Reduction::Mean);
    if tensor.device().kind() == DeviceKind::Cuda {
        return;
    }
    let share = 1.0 / group.size() as f64;
    match tensor.dtype() {
        DType::F64 => tensor.data_mut::<f64>().iter_mut().for_each(|v| *v *= share),
        DType::F32 => tensor.data_mut::<f32>().iter_mut().for_each(|v| *v *= share as f32),
        other => panic!("the mean of {other:?} over the ranks"),
    }
}

/// On the host a mean is a sum, as MPI has none.
pub(crate) fn reduce_over_ranks(
    tensor: &mut Tensor,
    group: &Group,
    what: &'static str,
    reduction: Reduction,
) {
    fn reduce<T: Element + Reduce>(
        tensor: &mut Tensor,
        group: &Group,
        what: &'static str,
        reduction: Reduction,
    ) {
        let (device, count) = (tensor.device().clone(), tensor.len());
        match reduction {
            _ if device.kind() == DeviceKind::Cuda => {
                let values = tensor.device_out::<T>();
                group.all_reduce_on_gpu(what, &device, values, count, reduction);
            }
            Reduction::Max => group.all_reduce_max(what, tensor.data_mut::<T>()),
            Reduction::Sum | Reduction::Mean => group.all_reduce_sum(what, tensor.data_mut::<T>()),
        }
    }
    match tensor.dtype() {
        DType::Bf16 => reduce::<half::bf16>(tensor, group, what, reduction),
        DType::F32 => reduce::<f32>(tensor, group, what, reduction),
        DType::F64 => reduce::<f64>(tensor, group, what, reduction),
        DType::I32 => reduce::<i32>(tensor, group, what, reduction),
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

//! The transpose of a matrix: `y_ji = x_ij`, `dx = dyᵀ`.

mod cuda;

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{Element, Tensor, by_activation};

/// Returns the transpose of `x [n, d]`, `[d, n]`. With [`linear`](super::linear()) it gives `aᵀ b` of `a [n, d]` and `b [n, k]`:
/// `linear(&transpose(&a), &transpose(&b), None)`.
///
/// # Panics
/// If `x` does not have rank 2.
#[track_caller]
pub fn transpose<'t>(x: &Var<'t>) -> Var<'t> {
    let (y, id) = (transposed(x.value()), x.id());
    x.tape().record("transpose", y, &[x], move |dy, gradients| {
        gradients.add(id, transposed(&dy));
    })
}

#[track_caller]
fn transposed(x: &Tensor) -> Tensor {
    let [rows, columns] = x.dims("transpose: the input");
    let device = x.device();
    let mut y = Tensor::empty(device, x.dtype(), [columns, rows]);
    match device.kind() {
        DeviceKind::Cpu => by_activation!(x.dtype(), T => {
            let (y, x) = (y.data_mut::<T>(), x.data());
            device.run(|| copy(y, x, rows, columns));
        }),
        DeviceKind::Cuda => cuda::transpose(&mut y, x),
        DeviceKind::Reference => copy::<f64>(y.data_mut(), x.data(), rows, columns),
    }
    y
}

/// Tile by tile, so that the strided reads stay in cache.
fn copy<T: Element>(y: &mut [T], x: &[T], rows: usize, columns: usize) {
    const SIDE: usize = 32;
    y.par_chunks_mut((SIDE * rows).max(1)).enumerate().each(|(tile, y)| {
        for first_row in (0..rows).step_by(SIDE) {
            for (j, y) in y.chunks_exact_mut(rows).enumerate() {
                let column = tile * SIDE + j;
                for (i, y) in y[first_row..].iter_mut().take(SIDE).enumerate() {
                    *y = x[(first_row + i) * columns + column];
                }
            }
        }
    });
}

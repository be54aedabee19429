//! Max pooling. It only compares, so one generic loop serves the CPU and the reference device. `wide` turns an element into the
//! type that is compared and that gradients add up in: f32 for bf16, otherwise its own.

use crate::cpu::parallel::Each;
use half::bf16;
use rayon::prelude::*;

use super::cuda;
use crate::device::{Device, DeviceKind};
use crate::tape::Var;
use crate::tensor::{Activation, DType, Element, Tensor};

/// The sizes of a max pooling.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaxPoolDims {
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) c: usize,
    pub(super) p: usize,
    pub(super) q: usize,
    pub(super) size: usize,
    pub(super) stride: usize,
    /// Padding above and to the left; that below and to the right follows from `p` and `q`.
    pub(super) pad: usize,
}

impl MaxPoolDims {
    /// The rows, or columns, that window `o` covers, of `of` in total.
    fn window(self, o: usize, of: usize) -> std::ops::Range<usize> {
        let start = o * self.stride;
        start.saturating_sub(self.pad)..(start + self.size).saturating_sub(self.pad).min(of)
    }

    /// Index of the first element of each pixel in window `(p, q)`, in row order.
    fn pixels(self, p: usize, q: usize) -> impl Iterator<Item = usize> {
        let columns = self.window(q, self.w);
        self.window(p, self.h)
            .flat_map(move |i| columns.clone().map(move |j| (i * self.w + j) * self.c))
    }
}

/// Returns the maximum of each `size x size` window of `x [n, h, w, c]`, windows `stride` apart. `pads` are the padding above and
/// to the left, and below and to the right: `[1, 1]` in torchvision's ResNets, `[0, 1]` in TensorFlow's on even sides. NaN
/// propagates.
///
/// # Panics
/// If a window does not fit the padded image, `stride` is 0, a padding is more than half of `size`, or, on a GPU, `size` is above
/// 16.
#[track_caller]
pub fn max_pool<'t>(x: &Var<'t>, size: usize, stride: usize, pads: [usize; 2]) -> Var<'t> {
    let [n, h, w, c] = x.value().dims("max_pool: the input");
    let [pad, after] = pads;
    assert!(
        stride > 0 && pad.max(after) <= size / 2 && size <= usize::MAX / 4,
        "max_pool: size {size}, stride {stride}, pads {pad} and {after}"
    );
    let padded = pad + after;
    assert!(
        size > 0 && h.min(w) > 0 && h.min(w) + padded >= size,
        "max_pool: {size} x {size} windows do not fit {h} x {w} images padded by {pad} and {after}"
    );
    let p = (h + padded - size) / stride + 1;
    let q = (w + padded - size) / stride + 1;
    // A larger stride has the same single output in each direction.
    let stride = stride.min(h.max(w) + padded);
    let dims = MaxPoolDims { h, w, c, p, q, size, stride, pad };
    let device = x.tape().device();
    let mut y = Tensor::empty(device, x.value().dtype(), [n, p, q, c]);
    match device.kind() {
        DeviceKind::Cpu if y.dtype() == DType::Bf16 => {
            forward(&mut y, x.value(), dims, device, bf16::load);
        }
        DeviceKind::Cpu => forward(&mut y, x.value(), dims, device, f32::load),
        DeviceKind::Cuda => return on_gpu(x, y, dims),
        DeviceKind::Reference => forward(&mut y, x.value(), dims, device, |x: f64| x),
    }
    let (x_id, x_value, y_value) = (x.id(), x.value().clone(), y.clone());
    x.tape().record("max_pool", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let mut dx = Tensor::floats(device, *x_value.shape());
        let values = [&dy, &x_value, &y_value];
        match device.kind() {
            DeviceKind::Cpu if dy.dtype() == DType::Bf16 => {
                backward(&mut dx, values, dims, device, bf16::load);
            }
            DeviceKind::Cpu => backward(&mut dx, values, dims, device, f32::load),
            // The reference device; the GPU returned above.
            _ => backward(&mut dx, values, dims, device, |x: f64| x),
        }
        gradients.add(x_id, dx); // rounds
    })
}

/// [`max_pool`] on a GPU, which saves one byte per output instead of `x` and `y`.
#[track_caller]
fn on_gpu<'t>(x: &Var<'t>, mut y: Tensor, dims: MaxPoolDims) -> Var<'t> {
    let index = cuda::max_forward(&mut y, x.value(), dims, x.wants_gradient());
    let (x_id, shape, dtype) = (x.id(), *x.shape(), x.value().dtype());
    x.tape().record("max_pool", y, &[x], move |dy, gradients| {
        let index = index.expect("the forward pass saves it if a gradient is wanted");
        let mut dx = Tensor::empty(dy.device(), dtype, shape);
        cuda::max_backward(&mut dx, &dy, &index, dims);
        gradients.add(x_id, dx);
    })
}

fn forward<T: Element, W: PartialOrd>(
    y: &mut Tensor,
    x: &Tensor,
    dims: MaxPoolDims,
    device: &Device,
    wide: impl Fn(T) -> W + Sync,
) {
    let MaxPoolDims { h, w, c, p, q, .. } = dims;
    let (y, x) = (y.data_mut::<T>(), x.data::<T>());
    device.run(|| {
        let images = y.par_chunks_mut((p * q * c).max(1)).zip(x.par_chunks((h * w * c).max(1)));
        images.each(|(y, x)| {
            for (o, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
                for (i, pixel) in dims.pixels(o / q, o % q).enumerate() {
                    for (y, &x) in y.iter_mut().zip(&x[pixel..pixel + c]) {
                        let value = wide(x);
                        // `value != value`: NaN propagates.
                        #[allow(clippy::eq_op)]
                        let larger = i == 0 || value > wide(*y) || value != value;
                        *y = if larger { x } else { *y };
                    }
                }
            }
        });
    });
}

fn backward<T: Element, W: Element + PartialOrd + std::ops::AddAssign + Default>(
    dx: &mut Tensor,
    values: [&Tensor; 3],
    dims: MaxPoolDims,
    device: &Device,
    wide: impl Fn(T) -> W + Sync,
) {
    let MaxPoolDims { h, w, c, p, q, .. } = dims;
    let (dx, [dy, x, y]) = (dx.data_mut::<W>(), values.map(Tensor::data::<T>));
    let (input, output) = ((h * w * c).max(1), (p * q * c).max(1));
    device.run(|| {
        let images = x.par_chunks(input).zip(dy.par_chunks(output).zip(y.par_chunks(output)));
        dx.par_chunks_mut(input).zip(images).each(|(dx, (x, (dy, y)))| {
            dx.fill(W::default());
            // The gradient of each channel that is still to be assigned: the first largest pixel receives all of it.
            let mut rest = vec![W::default(); c];
            let outputs = dy.chunks_exact(c.max(1)).zip(y.chunks_exact(c.max(1)));
            for (o, (dy, y)) in outputs.enumerate() {
                rest.iter_mut().zip(dy).for_each(|(rest, &dy)| *rest = wide(dy));
                for pixel in dims.pixels(o / q, o % q) {
                    let x = &x[pixel..pixel + c];
                    let places = dx[pixel..pixel + c].iter_mut().zip(&mut rest);
                    for ((dx, rest), (x, y)) in places.zip(x.iter().zip(y)) {
                        let largest = wide(*x) == wide(*y);
                        *dx += if largest { *rest } else { W::default() };
                        *rest = if largest { W::default() } else { *rest };
                    }
                }
            }
        });
    });
}

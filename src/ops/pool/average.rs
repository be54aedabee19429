//! Average pooling of small windows; loops generic over the CPU's types and the reference device's f64, with sums in f64.

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::cuda;
use crate::device::DeviceKind;
use crate::tape::Var;
use crate::tensor::{DType, Float, Tensor, by_activation};

/// The sizes of an average pooling.
#[derive(Clone, Copy, Debug)]
pub(super) struct AvgPoolDims {
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) c: usize,
    pub(super) p: usize,
    pub(super) q: usize,
    pub(super) size: usize,
    pub(super) stride: usize,
}

/// The most pixels across a window: its area fits into the kernels' integers.
const MOST_SIZE: usize = 1 << 15;

impl AvgPoolDims {
    /// Returns the pixels of window `o` and the divisor of their sum.
    ///
    /// Windows of stride 1 that extend past the edge count only existing pixels, as TensorFlow's `SAME` does; with a larger
    /// stride they count zeros, as the reference code's explicit padding does.
    fn window(self, o: usize) -> (impl Iterator<Item = usize>, f64) {
        let (i, j) = (o / self.q * self.stride, o % self.q * self.stride);
        let (rows, columns) = (i..(i + self.size).min(self.h), j..(j + self.size).min(self.w));
        let all = if self.stride == 1 { rows.len() * columns.len() } else { self.size * self.size };
        let pixels =
            rows.flat_map(move |i| columns.clone().map(move |j| (i * self.w + j) * self.c));
        (pixels, all as f64)
    }
}

/// Averages `size x size` windows of `x [n, h, w, c]`, `stride` apart, and returns `[n, ceil(h / stride), ceil(w / stride), c]`.
/// The bottom and right edges are padded. This is the shortcut of ResNet-D (He et al. 2018, arXiv:1812.01187) as in
/// google-research/simclr, `resnet.py`.
///
/// # Panics
/// If `x` does not have rank 4, or `size` or `stride` is 0.
#[track_caller]
pub fn avg_pool<'t>(x: &Var<'t>, size: usize, stride: usize) -> Var<'t> {
    let [n, h, w, c] = x.value().dims("avg_pool: the input");
    assert!(
        (1..=MOST_SIZE).contains(&size) && stride > 0,
        "avg_pool: size {size}, stride {stride} over {h} x {w} images; the size is at most {MOST_SIZE}"
    );
    let (p, q) = (h.div_ceil(stride), w.div_ceil(stride));
    // A larger stride has the same single output in each direction; that of 1 is a case of its own.
    let stride = stride.min(h.max(w).max(2));
    let dims = AvgPoolDims { h, w, c, p, q, size, stride };
    let device = x.tape().device();
    let mut y = Tensor::empty(device, x.value().dtype(), [n, p, q, c]);
    match device.kind() {
        DeviceKind::Cpu => by_activation!(y.dtype(), T => {
            let (y, x) = (y.data_mut::<T>(), x.value().data());
            device.run(|| forward(y, x, dims));
        }),
        DeviceKind::Cuda => cuda::average_forward(&mut y, x.value(), dims),
        DeviceKind::Reference => forward::<f64>(y.data_mut(), x.value().data(), dims),
    }
    let (x_id, shape) = (x.id(), *x.shape());
    x.tape().record("avg_pool", y, &[x], move |dy, gradients| {
        let device = dy.device();
        let on_cpu = device.kind() == DeviceKind::Cpu;
        // Windows of stride 1 overlap: on a CPU their sums are in f32, which `add` rounds.
        let mut dx = Tensor::empty(device, if on_cpu { DType::F32 } else { dy.dtype() }, shape);
        match device.kind() {
            DeviceKind::Cpu => {
                let (dx, dy) = (dx.data_mut::<f32>(), dy.cast(DType::F32));
                device.run(|| backward(dx, dy.data(), dims));
            }
            DeviceKind::Cuda => cuda::average_backward(&mut dx, &dy, dims),
            DeviceKind::Reference => backward::<f64>(dx.data_mut(), dy.data(), dims),
        }
        gradients.add(x_id, dx);
    })
}

fn forward<T: Float>(y: &mut [T], x: &[T], dims: AvgPoolDims) {
    let AvgPoolDims { h, w, c, p, q, .. } = dims;
    let images = y.par_chunks_mut((p * q * c).max(1)).zip(x.par_chunks((h * w * c).max(1)));
    images.each(|(y, x)| {
        let mut sums = vec![0.0; c];
        for (o, y) in y.chunks_exact_mut(c.max(1)).enumerate() {
            sums.fill(0.0);
            let (pixels, all) = dims.window(o);
            for pixel in pixels {
                sums.iter_mut().zip(&x[pixel..]).for_each(|(sum, x)| *sum += x.widen());
            }
            y.iter_mut().zip(&sums).for_each(|(y, sum)| *y = T::narrow(sum / all));
        }
    });
}

fn backward<T: Float>(dx: &mut [T], dy: &[T], dims: AvgPoolDims) {
    let AvgPoolDims { h, w, c, p, q, .. } = dims;
    let images = dx.par_chunks_mut((h * w * c).max(1)).zip(dy.par_chunks((p * q * c).max(1)));
    images.each(|(dx, dy)| {
        dx.fill(T::narrow(0.0));
        for (o, dy) in dy.chunks_exact(c.max(1)).enumerate() {
            let (pixels, all) = dims.window(o);
            for pixel in pixels {
                for (dx, dy) in dx[pixel..][..c].iter_mut().zip(dy) {
                    *dx = T::narrow(dx.widen() + dy.widen() / all);
                }
            }
        }
    });
}

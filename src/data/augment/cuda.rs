//! Launches `kernels/augment.cu`, in which a block makes a view.

use super::params::Params;
use super::policy::Policy;
use super::view::{View, taps};
use crate::data::source::Image;
use crate::device::Device;
use crate::device::cuda::{Launch, Table, augment_bf16, augment_f32, int};
use crate::tensor::{DType, Tensor};

/// The most times that a crop may be as wide or high as the view.
pub const MOST_SHRINKING: usize = 1000;

/// Makes views of one size on a GPU, a fixed number at a time; keeps its device buffers.
pub struct GpuAugmenter {
    device: Device,
    count: usize,
    size: usize,
    views: Table<u8>,
    gaussian: Table<f32>,
    scratch: Table<u32>,
    blocks: usize,
    threads: usize,
}

impl GpuAugmenter {
    /// Creates an augmenter for `count` views of `size` pixels.
    pub fn new(device: &Device, count: usize, size: usize) -> Self {
        // Four pixels per thread, up to 512 threads: a block makes one view, and a multiprocessor holds 1,024 threads.
        let threads = (size * size).div_ceil(4).next_multiple_of(32).min(512);
        let blocks = count.min(device.gpu().multiprocessors() * (1024 / threads)).max(1);
        Self {
            device: device.clone(),
            count,
            size,
            views: Table::room(device, count * size_of::<View>()),
            gaussian: Table::room(device, count * taps(size)),
            scratch: Table::room(device, blocks * 4 * size * size),
            blocks,
            threads,
        }
    }

    /// Writes `views` `[n, size, size, 4]` of images in `pixels` to `out`, f32 or bf16, in stream order; `gaussian` holds the
    /// weights of their blurs.
    ///
    /// # Panics
    /// If a size does not match, or a view exceeds `pixels`.
    #[track_caller]
    pub fn make(&mut self, views: &[View], gaussian: &[f32], pixels: &Table<u8>, out: &mut Tensor) {
        let (n, size) = (self.count, self.size);
        assert_eq!(views.len(), n, "augment: a maker of {n} views");
        assert_eq!(**out.shape(), [n, size, size, 4], "augment: room for the views");
        for view in views {
            let end = view.end();
            assert!(
                end <= pixels.len() as i64 && view.shrinks_by() <= MOST_SHRINKING,
                "augment: {view:?} of {} bytes",
                pixels.len()
            );
        }
        self.views.write(bytemuck::cast_slice(views));
        self.gaussian.write(gaussian);
        let blocks = self.blocks.min(n);
        let launch = Launch::new(self.device.gpu(), [blocks, 1, 1], [self.threads, 1, 1]);
        let (scratch, from) = (self.scratch.device_out(), pixels.device_in());
        let (views, gaussian) = (self.views.device_in(), self.gaussian.device_in());
        let (n, size) = (int(n), int(size));
        // SAFETY: the views lie in `pixels`, there is a row of `out` and of `gaussian` for each, and `scratch` has four words
        // for each pixel of a block.
        unsafe {
            match out.dtype() {
                DType::Bf16 => {
                    let out = out.device_out();
                    augment_bf16(launch, out, scratch, from, views, gaussian, n, size);
                }
                _ => augment_f32(launch, out.device_out(), scratch, from, views, gaussian, n, size),
            }
        }
    }
}

/// Makes views on a GPU: of each image the one that its policy and parameters describe, in 8 bits bit-identical to
/// [`Policy::apply`]. `out` is `[n, size, size, 4]`, f32 or bf16.
///
/// # Panics
/// If a policy's size is not that of `out`, parameters are not ones that a policy draws for the image, or a crop is more than
/// 1,000 times as wide or high as the view.
#[track_caller]
pub fn apply_on_gpu(views: &[(&Policy, &Params, &Image)], out: &mut Tensor) {
    let device = out.device().clone();
    let [n, size, _, _] = out.dims("augment: views");
    let (mut bytes, mut words, mut gaussian) = (Vec::new(), Vec::new(), Vec::new());
    for (policy, params, image) in views {
        assert_eq!(policy.size, size, "augment: a view of another size than the output");
        let at = bytes.len() as i64;
        image.expect_whole();
        words.push(View::new(policy, params, [image.width, image.height], at, &mut gaussian));
        bytes.extend_from_slice(&image.pixels);
    }
    if n > 0 {
        let pixels = Table::new(&device, &bytes);
        GpuAugmenter::new(&device, n, size).make(&words, &gaussian, &pixels, out);
    }
}

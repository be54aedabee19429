//! Launches `kernels/augment.cu`, in which a block makes a view, and `kernels/augment_channels.cu`, in which it makes three channels
//! of one.

use super::channels;
use super::params::Params;
use super::policy::Policy;
use super::view::{ChannelView, View, taps};
use crate::data::source::{Format, Image};
use crate::device::Device;
use crate::device::cuda::{
    Launch, Table, augment_bf16, augment_channels_bf16, augment_channels_f32, augment_f32, int,
};
use crate::tensor::{DType, Tensor};

/// The most times that a crop may be as wide or high as the view.
pub const MOST_SHRINKING: usize = 1000;

/// Makes views of one size on a GPU, a fixed number at a time; keeps its device buffers.
pub struct GpuAugmenter {
    device: Device,
    count: usize,
    size: usize,
    views: Table<u8>,
    channels: Table<u8>,
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
            channels: Table::room(device, 0),
            gaussian: Table::room(device, count * taps(size)),
            scratch: Table::room(device, blocks * 4 * size * size),
            blocks,
            threads,
        }
    }

    /// Returns how many views it makes at a time.
    pub fn views(&self) -> usize {
        self.count
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

/// Views for a GPU: of images of RGB of 8 bits, or of others.
#[derive(Debug)]
pub enum Made {
    /// A view each.
    Rgb(Vec<View>),
    /// As many groups of three channels for each view.
    Channels(Vec<ChannelView>),
}

impl Default for Made {
    fn default() -> Self {
        Self::Rgb(Vec::new())
    }
}

impl Made {
    /// Returns the views, each with what its policy draws, of images of a format.
    pub fn of<'a>(
        views: impl Iterator<Item = (&'a View, &'a Policy, Option<&'a Params>)>,
        format: Format,
        needed: bool,
    ) -> Self {
        if !needed {
            return Self::Rgb(views.map(|(view, ..)| *view).collect());
        }
        let groups =
            views.flat_map(|(view, policy, params)| ChannelView::of(view, policy, params, format));
        Self::Channels(groups.collect())
    }
}

impl GpuAugmenter {
    /// As [`GpuAugmenter::make`], of images of any format; `out` is `[n, size, size, channels]`.
    ///
    /// # Panics
    /// As [`GpuAugmenter::make`].
    #[track_caller]
    pub fn make_any(
        &mut self,
        made: &Made,
        gaussian: &[f32],
        pixels: &Table<u8>,
        out: &mut Tensor,
    ) {
        let groups = match made {
            Made::Rgb(views) => return self.make(views, gaussian, pixels, out),
            Made::Channels(groups) => groups,
        };
        let (n, size) = (self.count, self.size);
        assert!(
            !groups.is_empty() && groups.len().is_multiple_of(n),
            "augment: a maker of {n} views"
        );
        let padded = out.shape()[3];
        assert_eq!(**out.shape(), [n, size, size, padded], "augment: room for the views");
        for group in groups {
            let end = group.end();
            assert!(
                group.padded() == padded
                    && end <= pixels.len() as i64
                    && group.view.shrinks_by() <= MOST_SHRINKING,
                "augment: {group:?} of {} bytes",
                pixels.len()
            );
        }
        let bytes: &[u8] = bytemuck::cast_slice(groups);
        if self.channels.len() != bytes.len() {
            self.channels = Table::room(&self.device, bytes.len());
        }
        self.channels.write(bytes);
        self.gaussian.write(gaussian);
        let blocks = self.blocks.min(groups.len());
        let launch = Launch::new(self.device.gpu(), [blocks, 1, 1], [self.threads, 1, 1]);
        let (scratch, from) = (self.scratch.device_out(), pixels.device_in());
        let (views, gaussian) = (self.channels.device_in(), self.gaussian.device_in());
        let (each, n, size) = (int(groups.len() / n), int(n), int(size));
        // SAFETY: the views lie in `pixels`, there is a row of `out` and of `gaussian` for each, with room for its channels, and
        // `scratch` has four words for each pixel of a block.
        unsafe {
            match out.dtype() {
                DType::Bf16 => augment_channels_bf16(
                    launch,
                    out.device_out(),
                    scratch,
                    from,
                    views,
                    gaussian,
                    n,
                    each,
                    size,
                ),
                _ => augment_channels_f32(
                    launch,
                    out.device_out(),
                    scratch,
                    from,
                    views,
                    gaussian,
                    n,
                    each,
                    size,
                ),
            }
        }
    }
}

/// Makes views on a GPU: of each image the one that its policy and parameters describe, in 8 bits bit-identical to
/// [`Policy::apply`]. `out` is `[n, size, size, 4]`, f32 or bf16, or has the images' padded channels.
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
        assert_eq!(image.format, views[0].2.format, "augment: images of different formats");
        words.push(View::new(policy, params, [image.width, image.height], at, &mut gaussian));
        bytes.extend_from_slice(&image.pixels);
    }
    if let Some((_, _, image)) = views.first() {
        let format = image.format;
        let needed = views.iter().any(|(policy, ..)| channels::are_needed(policy, format));
        let with = words.iter().zip(views).map(|(view, &(policy, params, _))| {
            assert!(
                !needed || channels::are_needed(policy, format),
                "augment: policies with channel operations and without"
            );
            (view, policy, Some(params))
        });
        let made = Made::of(with, format, needed);
        let pixels = Table::new(&device, &bytes);
        GpuAugmenter::new(&device, n, size).make_any(&made, &gaussian, &pixels, out);
    }
}

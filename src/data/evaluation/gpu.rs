//! The evaluation's batches on a GPU: threads read the images of the next batch while the GPU computes with the one before, and
//! images that lie on the GPU are not read at all.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;

use crate::data::augment::{GpuAugmenter, MOST_SHRINKING, Made, Policy, Transform, View, taps};
use crate::data::batch::{Batch, Skipped};
use crate::data::source::{Format, Image, Source};
use crate::device::Device;
use crate::device::cuda::{Feed, Pinned, PinnedBatch, Table};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Batches that are read before they are wanted.
const AHEAD: usize = 1;

/// What batches are made of.
pub(super) struct Wanted<'a> {
    pub by: Transform,
    pub source: &'a dyn Source,
    pub policy: &'a Policy,
    pub device: &'a Device,
}

/// The images of a batch, as a GPU needs them.
struct Read {
    indices: Vec<usize>,
    /// Of each index.
    views: Vec<View>,
    pixels: Pixels,
    skipped: Vec<Skipped>,
}

/// Where the pixels are.
enum Pixels {
    /// In pinned memory, read just now.
    Pinned(PinnedBatch),
    /// On the GPU.
    Resident(Arc<Table<u8>>),
}

/// Makes the batches of images that were read.
struct Maker<'a> {
    wanted: &'a Wanted<'a>,
    feed: Feed,
    augmenter: Option<GpuAugmenter>,
}

impl Wanted<'_> {
    /// Hands images to `take`, `batch` at a time and in order.
    ///
    /// # Errors
    /// If an image cannot be read for another reason than that it is broken, or `take` fails.
    pub(super) fn each(
        &self,
        range: Range<usize>,
        batch: usize,
        take: &mut dyn FnMut(Batch, Vec<Skipped>) -> Result<()>,
    ) -> Result<()> {
        let pinned = Pinned::new(self.device);
        let mut maker = Maker { wanted: self, feed: Feed::new(self.device), augmenter: None };
        if range.len() <= batch {
            let (batch, skipped) = maker.make(self.read(range, &pinned)?);
            return take(batch, skipped);
        }
        let pinned = &pinned;
        std::thread::scope(|scope| {
            let (sender, received) = sync_channel(AHEAD);
            let reader = scope.spawn(move || {
                for from in range.clone().step_by(batch) {
                    let read = self.read(from..(from + batch).min(range.end), pinned);
                    let failed = read.is_err();
                    if sender.send(read).is_err() || failed {
                        return;
                    }
                }
            });
            let taken = received.iter().try_for_each(|read| {
                let (batch, skipped) = maker.make(read?);
                take(batch, skipped)
            });
            drop(received); // a reader that wants to hand over another batch ends
            reader.join().unwrap_or_else(|panic| resume_unwind(panic));
            taken
        })
    }

    /// Reads images on the device's threads; broken ones are left out.
    fn read(&self, range: Range<usize>, pinned: &Arc<Pinned>) -> Result<Read> {
        if let Some(found) = self.find(range.clone()) {
            return found;
        }
        let pixels = pinned.take();
        let read = |image: &mut Image, index: usize| {
            self.source.read(index, image)?;
            let mut view = self.view(index, [image.width, image.height], 0)?;
            view.pixels = pixels.append(&image.pixels) as i64;
            Ok(view)
        };
        let views: Vec<Result<View>> = self
            .device
            .run(|| range.clone().into_par_iter().map_init(Image::default, read).collect());
        pixels.complete();
        Read::of(range, views, Pixels::Pinned(pixels))
    }

    /// Finds the images on the GPU. `None` if they have to be read: none of them lies there, or one does not that can be read.
    fn find(&self, range: Range<usize>) -> Option<Result<Read>> {
        let resident: Vec<_> = range.clone().map(|index| self.source.on_gpu(index)).collect();
        let table = resident.iter().flatten().next()?.pixels.clone();
        if !table.device().same(self.device) {
            return None;
        }
        let mut views = Vec::with_capacity(range.len());
        for (index, resident) in range.clone().zip(resident) {
            let view = match resident {
                Some(found) => self.view(index, found.size, found.at),
                // Broken when the set was uploaded. Read again, because it says why.
                None => Err(self.source.read(index, &mut Image::default()).err()?),
            };
            views.push(view);
        }
        Some(Read::of(range, views, Pixels::Resident(table)))
    }

    fn view(&self, index: usize, [width, height]: [usize; 2], at: i64) -> Result<View> {
        View::middle(self.by, [width, height], self.policy, at)
            .filter(|view| view.shrinks_by() <= MOST_SHRINKING)
            .ok_or_else(|| {
                let reason =
                    format!("has too many pixels for a GPU ({width} x {height}): make it smaller");
                Error::format(self.source.name(index), reason)
            })
    }
}

impl Read {
    fn of(range: Range<usize>, views: Vec<Result<View>>, pixels: Pixels) -> Result<Self> {
        let mut read = Self { indices: Vec::new(), views: Vec::new(), pixels, skipped: Vec::new() };
        for (index, view) in range.zip(views) {
            match view {
                Ok(view) => {
                    read.indices.push(index);
                    read.views.push(view);
                }
                Err(error) => read.skipped.push(Skipped::new(index, error)?),
            }
        }
        Ok(read)
    }
}

impl Maker<'_> {
    /// Queues the kernel that makes the images of a batch, and before it the copy of their pixels.
    fn make(&mut self, read: Read) -> (Batch, Vec<Skipped>) {
        let Wanted { source, policy, device, .. } = *self.wanted;
        let (n, size, format) = (read.views.len(), policy.size, source.format());
        let shape = [n, size, size, format.device_channels()];
        let mut images = Tensor::empty(device, DType::of_activations(device), shape);
        if n > 0 {
            let augmenter = self
                .augmenter
                .take()
                .filter(|augmenter| augmenter.views() == n)
                .unwrap_or_else(|| GpuAugmenter::new(device, n, size));
            let augmenter = self.augmenter.insert(augmenter);
            let gaussian = vec![0.0; n * taps(size)];
            let views = read.views.iter().map(|view| (view, policy, None));
            let made = Made::of(views, format, format != Format::RGB);
            let mut make =
                |pixels: &Table<u8>| augmenter.make_any(&made, &gaussian, pixels, &mut images);
            match read.pixels {
                Pixels::Pinned(batch) => self.feed.send(batch, make),
                Pixels::Resident(table) => make(&table),
            }
        }
        let label = |&index: &usize| source.label(index).map_or(-1, |label| label as i32);
        let labels = read.indices.iter().map(label).collect();
        let indices = read.indices.iter().map(|&index| index as u32).collect();
        (Batch { epoch: 0, position: 0, indices, labels, crops: vec![images] }, read.skipped)
    }
}

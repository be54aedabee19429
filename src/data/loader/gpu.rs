//! A loader's images and crops on a GPU: the whole set if it fits, otherwise batch by batch.

use std::sync::Arc;

use rayon::prelude::*;

use super::plan::{BatchPlan, CropBackend, lock};
use super::prepared::{AugmentParams, Place};
use super::resident::Resident;
use crate::data::augment::GpuAugmenter;
use crate::data::batch::Skipped;
use crate::data::source::{Image, Source};
use crate::device::cuda::{Feed, Pinned, Table};
use crate::device::{Device, gib};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Images whose sizes are read before the total is compared with the budget.
const SIZES_AT_ONCE: usize = 4096;
/// Bytes of decoded images in one upload.
const UPLOAD: i64 = 32 << 20;

/// Makes a loader's crops on a GPU.
pub struct GpuCrops {
    /// One per crop size.
    augmenters: Vec<GpuAugmenter>,
    pixels: Pixels,
}

/// Where the pixels come from.
enum Pixels {
    /// The whole set, which lies there.
    Set(Arc<Table<u8>>, Arc<[Place]>),
    /// Batch after batch.
    Batches(Box<Feed>),
}

impl GpuCrops {
    /// Uploads a plan's set to the GPU if it needs at most `budget` bytes (default: half of the free memory), and sets
    /// the plan to make its crops there. Returns a sentence that says where the images lie.
    pub fn new(
        plan: &mut BatchPlan,
        device: &Device,
        budget: Option<usize>,
    ) -> Result<(Self, String)> {
        let augmenter = |(size, views): &(usize, Vec<usize>)| {
            GpuAugmenter::new(device, views.len() * plan.batch, *size)
        };
        let augmenters = plan.groups.iter().map(augmenter).collect();
        let budget = budget.unwrap_or_else(|| device.gpu().memory().0 / 2);
        let images = plan.source.len();
        let skip = |index: usize, error: Error| {
            let Skipped { index, reason } = Skipped::new(index, error)?;
            lock(&plan.skipped).insert(index, reason);
            Ok(())
        };
        let (pixels, backend, sentence) = match upload_set(device, &*plan.source, budget, &skip)? {
            Some((pixels, places)) => {
                let bytes = gib(pixels.len());
                let sentence = format!("images: all {images} lie on the GPU, {bytes}");
                let pixels = Pixels::Set(Arc::new(pixels), places.clone());
                (pixels, CropBackend::GpuFromSet(places), sentence)
            }
            None => {
                let sentence = format!(
                    "images: uploaded batch by batch, because all {images} need more than their {} of the GPU (data.gpu_memory)",
                    gib(budget)
                );
                let backend = CropBackend::GpuFromBatch(Pinned::new(device));
                (Pixels::Batches(Box::new(Feed::new(device))), backend, sentence)
            }
        };
        plan.backend = backend;
        Ok((Self { augmenters, pixels }, sentence))
    }

    /// Returns the set as a source that knows where its images lie, if they lie on the GPU.
    pub fn resident(&self, source: &Arc<dyn Source>) -> Option<Arc<dyn Source>> {
        let Pixels::Set(pixels, places) = &self.pixels else { return None };
        let (source, pixels, places) = (source.clone(), pixels.clone(), places.clone());
        Some(Arc::new(Resident { source, pixels, places }))
    }

    /// Queues the kernels that make a batch's crops, and before them the copy of its pixels if the set is not on the GPU; one
    /// tensor per crop size.
    #[track_caller]
    pub fn make(&mut self, params: AugmentParams, crops: &mut [Tensor]) {
        let Self { augmenters, pixels } = self;
        let augment = |pixels: &Table<u8>| {
            for ((augmenter, (views, gaussian)), crops) in
                augmenters.iter_mut().zip(&params.groups).zip(crops)
            {
                augmenter.make_any(views, gaussian, pixels, crops);
            }
        };
        match (pixels, params.pixels) {
            (Pixels::Set(pixels, _), _) => augment(pixels),
            (Pixels::Batches(feed), Some(batch)) => feed.send(batch, augment),
            (Pixels::Batches(_), None) => unreachable!("the threads read the pixels of each batch"),
        }
    }
}

/// Where the images of a set would lie, and how many bytes they need; `None` if that is more than `budget`.
fn places(
    device: &Device,
    source: &dyn Source,
    budget: usize,
    skip: &dyn Fn(usize, Error) -> Result<()>,
) -> Result<Option<(Vec<Place>, usize)>> {
    let (mut places, mut at) = (Vec::with_capacity(source.len()), 0);
    for from in (0..source.len()).step_by(SIZES_AT_ONCE) {
        let range = from..(from + SIZES_AT_ONCE).min(source.len());
        let sizes: Vec<_> =
            device.run(|| range.clone().into_par_iter().map(|i| source.size(i)).collect());
        for (i, size) in range.zip(sizes) {
            let size = size.or_else(|error| skip(i, error).map(|()| [0; 2]))?;
            places.push(Place { at, size, pixel: source.format().bytes() });
            at += places[i].bytes();
        }
        if at as usize > budget {
            return Ok(None);
        }
    }
    Ok(Some((places, at as usize)))
}

/// The pixels of a set on a GPU, and where each image lies in them.
type UploadedSet = (Table<u8>, Arc<[Place]>);

/// Uploads the images of a set and returns where each lies; `None` if they need more than `budget` bytes.
fn upload_set(
    device: &Device,
    source: &dyn Source,
    budget: usize,
    skip: &dyn Fn(usize, Error) -> Result<()>,
) -> Result<Option<UploadedSet>> {
    let Some((mut places, bytes)) = places(device, source, budget, skip)? else { return Ok(None) };
    let mut pixels = Table::room(device, bytes);
    let mut from = 0;
    while from < places.len() {
        let begin = places[from].at;
        let fitting = places[from..].partition_point(|p| p.at + p.bytes() - begin <= UPLOAD);
        let range = from..from + fitting.max(1);
        let read = |i: usize| {
            let mut image = Image::default();
            source.read(i, &mut image).map(|()| image)
        };
        let images: Vec<_> = device.run(|| range.clone().into_par_iter().map(read).collect());
        let mut buffer = Vec::new();
        for (i, image) in range.clone().zip(images) {
            let place = &mut places[i];
            match image {
                Ok(image) if [image.width, image.height] == place.size => {
                    buffer.extend_from_slice(&image.pixels);
                }
                // Broken behind its headers, or replaced since.
                broken => {
                    buffer.resize(buffer.len() + place.bytes() as usize, 0);
                    place.size = [0; 2];
                    let changed =
                        || Error::config(format!("{} changed while it was read", source.name(i)));
                    skip(i, broken.err().unwrap_or_else(changed))?;
                }
            }
        }
        pixels.write_at(begin as usize, &buffer);
        from = range.end;
    }
    Ok(Some((pixels, places.into())))
}

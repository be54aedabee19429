//! A loader's images on a GPU: all of a set if they fit, else those of a batch; and the crops made of them.

use std::sync::Arc;

use rayon::prelude::*;

use super::augment::{Maker, View};
use super::plan::{BatchPlan, CropBackend, lock};
use super::source::{Image, Source};
use crate::device::cuda::Table;
use crate::device::{Device, gib};
use crate::error::Error;
use crate::tensor::Tensor;

/// Images whose sizes are asked for before they are added up.
const LOOKED_AT: usize = 4096;
/// Bytes of decoded images that are on their way to the GPU at a time.
const PIECE: i64 = 32 << 20;

/// Where an image of a set on a GPU lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its first byte.
    pub at: i64,
    /// Width and height; zeros where it cannot be read.
    pub size: [usize; 2],
}

impl Place {
    fn bytes(&self) -> i64 {
        3 * (self.size[0] * self.size[1]) as i64
    }
}

/// The views of a batch before they are made, as a loader's threads leave them.
#[derive(Debug, Default)]
pub struct AugmentParams {
    /// For each crop size the views, and the weights of their blurs.
    pub groups: Vec<(Vec<View>, Vec<f32>)>,
    /// The pixels of each sample; none where the set is on the GPU.
    pub images: Vec<Vec<u8>>,
}

/// Makes a loader's crops on a GPU.
pub struct OnGpu {
    device: Device,
    makers: Vec<Maker>,
    /// Of the set, or of one batch.
    pixels: Table<u8>,
}

impl OnGpu {
    /// Takes a plan's set to the GPU if it needs no more than `budget` bytes there (half of what is free, if not said), and
    /// plans that its crops are made there. Says in a sentence where the images lie.
    pub fn of(plan: &mut BatchPlan, device: &Device, budget: Option<usize>) -> (Self, String) {
        let maker = |(size, views): &(usize, Vec<usize>)| {
            Maker::new(device, views.len() * plan.batch, *size)
        };
        let makers = plan.groups.iter().map(maker).collect();
        let budget = budget.unwrap_or_else(|| device.gpu().memory().0 / 2);
        let images = plan.source.len();
        let skip = |index: usize, error: Error| {
            lock(&plan.skipped).insert(index as u32, error.to_string());
        };
        let (pixels, maker, sentence) = match take(device, &*plan.source, budget, &skip) {
            Some((pixels, places)) => {
                let bytes = gib(pixels.len());
                let sentence = format!("images: all {images} lie on the GPU, {bytes}");
                (pixels, CropBackend::GpuFromSet(places), sentence)
            }
            None => {
                let sentence = format!(
                    "images: they go to the GPU batch by batch, for all {images} need more than the {} that they may take there",
                    gib(budget)
                );
                (Table::room(device, 0), CropBackend::GpuFromBatch, sentence)
            }
        };
        plan.maker = maker;
        (Self { device: device.clone(), makers, pixels }, sentence)
    }

    /// Makes a batch's crops, behind whatever is queued; one tensor for each crop size.
    #[track_caller]
    pub fn make(&mut self, mut drawn: AugmentParams, crops: &mut [Tensor]) {
        self.upload(&mut drawn);
        for ((maker, (views, gaussian)), crops) in
            self.makers.iter_mut().zip(&drawn.groups).zip(crops)
        {
            maker.make(views, gaussian, &self.pixels, crops);
        }
    }

    /// Takes a batch's images to the GPU and tells its views where.
    fn upload(&mut self, drawn: &mut AugmentParams) {
        let bytes = drawn.images.iter().map(Vec::len).sum::<usize>();
        if bytes == 0 {
            return;
        }
        if bytes > self.pixels.len() {
            // Few sizes: the pool keeps what is given back, by size.
            self.pixels = Table::room(&self.device, bytes.next_power_of_two());
        }
        let mut at = 0;
        for (sample, image) in drawn.images.iter().enumerate() {
            self.pixels.write_at(at, image);
            for (views, _) in &mut drawn.groups {
                let own = views.iter_mut().skip(sample).step_by(drawn.images.len());
                own.for_each(|view| view.pixels = at as i64);
            }
            at += image.len();
        }
    }
}

/// Where the images of a set would lie, and how many bytes they take; `None` when that is more than `budget`.
fn places(
    device: &Device,
    source: &dyn Source,
    budget: usize,
    skip: &dyn Fn(usize, Error),
) -> Option<(Vec<Place>, usize)> {
    let (mut places, mut at) = (Vec::with_capacity(source.len()), 0);
    for from in (0..source.len()).step_by(LOOKED_AT) {
        let range = from..(from + LOOKED_AT).min(source.len());
        let sizes: Vec<_> =
            device.run(|| range.clone().into_par_iter().map(|i| source.size(i)).collect());
        for (i, size) in range.zip(sizes) {
            let size = size.unwrap_or_else(|error| {
                skip(i, error);
                [0; 2]
            });
            places.push(Place { at, size });
            at += places[i].bytes();
        }
        if at as usize > budget {
            return None;
        }
    }
    Some((places, at as usize))
}

/// The images of a set on a GPU, and where each lies; `None` when they need more than `budget` bytes.
fn take(
    device: &Device,
    source: &dyn Source,
    budget: usize,
    skip: &dyn Fn(usize, Error),
) -> Option<(Table<u8>, Arc<[Place]>)> {
    let (mut places, bytes) = places(device, source, budget, skip)?;
    let mut pixels = Table::room(device, bytes);
    let mut from = 0;
    while from < places.len() {
        let begin = places[from].at;
        let fit = places[from..].partition_point(|p| p.at + p.bytes() - begin <= PIECE);
        let range = from..from + fit.max(1);
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
                // Broken behind its headers, or another file by now.
                broken => {
                    buffer.resize(buffer.len() + place.bytes() as usize, 0);
                    place.size = [0; 2];
                    let changed =
                        || Error::config(format!("{} changed while it was read", source.name(i)));
                    skip(i, broken.err().unwrap_or_else(changed));
                }
            }
        }
        pixels.write_at(begin as usize, &buffer);
        from = range.end;
    }
    Some((pixels, places.into()))
}

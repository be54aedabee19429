//! Features of images under the evaluation transform: those of a backbone, or the pixels themselves.

use std::collections::HashSet;
use std::ops::Range;

use rayon::prelude::*;

use super::rows::Images;
use crate::arena::Arena;
use crate::data::augment::Policy;
use crate::data::{Image, Skipped, Source, Transform};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::supervised::Classifier;
use crate::nn::ResNet;
use crate::tape::evaluate;
use crate::tensor::Tensor;

/// Images per forward pass.
const BATCH: usize = 256;

/// Features of labelled images, on the host.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[n, d]`, row-major.
    pub values: Vec<f32>,
    /// Length of a row.
    pub d: usize,
    /// The class of each row.
    pub labels: Vec<u32>,
    /// Images that could not be read and have no row.
    pub skipped: Vec<Skipped>,
}

impl Features {
    /// Returns features without rows, of row length `d`.
    pub fn none(d: usize) -> Self {
        Self { values: Vec::new(), d, labels: Vec::new(), skipped: Vec::new() }
    }

    /// Returns the index in the source of each row's image.
    pub fn images(&self) -> Vec<u32> {
        let skipped: HashSet<u32> = self.skipped.iter().map(|skipped| skipped.index).collect();
        let all = 0..(self.labels.len() + self.skipped.len()) as u32;
        all.filter(|index| !skipped.contains(index)).collect()
    }

    /// Returns the features of some rows, by their places.
    pub(crate) fn rows(&self, range: Range<usize>) -> Self {
        Self {
            values: self.values[range.start * self.d..range.end * self.d].to_vec(),
            d: self.d,
            labels: self.labels[range].to_vec(),
            skipped: Vec::new(),
        }
    }

    /// Whether all rows are the same vector, to rounding: a collapsed or dead backbone, of which every figure is chance.
    pub fn are_constant(&self) -> bool {
        let first = &self.values[..self.d.min(self.values.len())];
        let largest = first.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let equal =
            |row: &[f32]| row.iter().zip(first).all(|(a, b)| (a - b).abs() <= 1e-6 * largest);
        self.labels.len() > 1 && self.values.par_chunks_exact(self.d.max(1)).all(equal)
    }

    /// Appends the rows of the images that follow in the source.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn append(&mut self, more: Self) {
        assert_eq!(self.d, more.d, "features: rows of different lengths");
        let before = (self.labels.len() + self.skipped.len()) as u32;
        let shifted = |skipped: Skipped| Skipped { index: before + skipped.index, ..skipped };
        self.values.extend(more.values);
        self.labels.extend(more.labels);
        self.skipped.extend(more.skipped.into_iter().map(shifted));
    }
}

/// Refuses rows with NaN or infinite values: every figure computed from them would be that of chance. `what` names the rows'
/// kind, `name` the image of a row.
pub(super) fn check_finite(
    values: &[f32],
    d: usize,
    what: &str,
    name: impl Fn(usize) -> String,
) -> Result<()> {
    match values.chunks_exact(d.max(1)).position(|row| !row.iter().all(|v| v.is_finite())) {
        None => Ok(()),
        Some(row) => Err(Error::Diverged(format!(
            "{}: the {what} of this image are NaN or infinite: the weights diverged, or the normalisation does not fit them",
            name(row)
        ))),
    }
}

/// Reads every image, and returns those that cannot be read: a check before hours of work.
///
/// # Errors
/// If there is no image, none can be read, or reading fails for another reason than a broken image.
pub fn unreadable(source: &dyn Source, device: &Device) -> Result<Vec<Skipped>> {
    let read = |image: &mut Image, index: usize| {
        let error = source.read(index, image).err()?;
        Some(Skipped::new(index, error))
    };
    let skipped: Vec<Skipped> = device.run(|| {
        let found = (0..source.len()).into_par_iter().map_init(Image::default, read).flatten();
        found.collect::<Result<_>>()
    })?;
    some_readable(source.len() - skipped.len(), &skipped)?;
    Ok(skipped)
}

/// Refuses a set of which no image could be read.
pub(super) fn some_readable(read: usize, skipped: &[Skipped]) -> Result<()> {
    match (read, skipped) {
        (0, []) => Err(Error::config("there are no images to evaluate on")),
        (0, [first, ..]) => Err(Error::Config(format!(
            "none of the {} images can be read; the first: {}",
            skipped.len(),
            first.reason
        ))),
        _ => Ok(()),
    }
}

/// Computes the features of every image with `backbone` and the arena's weights, in evaluation mode.
///
/// Batch norm uses its running statistics. Each image is the centre crop, resampled and normalised by `policy`. Images that
/// cannot be read have no row and are listed in [`Features::skipped`].
///
/// # Errors
/// If an image has no label, its features are NaN or infinite, or the device fails.
pub fn backbone_features(
    arena: &Arena,
    backbone: &ResNet,
    source: &dyn Source,
    policy: &Policy,
) -> Result<Features> {
    collect(source, policy, arena.device(), ("features", backbone.features()), |images| {
        evaluate(arena, |tape| backbone.forward(&tape.input(images)))
    })
}

/// Computes the features `[n, d]` of the readable images `share` of a source as [`backbone_features`], with or without labels.
pub(super) fn features_of(
    arena: &Arena,
    backbone: &ResNet,
    source: &dyn Source,
    share: Range<usize>,
    policy: &Policy,
) -> Result<Vec<f32>> {
    let d = backbone.features();
    let mut all = Vec::with_capacity(share.len() * d);
    let device = arena.device();
    let images =
        Images { source, range: share, batch: BATCH, by: Transform::Center, policy, device };
    let forward = |images: &Tensor| evaluate(arena, |tape| backbone.forward(&tape.input(images)));
    images.rows(("features", d), forward, |rows| {
        all.extend(rows.values);
        Ok(())
    })?;
    Ok(all)
}

/// Returns the share, in `0..=1`, of images whose largest logit is that of their class.
///
/// Batch norm uses its running statistics. Each image is the centre crop, resampled and normalised by `policy`. Images that
/// cannot be read do not count.
///
/// # Errors
/// If an image has no label, no image can be read, logits are NaN or infinite, or the device fails.
pub fn classifier_accuracy(
    arena: &Arena,
    classifier: &Classifier,
    source: &dyn Source,
    policy: &Policy,
) -> Result<f64> {
    let [correct, total] = count_correct(arena, classifier, source, policy)?;
    if total == 0 {
        return Err(Error::config("none of the images to evaluate on can be read"));
    }
    Ok(correct as f64 / total as f64)
}

/// Returns `[correct, total]`, the counts behind [`classifier_accuracy`].
///
/// # Errors
/// As [`classifier_accuracy`].
pub(crate) fn count_correct(
    arena: &Arena,
    classifier: &Classifier,
    source: &dyn Source,
    policy: &Policy,
) -> Result<[usize; 2]> {
    let d = classifier.classes();
    let logits = collect(source, policy, arena.device(), ("logits", d), |images| {
        evaluate(arena, |tape| classifier.forward(&tape.input(images)))
    })?;
    Ok([correct_rows(&logits.values, &logits.labels), logits.labels.len()])
}

/// Counts the rows of logits whose largest is that of their class. Of equal logits the first counts as the largest, so that a
/// constant row is not correct for every class.
pub(super) fn correct_rows(logits: &[f32], labels: &[u32]) -> usize {
    let classes = (logits.len() / labels.len().max(1)).max(1);
    let argmax =
        |row: &[f32]| (0..classes).fold(0, |best, j| if row[j] > row[best] { j } else { best });
    let rows = logits.chunks_exact(classes).zip(labels);
    rows.filter(|(row, label)| argmax(row) == **label as usize).count()
}

/// Returns the pixels as features, a value per position and channel: the baseline that needs no training.
///
/// # Errors
/// If an image has no label.
pub fn pixel_features(source: &dyn Source, size: usize, device: &Device) -> Result<Features> {
    let device = device.host(); // there is nothing for a GPU to compute here
    let format = source.format();
    let (channels, padded) = (format.channels, format.device_channels());
    let d = size * size * channels;
    collect(source, &Policy::crop(size), device, ("pixels", d), |images| {
        let values = images.to_f64();
        let pixels = values.chunks_exact(padded);
        let samples: Vec<f64> = pixels.flat_map(|pixel| pixel[..channels].to_vec()).collect();
        Ok(Tensor::from_f64(device, [images.shape()[0], d], &samples))
    })
}

fn collect(
    source: &dyn Source,
    policy: &Policy,
    device: &Device,
    (what, d): (&str, usize),
    features: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Features> {
    let mut all = Features {
        values: Vec::with_capacity(source.len() * d),
        d,
        labels: Vec::with_capacity(source.len()),
        skipped: Vec::new(),
    };
    let (range, by) = (0..source.len(), Transform::Center);
    let images = Images { source, range, batch: BATCH, by, policy, device };
    images.rows((what, d), features, |rows| {
        for (&index, &label) in rows.indices.iter().zip(&rows.labels) {
            let label = u32::try_from(label).map_err(|_| {
                let name = source.name(index as usize);
                Error::Config(format!("{name} has no label: evaluation needs a labelled set"))
            })?;
            all.labels.push(label);
        }
        all.values.extend(rows.values);
        all.skipped.extend(rows.skipped);
        Ok(())
    })?;
    Ok(all)
}

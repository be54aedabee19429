//! Features of images under the evaluation's transform: a backbone's, or the pixels themselves.

use std::collections::HashSet;

use crate::arena::Arena;
use crate::data::augment::Policy;
use crate::data::{Skipped, Source, center_batch};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::methods::supervised::Classifier;
use crate::nn::ResNet;
use crate::tape::evaluate;
use crate::tensor::Tensor;

/// Images of one forward pass.
const BATCH: usize = 256;

/// Features of labelled images, on the host.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[n, d]`, row-major.
    pub values: Vec<f32>,
    /// Size of a row.
    pub d: usize,
    /// The class of each row.
    pub labels: Vec<u32>,
    /// Images that could not be read and have no row.
    pub skipped: Vec<Skipped>,
}

impl Features {
    /// No rows yet, of size `d`.
    pub fn none(d: usize) -> Self {
        Self { values: Vec::new(), d, labels: Vec::new(), skipped: Vec::new() }
    }

    /// Which image of the source each row is of.
    pub fn images(&self) -> Vec<u32> {
        let skipped: HashSet<u32> = self.skipped.iter().map(|skipped| skipped.index).collect();
        let all = 0..(self.labels.len() + self.skipped.len()) as u32;
        all.filter(|index| !skipped.contains(index)).collect()
    }

    /// Adds the rows of more images, in order.
    ///
    /// # Panics
    /// When rows differ in size.
    pub fn append(&mut self, more: Self) {
        assert_eq!(self.d, more.d, "features: rows of different sizes");
        let before = (self.labels.len() + self.skipped.len()) as u32;
        let moved = |skipped: Skipped| Skipped { index: before + skipped.index, ..skipped };
        self.values.extend(more.values);
        self.labels.extend(more.labels);
        self.skipped.extend(more.skipped.into_iter().map(moved));
    }
}

/// The features that `backbone` with the arena's weights gives each image: running statistics, the centre of the image as
/// `policy` resamples and normalises it.
///
/// # Errors
/// When an image has no label, or the device fails.
pub fn backbone_features(
    arena: &Arena,
    backbone: &ResNet,
    source: &dyn Source,
    policy: &Policy,
) -> Result<Features> {
    collect(source, policy, arena.device(), backbone.features(), |images| {
        evaluate(arena, |tape| backbone.forward(&tape.input(images)))
    })
}

/// The share, in `0..=1`, of images whose largest logit is their class: running statistics, the centre of the
/// image as `policy` resamples and normalises it.
///
/// # Errors
/// When an image has no label, or the device fails.
pub fn classifier_accuracy(
    arena: &Arena,
    classifier: &Classifier,
    source: &dyn Source,
    policy: &Policy,
) -> Result<f64> {
    let [right, all] = classifier_answers(arena, classifier, source, policy)?;
    Ok(right as f64 / all.max(1) as f64)
}

/// How many images [`classifier_accuracy`] counts as right, and of how many.
///
/// # Errors
/// As that.
pub(crate) fn classifier_answers(
    arena: &Arena,
    classifier: &Classifier,
    source: &dyn Source,
    policy: &Policy,
) -> Result<[usize; 2]> {
    let d = classifier.classes();
    let logits = collect(source, policy, arena.device(), d, |images| {
        evaluate(arena, |tape| classifier.forward(&tape.input(images)))
    })?;
    Ok([right_answers(&logits.values, &logits.labels), logits.labels.len()])
}

/// How many rows of logits have their largest at their class: the first largest, so that rows which are all alike are not
/// right for every class.
pub(super) fn right_answers(logits: &[f32], labels: &[u32]) -> usize {
    let classes = (logits.len() / labels.len().max(1)).max(1);
    let answer =
        |row: &[f32]| (0..classes).fold(0, |best, j| if row[j] > row[best] { j } else { best });
    let rows = logits.chunks_exact(classes).zip(labels);
    rows.filter(|(row, label)| answer(row) == **label as usize).count()
}

/// The pixels, three a position: the baseline that costs nothing.
///
/// # Errors
/// When an image has no label.
pub fn pixel_features(source: &dyn Source, size: usize, device: &Device) -> Result<Features> {
    let device = device.host(); // a GPU has nothing to compute here
    collect(source, &Policy::crop(size), device, size * size * 3, |images| {
        let rgb: Vec<f64> =
            images.to_f64().chunks_exact(4).flat_map(|pixel| pixel[..3].to_vec()).collect();
        Ok(Tensor::from_f64(device, [images.shape()[0], size * size * 3], &rgb))
    })
}

fn collect(
    source: &dyn Source,
    policy: &Policy,
    device: &Device,
    d: usize,
    mut features: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Features> {
    let mut all = Features {
        values: Vec::with_capacity(source.len() * d),
        d,
        labels: Vec::with_capacity(source.len()),
        skipped: Vec::new(),
    };
    for from in (0..source.len()).step_by(BATCH) {
        let to = (from + BATCH).min(source.len());
        let (batch, skipped) = center_batch(source, from..to, policy, device);
        all.skipped.extend(skipped);
        for (&index, &label) in batch.indices.iter().zip(&batch.labels) {
            let label = u32::try_from(label).map_err(|_| {
                let name = source.name(index as usize);
                Error::Config(format!("{name} has no label: evaluation needs a labelled set"))
            })?;
            all.labels.push(label);
        }
        all.values.extend(features(&batch.crops[0])?.to_f64().iter().map(|&v| v as f32));
        device.check()?; // what a failed device gives is no feature
    }
    Ok(all)
}

//! A linear probe on few labels: logistic regression on frozen features with a handful of labelled images per class.
//!
//! Features are standardised by the bank's mean and deviation, since the best learning rate spans 0.1 to 30 between methods
//! otherwise. The probe is full-batch gradient descent with Nesterov momentum on the engine's own primitives, long enough to
//! settle; weight decay keeps it unique.

use std::sync::Arc;

use crate::arena::{Arena, Init, Layout, SlotKind};
use crate::device::{Device, Philox, Purpose};
use crate::error::Result;
use crate::eval::Features;
use crate::ops::{cross_entropy, linear};
use crate::optim::{Exclude, Optimizer, Rule, Sgd};
use crate::tape::{evaluate, step};
use crate::tensor::Tensor;

const STEPS: usize = 300;
const WEIGHT_DECAY: f64 = 1e-2;
/// Draws of labelled images that are averaged: ten images of a class are a noisy sample.
const DRAWS: u32 = 5;

/// The share, in `0..=1`, of `queries` that a linear classifier gets right when it has seen `per_class` labelled images of
/// each class of `bank`, drawn by `seed`; the mean over five draws.
///
/// # Errors
/// When the device fails.
pub fn few_label_accuracy(
    bank: &Features,
    queries: &Features,
    per_class: usize,
    seed: u64,
    device: &Device,
) -> Result<f64> {
    let (mean, scale) = moments(bank);
    let standardised = |values: &[f32]| -> Vec<f32> {
        let columns =
            |(i, v): (usize, &f32)| ((f64::from(*v) - mean[i % bank.d]) * scale[i % bank.d]) as f32;
        values.iter().enumerate().map(columns).collect()
    };
    let classes = bank.labels.iter().max().map_or(0, |&l| l as usize + 1);
    let held_out = standardised(&queries.values);
    let held_out = Tensor::from_slice(device, [queries.labels.len(), bank.d], &held_out);
    let mut total = 0.0;
    for draw in 0..DRAWS {
        let chosen = labelled(&bank.labels, classes, per_class, seed, draw);
        let rows: Vec<f32> =
            chosen.iter().flat_map(|&i| &bank.values[i * bank.d..][..bank.d]).copied().collect();
        let images = Tensor::from_slice(device, [chosen.len(), bank.d], &standardised(&rows));
        let labels: Vec<i32> = chosen.iter().map(|&i| bank.labels[i] as i32).collect();
        let labels = Tensor::from_slice(device, [labels.len()], &labels);
        total += probe(&images, &labels, classes, &held_out, &queries.labels, device)?;
    }
    Ok(total / f64::from(DRAWS))
}

fn probe(
    images: &Tensor,
    labels: &Tensor,
    classes: usize,
    held_out: &Tensor,
    truth: &[u32],
    device: &Device,
) -> Result<f64> {
    let d = images.shape()[1];
    let mut layout = Layout::new();
    let w = layout.param("fc.weight", [classes, d], SlotKind::Matrix, Init::Constant(0.0));
    let b = layout.param("fc.bias", [classes], SlotKind::Bias, Init::Constant(0.0));
    let mut arena = Arena::new(&Arc::new(layout), device, 0);
    let rule = Rule::Sgd(Sgd {
        momentum: 0.9,
        nesterov: true,
        weight_decay: WEIGHT_DECAY,
        exclude: Exclude::BiasAndNorm,
    });
    let mut optimizer = Optimizer::new(rule, &arena);
    // Rows of d standardised features have |x|² = d, and the loss's curvature is at most |x|² / 2.
    let lr = 1.0 / d as f64;
    for _ in 0..STEPS {
        step(&mut arena, |tape| {
            let logits = linear(&tape.input(images), &tape.param(w), Some(&tape.param(b)));
            cross_entropy(&logits, labels)
        })?;
        optimizer.step(&mut arena, lr);
    }
    let logits = evaluate(&arena, |tape| {
        linear(&tape.input(held_out), &tape.param(w), Some(&tape.param(b)))
    })?;
    let logits = logits.to_f64();
    device.check()?; // what a failed device gives is no logit
    // The first largest logit is the answer: rows that are all alike must not count as right for every class.
    let first_largest = |row: &[f64]| {
        (0..classes).fold(0, |best, class| if row[class] > row[best] { class } else { best })
    };
    let rows = logits.chunks_exact(classes).zip(truth);
    let hits = rows.filter(|(row, label)| first_largest(row) == **label as usize);
    Ok(hits.count() as f64 / truth.len().max(1) as f64)
}

/// `per_class` images of each class, in class order.
fn labelled(labels: &[u32], classes: usize, per_class: usize, seed: u64, draw: u32) -> Vec<usize> {
    let mut chosen = Vec::with_capacity(classes * per_class);
    for class in 0..classes as u32 {
        let mut members: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == class).collect();
        Philox::new(seed, Purpose::Labels, draw, class).shuffle(&mut members);
        chosen.extend(members.into_iter().take(per_class));
    }
    chosen
}

/// Mean and `1 / std` of each column; a constant column is left as it is.
fn moments(bank: &Features) -> (Vec<f64>, Vec<f64>) {
    let (d, n) = (bank.d, bank.labels.len() as f64);
    let mut mean = vec![0.0; d];
    for row in bank.values.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, &v)| *m += f64::from(v) / n);
    }
    let mut var = vec![0.0; d];
    for row in bank.values.chunks_exact(d) {
        for ((var, &v), m) in var.iter_mut().zip(row).zip(&mean) {
            *var += (f64::from(v) - m).powi(2) / n;
        }
    }
    let scale = var.iter().map(|&v| if v > 1e-12 { 1.0 / v.sqrt() } else { 1.0 }).collect();
    (mean, scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_separable_set_is_learnt_from_two_labels_a_class() {
        let mut rng = Philox::new(3, Purpose::Test, 0, 0);
        let mut set = |n: usize| {
            let labels: Vec<u32> = (0..n as u32).map(|i| i % 3).collect();
            let values = labels
                .iter()
                .flat_map(|&l| {
                    [0, 1, 2].map(|j| (rng.normal() * 0.1) as f32 + (j == l) as u8 as f32)
                })
                .collect();
            Features { values, d: 3, labels, skipped: Vec::new() }
        };
        let (bank, queries) = (set(60), set(90));
        let device = Device::cpu(1).unwrap();
        let accuracy = few_label_accuracy(&bank, &queries, 2, 1, &device).unwrap();
        assert!(accuracy > 0.95, "{accuracy}");
    }

    #[test]
    fn collapsed_features_are_right_by_chance_only() {
        let labels: Vec<u32> = (0..40).map(|i| i % 4).collect();
        let set = Features { values: vec![0.5; 80], d: 2, labels, skipped: Vec::new() };
        let device = Device::cpu(1).unwrap();
        assert_eq!(few_label_accuracy(&set, &set, 5, 1, &device).unwrap(), 0.25);
    }
}

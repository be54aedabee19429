//! A linear probe on few labels: logistic regression on frozen features with a handful of labelled images per class.
//!
//! Features are standardised by the bank's mean and deviation, since the best learning rate spans 0.1 to 30 between methods
//! otherwise. The probe is full-batch gradient descent with Nesterov momentum on the engine's own primitives, long enough to
//! converge; weight decay makes the optimum unique.

use crate::arena::Init;
use crate::data::of_each_class;
use crate::device::Device;
use crate::error::Result;
use crate::eval::Features;
use crate::eval::head::{Head, Moments};
use crate::optim::{Exclude, Rule, Sgd};
use crate::tensor::Tensor;

const STEPS: usize = 300;
const WEIGHT_DECAY: f64 = 1e-2;
/// Draws of labelled images that are averaged, because ten images of a class are a noisy sample.
const DRAWS: u32 = 5;

/// Returns the accuracy on `queries`, in `0..=1`, of a linear classifier trained on `per_class` labelled images of each class
/// of `bank`, drawn by `seed`; the mean over five draws.
///
/// # Errors
/// If the device fails.
pub fn few_label_accuracy(
    bank: &Features,
    queries: &Features,
    per_class: usize,
    seed: u64,
    device: &Device,
) -> Result<f64> {
    let (moments, d) = (Moments::of(bank), bank.d);
    let classes = bank.labels.iter().max().map_or(0, |&l| l as usize + 1);
    let rule = Rule::Sgd(Sgd {
        momentum: 0.9,
        nesterov: true,
        weight_decay: WEIGHT_DECAY,
        exclude: Exclude::BiasAndNorm,
    });
    // Rows of d standardised features have |x|² = d; the curvature of the loss is at most |x|² / 2.
    let lr = 1.0 / d as f64;
    let mut total = 0.0;
    for draw in 0..DRAWS {
        let chosen = of_each_class(&bank.labels, |_| per_class, seed, draw);
        let (mut rows, labels) = bank.gather(&chosen);
        moments.standardise(&mut rows);
        let images = Tensor::from_slice(device, [chosen.len(), d], &rows);
        let labels = Tensor::from_slice(device, [labels.len()], &labels);
        let mut head = Head::new([classes, d], Init::Constant(0.0), rule, 0, device);
        for _ in 0..STEPS {
            head.step(&images, &labels, lr)?;
        }
        total += head.accuracy(queries, Some(&moments))?;
    }
    Ok(total / f64::from(DRAWS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Philox, Purpose};

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
    fn collapsed_features_are_correct_by_chance_only() {
        let labels: Vec<u32> = (0..40).map(|i| i % 4).collect();
        let set = Features { values: vec![0.5; 80], d: 2, labels, skipped: Vec::new() };
        let device = Device::cpu(1).unwrap();
        assert_eq!(few_label_accuracy(&set, &set, 5, 1, &device).unwrap(), 0.25);
    }
}

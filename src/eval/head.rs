//! A linear classifier on features, and the standardisation of features.

use std::sync::Arc;

use crate::arena::{Arena, Init, Layout, Param, SlotKind};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::Features;
use crate::eval::features::{correct_rows, some_readable};
use crate::ops::{cross_entropy, linear};
use crate::optim::{Optimizer, Rule};
use crate::tape::{evaluate, step};
use crate::tensor::Tensor;

/// Rows per evaluation pass.
const ROWS: usize = 4096;

/// A linear layer, weights `[classes, d]` and biases, with its optimiser.
pub(super) struct Head {
    arena: Arena,
    optimizer: Optimizer,
    params: [Param; 2],
}

impl Head {
    pub(super) fn new(
        [classes, d]: [usize; 2],
        init: Init,
        rule: Rule,
        seed: u64,
        device: &Device,
    ) -> Self {
        let mut layout = Layout::new();
        let params = [
            layout.param("fc.weight", [classes, d], SlotKind::Matrix, init),
            layout.param("fc.bias", [classes], SlotKind::Bias, Init::Constant(0.0)),
        ];
        let arena = Arena::new(&Arc::new(layout), device, seed);
        Self { optimizer: Optimizer::new(rule, &arena), arena, params }
    }

    /// Takes one step of cross-entropy on features `[n, d]` and labels `[n]`. Returns the loss, on the device.
    pub(super) fn step(&mut self, images: &Tensor, labels: &Tensor, lr: f64) -> Result<Tensor> {
        let params = self.params;
        let loss = step(&mut self.arena, |tape| {
            let [w, b] = params.map(|param| tape.param(param));
            cross_entropy(&linear(&tape.input(images), &w, Some(&b)), labels)
        })?;
        self.optimizer.step(&mut self.arena, lr);
        Ok(loss)
    }

    /// Returns the share of queries whose largest logit is that of their class; queries are standardised if `moments` is given.
    ///
    /// # Errors
    /// [`Error::Diverged`] if a logit is NaN or infinite: the largest one would then be the first, and the figure that of chance.
    pub(super) fn accuracy(&self, queries: &Features, moments: Option<&Moments>) -> Result<f64> {
        let (d, device) = (queries.d, self.arena.device());
        let mut correct = 0;
        for (rows, labels) in queries.values.chunks(ROWS * d).zip(queries.labels.chunks(ROWS)) {
            let mut rows = rows.to_vec();
            if let Some(moments) = moments {
                moments.standardise(&mut rows);
            }
            let rows = Tensor::from_slice(device, [labels.len(), d], &rows);
            let logits = evaluate(&self.arena, |tape| {
                let [w, b] = self.params.map(|param| tape.param(param));
                linear(&tape.input(&rows), &w, Some(&b))
            })?;
            let logits: Vec<f32> = logits.to_f64().iter().map(|&v| v as f32).collect();
            device.check()?; // a failed device yields NaN, not logits
            if !logits.iter().all(|v| v.is_finite()) {
                return Err(Error::Diverged(
                    "the classifier's logits became NaN or infinite: use a smaller learning rate (--sweep finds one), or protocol cached, which standardises features".into(),
                ));
            }
            correct += correct_rows(&logits, labels);
        }
        some_readable(queries.labels.len(), &queries.skipped)?;
        Ok(correct as f64 / queries.labels.len() as f64)
    }
}

/// Mean and reciprocal standard deviation of each column; a constant column keeps its scale.
pub(super) struct Moments {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Moments {
    pub(super) fn of(bank: &Features) -> Self {
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
        let scale = |&v: &f64| if v > 1e-12 { 1.0 / v.sqrt() } else { 1.0 };
        Self { scale: var.iter().map(scale).collect(), mean }
    }

    /// Standardises rows in place: with the bank's moments, the bank's own rows have mean 0 and standard deviation 1.
    pub(super) fn standardise(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.mean.len()) {
            for ((v, mean), scale) in row.iter_mut().zip(&self.mean).zip(&self.scale) {
                *v = ((f64::from(*v) - mean) * scale) as f32;
            }
        }
    }
}

impl Features {
    /// Copies some rows into features of their own.
    pub(super) fn select(&self, rows: &[u32]) -> Self {
        let labels = rows.iter().map(|&i| self.labels[i as usize]).collect();
        Self { values: self.gather(rows).0, d: self.d, labels, skipped: Vec::new() }
    }

    /// Copies some rows and their labels.
    pub(super) fn gather(&self, rows: &[u32]) -> (Vec<f32>, Vec<i32>) {
        let values = rows.iter().flat_map(|&i| &self.values[i as usize * self.d..][..self.d]);
        (values.copied().collect(), rows.iter().map(|&i| self.labels[i as usize] as i32).collect())
    }
}

//! The linear probe: a classifier on a frozen backbone, trained by a published [`Protocol`].

use std::sync::Arc;

use crate::arena::Arena;
use crate::data::{Loader, Policy, Skipped, Source, Subset, labels_of, of_each_class};
use crate::device::{Philox, Purpose};
use crate::error::{Error, Result};
use crate::eval::features::{check_finite, some_readable};
use crate::eval::head::{Head, Moments};
use crate::eval::{Features, Protocol, backbone_features};
use crate::nn::ResNet;
use crate::optim::Schedule;
use crate::tape::evaluate;
use crate::tensor::Tensor;

/// The learning rates of a sweep; the best published rates span 0.1 to 30.
pub const RATES: [f64; 8] = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];

/// Images per forward pass of the backbone.
const FORWARD: usize = 256;

/// A frozen backbone, with its weights and its input transform.
#[derive(Clone, Copy)]
pub struct Frozen<'a> {
    /// Its weights.
    pub arena: &'a Arena,
    /// Its layers.
    pub backbone: &'a ResNet,
    /// The input transform: size, resampling, pixels and normalisation are used.
    pub policy: &'a Policy,
}

/// The result of a linear probe.
#[derive(Clone, Debug, PartialEq)]
pub struct Probed {
    /// Accuracy on the held-out images, in `0..=1`.
    pub accuracy: f64,
    /// The learning rate at the classifier's first step.
    pub lr: f64,
    /// The rates of a sweep, each with its accuracy on the tenth of the training images that was held back; `None` if the
    /// classifier diverged at that rate.
    pub swept: Vec<(f64, Option<f64>)>,
    /// Training images that could not be read and were left out.
    pub skipped: Vec<Skipped>,
    /// Held-out images that could not be read and were left out.
    pub skipped_held_out: Vec<Skipped>,
}

/// Trains a linear classifier on the frozen features of `train` and measures it on `test`.
///
/// With `rates`, one classifier per rate is trained on nine tenths of the training images. The rate whose classifier does best
/// on the remaining tenth is used to train the measured classifier on all training images; held-out images decide nothing.
///
/// # Errors
/// If images have no labels, none of them can be read, the classifier diverges, or the device fails.
pub fn linear_accuracy(
    frozen: Frozen<'_>,
    train: &Arc<dyn Source>,
    test: &dyn Source,
    protocol: &Protocol,
    rates: &[f64],
    seed: u64,
) -> Result<Probed> {
    let labels = labels_of(&**train)?;
    let bank = match (protocol.augment, protocol.standardise) {
        (true, false) => None,
        _ => Some(frozen.features(&**train)?),
    };
    if let Some(bank) = &bank {
        some_readable(bank.labels.len(), &bank.skipped)?;
    }
    let mut skipped = bank.as_ref().map_or(Vec::new(), |bank| bank.skipped.clone());
    let moments = bank.as_ref().filter(|_| protocol.standardise).map(Moments::of);
    let kept = bank.filter(|_| !protocol.augment);
    // Unreadable images have no features: the rows are then those of the features.
    let labels = kept.as_ref().map_or(labels, |kept| kept.labels.clone());
    let shape = [train.classes().len(), frozen.backbone.features()];
    let probe = Probe { frozen, train, kept, moments, shape, protocol, seed };
    let all: Vec<u32> = (0..labels.len() as u32).collect();
    let mut swept = Vec::new();
    let mut best = None;
    if !rates.is_empty() {
        let tenth = |members: usize| members.div_ceil(10).min(members.saturating_sub(1));
        let held_back = of_each_class(&labels, tenth, seed, u32::MAX);
        if held_back.is_empty() {
            return Err(Error::config(
                "a sweep holds back a tenth of the training images and needs two images of a class: leave out --sweep, or give more labels",
            ));
        }
        let mut is_held_back = vec![false; labels.len()];
        held_back.iter().for_each(|&i| is_held_back[i as usize] = true);
        let rest = all.iter().copied().filter(|&i| !is_held_back[i as usize]).collect();
        let queries = match &probe.kept {
            Some(kept) => kept.select(&held_back),
            None => frozen.features(&Subset::new(train.clone(), held_back))?,
        };
        let (heads, _) = probe.train(rest, &rates.iter().copied().map(Some).collect::<Vec<_>>())?;
        for (&lr, head) in rates.iter().zip(&heads) {
            let accuracy = match head.accuracy(&queries, probe.moments.as_ref()) {
                Ok(accuracy) => Some(accuracy),
                Err(Error::Diverged(_)) => None,
                Err(error) => return Err(error),
            };
            swept.push((lr, accuracy));
        }
        // The lowest of equals; a rate at which the classifier diverged cannot win.
        type Swept = (f64, Option<f64>);
        let better = |best: Swept, &one: &Swept| if one.1 > best.1 { one } else { best };
        best = Some(swept.iter().fold((rates[0], None), better).0);
    }
    let lr = best.unwrap_or_else(|| protocol.schedule(all.len(), None).peak);
    let (heads, unread) = probe.train(all, &[best])?;
    for image in unread {
        if skipped.iter().all(|known| known.index != image.index) {
            skipped.push(image);
        }
    }
    let queries = frozen.features(test)?;
    let accuracy = heads[0].accuracy(&queries, probe.moments.as_ref())?;
    Ok(Probed { accuracy, lr, swept, skipped, skipped_held_out: queries.skipped })
}

impl Frozen<'_> {
    /// Computes the features of images under the evaluation transform.
    ///
    /// # Errors
    /// If an image has no label, or the device fails.
    pub fn features(&self, source: &dyn Source) -> Result<Features> {
        backbone_features(self.arena, self.backbone, source, self.policy)
    }

    /// Computes features `[n, d]` of crops `[n, s, s, 4]`.
    fn forward(&self, crops: &Tensor) -> Result<Vec<f32>> {
        let n = crops.shape()[0];
        let mut rows = Vec::with_capacity(n * self.backbone.features());
        for from in (0..n).step_by(FORWARD) {
            let some = crops.rows(from, FORWARD.min(n - from));
            let features = evaluate(self.arena, |tape| self.backbone.forward(&tape.input(&some)))?;
            rows.extend(features.to_f64().iter().map(|&v| v as f32));
        }
        self.arena.device().check()?; // a failed device yields NaN, not features
        check_finite(&rows, self.backbone.features(), "features", |row| format!("crop {row}"))?;
        Ok(rows)
    }
}

struct Probe<'a> {
    frozen: Frozen<'a>,
    train: &'a Arc<dyn Source>,
    /// Features of the training images, if they are computed once.
    kept: Option<Features>,
    moments: Option<Moments>,
    /// Number of classes, and length of a feature row.
    shape: [usize; 2],
    protocol: &'a Protocol,
    seed: u64,
}

impl Probe<'_> {
    /// Trains one classifier per rate on the same batches of `rows`; `None` is the protocol's own rate.
    /// Also returns the images that could not be read on the way.
    fn train(&self, rows: Vec<u32>, rates: &[Option<f64>]) -> Result<(Vec<Head>, Vec<Skipped>)> {
        let (protocol, device, shape) = (self.protocol, self.frozen.arena.device(), self.shape);
        let new = |&lr: &Option<f64>| {
            let head = Head::new(shape, protocol.init, protocol.rule, self.seed, device);
            (head, protocol.schedule(rows.len(), lr))
        };
        let mut heads: Vec<(Head, Schedule)> = rates.iter().map(new).collect();
        let total = heads.first().map_or(0, |(_, schedule)| schedule.total);
        let mut feed = self.feed(rows)?;
        for step in 0..total {
            let (mut images, labels) = feed.next(step)?;
            if let Some(moments) = &self.moments {
                moments.standardise(&mut images);
            }
            let images = Tensor::from_slice(device, [labels.len(), shape[1]], &images);
            let labels = Tensor::from_slice(device, [labels.len()], &labels);
            for (head, schedule) in &mut heads {
                head.step(&images, &labels, schedule.lr(step))?;
            }
        }
        device.check()?;
        Ok((heads.into_iter().map(|(head, _)| head).collect(), feed.skipped()))
    }

    fn feed(&self, rows: Vec<u32>) -> Result<Feed<'_>> {
        let batch = self.protocol.batch_of(rows.len());
        if let Some(bank) = &self.kept {
            return Ok(Feed::Cached { bank, order: rows, batch, seed: self.seed });
        }
        let policy = self.frozen.policy.crop_and_flip();
        let images = Arc::new(Subset::new(self.train.clone(), rows));
        let device = self.frozen.arena.device();
        let loader = Loader::new(images, vec![policy], batch, self.seed, 0, device)?;
        Ok(Feed::Crops { loader, frozen: self.frozen })
    }
}

/// The source of a step's features.
enum Feed<'a> {
    /// Features that were computed once.
    Cached { bank: &'a Features, order: Vec<u32>, batch: usize, seed: u64 },
    /// Features of new crops in every epoch.
    Crops { loader: Loader, frozen: Frozen<'a> },
}

impl Feed<'_> {
    /// The images that could not be read so far.
    fn skipped(&self) -> Vec<Skipped> {
        match self {
            Feed::Cached { .. } => Vec::new(),
            Feed::Crops { loader, .. } => loader.skipped(),
        }
    }

    /// Returns features `[n, d]` and classes of a step. The images at the end of an epoch that do not fill a batch are left out.
    fn next(&mut self, step: u64) -> Result<(Vec<f32>, Vec<i32>)> {
        match self {
            Feed::Cached { bank, order, batch, seed } => {
                let per_epoch = (order.len() / *batch) as u64;
                let (epoch, index) = (step / per_epoch, (step % per_epoch) as usize);
                if index == 0 {
                    Philox::new(*seed, Purpose::Order, epoch as u32, 0).shuffle(order);
                }
                Ok(bank.gather(&order[index * *batch..][..*batch]))
            }
            Feed::Crops { loader, frozen } => {
                let batch = loader.next_batch()?;
                Ok((frozen.forward(&batch.crops[0])?, batch.labels))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Layout;
    use crate::data::{Split, fashion_scattered};
    use crate::device::Device;
    use crate::nn::{ResNetConfig, Stem};
    use crate::optim::LrRule;

    #[test]
    fn a_probe_learns_from_cached_and_from_fresh_features_and_a_sweep_finds_a_rate() {
        let config = ResNetConfig {
            depth: 18,
            width: 2,
            stem: Stem::Small,
            zero_init_residual: false,
            norm_groups: 1,
            sk_ratio: 0.0,
            bottleneck: 1,
            project: false,
            same_pool: false,
            channels: 3,
        };
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "", &config);
        let arena = Arena::new(&Arc::new(layout), &Device::cpu(2).unwrap(), 1);
        let frozen = Frozen { arena: &arena, backbone: &backbone, policy: &Policy::crop(16) };
        let set: Arc<dyn Source> =
            Arc::new(Subset::first(Arc::new(fashion_scattered(Split::Train)), 120));
        // Measured on its own training images: the question is whether it learns, not how well.
        let probe = |protocol: &Protocol, rates: &[f64]| {
            linear_accuracy(frozen, &set, &*set, protocol, rates, 1).unwrap()
        };
        let cached = Protocol { batch: 30, ..Protocol::named("cached").unwrap().over(20) };
        let swept = probe(&cached, &[1e-6, 0.1]);
        assert!(swept.lr == 0.1 && swept.swept[0].1 < swept.swept[1].1, "{swept:?}");
        assert_eq!(
            swept.accuracy,
            probe(&Protocol { lr: 0.1 * 256.0 / 30.0, ..cached.clone() }, &[]).accuracy
        );
        let fresh = probe(&Protocol { augment: true, ..cached.clone().over(4) }, &[0.1]);
        assert!(swept.accuracy > 0.35 && fresh.accuracy > 0.2, "{swept:?} {fresh:?}");
        let wild = Protocol { lr: 1e300, lr_rule: LrRule::Fixed, ..cached.clone() };
        let error = linear_accuracy(frozen, &set, &*set, &wild, &[], 1).unwrap_err().to_string();
        assert!(error.starts_with("the classifier's logits became NaN or infinite"), "{error}");
        let swept = probe(&cached, &[1e300, 0.1, 1e305]);
        assert!(swept.lr == 0.1 && swept.swept[0].1.is_none() && swept.swept[2].1.is_none());
        let moco = Protocol { batch: 40, ..Protocol::named("moco").unwrap().over(3) };
        assert_eq!(probe(&moco, &[]).lr, 30.0);
    }
}

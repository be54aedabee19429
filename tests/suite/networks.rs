//! ResNets compared with PyTorch: features, the gradient of every slot, running statistics, evaluation.

use std::sync::Arc;

use selfsup::arena::{Arena, Layout};
use selfsup::device::{Device, DeviceKind, Precision};
use selfsup::nn::{ResNet, ResNetConfig, Stem};
use selfsup::tape;
use selfsup::tensor::Tensor;

use crate::case::dot;
use crate::cases::Row;
use crate::compare::report;
use crate::driver::{gpu, unchecked};
use crate::golden::{Goldens, Record};
use crate::network;
use crate::seeded;

/// Allowed relative error in f64.
const EXACT: f64 = 1e-8;

struct Network {
    line: String,
    backbone: ResNet,
    arena: Arena,
    images: Tensor,
}

fn networks(goldens: &Goldens, device: &Device) -> Vec<Network> {
    let lines = include_str!("networks.txt").lines();
    let rows = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    rows.map(|line| Network::new(line, goldens, device)).collect()
}

impl Network {
    fn new(line: &str, goldens: &Goldens, device: &Device) -> Self {
        let row = Row::new(line);
        let [depth, width, norm_groups, n, h, w] =
            row.sizes(["depth", "width", "groups", "n", "h", "w"]);
        let stem = if row.text("stem") == Some("image") { Stem::Image } else { Stem::Small };
        let sk_ratio = row.text("sk").map_or(0.0, |text| text.parse().unwrap());
        let zero_init_residual = false;
        let config = ResNetConfig {
            depth,
            width,
            stem,
            zero_init_residual,
            norm_groups,
            sk_ratio,
            bottleneck: 1,
            project: false,
            same_pool: false,
            channels: 3,
        };
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "", &config);
        let arena = network::seeded_arena(&Arc::new(layout), device, line);
        // Images for which no ReLU input is so close to zero that rounding decides its sign.
        let draw = goldens.numbers(&format!("{line}|draw"))[0];
        let images = network::images(device, &format!("{line}|images {draw}"), [n, h, w]);
        Self { line: line.to_owned(), backbone, arena, images }
    }

    /// Returns the features; leaves gradients and running statistics in the arena.
    fn train(&mut self) -> Vec<f64> {
        let (mut features, seed) = (Vec::new(), seeded::seed(&format!("{}|w", self.line)));
        let loss = tape::step(&mut self.arena, |tape| {
            let y = self.backbone.forward(&tape.input(&self.images));
            features = y.value().to_f64();
            dot(&y, &seeded::unit(seed, features.len()))
        });
        loss.unwrap();
        features
    }

    fn evaluate(&self) -> Vec<f64> {
        let y =
            tape::evaluate(&self.arena, |tape| self.backbone.forward(&tape.input(&self.images)));
        y.unwrap().to_f64()
    }

    /// Compares everything with the goldens.
    fn check(
        &mut self,
        goldens: &Goldens,
        tolerance: impl Fn(&str, &Record<'_>) -> f64,
    ) -> Vec<Result<f64, String>> {
        let line = self.line.clone();
        let one = |part: &str, got: &[f64]| {
            let record = goldens.record(&format!("{line}|{part}"));
            record.check(got, tolerance(part, &record))
        };
        let features = self.train();
        let mut results = vec![one("features", &features), one("evaluation", &self.evaluate())];
        let in_f64 = self.images.device().kind() == DeviceKind::Reference;
        for (part, got) in [
            ("gradients", network::gradients(&self.arena)),
            ("statistics", network::statistics(&self.arena)),
        ] {
            let name = format!("{line}|{part}");
            if part == "gradients" && line.ends_with("kinked=1") && !in_f64 {
                continue;
            }
            results.extend(goldens.check_table(&name, &got, |record| tolerance(part, record)));
        }
        results
    }
}

#[test]
fn resnets_in_f64_agree_with_pytorch() {
    let goldens = Goldens::open("networks");
    let mut networks = networks(&goldens, &Device::reference().poisoned());
    assert_eq!(goldens.names().count(), 5 * networks.len(), "run scripts/make-goldens");
    let results = networks.iter_mut().flat_map(|network| network.check(&goldens, |_, _| EXACT));
    report("ResNets in f64", results.collect());
}

#[test]
fn resnets_on_the_cpu_agree_with_pytorch() {
    agree_in_f32("ResNets on the CPU", &Device::cpu(2).unwrap().poisoned());
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn resnets_on_a_gpu_in_f32_agree_with_pytorch() {
    unchecked("networks::resnets_on_a_gpu_in_f32_agree_with_pytorch", || {
        agree_in_f32("ResNets on CUDA in f32", &gpu(Precision::F32));
    });
}

fn agree_in_f32(what: &str, device: &Device) {
    let goldens = Goldens::open("networks");
    let mut networks = networks(&goldens, device);
    let tolerance = |part: &str, record: &Record<'_>| {
        record.tolerance(if part == "gradients" { 1e-4 } else { 1e-5 })
    };
    let results = networks.iter_mut().flat_map(|network| network.check(&goldens, tolerance));
    report(what, results.collect());
    device.check().unwrap();
}

/// Shipped bug: evaluation with batch statistics instead of running statistics.
#[test]
fn evaluation_with_batch_statistics_is_caught() {
    let goldens = Goldens::open("networks");
    for mut network in networks(&goldens, &Device::reference()) {
        network.train();
        let wrong = network.train();
        let record = goldens.record(&format!("{}|evaluation", network.line));
        assert!(record.check(&wrong, 1e-2).is_err(), "{}", network.line);
    }
}

/// Forward and backward of a complete network give the same bits with 1, 2 and 3 threads.
#[test]
fn a_network_does_not_depend_on_the_number_of_threads() {
    let line = "resnet depth=50 width=8 stem=image n=4 h=33 w=29 groups=1";
    let goldens = Goldens::open("networks");
    let [one, two, three] = [1, 2, 3].map(|threads| {
        let mut network = Network::new(line, &goldens, &Device::cpu(threads).unwrap().poisoned());
        let features = network.train();
        (features, network::gradients(&network.arena), network::statistics(&network.arena))
    });
    assert!(one.0.iter().all(|v| v.is_finite()));
    assert!(one == two, "one thread and two differ");
    assert!(one == three, "one thread and three differ");
}

//! A method without the part that prevents collapse does collapse, and the monitor reports it; complete methods do not.

use selfsup::device::Device;
use selfsup::error::Error;
use selfsup::recipes::Recipe;
use selfsup::train::{EpochReport, Run, StepReport, Watch};

/// A narrow network on a few of the bundled images.
fn run(name: &str, settings: &[&str]) -> (Result<(), Error>, Vec<f64>) {
    let small = [
        "network.width=4",
        "data.path=fashion-scattered",
        "data.limit=512",
        "data.test_limit=40",
        "train.epochs=6",
        "train.batch=32",
        "train.knn_every=0",
        "train.threads=2",
        "augment.size=16",
    ];
    let settings: Vec<String> =
        small.iter().chain(settings).map(|setting| setting.to_string()).collect();
    let recipe = Recipe::load(name, &settings).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut run = Run::new(&recipe, &Device::cpu(2).unwrap(), None).unwrap();
    let mut spreads = Spreads(Vec::new());
    let result = run.train(&mut spreads);
    (result, spreads.0)
}

struct Spreads(Vec<f64>);

impl Watch for Spreads {
    fn step(&mut self, _: &StepReport) {}
    fn epoch(&mut self, report: &EpochReport) {
        self.0.extend(report.spread.map(|spread| spread.std));
    }
    fn note(&mut self, _: &str) {}
}

const SIMSIAM: &[&str] = &[
    "method.embedding=8",
    "method.hidden=8",
    "optim.lr=1.0",
    "optim.decay=constant",
    "train.epochs=10",
];
const BYOL: &[&str] =
    &["method.embedding=16", "method.hidden=32", "method.momentum=0.9", "optim.lr=2.0"];
const SWAV: &[&str] = &[
    "method.crops=2",
    "augment.0.repeat=1",
    "augment.1.repeat=1",
    "method.embedding=16",
    "method.hidden=32",
    "method.prototypes=24",
    "method.freeze_steps=16",
    "method.epsilon=0.03",
    "optim.lr=0.5",
    "method.queue=0",
];

#[track_caller]
fn assert_collapses(name: &str, settings: &[&[&str]]) {
    let (result, spreads) = run(name, &settings.concat());
    match result {
        Err(Error::Collapsed(sentence)) => {
            assert!(sentence.contains("the embeddings collapsed"), "{sentence}");
        }
        other => {
            panic!("{name} without what prevents collapse: {other:?}, deviations {spreads:.3?}")
        }
    }
}

#[track_caller]
fn assert_does_not_collapse(name: &str, settings: &[&str]) {
    let (result, spreads) = run(name, settings);
    assert!(result.is_ok() && !spreads.is_empty(), "{name}: {result:?}, deviations {spreads:.3?}");
    println!("{name}: deviations {spreads:.3?}");
}

#[test]
fn simsiam_without_stop_gradient_collapses() {
    assert_collapses("simsiam-cifar10-small", &[SIMSIAM, &["method.stop_gradient=false"]]);
}

#[test]
fn byol_without_predictor_collapses() {
    assert_collapses("byol-cifar10-small", &[BYOL, &["method.predictor=false"]]);
}

#[test]
fn swav_without_sinkhorn_collapses() {
    assert_collapses("swav-cifar10-small", &[SWAV, &["method.sinkhorn_iterations=0"]]);
}

#[test]
fn no_method_collapses_as_published() {
    assert_does_not_collapse("simsiam-cifar10-small", SIMSIAM);
    assert_does_not_collapse("byol-cifar10-small", BYOL);
    assert_does_not_collapse("swav-cifar10-small", SWAV);
    let head = ["method.hidden=32", "method.embedding=16"];
    assert_does_not_collapse("simclr-cifar10-small", &head);
    let memory = ["method.hidden=32", "method.embedding=16", "method.memory=512"];
    assert_does_not_collapse("simclr-v2-cifar10-small", &memory);
    assert_does_not_collapse("moco-v2-cifar10-small", &["method.embedding=16", "method.queue=512"]);
}

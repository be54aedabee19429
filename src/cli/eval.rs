//! `eval`: what a run has learnt, always next to baselines that need no training.

use serde_json::{Map, Value, json};

use super::args::{EvalFinetune, EvalKnn, EvalLinear, Evaluated};
use super::progress::Progress;
use super::trained::Trained;
use super::{device, say, talk};
use crate::arena::Arena;
use crate::data::Source;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{self, Features, Frozen, Knn, Protocol};
use crate::methods::Method;
use crate::recipes::Recipe;
use crate::train::{self, Images, Run};

/// A run's trained network and its images.
struct Networks {
    run: Trained,
    device: Device,
    method: Box<dyn Method>,
    trained: Arena,
    images: Images,
}

impl Networks {
    /// Opens a checkpoint; the settings of the command line and `labels` override its recipe.
    fn open(of: &Evaluated, labels: Option<&str>) -> Result<Self> {
        let mut run = Trained::open(&of.run, &of.set)?;
        run.recipe = with_labels(run.recipe, labels);
        let device = device::open(of.device, &run.recipe.train)?;
        let (method, trained) = run.load(&device)?;
        let images = Images::open(&run.recipe.data)?;
        images.held_out()?;
        Ok(Self { run, device, method, trained, images })
    }

    fn frozen<'a>(&'a self, arena: &'a Arena) -> Frozen<'a> {
        let policy = &self.run.recipe.augment[0];
        Frozen { arena, backbone: self.method.backbone(), policy }
    }

    /// Prints what is evaluated and on how many images; returns the printer of results.
    fn results(&self, json: bool, how: &str) -> Result<Results> {
        let (checkpoint, seed) = (&self.run.checkpoint, self.run.recipe.seed);
        let (train, test) = (self.images.train.len(), self.images.held_out()?.len());
        talk(&format!(
            "{}: {train} training and {test} held-out images, {how}, seed {seed}",
            checkpoint.display(),
        ));
        let about = json!({
            "checkpoint": checkpoint,
            "training_images": train,
            "held_out": test,
            "seed": seed,
        });
        Ok(Results::new(json, about))
    }
}

/// Prints results as they come, or as one JSON object at the end.
struct Results {
    json: bool,
    about: Value,
    found: Vec<Value>,
}

impl Results {
    fn new(json: bool, about: Value) -> Self {
        Self { json, about, found: Vec::new() }
    }

    /// Adds the accuracy, in `0..=1`, of the features that `of` names; `with` are the settings it was measured with.
    fn add(&mut self, what: &str, of: &str, with: &[(&str, f64)], accuracy: f64) -> Result<()> {
        if !self.json {
            return say(&format!("{what} {of}: {:.1}%", 100.0 * accuracy));
        }
        let mut entry: Map<_, _> = with.iter().map(|&(k, v)| (k.to_owned(), v.into())).collect();
        entry.extend([("of".into(), of.into()), ("accuracy".into(), accuracy.into())]);
        self.found.push(entry.into());
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        if !self.json {
            return Ok(());
        }
        self.about["found"] = self.found.into();
        say(&self.about.to_string())
    }
}

fn with_labels(mut recipe: Recipe, labels: Option<&str>) -> Recipe {
    recipe.data.labels = labels.map(Into::into).or(recipe.data.labels);
    recipe
}

pub(super) fn knn(args: &EvalKnn) -> Result<()> {
    if args.temperature.iter().any(|t| t.is_nan() || *t <= 0.0) {
        return Err(Error::config("--temperature must be above 0"));
    }
    let of_k = |&k: &u32| args.temperature.iter().map(move |&t| (k, t));
    let grid: Vec<(u32, f64)> = args.k.iter().flat_map(of_k).collect();
    let settings: Vec<Knn> =
        grid.iter().map(|&(k, temperature)| Knn { k: k as usize, temperature }).collect();
    let all = Networks::open(&args.of, None)?;
    let (how, names): (String, Vec<String>) = match grid[..] {
        [(k, t)] => (format!("k {k}, temperature {t}"), vec!["kNN".into()]),
        _ => {
            let name = |(k, t): &(u32, f64)| format!("kNN (k {k}, temperature {t})");
            (format!("{} settings", grid.len()), grid.iter().map(name).collect())
        }
    };
    let mut results = all.results(args.of.json, &how)?;
    let (train, test) = (&all.images.train, all.images.held_out()?);
    let compared = Compared::new(&all.run.recipe, &*all.method, &all.trained, &**train, &**test)?;
    for (of, bank, queries) in &compared.rows {
        let found = eval::knn_accuracies(bank, queries, &settings, &all.device)?;
        for ((name, &(k, temperature)), accuracy) in names.iter().zip(&grid).zip(found) {
            let with = [("k", f64::from(k)), ("temperature", temperature)];
            results.add(name, of, &with, accuracy)?;
        }
    }
    results.finish()
}

pub(super) fn linear(args: &EvalLinear) -> Result<()> {
    let mut protocol = Protocol::named(&args.protocol)?;
    if let Some(epochs) = args.epochs {
        protocol = protocol.over(epochs);
    }
    let all = Networks::open(&args.of, args.labels.as_deref())?;
    let test = all.images.held_out()?;
    let how = format!("protocol {}, {} epochs", args.protocol, protocol.epochs);
    let mut results = all.results(args.of.json, &how)?;
    let rates: &[f64] = if args.sweep { &eval::RATES } else { &[] };
    let random = Arena::new(all.method.layout(), &all.device, all.run.recipe.seed);
    for (name, arena) in [("random init", &random), ("trained", &all.trained)] {
        let (frozen, train) = (all.frozen(arena), &all.images.train);
        let found =
            eval::linear_accuracy(frozen, train, &**test, &protocol, rates, all.run.recipe.seed)?;
        for (lr, held_back) in &found.swept {
            talk(&format!(
                "{name}, learning rate {lr}: {:.1}% of the tenth that was held back",
                100.0 * held_back
            ));
        }
        if args.sweep && [rates[0], rates[rates.len() - 1]].contains(&found.lr) {
            talk(&format!("{name}: the best learning rate is at the edge of the sweep"));
        }
        let what = format!("linear ({}, learning rate {:.4})", args.protocol, found.lr);
        results.add(&what, name, &[("learning_rate", found.lr)], found.accuracy)?;
    }
    results.finish()
}

pub(super) fn finetune(args: &EvalFinetune) -> Result<()> {
    let labels = args.labels.as_deref();
    let Trained { recipe, checkpoint } = Trained::open(&args.of.run, &[])?;
    let recipe = with_labels(recipe, labels);
    let images = Images::open(&recipe.with(&args.of.set)?.data)?;
    images.held_out()?;
    let classes = images.train.classes().len();
    let mut tuned =
        train::finetuning(&recipe, &checkpoint, &args.protocol, args.head_layers, classes)?;
    tuned.train.batch = tuned.train.batch.min(images.train.len());
    let tuned = with_labels(tuned.with(&args.of.set)?, labels);
    let device = device::open(args.of.device, &tuned.train)?;
    talk(&format!(
        "{}: fine-tuned on {} labelled images by {}, {} epochs, batch {}, seed {}",
        checkpoint.display(),
        images.train.len(),
        args.protocol,
        tuned.train.epochs,
        tuned.train.batch,
        tuned.seed
    ));
    let about = json!({
        "checkpoint": checkpoint,
        "training_images": images.train.len(),
        "held_out": images.held_out()?.len(),
        "seed": tuned.seed,
    });
    let mut results = Results::new(args.of.json, about);
    let mut untrained = tuned.clone();
    untrained.train.init = None;
    for (name, recipe, out) in
        [("random init", &untrained, None), ("trained", &tuned, args.out.as_deref())]
    {
        let mut run = Run::new(recipe, &device, out)?;
        let mut watch = Last(Progress::new(run.schedule().total), None);
        run.train(&mut watch)?;
        let accuracy = watch.1.expect("a supervised run with held-out images is measured");
        results.add("fine-tuned", name, &[], accuracy)?;
    }
    results.finish()
}

/// Shows a run's progress and keeps its last accuracy.
struct Last(Progress, Option<f64>);

impl train::Watch for Last {
    fn step(&mut self, report: &train::StepReport) {
        self.0.step(report);
    }

    fn epoch(&mut self, report: &train::EpochReport) {
        self.1 = report.accuracy;
        self.0.epoch(report);
    }

    fn note(&mut self, sentence: &str) {
        self.0.note(sentence);
    }
}

/// Features of bank and held-out images in three ways. A figure means nothing without the two that need no training.
pub(super) struct Compared {
    rows: [(&'static str, Features, Features); 3],
}

impl Compared {
    pub(super) fn new(
        recipe: &Recipe,
        method: &dyn Method,
        trained: &Arena,
        train: &dyn Source,
        test: &dyn Source,
    ) -> Result<Self> {
        let random = Arena::new(method.layout(), trained.device(), recipe.seed);
        let policy = &recipe.augment[0];
        let features = |arena: &Arena, source: &dyn Source| {
            eval::backbone_features(arena, method.backbone(), source, policy)
        };
        let pixels = |source| eval::pixel_features(source, policy.size, trained.device());
        Ok(Self {
            rows: [
                ("raw pixels", pixels(train)?, pixels(test)?),
                ("random init", features(&random, train)?, features(&random, test)?),
                ("trained", features(trained, train)?, features(trained, test)?),
            ],
        })
    }

    /// Prints one line per name of `names` and kind of features.
    pub(super) fn print(
        &self,
        names: &[impl AsRef<str>],
        accuracies: impl Fn(&Features, &Features) -> Result<Vec<f64>>,
    ) -> Result<()> {
        for (of, bank, queries) in &self.rows {
            for (what, accuracy) in names.iter().zip(accuracies(bank, queries)?) {
                say(&format!("{} {of}: {:.1}%", what.as_ref(), 100.0 * accuracy))?;
            }
        }
        Ok(())
    }
}

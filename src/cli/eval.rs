//! `eval`: what a run has learnt, always next to baselines that need no training.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::args::{EvalFinetune, EvalKnn, EvalLinear, Evaluated};
use super::progress::Progress;
use super::skipped::LeftOut;
use super::{device, say, talk};
use crate::arena::Arena;
use crate::data::{Skipped, Source, labels_of};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{self, Features, Frozen, Knn, Protocol};
use crate::methods::Method;
use crate::recipes::{DataSettings, Recipe};
use crate::train::{self, Images, Run, Trained};

/// A run's trained network and its images.
struct Networks {
    run: Trained,
    device: Device,
    method: Box<dyn Method>,
    trained: Arena,
    images: Images,
    left_out: LeftOut,
}

impl Networks {
    /// Opens a checkpoint; the settings of the command line and `labels` override its recipe.
    fn open(of: &Evaluated, labels: Option<&str>) -> Result<Self> {
        let mut run = Trained::open(&of.run, &of.set)?;
        run.recipe = with_labels(run.recipe, labels);
        let device = device::open(of.device, &run.recipe.train)?;
        let (method, trained) = run.load(&device)?;
        let images = labelled_images(&run.recipe)?;
        check_images(of, &run.checkpoint, &run.recipe.data, &images, &device)?;
        let left_out = left_out(of, &run);
        Ok(Self { run, device, method, trained, images, left_out })
    }

    fn frozen<'a>(&'a self, arena: &'a Arena) -> Frozen<'a> {
        let policy = &self.run.recipe.augment[0];
        Frozen { arena, backbone: self.method.backbone(), policy }
    }

    /// Prints what is evaluated and on how many images, those `skipped` of both splits excluded; returns the printer of results.
    fn results(&self, json: bool, how: &str, skipped: [usize; 2]) -> Result<Results> {
        let (checkpoint, seed) = (&self.run.checkpoint, self.run.recipe.seed);
        let train = self.images.train.len() - skipped[0];
        let test = self.images.held_out()?.len() - skipped[1];
        talk(&format!(
            "{}: {train} training and {test} held-out images, {how}, seed {seed}",
            checkpoint.display(),
        ));
        self.images.notes().for_each(|note| talk(note));
        Ok(Results::new(json, about(checkpoint, [train, test], skipped, seed)))
    }

    /// Counts and names the images that could not be read.
    fn leave_out(&mut self, train: &[Skipped], test: &[Skipped]) -> Result<()> {
        let held_out = self.images.held_out()?.len();
        self.left_out.add("training", self.images.train.len(), train)?;
        self.left_out.add("held-out", held_out, test)
    }
}

fn left_out(of: &Evaluated, run: &Trained) -> LeftOut {
    let file = run.checkpoint.with_file_name("eval-skipped.txt");
    LeftOut::new(file, of.max_skipped.unwrap_or(run.recipe.data.max_skipped))
}

/// Fails if a run's own recipe does not lead to the images that it was trained on, of which `images` may be a part, read by
/// `data`. Whoever names a folder on the command line means it.
fn check_images(
    of: &Evaluated,
    checkpoint: &Path,
    data: &DataSettings,
    images: &Images,
    device: &Device,
) -> Result<()> {
    let key = |setting: &String| setting.split('=').next().unwrap_or_default().trim().to_owned();
    if of.set.iter().map(key).any(|key| ["data", "data.path"].contains(&&*key)) {
        return Ok(());
    }
    let own = Trained::open(&of.run, &[])?.recipe.data;
    let train = match own == *data {
        true => images.train.clone(),
        false => Images::open(&own)?.train,
    };
    train::check_trained_on(checkpoint, &own.path, &*train, device)
}

/// The images of a recipe; every held-out image has a label.
fn labelled_images(recipe: &Recipe) -> Result<Images> {
    let images = Images::open(&recipe.data)?;
    labels_of(&**images.held_out()?)?;
    Ok(images)
}

/// What every JSON object of an evaluation says.
fn about(checkpoint: &Path, images: [usize; 2], skipped: [usize; 2], seed: u64) -> Value {
    json!({
        "checkpoint": checkpoint,
        "training_images": images[0],
        "held_out": images[1],
        "skipped": { "training_images": skipped[0], "held_out": skipped[1] },
        "seed": seed,
    })
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

    /// Counts training images that could not be read.
    fn skip_training(&mut self, count: usize) {
        if count > 0 {
            let used = self.about["training_images"].as_u64().unwrap_or(0) - count as u64;
            self.about["training_images"] = used.into();
            self.about["skipped"]["training_images"] = count.into();
        }
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
    labels.iter().for_each(|which| recipe.data.set_labels(which));
    recipe
}

pub(super) fn knn(args: &EvalKnn) -> Result<()> {
    if !args.temperature.iter().all(|t| t.is_finite() && *t > 0.0) {
        return Err(Error::config("--temperature must be a number above 0"));
    }
    let of_k = |&k: &u32| args.temperature.iter().map(move |&t| (k, t));
    let grid: Vec<(u32, f64)> = args.k.iter().flat_map(of_k).collect();
    let settings: Vec<Knn> =
        grid.iter().map(|&(k, temperature)| Knn { k: k as usize, temperature }).collect();
    let mut all = Networks::open(&args.of, None)?;
    let (how, names): (String, Vec<String>) = match grid[..] {
        [(k, t)] => (format!("k {k}, temperature {t}"), vec!["kNN".into()]),
        _ => {
            let name = |(k, t): &(u32, f64)| format!("kNN (k {k}, temperature {t})");
            (format!("{} settings", grid.len()), grid.iter().map(name).collect())
        }
    };
    let (train, test) = (all.images.train.clone(), all.images.held_out()?.clone());
    // The pixels first: what cannot be read shows before any network has been run.
    let pixels = Compared::pixels(&all.run.recipe, &all.device, &*train, &*test)?;
    let skipped = [&pixels[0].skipped, &pixels[1].skipped];
    all.leave_out(skipped[0], skipped[1])?;
    let mut results = all.results(args.of.json, &how, skipped.map(Vec::len))?;
    let (run, method) = (&all.run, &*all.method);
    let compared = Compared::new(&run.recipe, method, &all.trained, pixels, &*train, &*test)?;
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
    let mut all = Networks::open(&args.of, args.labels.as_deref())?;
    let test = all.images.held_out()?.clone();
    let unread = eval::unreadable(&*test, &all.device)?;
    all.leave_out(&[], &unread)?;
    let how = format!("protocol {}, {} epochs", args.protocol, protocol.epochs);
    let mut results = all.results(args.of.json, &how, [0, unread.len()])?;
    let rates: &[f64] = if args.sweep { &eval::RATES } else { &[] };
    let random = Arena::new(all.method.layout(), &all.device, all.run.recipe.seed);
    for name in ["random init", "trained"] {
        let arena = if name == "trained" { &all.trained } else { &random };
        let (frozen, train) = (all.frozen(arena), &all.images.train);
        let found =
            eval::linear_accuracy(frozen, train, &*test, &protocol, rates, all.run.recipe.seed)?;
        // Which training images can be read shows with the first network.
        if name == "random init" {
            all.left_out.add("training", train.len(), &found.skipped)?;
            results.skip_training(found.skipped.len());
        }
        for (lr, held_back) in &found.swept {
            let right = held_back.map_or("diverged".into(), |right| {
                format!("{:.1}% of the tenth that was held back", 100.0 * right)
            });
            talk(&format!("{name}, learning rate {lr}: {right}"));
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
    let trained = Trained::open(&args.of.run, &[])?;
    if let Some(out) = &args.out {
        train::check_free(out)?;
    }
    let mut left_out = left_out(&args.of, &trained);
    let recipe = with_labels(trained.recipe.clone(), labels);
    let checkpoint = trained.checkpoint.clone();
    let images = labelled_images(&recipe.with(&args.of.set)?)?;
    images.notes().for_each(|note| talk(note));
    let test = images.held_out()?;
    let classes = images.train.classes().len();
    let mut tuned =
        train::finetuning(&recipe, &checkpoint, &args.protocol, args.head_layers, classes)?;
    tuned.train.batch = tuned.train.batch.min(images.train.len());
    let mut tuned = with_labels(tuned.with(&args.of.set)?, labels);
    tuned.data.max_skipped = args.of.max_skipped.unwrap_or(tuned.data.max_skipped);
    let device = device::open_to_train(args.of.device, &tuned.train)?;
    check_images(&args.of, &checkpoint, &tuned.data, &images, &device)?;
    let unread = eval::unreadable(&**test, &device)?;
    left_out.add("held-out", test.len(), &unread)?;
    let not_used = eval::unreadable(&*images.train, &device)?;
    left_out.add("training", images.train.len(), &not_used)?;
    let used = [images.train.len() - not_used.len(), test.len() - unread.len()];
    // Unfit weights are refused now, not after the baseline's training.
    let mut weights = Arena::new(tuned.build_method()?.layout(), &device, tuned.seed);
    train::init_weights(&checkpoint, &mut weights)?;
    drop(weights);
    talk(&format!(
        "{}: fine-tuned on {} labelled images by {}, {} epochs, batch {}, seed {}",
        checkpoint.display(),
        used[0],
        args.protocol,
        tuned.train.epochs,
        tuned.train.batch,
        tuned.seed
    ));
    let about = about(&checkpoint, used, [not_used.len(), unread.len()], tuned.seed);
    let mut results = Results::new(args.of.json, about);
    let mut untrained = tuned.clone();
    untrained.train.init = None;
    for (name, recipe, out) in
        [("random init", &untrained, None), ("trained", &tuned, args.out.as_deref())]
    {
        let mut run = Run::new(recipe, &device, out)?;
        let mut watch = Last(Progress::new(run.schedule().total), None);
        run.train(&mut watch)?;
        let accuracy = watch.1.ok_or_else(|| {
            Error::Diverged(format!(
                "{name}: the fine-tuned network has no accuracy: it diverged, or no held-out image can be read"
            ))
        })?;
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
        [bank, queries]: [Features; 2],
        train: &dyn Source,
        test: &dyn Source,
    ) -> Result<Self> {
        let random = Arena::new(method.layout(), trained.device(), recipe.seed);
        let policy = &recipe.augment[0];
        let features = |arena: &Arena, source: &dyn Source| {
            eval::backbone_features(arena, method.backbone(), source, policy)
        };
        let rows = [
            ("raw pixels", bank, queries),
            ("random init", features(&random, train)?, features(&random, test)?),
            ("trained", features(trained, train)?, features(trained, test)?),
        ];
        for (of, bank, _) in rows.iter().filter(|(_, bank, _)| bank.are_constant()) {
            talk(&format!(
                "{of}: all {} training images have the same features (collapsed or dead), so its figures are those of chance",
                bank.labels.len()
            ));
        }
        Ok(Self { rows })
    }

    /// The raw pixels of both splits: the first of the baselines.
    pub(super) fn pixels(
        recipe: &Recipe,
        device: &Device,
        train: &dyn Source,
        test: &dyn Source,
    ) -> Result<[Features; 2]> {
        let pixels = |source| eval::pixel_features(source, recipe.augment[0].size, device);
        Ok([pixels(train)?, pixels(test)?])
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

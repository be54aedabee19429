//! `eval`: what a run has learnt, always beside what costs nothing.

use std::path::PathBuf;

use super::args::{EvalFinetune, EvalKnn, EvalLinear, Evaluated};
use super::progress::Progress;
use super::{device, say, talk};
use crate::arena::Arena;
use crate::data::Source;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{self, Features, Frozen, Knn, Protocol};
use crate::methods::{self, Method, Recipe};
use crate::train::{self, Images, Run};

/// A run's network as it was trained, and its images.
struct Trained {
    recipe: Recipe,
    checkpoint: PathBuf,
    device: Device,
    method: Box<dyn Method>,
    trained: Arena,
    images: Images,
}

impl Trained {
    /// The newest checkpoint of a run, its recipe with the settings of the command line and `labels` on top.
    fn open(of: &Evaluated, labels: Option<&str>) -> Result<Self> {
        let (recipe, checkpoint) = (recipe_of(of, &of.set, labels)?, train::newest(&of.run)?);
        let device = device::open(of.device, &recipe.train)?;
        let method = methods::build(&recipe)?;
        let mut trained = Arena::new(method.layout(), &device, recipe.seed);
        train::load_weights(&checkpoint, &mut trained)?;
        let images = Images::open(&recipe.data)?;
        images.held_out()?;
        Ok(Self { recipe, checkpoint, device, method, trained, images })
    }

    fn frozen<'a>(&'a self, arena: &'a Arena) -> Frozen<'a> {
        let policy = &self.recipe.augment[0];
        let (size, normalise) = (policy.size, policy.normalise.as_ref());
        Frozen { arena, backbone: self.method.backbone(), size, normalise }
    }

    /// What is evaluated, on how many images.
    fn talk(&self, how: &str) -> Result<()> {
        talk(&format!(
            "{}: {} training and {} held-out images, {how}, seed {}",
            self.checkpoint.display(),
            self.images.train.len(),
            self.images.held_out()?.len(),
            self.recipe.seed
        ));
        Ok(())
    }
}

/// The run's recipe with settings on top.
fn recipe_of(of: &Evaluated, set: &[String], labels: Option<&str>) -> Result<Recipe> {
    let recipe = Recipe::load(&of.run.join("recipe.toml").to_string_lossy(), set)?;
    Ok(with_labels(recipe, labels))
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
    let run = Trained::open(&args.of, None)?;
    let (how, names): (String, Vec<String>) = match grid[..] {
        [(k, t)] => (format!("k {k}, temperature {t}"), vec!["kNN".into()]),
        _ => {
            let name = |(k, t): &(u32, f64)| format!("kNN (k {k}, temperature {t})");
            (format!("{} settings", grid.len()), grid.iter().map(name).collect())
        }
    };
    run.talk(&how)?;
    let (train, test) = (&run.images.train, run.images.held_out()?);
    let compared = Compared::new(&run.recipe, &*run.method, &run.trained, &**train, &**test)?;
    compared
        .print(&names, |bank, queries| eval::knn_accuracies(bank, queries, &settings, &run.device))
}

pub(super) fn linear(args: &EvalLinear) -> Result<()> {
    let mut protocol = Protocol::named(&args.protocol)?;
    if let Some(epochs) = args.epochs {
        protocol = protocol.over(epochs);
    }
    let run = Trained::open(&args.of, args.labels.as_deref())?;
    let test = run.images.held_out()?;
    run.talk(&format!("protocol {}, {} epochs", args.protocol, protocol.epochs))?;
    let rates: &[f64] = if args.sweep { &eval::RATES } else { &[] };
    let random = Arena::new(run.method.layout(), &run.device, run.recipe.seed);
    for (name, arena) in [("random init", &random), ("trained", &run.trained)] {
        let (trunk, train) = (run.frozen(arena), &run.images.train);
        let found =
            eval::linear_accuracy(trunk, train, &**test, &protocol, rates, run.recipe.seed)?;
        for (lr, aside) in &found.swept {
            talk(&format!(
                "{name}, learning rate {lr}: {:.1}% of a tenth kept aside",
                100.0 * aside
            ));
        }
        if args.sweep && [rates[0], rates[rates.len() - 1]].contains(&found.lr) {
            talk(&format!("{name}: the best learning rate is at the end of the sweep"));
        }
        say(&format!(
            "linear ({}, learning rate {:.4}) {name}: {:.1}%",
            args.protocol,
            found.lr,
            100.0 * found.accuracy
        ))?;
    }
    Ok(())
}

pub(super) fn finetune(args: &EvalFinetune) -> Result<()> {
    let labels = args.labels.as_deref();
    let recipe = recipe_of(&args.of, &[], labels)?;
    let images = Images::open(&recipe.with(&args.of.set)?.data)?;
    images.held_out()?;
    let (checkpoint, classes) = (train::newest(&args.of.run)?, images.train.classes().len());
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
    let mut untrained = tuned.clone();
    untrained.train.init = None;
    for (name, recipe, out) in
        [("random init", &untrained, None), ("trained", &tuned, args.out.as_deref())]
    {
        let mut run = Run::new(recipe, &device, out)?;
        let mut watch = Last(Progress::new(run.schedule().total), None);
        run.train(&mut watch)?;
        let accuracy = watch.1.expect("a supervised run with held-out images is measured");
        say(&format!("fine-tuned {name}: {:.1}%", 100.0 * accuracy))?;
    }
    Ok(())
}

/// Shows a run and keeps its last accuracy.
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

/// Features of bank and held-out images three ways: nothing is worth a number without the two that cost nothing.
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
        let trunk = |arena: &Arena, source: &dyn Source| {
            let normalise = policy.normalise.as_ref();
            eval::trunk_features(arena, method.backbone(), source, policy.size, normalise)
        };
        let pixels = |source| eval::pixel_features(source, policy.size, trained.device());
        Ok(Self {
            rows: [
                ("raw pixels", pixels(train)?, pixels(test)?),
                ("random init", trunk(&random, train)?, trunk(&random, test)?),
                ("trained", trunk(trained, train)?, trunk(trained, test)?),
            ],
        })
    }

    /// A line for each of the figures that `names` name, for each kind of features.
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

//! What each command does.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::args::{Demo, Train};
use super::eval::Compared;
use super::progress::Progress;
use super::{device, say, talk};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{self, Knn};
use crate::methods::{self, Recipe};
use crate::train::{self, Run};

/// Labelled images of each class that the demo's linear probe sees.
const LABELS: usize = 10;

pub(super) fn demo(demo: &Demo) -> Result<()> {
    let recipe = Recipe::load("demo", &demo.set)?;
    let start = Instant::now();
    let device = device::open(demo.device, &recipe.train)?;
    let run = run(&recipe, &device, demo.out.as_deref())?;
    let (train, test) = (&run.images().train, run.images().held_out()?);
    let compared = Compared::new(&recipe, run.method(), run.online(), &**train, &**test)?;
    compared.print(&["kNN"], |bank, queries| {
        eval::knn_accuracies(bank, queries, &[Knn::default()], &device)
    })?;
    compared.print(&[format!("linear ({LABELS} labels per class)")], |bank, queries| {
        Ok(vec![eval::few_label_accuracy(bank, queries, LABELS, recipe.seed, &device)?])
    })?;
    talk(&format!(
        "{} training and {} held-out images, seed {}, {:.0} s",
        train.len(),
        test.len(),
        recipe.seed,
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

pub(super) fn train(train: &Train) -> Result<()> {
    let recipe = Recipe::load(&train.recipe, &train.set)?;
    let name = Path::new(&train.recipe).file_stem().unwrap_or_default();
    let out = train.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(name));
    let device = device::open(train.device, &recipe.train)?;
    run(&recipe, &device, Some(&out))?;
    talk(&format!("evaluate with: selfsup eval knn {}", out.display()));
    say(&train::newest(&out)?.display().to_string())
}

fn run(recipe: &Recipe, device: &Device, out: Option<&Path>) -> Result<Run> {
    let mut run = Run::new(recipe, device, out)?;
    let schedule = run.schedule().clone();
    talk(&format!(
        "{} on {} images; batch {}, learning rate {} by the {:?} rule = {:.4}, {} of {} steps warm-up",
        recipe.method.name,
        run.images().train.len(),
        recipe.train.batch,
        recipe.optim.lr,
        recipe.optim.lr_rule,
        schedule.peak,
        schedule.warmup,
        schedule.total,
    ));
    run.train(&mut Progress::new(schedule.total))?;
    Ok(run)
}

pub(super) fn recipes(name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        return methods::builtin_names().try_for_each(say);
    };
    let text = methods::builtin(name).ok_or_else(|| {
        let known = methods::builtin_names().collect::<Vec<_>>().join(", ");
        Error::Config(format!("there is no recipe {name}; built in are: {known}"))
    })?;
    say(text.trim_end())
}

pub(super) fn devices() -> Result<()> {
    let device = Device::cpu(0)?;
    let isa = crate::ops::instruction_set();
    say(&format!("cpu: {} threads, {isa} kernels", device.threads()))?;
    crate::device::gpus().iter().try_for_each(|line| say(line))
}

//! The commands `demo`, `train`, `report`, `diagnose` and `devices`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

use super::args::{Demo, Train};
use super::eval::Compared;
use super::output::{self, Kind};
use super::own::{self, Planned};
use super::progress::Progress;
use super::{check, device, say, signals, talk};
use crate::arena::Layout;
use crate::device::{Device, Group};
use crate::error::{Error, Result, as_word};
use crate::eval::{self, Knn};
use crate::files::{is_folder, write_file};
use crate::recipes::{self, Recipe};
use crate::train::{self, Finding, Paused, Run};

/// Labelled images per class for the demo's linear probe.
const LABELS: usize = 10;

pub(super) fn demo(demo: &Demo) -> Result<()> {
    let recipe = Recipe::load("demo", &demo.set)?;
    let start = Instant::now();
    let device = device::open_to_train(demo.device, &recipe.train)?;
    check::before_training(&device)?;
    let out = match &demo.out {
        Some(out) => out.clone(),
        None => free_folder()?,
    };
    let mut run = Run::new(&recipe, &device, Some(&out))?;
    run_to_end(&mut run, &recipe)?;
    let (train, test) = (&run.images().train, run.images().held_out()?);
    let pixels = Compared::pixels(&recipe, &device, &**train, &**test)?;
    let compared = Compared::new(&recipe, run.method(), run.online(), pixels, &**train, &**test)?;
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
    look_at(&out, &recipe);
    Ok(())
}

/// The first folder for a demo that is not taken.
fn free_folder() -> Result<PathBuf> {
    let name = |i: u32| if i == 1 { "demo".to_owned() } else { format!("demo-{i}") };
    let mut folders = (1..).map(|i| PathBuf::from("runs").join(name(i)));
    loop {
        let folder = folders.next().expect("numbers do not end");
        match train::check_free(&folder) {
            Ok(()) => return Ok(folder),
            Err(Error::Format { .. }) => {} // taken
            Err(error) => return Err(error),
        }
    }
}

/// Names the page of a run that has ended.
fn look_at(out: &Path, recipe: &Recipe) {
    if recipe.watch.report {
        talk(&format!("open in a browser: {}", out.join(train::REPORT).display()));
    }
}

pub(super) fn train(train: &Train) -> Result<()> {
    let group = Group::launched()?;
    if let Some(file) = &train.trace {
        group.together(output::check(file, Kind::Trace))?;
    }
    let mut planned_seconds = None;
    let (mut run, recipe, out) = match (&train.resume, &train.recipe) {
        (Some(folder), _) => {
            let paused = Paused::open_in(folder, &train.set, &group)?;
            let recipe = paused.recipe().clone();
            let device = group.together(device::open_to_resume(train.device, &paused))?;
            group.together(check::before_training(&device))?;
            let run = Run::resume(paused, &device)?;
            let what = if run.has_ended() { "the run has ended," } else { "going on" };
            talk(&format!("{}: {what} after step {}", folder.display(), run.step()));
            (run, recipe, folder.clone())
        }
        (None, Some(folder)) if group.together(train::is_own_folder(folder))? => {
            let planned = own::planned(folder, train, &group);
            let Some(Planned { recipe, device, out, seconds }) = planned? else { return Ok(()) };
            planned_seconds = Some(seconds);
            check::before_training(&device)?;
            (Run::new(&recipe, &device, Some(&out))?, recipe, out)
        }
        (None, name) => {
            let name = name.as_deref().unwrap_or_default(); // one of the two is required
            for_a_folder(train, name)?;
            if recipes::builtin(name).is_some() && is_folder(Path::new(name))? && group.leads() {
                talk(&format!(
                    "{name} is the built-in recipe; to train on the images of the folder of this name: selfsup train ./{name}"
                ));
            }
            let recipe = group.together(Recipe::load(name, &train.set))?;
            let stem = Path::new(name).file_stem().unwrap_or_default();
            let out = train.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(stem));
            let device = group.together(device::open_to_train(train.device, &recipe.train))?;
            group.together(check::before_training(&device))?;
            let run = Run::in_group(&recipe, &device, Some(&out), &group)?;
            if let Some(file) = &recipe.train.init {
                let file = Path::new(file);
                told_prefix(file, run.online().layout())?;
                let fitted =
                    train::fitted(file, run.online().layout(), run.images().train.classes())?;
                fitted.iter().for_each(|how| talk(&format!("{}: {how}", file.display())));
            }
            (run, recipe, out)
        }
    };
    if let Some(file) = train.trace.as_ref().filter(|_| group.leads()) {
        run.trace(file, train.trace_steps);
    }
    let start = Instant::now();
    run_to_end(&mut run, &recipe)?;
    if !group.leads() {
        return Ok(());
    }
    if let Some(planned) = planned_seconds {
        let took = own::time(start.elapsed().as_secs_f64());
        talk(&format!("the run took {took}; the plan was {}", own::time(planned)));
    }
    look_at(&out, &recipe);
    talk(&what_next(&out, run.images().held_out().is_ok()));
    say(&train::newest(&out)?.display().to_string())
}

/// The command that follows a training. Without labelled held-out images an evaluation of the run's own set is refused.
fn what_next(out: &Path, held_out: bool) -> String {
    let out = as_word(out);
    match held_out {
        true => format!("evaluate with: selfsup eval knn {out}"),
        false => format!(
            "without labelled held-out images there is no accuracy: use the features by selfsup embed {out} IMAGES --out FILE, \
             or evaluate on a labelled set with selfsup eval knn {out} --set data.path=SET"
        ),
    }
}

/// Refuses options that only a folder of images has.
fn for_a_folder(train: &Train, name: &str) -> Result<()> {
    let options = [
        ("--plan", train.plan),
        ("--budget", train.budget.is_some()),
        ("--method", train.method.is_some()),
    ];
    match options.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((option, _))
            if Path::new(name).extension().is_some() || recipes::builtin(name).is_some() =>
        {
            Err(Error::Config(format!(
                "{option} is for a folder of images, and {name} is a recipe, which says everything itself: change it with --set"
            )))
        }
        Some(_) => Err(Error::format(name, "no such folder: check the path of the images")),
    }
}

/// Names the prefix that was stripped from the names of a weight file, if there was one.
pub(super) fn told_prefix(file: &Path, layout: &Layout) -> Result<()> {
    if let Some(prefix) = train::foreign_prefix(file, layout)? {
        talk(&format!("{}: the prefix `{prefix}` of its names was stripped", file.display()));
    }
    Ok(())
}

/// Trains to the end, or until a signal.
fn run_to_end(run: &mut Run, recipe: &Recipe) -> Result<()> {
    let schedule = run.schedule().clone();
    talk(&format!(
        "{} on {} images; batch {}, learning rate {} by the {:?} rule = {:.4}, warm-up for {} of {} steps",
        recipe.method.name,
        run.images().train.len(),
        recipe.train.batch,
        recipe.optim.lr,
        recipe.optim.lr_rule,
        schedule.peak,
        schedule.warmup,
        schedule.total,
    ));
    let stop = signals::stop()?;
    run.stop_when(stop.clone());
    let ended = Arc::new(AtomicBool::new(false));
    signals::end_stuck_evaluation(stop.clone(), run.evaluating(), ended.clone());
    let trained = run.train(&mut Progress::new(schedule.total));
    ended.store(true, Ordering::Relaxed);
    stop.store(true, Ordering::Relaxed); // from here on a signal ends the program at once
    trained
}

pub(super) fn report(runs: &[PathBuf], out: Option<PathBuf>) -> Result<()> {
    let out = match (out, runs) {
        (Some(out), _) => out,
        (None, [run]) => run.join(train::REPORT),
        (None, _) => train::REPORT.into(),
    };
    let page = train::report(runs)?; // says what is wrong with a run before what is wrong with the output
    output::check(&out, Kind::Page)?;
    write_file(&out, page.as_bytes())?;
    say(&out.display().to_string())
}

pub(super) fn diagnose(runs: &[PathBuf], json: bool) -> Result<()> {
    let all: Vec<Vec<Finding>> =
        runs.iter().map(|run| train::diagnosis(run)).collect::<Result<_>>()?;
    let all = runs.iter().zip(all);
    if json {
        let of_run = |(run, found)| json!({ "run": run, "findings": found });
        return say(&json!(all.map(of_run).collect::<Vec<_>>()).to_string());
    }
    for (run, found) in all {
        let name = if runs.len() > 1 { format!("{}: ", run.display()) } else { String::new() };
        if found.is_empty() {
            say(&format!("{name}nothing to say before the end of an epoch"))?;
        }
        found.iter().try_for_each(|finding| say(&format!("{name}{}", finding.sentence)))?;
    }
    Ok(())
}

pub(super) fn devices(json: bool) -> Result<()> {
    let device = Device::cpu(0)?;
    let isa = crate::ops::instruction_set();
    if json {
        let cpu = json!({ "threads": device.threads(), "kernels": isa });
        let (gpu, mpi) = (crate::device::gpus(), crate::device::mpi());
        return say(&json!({ "cpu": cpu, "gpu": gpu, "mpi": mpi }).to_string());
    }
    say(&format!("cpu: {} threads, {isa} kernels", device.threads()))?;
    crate::device::gpus().iter().try_for_each(|line| say(line))?;
    crate::device::mpi().iter().try_for_each(|line| say(line))
}

//! Training runs: the engine trains on a thread of its own, and the caller's thread hands its reports to Python.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use pyo3::prelude::*;
use pythonize::pythonize;
use selfsup::device::Device;
use selfsup::recipes::Recipe;
use selfsup::train::{EpochReport, Images, Paused, Run, StepReport, Watch};
use serde_json::{Value, json};

use crate::device::Wanted;
use crate::error::{Error, finished};
use crate::recipe::parsed;
use crate::source::{Given, sources};

/// Reports that may wait for Python before the run waits for it.
const WAITING: usize = 64;

/// How often signals are looked for.
const EVERY: Duration = Duration::from_millis(50);

/// A report: its kind, and what it says.
type Report = (&'static str, Value);

/// Trains a recipe, and calls `on_report(kind, dictionary)` on this thread. An exception of it, or Ctrl-C, stops the run, which
/// writes its checkpoint first.
#[pyfunction]
#[pyo3(signature = (recipe, out, given, device, on_report))]
pub fn train(
    py: Python<'_>,
    recipe: &str,
    out: Option<PathBuf>,
    given: Option<Given<'_>>,
    device: Option<String>,
    on_report: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (recipe, given) = (parsed(recipe)?, given.map(sources));
    run(py, on_report, move |reports, stop| {
        let (precision, threads) = (recipe.train.precision, recipe.train.threads);
        let wanted = Wanted { name: device, precision, threads, own_thread: true, to_train: true };
        let device = opened(wanted, reports)?;
        let mut run = match given {
            Some((train, held_out)) => {
                let images = Images::given(&recipe.data, train, held_out)?;
                Run::on(&recipe, &device, images, out.as_deref())?
            }
            None => Run::new(&recipe, &device, out.as_deref())?,
        };
        go(&mut run, &recipe, reports, stop)
    })
}

/// Continues the run in a folder, as [`train`].
#[pyfunction]
#[pyo3(signature = (folder, settings, given, device, on_report))]
pub fn resume(
    py: Python<'_>,
    folder: PathBuf,
    settings: Vec<String>,
    given: Option<Given<'_>>,
    device: Option<String>,
    on_report: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let given = given.map(sources);
    run(py, on_report, move |reports, stop| {
        let paused = Paused::open(&folder, &settings)?;
        let recipe = paused.recipe().clone();
        let (precision, threads) = (paused.precision(), recipe.train.threads);
        // A checkpoint without a precision is of a version that trained on every processor in f32.
        let to_train = paused.starts_again();
        let wanted = Wanted { name: device, precision, threads, own_thread: true, to_train };
        let device = opened(wanted, reports)?;
        let mut run = match given {
            Some((train, held_out)) => {
                let images = Images::given(&recipe.data, train, held_out)?;
                Run::resume_on(paused, &device, images)?
            }
            None => Run::resume(paused, &device)?,
        };
        go(&mut run, &recipe, reports, stop)
    })
}

/// Opens the device that this thread is to drive, and says which.
fn opened(wanted: Wanted, reports: &mut Reports) -> selfsup::Result<Device> {
    let device = wanted.open()?;
    reports.note(&format!("device: {device}"));
    Ok(device)
}

/// Trains to the end.
fn go(
    run: &mut Run,
    recipe: &Recipe,
    reports: &mut Reports,
    stop: &Arc<AtomicBool>,
) -> selfsup::Result<()> {
    reports.send((
        "start",
        json!({
            "method": recipe.method.name,
            "images": run.images().train.len(),
            "batch": recipe.train.batch,
            "step": run.step(),
            "total": run.schedule().total,
            "epochs": recipe.train.epochs,
        }),
    ));
    run.stop_when(stop.clone());
    run.train(reports)
}

/// Runs `work` on a thread of its own and hands its reports to Python on this one.
fn run(
    py: Python<'_>,
    on_report: &Bound<'_, PyAny>,
    work: impl FnOnce(&mut Reports, &Arc<AtomicBool>) -> selfsup::Result<()> + Send,
) -> PyResult<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = sync_channel(WAITING);
    let (on_report, asked) = (on_report.clone().unbind(), stop.clone());
    let (trained, told) = py.detach(|| {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("selfsup-train".into())
                .spawn_scoped(scope, move || work(&mut Reports(sender), &asked))
                .map_err(|e| Box::new(e.to_string()) as Box<dyn Any + Send>);
            let told = tell(&receiver, &on_report);
            // Also when Python's side is done before the run is: it stops at its next step.
            stop.store(told.is_err(), Ordering::Relaxed);
            let left = receiver.into_iter().count();
            debug_assert!(told.is_err() || left == 0, "reports end with the run");
            (thread.and_then(|thread| thread.join()), told)
        })
    });
    let trained = finished(trained);
    match (told, trained) {
        // What stopped the run, with the run's own sentence, which says how it goes on.
        (Err(raised), Err(stopped)) => {
            let sentence = stopped.value(py).to_string();
            if stopped.is_instance_of::<Error>(py) {
                // The exception is the caller's, and may take no attributes.
                let _ = raised.value(py).setattr("_selfsup_stopped", sentence);
            }
            Err(raised)
        }
        (Err(raised), Ok(())) => Err(raised),
        (Ok(()), trained) => trained,
    }
}

/// Hands reports to Python until the run ends, an exception is raised, or a signal comes.
fn tell(reports: &Receiver<Report>, on_report: &Py<PyAny>) -> PyResult<()> {
    loop {
        match reports.recv_timeout(EVERY) {
            Ok((kind, what)) => Python::attach(|py| {
                on_report.bind(py).call1((kind, pythonize(py, &what)?))?;
                py.check_signals()
            })?,
            Err(RecvTimeoutError::Timeout) => Python::attach(|py| py.check_signals())?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Sends a run's reports to the thread that Python called on.
struct Reports(SyncSender<Report>);

impl Reports {
    fn send(&self, report: Report) {
        let _ = self.0.send(report); // after an exception nobody listens, and the run is stopping
    }
}

impl Watch for Reports {
    fn step(&mut self, report: &StepReport) {
        let &StepReport { step, total, loss, lr, views_per_second } = report;
        let what = json!({ "step": step, "total": total, "loss": loss, "lr": lr, "views_per_second": views_per_second });
        self.send(("step", what));
    }

    fn epoch(&mut self, report: &EpochReport) {
        let what = json!({
            "epoch": report.epoch,
            "epochs": report.epochs,
            "loss": report.loss,
            "embedding_std": report.spread.map(|spread| spread.std),
            "effective_rank": report.spread.map(|spread| spread.effective_rank),
            "uniformity": report.spread.map(|spread| spread.uniformity),
            "knn": report.knn,
            "validation": report.validation,
            "accuracy": report.accuracy,
            "views_per_second": report.views_per_second,
            "waiting": report.waiting,
            "monitors": report.monitors,
        });
        self.send(("epoch", what));
    }

    fn note(&mut self, sentence: &str) {
        self.send(("note", json!({ "sentence": sentence })));
    }
}

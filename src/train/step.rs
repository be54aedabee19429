//! One training step after another: launched, or captured once and replayed.
//!
//! The host runs all of a step on the CPU. On a GPU it does so for the first two steps of a phase, so that all memory is on
//! the free list; the third is captured as a graph, and from then on a step is one call. A replay runs none of the host's
//! code: views are copied to where the captured step found them, and what else changes are [`Numbers`](crate::tensor::Numbers)
//! that [`Method::labels`], [`Method::prepare`] and the schedule set. Another phase or another shape captures anew; there is one
//! graph at a time, because it owns the memory of its activations.
//!
//! Losses come back late from a GPU, which is never waited for in the middle of a step: while one step runs the host prepares
//! the next, and then asks now and then whether the one before has ended.

use std::collections::VecDeque;
use std::time::Duration;

use crate::arena::Arena;
use crate::data::Batch;
use crate::device::cuda::{Graph, Ring};
use crate::device::{Device, DeviceKind, trace_phase};
use crate::error::{Error, Result};
use crate::methods::{self, Method};
use crate::optim::{Optimizer, Schedule};
use crate::tensor::{DType, Shape, Tensor};

/// Steps of a phase that are launched before one is captured: the second finds all of its memory on the free list.
const LAUNCHED: u32 = 2;

/// Steps that a GPU has queued when the host turns to the next batch.
const AHEAD: usize = 1;

/// How often a GPU is asked whether it has ended a step.
const PAUSE: Duration = Duration::from_micros(20);

/// What is trained, and by what.
pub struct Training<'a> {
    /// The method.
    pub method: &'a mut dyn Method,
    /// Its weights.
    pub online: &'a mut Arena,
    /// What moves them.
    pub optimizer: &'a mut Optimizer,
    /// How fast.
    pub schedule: &'a Schedule,
}

/// A step whose loss is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Steps done with it, from 1.
    pub step: u64,
    /// Its learning rate.
    pub lr: f64,
    /// Its loss.
    pub loss: f64,
}

/// The steps of a run on one device.
pub struct Steps {
    device: Device,
    /// Micro-batches of a step.
    parts: usize,
    captures: bool,
    /// What the last step was, and how many like it have been launched.
    like: Option<CaptureKey>,
    launched: u32,
    /// Where a GPU's steps find their views.
    views: Vec<Tensor>,
    captured: Option<Captured>,
    embeddings: Option<Tensor>,
    /// On a GPU, losses on their way.
    losses: Option<Ring>,
    /// Steps, with their learning rates, whose losses are on their way.
    pending: VecDeque<(u64, f64)>,
}

/// What decides whether a captured step can stand for another.
#[derive(Clone, Debug, PartialEq)]
struct CaptureKey {
    phase: u32,
    views: Vec<Shape>,
}

/// A captured step, and where it leaves what others look at.
struct Captured {
    graph: Graph,
    loss: Tensor,
    embeddings: Option<Tensor>,
}

impl Steps {
    /// Steps on a device, none done.
    pub fn new(device: &Device) -> Self {
        let on_gpu = device.kind() == DeviceKind::Cuda;
        Self {
            device: device.clone(),
            parts: 1,
            captures: on_gpu && !device.gpu().is_synchronous(),
            like: None,
            launched: 0,
            views: Vec::new(),
            captured: None,
            embeddings: None,
            losses: on_gpu.then(|| Ring::new(device, AHEAD + 1)),
            pending: VecDeque::new(),
        }
    }

    /// Makes every step in so many micro-batches ([`methods::step`]).
    pub fn in_parts(mut self, parts: usize) -> Self {
        self.parts = parts;
        self
    }

    /// Launches every step: for comparisons, and to look at what a graph would hide.
    pub fn launched(mut self) -> Self {
        self.captures = false;
        self
    }

    /// Does step number `iteration`, from 0, with a batch; gives the steps whose losses are known by now, in order: this one
    /// on the CPU, on a GPU the one before.
    ///
    /// # Errors
    /// When the method refuses the batch, or the device fails; an error of a step that a GPU still had to do names it.
    pub fn run(
        &mut self,
        training: Training<'_>,
        batch: &Batch,
        iteration: u64,
    ) -> Result<Vec<StepResult>> {
        let Training { method, online, optimizer, schedule } = training;
        let phase = method.phase();
        method.labels(&batch.labels)?;
        method.prepare(iteration);
        method.samples(&batch.indices);
        if method.phase() != phase {
            let (method, peak) = (&*method, schedule.peak);
            optimizer.set_policies(online.layout(), |slot| method.param_policy(slot, peak));
        }
        let lr = schedule.lr(iteration);
        optimizer.set_rate(lr);
        let progress = (iteration + 1) as f64 / schedule.total.max(1) as f64;
        if self.losses.is_none() {
            let cut = (batch.indices.len(), self.parts);
            let loss = step(method, online, optimizer, &batch.crops, cut, progress)?;
            let loss = loss.scalar();
            self.embeddings = method.take_embeddings();
            return Ok(vec![StepResult { step: iteration + 1, lr, loss }]);
        }
        let queued = self.queue(method, online, optimizer, batch, progress);
        queued.and_then(|()| self.device.check()).map_err(|e| during(iteration + 1, e))?;
        self.pending.push_back((iteration + 1, lr));
        let provide = (self.captured.is_none() && self.launched == LAUNCHED).then_some(AHEAD + 1);
        self.device.gpu().end_step(provide);
        self.known(AHEAD)
    }

    /// Waits until every step's loss is known, as one must before looking at weights or telling how far a run has come.
    ///
    /// # Errors
    /// When the device fails, naming the step.
    pub fn finish(&mut self) -> Result<Vec<StepResult>> {
        self.known(0)
    }

    /// What the last step compared, as [`Method::take_embeddings`] has it. The next step may write it anew.
    pub fn embeddings(&self) -> Option<&Tensor> {
        self.embeddings.as_ref()
    }

    /// A step on a GPU, in one of three ways.
    fn queue(
        &mut self,
        method: &mut dyn Method,
        online: &mut Arena,
        optimizer: &mut Optimizer,
        batch: &Batch,
        progress: f64,
    ) -> Result<()> {
        let (crops, cut) = (&batch.crops, (batch.indices.len(), self.parts));
        let like = CaptureKey {
            phase: method.phase(),
            views: crops.iter().map(|crops| *crops.shape()).collect(),
        };
        if self.like.as_ref() != Some(&like) {
            self.captured = None;
            self.views = crops.iter().map(Tensor::empty_like).collect();
            (self.like, self.launched) = (Some(like), 0);
        }
        for (view, crops) in self.views.iter_mut().zip(crops) {
            view.view_mut().copy_from(crops);
        }
        online.refresh(); // a captured step brings up to date what it changes itself, no more
        if !self.captures || self.launched < LAUNCHED {
            let loss = step(method, online, optimizer, &self.views, cut, progress)?;
            self.embeddings = method.take_embeddings();
            self.launched += u32::from(self.launched <= LAUNCHED);
            self.send(&loss);
            return Ok(());
        }
        if self.captured.is_none() {
            let work = || {
                let loss = step(method, online, optimizer, &self.views, cut, progress)?;
                Ok((loss, method.take_embeddings()))
            };
            let (graph, (loss, embeddings)) = Graph::capture(&self.device, work)?;
            self.captured = Some(Captured { graph, loss, embeddings });
        }
        let captured = self.captured.as_ref().expect("captured by now");
        captured.graph.replay();
        self.embeddings = captured.embeddings.clone();
        let loss = captured.loss.clone();
        self.send(&loss);
        Ok(())
    }

    fn send(&mut self, loss: &Tensor) {
        self.losses.as_mut().expect("a GPU's steps have a ring").send(loss.device_in());
    }

    /// The steps whose losses arrive until no more than `ahead` are on their way.
    fn known(&mut self, ahead: usize) -> Result<Vec<StepResult>> {
        let mut known = Vec::new();
        while self.pending.len() > ahead {
            let (step, lr) = self.pending[0];
            let losses = self.losses.as_mut().expect("only a GPU's steps are pending");
            match losses.poll(|| format!("step {step}")) {
                Some(loss) => {
                    known.push(StepResult { step, lr, loss: f64::from(loss) });
                    self.pending.pop_front();
                }
                None => {
                    self.device.check()?;
                    std::thread::sleep(PAUSE);
                }
            }
        }
        Ok(known)
    }
}

/// What a device says, with the step in which it said so.
fn during(step: u64, error: Error) -> Error {
    match error {
        Error::Device(reason) => Error::Device(format!("step {step}: {reason}")),
        other => other,
    }
}

/// All of a step but what the host sets before it: images, and the micro-batches that they are cut into. Gives the loss, in f32
/// on a GPU.
fn step(
    method: &mut dyn Method,
    online: &mut Arena,
    optimizer: &mut Optimizer,
    views: &[Tensor],
    (images, parts): (usize, usize),
    progress: f64,
) -> Result<Tensor> {
    method.before_step(online);
    let loss = methods::step(method, online, views, images, parts)?;
    trace_phase("optimizer", || optimizer.update(online));
    trace_phase("after the update", || method.after_update(online, progress));
    Ok(loss.cast(DType::of(online.device())))
}

//! Runs training steps: launches them kernel by kernel, or captures one as a CUDA graph and replays it.
//!
//! On the CPU the host runs every step. On a GPU the host launches the first two steps of a phase, so that all memory is on
//! the free list; it captures the third as a graph, and from then on a step is one call. A replay runs no host code: the views
//! lie in the buffers that the captured step read ([`Steps::take_views`]) or are copied there, and everything else that changes is in
//! [`Numbers`](crate::tensor::Numbers) set by [`Method::labels`], [`Method::prepare`] and the schedule. Another phase or shape
//! needs another capture. There is one graph at a time, because it owns the memory of its activations. A GPU with too little memory
//! for that goes on launching, and says so.
//!
//! The host never waits for a GPU in the middle of a step, so losses arrive late: while one step runs, the host prepares the
//! next, and then polls whether the previous one has ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arena::Arena;
use crate::data::Batch;
use crate::device::cuda::{Graph, Ring};
use crate::device::{Communicator, Device, DeviceKind, Group, trace_phase};
use crate::error::{Error, Result};
use crate::methods::{self, Method};
use crate::optim::{Optimizer, Schedule};
use crate::tensor::{DType, Shape, Tensor, mean_over_ranks};

/// Steps of a phase that are launched before one is captured: the second takes all of its memory from the free list.
const LAUNCHED: u32 = 2;

/// Steps that a GPU has queued when the host moves on to the next batch.
const AHEAD: usize = 1;

/// The pause between two polls whether a GPU has ended a step.
const PAUSE: Duration = Duration::from_micros(20);

/// The parts of a run that a step changes or reads.
pub struct Training<'a> {
    /// The method.
    pub method: &'a mut dyn Method,
    /// The method's weights.
    pub online: &'a mut Arena,
    /// The optimizer of the weights.
    pub optimizer: &'a mut Optimizer,
    /// The learning rate, step by step.
    pub schedule: &'a Schedule,
}

/// A step whose loss is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Its number, from 1.
    pub step: u64,
    /// Its learning rate.
    pub lr: f64,
    /// Its loss, the mean over the ranks.
    pub loss: f64,
}

/// The steps of a run on one device.
pub struct Steps {
    device: Device,
    /// The ranks of the last step.
    group: Group,
    /// Micro-batches of a step.
    micro_batches: usize,
    captures: bool,
    /// The key of the last step, and how many steps with this key have been launched.
    key: Option<CaptureKey>,
    launched: u32,
    /// The buffers from which a GPU's steps read their views, and where they lie, also while they are taken.
    views: Vec<Tensor>,
    places: Vec<u64>,
    captured: Option<Captured>,
    embeddings: Option<Tensor>,
    /// The ring through which a GPU returns losses.
    losses: Option<Ring>,
    /// Steps whose losses have not arrived yet, with their learning rates.
    pending: VecDeque<(u64, f64)>,
    notice: Option<String>,
}

/// Decides whether a captured step can be replayed: everything in which it may not differ.
#[derive(Clone, Debug, PartialEq)]
struct CaptureKey {
    phase: u32,
    views: Vec<Shape>,
    /// Where weights, momentum and method lie: a replay would write those of the captured step, which may be gone.
    places: [u64; 3],
}

/// A captured step and its outputs.
struct Captured {
    graph: Graph,
    loss: Tensor,
    embeddings: Option<Tensor>,
    /// Dropped after the graph, whose collectives use it.
    _communicator: Option<Arc<Communicator>>,
}

impl Steps {
    /// Steps on a device, before the first one.
    pub fn new(device: &Device) -> Self {
        let on_gpu = device.kind() == DeviceKind::Cuda;
        Self {
            device: device.clone(),
            group: Group::alone(),
            micro_batches: 1,
            captures: on_gpu && !device.gpu().is_synchronous(),
            key: None,
            launched: 0,
            views: Vec::new(),
            places: Vec::new(),
            captured: None,
            embeddings: None,
            losses: on_gpu.then(|| Ring::new(device, AHEAD + 1)),
            pending: VecDeque::new(),
            notice: None,
        }
    }

    /// Splits every step into `count` micro-batches ([`methods::step`]).
    pub fn with_micro_batches(mut self, count: usize) -> Self {
        self.micro_batches = count;
        self
    }

    /// Launches every step instead of replaying a graph: for comparisons, and for traces of single operations.
    pub fn without_capture(mut self) -> Self {
        self.captures = false;
        self
    }

    /// Runs step number `iteration`, from 0, on a batch. Returns the steps whose losses have become known, in order: this step on
    /// the CPU, the previous one on a GPU.
    ///
    /// # Errors
    /// If the method refuses the batch, or the device fails; the message names the step that failed.
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
            let split = (batch.indices.len(), self.micro_batches);
            let loss = step(method, online, optimizer, &batch.crops, split, progress)?;
            let loss = online.group().mean("losses", loss.scalar());
            online.group().check()?;
            self.embeddings = method.take_embeddings();
            return Ok(vec![StepResult { step: iteration + 1, lr, loss }]);
        }
        self.group = online.group().clone();
        let queued = self.queue(method, online, optimizer, batch, progress);
        queued.and_then(|()| self.device.check()).map_err(|e| in_step(iteration + 1, e))?;
        self.pending.push_back((iteration + 1, lr));
        let provide = (self.captured.is_none() && self.launched == LAUNCHED).then_some(AHEAD + 1);
        self.device.gpu().end_step(provide);
        self.known(AHEAD)
    }

    /// Waits until the loss of every step is known. Required before the weights are read or the run's progress is saved.
    ///
    /// # Errors
    /// If the device fails; the message names the step.
    pub fn finish(&mut self) -> Result<Vec<StepResult>> {
        self.known(0)
    }

    /// Takes the buffers from which the next step will read its views, for the loader to write to
    /// ([`Loader::next_into`](crate::data::Loader::next_into)); as the crops of the next batch they come back, and are not copied. Empty
    /// before the first step, and always on the CPU.
    pub fn take_views(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.views)
    }

    /// A sentence for the user, once: that steps are launched from now on, and why.
    pub fn take_notice(&mut self) -> Option<String> {
        self.notice.take()
    }

    /// The embeddings of the last step, from [`Method::take_embeddings`]. The next step may overwrite them.
    pub fn embeddings(&self) -> Option<&Tensor> {
        self.embeddings.as_ref()
    }

    /// Queues a step on a GPU: launches, captures or replays it.
    fn queue(
        &mut self,
        method: &mut dyn Method,
        online: &mut Arena,
        optimizer: &mut Optimizer,
        batch: &Batch,
        progress: f64,
    ) -> Result<()> {
        let (crops, split) = (&batch.crops, (batch.indices.len(), self.micro_batches));
        let key = CaptureKey {
            phase: method.phase(),
            views: crops.iter().map(|crops| *crops.shape()).collect(),
            places: [
                online.values().address(),
                optimizer.momentum().address(),
                std::ptr::from_ref(&*method).addr() as u64,
            ],
        };
        if self.key.as_ref() != Some(&key) {
            self.captured = None;
            (self.key, self.launched) = (Some(key), 0);
        }
        self.receive(crops);
        online.refresh(); // a captured step refreshes only what it changes itself
        if !self.captures || self.launched < LAUNCHED {
            let loss = step(method, online, optimizer, &self.views, split, progress)?;
            self.embeddings = method.take_embeddings();
            self.launched += u32::from(self.launched <= LAUNCHED);
            self.send(&loss);
            return Ok(());
        }
        if self.captured.is_none() {
            let body = || {
                let loss = step(method, online, optimizer, &self.views, split, progress)?;
                Ok((loss, method.take_embeddings()))
            };
            match Graph::capture(&self.device, body)? {
                Ok((graph, (loss, embeddings))) => {
                    let _communicator = self.group.communicator();
                    self.captured = Some(Captured { graph, loss, embeddings, _communicator });
                }
                Err(reason) => {
                    self.captures = false;
                    self.notice = Some(format!(
                        "steps are launched kernel by kernel, not replayed as a graph, whose memory nothing else may use: {reason}"
                    ));
                    return self.queue(method, online, optimizer, batch, progress);
                }
            }
        }
        let captured = self.captured.as_ref().expect("captured by now");
        captured.graph.replay();
        self.embeddings = captured.embeddings.clone();
        let loss = captured.loss.clone();
        self.send(&loss);
        Ok(())
    }

    /// Brings a batch's views to the buffers from which steps read them.
    fn receive(&mut self, crops: &[Tensor]) {
        if !crops.is_empty() && crops.iter().map(Tensor::address).eq(self.places.iter().copied()) {
            self.views = crops.to_vec(); // the buffers themselves
            return;
        }
        let shapes = |tensors: &[Tensor]| tensors.iter().map(|t| *t.shape()).collect::<Vec<_>>();
        if shapes(&self.views) != shapes(crops) {
            // A captured step reads where the old ones were.
            (self.captured, self.launched) = (None, 0);
            self.views = crops.iter().map(Tensor::empty_like).collect();
            self.places = self.views.iter().map(Tensor::address).collect();
        }
        for (view, crops) in self.views.iter_mut().zip(crops) {
            view.view_mut().copy_from(crops);
        }
    }

    fn send(&mut self, loss: &Tensor) {
        self.losses.as_mut().expect("a GPU has a ring").send(loss.device_in());
    }

    /// Waits until at most `ahead` losses are outstanding; returns the steps whose losses arrived.
    fn known(&mut self, ahead: usize) -> Result<Vec<StepResult>> {
        let (mut known, begin) = (Vec::new(), Instant::now());
        while self.pending.len() > ahead {
            let (step, lr) = self.pending[0];
            let losses = self.losses.as_mut().expect("only a GPU's steps are pending");
            match losses.poll(|| format!("step {step}")) {
                Some(loss) => {
                    self.group.check_gpu().map_err(|e| in_step(step, e))?;
                    known.push(StepResult { step, lr, loss: f64::from(loss) });
                    self.pending.pop_front();
                }
                None => {
                    self.device.check()?;
                    match self.group.size() {
                        1 => std::thread::sleep(PAUSE),
                        _ => self
                            .group
                            .pause_for_gpu(begin.elapsed())
                            .map_err(|e| in_step(step, e))?,
                    }
                }
            }
        }
        Ok(known)
    }
}

/// Adds the number of the step to a device's error.
fn in_step(step: u64, error: Error) -> Error {
    match error {
        Error::Device(reason) => Error::Device(format!("step {step}: {reason}")),
        other => other,
    }
}

/// The body of a step, without what the host sets before it: `images` in `micro_batches`. Returns the loss, in f32 on a GPU.
fn step(
    method: &mut dyn Method,
    online: &mut Arena,
    optimizer: &mut Optimizer,
    views: &[Tensor],
    (images, micro_batches): (usize, usize),
    progress: f64,
) -> Result<Tensor> {
    method.before_step(online);
    let loss = methods::step(method, online, views, images, micro_batches)?;
    trace_phase("optimizer", || optimizer.update(online));
    trace_phase("after the update", || method.after_update(online, progress));
    let mut loss = loss.cast(DType::of(online.device()));
    if online.device().kind() == DeviceKind::Cuda && online.group().size() > 1 {
        loss = if loss.is_unique() { loss } else { loss.copy() };
        mean_over_ranks(&mut loss, online.group(), "losses");
    }
    Ok(loss)
}

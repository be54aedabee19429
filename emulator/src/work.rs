//! Streams, events and graphs: queued work, and when it runs.
//!
//! Work runs on the thread that waits for it, as late as the driver's guarantees allow: work that was never waited for has
//! not run, so a missing wait shows. Some work, drawn from the seed, runs earlier. With `eager` it runs when it is queued.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use crate::driver::{CallResult, Code, Driver};
use crate::engine::{self, Dim3, Kernel, State};
use crate::memory::Kind;

/// A point in a stream that others can wait for.
#[derive(Debug)]
pub(crate) struct Marker {
    stream: usize,
    passed: AtomicBool,
    /// How often the host has asked whether it has passed.
    polls: AtomicU64,
    /// The capture that recorded it; the host cannot wait for such a marker.
    pub capture: Option<usize>,
}

impl Marker {
    pub fn passed(&self) -> bool {
        self.passed.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
pub(crate) struct Launch {
    pub kernel: &'static Kernel,
    pub device: usize,
    pub size: (Dim3, Dim3, u32),
    /// Copied at the launch call.
    pub arguments: Arc<Vec<Vec<u8>>>,
    pub cooperative: bool,
}

#[derive(Clone)]
pub(crate) enum Work {
    Launch(Launch),
    /// Source memory is read when the copy runs.
    Copy {
        to: usize,
        from: usize,
        size: usize,
    },
    /// From pageable host memory, which is read at the call, as the driver does.
    Upload {
        to: usize,
        bytes: Arc<Vec<u8>>,
    },
    /// `count` elements of `width` bytes.
    Fill {
        at: usize,
        value: u32,
        width: usize,
        count: usize,
    },
    Release(usize),
    Host(unsafe extern "C" fn(*mut c_void), usize),
    Record(Arc<Marker>, usize),
    Wait(Arc<Marker>),
    Graph(Arc<Vec<Work>>),
}

#[derive(Default)]
pub(crate) struct Stream {
    pub context: usize,
    pub queue: VecDeque<Work>,
    /// It and the legacy default stream do not wait for each other.
    pub non_blocking: bool,
    /// The capture that it belongs to.
    pub capture: Option<usize>,
}

#[derive(Default)]
pub(crate) struct Event {
    pub context: usize,
    pub last: Option<Arc<Marker>>,
    /// When the device last reached it.
    pub at: Option<Instant>,
    pub timed: bool,
}

/// A graph or an executable graph.
#[derive(Clone)]
pub(crate) struct Graph {
    pub context: usize,
    pub nodes: Arc<Vec<Work>>,
}

/// A capture in progress.
pub(crate) struct Capture {
    pub origin: usize,
    /// 0 forbids unsafe calls on every thread, 1 on this one, 2 on none.
    pub mode: u32,
    pub thread: std::thread::ThreadId,
    pub nodes: Vec<Work>,
    /// Streams that joined through an event, and whether the origin has waited for their last work.
    pub joined: HashMap<usize, bool>,
    pub invalidated: bool,
}

impl Driver {
    /// The stream's key; the legacy default stream of the current context has several handles.
    pub fn stream_id(&self, handle: usize) -> CallResult<usize> {
        let id = if handle <= 2 { self.in_context()? } else { handle };
        if self.streams.contains_key(&id) { Ok(id) } else { Err(Code::INVALID_HANDLE) }
    }

    /// Whether it is the legacy default stream of its context.
    pub fn is_default_stream(&self, id: usize) -> bool {
        self.streams.get(&id).is_some_and(|stream| stream.context == id)
    }

    /// Queues work on a stream, or adds it to the stream's capture.
    pub fn push(&mut self, stream: usize, work: Work) -> CallResult {
        let id = self.stream_id(stream)?;
        let Stream { context, capture, non_blocking, .. } = self.streams[&id];
        if let Some(capture) = capture.and_then(|c| self.captures.get_mut(&c)) {
            if capture.invalidated {
                return Err(Code::CAPTURE_INVALIDATED);
            }
            if let Some(seen) = capture.joined.get_mut(&id) {
                *seen = false;
            }
            capture.nodes.push(work);
            return Ok(());
        }
        if self.is_default_stream(id) {
            self.default_stream_waits(context)?;
        } else if !non_blocking {
            self.drain(context)?;
        }
        self.streams.get_mut(&id).expect("looked up above").queue.push_back(work);
        if self.eager {
            return self.drain(id);
        }
        while self.streams[&id].queue.len() > 1000 {
            self.run_next(id)?;
        }
        if self.random().is_multiple_of(4) && self.stall == 0 {
            let pick = self.random() as usize % self.streams.len();
            let other = *self.streams.keys().nth(pick).expect("an index below the count");
            self.run_next(other)?;
        }
        Ok(())
    }

    /// Waits for all blocking streams of a context, as its legacy default stream does before each of its operations.
    pub fn default_stream_waits(&mut self, context: usize) -> CallResult {
        let waits = |(_, s): &(&usize, &Stream)| s.context == context && !s.non_blocking;
        let blocking: Vec<usize> = self.streams.iter().filter(waits).map(|(id, _)| *id).collect();
        if blocking.iter().any(|id| self.streams[id].capture.is_some()) {
            return Err(Code::CAPTURE_IMPLICIT);
        }
        blocking.into_iter().try_for_each(|id| self.drain(id))
    }

    /// Runs all queued work of a stream.
    pub fn drain(&mut self, id: usize) -> CallResult {
        while self.streams.get(&id).is_some_and(|s| !s.queue.is_empty()) {
            self.run_next(id)?;
        }
        Ok(())
    }

    pub fn drain_all(&mut self) -> CallResult {
        let all: Vec<usize> = self.streams.keys().copied().collect();
        all.into_iter().try_for_each(|id| self.drain(id))
    }

    /// Runs all queued work of a context.
    pub fn drain_context(&mut self, context: usize) -> CallResult {
        let of_it = |(_, s): &(&usize, &Stream)| s.context == context;
        let all: Vec<usize> = self.streams.iter().filter(of_it).map(|(id, _)| *id).collect();
        all.into_iter().try_for_each(|id| self.drain(id))
    }

    pub fn is_idle(&self, id: usize) -> bool {
        self.streams.get(&id).is_none_or(|s| s.queue.is_empty())
    }

    /// Runs streams until the device reaches the marker.
    pub fn wait_for(&mut self, marker: &Marker) -> CallResult {
        while !marker.passed() {
            if self.is_idle(marker.stream) {
                return Ok(()); // its stream was destroyed, or an error dropped its queue
            }
            self.run_next(marker.stream)?;
        }
        Ok(())
    }

    /// Makes some progress towards the marker, for a caller that polls, if it has polled often enough.
    pub fn run_towards(&mut self, marker: &Marker) -> CallResult {
        let stalls = marker.polls.fetch_add(1, Ordering::Relaxed) < self.stall;
        if marker.passed() || stalls { Ok(()) } else { self.run_next(marker.stream) }
    }

    /// Runs the oldest queued work of a stream.
    pub fn run_next(&mut self, id: usize) -> CallResult {
        let Some(work) = self.streams.get_mut(&id).and_then(|s| s.queue.pop_front()) else {
            return Ok(());
        };
        let result = self.run(work);
        if result.is_err() {
            // After an error no further work runs.
            self.streams.values_mut().for_each(|s| s.queue.clear());
        }
        result
    }

    fn run(&mut self, work: Work) -> CallResult {
        match work {
            Work::Launch(launch) => self.run_kernel(&launch),
            Work::Copy { to, from, size } => {
                self.check("a copy reads", from, size)?;
                self.check("a copy writes", to, size)?;
                let to_host = !self.memory().holds(to) || self.memory().is_pinned(to);
                if self.checked && to_host && self.memory().holds(from) {
                    self.check_written(from, size)?;
                }
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) };
                self.written(to, size);
                Ok(())
            }
            Work::Upload { to, bytes } => {
                self.check("a copy writes", to, bytes.len())?;
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len())
                };
                self.written(to, bytes.len());
                Ok(())
            }
            Work::Fill { at, value, width, count } => {
                self.check("a memset writes", at, width * count)?;
                let bytes = &value.to_ne_bytes()[..width];
                for i in 0..count {
                    let to = (at + i * width) as *mut u8;
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, width) };
                }
                self.written(at, width * count);
                Ok(())
            }
            Work::Release(at) => {
                self.memory().release(at);
                Ok(())
            }
            Work::Host(function, data) => {
                unsafe { function(data as *mut c_void) };
                Ok(())
            }
            Work::Record(marker, event) => {
                marker.passed.store(true, Ordering::Relaxed);
                if let Some(event) = self.events.get_mut(&event) {
                    event.at = Some(Instant::now());
                }
                Ok(())
            }
            Work::Wait(marker) => self.wait_for(&marker),
            Work::Graph(nodes) => nodes.iter().try_for_each(|work| self.run(work.clone())),
        }
    }

    fn run_kernel(&mut self, launch: &Launch) -> CallResult {
        let name = launch.kernel.name;
        self.count(&format!("kernel:{name}"));
        self.note_run(launch.kernel);
        if let Some(code) = self.fault(&format!("kernel:{name}")).or_else(|| self.fault("kernel")) {
            return Err(self.set_sticky(code, format!("kernel `{name}`: an injected failure")));
        }
        if let Some(what) = self.foreign_argument(launch) {
            return Err(self.set_sticky(Code::ILLEGAL_ADDRESS, format!("kernel `{name}`: {what}")));
        }
        let seed = self.random();
        let checked = self.checked;
        let outcome = self.describing(|| {
            launch.kernel.run(launch.size, &launch.arguments, launch.cooperative, checked, seed)
        });
        if let Err(what) = outcome {
            return Err(self.set_sticky(Code::LAUNCH_FAILED, what));
        }
        if checked {
            let [read, written] = engine::moved();
            self.count_by(&format!("read:{name}"), read);
            self.count_by(&format!("written:{name}"), written);
        }
        if let Some(what) = self.memory().overwritten_guard() {
            return Err(self.set_sticky(Code::LAUNCH_FAILED, format!("kernel `{name}`: {what}")));
        }
        Ok(())
    }

    /// Describes a pointer among a kernel's arguments to memory of a device that it does not run on.
    fn foreign_argument(&mut self, launch: &Launch) -> Option<String> {
        let memory = self.memory();
        launch.arguments.iter().enumerate().find_map(|(i, argument)| {
            let at = usize::from_ne_bytes(argument.as_slice().try_into().ok()?);
            let (kind, _, device) = memory.owner(at).filter(|_| memory.holds(at))?;
            let foreign = kind == Kind::Device && device != launch.device;
            let here = launch.device;
            foreign.then(|| {
                format!(
                    "argument {i} points to memory of device {device}, and it runs on device {here}"
                )
            })
        })
    }

    fn written(&mut self, at: usize, size: usize) {
        if self.memory().holds(at) {
            engine::mark(at, size, State::Written);
        }
    }

    /// Fails unless a device address range lies in one live allocation.
    fn check(&mut self, what: &str, at: usize, size: usize) -> CallResult {
        if size > 0
            && self.memory().holds(at)
            && let Some(fault) = self.memory().fault(at, size)
        {
            return Err(self.set_sticky(Code::ILLEGAL_ADDRESS, format!("{what} {fault}")));
        }
        Ok(())
    }

    /// Fails if the host reads back memory that was never written; only instrumented kernels track that.
    fn check_written(&mut self, from: usize, size: usize) -> CallResult {
        let Some(first) = engine::first_unwritten(from, size) else { return Ok(()) };
        let at = self.memory().describe(from + first);
        Err(self.set_sticky(
            Code::LAUNCH_FAILED,
            format!("a copy to the host reads {at}, which was never written"),
        ))
    }

    /// Records an event: a new marker at the end of a stream's work.
    pub fn record(&mut self, event: usize, stream: usize) -> CallResult {
        let id = self.stream_id(stream)?;
        let Stream { context, capture, .. } = self.streams[&id];
        let marker = Arc::new(Marker {
            stream: id,
            passed: AtomicBool::new(false),
            polls: AtomicU64::new(0),
            capture,
        });
        let slot = self.events.get_mut(&event).ok_or(Code::INVALID_HANDLE)?;
        if slot.context != context {
            return Err(Code::INVALID_HANDLE);
        }
        slot.last = Some(marker.clone());
        if capture.is_some() {
            return Ok(()); // an edge of the graph; captured work keeps its order in any case
        }
        slot.at = None;
        self.push(stream, Work::Record(marker, event))
    }

    /// Makes the stream's later work wait for the event's last record.
    pub fn stream_waits(&mut self, stream: usize, event: usize) -> CallResult {
        let id = self.stream_id(stream)?;
        let event = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        let Some(marker) = event.last.clone() else { return Ok(()) };
        let waiting = self.streams[&id].capture;
        match (marker.capture.filter(|c| self.captures.contains_key(c)), waiting) {
            (None, None) => self.push(stream, Work::Wait(marker)),
            // Work from before the capture cannot be a node of the graph.
            (None, Some(_)) => Err(Code::CAPTURE_ISOLATION),
            (Some(capture), None) => {
                self.streams.get_mut(&id).expect("looked up above").capture = Some(capture);
                let capture = self.captures.get_mut(&capture).expect("filtered above");
                capture.joined.insert(id, true);
                Ok(())
            }
            (Some(a), Some(b)) if a == b => {
                let capture = self.captures.get_mut(&a).expect("filtered above");
                if id == capture.origin {
                    capture.joined.insert(marker.stream, true);
                }
                Ok(())
            }
            (Some(_), Some(_)) => Err(Code::CAPTURE_MERGE),
        }
    }
}

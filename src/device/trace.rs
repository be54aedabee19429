//! Timelines for `train --trace`: phases and operations by the host's clock, kernels by the GPU's clock.
//!
//! Each thread traces its own spans. A span costs one flag check when tracing is off.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::time::Instant;

use super::cuda::Marks;
use super::{Device, DeviceKind};

/// A named interval of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The phase, operation or kernel.
    pub name: Cow<'static, str>,
    /// The row it is drawn in.
    pub row: Row,
    /// Start, in seconds since tracing began.
    pub begin: f64,
    /// End, in seconds since tracing began.
    pub end: f64,
}

/// The row of the timeline that a span is drawn in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Phases of a step.
    Phases,
    /// Operations of the tape: the time in which the host computes them or, for a GPU, queues them.
    Operations,
    /// Kernels of a GPU.
    Kernels,
}

struct Trace {
    start: Instant,
    /// End of the last operation, or start of the current phase.
    mark: Instant,
    spans: Vec<Span>,
    marks: Option<Marks>,
}

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static TRACE: RefCell<Option<Trace>> = const { RefCell::new(None) };
}

fn with<R>(f: impl FnOnce(&mut Trace) -> R) -> Option<R> {
    if !ON.get() {
        return None;
    }
    TRACE.with_borrow_mut(|trace| trace.as_mut().map(f))
}

/// Starts tracing this thread's spans and the kernels that it launches.
pub(crate) fn begin(device: &Device) {
    let marks = (device.kind() == DeviceKind::Cuda).then(|| Marks::new(device));
    let start = Instant::now();
    TRACE.set(Some(Trace { start, mark: start, spans: Vec::new(), marks }));
    ON.set(true);
}

/// Stops tracing and returns the spans. Waits for the GPU whose kernels were traced.
pub(crate) fn end() -> Vec<Span> {
    ON.set(false);
    let Some(mut trace) = TRACE.take() else { return Vec::new() };
    let kernels = trace.marks.take().map(Marks::spans).unwrap_or_default();
    let span =
        |(name, begin, end)| Span { name: Cow::Borrowed(name), row: Row::Kernels, begin, end };
    trace.spans.extend(kernels.into_iter().map(span));
    trace.spans
}

/// Runs `f` and traces it as a span of `row`.
pub(crate) fn span<R>(
    row: Row,
    name: impl FnOnce() -> Cow<'static, str>,
    f: impl FnOnce() -> R,
) -> R {
    let begin = Instant::now();
    with(|trace| trace.mark = begin);
    let result = f();
    with(|trace| {
        let end = Instant::now();
        let [from, to] = [begin, end].map(|at| (at - trace.start).as_secs_f64());
        trace.spans.push(Span { name: name(), row, begin: from, end: to });
        trace.mark = end;
    });
    result
}

/// Runs `f` and traces it as a phase of a step.
pub(crate) fn phase<R>(name: &'static str, f: impl FnOnce() -> R) -> R {
    span(Row::Phases, || Cow::Borrowed(name), f)
}

/// Traces an operation that started when the previous one ended and ends now.
pub(crate) fn operation(name: &'static str) {
    with(|trace| {
        let end = Instant::now();
        let [begin, to] = [trace.mark, end].map(|at| (at - trace.start).as_secs_f64());
        trace.spans.push(Span { name: name.into(), row: Row::Operations, begin, end: to });
        trace.mark = end;
    });
}

/// Runs `launch`, which launches a kernel, between two events in the GPU's stream.
pub(super) fn kernel<R>(name: &'static str, launch: impl FnOnce() -> R) -> R {
    let first = with(|trace| trace.marks.as_mut().map(Marks::mark)).flatten();
    let result = launch();
    if first.is_some() {
        with(|trace| trace.marks.as_mut().map(|marks| marks.end(name)));
    }
    result
}

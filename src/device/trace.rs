//! What ran when, as `train --trace` writes it: phases and operations by the host's clock, kernels by a GPU's.
//!
//! One thread records its own spans. Where nothing is recorded, a span costs a look at a flag.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::time::Instant;

use super::cuda::Marks;
use super::{Device, DeviceKind};

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// A phase, an operation or a kernel.
    pub name: Cow<'static, str>,
    /// Whose it is.
    pub row: Row,
    /// When it began, in seconds from the beginning of the recording.
    pub begin: f64,
    /// When it ended.
    pub end: f64,
}

/// Where a span is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Parts of a step.
    Phases,
    /// Operations of the tape: the time in which the host computes them, or on a GPU asks for them.
    Operations,
    /// A GPU's kernels.
    Kernels,
}

struct Recording {
    start: Instant,
    /// The end of the last operation, or the beginning of the phase that it is in.
    mark: Instant,
    spans: Vec<Span>,
    marks: Option<Marks>,
}

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

fn with<R>(f: impl FnOnce(&mut Recording) -> R) -> Option<R> {
    if !ON.get() {
        return None;
    }
    RECORDING.with_borrow_mut(|recording| recording.as_mut().map(f))
}

/// Records what this thread does from here on, and the kernels that it launches.
pub(crate) fn begin(device: &Device) {
    let marks = (device.kind() == DeviceKind::Cuda).then(|| Marks::new(device));
    let start = Instant::now();
    let recording = Recording { start, mark: start, spans: Vec::new(), marks };
    RECORDING.set(Some(recording));
    ON.set(true);
}

/// Ends the recording, and waits for a GPU whose kernels are in it.
pub(crate) fn end() -> Vec<Span> {
    ON.set(false);
    let Some(mut recording) = RECORDING.take() else { return Vec::new() };
    let kernels = recording.marks.take().map(Marks::spans).unwrap_or_default();
    let span =
        |(name, begin, end)| Span { name: Cow::Borrowed(name), row: Row::Kernels, begin, end };
    recording.spans.extend(kernels.into_iter().map(span));
    recording.spans
}

/// Does something as a span of a row.
pub(crate) fn span<R>(
    row: Row,
    name: impl FnOnce() -> Cow<'static, str>,
    f: impl FnOnce() -> R,
) -> R {
    let begin = Instant::now();
    with(|recording| recording.mark = begin);
    let done = f();
    with(|recording| {
        let end = Instant::now();
        let [from, to] = [begin, end].map(|at| (at - recording.start).as_secs_f64());
        recording.spans.push(Span { name: name(), row, begin: from, end: to });
        recording.mark = end;
    });
    done
}

/// A phase of a step.
pub(crate) fn phase<R>(name: &'static str, f: impl FnOnce() -> R) -> R {
    span(Row::Phases, || Cow::Borrowed(name), f)
}

/// An operation that began when the one before it ended, and has ended now.
pub(crate) fn operation(name: &'static str) {
    with(|recording| {
        let end = Instant::now();
        let [begin, to] = [recording.mark, end].map(|at| (at - recording.start).as_secs_f64());
        recording.spans.push(Span { name: name.into(), row: Row::Operations, begin, end: to });
        recording.mark = end;
    });
}

/// A launch of a kernel, between two marks in the GPU's stream.
pub(super) fn kernel<R>(name: &'static str, launch: impl FnOnce() -> R) -> R {
    let first = with(|recording| recording.marks.as_mut().map(Marks::mark)).flatten();
    let done = launch();
    if first.is_some() {
        with(|recording| recording.marks.as_mut().map(|marks| marks.end(name)));
    }
    done
}

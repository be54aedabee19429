//! Kernel times, from events before and after each kernel.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent};

use crate::device::Device;

/// Events in a GPU's stream, in order; times count from the first.
pub(crate) struct Marks {
    device: Device,
    events: Vec<CUevent>,
    /// Kernel names, and the index of the event before each.
    kernels: Vec<(&'static str, usize)>,
}

impl Marks {
    pub(crate) fn new(device: &Device) -> Self {
        let mut marks = Self { device: device.clone(), events: Vec::new(), kernels: Vec::new() };
        // Work queued earlier must not be measured.
        device.wait();
        marks.mark();
        marks
    }

    /// Adds an event.
    pub(crate) fn mark(&mut self) {
        let gpu = self.device.gpu();
        let event = gpu.attempt(
            || "marking a time".into(),
            |gpu| {
                let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
                // SAFETY: event and stream belong to this context and live as long as it.
                unsafe { result::event::record(event, gpu.stream()) }?;
                Ok(event)
            },
        );
        self.events.extend(event);
    }

    /// Adds the event after a kernel; the last event added is the one before it.
    pub(crate) fn end(&mut self, kernel: &'static str) {
        self.kernels.push((kernel, self.events.len().saturating_sub(1)));
        self.mark();
    }

    /// Kernels with start and end in seconds. Waits for them.
    pub(crate) fn spans(self) -> Vec<(&'static str, f64, f64)> {
        self.device.wait();
        let at = |event: usize| {
            let (first, event) = (*self.events.first()?, *self.events.get(event)?);
            let elapsed = self.device.gpu().attempt(
                || "reading a time".into(),
                // SAFETY: both events were recorded and waited for.
                |_| unsafe { result::event::elapsed(first, event) },
            );
            elapsed.map(|milliseconds| f64::from(milliseconds) / 1e3)
        };
        let span =
            |&(name, first): &(&'static str, usize)| Some((name, at(first)?, at(first + 1)?));
        self.kernels.iter().filter_map(span).collect()
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        for &event in &self.events {
            // SAFETY: created by `mark`, and no longer recorded.
            let destroy = |_: &_| unsafe { result::event::destroy(event) };
            self.device.gpu().attempt(|| "destroying events".into(), destroy);
        }
    }
}

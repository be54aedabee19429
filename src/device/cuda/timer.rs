//! GPU time between two points of the stream.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent};

use crate::device::Device;

/// A pair of events that times work on a GPU.
pub(crate) struct Timer {
    device: Device,
    events: Option<[CUevent; 2]>,
}

impl Timer {
    pub(crate) fn new(device: &Device) -> Self {
        let create = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let events =
            device.gpu().attempt(|| "creating events".into(), |_| Ok([create()?, create()?]));
        Self { device: device.clone(), events }
    }

    /// Seconds that the GPU takes for the work that `f` queues; `None` after a failure. Waits for the work.
    pub(crate) fn time(&self, f: impl FnOnce()) -> Option<f64> {
        let [start, end] = self.events?;
        let gpu = self.device.gpu();
        let record = |event| {
            gpu.attempt(
                || "recording an event".into(),
                // SAFETY: event and stream belong to this context and live as long as it.
                |gpu| unsafe { result::event::record(event, gpu.stream()) },
            )
        };
        record(start)?;
        f();
        record(end)?;
        gpu.wait();
        let elapsed = gpu.attempt(
            || "reading a time".into(),
            // SAFETY: both events were recorded and waited for.
            |_| unsafe { result::event::elapsed(start, end) },
        );
        elapsed.map(|milliseconds| f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        for event in self.events.iter().flatten() {
            // SAFETY: created by `new`, and no longer recorded.
            let destroy = |_: &_| unsafe { result::event::destroy(*event) };
            self.device.gpu().attempt(|| "destroying events".into(), destroy);
        }
    }
}

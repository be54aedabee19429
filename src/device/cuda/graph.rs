//! Work recorded once and queued again as a whole.
//!
//! A graph repeats launches with the addresses that they had when they were recorded. So it owns the memory that its work
//! used ([`Pool`](crate::device::memory::Pool) keeps that apart), and numbers that change must be read from the device.

use cudarc::driver::sys::CUgraphExec;

use crate::device::Device;
use crate::error::Result;

/// Recorded work of a device.
#[derive(Debug)]
pub(crate) struct Graph {
    device: Device,
    executable: CUgraphExec,
    /// The pool's name for the memory that it owns.
    memory: u64,
}

// SAFETY: a graph belongs to its context, not to a thread.
unsafe impl Send for Graph {}

/// Recording under way; ends with it, also when the work panics.
struct Recording<'a> {
    device: &'a Device,
    memory: u64,
    executable: Option<CUgraphExec>,
    kept: bool,
}

impl Graph {
    /// Records what `work` queues on the device, which does not happen yet. What `work` gives may hold tensors: each replay
    /// writes them anew, as long as the graph lives.
    ///
    /// # Errors
    /// Those of `work`, and when the device fails or what was queued cannot be repeated.
    pub(crate) fn record<R>(
        device: &Device,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<(Self, R)> {
        device.gpu().begin_recording();
        let memory = device.pool().begin_recording();
        let mut recording = Recording { device, memory, executable: None, kept: false };
        let result = work()?;
        recording.executable = device.gpu().end_recording();
        device.check()?;
        recording.kept = true;
        let executable = recording.executable.expect("a device without a failure has recorded");
        Ok((Self { device: device.clone(), executable, memory }, result))
    }

    /// Queues the work again.
    pub(crate) fn replay(&self) {
        self.device.gpu().replay(self.executable);
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        self.device.pool().end_recording();
        if self.kept {
            return;
        }
        let executable = self.executable.or_else(|| self.device.gpu().end_recording());
        if let Some(executable) = executable {
            self.device.gpu().forget(executable);
        }
        self.device.pool().release_recorded(self.memory);
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver keeps what is queued until it has run, and memory is given to others behind it.
        self.device.gpu().forget(self.executable);
        self.device.pool().release_recorded(self.memory);
    }
}

//! CUDA graphs: work captured once and replayed as a whole.
//!
//! A graph replays launches with the addresses that they had during the capture. It therefore owns the memory that its work
//! used ([`Pool`](crate::device::pool::Pool) sets that memory aside), and numbers that change must be read from the device.

use cudarc::driver::sys::CUgraphExec;

use crate::device::Device;
use crate::error::Result;

/// Captured work of a device.
#[derive(Debug)]
pub(crate) struct Graph {
    device: Device,
    executable: CUgraphExec,
    /// The pool's id of the memory that it owns.
    memory: u64,
}

// SAFETY: a graph belongs to its context, not to a thread.
unsafe impl Send for Graph {}

/// A capture in progress. Dropping it ends the capture, even if the work panics.
struct Capture<'a> {
    device: &'a Device,
    memory: u64,
    executable: Option<CUgraphExec>,
    kept: bool,
}

impl Graph {
    /// Captures the work that `work` queues on the device, without running it. The result of `work` may hold tensors: each
    /// replay writes them again, as long as the graph lives.
    ///
    /// If the device has too little memory for a capture, which may not return the free list to the driver, returns a sentence that
    /// says so in place of a graph: `work` has run to its end, none of what it queued ever runs, and it may be run again outside of a
    /// capture.
    ///
    /// # Errors
    /// If `work` fails, the device fails, or the queued work cannot be captured.
    pub(crate) fn capture<R>(
        device: &Device,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<Result<(Self, R), String>> {
        device.gpu().begin_capture();
        let memory = device.pool().begin_capture();
        let mut capture = Capture { device, memory, executable: None, kept: false };
        let result = work()?;
        capture.executable = device.gpu().end_capture();
        device.check()?;
        let Some(executable) = capture.executable else {
            // Its tensors go before the GPU works again: some have no memory.
            drop(result);
            let reason = device.gpu().resume();
            return Ok(Err(reason.expect("a device without a failure has captured or given up")));
        };
        capture.kept = true;
        Ok(Ok((Self { device: device.clone(), executable, memory }, result)))
    }

    /// Queues the captured work.
    pub(crate) fn replay(&self) {
        self.device.gpu().replay(self.executable);
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.device.pool().end_capture();
        if self.kept {
            return;
        }
        let executable = self.executable.or_else(|| self.device.gpu().end_capture());
        if let Some(executable) = executable {
            self.device.gpu().destroy(executable);
        }
        self.device.pool().release_captured(self.memory);
        self.device.gpu().resume(); // if `work` failed after the capture was given up
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver keeps queued work until it has run, and the memory's next user is queued behind it.
        self.device.gpu().destroy(self.executable);
        self.device.pool().release_captured(self.memory);
    }
}

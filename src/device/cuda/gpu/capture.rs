//! Capturing queued work as a graph, and replaying it.

use std::sync::atomic::Ordering;

use cudarc::driver::result;
use cudarc::driver::sys::{CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::Gpu;

impl Gpu {
    /// Starts capturing queued work.
    pub(in crate::device::cuda) fn begin_capture(&self) {
        self.attempt(
            || "starting to capture a step".into(),
            |gpu| {
                gpu.send_numbers()?;
                // Relaxed: the pool may have to allocate memory meanwhile.
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
                // SAFETY: the stream lives as long as `self` and is not the default stream.
                unsafe { result::stream::begin_capture(gpu.compute, mode)? };
                gpu.capturing.store(true, Ordering::Release);
                Ok(())
            },
        );
    }

    /// Ends a capture and returns its graph; `None` if no capture is in progress, it is given up, or the GPU has failed.
    pub(in crate::device::cuda) fn end_capture(&self) -> Option<CUgraphExec> {
        if !self.capturing.swap(false, Ordering::AcqRel) {
            return None;
        }
        let mut executable = None;
        // Even after a failure: a capturing stream runs nothing.
        self.finish(|| {
            // SAFETY: the stream is capturing; the graph is not used after it is destroyed.
            unsafe {
                let graph = result::stream::end_capture(self.compute);
                executable = self.attempt(
                    || "instantiating the graph of a step".into(),
                    |_| result::graph::instantiate(graph?, CUgraphInstantiate_flags(0)),
                );
                if let Ok(graph) = graph {
                    let _ = result::graph::destroy(graph);
                }
            }
        });
        executable
    }

    /// Queues a graph.
    pub(in crate::device::cuda) fn replay(&self, executable: CUgraphExec) {
        self.attempt(
            || "replay of a step".into(),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the graph belongs to this context and is alive.
                unsafe { result::graph::launch(executable, gpu.compute) }
            },
        );
    }

    /// Destroys a graph; replays that are already queued still run.
    pub(in crate::device::cuda) fn destroy(&self, executable: CUgraphExec) {
        self.finish(|| {
            // SAFETY: the caller owned the graph and gives it up. An error is ignored: nothing depends on the graph.
            let _ = unsafe { result::graph::exec_destroy(executable) };
        });
    }

    /// Fails the GPU if a step is being captured.
    pub(in crate::device::cuda) fn expect_no_capture(&self, what: &str) {
        if self.capturing.load(Ordering::Acquire) {
            self.refuse(what);
        }
    }

    pub(super) fn refuse(&self, what: &str) {
        self.fail(format!(
            "GPU {}: a captured step {what}, which a replay would not repeat: set such numbers before the step",
            self.ordinal
        ));
    }
}

//! The first failure of a GPU, and what it ignores from then on.

use std::sync::atomic::Ordering;

use cudarc::driver::result::{self, DriverError};

use super::{Gpu, lock};
use crate::device::cuda::driver::words;
use crate::error::{Error, Result};

impl Gpu {
    /// Reports the first failure.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.ignores.load(Ordering::Acquire) {
            return Ok(());
        }
        lock(&self.failure).clone().map_or(Ok(()), |reason| Err(Error::Device(reason)))
    }

    /// Records a failure if it is the first. From now on the GPU ignores all work.
    pub(crate) fn fail(&self, reason: String) {
        lock(&self.failure).get_or_insert(reason);
        self.ignores.store(true, Ordering::Release);
    }

    /// Gives up the capture in progress, for a reason that is no failure: the GPU ignores work until the capture ends, and then
    /// goes on as if it had never begun. The host's part of the step runs to its end meanwhile, so that nothing is left half-way.
    pub(crate) fn give_up_capture(&self, reason: String) {
        lock(&self.given_up).get_or_insert(reason);
        self.ignores.store(true, Ordering::Release);
    }

    /// Ends a capture that was given up; returns the reason, or `None` if it was not.
    pub(in crate::device::cuda) fn resume(&self) -> Option<String> {
        let reason = lock(&self.given_up).take()?;
        let failed = lock(&self.failure).is_some();
        self.ignores.store(failed, Ordering::Release);
        Some(reason)
    }

    /// Runs driver calls with the context current, or does nothing after a failure and in a capture that is given up.
    pub(in crate::device::cuda) fn attempt<T>(
        &self,
        what: impl FnOnce() -> String,
        f: impl FnOnce(&Self) -> Result<T, DriverError>,
    ) -> Option<T> {
        if self.ignores.load(Ordering::Acquire) || self.imagined.is_some() {
            return None;
        }
        self.run(what, f)
    }

    /// As [`Gpu::attempt`], for a thread beside the one that queues the steps: it goes on while a capture of theirs is given up, because
    /// what it does is no part of that capture and would be missing afterwards.
    pub(in crate::device::cuda) fn attempt_beside<T>(
        &self,
        what: impl FnOnce() -> String,
        f: impl FnOnce(&Self) -> Result<T, DriverError>,
    ) -> Option<T> {
        if lock(&self.failure).is_some() || self.imagined.is_some() {
            return None;
        }
        self.run(what, f)
    }

    fn run<T>(
        &self,
        what: impl FnOnce() -> String,
        f: impl FnOnce(&Self) -> Result<T, DriverError>,
    ) -> Option<T> {
        // SAFETY: the context lives as long as `self`.
        let done = unsafe { result::ctx::set_current(self.context) }.and_then(|()| f(self));
        match done {
            Ok(value) => Some(value),
            Err(e) => {
                let hint = if self.synchronous {
                    ""
                } else {
                    " (earlier work may have caused this error; SELFSUP_SYNC=1 names the kernel)"
                };
                let (gpu, name, what) = (self.ordinal, &self.name, what());
                self.fail(format!("GPU {gpu} ({name}): {what}: {}{hint}", words(e)));
                None
            }
        }
    }

    /// Releases resources with the context current, even after a failure.
    pub(in crate::device::cuda) fn finish(&self, f: impl FnOnce()) {
        if self.imagined.is_some() {
            return;
        }
        // SAFETY: the context lives as long as `self`. An error is ignored: `f` only releases.
        let _ = unsafe { result::ctx::set_current(self.context) };
        f();
    }
}

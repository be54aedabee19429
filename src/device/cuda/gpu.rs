//! One GPU: its context, its stream, its kernels, and the first thing that went wrong.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUgraphExec,
    CUgraphInstantiate_flags, CUstream, CUstreamCaptureMode,
};

use super::Precision;
use super::driver::{self, words};
use super::kernels::{self, Loaded};
use super::numbers::Region;
use super::staging::{PIECE, Staging};
use crate::error::{Error, Result};

/// A GPU in use. What it is asked to do happens in the order of the asking, some time later.
pub(crate) struct Gpu {
    ordinal: usize,
    name: String,
    precision: Precision,
    multiprocessors: usize,
    device: CUdevice,
    context: CUcontext,
    compute: CUstream,
    kernels: Loaded,
    staging: Mutex<Staging>,
    numbers: Mutex<Region>,
    /// Numbers have been set that are not on their way yet.
    unsent: AtomicBool,
    /// What is queued goes into a graph.
    recording: AtomicBool,
    /// `SELFSUP_SYNC=1`: wait after each launch, to know which kernel failed.
    synchronous: bool,
    failed: AtomicBool,
    failure: Mutex<Option<String>>,
}

// SAFETY: contexts, streams and functions may be used from any thread that makes the context current, as `attempt` does.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks what it needs to.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GPU {} ({}), {:?}", self.ordinal, self.name, self.precision)
    }
}

impl Gpu {
    /// Takes a GPU by its number.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or no kernels for it, with what to do about it.
    pub(crate) fn new(ordinal: usize, precision: Precision) -> Result<Self> {
        driver::start()?;
        let failed = |what: &str| {
            let what = format!("GPU {ordinal}: {what}");
            move |e: DriverError| Error::Device(format!("{what}: {}", words(e)))
        };
        let count = result::device::get_count().map_err(failed("counting devices"))?;
        if ordinal >= count as usize {
            let there =
                if count == 1 { "only GPU 0".into() } else { format!("GPUs 0 to {}", count - 1) };
            return Err(Error::Device(format!(
                "there is no GPU {ordinal}: the driver knows {there}"
            )));
        }
        let device = result::device::get(ordinal as i32).map_err(failed("opening it"))?;
        let name = result::device::get_name(device).map_err(failed("asking for its name"))?;
        let ask = |what| attribute(device, what).map_err(failed("asking what it can do"));
        let capability = (
            ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            let (major, minor) = capability;
            return Err(Error::Device(format!(
                "GPU {ordinal} ({name}) has compute capability {major}.{minor}: the kernels need 8.0 (Ampere) or newer"
            )));
        }
        let multiprocessors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: the device exists; `Drop` releases what is retained here.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(failed("making its context"))?;
        let release = |error| {
            // SAFETY: retained just above.
            let _ = unsafe { result::primary_ctx::release(device) };
            error
        };
        let start = || {
            // SAFETY: the context is alive.
            unsafe { result::ctx::set_current(context) }.map_err(failed("using its context"))?;
            // Not the default stream: that one waits for all others, and cannot be captured.
            let compute = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(failed("making a stream"))?;
            Ok((compute, kernels::load(capability)?))
        };
        let (compute, kernels) = start().map_err(release)?;
        Ok(Self {
            ordinal,
            name,
            precision,
            multiprocessors: multiprocessors.max(1) as usize,
            device,
            context,
            compute,
            kernels,
            staging: Mutex::default(),
            numbers: Mutex::default(),
            unsent: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            synchronous: std::env::var_os("SELFSUP_SYNC").is_some_and(|v| v == "1"),
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
        })
    }

    /// What its maker calls it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub(super) fn function(&self, index: usize) -> Option<CUfunction> {
        self.kernels.functions[index]
    }

    pub(super) fn stream(&self) -> CUstream {
        self.compute
    }

    /// The first thing that went wrong.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::Device(lock(&self.failure).clone().unwrap_or_default()))
    }

    /// Keeps what went wrong, if it is the first thing; from now on the GPU does nothing.
    pub(crate) fn fail(&self, reason: String) {
        lock(&self.failure).get_or_insert(reason);
        self.failed.store(true, Ordering::Release);
    }

    /// Does something to the driver with the context current, or nothing if something has failed before.
    pub(super) fn attempt<T>(
        &self,
        what: impl FnOnce() -> String,
        f: impl FnOnce(&Self) -> Result<T, DriverError>,
    ) -> Option<T> {
        if self.failed.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: the context lives as long as `self`.
        let done = unsafe { result::ctx::set_current(self.context) }.and_then(|()| f(self));
        match done {
            Ok(value) => Some(value),
            Err(e) => {
                let hint = if self.synchronous {
                    ""
                } else {
                    " (an error of earlier work may come out here; SELFSUP_SYNC=1 names the kernel)"
                };
                let (gpu, name, what) = (self.ordinal, &self.name, what());
                self.fail(format!("GPU {gpu} ({name}): {what}: {}{hint}", words(e)));
                None
            }
        }
    }

    /// Whether it waits after each launch, so that nothing can be recorded.
    pub(crate) fn is_synchronous(&self) -> bool {
        self.synchronous
    }

    /// Waits for a launch if that was asked for.
    pub(super) fn settle(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as `self`.
        if self.synchronous { unsafe { result::stream::synchronize(self.compute) } } else { Ok(()) }
    }

    /// Waits for all that was asked for.
    pub(crate) fn wait(&self) {
        // SAFETY: the stream lives as long as `self`.
        self.attempt(
            || "waiting for queued work".into(),
            |gpu| unsafe { result::stream::synchronize(gpu.compute) },
        );
    }

    /// Device memory from the driver; `None` when it has none left, in which case the caller decides what to say.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        self.attempt(
            || format!("allocation of {bytes} bytes"),
            // SAFETY: `free` gives it back.
            |_| match unsafe { result::malloc_sync(bytes) } {
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
                other => other.map(Some),
            },
        )
        .flatten()
    }

    /// Gives memory back to the driver.
    ///
    /// # Safety
    /// It came from `allocate`, and no queued work uses it.
    pub(crate) unsafe fn free(&self, address: u64) {
        // SAFETY: as this function's.
        self.attempt(|| "freeing memory".into(), |_| unsafe { result::free_sync(address) });
    }

    /// Bytes that are free and bytes that there are.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.attempt(|| "asking for free memory".into(), |_| result::mem_get_info())
            .unwrap_or_default()
    }

    /// Sets bytes in the stream's order.
    ///
    /// # Safety
    /// There is room for that many at `to`.
    pub(crate) unsafe fn set(&self, to: u64, byte: u8, bytes: usize) {
        self.attempt(
            || "filling memory".into(),
            // SAFETY: as this function's.
            |gpu| unsafe { result::memset_d8_async(to, byte, bytes, gpu.compute) },
        );
    }

    /// Copies from the host in the stream's order. Not while work is recorded: it would be repeated with what is here now.
    ///
    /// # Safety
    /// There is room for that many bytes at `to`.
    pub(crate) unsafe fn upload(&self, to: u64, from: &[u8]) {
        if self.recording.load(Ordering::Acquire) {
            self.refuse("copies from the host");
        }
        self.attempt(
            || format!("copy of {} bytes to the GPU", from.len()),
            // SAFETY: as this function's.
            |gpu| unsafe { lock(&gpu.staging).upload(to, from, gpu.compute) },
        );
    }

    /// Copies to the host and waits for it. After a failure the bytes are all ones, which is NaN in every float type:
    /// nobody takes them for a result.
    ///
    /// # Safety
    /// There are that many bytes at `from`.
    pub(crate) unsafe fn download(&self, to: &mut [u8], from: u64) {
        let bytes = to.len();
        let done = self.attempt(
            || format!("copy of {bytes} bytes from the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: as this function's; the wait is for the copies into memory that is borrowed until then.
                unsafe {
                    for (i, piece) in to.chunks_mut(PIECE).enumerate() {
                        result::memcpy_dtoh_async(piece, from + (i * PIECE) as u64, gpu.compute)?;
                    }
                    result::stream::synchronize(gpu.compute)
                }
            },
        );
        if done.is_none() {
            to.fill(0xFF);
        }
    }

    /// Copies within the GPU in the stream's order.
    ///
    /// # Safety
    /// There are that many bytes at both, and they do not overlap.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.attempt(
            || format!("copy of {bytes} bytes on the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: as this function's.
                unsafe { result::memcpy_dtod_async(to, from, bytes, gpu.compute) }
            },
        );
    }

    /// Room for numbers that the host sets; `None` after a failure.
    pub(crate) fn take_numbers(&self, bytes: usize) -> Option<u64> {
        let place = lock(&self.numbers).take(bytes, |size| self.allocate(size));
        if place.is_none() {
            self.fail(format!("GPU {}: out of memory: {bytes} bytes for numbers", self.ordinal));
        }
        place
    }

    /// Takes back what `take_numbers` gave.
    pub(crate) fn give_back_numbers(&self, place: u64, bytes: usize) {
        if place != 0 {
            lock(&self.numbers).give_back(place, bytes);
        }
    }

    /// Sets numbers for all that is queued from now on.
    pub(crate) fn set_numbers(&self, place: u64, bytes: &[u8]) {
        if self.failed.load(Ordering::Acquire) {
            return; // there may be no such place
        }
        if self.recording.load(Ordering::Acquire) {
            return self.refuse("sets numbers");
        }
        lock(&self.numbers).set(place, bytes);
        self.unsent.store(true, Ordering::Release);
    }

    /// Sends numbers that have been set, ahead of what is queued next.
    pub(super) fn send_numbers(&self) -> Result<(), DriverError> {
        if !self.unsent.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut staging = lock(&self.staging);
        lock(&self.numbers).send(|to, bytes| {
            // SAFETY: the region has these bytes there, and whoever calls this has made the context current.
            unsafe { staging.upload(to, bytes, self.compute) }
        })
    }

    /// Ends a turn of copies from the host, and provides for so many turns like it at once.
    pub(crate) fn end_turn(&self, provide: Option<usize>) {
        self.attempt(
            || "pinning memory to copy through".into(),
            |gpu| lock(&gpu.staging).end_turn(provide),
        );
    }

    fn refuse(&self, what: &str) {
        self.fail(format!(
            "GPU {}: a step that is recorded {what}, which a replay would not: such numbers are set before the step",
            self.ordinal
        ));
    }

    /// From now on what is queued is recorded.
    pub(super) fn begin_recording(&self) {
        self.attempt(
            || "beginning to record a step".into(),
            |gpu| {
                gpu.send_numbers()?;
                // Relaxed: memory that the pool has not got yet may be allocated meanwhile.
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
                // SAFETY: the stream lives as long as `self`, and is not the default one.
                unsafe { result::stream::begin_capture(gpu.compute, mode)? };
                gpu.recording.store(true, Ordering::Release);
                Ok(())
            },
        );
    }

    /// Ends recording; `None` if nothing was being recorded, or something has failed.
    pub(super) fn end_recording(&self) -> Option<CUgraphExec> {
        if !self.recording.swap(false, Ordering::AcqRel) {
            return None;
        }
        let mut executable = None;
        // After a failure, too: a stream that records does nothing else.
        self.finish(|| {
            // SAFETY: the stream has been recording; the graph is not used after it is destroyed.
            unsafe {
                let graph = result::stream::end_capture(self.compute);
                executable = self.attempt(
                    || "making a graph of a step".into(),
                    |_| result::graph::instantiate(graph?, CUgraphInstantiate_flags(0)),
                );
                if let Ok(graph) = graph {
                    let _ = result::graph::destroy(graph);
                }
            }
        });
        executable
    }

    /// Queues recorded work.
    pub(super) fn replay(&self, executable: CUgraphExec) {
        self.attempt(
            || "replay of a step".into(),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the graph is one of this context, and alive.
                unsafe { result::graph::launch(executable, gpu.compute) }
            },
        );
    }

    /// Destroys recorded work; what is queued of it still runs.
    pub(super) fn forget(&self, executable: CUgraphExec) {
        self.finish(|| {
            // SAFETY: nobody has the graph any more. An error has nobody left to tell.
            let _ = unsafe { result::graph::exec_destroy(executable) };
        });
    }

    /// Gives something back to the driver with the context current, also after a failure.
    pub(super) fn finish(&self, f: impl FnOnce()) {
        // SAFETY: the context lives as long as `self`. An error has nobody left to tell.
        let _ = unsafe { result::ctx::set_current(self.context) };
        f();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: nobody has the GPU any more, so nothing new is queued, and everything here was made by `new`. Errors
        // have nobody left to tell.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.compute);
            self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).free();
            for block in lock(&self.numbers).addresses() {
                let _ = result::free_sync(block);
            }
            for &module in &self.kernels.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.compute);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A property of a device.
pub(super) fn attribute(device: CUdevice, what: CUdevice_attribute) -> Result<i32, DriverError> {
    // SAFETY: the device came from the driver.
    unsafe { result::device::get_attribute(device, what) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

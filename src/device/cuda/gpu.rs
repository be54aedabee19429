//! One GPU: its context, stream, kernels, and first failure.

mod capture;
mod imagined;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUstream};

use super::driver::{self, words};
use super::kernels::{self, Loaded};
use super::ledger::Ledger;
use super::numbers::Region;
use super::staging::{PIECE, Staging};
use crate::device::Precision;
use crate::error::{Error, Result};
use imagined::Addresses;

/// An open GPU. Requests are queued and run later, in the order in which they were made.
pub(crate) struct Gpu {
    ordinal: usize,
    name: String,
    precision: Precision,
    multiprocessors: usize,
    device: CUdevice,
    context: CUcontext,
    compute: CUstream,
    kernels: Loaded,
    /// The dynamic shared memory that kernels have been allowed to have, by their index.
    allowed: Mutex<HashMap<usize, u32>>,
    staging: Mutex<Staging>,
    numbers: Mutex<Region>,
    /// Numbers have been set and not yet queued for copying.
    unsent: AtomicBool,
    /// Queued work goes into a graph.
    pub(super) capturing: AtomicBool,
    /// `SELFSUP_SYNC=1`: wait after each launch, to find out which kernel failed.
    synchronous: bool,
    /// It ignores all work: it has failed, or the capture in progress is given up.
    ignores: AtomicBool,
    failure: Mutex<Option<String>>,
    /// Why the capture in progress is given up.
    given_up: Mutex<Option<String>>,
    /// What launches move, if someone counts.
    pub(super) ledger: Mutex<Option<Ledger>>,
    /// For a GPU that does not exist ([`Gpu::imagined`]): no call reaches a driver.
    imagined: Option<Addresses>,
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
    /// Opens a GPU by its number.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or there are no kernels for it; the message says what to do.
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
                "there is no GPU {ordinal}: the driver reports {there}"
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
        // SAFETY: the device exists; `Drop` releases the context.
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
            // Not the default stream, which waits for all others and cannot be captured.
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
            allowed: Mutex::default(),
            staging: Mutex::default(),
            numbers: Mutex::default(),
            unsent: AtomicBool::new(false),
            capturing: AtomicBool::new(false),
            synchronous: std::env::var_os("SELFSUP_SYNC").is_some_and(|v| v == "1"),
            ignores: AtomicBool::new(false),
            failure: Mutex::default(),
            given_up: Mutex::default(),
            ledger: Mutex::default(),
            imagined: None,
        })
    }

    /// Its product name.
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

    /// Lets a kernel have so much dynamic shared memory, once.
    pub(super) fn allow_shared(
        &self,
        index: usize,
        function: CUfunction,
        bytes: u32,
    ) -> Result<(), DriverError> {
        let mut allowed = lock(&self.allowed);
        let before = allowed.entry(index).or_default();
        if *before < bytes {
            kernels::allow_shared(function, bytes)?;
            *before = bytes;
        }
        Ok(())
    }

    pub(super) fn stream(&self) -> CUstream {
        self.compute
    }

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
    pub(super) fn resume(&self) -> Option<String> {
        let reason = lock(&self.given_up).take()?;
        let failed = lock(&self.failure).is_some();
        self.ignores.store(failed, Ordering::Release);
        Some(reason)
    }

    /// Runs driver calls with the context current, or does nothing after a failure and in a capture that is given up.
    pub(super) fn attempt<T>(
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
    pub(super) fn attempt_beside<T>(
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

    /// Runs `f`, which may queue work of another library on the compute stream, with the context current. Does nothing after a
    /// failure.
    pub(crate) fn on_stream(&self, f: impl FnOnce(*mut std::ffi::c_void)) {
        self.attempt(
            || "using the compute stream".into(),
            |gpu| {
                f(gpu.compute.cast());
                Ok(())
            },
        );
    }

    /// What tells this GPU from every other.
    ///
    /// # Errors
    /// If the driver does not say.
    pub(crate) fn uuid(&self) -> Result<[u8; 16]> {
        let uuid = result::device::get_uuid(self.device).map_err(|e| {
            Error::Device(format!("GPU {}: asking for its identity: {}", self.ordinal, words(e)))
        })?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// Whether it waits after each launch, in which case nothing can be captured.
    pub(crate) fn is_synchronous(&self) -> bool {
        self.synchronous
    }

    /// Waits for a launch if `SELFSUP_SYNC=1`.
    pub(super) fn wait_if_synchronous(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as `self`.
        if self.synchronous { unsafe { result::stream::synchronize(self.compute) } } else { Ok(()) }
    }

    /// Waits for all queued work, even after a failure.
    pub(crate) fn wait_to_free(&self) {
        self.finish(|| {
            // SAFETY: the stream lives as long as `self`. An error is ignored: nothing runs after one.
            let _ = unsafe { result::stream::synchronize(self.compute) };
        });
    }

    /// Waits for all queued work.
    pub(crate) fn wait(&self) {
        // SAFETY: the stream lives as long as `self`.
        self.attempt(
            || "waiting for queued work".into(),
            |gpu| unsafe { result::stream::synchronize(gpu.compute) },
        );
    }

    /// Allocates device memory from the driver. Returns `None` if none is left; the caller reports it.
    pub(crate) fn allocate(&self, bytes: usize) -> Option<u64> {
        if let Some(addresses) = &self.imagined {
            return Some(addresses.take(bytes));
        }
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

    /// Returns memory to the driver.
    ///
    /// # Safety
    /// It came from `allocate`, and no queued work uses it.
    pub(crate) unsafe fn free(&self, address: u64) {
        if self.ignores.load(Ordering::Acquire) {
            // A program that goes on without this GPU's handle, or with another one, needs the memory.
            return self.finish(|| {
                // SAFETY: the caller vouches for it. An error is ignored: one was reported.
                let _ = unsafe { result::free_sync(address) };
            });
        }
        // SAFETY: the caller vouches for it.
        self.attempt(|| "freeing memory".into(), |_| unsafe { result::free_sync(address) });
    }

    /// Free bytes and total bytes.
    pub(crate) fn memory(&self) -> (usize, usize) {
        self.attempt(|| "querying free memory".into(), |_| result::mem_get_info())
            .unwrap_or_default()
    }

    /// Queues setting `bytes` bytes.
    ///
    /// # Safety
    /// There are that many bytes at `to`.
    pub(crate) unsafe fn set(&self, to: u64, byte: u8, bytes: usize) {
        self.note("memset", || [0, bytes as u64]);
        self.attempt(
            || "filling memory".into(),
            // SAFETY: the caller vouches for `to`.
            |gpu| unsafe { result::memset_d8_async(to, byte, bytes, gpu.compute) },
        );
    }

    /// Queues a copy from the host. Fails the GPU during a capture: every replay would copy the bytes of now.
    ///
    /// # Safety
    /// There are that many bytes at `to`.
    pub(crate) unsafe fn upload(&self, to: u64, from: &[u8]) {
        self.expect_no_capture("copies from the host");
        self.note("copy from the host", || [0, from.len() as u64]);
        self.attempt(
            || format!("copy of {} bytes to the GPU", from.len()),
            // SAFETY: the caller vouches for `to`; the context is current and owns the stream.
            |gpu| unsafe { lock(&gpu.staging).upload(to, from, gpu.compute) },
        );
    }

    /// Copies to the host and waits. After a failure all bits of the result are set, which is NaN in every float type, so
    /// that it cannot be taken for a result.
    ///
    /// # Safety
    /// There are that many bytes at `from`.
    pub(crate) unsafe fn download(&self, to: &mut [u8], from: u64) {
        let bytes = to.len();
        let done = self.attempt(
            || format!("copy of {bytes} bytes from the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the caller vouches for `from`; `to` stays borrowed until the copies have been waited for, also
                // after one that failed.
                unsafe {
                    let mut pieces = to.chunks_mut(PIECE).enumerate();
                    let queued = pieces.try_for_each(|(i, piece)| {
                        result::memcpy_dtoh_async(piece, from + (i * PIECE) as u64, gpu.compute)
                    });
                    queued.and(result::stream::synchronize(gpu.compute))
                }
            },
        );
        if done.is_none() {
            to.fill(0xFF);
        }
    }

    /// Queues a copy within the GPU.
    ///
    /// # Safety
    /// There are that many bytes at both addresses, and they do not overlap.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.note("copy", || [bytes as u64; 2]);
        self.attempt(
            || format!("copy of {bytes} bytes on the GPU"),
            |gpu| {
                gpu.send_numbers()?;
                // SAFETY: the caller vouches for both addresses.
                unsafe { result::memcpy_dtod_async(to, from, bytes, gpu.compute) }
            },
        );
    }

    /// Allocates memory for numbers that the host sets; `None` after a failure.
    pub(crate) fn take_numbers(&self, bytes: usize) -> Option<u64> {
        let address = lock(&self.numbers).take(bytes, |size| self.allocate(size));
        if address.is_none() {
            self.fail(format!("GPU {}: out of memory: {bytes} bytes for numbers", self.ordinal));
        }
        address
    }

    /// Frees memory from `take_numbers`.
    pub(crate) fn give_back_numbers(&self, address: u64, bytes: usize) {
        if address != 0 {
            lock(&self.numbers).give_back(address, bytes);
        }
    }

    /// Sets numbers for all work queued from now on.
    pub(crate) fn set_numbers(&self, address: u64, bytes: &[u8]) {
        if self.ignores.load(Ordering::Acquire) {
            return; // the address may be 0
        }
        if self.capturing.load(Ordering::Acquire) {
            return self.refuse("sets numbers");
        }
        lock(&self.numbers).set(address, bytes);
        self.unsent.store(true, Ordering::Release);
    }

    /// Queues copies of the numbers that have been set, ahead of the next work.
    pub(super) fn send_numbers(&self) -> Result<(), DriverError> {
        if !self.unsent.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut staging = lock(&self.staging);
        lock(&self.numbers).send(|to, bytes| {
            // SAFETY: the region owns these bytes, and the caller has made the context current.
            unsafe { staging.upload(to, bytes, self.compute) }
        })
    }

    /// Ends a step's copies from the host; see [`Staging::end_step`].
    pub(crate) fn end_step(&self, steps_in_flight: Option<usize>) {
        self.attempt(
            || "pinning staging memory".into(),
            |gpu| lock(&gpu.staging).end_step(steps_in_flight),
        );
    }

    /// Fails the GPU if a step is being captured.
    pub(super) fn expect_no_capture(&self, what: &str) {
        if self.capturing.load(Ordering::Acquire) {
            self.refuse(what);
        }
    }

    fn refuse(&self, what: &str) {
        self.fail(format!(
            "GPU {}: a captured step {what}, which a replay would not repeat: set such numbers before the step",
            self.ordinal
        ));
    }

    /// Releases resources with the context current, even after a failure.
    pub(super) fn finish(&self, f: impl FnOnce()) {
        if self.imagined.is_some() {
            return;
        }
        // SAFETY: the context lives as long as `self`. An error is ignored: `f` only releases.
        let _ = unsafe { result::ctx::set_current(self.context) };
        f();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.imagined.is_some() {
            return;
        }
        // SAFETY: this is the last handle, so nothing new is queued, and everything here was created by `new`. Errors are
        // ignored: nothing uses the GPU any more.
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks, so a poisoned lock still guards consistent data.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

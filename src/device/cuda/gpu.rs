//! One GPU: its context, stream and kernels.

mod capture;
mod failure;
mod imagined;
mod memory;

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUstream};

use super::driver::{self, words};
use super::kernels::{self, Loaded};
use super::ledger::Ledger;
use super::numbers::Region;
use super::staging::Staging;
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

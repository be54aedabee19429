//! Where memory lives and operations run.
//!
//! A [`Device`] is a handle on a pool of memory, a pool of threads and a kind. Three kinds exist: the CPU, which
//! computes in f32; an NVIDIA GPU, which computes in bf16 or f32; and the reference device, which computes the same
//! operations naively in f64 and is what everything else is compared with. Operations run in launch order on all.

pub(crate) mod cuda;
mod group;
mod memory;
mod philox;
mod threads;
mod trace;

use std::fmt;
use std::sync::Arc;

use cuda::Gpu;
pub use cuda::{Counts, Mix, Precision, Resources};
pub use group::Group;
pub(crate) use memory::Memory;
pub use memory::MemoryUse;
pub use philox::{Philox, Purpose, philox4x32};
pub(crate) use trace::{
    Row, Span, begin as begin_trace, end as end_trace, operation as trace_operation,
    phase as trace_phase, span as trace_span,
};

use crate::error::{Error, Result};
use memory::Pool;
use threads::Threads;

/// What a device is, which decides the code an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// f32 on the processor's cores.
    Cpu,
    /// bf16 or f32 on an NVIDIA GPU.
    Cuda,
    /// Naive f64, the truth for tests: never fast, never approximate.
    Reference,
}

/// A handle on a device; clones share its memory and threads.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: DeviceKind,
    pool: Pool,
    threads: Option<Threads>,
    /// Where a GPU's host prepares and finishes what the GPU computes.
    host: Option<Device>,
}

impl Device {
    /// The processor, with `threads` compute threads, the calling one among them; 0 takes one per core.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn cpu(threads: usize) -> Result<Self> {
        Self::build(DeviceKind::Cpu, threads, false)
    }

    /// The f64 reference device.
    pub fn reference() -> Self {
        Self::reference_with(false)
    }

    /// The NVIDIA GPU with this number, counted from 0.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or no kernels in this build, with what to do about it.
    pub fn cuda(ordinal: usize, precision: Precision) -> Result<Self> {
        Ok(Self::gpu_with_host(Gpu::new(ordinal, precision)?, Self::cpu(0)?, false))
    }

    /// This kind of device anew, with memory that is filled with NaN before each use: an operation that leaves a
    /// part of its output unwritten, or reads what nobody wrote, then shows. For tests.
    ///
    /// # Panics
    /// When a GPU that was there is not there any more.
    pub fn poisoned(&self) -> Self {
        match (self.kind(), self.0.pool.gpu()) {
            (DeviceKind::Cpu, _) => Self::build(DeviceKind::Cpu, self.threads(), true)
                .expect("as many threads as before"),
            (_, None) => Self::reference_with(true),
            (_, Some(gpu)) => {
                let again = Gpu::new(gpu.ordinal(), gpu.precision()).expect("it was there before");
                Self::gpu_with_host(again, self.host().poisoned(), true)
            }
        }
    }

    fn reference_with(poison: bool) -> Self {
        let pool = Pool::new(poison, None);
        Self(Arc::new(Inner { kind: DeviceKind::Reference, pool, threads: None, host: None }))
    }

    fn gpu_with_host(gpu: Gpu, host: Device, poison: bool) -> Self {
        let pool = Pool::new(poison, Some(Arc::new(gpu)));
        Self(Arc::new(Inner { kind: DeviceKind::Cuda, pool, threads: None, host: Some(host) }))
    }

    fn build(kind: DeviceKind, threads: usize, poison: bool) -> Result<Self> {
        let threads = Threads::new(threads)
            .map_err(|e| Error::Device(format!("cannot start {threads} compute threads: {e}")))?;
        let pool = Pool::new(poison, None);
        Ok(Self(Arc::new(Inner { kind, pool, threads: Some(threads), host: None })))
    }

    /// What this device is.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// Where the host prepares what this device will compute with: for a GPU a CPU device of its own, else itself.
    pub fn host(&self) -> &Device {
        self.0.host.as_ref().unwrap_or(self)
    }

    /// Number of compute threads on the host.
    pub fn threads(&self) -> usize {
        self.host().0.threads.as_ref().map_or(1, Threads::count)
    }

    /// Runs `f` where rayon's parallel iterators use this device's threads on the host.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.host().0.threads {
            Some(threads) => threads.run(f),
            None => f(),
        }
    }

    /// How much memory the device's pool has handed out, and how often it had to ask the system.
    pub fn memory_use(&self) -> MemoryUse {
        self.0.pool.usage()
    }

    /// The first thing that went wrong on a GPU, where operations are queued and do not say so themselves; after it
    /// the device does nothing, and what is read from it is NaN. Does not wait.
    ///
    /// # Errors
    /// That thing.
    pub fn check(&self) -> Result<()> {
        self.0.pool.gpu().map_or(Ok(()), Gpu::check)
    }

    /// Runs every instruction and every warp and block primitive that kernels rely on, and compares with what it is documented
    /// to do: the first thing to run on a chip that nobody has tried. Gives how many there are; none but on a GPU. Waits.
    ///
    /// # Errors
    /// When the device fails, or the first that does something else.
    pub fn conformance(&self) -> Result<usize> {
        if self.kind() == DeviceKind::Cuda { cuda::conformance(self) } else { Ok(0) }
    }

    /// Waits for all queued work, for timing and before [`Device::check`]; nothing is ever queued on a CPU.
    pub fn wait(&self) {
        if let Some(gpu) = self.0.pool.gpu() {
            gpu.wait();
        }
    }

    /// Whether two handles are the same device.
    pub fn same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// The GPU that this is.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub(crate) fn gpu(&self) -> &Gpu {
        self.0.pool.gpu().expect("asked for a GPU on a device of another kind")
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind(), self.0.pool.gpu()) {
            (DeviceKind::Cpu, _) => write!(f, "CPU, {} threads", self.threads()),
            (_, None) => f.write_str("f64 reference"),
            (_, Some(gpu)) => {
                write!(f, "GPU {} ({}), {}", gpu.ordinal(), gpu.name(), gpu.precision())
            }
        }
    }
}

/// What there is of GPUs, driver and kernels, a line each; or what is missing, and the one thing to do.
pub fn gpus() -> Vec<String> {
    cuda::describe()
}

/// Bytes for people to read.
pub(crate) fn gib(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        0.0..1024.0 => format!("{bytes} bytes"),
        1024.0..1048576.0 => format!("{:.1} KiB", bytes / 1024.0),
        1048576.0..1073741824.0 => format!("{:.1} MiB", bytes / 1048576.0),
        _ => format!("{:.2} GiB", bytes / 1073741824.0),
    }
}

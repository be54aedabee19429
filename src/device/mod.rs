//! Devices: where memory lives and operations run.
//!
//! A [`Device`] is a handle on a memory pool, a thread pool and a kind. Three kinds exist: the CPU and NVIDIA GPUs, which
//! compute in bf16 or f32 ([`Precision`]); and the reference device, which computes the same operations naively in f64 and
//! which the other two are compared with. Operations run in launch order on all three.

mod bf16;
pub(crate) mod cuda;
mod group;
mod memory;
pub(crate) mod peer;
mod philox;
mod pool;
mod precision;
mod threads;
mod trace;

use std::fmt;
use std::sync::Arc;

pub use bf16::Bf16Path;
use cuda::Gpu;
pub use cuda::{Counts, Foreign, ForeignStream, KernelTraffic, Mix, Resources, as_guest};
pub(crate) use group::{Communicator, Reduction};
pub use group::{Group, Launch, Reduce, Traffic, mpi};
pub(crate) use memory::{Memory, elements};
pub use philox::{Philox, Purpose, philox4x32};
pub use pool::MemoryUse;
pub use precision::Precision;
pub(crate) use selfsup_cpu_kernels::Isa;
pub(crate) use threads::{check_default as check_default_threads, thread_seconds};
pub(crate) use trace::{
    Row, Span, begin as begin_trace, end as end_trace, operation as trace_operation,
    phase as trace_phase, span as trace_span,
};

use crate::error::{Error, Result};
use pool::Pool;
use threads::Threads;

/// The resources of the program's CUDA kernels on each chip that they were compiled for, as the assembler printed them; empty if nvcc
/// was missing when the program was built.
pub fn resources() -> &'static [Resources] {
    cuda::RESOURCES
}

/// Why the system's loader did not open a library: libloading's own text says only that it did not.
fn loader_says(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The kind of a device; it selects the code that an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// f32 or bf16 on the processor's cores.
    Cpu,
    /// bf16 or f32 on an NVIDIA GPU.
    Cuda,
    /// Naive f64, the ground truth of the tests: never fast, never approximate.
    Reference,
}

/// A handle on a device; clones share its memory and threads.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: DeviceKind,
    pool: Pool,
    /// The type of its activations.
    precision: Precision,
    threads: Option<Arc<Threads>>,
    /// The CPU device on which a GPU's inputs are prepared and its results finished.
    host: Option<Device>,
}

impl Device {
    /// Makes a device on the processor with a pool of `threads` compute threads; 0 takes one per core. It computes in f32;
    /// [`Device::with_precision`] chooses.
    ///
    /// Operations wake the pool and wait for it. Wrap loops over many operations in [`Device::run`] to wake it once.
    ///
    /// # Errors
    /// If the operating system refuses the threads, there are too many of them, or `SELFSUP_ISA` names an instruction set
    /// that this machine does not support.
    pub fn cpu(threads: usize) -> Result<Self> {
        Self::build(threads, Threads::new(threads))
    }

    /// Makes a device as [`Device::cpu`], with the calling thread as one of the `threads` compute threads: operations start
    /// without waking another thread (3% of a ResNet-50 step on two cores). For programs whose main thread does nothing else:
    /// the thread stays in the device's rayon pool for the rest of its life, even after the device is dropped.
    ///
    /// # Errors
    /// As [`Device::cpu`].
    pub fn cpu_with_this_thread(threads: usize) -> Result<Self> {
        Self::build(threads, Threads::with_this_thread(threads))
    }

    /// Makes a device on the same threads whose activations have this precision.
    ///
    /// ```
    /// use selfsup::device::{Device, Precision};
    /// use selfsup::tensor::DType;
    /// let device = Device::cpu(1)?.with_precision(Precision::Bf16)?;
    /// assert_eq!(DType::of_activations(&device), DType::Bf16);
    /// assert_eq!(DType::of(&device), DType::F32); // weights, statistics, losses
    /// # Ok::<(), selfsup::Error>(())
    /// ```
    ///
    /// # Errors
    /// If `SELFSUP_BF16` names a way to multiply bf16 matrices that this machine does not support.
    ///
    /// # Panics
    /// If the device is not a CPU: [`Device::cuda`] takes the precision of a GPU, and the reference device has only f64.
    #[track_caller]
    pub fn with_precision(&self, precision: Precision) -> Result<Self> {
        let threads = self.0.threads.clone().filter(|_| self.kind() == DeviceKind::Cpu);
        let threads = threads.unwrap_or_else(|| panic!("with_precision: {self} is not a CPU"));
        if precision == Precision::Bf16 {
            Bf16Path::selected()?;
        }
        Ok(Self::on_threads(threads, precision, self.0.pool.is_poisoned()))
    }

    /// Makes an f64 reference device.
    pub fn reference() -> Self {
        Self::reference_with(false)
    }

    /// Opens the NVIDIA GPU with this number, counted from 0.
    ///
    /// # Errors
    /// If there is no driver, no such GPU, or this build has no kernels; the message says what to do.
    pub fn cuda(ordinal: usize, precision: Precision) -> Result<Self> {
        let threads = Launch::detect().map_or(0, |launch| launch.threads());
        Ok(Self::gpu_with_host(Gpu::new(ordinal, precision)?, Self::cpu(threads)?, false))
    }

    /// Opens the GPU of a rank: that of its number among the ranks of its machine.
    ///
    /// # Errors
    /// As [`Device::cuda`]; if the machine has more ranks than GPUs.
    pub fn cuda_of_rank(launch: &Launch, precision: Precision) -> Result<Self> {
        Self::cuda(launch.gpu(cuda::count()?).map_err(Error::Device)?, precision)
    }

    /// Makes a GPU that does not exist, for counting what a step would move on one ([`Device::count_traffic`]): allocations succeed
    /// at any size, operations launch nothing, and reads give NaN. Needs neither a driver nor compiled kernels.
    ///
    /// # Errors
    /// As [`Device::cpu`], for the host's threads.
    pub fn imagined_gpu(precision: Precision) -> Result<Self> {
        Ok(Self::gpu_with_host(Gpu::imagined(precision), Self::cpu(0)?, false))
    }

    /// A new device of the same kind whose memory is filled with NaN before each use. For tests: an operation that leaves
    /// part of its output unwritten, or reads uninitialised memory, then produces NaN.
    ///
    /// # Panics
    /// If the GPU cannot be opened again.
    pub fn poisoned(&self) -> Self {
        match (self.kind(), self.0.pool.gpu()) {
            (DeviceKind::Cpu, _) => {
                let threads = Threads::new(self.threads());
                let threads = threads.expect("the same number of threads as before");
                Self::on_threads(Arc::new(threads), self.precision(), true)
            }
            (_, None) => Self::reference_with(true),
            (_, Some(gpu)) => {
                let again =
                    Gpu::new(gpu.ordinal(), gpu.precision()).expect("the GPU was open before");
                Self::gpu_with_host(again, self.host().poisoned(), true)
            }
        }
    }

    fn reference_with(poison: bool) -> Self {
        let pool = Pool::new(poison, None);
        let (kind, precision) = (DeviceKind::Reference, Precision::F32);
        Self(Arc::new(Inner { kind, pool, precision, threads: None, host: None }))
    }

    fn gpu_with_host(gpu: Gpu, host: Device, poison: bool) -> Self {
        let (kind, precision) = (DeviceKind::Cuda, gpu.precision());
        let pool = Pool::new(poison, Some(Arc::new(gpu)));
        Self(Arc::new(Inner { kind, pool, precision, threads: None, host: Some(host) }))
    }

    fn build(count: usize, threads: Result<Threads, String>) -> Result<Self> {
        Isa::selected().map_err(|reason| Error::Config(reason.into()))?;
        let threads = threads.map_err(|e| {
            let which = match count {
                0 => "a compute thread for each core".into(),
                1 => "a compute thread".into(),
                count => format!("{count} compute threads"),
            };
            Error::Device(format!("cannot start {which}: {e}"))
        })?;
        Ok(Self::on_threads(Arc::new(threads), Precision::F32, false))
    }

    fn on_threads(threads: Arc<Threads>, precision: Precision, poison: bool) -> Self {
        let (kind, pool) = (DeviceKind::Cpu, Pool::new(poison, None));
        Self(Arc::new(Inner { kind, pool, precision, threads: Some(threads), host: None }))
    }

    /// Its kind.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// The precision of its activations. The reference device says f32: it rounds nothing.
    pub(crate) fn precision(&self) -> Precision {
        self.0.precision
    }

    /// The device on which the host prepares this device's inputs: a CPU device for a GPU, otherwise the device itself.
    pub fn host(&self) -> &Device {
        self.0.host.as_ref().unwrap_or(self)
    }

    /// Number of compute threads on the host.
    pub fn threads(&self) -> usize {
        self.host().0.threads.as_ref().map_or(1, |threads| threads.count())
    }

    /// Runs `f` so that rayon's parallel iterators inside it use this device's host threads.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.host().0.threads {
            Some(threads) => threads.run(f),
            None => f(),
        }
    }

    /// Statistics of the device's memory pool.
    pub fn memory_use(&self) -> MemoryUse {
        self.0.pool.usage()
    }

    /// Runs `f` and returns what the GPU's launches, copies and fills that it queued move, by kernel; nothing on other devices. A
    /// replay of a captured step is not seen.
    pub fn count_traffic<R>(&self, f: impl FnOnce() -> R) -> (R, Vec<KernelTraffic>) {
        let Some(gpu) = self.0.pool.gpu() else { return (f(), Vec::new()) };
        gpu.open_ledger();
        let result = f();
        (result, gpu.close_ledger())
    }

    /// Reports the first failure of a GPU. GPU operations are queued and return no error themselves; after a failure the
    /// device ignores further work, and reads from it return NaN. Does not wait. Always succeeds on other devices.
    ///
    /// # Errors
    /// If an operation has failed.
    pub fn check(&self) -> Result<()> {
        self.0.pool.gpu().map_or(Ok(()), Gpu::check)
    }

    /// Runs every instruction and every warp and block primitive that the kernels rely on, and compares the results with the
    /// documentation. Run it first on a chip that has not been tried before. Returns the number of checks, 0 on devices other
    /// than a GPU. Waits.
    ///
    /// # Errors
    /// If the device fails or a check disagrees; the message names the first.
    pub fn conformance(&self) -> Result<usize> {
        let results = self.conformance_results();
        let count = results.len();
        results.into_iter().find_map(|(_, wrong)| wrong).map_or(Ok(count), Err)
    }

    /// The checks of [`Device::conformance`] by name, each with what is wrong.
    pub(crate) fn conformance_results(&self) -> Vec<(&'static str, Option<Error>)> {
        if self.kind() == DeviceKind::Cuda { cuda::conformance(self) } else { Vec::new() }
    }

    /// Waits for all queued work, for timing and before [`Device::check`]. Returns at once on a CPU, which queues nothing.
    pub fn wait(&self) {
        if let Some(gpu) = self.0.pool.gpu() {
            gpu.wait();
        }
    }

    /// Makes what is queued from now on wait for what another library's stream holds now. Returns at once on a CPU, as nothing is
    /// queued there. [`Tensor::adopt`](crate::tensor::Tensor::adopt) calls it.
    ///
    /// # Errors
    /// If the GPU has failed, or a CUDA graph is being captured on the stream or by this device.
    pub fn wait_for(&self, stream: ForeignStream) -> Result<()> {
        self.0.pool.gpu().map_or(Ok(()), |gpu| gpu.wait_for(stream))
    }

    /// Makes another library's stream wait for all that is queued so far, as [`Device::wait_for`] the other way about.
    /// [`Tensor::lend`](crate::tensor::Tensor::lend) calls it, and so does an adopted tensor when it is dropped.
    ///
    /// # Errors
    /// As [`Device::wait_for`].
    pub fn let_wait(&self, stream: ForeignStream) -> Result<()> {
        self.0.pool.gpu().map_or(Ok(()), |gpu| gpu.let_wait(stream))
    }

    /// Whether both handles refer to the same device.
    pub fn same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// The GPU behind this device.
    ///
    /// # Panics
    /// If the device is not a GPU.
    #[track_caller]
    pub(crate) fn gpu(&self) -> &Gpu {
        self.0.pool.gpu().expect("this operation needs a GPU, and the device is not one")
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind(), self.0.pool.gpu()) {
            (DeviceKind::Cpu, _) => {
                write!(f, "CPU, {} threads, {}", self.threads(), self.precision())
            }
            (_, None) => f.write_str("f64 reference"),
            (_, Some(gpu)) => {
                write!(f, "GPU {} ({}), {}", gpu.ordinal(), gpu.name(), gpu.precision())
            }
        }
    }
}

/// Describes GPUs, driver and kernels, one line each; or says what is missing and what to do about it.
pub fn gpus() -> Vec<String> {
    cuda::describe()
}

/// Returns a sentence to show before GPU `ordinal` is opened if that takes long, because the program has no machine code for it and
/// the driver compiles the kernels; `None` if not, or if there is no such GPU.
pub fn compiles_first(ordinal: usize) -> Option<String> {
    cuda::compiles_first(ordinal)
}

/// The model of a GPU and the CUDA version of its driver: what decides whether its kernels have been proved.
///
/// # Panics
/// If the device is not a GPU.
#[track_caller]
pub(crate) fn gpu_model(device: &Device) -> String {
    format!("{}, driver for CUDA {}", device.gpu().name(), cuda::driver_version())
}

/// A number of bytes in a readable unit.
pub(crate) fn gib(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        0.0..1024.0 => format!("{bytes} bytes"),
        1024.0..1048576.0 => format!("{:.1} KiB", bytes / 1024.0),
        1048576.0..1073741824.0 => format!("{:.1} MiB", bytes / 1048576.0),
        _ => format!("{:.2} GiB", bytes / 1073741824.0),
    }
}

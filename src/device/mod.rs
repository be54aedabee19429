//! Where memory lives and operations run (floor 1).
//!
//! A [`Device`] is a handle on a pool of memory, a pool of threads and a kind. Two kinds exist: the CPU, which
//! computes in f32 and is what one trains on, and the reference device, which computes the same operations naively
//! in f64 and is what everything else is compared with. Operations run in launch order on both.

mod group;
mod memory;
mod philox;
mod product;
mod threads;

use std::sync::Arc;

pub use group::Group;
pub(crate) use memory::Memory;
pub use memory::MemoryUse;
pub use philox::{Philox, Purpose, philox4x32};
pub(crate) use product::{Matrix, product, product_alone};

use crate::error::{Error, Result};
use memory::Pool;
use threads::Threads;

/// What a device is, which decides the code an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// f32 on the processor's cores.
    Cpu,
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
        Self(Arc::new(Inner { kind: DeviceKind::Reference, pool: Pool::new(false), threads: None }))
    }

    /// This kind of device anew, with memory that is filled with NaN before each use: an operation that leaves a
    /// part of its output unwritten, or reads what nobody wrote, then shows. For tests.
    pub fn poisoned(&self) -> Self {
        match self.kind() {
            DeviceKind::Reference => Self(Arc::new(Inner {
                kind: DeviceKind::Reference,
                pool: Pool::new(true),
                threads: None,
            })),
            kind => Self::build(kind, self.threads(), true).expect("as many threads as before"),
        }
    }

    fn build(kind: DeviceKind, threads: usize, poison: bool) -> Result<Self> {
        let threads = Threads::new(threads)
            .map_err(|e| Error::Device(format!("cannot start {threads} compute threads: {e}")))?;
        Ok(Self(Arc::new(Inner { kind, pool: Pool::new(poison), threads: Some(threads) })))
    }

    /// What this device is.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// Number of compute threads.
    pub fn threads(&self) -> usize {
        self.0.threads.as_ref().map_or(1, Threads::count)
    }

    /// Runs `f` where rayon's parallel iterators use this device's threads.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.0.threads {
            Some(threads) => threads.run(f),
            None => f(),
        }
    }

    /// How much memory the device's pool has handed out, and how often it had to ask the system.
    pub fn memory_use(&self) -> MemoryUse {
        self.0.pool.usage()
    }

    /// Whether two handles are the same device.
    pub fn same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.0.pool
    }
}

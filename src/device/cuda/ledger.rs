//! What launches move: bytes of device memory by kernel, from the pointers that the launches pass.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Gpu;
use super::gpu::lock;
use super::pointers::{Argument, Moves};

/// What the launches of one kernel moved, or the copies and fills that are no kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelTraffic {
    /// Its name in `kernels/`; or `copy`, `copy from the host` and `memset` of the driver.
    pub kernel: &'static str,
    /// The number of launches.
    pub launches: u64,
    /// Bytes of device memory that they read, each byte once a launch: what caches do not hold comes on top.
    pub read: u64,
    /// Bytes of device memory that they wrote.
    pub written: u64,
}

/// The traffic since the ledger was opened, by kernel.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    kernels: BTreeMap<&'static str, KernelTraffic>,
}

impl Ledger {
    /// Adds a launch.
    pub(super) fn add(&mut self, kernel: &'static str, [read, written]: [u64; 2]) {
        let none = || KernelTraffic { kernel, launches: 0, read: 0, written: 0 };
        let entry = self.kernels.entry(kernel).or_insert_with(none);
        entry.launches += 1;
        entry.read += read;
        entry.written += written;
    }

    /// The traffic, by the name of the kernel.
    pub(super) fn close(self) -> Vec<KernelTraffic> {
        self.kernels.into_values().collect()
    }
}

/// The bytes that a launch with these arguments reads and writes. Through two pointers to the same address it moves them once.
pub(super) fn moved(arguments: &[Argument]) -> [u64; 2] {
    let of = |direction: fn(&Moves) -> u64| {
        let bytes = |(i, own): (usize, &Argument)| {
            let same = |other: &&Argument| other.moves.address == own.moves.address;
            let earlier = arguments[..i].iter().filter(same).map(|other| direction(&other.moves));
            direction(&own.moves).saturating_sub(earlier.max().unwrap_or(0))
        };
        arguments.iter().enumerate().map(bytes).sum()
    };
    [of(|moves| moves.read), of(|moves| moves.written)]
}

impl Gpu {
    /// Starts to count what launches, copies and fills move.
    pub(crate) fn open_ledger(&self) {
        *lock(&self.ledger) = Some(Ledger::default());
    }

    /// Ends the count and returns it.
    pub(crate) fn close_ledger(&self) -> Vec<KernelTraffic> {
        lock(&self.ledger).take().map(Ledger::close).unwrap_or_default()
    }

    /// Adds to the count what a launch of `kernel` moves, if someone counts.
    pub(super) fn note(&self, kernel: &'static str, moved: impl FnOnce() -> [u64; 2]) {
        if let Some(ledger) = lock(&self.ledger).as_mut() {
            ledger.add(kernel, moved());
        }
    }
}

//! A GPU that does not exist: launches are counted and nothing is computed, so that a step of any size can be inspected on any
//! machine.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Gpu, Loaded};
use crate::device::Precision;

/// The multiprocessors of an H100 and an H200, on which grid-stride loops depend; what is moved does not.
const MULTIPROCESSORS: usize = 132;

/// Alignment of the driver's allocations.
const ALIGNMENT: u64 = 256;

/// Addresses of an imagined GPU's memory: distinct and aligned, with nothing behind them.
#[derive(Debug)]
pub(super) struct Addresses(AtomicU64);

impl Addresses {
    /// The address of `bytes` bytes.
    pub(super) fn take(&self, bytes: usize) -> u64 {
        let bytes = (bytes.max(1) as u64).next_multiple_of(ALIGNMENT);
        self.0.fetch_add(bytes, Ordering::Relaxed)
    }
}

impl Gpu {
    /// A GPU without a driver. Allocations succeed at any size, launches and copies do nothing but add to the ledger, and reads
    /// give NaN, as after a failure. It captures nothing.
    pub(crate) fn imagined(precision: Precision) -> Self {
        Self {
            ordinal: 0,
            name: "imagined".into(),
            precision,
            multiprocessors: MULTIPROCESSORS,
            device: 0,
            context: std::ptr::null_mut(),
            compute: std::ptr::null_mut(),
            kernels: Loaded { modules: Vec::new(), functions: Vec::new() },
            allowed: Mutex::default(),
            staging: Mutex::default(),
            numbers: Mutex::default(),
            unsent: AtomicBool::new(false),
            capturing: AtomicBool::new(false),
            synchronous: true,
            ignores: AtomicBool::new(false),
            failure: Mutex::default(),
            given_up: Mutex::default(),
            ledger: Mutex::default(),
            imagined: Some(Addresses(AtomicU64::new(1 << 40))),
        }
    }
}

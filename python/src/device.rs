//! Devices by name.

use selfsup::device::{Device, DeviceKind, Precision};
use selfsup::{Error, Result};

/// What a device is asked to be.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// `cpu`, `cuda` or `cuda:N`; without a name a GPU if there is one, else the CPU.
    pub name: Option<String>,
    /// Without one, what is usual on the device.
    pub precision: Option<Precision>,
    /// Compute threads; 0 for one per core.
    pub threads: usize,
    /// Whether the calling thread does nothing but drive the device.
    pub own_thread: bool,
    /// Whether the device is to train a run.
    pub to_train: bool,
}

impl Wanted {
    /// Opens the device.
    ///
    /// # Errors
    /// If the name is unknown or the device cannot be used.
    pub fn open(&self) -> Result<Device> {
        let usual = |kind| match self.to_train {
            true => Precision::of_training(kind, false),
            false => Ok(Precision::usual(kind)),
        };
        let precision = |kind| self.precision.map_or_else(|| usual(kind), Ok);
        let cpu = || {
            let device = match self.own_thread {
                true => Device::cpu_with_this_thread(self.threads)?,
                false => Device::cpu(self.threads)?,
            };
            device.with_precision(precision(DeviceKind::Cpu)?)
        };
        let gpu = |ordinal| Device::cuda(ordinal, precision(DeviceKind::Cuda)?);
        match self.name.as_deref() {
            Some("cpu") => cpu(),
            Some(name) => match gpu_number(name) {
                Some(ordinal) => gpu(ordinal),
                None => Err(Error::config(format!(
                    "unknown device `{name}`: expected cpu, cuda or cuda:N with N from 0"
                ))),
            },
            None => gpu(0).or_else(|_| cpu()),
        }
    }
}

/// The number of the GPU of this name.
pub fn gpu_number(name: &str) -> Option<usize> {
    match name.strip_prefix("cuda")? {
        "" => Some(0),
        number => number.strip_prefix(':')?.parse().ok(),
    }
}

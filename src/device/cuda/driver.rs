//! Finds and starts the NVIDIA driver, and formats its errors.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// The oldest driver that runs code from nvcc 13: the number that `cuDriverGetVersion` returns, and its usual name.
const OLDEST: (i32, &str) = (13_000, "r580 (CUDA 13.0)");

/// Starts the driver and returns its version, such as 13000.
///
/// # Errors
/// If the driver is missing or too old, or finds no GPU; the message says what to do.
pub(super) fn start() -> Result<i32> {
    // SAFETY: opens a library by name and calls none of its functions.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "no NVIDIA driver on this machine (libcuda.so not found): install one, or compute on the CPU".into(),
        ));
    }
    // Before anything else: cudarc panics on calls that an old driver lacks.
    let mut version = 0;
    // SAFETY: writes one int, works before initialisation, and exists in every driver.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    known.map_err(|e| Error::Device(format!("the NVIDIA driver does not answer: {}", words(e))))?;
    if version < OLDEST.0 {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Device(format!(
            "the NVIDIA driver is too old: it supports CUDA {major}.{minor}, and the kernels need driver {} or newer",
            OLDEST.1
        )));
    }
    match cudarc::driver::result::init() {
        Ok(()) => Ok(version),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Error::Device(
            "the NVIDIA driver finds no GPU: run `nvidia-smi`, and check whether CUDA_VISIBLE_DEVICES hides the GPU".into(),
        )),
        Err(e) => Err(Error::Device(format!("the NVIDIA driver does not start: {}", words(e)))),
    }
}

/// An error's name and meaning.
pub(super) fn words(error: DriverError) -> String {
    let text =
        |text: Result<&CStr, DriverError>| text.map(|t| t.to_string_lossy().into_owned()).ok();
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(meaning)) => format!("{name}, {meaning}"),
        _ => format!("{:?}", error.0),
    }
}

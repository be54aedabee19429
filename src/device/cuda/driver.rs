//! Whether there is a driver that this program can talk to, and its errors in words.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// The oldest driver that runs what nvcc 13 makes, as `cuDriverGetVersion` has it, and as people know it.
const OLDEST: (i32, &str) = (13_000, "r580 (CUDA 13.0)");

/// Starts the driver and gives its version, such as 13000.
///
/// # Errors
/// When there is none, when it is too old, or when it finds no GPU, with what to do about it.
pub(super) fn start() -> Result<i32> {
    // SAFETY: opens a library by name and touches nothing of it.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "there is no NVIDIA driver on this machine (no libcuda.so): install one, or compute on the CPU".into(),
        ));
    }
    // Asked before anything else: a call that an old driver lacks would panic.
    let mut version = 0;
    // SAFETY: writes one int, needs no initialised driver, and every driver has it.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    known.map_err(|e| Error::Device(format!("the NVIDIA driver does not answer: {}", words(e))))?;
    if version < OLDEST.0 {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Device(format!(
            "the NVIDIA driver is too old: it knows CUDA {major}.{minor}, and the kernels need driver {} or newer",
            OLDEST.1
        )));
    }
    match cudarc::driver::result::init() {
        Ok(()) => Ok(version),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Error::Device(
            "the NVIDIA driver finds no GPU: see what `nvidia-smi` says and whether CUDA_VISIBLE_DEVICES hides it".into(),
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

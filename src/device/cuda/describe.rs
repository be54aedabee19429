//! The GPU part of `selfsup devices`.

use cudarc::driver::result;
use cudarc::driver::sys::{CUdevice, CUdevice_attribute};

use super::driver;
use super::gpu::attribute;
use super::kernels::{self, COMPILER, FILES, KERNELS};

/// Describes driver, GPUs and kernels, one line each; or says what is missing and what to do about it.
pub(crate) fn describe() -> Vec<String> {
    let mut lines = Vec::new();
    match driver::start() {
        Err(reason) => lines.push(format!("cuda: not available; {reason}")),
        Ok(version) => {
            let version = dotted(version);
            let count = result::device::get_count().unwrap_or(0);
            lines.push(format!("cuda: driver for CUDA {version}, {count} GPU(s)"));
            lines.extend((0..count).map(|ordinal| {
                gpu(ordinal).unwrap_or_else(|| format!("cuda:{ordinal}: does not answer"))
            }));
        }
    }
    lines.push(match COMPILER {
        Some(version) => format!(
            "kernels: {} in {} files for {} and later chips (PTX 8.0); {version}",
            KERNELS.len(),
            FILES.len(),
            kernels::chips().join(", ")
        ),
        None => "kernels: none, because nvcc was missing at build time; run scripts/fetch-nvcc and build again".into(),
    });
    lines
}

/// The CUDA version that the driver supports, such as 13.0; a question mark without a driver.
pub(crate) fn driver_version() -> String {
    driver::start().map_or_else(|_| "?".into(), dotted)
}

fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A sentence to print before GPU `ordinal` is opened, if the driver has to compile the kernels for it: that takes long. `None` if
/// it does not, or there is no such GPU.
pub(crate) fn compiles_first(ordinal: usize) -> Option<String> {
    driver::start().ok()?;
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    let (major, minor) = capability(device)?;
    kernels::are_compiled_for((major, minor)).then(|| {
        format!(
            "the driver compiles the kernels for compute capability {major}.{minor} at their first use, which takes about 20 s"
        )
    })
}

fn capability(device: CUdevice) -> Option<(i32, i32)> {
    let ask = |what| attribute(device, what).ok();
    let major = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Some((major, ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

fn gpu(ordinal: i32) -> Option<String> {
    let device = result::device::get(ordinal).ok()?;
    let name = result::device::get_name(device).ok()?;
    // SAFETY: the device came from the driver.
    let bytes = unsafe { result::device::total_mem(device) }.ok()?;
    let (major, minor) = capability(device)?;
    let note = match (major, minor) {
        old if old < (8, 0) => "; too old for the kernels, which need 8.0",
        new if kernels::are_compiled_for(new) => "; the driver compiles the kernels for it",
        _ => "",
    };
    let gib = bytes as f64 / f64::from(1 << 30);
    Some(format!("cuda:{ordinal}: {name}, {gib:.1} GiB, compute capability {major}.{minor}{note}"))
}

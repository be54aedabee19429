//! Devices, contexts and names of errors.

use std::env;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::calls;
use crate::context;
use crate::driver::{CODES, CallResult, Code, Driver};

/// CUDA 13.0.
const VERSION: c_int = 13000;
const NAME: &CStr = c"stand-in driver (no GPU)";
/// Streaming multiprocessors: few, so that tests cover grids larger than the device.
pub(super) const MULTIPROCESSORS: u32 = 4;
pub(super) const SHARED_PER_BLOCK: u32 = 48 << 10;
/// Registers of a multiprocessor, and the most of a block.
pub(super) const REGISTERS: u32 = 1 << 16;

/// Compute capability: SELFSUP_STAND_IN_CAPABILITY (`9.0`), or 8.0 by default.
pub(super) fn capability() -> (c_int, c_int) {
    let asked = env::var("SELFSUP_STAND_IN_CAPABILITY").ok();
    let parsed = asked.as_deref().and_then(|v| v.split_once('.'));
    let parsed: Option<(c_int, c_int)> =
        parsed.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parsed.unwrap_or((8, 0))
}

/// The opt-in limit of a block's dynamic and static shared memory, in bytes.
pub(super) fn shared_opt_in() -> u32 {
    if capability().0 >= 9 { 227 << 10 } else { 163 << 10 }
}

/// Attributes by their number in `CUdevice_attribute`; all others are 0.
fn attribute(which: u32) -> c_int {
    match which {
        1..=3 => 1024,   // threads per block, x and y of a block
        4 => 64,         // z of a block
        5 => c_int::MAX, // x of a grid
        6 | 7 => 65535,  // y and z of a grid
        8 => SHARED_PER_BLOCK as c_int,
        10 => 32,                      // warp
        12 | 82 => REGISTERS as c_int, // registers per block, per multiprocessor
        13 | 36 => 1_000_000,          // clocks, kHz
        16 => MULTIPROCESSORS as c_int,
        37 => 64,      // bus, bits
        38 => 1 << 20, // second-level cache
        39 => 2048,    // threads per multiprocessor
        40 => 2,       // copy engines
        75 => capability().0,
        76 => capability().1,
        81 => (shared_opt_in() + 1024) as c_int, // shared memory per multiprocessor
        97 => shared_opt_in() as c_int,
        106 => 32,   // blocks per multiprocessor
        111 => 1024, // shared memory reserved by the system
        // Copies overlap kernels, host memory can be mapped, kernels run concurrently, one address space, cooperative
        // launches, memory pools.
        15 | 19 | 31 | 41 | 95 | 115 => 1,
        _ => 0,
    }
}

/// Each process has GPUs of its own, unless SELFSUP_STAND_IN_SHARED=1.
fn identity(device: usize) -> [u8; 16] {
    let shared = env::var_os("SELFSUP_STAND_IN_SHARED").is_some_and(|v| v == "1");
    let process = if shared { 0 } else { std::process::id() };
    let mut identity = *b"stand-in GPU....";
    identity[11] = device as u8;
    identity[12..].copy_from_slice(&process.to_le_bytes());
    identity
}

/// Makes a living context current, or none.
fn set_current(driver: &Driver, context: usize) -> CallResult {
    if context != 0 {
        driver.device_of(context).map_err(|_| Code::INVALID_CONTEXT)?;
    }
    context::pop_current();
    if context != 0 {
        context::push_current(context);
    }
    Ok(())
}

fn synchronize(driver: &mut Driver) -> CallResult {
    let context = driver.in_context()?;
    driver.require_no_capture()?;
    driver.count_wait();
    driver.drain_context(context)
}

fn copy_name(code: c_uint, to: *mut *const c_char, text: bool) -> CallResult {
    let found = CODES.iter().find(|c| c.0 == code).ok_or(Code::INVALID_VALUE)?;
    unsafe { *to = if text { found.2 } else { found.1 }.as_ptr() };
    Ok(())
}

calls! {
    fn cuInit(driver, flags: c_uint) {
        if flags != 0 { return Err(Code::INVALID_VALUE) }
        driver.initialized = true;
    }

    always fn cuDriverGetVersion(driver, version: *mut c_int) { *version = VERSION }

    fn cuDeviceGetCount(driver, count: *mut c_int) { *count = driver.devices.len() as c_int }

    fn cuDeviceGet(driver, device: *mut c_int, ordinal: c_int) {
        driver.device(ordinal)?;
        *device = ordinal;
    }

    fn cuDeviceGetName(driver, name: *mut c_char, len: c_int, device: c_int) {
        driver.device(device)?;
        let bytes = NAME.to_bytes();
        let n = bytes.len().min(len as usize - 1);
        std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), name, n);
        *name.add(n) = 0;
    }

    fn cuDeviceGetUuid_v2(driver, uuid: *mut [u8; 16], device: c_int) {
        *uuid = identity(driver.device(device)?);
    }

    fn cuDeviceGetUuid(driver, uuid: *mut [u8; 16], device: c_int) {
        *uuid = identity(driver.device(device)?);
    }

    fn cuDeviceGetAttribute(driver, value: *mut c_int, which: c_uint, device: c_int) {
        driver.device(device)?;
        *value = attribute(which);
    }

    fn cuDeviceTotalMem_v2(driver, bytes: *mut usize, device: c_int) {
        driver.device(device)?;
        *bytes = driver.memory().total;
    }

    fn cuDevicePrimaryCtxRetain(driver, context: *mut usize, device: c_int) {
        *context = driver.retain(driver.device(device)?)?;
    }

    always fn cuDevicePrimaryCtxRelease_v2(driver, device: c_int) {
        driver.release_context(driver.device(device)?)?;
    }

    fn cuDevicePrimaryCtxGetState(driver, device: c_int, flags: *mut c_uint, active: *mut c_int) {
        *flags = 0;
        *active = c_int::from(driver.is_active(driver.device(device)?));
    }

    fn cuDevicePrimaryCtxSetFlags_v2(driver, device: c_int, _flags: c_uint) { driver.device(device)?; }

    always fn cuCtxSetCurrent(driver, context: usize) { set_current(driver, context)? }

    always fn cuCtxGetCurrent(driver, context: *mut usize) { *context = context::current() }

    fn cuCtxPushCurrent_v2(driver, context: usize) {
        driver.device_of(context).map_err(|_| Code::INVALID_CONTEXT)?;
        context::push_current(context);
    }

    fn cuCtxPopCurrent_v2(driver, context: *mut usize) {
        *context = context::pop_current().ok_or(Code::INVALID_CONTEXT)?;
    }

    fn cuCtxGetDevice(driver, device: *mut c_int) {
        *device = driver.current_device()? as c_int;
    }

    fn cuCtxSetFlags(driver, _flags: c_uint) { driver.in_context()?; }

    fn cuCtxSetLimit(driver, _limit: c_uint, _value: usize) { driver.in_context()?; }

    fn cuCtxGetLimit(driver, value: *mut usize, _limit: c_uint) {
        driver.in_context()?;
        *value = 0;
    }

    fn cuCtxSetCacheConfig(driver, _config: c_uint) { driver.in_context()?; }

    fn cuCtxGetStreamPriorityRange(driver, least: *mut c_int, greatest: *mut c_int) {
        driver.in_context()?;
        *least = 0;
        *greatest = -5;
    }

    fn cuCtxSynchronize(driver) { synchronize(driver)? }

    fn cuCtxSynchronize_v2(driver, _context: usize) { synchronize(driver)? }

    fn cuMemGetInfo_v2(driver, free: *mut usize, total: *mut usize) {
        let device = driver.current_device()?;
        let memory = driver.memory();
        *total = memory.total;
        *free = memory.free_bytes(device);
    }

    always fn cuGetErrorName(driver, code: c_uint, name: *mut *const c_char) { copy_name(code, name, false)? }

    always fn cuGetErrorString(driver, code: c_uint, text: *mut *const c_char) { copy_name(code, text, true)? }

    fn cuProfilerStart(driver) {}

    fn cuProfilerStop(driver) {}

    fn cuGetProcAddress_v2(
        driver, symbol: *const c_char, function: *mut *mut c_void, _version: c_int, _flags: u64, status: *mut c_uint,
    ) {
        let name = CStr::from_ptr(symbol).to_string_lossy();
        let found = ["_v3", "_v2", ""].iter().map(|suffix| {
            let name = std::ffi::CString::new(format!("{name}{suffix}")).expect("a C string contains no NUL");
            libc::dlsym(own_handle(), name.as_ptr())
        }).find(|f| !f.is_null());
        if !status.is_null() {
            *status = u32::from(found.is_none());
        }
        *function = found.ok_or(Code::NOT_FOUND)?;
    }
}

/// The loader's handle of this library.
fn own_handle() -> *mut c_void {
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        libc::dladdr(cuInit as *const c_void, &mut info);
        libc::dlopen(info.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD)
    }
}

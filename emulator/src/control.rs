//! Calls that only this driver has; a test finds them with `dlsym`. Names are C strings.

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::sync::OnceLock;

use crate::context::Device;
use crate::driver::{Code, with};
use crate::engine;

unsafe fn text(name: *const c_char) -> String {
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Returns how often an event happened: a driver call by its name without version suffix (`cuMemAlloc`), `kernel:NAME`,
/// `allocations` (of any kind), `waits` (calls that make the host wait), `downloaded` (bytes that copies to the host asked for).
/// `read:NAME` and `written:NAME` are the bytes of device memory that the launches of an instrumented kernel moved, each byte once a
/// launch however often it was accessed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_count(what: *const c_char) -> u64 {
    let what = unsafe { text(what) };
    with(|driver| driver.count_of(&what))
}

/// Resets all counts to zero.
#[unsafe(no_mangle)]
pub extern "C" fn standin_reset_counts() {
    with(|driver| driver.reset_counts());
}

/// Makes the `nth` call of that name from now return `code`; `kernel:NAME` and `kernel` fail when the kernel runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_fail(call: *const c_char, nth: u64, code: c_uint) {
    let call = unsafe { text(call) };
    with(|driver| driver.fail(&call, nth.max(1), Code(code)));
}

/// Selects the build of the kernels: 0 plain, 1 instrumented.
#[unsafe(no_mangle)]
pub extern "C" fn standin_check(checked: c_int) {
    with(|driver| {
        driver.memory().mark_all_written();
        driver.checked = checked != 0;
    });
}

/// Seeds the order in which threads, blocks and streams run.
#[unsafe(no_mangle)]
pub extern "C" fn standin_seed(seed: u64) {
    with(|driver| driver.random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
}

/// 1 runs work when it is queued, 0 when the host waits for it.
#[unsafe(no_mangle)]
pub extern "C" fn standin_eager(eager: c_int) {
    with(|driver| driver.eager = eager != 0);
}

/// Lets threads take turns in an order of this seed: a thread often waits before its call until another one has made one. 0 ends it.
#[unsafe(no_mangle)]
pub extern "C" fn standin_interleave(seed: u64) {
    crate::interleave::set(seed);
}

/// Makes a slow device: an event is asked for in vain `polls` times, and no work runs before the host waits for it or has asked so
/// often. 0 ends it.
#[unsafe(no_mangle)]
pub extern "C" fn standin_stall(polls: u64) {
    with(|driver| driver.stall = polls);
}

/// Returns the report of the last violation or injected fatal failure, empty if none; valid until the next one.
#[unsafe(no_mangle)]
pub extern "C" fn standin_last_report() -> *const c_char {
    with(|driver| driver.report.as_ptr())
}

/// Clears errors, injected faults, captures and queued work, as a new process would; memory stays allocated.
#[unsafe(no_mangle)]
pub extern "C" fn standin_recover() {
    with(|driver| driver.recover());
}

/// Sets the registers of a thread of a kernel, as the assembler printed them; unknown ones are 32. A launch with more than a
/// multiprocessor has is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_registers(kernel: *const c_char, registers: c_uint) {
    let kernel = unsafe { text(kernel) };
    with(|driver| {
        driver.registers.insert(kernel, registers);
    });
}

/// Returns the names of the product's kernels, one per line.
#[unsafe(no_mangle)]
pub extern "C" fn standin_kernels() -> *const c_char {
    static NAMES: OnceLock<CString> = OnceLock::new();
    let list = NAMES.get_or_init(|| {
        let shipped = engine::FILES.iter().filter(|file| file.shipped);
        let mut names: Vec<&str> = shipped.flat_map(|file| file.kernels).copied().collect();
        names.sort_unstable();
        CString::new(names.join("\n")).expect("kernel names contain no NUL")
    });
    list.as_ptr()
}

/// Returns the number of live device allocations.
#[unsafe(no_mangle)]
pub extern "C" fn standin_live_allocations() -> usize {
    with(|driver| driver.memory().live())
}

/// Sets the size of each device's memory in bytes, and returns the size before. What is allocated stays.
#[unsafe(no_mangle)]
pub extern "C" fn standin_memory(bytes: usize) -> usize {
    with(|driver| std::mem::replace(&mut driver.memory().total, bytes))
}

/// Sets the number of devices, at most 8. Take away only devices without a context.
#[unsafe(no_mangle)]
pub extern "C" fn standin_devices(count: usize) {
    with(|driver| {
        let alive = (count..driver.devices.len()).any(|device| driver.is_active(device));
        assert!((1..=8).contains(&count) && !alive, "stand-in driver: {count} devices");
        driver.devices.resize(count, Device::default());
    });
}

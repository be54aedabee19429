//! The driver that tests of the CUDA path run on: a real one if there is a GPU, else the stand-in (`emulator/`).
//!
//! The stand-in is opened before anything asks for `libcuda.so`, so the loader returns it from then on.
//! `SELFSUP_DRIVER=real` or `stand-in` overrides. Its counters, injected faults and errors are per process, so tests that use
//! them run in a separate process ([`alone`]). That process has the stand-in, whatever the driver of the others: no test is left out
//! on a machine with a GPU.
//!
//! A test that runs kernels carries `#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]`, so that
//! a build without nvcc reports and counts it as ignored instead of failing.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use selfsup::device::{Device, Precision};

/// GPU 0 of this run's driver, with memory poisoned before each use; as it is with `SELFSUP_TEST_POISON=0`, for a checker that would
/// take poison for a value.
pub fn gpu(precision: Precision) -> Device {
    open();
    let device = Device::cuda(0, precision).unwrap_or_else(|e| panic!("{e}"));
    let poisons = std::env::var_os("SELFSUP_TEST_POISON").is_none_or(|poison| poison != "0");
    if poisons { device.poisoned() } else { device }
}

/// The stand-in driver, if this run uses it.
pub fn open() -> Option<&'static StandIn> {
    static DRIVER: OnceLock<Option<StandIn>> = OnceLock::new();
    let choose = || {
        let asked = std::env::var("SELFSUP_DRIVER").ok();
        let real = match asked.as_deref() {
            Some("real") => true,
            Some("stand-in") => false,
            Some(other) => panic!("SELFSUP_DRIVER is {other}, not real or stand-in"),
            None => there_is_a_gpu(),
        };
        println!("driver: {}", if real { "real" } else { "stand-in" });
        (!real).then(StandIn::open)
    };
    DRIVER.get_or_init(choose).as_ref()
}

/// Whether the machine's real driver finds a GPU. Closes the library again so that the stand-in can take its name.
fn there_is_a_gpu() -> bool {
    // SAFETY: two calls of the driver's documented interface.
    unsafe {
        let Ok(library) = libloading::Library::new("libcuda.so.1") else { return false };
        let init = library.get::<unsafe extern "C" fn(u32) -> c_int>("cuInit");
        let count = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>("cuDeviceGetCount");
        let (Ok(init), Ok(count)) = (init, count) else { return false };
        let mut gpus = 0;
        init(0) == 0 && count(&mut gpus) == 0 && gpus > 0
    }
}

/// Makes `program` use the driver of this run, without the self-test at the first use of a GPU, which has a test of its own.
pub fn with_driver(program: &mut Command) -> &mut Command {
    program.env("SELFSUP_CHECK", "skip");
    match open() {
        Some(_) => program.env("LD_PRELOAD", StandIn::path()),
        None => program,
    }
}

/// The control functions of the stand-in driver, described in `emulator/src/control.rs`.
#[derive(Debug)]
pub struct StandIn(libloading::Library);

impl StandIn {
    /// The file, which also stands in for NCCL.
    pub fn path() -> PathBuf {
        std::env::current_exe().unwrap().with_file_name("libcuda.so")
    }

    fn open() -> Self {
        let path = Self::path();
        // SAFETY: the library's initialisers have no side effects on this process.
        let library = unsafe { libloading::Library::new(&path) };
        let driver = Self(library.unwrap_or_else(|e| panic!("{}: {e}", path.display())));
        // A launch takes as many registers as on the chip on which its kernel needs most.
        for of in selfsup::device::resources() {
            let most =
                selfsup::device::resources().iter().filter(|other| other.kernel == of.kernel);
            driver.registers(of.kernel, most.map(|of| of.registers).max().unwrap() as u32);
        }
        // Check every memory access of every kernel, unless the process was started for speed.
        if std::env::var_os("SELFSUP_STAND_IN_CHECK").is_none() {
            driver.check(true);
        }
        driver
    }

    /// Switches the check of every memory access of every kernel on or off.
    pub fn check(&self, checked: bool) {
        // SAFETY: takes a number.
        unsafe {
            self.call::<unsafe extern "C" fn(c_int)>("standin_check")(c_int::from(checked));
        }
    }

    /// Clears errors and pending injected failures, like a new process.
    pub fn recover(&self) {
        // SAFETY: takes nothing.
        unsafe { self.call::<unsafe extern "C" fn()>("standin_recover")() }
    }

    /// # Safety
    /// `F` must be the type of the function `name`.
    unsafe fn call<F: Copy>(&self, name: &str) -> F {
        // SAFETY: the caller guarantees the type.
        *unsafe { self.0.get::<F>(name) }.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Sets all counts to zero.
    pub fn reset(&self) {
        // SAFETY: takes nothing.
        unsafe { self.call::<unsafe extern "C" fn()>("standin_reset_counts")() }
    }

    /// How often an event happened in this process: `cuMemAlloc`, `kernel:NAME`, `allocations`, `waits`; the bytes that were
    /// `downloaded`.
    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).unwrap();
        // SAFETY: takes a string.
        unsafe {
            self.call::<unsafe extern "C" fn(*const c_char) -> u64>("standin_count")(what.as_ptr())
        }
    }

    /// Makes the `nth` call of `call` from now on return `code`.
    pub fn fail(&self, call: &str, nth: u64, code: u32) {
        let call = CString::new(call).unwrap();
        // SAFETY: takes a string and two numbers.
        unsafe {
            self.call::<unsafe extern "C" fn(*const c_char, u64, u32)>("standin_fail")(
                call.as_ptr(),
                nth,
                code,
            );
        }
    }

    /// Sets the registers of a kernel's threads.
    pub fn registers(&self, kernel: &str, registers: u32) {
        let kernel = CString::new(kernel).unwrap();
        // SAFETY: takes a string and a number.
        unsafe {
            let set = self.call::<unsafe extern "C" fn(*const c_char, u32)>("standin_registers");
            set(kernel.as_ptr(), registers);
        }
    }

    /// Sets the number of GPUs.
    pub fn devices(&self, count: usize) {
        // SAFETY: takes a number.
        unsafe { self.call::<unsafe extern "C" fn(usize)>("standin_devices")(count) }
    }

    /// Lets threads take turns between their calls, in an order of this seed; 0 ends it.
    pub fn interleave(&self, seed: u64) {
        // SAFETY: takes a number.
        unsafe { self.call::<unsafe extern "C" fn(u64)>("standin_interleave")(seed) }
    }

    /// Makes a slow GPU, which an event is asked for in vain so often; 0 ends it.
    pub fn stall(&self, polls: u64) {
        // SAFETY: takes a number.
        unsafe { self.call::<unsafe extern "C" fn(u64)>("standin_stall")(polls) }
    }

    /// Sets the seed of the order in which threads, blocks and streams run.
    pub fn seed(&self, seed: u64) {
        // SAFETY: takes a number.
        unsafe { self.call::<unsafe extern "C" fn(u64)>("standin_seed")(seed) }
    }

    /// Live allocations of the GPUs' memory.
    pub fn live_allocations(&self) -> usize {
        // SAFETY: returns a number.
        unsafe { self.call::<unsafe extern "C" fn() -> usize>("standin_live_allocations")() }
    }

    /// Sets the size of the GPU's memory; returns the size before.
    pub fn memory(&self, bytes: usize) -> usize {
        // SAFETY: takes and returns a number.
        unsafe { self.call::<unsafe extern "C" fn(usize) -> usize>("standin_memory")(bytes) }
    }

    /// The last violation; empty if there was none.
    pub fn report(&self) -> String {
        // SAFETY: the returned string is valid until the next violation.
        unsafe {
            let report =
                self.call::<unsafe extern "C" fn() -> *const c_char>("standin_last_report")();
            CStr::from_ptr(report).to_string_lossy().into_owned()
        }
    }
}

/// Runs `test`, given its full name, in a separate process in which the stand-in driver does not check every access, which is ten
/// times faster. For complete steps, whose kernels the case table checks one by one. With a real driver it runs in this process.
pub fn unchecked(name: &str, test: impl FnOnce()) {
    const CHECK: &str = "SELFSUP_STAND_IN_CHECK";
    if std::env::var_os(CHECK).is_some() || open().is_none() {
        return test();
    }
    again(name, |program| program.env(CHECK, "0").env("SELFSUP_DRIVER", "stand-in"));
}

/// Runs `test` in a separate process, given the full name of the calling test: starts the test binary again for that one test. It runs
/// on the stand-in, which has counters and fails on request, on machines with a GPU too.
pub fn alone(name: &str, test: impl FnOnce(&StandIn)) {
    const MARK: &str = "SELFSUP_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return test(open().expect("the parent asked for the stand-in driver"));
    }
    again(name, |program| program.env(MARK, "1").env("SELFSUP_DRIVER", "stand-in"));
}

/// Runs `test`, given the full name of the calling test, on the stand-in: where the other tests run on a real driver, in a separate
/// process. For what a real GPU does not do on request, and for several GPUs.
pub fn on_stand_in(name: &str, test: impl FnOnce()) {
    match open() {
        Some(_) => test(),
        None => again(name, |program| program.env("SELFSUP_DRIVER", "stand-in")),
    }
}

/// Starts the test binary again for one test and prints its output.
fn again(name: &str, with: impl FnOnce(&mut Command) -> &mut Command) {
    const RAN: &str = "SELFSUP_STAND_IN_RAN";
    let mut program = Command::new(std::env::current_exe().unwrap());
    // Kernels that run in this process are listed apart: on a GPU a sanitizer sees only those.
    if let Ok(list) = std::env::var(RAN) {
        program.env(RAN, list + ".started");
    }
    let output = with(program.args(["--exact", name, "--nocapture"])).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    // With a name that matches no test the binary would also succeed.
    let ran = printed.contains("1 passed");
    assert!(output.status.success() && ran, "{name}, alone: {}\n{printed}", output.status);
    print!("{printed}");
}

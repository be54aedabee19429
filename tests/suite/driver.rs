//! The driver that tests of the CUDA path run on: a real one if there is a GPU, else the stand-in (`emulator/`).
//!
//! The stand-in is opened before anything asks for `libcuda.so`, and then is what the loader answers with.
//! `SELFSUP_DRIVER=real` or `stand-in` overrides. Its counters, injected faults and errors belong to the process, so
//! tests of those run in a process of their own ([`alone`]).
//!
//! A test that runs kernels carries `#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]`, so that
//! a build without nvcc reports and counts it as ignored instead of failing.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use selfsup::device::{Device, Precision};

/// GPU 0 of this run's driver, with memory that is poisoned before each use.
pub fn gpu(precision: Precision) -> Device {
    open();
    Device::cuda(0, precision).unwrap_or_else(|e| panic!("{e}")).poisoned()
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

/// Whether the machine's own driver finds a GPU. The library is closed again, so that it is not in the stand-in's way.
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

/// Gives a program to be started the driver of this run.
pub fn with_driver(program: &mut Command) -> &mut Command {
    match open() {
        Some(_) => program.env("LD_PRELOAD", StandIn::path()),
        None => program,
    }
}

/// The calls that only the stand-in driver has; `emulator/src/control.rs` describes them.
#[derive(Debug)]
pub struct StandIn(libloading::Library);

impl StandIn {
    fn path() -> PathBuf {
        std::env::current_exe().unwrap().with_file_name("libcuda.so")
    }

    fn open() -> Self {
        let path = Self::path();
        // SAFETY: the library has no initialisers that anything depends on.
        let library = unsafe { libloading::Library::new(&path) };
        let driver = Self(library.unwrap_or_else(|e| panic!("{}: {e}", path.display())));
        // Every access of every kernel is checked, unless the whole process asked for speed.
        if std::env::var_os("SELFSUP_STAND_IN_CHECK").is_none() {
            driver.check(true);
        }
        driver
    }

    /// Whether every access of every kernel is checked.
    pub fn check(&self, checked: bool) {
        // SAFETY: takes a number.
        unsafe {
            self.call::<unsafe extern "C" fn(c_int)>("standin_check")(c_int::from(checked));
        }
    }

    /// Forgets errors and failures to come, as a new process would.
    pub fn recover(&self) {
        // SAFETY: takes nothing.
        unsafe { self.call::<unsafe extern "C" fn()>("standin_recover")() }
    }

    /// # Safety
    /// `F` is the function's type.
    unsafe fn call<F: Copy>(&self, name: &str) -> F {
        // SAFETY: as this function's.
        *unsafe { self.0.get::<F>(name) }.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// How often something happened in this process: `cuMemAlloc`, `kernel:NAME`, `allocations`, `waits`.
    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).unwrap();
        // SAFETY: takes a string.
        unsafe {
            self.call::<unsafe extern "C" fn(*const c_char) -> u64>("standin_count")(what.as_ptr())
        }
    }

    /// Makes the `nth` such call from now answer `code`.
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

    /// What the last violation was; empty if none.
    pub fn report(&self) -> String {
        // SAFETY: gives a string that is valid until the next violation.
        unsafe {
            let report =
                self.call::<unsafe extern "C" fn() -> *const c_char>("standin_last_report")();
            CStr::from_ptr(report).to_string_lossy().into_owned()
        }
    }
}

/// Runs `test`, given its full name, where the stand-in driver does not check every access: in a process of its own, ten
/// times as fast. For whole steps, whose kernels the case table has checked one by one. A real driver runs it here.
pub fn unchecked(name: &str, test: impl FnOnce()) {
    const CHECK: &str = "SELFSUP_STAND_IN_CHECK";
    if std::env::var_os(CHECK).is_some() || open().is_none() {
        return test();
    }
    again(name, |program| program.env(CHECK, "0").env("SELFSUP_DRIVER", "stand-in"));
}

/// Runs `test` in a process of its own, given the full name of the calling test: the test binary again, for that one
/// test. On a real driver nothing can be counted, and the test says that it was skipped.
pub fn alone(name: &str, test: impl FnOnce(&StandIn)) {
    const MARK: &str = "SELFSUP_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return test(open().expect("the parent saw the stand-in driver"));
    }
    if open().is_none() {
        println!("skipped on a real driver: {name}");
        return;
    }
    again(name, |program| program.env(MARK, "1").env("SELFSUP_DRIVER", "stand-in"));
}

/// The test binary once more, for one test; its output is this test's.
fn again(name: &str, with: impl FnOnce(&mut Command) -> &mut Command) {
    let mut program = Command::new(std::env::current_exe().unwrap());
    let output = with(program.args(["--exact", name, "--nocapture"])).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    // A name that matches no test would succeed, too.
    let ran = printed.contains("1 passed");
    assert!(output.status.success() && ran, "{name}, alone: {}\n{printed}", output.status);
    print!("{printed}");
}

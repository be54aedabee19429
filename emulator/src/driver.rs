//! The driver's state, and the behaviour common to all calls: each call is counted, a test can make it fail, and after a
//! fatal error it returns that error.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::env;
use std::io::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::context::Device;
use crate::engine::Kernel;
use crate::memory::{Kind, Memory};
use crate::work::{Capture, Event, Graph, Stream};

/// A `CUresult` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub u32);

macro_rules! codes {
    ($($name:ident = $code:literal, $driver:literal, $text:literal;)*) => {
        impl Code {
            $(#[allow(dead_code)] // some codes are only named
            pub const $name: Code = Code($code);)*
        }
        /// Code, name and description, as the driver returns them.
        pub(crate) static CODES: &[(u32, &std::ffi::CStr, &std::ffi::CStr)] = &[$(($code, $driver, $text)),*];
    };
}

codes! {
    SUCCESS = 0, c"CUDA_SUCCESS", c"no error";
    INVALID_VALUE = 1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument";
    OUT_OF_MEMORY = 2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory";
    NOT_INITIALIZED = 3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error";
    UNAVAILABLE = 46, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable";
    NO_DEVICE = 100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected";
    INVALID_DEVICE = 101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal";
    INVALID_IMAGE = 200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid";
    INVALID_CONTEXT = 201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context";
    NO_BINARY = 209, c"CUDA_ERROR_NO_BINARY_FOR_GPU", c"no kernel image is available for execution on the device";
    ECC = 214, c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered";
    UNSUPPORTED_PTX = 222, c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", c"the provided PTX was compiled with an unsupported toolchain.";
    INVALID_HANDLE = 400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle";
    NOT_FOUND = 500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found";
    NOT_READY = 600, c"CUDA_ERROR_NOT_READY", c"device not ready";
    ILLEGAL_ADDRESS = 700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered";
    OUT_OF_RESOURCES = 701, c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch";
    LAUNCH_TIMEOUT = 702, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated";
    CONTEXT_IS_DESTROYED = 709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed";
    MISALIGNED = 716, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address";
    LAUNCH_FAILED = 719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure";
    COOPERATIVE_TOO_LARGE = 720, c"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", c"too many blocks in cooperative launch";
    NOT_SUPPORTED = 801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported";
    CAPTURE_UNSUPPORTED = 900, c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing";
    CAPTURE_INVALIDATED = 901, c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", c"operation failed due to a previous error during capture";
    CAPTURE_MERGE = 902, c"CUDA_ERROR_STREAM_CAPTURE_MERGE", c"operation would result in a merge of separate capture sequences";
    CAPTURE_UNMATCHED = 903, c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", c"capture was not ended in the same stream as it began";
    CAPTURE_UNJOINED = 904, c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", c"capturing stream has unjoined work";
    CAPTURE_ISOLATION = 905, c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", c"dependency created on uncaptured work in another stream";
    CAPTURE_IMPLICIT = 906, c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", c"operation would make the legacy stream depend on a capturing blocking stream";
    CAPTURED_EVENT = 907, c"CUDA_ERROR_CAPTURED_EVENT", c"operation not permitted on an event last recorded in a capturing stream";
    CAPTURE_WRONG_THREAD = 908, c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", c"attempt to terminate a thread-local capture sequence from another thread";
    UNKNOWN = 999, c"CUDA_ERROR_UNKNOWN", c"unknown error";
}

pub(crate) type CallResult<T = ()> = Result<T, Code>;

/// An injected failure.
struct Fault {
    call: String,
    /// Calls until it fails; 1 fails the next one.
    after: u64,
    code: Code,
}

/// A module that a program has loaded.
pub(crate) struct Module {
    pub context: usize,
    /// Its kernels for the device; `None` if its image does not say.
    pub kernels: Option<HashSet<String>>,
}

/// A kernel that a program has asked for.
#[derive(Clone, Copy)]
pub(crate) struct Function {
    pub kernel: &'static Kernel,
    /// The context that its module was loaded in, and the module.
    pub context: usize,
    pub module: usize,
    /// Its limit of dynamic shared memory.
    pub allowed: u32,
    /// Its preferred carve-out of shared memory in percent; -1 leaves that to the driver.
    pub carve_out: i32,
}

pub(crate) struct Driver {
    memory: Option<Memory>,
    /// `cuInit` has been called.
    pub initialized: bool,
    pub devices: Vec<Device>,
    /// Streams by handle, the default stream of each context under that of the context.
    pub streams: BTreeMap<usize, Stream>,
    pub events: HashMap<usize, Event>,
    pub captures: HashMap<usize, Capture>,
    /// Graphs and executable graphs.
    pub graphs: HashMap<usize, Graph>,
    pub modules: HashMap<usize, Module>,
    /// Functions by handle.
    pub functions: HashMap<usize, Function>,
    /// Registers of a thread of a kernel, where a test has said so.
    pub registers: HashMap<String, u32>,
    next_handle: usize,
    /// Whether instrumented kernels run instead of plain ones.
    pub checked: bool,
    pub eager: bool,
    /// How often the host asks for an event in vain, and nothing runs before it has to.
    pub stall: u64,
    pub random: u64,
    sticky: Option<Code>,
    pub report: std::ffi::CString,
    counts: HashMap<String, u64>,
    /// Calls of any name.
    calls: u64,
    faults: Vec<Fault>,
}

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(Driver::from_environment()));

/// Runs a driver call. It is counted under its name without the version suffix; `survives` says that it works after a fatal
/// error.
pub(crate) fn call(
    name: &str,
    survives: bool,
    body: impl FnOnce(&mut Driver) -> CallResult,
) -> u32 {
    crate::interleave::before_call();
    let result = locked_call(name, survives, body);
    crate::interleave::after_call();
    result.err().map_or(0, |code| code.0)
}

fn locked_call(
    name: &str,
    survives: bool,
    body: impl FnOnce(&mut Driver) -> CallResult,
) -> CallResult {
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    let base = base_name(name);
    driver.count(base);
    driver.calls += 1;
    match driver.sticky {
        Some(code) if !survives => Err(code),
        _ if !driver.initialized && !BEFORE_INIT.contains(&base) => Err(Code::NOT_INITIALIZED),
        _ => match driver.fault(base) {
            Some(code) if code.is_fatal() => {
                Err(driver.set_sticky(code, format!("{base}: an injected failure")))
            }
            Some(code) => Err(code),
            None => body(&mut driver),
        },
    }
}

/// Calls that work before `cuInit`.
const BEFORE_INIT: [&str; 5] =
    ["cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuGetProcAddress"];

/// Runs `body` on the driver's state, outside any driver call.
pub(crate) fn with<R>(body: impl FnOnce(&mut Driver) -> R) -> R {
    body(&mut DRIVER.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A variable of the environment that is a number.
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {value}")))
}

pub(crate) fn base_name(name: &str) -> &str {
    let name = name.strip_suffix("_ptsz").unwrap_or(name);
    match name.rsplit_once("_v") {
        Some((base, version)) if version.bytes().all(|b| b.is_ascii_digit()) => base,
        _ => name,
    }
}

impl Code {
    /// Whether every later call returns it too.
    fn is_fatal(self) -> bool {
        matches!(self.0, 46 | 214 | 700 | 702..=719 | 999)
    }
}

impl Driver {
    fn from_environment() -> Self {
        crate::interleave::set(number("SELFSUP_STAND_IN_INTERLEAVE").unwrap_or(0));
        let mut driver = Self {
            memory: None,
            initialized: false,
            devices: vec![
                Device::default();
                number("SELFSUP_STAND_IN_DEVICES").unwrap_or(1) as usize
            ],
            streams: BTreeMap::new(),
            events: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            registers: HashMap::new(),
            next_handle: 0x1000,
            checked: number("SELFSUP_STAND_IN_CHECK").unwrap_or(0) != 0,
            eager: number("SELFSUP_STAND_IN_EAGER").unwrap_or(0) != 0,
            stall: number("SELFSUP_STAND_IN_STALL").unwrap_or(0),
            random: number("SELFSUP_STAND_IN_SEED")
                .unwrap_or(1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                | 1,
            sticky: None,
            report: std::ffi::CString::default(),
            counts: HashMap::new(),
            calls: 0,
            faults: Vec::new(),
        };
        // NAME:NTH:CODE, separated by commas.
        for fault in env::var("SELFSUP_STAND_IN_FAIL").iter().flat_map(|v| v.split(',')) {
            let mut parts = fault.rsplitn(3, ':');
            let code = parts.next().and_then(|c| c.parse().ok());
            let nth = parts.next().and_then(|n| n.parse().ok());
            match (parts.next(), nth, code) {
                (Some(call), Some(nth), Some(code)) => driver.fail(call, nth, Code(code)),
                _ => panic!("SELFSUP_STAND_IN_FAIL: {fault} is not NAME:NTH:CODE"),
            }
        }
        driver
    }

    /// The device's memory: SELFSUP_STAND_IN_MEMORY bytes, or 2 GiB by default, of which the context takes
    /// SELFSUP_STAND_IN_CONTEXT, or 256 MiB.
    pub fn memory(&mut self) -> &mut Memory {
        self.memory.get_or_insert_with(|| {
            let total = number("SELFSUP_STAND_IN_MEMORY").unwrap_or(2 << 30) as usize;
            let context = number("SELFSUP_STAND_IN_CONTEXT").unwrap_or(256 << 20) as usize;
            assert!(context <= total, "SELFSUP_STAND_IN_CONTEXT: {context} of {total} bytes");
            Memory::new(total, context)
        })
    }

    pub fn handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    pub fn count(&mut self, what: &str) {
        self.count_by(what, 1);
    }

    pub fn count_by(&mut self, what: &str, more: u64) {
        match self.counts.get_mut(what) {
            Some(n) => *n += more,
            None => drop(self.counts.insert(what.to_owned(), more)),
        }
    }

    /// Counts a call that makes the host wait.
    pub fn count_wait(&mut self) {
        self.count("waits");
    }

    /// Runs all queued work if there was no call since `before` of them; returns their number.
    pub fn work_if_idle(&mut self, before: u64) -> u64 {
        if self.calls == before && self.sticky.is_none() {
            // An error is kept for the next call.
            let _ = self.drain_all();
        }
        self.calls
    }

    pub fn count_of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    pub fn reset_counts(&mut self) {
        self.counts.clear();
    }

    /// Makes the `nth` call from now fail.
    pub fn fail(&mut self, call: &str, nth: u64, code: Code) {
        self.faults.push(Fault { call: base_name(call).to_owned(), after: nth, code });
    }

    /// The code that this call must fail with, if a test asked for it.
    pub fn fault(&mut self, call: &str) -> Option<Code> {
        let mut due = None;
        self.faults.retain_mut(|fault| {
            if fault.call != call {
                return true;
            }
            fault.after -= 1;
            if fault.after == 0 {
                due = Some(fault.code);
            }
            fault.after > 0
        });
        due
    }

    /// Sets the error that every later call returns, and its report.
    pub fn set_sticky(&mut self, code: Code, report: String) -> Code {
        eprintln!("stand-in driver: {report}");
        self.report = std::ffi::CString::new(report).unwrap_or_default();
        self.sticky = Some(code);
        code
    }

    /// Resets everything but memory.
    pub fn recover(&mut self) {
        self.sticky = None;
        self.faults.clear();
        self.captures.clear();
        self.report = std::ffi::CString::default();
        for stream in self.streams.values_mut() {
            let Stream { non_blocking, context, .. } = *stream;
            *stream = Stream { non_blocking, context, ..Stream::default() };
        }
    }

    /// Appends the kernel's name to the file named by SELFSUP_STAND_IN_RAN, once per process.
    pub fn note_run(&mut self, kernel: &Kernel) {
        let key = format!("ran:{}", kernel.name);
        if self.count_of(&key) == 0 && kernel.file.shipped {
            self.count(&key);
            if let Ok(path) = env::var("SELFSUP_STAND_IN_RAN") {
                let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
                let written =
                    file.and_then(|mut f| f.write_all(format!("{}\n", kernel.name).as_bytes()));
                written.unwrap_or_else(|e| eprintln!("stand-in driver: cannot write {path}: {e}"));
            }
        }
    }

    /// Fails if a capture forbids unsafe calls, and invalidates that capture, as the driver does.
    pub fn require_no_capture(&mut self) -> CallResult {
        let me = std::thread::current().id();
        let mut result = Ok(());
        for capture in self.captures.values_mut() {
            if capture.mode == 0 || capture.mode == 1 && capture.thread == me {
                capture.invalidated = true;
                result = Err(Code::CAPTURE_UNSUPPORTED);
            }
        }
        result
    }

    pub fn allocate(&mut self, size: usize, kind: Kind) -> CallResult<usize> {
        if size == 0 {
            return Err(Code::INVALID_VALUE);
        }
        self.count("allocations");
        let context = self.in_context()?;
        let place = (context, self.device_of(context)?);
        self.memory().allocate(size, kind, place).ok_or(Code::OUT_OF_MEMORY)
    }
}

/// Describes an address for the engine's reports, while a launch runs and its caller holds the lock.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn standin_describe(at: usize, text: *mut u8, size: usize) {
    // The engine runs only inside `call`, on this thread, and the memory table does not change meanwhile.
    let memory = DESCRIBED.with(std::cell::Cell::get);
    let words = if memory.is_null() {
        format!("address {at:#x}")
    } else {
        unsafe { (*memory).describe(at) }
    };
    let n = words.len().min(size - 1);
    unsafe {
        std::ptr::copy_nonoverlapping(words.as_ptr(), text, n);
        *text.add(n) = 0;
    }
}

thread_local! {
    static DESCRIBED: std::cell::Cell<*const Memory> = const { std::cell::Cell::new(std::ptr::null()) };
}

impl Driver {
    /// Lets the engine describe addresses while `run` runs.
    pub fn describing<R>(&mut self, run: impl FnOnce() -> R) -> R {
        DESCRIBED.set(self.memory());
        let result = run();
        DESCRIBED.set(std::ptr::null());
        result
    }
}

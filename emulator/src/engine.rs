//! Bindings to the engine, and the table of kernels.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

/// A kernel file, compiled twice.
pub(crate) struct File {
    pub name: &'static CStr,
    /// Part of the product, not of this driver's own tests.
    pub shipped: bool,
    pub kernels: &'static [&'static str],
    pub plain: &'static [u8],
    pub checked: &'static [u8],
    /// Both builds, once loaded.
    loaded: [OnceLock<Library>; 2],
}

#[derive(Clone, Copy)]
struct Library(&'static Loaded);
// SAFETY: a constant of a library that is never unloaded.
unsafe impl Send for Library {}
unsafe impl Sync for Library {}

include!(concat!(env!("OUT_DIR"), "/files.rs"));

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dim3 {
    pub x: u32,
    pub y: u32,
    pub z: u32,
}

impl Dim3 {
    pub fn count(self) -> u64 {
        u64::from(self.x) * u64::from(self.y) * u64::from(self.z)
    }
}

/// Position of an argument in the parameter block, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameter {
    pub offset: usize,
    pub size: usize,
}

#[repr(C)]
struct Entry {
    name: *const c_char,
    call: *const c_void,
    parameters: *const Parameter,
    count: i32,
    bounds: i32,
}

/// The engine's record of a loaded library; only the size of static shared memory is read here.
#[repr(C)]
struct Loaded {
    library: *const c_void,
    tls_module: usize,
    tls_size: usize,
}

#[repr(C)]
struct Launch {
    loaded: *const Loaded,
    entry: *const Entry,
    grid: Dim3,
    block: Dim3,
    shared: u32,
    arguments: *const *const c_void,
    cooperative: bool,
    checked: bool,
    seed: u64,
}

unsafe extern "C" {
    fn engine_load(name: *const c_char, bytes: *const u8, size: usize) -> *const Loaded;
    fn engine_entry(loaded: *const Loaded, name: *const c_char) -> *const Entry;
    fn engine_run(launch: *const Launch) -> *const c_char;
    fn engine_memory(base: *const u8, size: usize);
    fn engine_first_unwritten(at: *const u8, size: usize) -> usize;
    fn engine_mark(at: *const u8, size: usize, state: u8);
}

/// State of a byte of device memory in the shadow memory.
#[derive(Clone, Copy)]
pub(crate) enum State {
    /// Inaccessible: free, or a guard.
    Inaccessible = 0x00,
    /// Allocated, and never written.
    Unwritten = 0xf0,
    Written = 0xff,
}

/// Sets the address range of device memory for the shadow memory.
pub(crate) fn set_device_range(base: usize, size: usize) {
    unsafe { engine_memory(base as *const u8, size) }
}

/// Sets the state of bytes in that range.
pub(crate) fn mark(at: usize, size: usize, state: State) {
    unsafe { engine_mark(at as *const u8, size, state as u8) }
}

/// Offset of the first of these bytes that was never written.
pub(crate) fn first_unwritten(at: usize, size: usize) -> Option<usize> {
    let first = unsafe { engine_first_unwritten(at as *const u8, size) };
    (first < size).then_some(first)
}

/// A kernel in one of its two builds.
struct Build {
    loaded: &'static Loaded,
    entry: &'static Entry,
}
// SAFETY: constants as well.
unsafe impl Send for Build {}
unsafe impl Sync for Build {}

/// A kernel of the table, loaded on first use.
pub(crate) struct Kernel {
    pub name: &'static str,
    pub file: &'static File,
    builds: [OnceLock<Build>; 2],
}

impl Kernel {
    fn build(&self, checked: bool) -> &Build {
        let which = usize::from(checked);
        self.builds[which].get_or_init(|| {
            let bytes = if checked { self.file.checked } else { self.file.plain };
            let name = std::ffi::CString::new(self.name).expect("a C++ name contains no NUL");
            unsafe {
                let loaded = *self.file.loaded[which].get_or_init(|| {
                    Library(&*engine_load(self.file.name.as_ptr(), bytes.as_ptr(), bytes.len()))
                });
                Build { loaded: loaded.0, entry: &*engine_entry(loaded.0, name.as_ptr()) }
            }
        })
    }

    pub fn parameters(&self) -> &[Parameter] {
        let entry = self.build(false).entry;
        unsafe { std::slice::from_raw_parts(entry.parameters, entry.count as usize) }
    }

    /// The maximum number of threads per block.
    pub fn bounds(&self) -> u32 {
        self.build(false).entry.bounds as u32
    }

    /// Bytes of static shared memory of the entire file, an upper bound for this kernel.
    pub fn static_shared(&self) -> usize {
        self.build(false).loaded.tls_size
    }

    /// Runs one launch to completion.
    ///
    /// # Errors
    /// If a thread violates a rule; the report names kernel, block and thread.
    pub fn run(
        &self,
        (grid, block, shared): (Dim3, Dim3, u32),
        arguments: &[Vec<u8>],
        cooperative: bool,
        checked: bool,
        seed: u64,
    ) -> Result<(), String> {
        let pointers: Vec<*const c_void> = arguments.iter().map(|a| a.as_ptr().cast()).collect();
        let build = self.build(checked);
        let launch = Launch {
            loaded: build.loaded,
            entry: build.entry,
            grid,
            block,
            shared,
            arguments: pointers.as_ptr(),
            cooperative,
            checked,
            seed,
        };
        let error = unsafe { engine_run(&launch) };
        if error.is_null() {
            return Ok(());
        }
        Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
    }
}

/// All kernels by name.
pub(crate) fn kernels() -> &'static HashMap<&'static str, Kernel> {
    static ALL: OnceLock<HashMap<&'static str, Kernel>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = HashMap::new();
        for file in &FILES {
            for name in file.kernels {
                let kernel = Kernel { name, file, builds: [OnceLock::new(), OnceLock::new()] };
                let twice = all.insert(*name, kernel).is_some();
                assert!(!twice, "stand-in driver: two kernels are named {name}");
            }
        }
        all
    })
}

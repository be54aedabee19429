//! Bindings to the engine, and the table of kernels.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs};

use cuda_on_host::host::{Build as Flavour, Host};
use cuda_on_host::source;

/// A kernel file, compiled twice.
pub(crate) struct File {
    pub name: &'static CStr,
    /// Part of the product, not of this driver's own tests.
    pub shipped: bool,
    pub kernels: &'static [&'static str],
    code: Code,
    /// Both builds, once loaded.
    loaded: [OnceLock<Library>; 2],
}

/// Where the two builds of a file come from.
enum Code {
    /// Plain and instrumented. A package of this crate has none.
    #[allow(dead_code)]
    Embedded([&'static [u8]; 2]),
    /// A source that the environment names: compiled when the first of its kernels is needed.
    Source(PathBuf),
}

impl Code {
    fn bytes(&self, checked: bool) -> Vec<u8> {
        match self {
            Code::Embedded(builds) => builds[usize::from(checked)].to_vec(),
            Code::Source(path) => compile(path, checked).unwrap_or_else(|why| {
                // There is no code for it among the driver's, and a test must not go on without its kernels.
                eprintln!("stand-in driver: {why}");
                std::process::abort()
            }),
        }
    }
}

/// The variable that names sources: their kernels take the place of embedded ones of the same name.
const SOURCES: &str = "SELFSUP_STAND_IN_SOURCES";

fn compile(path: &Path, checked: bool) -> Result<Vec<u8>, String> {
    let host = Host::new(&Host::default_cache())?;
    let folder = host.new_folder()?;
    let library = folder.join("kernels.so");
    let text = read(path)?;
    // The repository's own style, whose macros choose the host's functions.
    let foreign = !text.contains("KERNEL ");
    let code = if foreign {
        source::for_the_host(&text)
    } else {
        source::Rewritten { text: text.clone(), unknown: Vec::new() }
    };
    if let Some(unknown) = code.unknown.first() {
        return Err(format!(
            "{}:{}: the host does not know {}",
            path.display(),
            unknown.line,
            unknown.what
        ));
    }
    let build = Flavour { checked, foreign };
    let compiled = host.compile(path, &code.text, &signatures(path, &text)?, build, &library);
    let bytes = compiled.and_then(|()| fs::read(&library).map_err(|e| e.to_string()));
    let _ = fs::remove_dir_all(&folder); // a few files of a cache
    bytes.map_err(|why| format!("{} does not compile for the host: {why}", path.display()))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{SOURCES}: {}: {e}", path.display()))
}

fn signatures(path: &Path, text: &str) -> Result<Vec<source::Signature>, String> {
    source::kernels(text).map_err(|e| format!("{}:{}: {}", path.display(), e.line, e.what))
}

/// The files that the environment names.
fn named_files() -> Vec<&'static File> {
    let list = env::var_os(SOURCES).unwrap_or_default();
    let file = |path: PathBuf| -> Result<&'static File, String> {
        let text = read(&path)?;
        let names = signatures(&path, &text)?.into_iter().map(|kernel| &*kernel.name.leak());
        let kernels: Vec<&'static str> = names.collect();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = CString::new(name).map_err(|e| e.to_string())?;
        let loaded = [OnceLock::new(), OnceLock::new()];
        let code = Code::Source(path);
        // As long as the process: kernels are never unloaded.
        Ok(Box::leak(Box::new(File {
            name: Box::leak(name.into_boxed_c_str()),
            shipped: false,
            kernels: kernels.leak(),
            code,
            loaded,
        })))
    };
    let paths = env::split_paths(&list).filter(|path| !path.as_os_str().is_empty());
    paths.map(file).collect::<Result<_, _>>().unwrap_or_else(|why| {
        eprintln!("stand-in driver: {why}");
        std::process::abort()
    })
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
    fn engine_moved(read: *mut u64, written: *mut u64);
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

/// Bytes of device memory that the last launch of an instrumented kernel read and wrote, each once however often.
pub(crate) fn moved() -> [u64; 2] {
    let [mut read, mut written] = [0; 2];
    unsafe { engine_moved(&mut read, &mut written) };
    [read, written]
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
            let name = CString::new(self.name).expect("a C++ name contains no NUL");
            unsafe {
                let loaded = *self.file.loaded[which].get_or_init(|| {
                    let bytes = self.file.code.bytes(checked);
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

    /// Bytes of static shared memory of the entire file, or the most that a kernel may have: an upper bound for this kernel.
    pub fn static_shared(&self) -> usize {
        self.build(false).loaded.tls_size.min(48 << 10)
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
        let kernel = |name, file| Kernel { name, file, builds: [OnceLock::new(), OnceLock::new()] };
        for file in &FILES {
            for name in file.kernels {
                let twice = all.insert(*name, kernel(name, file)).is_some();
                assert!(!twice, "stand-in driver: two kernels are named {name}");
            }
        }
        for file in named_files() {
            all.extend(file.kernels.iter().map(|name| (*name, kernel(name, file))));
        }
        all
    })
}

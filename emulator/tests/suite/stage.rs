//! The test fixture: loads the stand-in driver first, so that cudarc finds it, and gives it to one test at a time.
//!
//! With `SELFSUP_DRIVER=real` the machine's own driver runs the kernels instead, from the fatbins in the folder
//! `SELFSUP_KERNELS`, as `scripts/gpu-bundle` does on a GPU. Tests that count calls, inject failures or run broken kernels
//! need the stand-in driver.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUresult, CUstream};
use cudarc::driver::{CudaContext, result};

/// The stand-in driver; `None` if the tests run on a real driver.
fn library() -> Option<&'static libloading::Library> {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let open = || {
        let folder = std::env::current_exe().expect("a path");
        let path = folder.with_file_name("libcuda.so");
        unsafe { libloading::Library::new(&path) }
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let real = || std::env::var_os("SELFSUP_DRIVER").is_some_and(|driver| driver == "real");
    LIBRARY.get_or_init(|| (!real()).then(open)).as_ref()
}

/// The images that a program loads: for the stand-in driver, the header of a fatbin without parts; else all fatbins.
fn images() -> Vec<Vec<u8>> {
    if library().is_some() {
        let magic = 0xba55_ed50_u32.to_le_bytes();
        return vec![[&magic[..], &[1, 0, 16, 0], &[0; 8]].concat()];
    }
    let folder = std::env::var("SELFSUP_KERNELS").expect("SELFSUP_KERNELS: a folder of fatbins");
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let fatbins = files.map(|file| file.unwrap().path());
    let fatbins = fatbins.filter(|path| path.extension().is_some_and(|e| e == "fatbin"));
    fatbins.map(|path| std::fs::read(path).unwrap()).collect()
}

/// A function that only the stand-in driver has.
pub fn own<F: Copy>(name: &str) -> F {
    let library =
        library().unwrap_or_else(|| panic!("{name}: only the stand-in driver has this function"));
    *unsafe { library.get::<F>(name) }.unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Exclusive access to a freshly reset driver.
pub struct Stage {
    pub context: Arc<CudaContext>,
    pub stream: CUstream,
    modules: Vec<sys::CUmodule>,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    /// Locks and resets the driver, with plain or instrumented kernels.
    pub fn take(checked: bool) -> Self {
        let turn = Self::turn();
        if library().is_none() {
            return Self::with(turn);
        }
        own::<extern "C" fn()>("standin_recover")();
        own::<extern "C" fn(c_int)>("standin_check")(c_int::from(checked));
        own::<extern "C" fn(c_int)>("standin_eager")(0);
        own::<extern "C" fn(u64)>("standin_seed")(7);
        own::<extern "C" fn()>("standin_reset_counts")();
        Self::with(turn)
    }

    /// Locks the driver as the environment configures it.
    pub fn start() -> Self {
        Self::with(Self::turn())
    }

    /// Opens the driver and calls nothing.
    pub fn open() {
        drop(Self::turn());
    }

    /// Locks and resets the driver, and makes no context: nobody retains one.
    pub fn bare() -> MutexGuard<'static, ()> {
        let turn = Self::turn();
        own::<extern "C" fn()>("standin_recover")();
        result::init().expect("a driver");
        turn
    }

    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        library();
        turn
    }

    fn with(turn: MutexGuard<'static, ()>) -> Self {
        let context = CudaContext::new(0).expect("the driver has a device");
        context.bind_to_thread().expect("a context");
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream");
        let load = |image: Vec<u8>| {
            let mut module = std::ptr::null_mut();
            let loaded = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            // Kernels for a different chip are missing.
            (loaded != CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU).then(|| {
                loaded.result().expect("a module");
                module
            })
        };
        let modules = images().into_iter().filter_map(load).collect();
        Self { context, stream, modules, _turn: turn }
    }

    pub fn seed(&self, seed: u64) {
        if library().is_none() {
            return; // a GPU chooses its own order
        }
        own::<extern "C" fn(u64)>("standin_seed")(seed);
    }

    pub fn eager(&self, eager: bool) {
        own::<extern "C" fn(c_int)>("standin_eager")(c_int::from(eager));
    }

    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).expect("no NUL");
        let count = own::<unsafe extern "C" fn(*const c_char) -> u64>("standin_count");
        unsafe { count(what.as_ptr()) }
    }

    pub fn fail(&self, call: &str, nth: u64, code: CUresult) {
        let call = CString::new(call).expect("no NUL");
        let f = own::<unsafe extern "C" fn(*const c_char, u64, u32)>("standin_fail");
        unsafe { f(call.as_ptr(), nth, code as u32) };
    }

    /// Sets the size of device memory; returns the size before.
    pub fn memory(&self, bytes: usize) -> usize {
        own::<extern "C" fn(usize) -> usize>("standin_memory")(bytes)
    }

    /// Sets the number of devices.
    pub fn devices(&self, count: usize) {
        own::<extern "C" fn(usize)>("standin_devices")(count);
    }

    /// Sets the registers of a kernel's threads.
    pub fn registers(&self, kernel: &str, registers: u32) {
        let kernel = CString::new(kernel).expect("no NUL");
        let set = own::<unsafe extern "C" fn(*const c_char, u32)>("standin_registers");
        unsafe { set(kernel.as_ptr(), registers) };
    }

    /// Lets threads take turns.
    pub fn interleave(&self, seed: u64) {
        own::<extern "C" fn(u64)>("standin_interleave")(seed);
    }

    /// Makes the device slow.
    pub fn stall(&self, polls: u64) {
        own::<extern "C" fn(u64)>("standin_stall")(polls);
    }

    pub fn report(&self) -> String {
        if library().is_none() {
            return String::new();
        }
        let text = own::<extern "C" fn() -> *const c_char>("standin_last_report")();
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    pub fn recover(&self) {
        own::<extern "C" fn()>("standin_recover")();
    }

    pub fn function(&self, name: &str) -> CUfunction {
        let name = CString::new(name).expect("no NUL");
        let find = |&module: &_| unsafe { result::module::get_function(module, name.clone()) }.ok();
        self.modules.iter().find_map(find).unwrap_or_else(|| panic!("unknown kernel {name:?}"))
    }

    /// Device memory with a copy of `host`.
    pub fn upload<T: Copy>(&self, host: &[T]) -> Memory<T> {
        let memory = self.room(host.len());
        unsafe { result::memcpy_htod_sync(memory.at, host) }.expect("an upload");
        // The copy may land after the call, and the stage's stream does not wait for the default one.
        unsafe { result::stream::synchronize(std::ptr::null_mut()) }.expect("landed");
        memory
    }

    /// Uninitialised device memory.
    pub fn room<T>(&self, len: usize) -> Memory<T> {
        let at = unsafe { result::malloc_sync(len * size_of::<T>()) }.expect("device memory");
        Memory { at, len, _kind: std::marker::PhantomData }
    }

    /// Queues a launch.
    pub fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &[Value],
    ) {
        self.try_launch(name, grid, block, shared, arguments, false)
            .unwrap_or_else(|e| panic!("{name}: {e:?}"));
    }

    pub fn try_launch(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &[Value],
        cooperative: bool,
    ) -> Result<(), result::DriverError> {
        let function = self.function(name);
        if shared > 48 << 10 {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            unsafe { sys::cuFuncSetAttribute(function, which, shared as c_int) }.result()?;
        }
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|a| a.0.as_ptr() as *mut c_void).collect();
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block[0], block[1], block[2]));
        unsafe {
            if cooperative {
                result::launch_cooperative_kernel(
                    function,
                    grid,
                    block,
                    shared,
                    self.stream,
                    &mut pointers,
                )
            } else {
                result::launch_kernel(function, grid, block, shared, self.stream, &mut pointers)
            }
        }
    }

    pub fn wait(&self) -> Result<(), result::DriverError> {
        unsafe { result::stream::synchronize(self.stream) }
    }
}

/// The bytes of an argument.
#[derive(Clone)]
pub struct Value(Vec<u8>);

macro_rules! values {
    ($($ty:ty),*) => { $(impl From<$ty> for Value {
        fn from(x: $ty) -> Self { Self(x.to_ne_bytes().to_vec()) }
    })* };
}
values!(i32, u32, f32, u64, i64, f64);

/// Device memory; freed when dropped.
pub struct Memory<T> {
    pub at: u64,
    pub len: usize,
    _kind: std::marker::PhantomData<T>,
}

impl<T> From<&Memory<T>> for Value {
    fn from(memory: &Memory<T>) -> Self {
        memory.at.into()
    }
}

impl<T: Copy + Default> Memory<T> {
    pub fn read(&self, stage: &Stage) -> Vec<T> {
        stage.wait().unwrap_or_else(|e| panic!("{e:?}: {}", stage.report()));
        let mut host = vec![T::default(); self.len];
        unsafe { result::memcpy_dtoh_sync(&mut host, self.at) }.expect("a download");
        host
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // After a violation every call returns its error.
        let _ = unsafe { result::free_sync(self.at) };
    }
}

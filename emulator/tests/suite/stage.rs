//! What tests need of the driver: it is loaded first, so that cudarc finds it, and one test has it at a time.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUresult, CUstream};
use cudarc::driver::{CudaContext, result};

fn library() -> &'static libloading::Library {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = std::env::current_exe().expect("a path");
        let path = folder.with_file_name("libcuda.so");
        unsafe { libloading::Library::new(&path) }
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    })
}

/// A function that only the stand-in driver has.
fn own<F: Copy>(name: &str) -> F {
    *unsafe { library().get::<F>(name) }.unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The driver, to oneself, fresh.
pub struct Stage {
    _context: Arc<CudaContext>,
    pub stream: CUstream,
    module: sys::CUmodule,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    /// Takes the driver, with plain or instrumented kernels.
    pub fn take(checked: bool) -> Self {
        let turn = Self::turn();
        own::<extern "C" fn()>("standin_recover")();
        own::<extern "C" fn(c_int)>("standin_check")(c_int::from(checked));
        own::<extern "C" fn(c_int)>("standin_eager")(0);
        own::<extern "C" fn(u64)>("standin_seed")(7);
        own::<extern "C" fn()>("standin_forget_counts")();
        Self::with(turn)
    }

    /// Takes it as the environment sets it up.
    pub fn start() -> Self {
        Self::with(Self::turn())
    }

    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        library();
        turn
    }

    fn with(turn: MutexGuard<'static, ()>) -> Self {
        let context = CudaContext::new(0).expect("the stand-in driver has one device");
        context.bind_to_thread().expect("a context");
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream");
        let mut module = std::ptr::null_mut();
        let image = 0xba55_ed50_u32.to_le_bytes();
        unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) }
            .result()
            .expect("a module");
        Self { _context: context, stream, module, _turn: turn }
    }

    pub fn seed(&self, seed: u64) {
        own::<extern "C" fn(u64)>("standin_seed")(seed);
    }

    pub fn eager(&self, eager: bool) {
        own::<extern "C" fn(c_int)>("standin_eager")(c_int::from(eager));
    }

    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).expect("no zero");
        let count = own::<unsafe extern "C" fn(*const c_char) -> u64>("standin_count");
        unsafe { count(what.as_ptr()) }
    }

    pub fn fail(&self, call: &str, nth: u64, code: CUresult) {
        let call = CString::new(call).expect("no zero");
        let f = own::<unsafe extern "C" fn(*const c_char, u64, u32)>("standin_fail");
        unsafe { f(call.as_ptr(), nth, code as u32) };
    }

    pub fn report(&self) -> String {
        let text = own::<extern "C" fn() -> *const c_char>("standin_last_report")();
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    pub fn recover(&self) {
        own::<extern "C" fn()>("standin_recover")();
    }

    pub fn function(&self, name: &str) -> CUfunction {
        let name = CString::new(name).expect("no zero");
        unsafe { result::module::get_function(self.module, name.clone()) }
            .unwrap_or_else(|e| panic!("{name:?}: {e}"))
    }

    /// Device memory with a copy of `host`.
    pub fn upload<T: Copy>(&self, host: &[T]) -> Memory<T> {
        let memory = self.room(host.len());
        unsafe { result::memcpy_htod_sync(memory.at, host) }.expect("an upload");
        memory
    }

    /// Device memory that nobody has written.
    pub fn room<T>(&self, len: usize) -> Memory<T> {
        let at = unsafe { result::malloc_sync(len * size_of::<T>()) }.expect("device memory");
        Memory { at, len, _kind: std::marker::PhantomData }
    }

    /// Queues a launch; `arguments` are the bytes of each.
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
        // After a violation the driver answers nothing but it.
        let _ = unsafe { result::free_sync(self.at) };
    }
}

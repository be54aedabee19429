//! NCCL, opened at run time: collectives between GPUs, queued on a GPU's compute stream.
//!
//! The functions and numbers are those of `nccl.h`, which has kept them since version 2.14. A collective is queued like a
//! kernel, so that a captured step contains it, and like a kernel's its errors come late: [`Communicator::failure`] asks for them.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use libloading::Library;

use super::lock;
use super::patience::Patience;
use crate::device::cuda::{In, Ring};
use crate::device::{Device, Memory, loader_says};

/// The variable that names the library to open.
const VARIABLE: &str = "SELFSUP_NCCL";
const SONAME: &str = "libnccl.so.2";

/// The oldest version with all calls in use: the number that `ncclGetVersion` returns, and its usual name.
const OLDEST: (c_int, &str) = (21_400, "2.14");

/// An element type, `ncclDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Kind {
    U8 = 1,
    I32 = 2,
    U64 = 5,
    F32 = 7,
    F64 = 8,
    Bf16 = 9,
}

/// A reduction, `ncclRedOp_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Reduction {
    Sum = 0,
    Max = 2,
    /// The sum divided by the number of ranks.
    Mean = 4,
}

/// What ranks need to find each other, `ncclUniqueId`: opaque bytes from one rank for all.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub [u8; 128]);

/// `ncclInProgress`.
const IN_PROGRESS: c_int = 7;

type Comm = *mut c_void;
type Stream = *mut c_void;

macro_rules! calls {
    ($($field:ident: $name:literal ($($arg:ty),*) -> $result:ty;)*) => {
        /// The functions in use, with their types.
        struct Calls { $($field: unsafe extern "C" fn($($arg),*) -> $result,)* }

        impl Calls {
            fn of(library: &Library) -> Result<Self, String> {
                Ok(Self { $($field: {
                    // SAFETY: the function has this type in every NCCL since 2.14.
                    let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> $result>($name) };
                    *found.map_err(|_| format!("lacks {}: it is no NCCL, or one older than {}", $name, OLDEST.1))?
                },)* })
            }
        }
    };
}

calls! {
    get_version: "ncclGetVersion" (*mut c_int) -> c_int;
    get_unique_id: "ncclGetUniqueId" (*mut UniqueId) -> c_int;
    comm_init_rank: "ncclCommInitRank" (*mut Comm, c_int, UniqueId, c_int) -> c_int;
    comm_destroy: "ncclCommDestroy" (Comm) -> c_int;
    comm_abort: "ncclCommAbort" (Comm) -> c_int;
    comm_async_error: "ncclCommGetAsyncError" (Comm, *mut c_int) -> c_int;
    error_string: "ncclGetErrorString" (c_int) -> *const c_char;
    last_error: "ncclGetLastError" (Comm) -> *const c_char;
    all_reduce: "ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    all_gather: "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
    broadcast: "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
}

/// An opened library.
pub(super) struct Nccl {
    calls: Calls,
    /// As `ncclGetVersion` returns it, such as 22803.
    version: c_int,
    path: PathBuf,
}

impl Nccl {
    /// The library of this process, opened by the first call.
    pub(super) fn get() -> Result<&'static Self, String> {
        static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
        NCCL.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, String> {
        let mut tried = Vec::new();
        for path in candidates() {
            match Self::load(&path) {
                Ok(nccl) => return Ok(nccl),
                Err(error) => tried.push(format!("{} ({error})", path.display())),
            }
        }
        Err(format!(
            "no NCCL can be opened, which several GPUs need: pip install nvidia-nccl-cu13, or set {VARIABLE} to a {SONAME}; tried: {}",
            tried.join("; ")
        ))
    }

    fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: NCCL's initialisers do nothing before its first call.
        let library = unsafe { Library::new(path) }.map_err(|e| loader_says(&e))?;
        let (calls, mut version) = (Calls::of(&library)?, 0);
        std::mem::forget(library); // never closed: its threads may run on
        // SAFETY: writes one int, and may be called at any time.
        let code = unsafe { (calls.get_version)(&mut version) };
        let nccl = Self { calls, version, path: path.to_path_buf() };
        nccl.check(code, std::ptr::null_mut())?;
        if version < OLDEST.0 {
            return Err(format!("is NCCL {}, older than {}", nccl.version(), OLDEST.1));
        }
        Ok(nccl)
    }

    fn version(&self) -> String {
        let v = self.version;
        // Since 2.9 the minor version has two digits.
        let [major, minor, patch] = if v < 10_000 {
            [v / 1000, v / 100 % 10, v % 100]
        } else {
            [v / 10_000, v / 100 % 100, v % 100]
        };
        format!("{major}.{minor}.{patch}")
    }

    fn check(&self, code: c_int, comm: Comm) -> Result<(), String> {
        if code == 0 || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return strings that live as long as the library or until the next error; a null communicator is allowed.
        let [what, detail] = unsafe {
            [(self.calls.error_string)(code), (self.calls.last_error)(comm)].map(|text| {
                let text = (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy());
                text.unwrap_or_default().trim().to_owned()
            })
        };
        Err(if detail.is_empty() { what } else { format!("{what}: {detail}") })
    }

    /// The id of a new communicator, for one rank to share with the others.
    pub(super) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes an id.
        self.check(unsafe { (self.calls.get_unique_id)(&mut id) }, std::ptr::null_mut())?;
        Ok(id)
    }
}

/// The connection of one GPU with those of the other ranks.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    comm: Comm,
    aborted: AtomicBool,
    /// Tells when queued work has ended, by a number that is sent behind it.
    ended: Mutex<(Ring, Memory)>,
    /// Keeps the GPU's context and stream.
    device: Device,
}

// SAFETY: a communicator may be used from any thread, one at a time; the group calls one at a time.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL {} on {}", self.nccl.version(), self.device)
    }
}

impl Communicator {
    /// Connects the GPUs of all ranks, which all call this with the same id. Waits for all of them.
    pub(super) fn new(
        device: &Device,
        id: UniqueId,
        rank: usize,
        size: usize,
    ) -> Result<Self, String> {
        let nccl = Nccl::get()?;
        let mut comm = std::ptr::null_mut();
        let (mut made, of_rank) = (Ok(()), [size, rank].map(|n| n as c_int));
        device.gpu().on_stream(|_| {
            // SAFETY: the GPU's context is current; the call writes a handle.
            let code =
                unsafe { (nccl.calls.comm_init_rank)(&mut comm, of_rank[0], id, of_rank[1]) };
            made = nccl.check(code, std::ptr::null_mut());
        });
        made?;
        device.check().map_err(|e| e.to_string())?;
        let mut number = Memory::new(device, size_of::<f32>());
        number.write(0, &[0; size_of::<f32>()]);
        let ended = Mutex::new((Ring::new(device, 1), number));
        Ok(Self { nccl, comm, aborted: AtomicBool::new(false), ended, device: device.clone() })
    }

    pub(super) fn is_of(&self, device: &Device) -> bool {
        self.device.same(device)
    }

    /// Queues a reduction of `count` elements at `address`, in place.
    ///
    /// # Safety
    /// There are that many elements of this kind.
    pub(super) unsafe fn all_reduce(
        &self,
        address: u64,
        count: usize,
        kind: Kind,
        reduction: Reduction,
    ) -> Result<(), String> {
        let at = std::ptr::without_provenance_mut::<c_void>(address as usize);
        let (kind, reduction) = (kind as c_int, reduction as c_int);
        // SAFETY: the caller vouches for the memory; the stream belongs to the communicator's device.
        self.queue(|stream| unsafe {
            (self.nccl.calls.all_reduce)(at, at, count, kind, reduction, self.comm, stream)
        })
    }

    /// Queues a gathering of `count` elements at `own` of every rank to `all`, in rank order.
    ///
    /// # Safety
    /// There are `count` elements of this kind at `own`, and room for those of all ranks at `all`.
    pub(super) unsafe fn all_gather(
        &self,
        own: u64,
        all: u64,
        count: usize,
        kind: Kind,
    ) -> Result<(), String> {
        let own = std::ptr::without_provenance::<c_void>(own as usize);
        let all = std::ptr::without_provenance_mut::<c_void>(all as usize);
        // SAFETY: as above.
        self.queue(|stream| unsafe {
            (self.nccl.calls.all_gather)(own, all, count, kind as c_int, self.comm, stream)
        })
    }

    /// Queues the replacement of `count` bytes at `address` by those of rank 0.
    ///
    /// # Safety
    /// There are that many bytes.
    pub(super) unsafe fn broadcast(&self, address: u64, count: usize) -> Result<(), String> {
        let at = std::ptr::without_provenance_mut::<c_void>(address as usize);
        // SAFETY: as above.
        self.queue(|stream| unsafe {
            (self.nccl.calls.broadcast)(at, at, count, Kind::U8 as c_int, 0, self.comm, stream)
        })
    }

    /// Waits for all work that is queued on the GPU's stream, as long as patience allows; then says why and ends the process.
    pub(super) fn settle(&self, patience: &Patience) -> Result<(), String> {
        let (mut ended, begin) = (lock(&self.ended), Instant::now());
        let (ring, number) = &mut *ended;
        ring.send(In::new(number.address(), size_of::<f32>()));
        while ring.poll(|| "waiting for the other ranks' GPUs".into()).is_none() {
            self.device.check().map_err(|e| e.to_string())?;
            if let Some(reason) = self.failure() {
                self.abort();
                return Err(reason);
            }
            if let Some(sentence) = patience.pause(begin.elapsed()) {
                let _ = writeln!(std::io::stderr(), "selfsup: {sentence}");
                self.abort();
                std::process::exit(1); // the launcher ends the others
            }
        }
        self.failure().map_or(Ok(()), Err)
    }

    fn queue(&self, collective: impl FnOnce(Stream) -> c_int) -> Result<(), String> {
        let mut code = 0;
        self.device.gpu().on_stream(|stream| code = collective(stream));
        self.nccl.check(code, self.comm)
    }

    /// What became of the collectives that were queued: an error of this rank or of its connections.
    pub(super) fn failure(&self) -> Option<String> {
        if self.aborted.load(Ordering::Acquire) {
            return None;
        }
        let mut state = 0;
        // SAFETY: the communicator exists; writes one int.
        let asked = unsafe { (self.nccl.calls.comm_async_error)(self.comm, &mut state) };
        let asked = self.nccl.check(asked, self.comm);
        asked.and_then(|()| self.nccl.check(state, self.comm)).err()
    }

    /// Ends queued collectives, which would wait for ever for a rank that does not come, so that the stream goes on.
    pub(super) fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            // SAFETY: no collective follows; the call also frees the communicator, which `drop` then leaves alone.
            unsafe { (self.nccl.calls.comm_abort)(self.comm) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if !self.aborted.load(Ordering::Acquire) {
            self.device.wait();
            let mut code = 0;
            self.device.gpu().on_stream(|_| {
                // SAFETY: queued work has ended, and captured work held this communicator.
                code = unsafe { (self.nccl.calls.comm_destroy)(self.comm) };
            });
        }
    }
}

/// Describes the NCCL of this machine, or says that there is none.
pub(super) fn describe() -> String {
    match Nccl::get() {
        Ok(nccl) => format!("nccl: {} ({})", nccl.version(), nccl.path.display()),
        Err(_) => format!(
            "nccl: none found; several GPUs need it: pip install nvidia-nccl-cu13, or set {VARIABLE} to a {SONAME}"
        ),
    }
}

/// Libraries to try, best first: the one that the variable names, the system's, and those of pip and conda.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    let environments =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].map(|name| std::env::var_os(name).map(PathBuf::from));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path)
        .map(|folder| folder.join("python3"))
        .find(|file| file.is_file());
    let of_python = python.and_then(|file| Some(file.parent()?.parent()?.to_owned()));
    let prefixes = environments.into_iter().chain([of_python, home]).flatten();
    [PathBuf::from(SONAME)]
        .into_iter()
        .chain(prefixes.flat_map(|prefix| installed_below(&prefix)))
        .collect()
}

/// The libraries that conda and pip have installed below a prefix.
fn installed_below(prefix: &Path) -> Vec<PathBuf> {
    let lib = prefix.join("lib");
    let versions =
        std::fs::read_dir(&lib).into_iter().flatten().flatten().map(|entry| entry.path());
    let pythons = versions.filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
    });
    let wheels = pythons.flat_map(|python| {
        ["site-packages", "dist-packages"]
            .map(|packages| python.join(packages).join("nvidia/nccl/lib").join(SONAME))
    });
    [lib.join(SONAME)].into_iter().chain(wheels).filter(|file| file.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheels_are_found_below_a_prefix() {
        let prefix = tempfile::tempdir().unwrap();
        let folder = prefix.path().join("lib/python3.12/site-packages/nvidia/nccl/lib");
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(installed_below(prefix.path()), Vec::<PathBuf>::new());
        std::fs::write(folder.join(SONAME), "").unwrap();
        assert_eq!(installed_below(prefix.path()), [folder.join(SONAME)]);
    }

    #[test]
    fn a_library_that_is_no_nccl_says_so_in_one_sentence() {
        let missing = Nccl::load(Path::new("/nowhere/libnccl.so.2")).err().unwrap();
        assert!(missing.contains("/nowhere/libnccl.so.2"), "{missing}");
        #[cfg(target_os = "linux")]
        {
            let other = Nccl::load(Path::new("libc.so.6")).err().unwrap();
            assert_eq!(other, "lacks ncclGetVersion: it is no NCCL, or one older than 2.14");
        }
    }
}

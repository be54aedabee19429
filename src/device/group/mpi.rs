//! MPI, opened at run time: whichever of its three binary interfaces the machine's library has.
//!
//! They are that of the MPI 5 standard (`libmpi_abi.so`), MPICH's (`libmpi.so.12`, also of Intel MPI, MVAPICH and Cray) and
//! Open MPI's (`libmpi.so.40`). The functions have the same names and arguments; constants and handles differ: a handle is a
//! small number, an `int`, or the address of a variable of the library.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libloading::{Library, Symbol};

use super::patience::Patience;
use crate::device::loader_says;

/// A binary interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abi {
    Standard,
    Mpich,
    OpenMpi,
}

/// A handle, as an argument. Where it is an `int`, the callee ignores the upper half of the register (System V's and Arm's
/// calling conventions for 64 bits).
type Handle = usize;

/// Sonames, in the order in which they are tried if the launcher does not say which MPI it belongs to.
const SONAMES: [(&str, Abi); 4] = [
    ("libmpi_abi.so.0", Abi::Standard),
    ("libmpi_abi.so.1", Abi::Standard),
    ("libmpi.so.40", Abi::OpenMpi),
    ("libmpi.so.12", Abi::Mpich),
];

/// The variable that names the library to open.
const VARIABLE: &str = "SELFSUP_MPI";

/// Length of the buffers that MPI writes texts to: more than any library's `MPI_MAX_LIBRARY_VERSION_STRING`.
const TEXT: usize = 8192;

/// Elements in a call: counts are `int`s, and few libraries have tested their largest.
const CHUNK: usize = 1 << 27;

/// Bytes from which a collective blocks in the library, which then takes half the time, once all ranks have come to it.
const LARGE: usize = 1 << 20;

macro_rules! calls {
    ($($field:ident: $name:literal ($($arg:ty),*);)*) => {
        /// The functions in use, with the types of their arguments.
        struct Calls { $($field: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        impl Calls {
            fn of(library: &Library) -> Result<Self, String> {
                Ok(Self { $($field: {
                    // SAFETY: the function has this type in every MPI since version 3.
                    let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_int>($name) };
                    *found.map_err(|e| format!("{} ({e})", $name))?
                },)* })
            }
        }
    };
}

calls! {
    initialized: "MPI_Initialized" (*mut c_int);
    init_thread: "MPI_Init_thread" (*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    query_thread: "MPI_Query_thread" (*mut c_int);
    finalize: "MPI_Finalize" ();
    abort: "MPI_Abort" (Handle, c_int);
    comm_rank: "MPI_Comm_rank" (Handle, *mut c_int);
    comm_size: "MPI_Comm_size" (Handle, *mut c_int);
    comm_set_errhandler: "MPI_Comm_set_errhandler" (Handle, Handle);
    error_string: "MPI_Error_string" (c_int, *mut c_char, *mut c_int);
    library_version: "MPI_Get_library_version" (*mut c_char, *mut c_int);
    allreduce: "MPI_Allreduce" (*const c_void, *mut c_void, c_int, Handle, Handle, Handle);
    allgather: "MPI_Allgather" (*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle);
    bcast: "MPI_Bcast" (*mut c_void, c_int, Handle, c_int, Handle);
    iallreduce: "MPI_Iallreduce" (*const c_void, *mut c_void, c_int, Handle, Handle, Handle, *mut Handle);
    iallgather: "MPI_Iallgather" (*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle, *mut Handle);
    ibcast: "MPI_Ibcast" (*mut c_void, c_int, Handle, c_int, Handle, *mut Handle);
    ibarrier: "MPI_Ibarrier" (Handle, *mut Handle);
    test: "MPI_Test" (*mut Handle, *mut c_int, *mut c_void);
}

/// The constants of a binary interface.
struct Constants {
    world: Handle,
    errors_return: Handle,
    float: Handle,
    double: Handle,
    int32: Handle,
    uint64: Handle,
    byte: Handle,
    sum: Handle,
    max: Handle,
    in_place: *const c_void,
    ignore: *mut c_void,
    /// `MPI_THREAD_SERIALIZED`: any thread may call, one at a time.
    serialized: c_int,
}

impl Constants {
    /// From `mpi_abi.h`, MPICH's `mpi.h` and the variables that Open MPI's `mpi.h` takes the addresses of.
    fn of(abi: Abi, library: &Library) -> Result<Self, String> {
        let address = |name: &str| -> Result<Handle, String> {
            // SAFETY: only the address is used.
            let symbol: Symbol<*const c_void> =
                unsafe { library.get(name) }.map_err(|e| e.to_string())?;
            Ok(*symbol as Handle)
        };
        Ok(match abi {
            Abi::Standard => Self {
                world: 0x101,
                errors_return: 0x143,
                float: 0x210,
                double: 0x214,
                int32: 0x250,
                uint64: 0x259,
                byte: 0x247,
                sum: 0x21,
                max: 0x23,
                in_place: std::ptr::without_provenance(1),
                ignore: std::ptr::null_mut(),
                serialized: 2048,
            },
            Abi::Mpich => Self {
                world: 0x4400_0000,
                errors_return: 0x5400_0001,
                float: 0x4c00_040a,
                double: 0x4c00_080b,
                int32: 0x4c00_0439,
                uint64: 0x4c00_083e,
                byte: 0x4c00_010d,
                sum: 0x5800_0003,
                max: 0x5800_0001,
                in_place: std::ptr::without_provenance(usize::MAX),
                ignore: std::ptr::without_provenance_mut(1),
                serialized: 2,
            },
            Abi::OpenMpi => Self {
                world: address("ompi_mpi_comm_world")?,
                errors_return: address("ompi_mpi_errors_return")?,
                float: address("ompi_mpi_float")?,
                double: address("ompi_mpi_double")?,
                int32: address("ompi_mpi_int32_t")?,
                uint64: address("ompi_mpi_uint64_t")?,
                byte: address("ompi_mpi_byte")?,
                sum: address("ompi_mpi_op_sum")?,
                max: address("ompi_mpi_op_max")?,
                in_place: std::ptr::without_provenance(1),
                ignore: std::ptr::null_mut(),
                serialized: 2,
            },
        })
    }
}

/// The type of reduced elements.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    F32,
    F64,
    I32,
    U64,
}

/// A reduction.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Sum,
    Max,
}

/// An opened library.
pub struct Mpi {
    calls: Calls,
    constants: Constants,
    /// Bytes from which collectives block.
    large: usize,
    /// The library, as it was opened.
    pub path: PathBuf,
}

// SAFETY: the pointers are constants, and the functions may be called from any thread; the group calls one at a time.
unsafe impl Send for Mpi {}
// SAFETY: as above.
unsafe impl Sync for Mpi {}

impl Mpi {
    /// Opens the library that goes with a launcher: the one that `SELFSUP_MPI` names, the one next to the launcher, or the one
    /// that the system finds.
    pub(super) fn open(of_launcher: Option<Abi>) -> Result<Self, String> {
        let mut tried = Vec::new();
        for (path, abi) in candidates(of_launcher) {
            match Self::load(&path, abi) {
                Ok(mpi) => return Ok(mpi),
                Err(error) => tried.push(error),
            }
        }
        Err(format!(
            "no MPI library can be opened: set {VARIABLE} to the launcher's, such as {VARIABLE}=/opt/mpich/lib/libmpi.so.12; tried: {}",
            tried.join("; ")
        ))
    }

    fn load(path: &Path, abi: Option<Abi>) -> Result<Self, String> {
        let library =
            open_library(path).map_err(|e| format!("{} ({})", path.display(), loader_says(&e)))?;
        let abi = abi.unwrap_or_else(|| abi_of(path, &library));
        let calls = Calls::of(&library)?;
        let constants = Constants::of(abi, &library)?;
        std::mem::forget(library); // never closed: its threads may run on
        Ok(Self { calls, constants, large: LARGE, path: path.to_path_buf() })
    }

    /// The library's name and version, in one line.
    pub(super) fn version(&self) -> String {
        let (mut text, mut length) = ([0_u8; TEXT], 0);
        // SAFETY: the buffer is longer than any version; the call is allowed at any time.
        unsafe { (self.calls.library_version)(text.as_mut_ptr().cast(), &mut length) };
        let text =
            String::from_utf8_lossy(&text[..(length.max(0) as usize).min(TEXT)]).into_owned();
        let line = text.lines().next().unwrap_or_default().trim_end_matches('\0');
        let words = line.split([',', '\t', ' ']).filter(|word| !word.is_empty());
        words.take(3).collect::<Vec<_>>().join(" ") // Open MPI adds its packager
    }

    /// Initialises MPI and returns the rank of this process and the number of processes.
    pub(super) fn init(&self) -> Result<[usize; 2], String> {
        let (mut already, mut level, serialized) = (0, 0, self.constants.serialized);
        // SAFETY: every call gets pointers to `int`s, and none but these may come before MPI_Init.
        unsafe {
            (self.calls.initialized)(&mut already);
            let none = std::ptr::null_mut();
            let code = match already {
                0 => (self.calls.init_thread)(none, std::ptr::null_mut(), serialized, &mut level),
                _ => (self.calls.query_thread)(&mut level),
            };
            if code != 0 {
                return Err(format!("MPI_Init_thread failed with code {code}"));
            }
        }
        if level < serialized {
            return Err(format!(
                "{} allows calls from one thread only: it needs MPI_THREAD_SERIALIZED",
                self.path.display()
            ));
        }
        let (world, errors_return) = (self.constants.world, self.constants.errors_return);
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI is initialised, and every call gets this interface's handles.
        unsafe {
            self.check((self.calls.comm_set_errhandler)(world, errors_return))?;
            self.check((self.calls.comm_rank)(world, &mut rank))?;
            self.check((self.calls.comm_size)(world, &mut size))?;
        }
        Ok([rank as usize, size as usize])
    }

    /// Never blocks in the library, on any rank, if one of them shares its core with others: blocked ranks keep their cores busy, and
    /// those that they wait for do not come to run.
    pub(super) fn agree_on_cores(
        &mut self,
        shared: bool,
        patience: &Patience,
    ) -> Result<(), String> {
        let mut any = [u64::from(shared)];
        // SAFETY: the kind is that of the values.
        unsafe { self.reduce(&mut any, Kind::U64, Op::Max, patience) }?;
        if any[0] > 0 {
            self.large = CHUNK; // more than that takes several calls, which only the blocking form makes
        }
        Ok(())
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let (mut text, mut length) = ([0_u8; TEXT], 0);
        // SAFETY: the buffer is longer than MPI_MAX_ERROR_STRING.
        unsafe { (self.calls.error_string)(code, text.as_mut_ptr().cast(), &mut length) };
        Err(String::from_utf8_lossy(&text[..(length.max(0) as usize).min(TEXT)]).into_owned())
    }

    /// Waits until all ranks have called.
    fn meet(&self, patience: &Patience) -> Result<(), String> {
        let mut request = 0;
        // SAFETY: MPI is initialised.
        self.check(unsafe { (self.calls.ibarrier)(self.constants.world, &mut request) })?;
        self.wait(request, patience)
    }

    /// Waits for the end of a collective. MPI's own waits would keep a core busy, also when there are more ranks than cores.
    fn wait(&self, mut request: Handle, patience: &Patience) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let mut done = 0;
            // SAFETY: the request is that of a collective that this rank began.
            self.check(unsafe {
                (self.calls.test)(&mut request, &mut done, self.constants.ignore)
            })?;
            if done != 0 {
                return Ok(());
            }
            if let Some(sentence) = patience.pause(begin.elapsed()) {
                // The collective may still write to its buffer, so that the process cannot go on with an error.
                let _ = writeln!(std::io::stderr(), "selfsup: {sentence}");
                self.abort(1);
            }
        }
    }

    /// Replaces elements by their sum or maximum over all ranks.
    ///
    /// # Safety
    /// `values` are of the kind.
    pub(super) unsafe fn reduce<T>(
        &self,
        values: &mut [T],
        kind: Kind,
        op: Op,
        patience: &Patience,
    ) -> Result<(), String> {
        let Constants { in_place, world, .. } = self.constants;
        let kind = match kind {
            Kind::F32 => self.constants.float,
            Kind::F64 => self.constants.double,
            Kind::I32 => self.constants.int32,
            Kind::U64 => self.constants.uint64,
        };
        let op = match op {
            Op::Sum => self.constants.sum,
            Op::Max => self.constants.max,
        };
        if size_of_val(values) >= self.large {
            self.meet(patience)?;
            return values.chunks_mut(CHUNK).try_for_each(|part| {
                let (at, count) = (part.as_mut_ptr().cast(), part.len() as c_int);
                // SAFETY: `at` points to `count` elements of the kind, and every rank has as many.
                self.check(unsafe { (self.calls.allreduce)(in_place, at, count, kind, op, world) })
            });
        }
        let (at, count, mut request) = (values.as_mut_ptr().cast(), values.len() as c_int, 0);
        // SAFETY: as above; the values stay where they are until the end of `wait`.
        self.check(unsafe {
            (self.calls.iallreduce)(in_place, at, count, kind, op, world, &mut request)
        })?;
        self.wait(request, patience)
    }

    /// Gathers the bytes of every rank, `own.len()` of each, into `all`, in rank order.
    pub(super) fn gather(
        &self,
        own: &[u8],
        all: &mut [u8],
        size: usize,
        patience: &Patience,
    ) -> Result<(), String> {
        let Constants { byte, world, .. } = self.constants;
        assert_eq!(all.len(), own.len() * size, "group: a place for each rank's bytes");
        let (from, to, n) = (own.as_ptr().cast(), all.as_mut_ptr().cast(), own.len() as c_int);
        if all.len() < self.large {
            let mut request = 0;
            // SAFETY: `from` has `n` bytes and `to` has `n` for each rank; both stay until the end of `wait`.
            self.check(unsafe {
                (self.calls.iallgather)(from, n, byte, to, n, byte, world, &mut request)
            })?;
            return self.wait(request, patience);
        }
        self.meet(patience)?;
        if all.len() <= CHUNK {
            // SAFETY: as above.
            return self
                .check(unsafe { (self.calls.allgather)(from, n, byte, to, n, byte, world) });
        }
        let step = (CHUNK / size).max(1);
        let mut some = vec![0; step * size];
        for (i, part) in own.chunks(step).enumerate() {
            self.gather(part, &mut some[..part.len() * size], size, patience)?;
            for (rank, part) in some[..part.len() * size].chunks(part.len()).enumerate() {
                all[rank * own.len() + i * step..][..part.len()].copy_from_slice(part);
            }
        }
        Ok(())
    }

    /// Replaces the bytes by those of rank 0.
    pub(super) fn broadcast(&self, bytes: &mut [u8], patience: &Patience) -> Result<(), String> {
        let Constants { byte, world, .. } = self.constants;
        if bytes.len() >= self.large {
            self.meet(patience)?;
            return bytes.chunks_mut(CHUNK).try_for_each(|part| {
                let (at, n) = (part.as_mut_ptr().cast(), part.len() as c_int);
                // SAFETY: `at` points to `n` bytes.
                self.check(unsafe { (self.calls.bcast)(at, n, byte, 0, world) })
            });
        }
        let (at, n, mut request) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int, 0);
        // SAFETY: as above; the bytes stay where they are until the end of `wait`.
        self.check(unsafe { (self.calls.ibcast)(at, n, byte, 0, world, &mut request) })?;
        self.wait(request, patience)
    }

    pub(super) fn barrier(&self, patience: &Patience) -> Result<(), String> {
        self.meet(patience)
    }

    /// Ends all ranks.
    pub(super) fn abort(&self, code: c_int) -> ! {
        // A launcher forwards what a rank prints, and drops what has not arrived when it ends the job: here, why it ends.
        std::thread::sleep(Duration::from_millis(500));
        // SAFETY: MPI is initialised. The call is the last one, and a library that could not end the others returns.
        unsafe { (self.calls.abort)(self.constants.world, code) };
        std::process::exit(code)
    }

    pub(super) fn finalize(&self) {
        // SAFETY: MPI is initialised, and the group calls nothing afterwards.
        unsafe { (self.calls.finalize)() };
    }
}

fn open_library(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: an MPI library's initialisers do nothing before MPI_Init.
    #[cfg(unix)]
    return unsafe {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        // Open MPI opens plugins that look for its symbols among the global ones.
        Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL).map(Into::into)
    };
    // SAFETY: as above.
    #[cfg(not(unix))]
    return unsafe { Library::new(path) };
}

/// Describes the MPI libraries that this machine has, one line each.
pub(super) fn describe() -> Vec<String> {
    let mut seen = Vec::new();
    for (path, abi) in candidates(None) {
        if let Ok(mpi) = Mpi::load(&path, abi) {
            seen.push(format!("mpi: {} ({})", mpi.version(), path.display()));
            break; // two MPIs in one process would mix up their symbols
        }
    }
    if seen.is_empty() {
        seen.push("mpi: no library found; it is needed to train in several processes".into());
    }
    seen
}

/// The interface of a library of any name.
fn abi_of(path: &Path, library: &Library) -> Abi {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // SAFETY: only the presence of the variable is asked for.
    let open_mpi = unsafe { library.get::<*const c_void>("ompi_mpi_comm_world") }.is_ok();
    match () {
        () if name.contains("mpi_abi") => Abi::Standard,
        () if open_mpi => Abi::OpenMpi,
        () => Abi::Mpich,
    }
}

/// Libraries to try, best first.
fn candidates(of_launcher: Option<Abi>) -> Vec<(PathBuf, Option<Abi>)> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return vec![(path.into(), None)];
    }
    let mut sonames = SONAMES.to_vec();
    // A launcher's own interface before the standard's: libraries have had it for longer.
    sonames.sort_by_key(|(_, abi)| match of_launcher {
        Some(own) if *abi == own => 0,
        Some(_) if *abi == Abi::Standard => 1,
        Some(_) => 2,
        None => 0,
    });
    let folders = launcher_libraries();
    let beside = sonames.iter().flat_map(|(name, abi)| {
        let files = folders.iter().map(move |folder| folder.join(name));
        files.filter(|file| file.is_file()).map(|file| (file, Some(*abi)))
    });
    let by_name = sonames.iter().map(|(name, abi)| (PathBuf::from(name), Some(*abi)));
    beside.chain(by_name).collect()
}

/// The `lib` folders next to the programs that started this one, nearest first, and next to `mpiexec`: a launcher and its
/// library are installed together.
fn launcher_libraries() -> Vec<PathBuf> {
    /// Launchers may start a shell, and that the program.
    const ANCESTORS: usize = 4;
    let mut programs = Vec::new();
    let mut process = "self".to_owned();
    for _ in 0..ANCESTORS {
        let Some(parent) = parent_of(&process) else { break };
        programs.extend(std::fs::read_link(format!("/proc/{parent}/exe")));
        process = parent;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("mpiexec"));
    programs.extend(on_path.filter(|file| file.is_file()));
    let lib = |program: &PathBuf| Some(program.parent()?.parent()?.join("lib"));
    programs.iter().filter_map(lib).collect()
}

/// The number of a process's parent, on Linux.
fn parent_of(process: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim();
    (parent != "0").then(|| parent.to_owned())
}

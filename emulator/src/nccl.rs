//! NCCL's interface: collectives as host functions on the caller's stream, with a socket between the processes.
//!
//! Rank 0 listens; every other rank sends it its values, and gets the result back. What a real library leaves to chance is
//! checked: ranks that call different collectives, or with other counts, all fail with a sentence that names both.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::driver::with;
use crate::engine::{self, State};
use crate::work::Work;

/// Version 2.28.3.
const VERSION: c_int = 22_803;

const SUCCESS: c_int = 0;
const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;

/// How long a rank waits for another, unless `SELFSUP_STAND_IN_NCCL_SECONDS` says otherwise. A real library waits for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a host must have made no call of the driver until its queued work runs by itself, as a GPU's does.
const IDLE: Duration = Duration::from_millis(2);

/// `ncclUniqueId`: the address of rank 0, as text.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

/// A communicator, never freed: a call on one that was destroyed is an error and not a crash.
pub struct Communicator {
    rank: usize,
    size: usize,
    links: Mutex<Vec<TcpStream>>,
    /// The first failure, with its code.
    failure: Mutex<Option<(c_int, CString)>>,
    destroyed: AtomicBool,
}

/// The sockets of ids that rank 0 has made.
static LISTENERS: LazyLock<Mutex<HashMap<String, TcpListener>>> = LazyLock::new(Mutex::default);

/// What went wrong last without a communicator.
static LAST: Mutex<Option<CString>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn limit() -> Duration {
    let seconds = std::env::var("SELFSUP_STAND_IN_NCCL_SECONDS").ok();
    seconds.and_then(|s| s.parse().ok()).map_or(LIMIT, Duration::from_secs_f64)
}

/// A collective, as it was queued.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Call {
    what: What,
    /// `ncclDataType_t`
    kind: u32,
    /// Elements of each rank.
    count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// With an `ncclRedOp_t`.
    AllReduce(u32),
    AllGather,
    /// Of the values of this rank.
    Broadcast(u32),
}

impl Call {
    fn bytes(self) -> usize {
        self.count as usize * size_of_kind(self.kind).unwrap_or(0)
    }

    /// Bytes of the result.
    fn result(self, ranks: usize) -> usize {
        self.bytes() * if self.what == What::AllGather { ranks } else { 1 }
    }

    fn to_bytes(self) -> [u8; 24] {
        let (what, reduction) = match self.what {
            What::AllReduce(reduction) => (0_u32, reduction),
            What::AllGather => (1, 0),
            What::Broadcast(root) => (2, root),
        };
        let mut bytes = [0; 24];
        for (i, word) in [what, reduction, self.kind, 0].into_iter().enumerate() {
            bytes[i * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[16..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 24]) -> Self {
        let word = |i: usize| u32::from_le_bytes(bytes[i * 4..][..4].try_into().expect("4 bytes"));
        let what = match word(0) {
            0 => What::AllReduce(word(1)),
            1 => What::AllGather,
            _ => What::Broadcast(word(1)),
        };
        let count = u64::from_le_bytes(bytes[16..].try_into().expect("8 bytes"));
        Self { what, kind: word(2), count }
    }

    fn name(self) -> String {
        let kind = match self.kind {
            2 => "int32",
            5 => "uint64",
            7 => "float",
            8 => "double",
            9 => "bfloat16",
            _ => "bytes",
        };
        let what = match self.what {
            What::AllReduce(0) => "all-reduces by sum",
            What::AllReduce(2) => "all-reduces by maximum",
            What::AllReduce(_) => "all-reduces by mean",
            What::AllGather => "all-gathers",
            What::Broadcast(_) => "broadcasts",
        };
        format!("{what} {} of type {kind}", self.count)
    }
}

fn size_of_kind(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 => Some(1),
        9 => Some(2),
        2 | 7 => Some(4),
        5 | 8 => Some(8),
        _ => None,
    }
}

/// Reduces the values of all ranks, in rank order, to `all[0]`.
fn reduce(all: &mut [Vec<u8>], kind: u32, reduction: u32) {
    macro_rules! elements {
        ($type:ty, $wide:ty, $from:expr, $to:expr) => {{
            const SIZE: usize = size_of::<$type>();
            let ranks = all.len();
            for i in 0..all[0].len() / SIZE {
                let value = |part: &Vec<u8>| -> $wide {
                    let bytes = part[i * SIZE..][..SIZE].try_into().expect("an element");
                    $from(<$type>::from_le_bytes(bytes))
                };
                let mut result = value(&all[0]);
                for part in &all[1..] {
                    let other = value(part);
                    result = match reduction {
                        2 => {
                            if other > result {
                                other
                            } else {
                                result
                            }
                        }
                        _ => result + other,
                    };
                }
                if reduction == 4 {
                    result /= ranks as $wide;
                }
                all[0][i * SIZE..][..SIZE].copy_from_slice(&($to(result) as $type).to_le_bytes());
            }
        }};
    }
    match kind {
        2 => elements!(i32, i64, i64::from, |v: i64| v as i32),
        5 => elements!(u64, u64, u64::from, u64::from),
        7 => elements!(f32, f64, f64::from, |v: f64| v as f32),
        8 => elements!(f64, f64, f64::from, f64::from),
        // bf16 is the upper half of an f32; rounded to nearest even.
        _ => elements!(u16, f32, |v: u16| f32::from_bits(u32::from(v) << 16), |v: f32| {
            let bits = v.to_bits();
            if v.is_nan() { 0x7fc0 } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
        }),
    }
}

impl Communicator {
    /// Exchanges a rank's values, or fails on all ranks alike.
    fn exchange(&self, call: Call, own: &[u8]) -> Result<Vec<u8>, (c_int, String)> {
        let mut links = lock(&self.links);
        let lost = |rank: usize| {
            move |e: io::Error| match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => (
                    REMOTE_ERROR,
                    format!("rank {rank} has not come within {:.0} s", limit().as_secs_f64()),
                ),
                _ => (REMOTE_ERROR, format!("rank {rank} has left")),
            }
        };
        if self.rank > 0 {
            let link = &mut links[0];
            link.write_all(&call.to_bytes()).and_then(|()| link.write_all(own)).map_err(lost(0))?;
            let mut head = [0; 8];
            link.read_exact(&mut head).map_err(lost(0))?;
            let [code, complaint] = [0, 4].map(|at| {
                u32::from_le_bytes(head[at..][..4].try_into().expect("4 bytes")) as usize
            });
            if code > 0 {
                let mut text = vec![0; complaint];
                link.read_exact(&mut text).map_err(lost(0))?;
                return Err((code as c_int, String::from_utf8_lossy(&text).into_owned()));
            }
            let mut result = vec![0; call.result(self.size)];
            link.read_exact(&mut result).map_err(lost(0))?;
            return Ok(result);
        }
        let mut all = vec![own.to_vec()];
        let mut wrong = None;
        for (i, link) in links.iter_mut().enumerate() {
            let (rank, mut head) = (i + 1, [0; 24]);
            if let Err(error) = link.read_exact(&mut head) {
                wrong.get_or_insert(lost(rank)(error));
                continue;
            }
            let other = Call::from_bytes(head);
            let mut values = vec![0; other.bytes()];
            if let Err(error) = link.read_exact(&mut values) {
                wrong.get_or_insert(lost(rank)(error));
            } else if other != call {
                let sentence = format!("rank 0 {}, and rank {rank} {}", call.name(), other.name());
                wrong.get_or_insert((INVALID_USAGE, sentence));
            }
            all.push(values);
        }
        if let Some((code, sentence)) = wrong {
            for link in links.iter_mut() {
                let head =
                    [(code as u32).to_le_bytes(), (sentence.len() as u32).to_le_bytes()].concat();
                // A rank that has left hears nothing.
                let _ = link.write_all(&head).and_then(|()| link.write_all(sentence.as_bytes()));
            }
            return Err((code, sentence));
        }
        let result = match call.what {
            What::AllReduce(reduction) => {
                reduce(&mut all, call.kind, reduction);
                all.swap_remove(0)
            }
            What::AllGather => all.concat(),
            What::Broadcast(root) => all.swap_remove(root as usize),
        };
        for (i, link) in links.iter_mut().enumerate() {
            link.write_all(&[0; 8]).and_then(|()| link.write_all(&result)).map_err(lost(i + 1))?;
        }
        Ok(result)
    }

    fn fail(&self, code: c_int, sentence: &str) {
        let text = CString::new(sentence.replace('\0', "")).unwrap_or_default();
        lock(&self.failure).get_or_insert((code, text));
    }

    fn has_failed(&self) -> bool {
        lock(&self.failure).is_some()
    }
}

/// What a host function gets. Leaked: a captured one runs again and again.
struct Queued {
    communicator: &'static Communicator,
    call: Call,
    from: usize,
    to: usize,
}

/// Runs a collective, on the thread that runs the stream's work and holds the driver's lock.
unsafe extern "C" fn run(data: *mut c_void) {
    let Queued { communicator, call, from, to } = unsafe { &*data.cast::<Queued>() };
    let result = call.result(communicator.size);
    let bytes = if communicator.destroyed.load(Ordering::Relaxed) {
        // A real library would read freed memory.
        eprintln!("stand-in for NCCL: a collective runs on a communicator that was destroyed");
        std::process::abort();
    } else if communicator.has_failed() {
        None
    } else {
        let own = unsafe { std::slice::from_raw_parts(*from as *const u8, call.bytes()) };
        communicator
            .exchange(*call, own)
            .map_err(|(code, sentence)| communicator.fail(code, &sentence))
            .ok()
    };
    // After a failure NaN, as the driver's unwritten memory.
    let bytes = bytes.unwrap_or_else(|| vec![0xff; result]);
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), *to as *mut u8, result) };
    engine::mark(*to, result, State::Written);
}

fn queue(
    communicator: *const Communicator,
    stream: usize,
    call: Call,
    from: usize,
    to: usize,
) -> c_int {
    let communicator = unsafe { &*communicator };
    if size_of_kind(call.kind).is_none() || (call.count > 0 && (from == 0 || to == 0)) {
        communicator.fail(INVALID_ARGUMENT, "a null address, or a type that is not supported");
        return INVALID_ARGUMENT;
    }
    if let Some((code, _)) = &*lock(&communicator.failure) {
        return *code;
    }
    let data: &'static Queued = Box::leak(Box::new(Queued { communicator, call, from, to }));
    let pushed =
        with(|driver| driver.push(stream, Work::Host(run, std::ptr::from_ref(data) as usize)));
    if pushed.is_ok() { SUCCESS } else { 1 }
}

/// Runs queued work while the host makes no calls of the driver: a GPU works on while its host waits for another process.
fn work_while_the_host_is_idle() {
    static STARTED: std::sync::Once = std::sync::Once::new();
    STARTED.call_once(|| {
        std::thread::spawn(|| {
            let mut before = 0;
            loop {
                std::thread::sleep(IDLE);
                before = with(|driver| driver.work_if_idle(before));
            }
        });
    });
}

/// Connects the ranks.
fn connect(id: &UniqueId, rank: usize, size: usize) -> io::Result<Vec<TcpStream>> {
    let address =
        CStr::from_bytes_until_nul(&id.0).map_err(io::Error::other)?.to_string_lossy().into_owned();
    let (begin, limit) = (Instant::now(), limit());
    let prepare = |link: &TcpStream| {
        link.set_nodelay(true)?;
        link.set_nonblocking(false)?;
        link.set_read_timeout(Some(limit))
    };
    if size == 1 {
        return Ok(Vec::new());
    }
    if rank > 0 {
        let mut link = loop {
            match TcpStream::connect(&address) {
                Ok(link) => break link,
                Err(error) if begin.elapsed() > limit => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        prepare(&link)?;
        link.write_all(&[rank as u32, size as u32].map(u32::to_le_bytes).concat())?;
        return Ok(vec![link]);
    }
    let listener = lock(&LISTENERS).remove(&address);
    let listener = listener.map_or_else(|| TcpListener::bind(&address), Ok)?;
    listener.set_nonblocking(true)?;
    let mut links: Vec<Option<TcpStream>> = (1..size).map(|_| None).collect();
    while links.iter().any(Option::is_none) {
        match listener.accept() {
            Ok((mut link, _)) => {
                prepare(&link)?;
                let mut head = [0; 8];
                link.read_exact(&mut head)?;
                let [other, ranks] = [0, 4].map(|at| {
                    u32::from_le_bytes(head[at..][..4].try_into().expect("4 bytes")) as usize
                });
                let wrong =
                    || io::Error::other(format!("rank {other} of {ranks} came to {size} ranks"));
                if ranks != size {
                    return Err(wrong());
                }
                let place =
                    other.checked_sub(1).and_then(|i| links.get_mut(i)).filter(|l| l.is_none());
                *place.ok_or_else(wrong)? = Some(link);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && begin.elapsed() < limit => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(links.into_iter().flatten().collect())
}

fn failed(code: c_int, error: &dyn std::fmt::Display) -> c_int {
    *lock(&LAST) = CString::new(error.to_string()).ok();
    code
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = VERSION };
    SUCCESS
}

/// With `NCCL_COMM_ID=host:port` that address; otherwise that of a socket of this process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    let address = match std::env::var("NCCL_COMM_ID") {
        Ok(address) => address,
        Err(_) => {
            let bound = TcpListener::bind("127.0.0.1:0");
            match bound.and_then(|listener| Ok((listener.local_addr()?.to_string(), listener))) {
                Ok((address, listener)) => {
                    lock(&LISTENERS).insert(address.clone(), listener);
                    address
                }
                Err(error) => return failed(SYSTEM_ERROR, &error),
            }
        }
    };
    if address.len() > 127 {
        return failed(INVALID_ARGUMENT, &"NCCL_COMM_ID is too long");
    }
    let mut bytes = [0; 128];
    bytes[..address.len()].copy_from_slice(address.as_bytes());
    unsafe { *id = UniqueId(bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(
    to: *mut *const Communicator,
    size: c_int,
    id: UniqueId,
    rank: c_int,
) -> c_int {
    if !(0..size).contains(&rank) {
        return failed(INVALID_ARGUMENT, &format!("rank {rank} of {size}"));
    }
    let (rank, size) = (rank as usize, size as usize);
    let links = match connect(&id, rank, size) {
        Ok(links) => Mutex::new(links),
        Err(error) => return failed(SYSTEM_ERROR, &error),
    };
    if size > 1 {
        work_while_the_host_is_idle();
    }
    let (failure, destroyed) = (Mutex::default(), AtomicBool::new(false));
    let made = Box::leak(Box::new(Communicator { rank, size, links, failure, destroyed }));
    unsafe { *to = made };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(communicator: *const Communicator) -> c_int {
    let communicator = unsafe { &*communicator };
    communicator.destroyed.store(true, Ordering::Relaxed);
    lock(&communicator.links).clear();
    SUCCESS
}

/// Queued collectives end, with NaN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(communicator: *const Communicator) -> c_int {
    let communicator = unsafe { &*communicator };
    communicator.fail(REMOTE_ERROR, "aborted");
    lock(&communicator.links).clear();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(
    communicator: *const Communicator,
    code: *mut c_int,
) -> c_int {
    let failure = lock(unsafe { &(*communicator).failure });
    unsafe { *code = failure.as_ref().map_or(SUCCESS, |(code, _)| *code) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        SUCCESS => c"no error",
        1 => c"unhandled cuda error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// The sentence of a communicator's failure, or of the last failure without one. Valid until the next.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(communicator: *const Communicator) -> *const c_char {
    let of = if communicator.is_null() { None } else { Some(unsafe { &*communicator }) };
    let text = of.and_then(|of| lock(&of.failure).as_ref().map(|(_, text)| text.as_ptr()));
    text.or_else(|| lock(&LAST).as_ref().map(|text| text.as_ptr())).unwrap_or(c"".as_ptr())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    from: usize,
    to: usize,
    count: usize,
    kind: c_int,
    reduction: c_int,
    communicator: *const Communicator,
    stream: usize,
) -> c_int {
    if ![0, 2, 4].contains(&reduction) {
        return failed(INVALID_ARGUMENT, &format!("reduction {reduction} is not supported"));
    }
    let what = What::AllReduce(reduction as u32);
    queue(communicator, stream, Call { what, kind: kind as u32, count: count as u64 }, from, to)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    from: usize,
    to: usize,
    count: usize,
    kind: c_int,
    root: c_int,
    communicator: *const Communicator,
    stream: usize,
) -> c_int {
    if !(0..unsafe { (*communicator).size } as c_int).contains(&root) {
        return failed(INVALID_ARGUMENT, &format!("there is no rank {root} to broadcast from"));
    }
    let call = Call { what: What::Broadcast(root as u32), kind: kind as u32, count: count as u64 };
    queue(communicator, stream, call, from, to)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    from: usize,
    to: usize,
    count: usize,
    kind: c_int,
    communicator: *const Communicator,
    stream: usize,
) -> c_int {
    let call = Call { what: What::AllGather, kind: kind as u32, count: count as u64 };
    queue(communicator, stream, call, from, to)
}

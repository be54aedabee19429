//! The stand-in for NCCL: collectives are right, ordered by their stream alone, captured like kernels, and fail with a sentence.
//!
//! A test of several ranks starts this binary again for each: a process has one GPU.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::net::TcpListener;
use std::process::Command;

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent_flags, CUevent_wait_flags, CUgraphInstantiate_flags};
use cudarc::driver::sys::{CUstream, CUstreamCaptureMode};

use crate::stage::{Memory, Stage, own};

#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; 128]);

type Comm = *mut c_void;

const FLOAT: c_int = 7;
const SUM: c_int = 0;
const MAXIMUM: c_int = 2;
const MEAN: c_int = 4;

/// Marks a process as a rank, and says which: `rank size`.
const RANK: &str = "SELFSUP_TEST_NCCL_RANK";

fn connect(rank: c_int, size: c_int) -> Comm {
    let (mut id, mut comm) = (UniqueId([0; 128]), std::ptr::null_mut());
    let get_id = own::<unsafe extern "C" fn(*mut UniqueId) -> c_int>("ncclGetUniqueId");
    let init =
        own::<unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int>("ncclCommInitRank");
    unsafe {
        assert_eq!(get_id(&mut id), 0);
        assert_eq!(init(&mut comm, size, id, rank), 0);
    }
    comm
}

fn all_reduce<T>(
    x: &Memory<T>,
    count: usize,
    kind: c_int,
    reduction: c_int,
    comm: Comm,
    stream: CUstream,
) {
    type Call = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, CUstream) -> c_int;
    let call = own::<Call>("ncclAllReduce");
    assert_eq!(unsafe { call(x.at, x.at, count, kind, reduction, comm, stream) }, 0);
}

fn all_gather<T>(from: &Memory<T>, to: &Memory<T>, kind: c_int, comm: Comm, stream: CUstream) {
    type Call = unsafe extern "C" fn(u64, u64, usize, c_int, Comm, CUstream) -> c_int;
    let call = own::<Call>("ncclAllGather");
    assert_eq!(unsafe { call(from.at, to.at, from.len, kind, comm, stream) }, 0);
}

fn broadcast<T>(x: &Memory<T>, kind: c_int, root: c_int, comm: Comm, stream: CUstream) -> c_int {
    type Call = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, Comm, CUstream) -> c_int;
    let call = own::<Call>("ncclBroadcast");
    unsafe { call(x.at, x.at, x.len, kind, root, comm, stream) }
}

/// The code and the sentence of what went wrong.
fn failure(comm: Comm) -> (c_int, String) {
    let mut code = 0;
    let ask = own::<unsafe extern "C" fn(Comm, *mut c_int) -> c_int>("ncclCommGetAsyncError");
    let last = own::<unsafe extern "C" fn(Comm) -> *const c_char>("ncclGetLastError");
    unsafe {
        assert_eq!(ask(comm, &mut code), 0);
        (code, CStr::from_ptr(last(comm)).to_string_lossy().into_owned())
    }
}

/// Runs `test` on each of `size` ranks, in processes of their own.
fn ranks(name: &str, size: c_int, test: impl FnOnce(c_int, Comm)) {
    if let Ok(own) = std::env::var(RANK) {
        let rank = own.parse().unwrap();
        return test(rank, connect(rank, size));
    }
    let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap();
    let start = |rank: c_int| {
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", name, "--nocapture"]).env("NCCL_COMM_ID", free.to_string());
        program.env(RANK, rank.to_string()).env("SELFSUP_STAND_IN_NCCL_SECONDS", "20");
        program.spawn().unwrap()
    };
    let started: Vec<_> = (0..size).map(start).collect();
    for (rank, mut process) in started.into_iter().enumerate() {
        assert!(process.wait().unwrap().success(), "{name}: rank {rank}");
    }
}

#[test]
fn collectives_are_right_launched_captured_and_replayed() {
    ranks("nccl::collectives_are_right_launched_captured_and_replayed", 3, |rank, comm| {
        let stage = Stage::take(true); // a kernel may read what a collective has written
        let r = rank as f32;
        for (reduction, want) in [(SUM, 6.0), (MAXIMUM, 3.0), (MEAN, 2.0)] {
            let x = stage.upload(&[r + 1.0, 10.0 * (r + 1.0)]);
            all_reduce(&x, 2, FLOAT, reduction, comm, stage.stream);
            assert_eq!(x.read(&stage), [want, 10.0 * want]);
        }
        let (own, all) = (stage.upload(&[rank, 7]), stage.room::<i32>(6));
        all_gather(&own, &all, 2, comm, stage.stream);
        assert_eq!(all.read(&stage), [0, 7, 1, 7, 2, 7]);
        for root in 0..3 {
            let x = stage.upload(&[rank as u8, 9, 200 + rank as u8]);
            assert_eq!(broadcast(&x, 1, root, comm, stage.stream), 0);
            assert_eq!(x.read(&stage), [root as u8, 9, 200 + root as u8]);
            assert_eq!(broadcast(&x, 1, 3, comm, stage.stream), 4, "there is no rank 3");
        }
        let wide = stage.upload(&[0.1 + f64::from(rank)]);
        all_reduce(&wide, 1, 8, SUM, comm, stage.stream);
        assert_eq!(wide.read(&stage), [0.1 + 1.1 + 2.1]);
        let half = stage.upload(&[0x3f80_u16 + 0x80 * u16::from(rank == 2)]); // 1, 1 and 2
        all_reduce(&half, 1, 9, SUM, comm, stage.stream);
        assert_eq!(half.read(&stage), [0x4080]);

        let x = stage.upload(&[r + 1.0]);
        unsafe {
            let relaxed = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            result::stream::begin_capture(stage.stream, relaxed).unwrap();
            all_reduce(&x, 1, FLOAT, SUM, comm, stage.stream);
            let graph = result::stream::end_capture(stage.stream).unwrap();
            let graph = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).unwrap();
            assert_eq!(x.read(&stage), [r + 1.0], "a captured collective ran");
            for want in [6.0, 18.0, 54.0] {
                result::graph::launch(graph, stage.stream).unwrap();
                assert_eq!(x.read(&stage), [want]);
            }
        }
        assert_eq!(failure(comm).0, 0);
    });
}

#[test]
fn a_host_that_waits_for_something_else_does_not_keep_the_others() {
    ranks(
        "nccl::a_host_that_waits_for_something_else_does_not_keep_the_others",
        2,
        |rank, comm| {
            let stage = Stage::take(false);
            let x = stage.upload(&[1.0_f32]);
            all_reduce(&x, 1, FLOAT, SUM, comm, stage.stream);
            if rank == 0 {
                assert_eq!(x.read(&stage), [2.0]);
                all_reduce(&x, 1, FLOAT, SUM, comm, stage.stream);
                return assert_eq!(
                    x.read(&stage)[0].to_bits(),
                    u32::MAX,
                    "rank 1 has left by then"
                );
            }
            // Long enough for both, and no call of the driver.
            std::thread::sleep(std::time::Duration::from_millis(500));
            std::process::exit(0);
        },
    );
}

#[test]
fn ranks_that_do_not_agree_are_named() {
    ranks("nccl::ranks_that_do_not_agree_are_named", 2, |rank, comm| {
        let stage = Stage::take(false);
        let x = stage.upload(&[1.0_f32; 6]);
        all_reduce(&x, 5 + rank as usize, FLOAT, SUM, comm, stage.stream);
        assert_eq!(x.read(&stage)[0].to_bits(), u32::MAX);
        let sentence = "rank 0 all-reduces by sum 5 of type float, and rank 1 all-reduces by sum 6 of type float";
        assert_eq!(failure(comm), (5, sentence.into()));
    });
}

#[test]
fn a_forgotten_wait_gives_nan() {
    let (mut forgotten, mut waited) = (0, 0);
    for (seed, wait) in (1..=8).flat_map(|seed| [(seed, false), (seed, true)]) {
        let stage = Stage::take(false);
        stage.seed(seed);
        let comm = connect(0, 1);
        let (x, y) = (stage.upload(&[3.0_f32]), stage.room::<f32>(1));
        let other = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        all_gather(&x, &y, FLOAT, comm, other);
        unsafe {
            if wait {
                let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
                result::event::record(event, other).unwrap();
                let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(stage.stream, event, flags).unwrap();
            }
            let mut host = [0.0_f32];
            result::memcpy_dtoh_async(&mut host, y.at, stage.stream).unwrap();
            stage.wait().unwrap();
            *(if wait { &mut waited } else { &mut forgotten }) += u32::from(host[0] == 3.0);
            result::stream::synchronize(other).unwrap();
            result::stream::destroy(other).unwrap();
        }
    }
    assert!(waited == 8 && forgotten < 8, "right with a wait {waited}, without {forgotten} of 8");
}

//! Streams, events, graphs, limits and failures: the driver keeps its guarantees, and no more than those.

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{self, CUresult, CUstream};

use crate::stage::{Memory, Stage};

fn new_stream(kind: StreamKind) -> CUstream {
    result::stream::create(kind).expect("a stream")
}

/// Pinned host memory of one float.
struct Pinned(*mut f32);

impl Pinned {
    fn new(value: f32) -> Self {
        let at = unsafe { result::malloc_host(4, 0) }.expect("pinned memory").cast::<f32>();
        unsafe { *at = value };
        Self(at)
    }

    fn get(&self) -> f32 {
        unsafe { self.0.read_volatile() }
    }

    fn set(&self, value: f32) {
        unsafe { self.0.write_volatile(value) };
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = unsafe { result::free_host(self.0.cast()) };
    }
}

fn add(stage: &Stage, y: &Memory<f32>, a: &Memory<f32>, b: &Memory<f32>) {
    stage.launch(
        "add_f32",
        [1, 1, 1],
        [32, 1, 1],
        0,
        &[y.into(), a.into(), b.into(), (y.len as i64).into()],
    );
}

fn upload_async(to: &Memory<f32>, from: &Pinned, stream: CUstream) {
    unsafe { sys::cuMemcpyHtoDAsync_v2(to.at, from.0.cast(), 4, stream) }.result().expect("queued");
}

fn download_async(to: &Pinned, from: &Memory<f32>, stream: CUstream) {
    unsafe { sys::cuMemcpyDtoHAsync_v2(to.0.cast(), from.at, 4, stream) }.result().expect("queued");
}

/// Runs with 16 seeds; returns for how many `run` is true.
fn seeds(run: impl Fn(&Stage) -> bool) -> usize {
    (1..=16)
        .filter(|seed| {
            let stage = Stage::take(false);
            stage.seed(*seed);
            run(&stage)
        })
        .count()
}

#[test]
fn a_copy_lands_when_it_is_waited_for() {
    let landed_early = seeds(|stage| {
        let (x, host) = (stage.upload(&[2.0_f32]), Pinned::new(0.0));
        add(stage, &x, &x, &x);
        download_async(&host, &x, stage.stream);
        let early = host.get() == 4.0;
        stage.wait().expect("runs");
        assert_eq!(host.get(), 4.0);
        early
    });
    assert!(landed_early < 16, "a missing wait never showed");
}

#[test]
fn pinned_memory_is_read_when_the_copy_runs() {
    let read_late = seeds(|stage| {
        let (x, host) = (stage.room::<f32>(1), Pinned::new(1.0));
        upload_async(&x, &host, stage.stream);
        host.set(2.0);
        x.read(stage)[0] == 2.0
    });
    assert!(read_late > 0, "reusing a staging buffer too early never showed");
}

#[test]
fn only_events_order_streams() {
    for ordered in [true, false] {
        let right = seeds(|stage| {
            let (x, y) = (stage.room::<f32>(1), stage.room::<f32>(1));
            let (host, other) = (Pinned::new(3.0), new_stream(StreamKind::NonBlocking));
            upload_async(&x, &host, other);
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .expect("an event");
            unsafe { result::event::record(event, other) }.expect("recorded");
            if ordered {
                let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                unsafe { result::stream::wait_event(stage.stream, event, flags) }.expect("waits");
            }
            add(stage, &y, &x, &x);
            let got = y.read(stage)[0];
            unsafe { result::stream::synchronize(other) }.expect("runs");
            unsafe { result::stream::destroy(other) }.expect("destroyed");
            got == 6.0
        });
        if ordered {
            assert_eq!(right, 16);
        } else {
            assert!(right < 16, "a missing event never showed");
        }
    }
}

#[test]
fn the_default_stream_waits_for_blocking_streams_only() {
    for blocking in [true, false] {
        let right = seeds(|stage| {
            let (x, host) = (stage.room::<f32>(1), Pinned::new(3.0));
            let stream =
                new_stream(if blocking { StreamKind::Default } else { StreamKind::NonBlocking });
            upload_async(&x, &host, stream);
            let mut got = [0.0_f32];
            unsafe { result::memcpy_dtoh_sync(&mut got, x.at) }.expect("copied");
            unsafe { result::stream::synchronize(stream) }.expect("runs");
            got[0] == 3.0
        });
        assert_eq!(right == 16, blocking, "{right} of 16");
    }
}

/// Captures the work that `queue` queues on the stage's stream.
fn capture(stage: &Stage, queue: impl FnOnce()) -> Result<sys::CUgraphExec, CUresult> {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    unsafe { sys::cuStreamBeginCapture_v2(stage.stream, mode) }.result().expect("capturing");
    queue();
    let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
    unsafe {
        sys::cuStreamEndCapture(stage.stream, &mut graph).result().map_err(|e| e.0)?;
        sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result().map_err(|e| e.0)?;
        sys::cuGraphDestroy(graph).result().map_err(|e| e.0)?;
    }
    Ok(exec)
}

#[test]
fn a_captured_graph_replays_with_fresh_inputs() {
    seeds(|stage| {
        let (x, y) = (stage.room::<f32>(1), stage.upload(&[0.0_f32]));
        let (host, out) = (Pinned::new(1.0), Pinned::new(0.0));
        let exec = capture(stage, || {
            upload_async(&x, &host, stage.stream);
            add(stage, &y, &y, &x);
            download_async(&out, &y, stage.stream);
        })
        .expect("captured");
        stage.wait().expect("runs");
        assert_eq!((stage.count("kernel:add_f32"), out.get()), (0, 0.0), "capture runs nothing");
        let mut sum = 0.0;
        for value in [1.0, 5.0, 7.0] {
            host.set(value);
            unsafe { sys::cuGraphLaunch(exec, stage.stream) }.result().expect("launched");
            stage.wait().expect("runs");
            sum += value;
            assert_eq!(out.get(), sum);
        }
        assert_eq!(stage.count("kernel:add_f32"), 3);
        unsafe { sys::cuGraphExecDestroy(exec) }.result().is_ok()
    });
}

#[test]
fn a_captured_fork_must_join() {
    for joins in [true, false] {
        let stage = Stage::take(false);
        let (x, host) = (stage.upload(&[0.0_f32]), Pinned::new(4.0));
        let other = new_stream(StreamKind::NonBlocking);
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).expect("an event")
        };
        let (fork, join) = (event(), event());
        let wait = |stream, event| {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            unsafe { result::stream::wait_event(stream, event, flags) }.expect("waits");
        };
        let exec = capture(&stage, || {
            unsafe { result::event::record(fork, stage.stream) }.expect("recorded");
            wait(other, fork);
            upload_async(&x, &host, other);
            unsafe { result::event::record(join, other) }.expect("recorded");
            if joins {
                wait(stage.stream, join);
            }
        });
        match exec {
            Ok(exec) => {
                assert!(joins);
                unsafe { sys::cuGraphLaunch(exec, stage.stream) }.result().expect("launched");
                assert_eq!(x.read(&stage), [4.0]);
            }
            Err(e) => {
                assert!(!joins);
                assert_eq!(e, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
            }
        }
    }
}

#[test]
fn waiting_and_allocating_end_a_capture() {
    type Call = dyn Fn(&Stage) -> Result<(), result::DriverError>;
    let calls: [&Call; 4] = [
        &|stage| stage.wait(),
        &|_| result::ctx::synchronize(),
        &|_| unsafe { result::malloc_sync(4) }.map(drop),
        &|stage| unsafe { result::malloc_async(stage.stream, 4) }.map(drop),
    ];
    for (i, call) in calls.iter().enumerate() {
        let stage = Stage::take(false);
        let x = stage.upload(&[1.0_f32]);
        let captured = capture(&stage, || {
            add(&stage, &x, &x, &x);
            let refused = call(&stage).expect_err("not while capturing");
            assert_eq!(refused.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "call {i}");
        });
        // A stream-ordered allocation is refused without invalidating the capture.
        if i < 3 {
            assert_eq!(
                captured.err(),
                Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
                "call {i}"
            );
        }
    }
}

#[test]
fn injected_failures_reach_the_caller() {
    let stage = Stage::take(false);
    stage.fail("cuMemAlloc_v2", 3, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    let kept: Vec<Memory<f32>> = (0..2).map(|_| stage.room(1)).collect();
    let third = unsafe { result::malloc_sync(4) }.expect_err("the third");
    assert_eq!(third.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    drop(stage.room::<f32>(1));

    // A failed kernel shows at the wait, and from then on in every call.
    let x = &kept[0];
    stage.fail("kernel:add_f32", 2, CUresult::CUDA_ERROR_ECC_UNCORRECTABLE);
    unsafe { result::memset_d8_sync(x.at, 0, 4) }.expect("set");
    stage.eager(true);
    add(&stage, x, x, x);
    stage.eager(false);
    let launched = stage.try_launch(
        "add_f32",
        [1, 1, 1],
        [1, 1, 1],
        0,
        &[x.into(), x.into(), x.into(), 1_i64.into()],
        false,
    );
    let waited = launched.and_then(|()| stage.wait());
    assert_eq!(waited.expect_err("injected").0, CUresult::CUDA_ERROR_ECC_UNCORRECTABLE);
    assert!(stage.report().contains("`add_f32`"));
    let later = unsafe { result::malloc_sync(4) }.expect_err("sticky");
    assert_eq!(later.0, CUresult::CUDA_ERROR_ECC_UNCORRECTABLE);
    stage.recover();
    drop(stage.room::<f32>(1));
}

#[test]
fn device_memory_is_limited_and_counted() {
    let output = child("streams::counts_device_memory", &[]);
    assert!(output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "started by the test above, where no other test holds memory"]
fn counts_device_memory() {
    const MIB: usize = 1 << 20;
    let stage = Stage::take(false);
    let (free, total) = result::mem_get_info().expect("information");
    let taken = || free - result::mem_get_info().expect("information").0;
    assert_eq!(free, total - 256 * MIB, "a context takes its part");
    let refused = unsafe { result::malloc_sync(free + 1) }.expect_err("more than is free");
    assert_eq!(refused.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    // Small allocations share a page of 2 MiB in units of 512 bytes, larger ones take their own.
    let one: Memory<u8> = stage.room(1);
    assert_eq!(taken(), 2 * MIB);
    let most: Memory<u8> = stage.room(MIB);
    let rest: Memory<u8> = stage.room(MIB - 512);
    assert_eq!(taken(), 2 * MIB);
    let more: Memory<u8> = stage.room(1);
    assert_eq!(taken(), 4 * MIB);
    let large: Memory<u8> = stage.room(2 * MIB + 1);
    assert_eq!(taken(), 8 * MIB);
    assert_eq!(stage.count("allocations"), 6);
    let at = one.at;
    drop((one, most, rest, more, large));
    let again = unsafe { result::free_sync(at) }.expect_err("freed twice");
    assert_eq!(again.0, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(result::mem_get_info().expect("information"), (free, total));
}

#[test]
fn an_address_says_where_it_lies() {
    let stage = Stage::take(false);
    let (x, host) = (stage.room::<f32>(4), Pinned::new(1.0));
    let ask = |which, at| {
        let mut number = -1_i32;
        let to = std::ptr::from_mut(&mut number).cast();
        unsafe { sys::cuPointerGetAttribute(to, which, at) }.result().map(|()| number)
    };
    use sys::CUpointer_attribute as Attribute;
    let (kind, ordinal) = (
        Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
    );
    let (device, pinned) = (x.at + 15, host.0.expose_provenance() as u64);
    assert_eq!([ask(kind, device), ask(ordinal, device)], [Ok(2), Ok(0)]);
    assert_eq!([ask(kind, pinned), ask(ordinal, pinned)], [Ok(1), Ok(0)]);
    let at = x.at;
    drop(x);
    let local = 0.0_f32;
    for unknown in [at, at + 16, std::ptr::from_ref(&local).expose_provenance() as u64] {
        let refused = ask(kind, unknown).expect_err("nothing is there");
        assert_eq!(refused.0, CUresult::CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn launches_beyond_the_limits_are_refused() {
    let stage = Stage::take(false);
    let x = stage.upload(&[0.0_f32; 4]);
    let arguments = || [(&x).into(), 1.0_f32.into(), 4_i64.into()];
    let launch = |name: &str, grid, block, shared| {
        stage.try_launch(name, grid, block, shared, &arguments(), false).map_err(|e| e.0)
    };
    assert_eq!(launch("fill_f32", [1, 1, 1], [1024, 1, 1], 0), Ok(()));
    let invalid = Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch("fill_f32", [1, 1, 1], [1025, 1, 1], 0), invalid);
    assert_eq!(launch("fill_f32", [0, 1, 1], [32, 1, 1], 0), invalid);
    assert_eq!(launch("fill_f32", [1, 65536, 1], [32, 1, 1], 0), invalid);
    assert_eq!(launch("fill_f32", [1, 1, 1], [32, 1, 1], 100 << 10), Ok(()), "asked for");
    assert_eq!(launch("fill_f32", [1, 1, 1], [32, 1, 1], 164 << 10), invalid);
    // A kernel with BOUNDS accepts at most that many threads.
    let too_many = launch("matmul_nn_f32", [1, 1, 1], [257, 1, 1], 0);
    assert_eq!(too_many, Err(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
    assert_eq!(x.read(&stage), [1.0; 4]);
}

/// More than 48 KB have to be asked for, kernel by kernel.
#[test]
fn dynamic_shared_memory_that_was_not_asked_for_is_refused() {
    let stage = Stage::take(false);
    // No other test lets this kernel have more.
    let function = stage.function("relu_f32");
    let x = stage.upload(&[-1.0_f32, 2.0]);
    let launch = |shared| {
        let (to, from, n) = (x.at, x.at, 2_i64);
        let mut pointers = [
            std::ptr::from_ref(&to).cast_mut().cast(),
            std::ptr::from_ref(&from).cast_mut().cast(),
            std::ptr::from_ref(&n).cast_mut().cast(),
        ];
        let (grid, block) = ((1, 1, 1), (32, 1, 1));
        unsafe { result::launch_kernel(function, grid, block, shared, stage.stream, &mut pointers) }
            .map_err(|e| e.0)
    };
    let allow = |bytes| {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        unsafe { sys::cuFuncSetAttribute(function, which, bytes) }.result().map_err(|e| e.0)
    };
    let invalid = Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(48 << 10), Ok(()));
    assert_eq!(launch(60 << 10), invalid);
    assert_eq!(allow(60 << 10), Ok(()));
    assert_eq!(launch(60 << 10), Ok(()));
    assert_eq!(launch((60 << 10) + 1), invalid);
    assert_eq!(allow(164 << 10), invalid, "more than the device has");
    assert_eq!(launch(60 << 10), Ok(()), "as before");
    assert_eq!(x.read(&stage), [0.0, 2.0]);
}

/// The same seed gives the same run; different seeds give different orders.
#[test]
fn seeds_choose_the_schedule() {
    let winner = |seed| {
        let stage = Stage::take(false);
        stage.seed(seed);
        let y = stage.room::<f32>(32);
        stage.launch("broken_two_warps", [1, 1, 1], [64, 1, 1], 0, &[(&y).into()]);
        y.read(&stage)
    };
    let all: Vec<Vec<f32>> = (1..=8).map(winner).collect();
    assert!(all.iter().any(|other| *other != all[0]), "the schedule never varies");
    assert_eq!(winner(3), all[2]);
}

/// Runs a test in a separate process under these variables; returns its standard output.
pub fn child(test: &str, variables: &[(&str, &str)]) -> String {
    let mut command = std::process::Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    let output = command.envs(variables.iter().copied()).output().expect("starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_environment_configures_the_driver() {
    let folder = std::env::temp_dir().join(format!("stand-in-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let ran = folder.join("ran");
    let variables = [
        ("SELFSUP_STAND_IN_MEMORY", "10000000"),
        ("SELFSUP_STAND_IN_CONTEXT", "1000000"),
        ("SELFSUP_STAND_IN_CAPABILITY", "9.0"),
        ("SELFSUP_STAND_IN_FAIL", "cuMemAlloc:2:2,kernel:relu_f32:2:719"),
        ("SELFSUP_STAND_IN_RAN", ran.to_str().expect("a plain name")),
    ];
    let output = child("streams::reports_its_configuration", &variables);
    let names = std::fs::read_to_string(&ran).unwrap_or_default();
    std::fs::remove_dir_all(&folder).expect("its own folder");
    assert!(output.contains("10000000 bytes, 9000000 free, capability 9"), "{output}");
    assert!(output.contains("second allocation: Some(CUDA_ERROR_OUT_OF_MEMORY)"), "{output}");
    assert!(output.contains("relu: [None, Some(CUDA_ERROR_LAUNCH_FAILED)]"), "{output}");
    assert_eq!(names, "relu_f32\n");
}

#[test]
#[ignore = "started by the test above"]
fn reports_its_configuration() {
    let stage = Stage::start();
    let (free, total) = result::mem_get_info().expect("information");
    let major = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let major = unsafe { result::device::get_attribute(0, major) }.expect("an attribute");
    println!("{total} bytes, {free} free, capability {major}");
    let x = stage.upload(&[1.0_f32]);
    println!("second allocation: {:?}", unsafe { result::malloc_sync(4) }.err().map(|e| e.0));
    let relu = || {
        stage.launch(
            "relu_f32",
            [1, 1, 1],
            [1, 1, 1],
            0,
            &[(&x).into(), (&x).into(), 1_i64.into()],
        );
        stage.wait().err().map(|e| e.0)
    };
    println!("relu: {:?}", [relu(), relu()]);
}

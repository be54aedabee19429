//! Programs that use the driver wrongly in a way that a kinder driver would let pass: each must fail here.

use std::ffi::{CString, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::result::{self, DriverError, primary_ctx, stream::StreamKind};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUevent, CUresult, CUstream};

use crate::stage::Stage;

/// The misuses with their names, and whether each was caught.
pub fn all() -> Vec<(&'static str, bool)> {
    let mut all = vec![
        ("memory counted as it was asked for", memory_counted_as_it_was_asked_for()),
        ("handles that outlive their context", handles_that_outlive_their_context()),
        ("a context released twice", a_context_released_twice()),
        ("calls without a context", calls_without_a_context()),
        ("kernels that an image has not for the device", kernels_that_an_image_has_not()),
        ("more registers than a multiprocessor has", more_registers_than_there_are()),
        ("a staging buffer of two threads", a_staging_buffer_of_two_threads()),
        ("a launch right after a copy of the default stream", a_launch_right_after_a_copy()),
        ("an event that is asked for, and not waited for", an_event_asked_for_twice()),
    ];
    all.extend(two_devices());
    all
}

fn is<T>(result: Result<T, DriverError>, code: CUresult) -> bool {
    result.err().is_some_and(|e| e.0 == code)
}

fn event() -> CUevent {
    result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).expect("an event")
}

/// Retains a device's primary context and makes it current.
fn retain(device: CUdevice) -> CUcontext {
    let context = unsafe { primary_ctx::retain(device) }.expect("a context");
    unsafe { result::ctx::set_current(context) }.expect("current");
    context
}

/// A program that keeps a stream and memory when it lets go of its context, and makes another one.
fn handles_that_outlive_their_context() -> bool {
    let _turn = Stage::bare();
    let context = retain(0);
    let stream = result::stream::create(StreamKind::NonBlocking).expect("a stream");
    let at = unsafe { result::malloc_sync(4) }.expect("memory");
    unsafe { primary_ctx::release(0) }.expect("released");
    let gone = is(result::mem_get_info(), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED)
        && is(unsafe { result::ctx::set_current(context) }, CUresult::CUDA_ERROR_INVALID_CONTEXT);
    retain(0);
    let caught = [
        is(unsafe { result::stream::synchronize(stream) }, CUresult::CUDA_ERROR_INVALID_HANDLE),
        is(unsafe { result::memset_d8_sync(at, 0, 4) }, CUresult::CUDA_ERROR_INVALID_VALUE),
        is(unsafe { result::free_sync(at) }, CUresult::CUDA_ERROR_INVALID_VALUE),
    ];
    unsafe { primary_ctx::release(0) }.expect("released");
    gone && caught == [true; 3]
}

/// Of two users of a device one releases its context twice: the other's is gone.
fn a_context_released_twice() -> bool {
    let _turn = Stage::bare();
    let first = retain(0);
    assert_eq!(retain(0), first, "one context of a device");
    let stream = result::stream::create(StreamKind::NonBlocking).expect("a stream");
    unsafe { primary_ctx::release(0) }.expect("released");
    unsafe { result::stream::synchronize(stream) }.expect("the other's is alive");
    unsafe { primary_ctx::release(0) }.expect("released");
    let gone = unsafe { result::stream::synchronize(stream) }.is_err();
    gone && is(unsafe { primary_ctx::release(0) }, CUresult::CUDA_ERROR_INVALID_CONTEXT)
}

/// A thread that makes no context current, and uses handles of one.
fn calls_without_a_context() -> bool {
    let stage = Stage::take(false);
    let memory = stage.upload(&[0.0_f32]);
    let function = stage.function("add_f32") as usize;
    let (stream, event, at) = (stage.stream as usize, event() as usize, memory.at);
    let answers = std::thread::spawn(move || {
        let (stream, event) = (stream as CUstream, event as CUevent);
        let (function, mut number) = (function as sys::CUfunction, 0);
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
        let copy =
            || unsafe { sys::cuMemcpyHtoDAsync_v2(at, [0.0_f32].as_ptr().cast(), 4, stream) };
        unsafe {
            [
                result::malloc_sync(4).map(drop),
                result::free_sync(at),
                result::memset_d8_async(at, 0, 4, stream),
                result::memset_d8_sync(at, 0, 4),
                result::memcpy_htod_sync(at, &[0.0_f32]),
                copy().result(),
                result::stream::create(StreamKind::NonBlocking).map(drop),
                result::stream::synchronize(stream),
                result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(drop),
                result::event::record(event, stream),
                result::event::elapsed(event, event).map(drop),
                sys::cuEventSynchronize(event).result(),
                sys::cuFuncGetAttribute(&mut number, which, function).result(),
                result::launch_kernel(function, (1, 1, 1), (1, 1, 1), 0, stream, &mut []),
                result::event::destroy(event),
                result::stream::destroy(stream),
                result::mem_get_info().map(drop),
                result::ctx::synchronize(),
            ]
        }
    });
    let answers = answers.join().expect("a thread");
    unsafe { result::event::destroy(event as CUevent) }.expect("still there");
    answers.into_iter().enumerate().all(|(call, answer)| {
        let caught = is(answer, CUresult::CUDA_ERROR_INVALID_CONTEXT);
        if !caught {
            println!("without a context, call {call}: {answer:?}");
        }
        caught
    })
}

/// A program that launches as many threads as a block may have of a kernel without launch bounds, whose threads need too many
/// registers for that.
fn more_registers_than_there_are() -> bool {
    let stage = Stage::take(false);
    let x = stage.room::<f32>(1);
    let launch = |threads| {
        let arguments = [(&x).into(), 1.0_f32.into(), 1_i64.into()];
        stage.try_launch("fill_f32", [1, 1, 1], [threads, 1, 1], 0, &arguments, false)
    };
    launch(1024).expect("32 registers");
    let mut caught = Vec::new();
    for (registers, most) in [(64, 1024), (65, 896), (128, 512), (255, 256)] {
        stage.registers("fill_f32", registers);
        launch(most).expect("as many as fit");
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let mut said = 0;
        unsafe { sys::cuFuncGetAttribute(&mut said, which, stage.function("fill_f32")) };
        assert_eq!(said, most as i32, "{registers} registers");
        if most < 1024 {
            let refused = CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
            caught.push(is(launch(most + 1), refused));
        }
    }
    stage.registers("fill_f32", 32);
    caught == [true; 3]
}

/// Two threads that copy through the same pinned memory: each asks whether it is free, writes to it and queues a copy, and nothing
/// keeps the other from doing so in between. With a lock around the three it works.
fn a_staging_buffer_of_two_threads() -> bool {
    let wrong = |locks: bool, seed: u64| {
        let stage = Stage::take(false);
        let pinned = unsafe { result::malloc_host(4, 0) }.expect("pinned memory") as usize;
        let (free, turn) = (event() as usize, Mutex::new(()));
        let rooms = [stage.room::<f32>(1), stage.room::<f32>(1)];
        let (stream, wrong) = (stage.stream as usize, AtomicUsize::new(0));
        stage.interleave(seed);
        std::thread::scope(|scope| {
            for (thread, room) in rooms.iter().enumerate() {
                let (context, turn, wrong) = (&stage.context, &turn, &wrong);
                let at = room.at;
                scope.spawn(move || {
                    context.bind_to_thread().expect("a context");
                    let (stream, free) = (stream as CUstream, free as CUevent);
                    for round in 0..32 {
                        let value = (100 * thread + round) as f32;
                        let held = locks.then(|| turn.lock().expect("nobody panics"));
                        while unsafe { result::event::query(free) }.is_err() {}
                        unsafe {
                            (pinned as *mut f32).write_volatile(value);
                            let copy =
                                sys::cuMemcpyHtoDAsync_v2(at, pinned as *const c_void, 4, stream);
                            copy.result().expect("queued");
                            result::event::record(free, stream).expect("recorded");
                        }
                        drop(held);
                        unsafe { result::stream::synchronize(stream) }.expect("runs");
                        let mut got = [0.0_f32];
                        unsafe { result::memcpy_dtoh_sync(&mut got, at) }.expect("copied");
                        wrong.fetch_add(usize::from(got[0] != value), Ordering::Relaxed);
                    }
                });
            }
        });
        stage.interleave(0);
        unsafe {
            result::free_host(pinned as *mut c_void).expect("freed");
            result::event::destroy(free as CUevent).expect("destroyed");
        }
        wrong.into_inner()
    };
    let of = |locks| (1..=4).map(|seed| wrong(locks, seed)).sum::<usize>();
    assert_eq!(of(true), 0, "with a lock");
    let raced = of(false);
    println!("values lost by two threads without a lock: {raced} of 256");
    raced > 0
}

/// A program that copies from pageable memory on the default stream, and then launches on a stream that does not wait for it.
fn a_launch_right_after_a_copy() -> bool {
    let right = |waits: bool| {
        let of = |seed: u64| {
            let stage = Stage::take(false);
            stage.seed(seed);
            let (x, y) = (stage.room::<f32>(1), stage.room::<f32>(1));
            unsafe { result::memcpy_htod_sync(x.at, &[3.0_f32]) }.expect("copied");
            if waits {
                result::ctx::synchronize().expect("landed");
            }
            let arguments = [(&y).into(), (&x).into(), (&x).into(), 1_i64.into()];
            stage.launch("add_f32", [1, 1, 1], [32, 1, 1], 0, &arguments);
            y.read(&stage)[0] == 6.0
        };
        (1..=16).filter(|seed| of(*seed)).count()
    };
    assert_eq!(right(true), 16);
    right(false) < 16
}

/// A program that asks twice whether a copy has run, and then writes to its memory whatever the answer. A device that makes progress
/// with each question would hide it.
fn an_event_asked_for_twice() -> bool {
    let lost = |stall: u64| {
        let stage = Stage::take(false);
        stage.stall(stall);
        let (x, copied) = (stage.room::<f32>(1), event());
        let pinned = unsafe { result::malloc_host(4, 0) }.expect("pinned memory").cast::<f32>();
        unsafe {
            pinned.write_volatile(1.0);
            let queued = sys::cuMemcpyHtoDAsync_v2(x.at, pinned.cast(), 4, stage.stream);
            queued.result().expect("queued");
            result::event::record(copied, stage.stream).expect("recorded");
        }
        let asked = [0, 1].map(|_| unsafe { result::event::query(copied) }.is_ok());
        assert_eq!(asked[1], stall < 2, "{stall}");
        unsafe { pinned.write_volatile(2.0) };
        let lost = x.read(&stage)[0] == 2.0;
        stage.stall(0);
        unsafe {
            result::free_host(pinned.cast()).expect("freed");
            result::event::destroy(copied).expect("destroyed");
        }
        lost
    };
    !lost(0) && lost(2)
}

/// A part of a fatbin: PTX (1) or machine code (2).
fn part(kind: u16, architecture: u32, alone: bool, ptx: [u16; 2], bytes: &[u8]) -> Vec<u8> {
    let mut part = vec![0; 64];
    let mut put = |at: usize, bytes: &[u8]| part[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &kind.to_le_bytes());
    put(4, &64_u32.to_le_bytes());
    put(8, &(bytes.len() as u64).to_le_bytes());
    put(24, &ptx[1].to_le_bytes());
    put(26, &ptx[0].to_le_bytes());
    put(28, &architecture.to_le_bytes());
    put(40, &(0x11 | u32::from(alone) << 20).to_le_bytes());
    part.extend(bytes);
    part
}

fn fatbin(parts: &[Vec<u8>]) -> Vec<u8> {
    let parts = parts.concat();
    let size = (parts.len() as u64).to_le_bytes();
    [&0xba55_ed50_u32.to_le_bytes()[..], &[1, 0, 16, 0], &size, &parts].concat()
}

/// Machine code with these kernels and nothing in them.
fn elf(kernels: &[&str]) -> Vec<u8> {
    let mut names = vec![0];
    let starts: Vec<u32> = kernels
        .iter()
        .map(|kernel| {
            let start = names.len() as u32;
            names.extend(format!(".text.{kernel}\0").bytes());
            start
        })
        .collect();
    let mut elf = vec![0; 64];
    elf[..4].copy_from_slice(b"\x7fELF");
    elf[0x28..0x30].copy_from_slice(&64_u64.to_le_bytes());
    let sections = kernels.len() + 1;
    elf[0x3a..0x3c].copy_from_slice(&64_u16.to_le_bytes());
    elf[0x3c..0x3e].copy_from_slice(&(sections as u16).to_le_bytes());
    let mut table = vec![0; 64 * sections];
    let at = (64 + table.len()) as u64;
    table[24..32].copy_from_slice(&at.to_le_bytes());
    table[32..40].copy_from_slice(&(names.len() as u64).to_le_bytes());
    for (i, start) in starts.iter().enumerate() {
        table[64 * (i + 1)..][..4].copy_from_slice(&start.to_le_bytes());
    }
    [elf, table, names].concat()
}

/// What a device of capability 8.0 answers when an image is loaded and asked for a kernel.
fn answer(image: &[u8], kernel: &str) -> CUresult {
    let mut module = std::ptr::null_mut();
    let loaded = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
    if loaded != CUresult::CUDA_SUCCESS {
        return loaded;
    }
    let name = CString::new(kernel).expect("no NUL");
    let found = unsafe { result::module::get_function(module, name) }.err().map(|e| e.0);
    unsafe { result::module::unload(module) }.expect("unloaded");
    found.unwrap_or(CUresult::CUDA_SUCCESS)
}

/// A program whose image was built for another chip, by a newer compiler, or from another file.
fn kernels_that_an_image_has_not() -> bool {
    const MACHINE_CODE: u16 = 2;
    let _stage = Stage::take(false);
    let code = |architecture, alone, kernels: &[&str]| {
        part(MACHINE_CODE, architecture, alone, [0; 2], &elf(kernels))
    };
    let ptx = |architecture, version| {
        part(1, architecture, false, version, b".visible .entry relu_f32(\n.param .u64 y)")
    };
    let (add, relu) = ("add_f32", "relu_f32");
    let right = [
        (fatbin(&[code(90, true, &[]), code(80, false, &[relu, add])]), add),
        (fatbin(&[code(90, true, &[add]), ptx(75, [9, 0])]), relu),
        (fatbin(&[]), add),
    ];
    for (i, (image, kernel)) in right.iter().enumerate() {
        assert_eq!(answer(image, kernel), CUresult::CUDA_SUCCESS, "image {i}");
    }
    let wrong = [
        (fatbin(&[code(80, false, &[relu])]), CUresult::CUDA_ERROR_NOT_FOUND),
        (fatbin(&[code(90, true, &[add])]), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU),
        (fatbin(&[code(86, false, &[add])]), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU),
        (fatbin(&[code(75, false, &[add])]), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU),
        (fatbin(&[ptx(90, [9, 0])]), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU),
        (fatbin(&[ptx(80, [9, 1])]), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION),
        (fatbin(&[ptx(80, [9, 0])]), CUresult::CUDA_ERROR_NOT_FOUND),
        (fatbin(&[code(80, false, &[add])[..99].to_vec()]), CUresult::CUDA_ERROR_INVALID_IMAGE),
    ];
    wrong.iter().enumerate().all(|(i, (image, code))| {
        let got = answer(image, add);
        if got != *code {
            println!("image {i}: {got:?}, not {code:?}");
        }
        got == *code
    })
}

/// A program with two devices that mixes up what belongs to which.
fn two_devices() -> [(&'static str, bool); 4] {
    let stage = Stage::take(false);
    stage.devices(2);
    let here = result::ctx::get_current().expect("an answer").expect("a context");
    let (x, ours) = (stage.upload(&[2.0_f32]), event());
    let there = retain(1);
    assert_ne!(here, there);
    let stream = result::stream::create(StreamKind::NonBlocking).expect("a stream");
    let (at, theirs) = (unsafe { result::malloc_sync(4) }.expect("memory"), event());
    unsafe { result::event::record(theirs, stream) }.expect("recorded");
    unsafe { result::stream::synchronize(stream) }.expect("waited");
    let free = || result::mem_get_info().expect("information").0;
    let large = || unsafe { result::malloc_sync(8 << 20) }.expect("memory");
    let freed = |at| unsafe { result::free_sync(at) }.expect("freed");
    let of_theirs = free();
    unsafe { result::ctx::set_current(here) }.expect("current");
    let (of_ours, taken) = (free(), large());
    let of_ours_then = free();
    unsafe { result::ctx::set_current(there) }.expect("current");
    let counted = of_ours - of_ours_then == 8 << 20 && free() == of_theirs;
    unsafe { result::ctx::set_current(here) }.expect("current");
    freed(taken);
    let add = |stream, from: u64| {
        let (mut y, mut a, mut count) = (x.at, from, 1_i64);
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut y).cast(),
            (&raw mut a).cast(),
            (&raw mut a).cast(),
            (&raw mut count).cast(),
        ];
        let function = stage.function("add_f32");
        unsafe { result::launch_kernel(function, (1, 1, 1), (1, 1, 1), 0, stream, &mut arguments) }
    };
    let handle = CUresult::CUDA_ERROR_INVALID_HANDLE;
    unsafe { result::event::record(ours, stage.stream) }.expect("recorded");
    stage.wait().expect("waited");
    let mut caught = [
        ("a launch on a stream of another device", is(add(stream, x.at), handle)),
        ("an event of another device", {
            let recorded = unsafe { result::event::record(theirs, stage.stream) };
            is(recorded, handle) && is(unsafe { result::event::elapsed(ours, theirs) }, handle)
        }),
        ("the free memory of another device", counted),
        ("a kernel with memory of another device", false),
    ];
    // What the programming guide allows between devices.
    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    unsafe { result::stream::wait_event(stage.stream, theirs, flags) }.expect("allowed");
    unsafe { result::memcpy_dtod_async(x.at, x.at, 4, stream) }.expect("allowed");
    unsafe { result::event::query(theirs) }.expect("allowed");
    add(stage.stream, x.at).expect("its own memory");
    stage.wait().expect("runs");
    let launched = add(stage.stream, at).and_then(|()| stage.wait());
    let says = "argument 1 points to memory of device 1, and it runs on device 0";
    caught[3].1 =
        is(launched, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS) && stage.report().contains(says);
    stage.recover();
    unsafe { primary_ctx::release(1) }.expect("released");
    stage.devices(1);
    caught
}

#[test]
fn a_driver_that_was_not_started_says_so() {
    let output = crate::streams::child("misuse::asks_before_it_starts", &[]);
    assert!(output.contains("before: Some(CUDA_ERROR_NOT_INITIALIZED)"), "{output}");
    assert!(output.contains("after: None"), "{output}");
}

#[test]
#[ignore = "started by the test above"]
fn asks_before_it_starts() {
    Stage::open();
    let ask = || result::device::get_count().err().map(|e| e.0);
    println!("before: {:?}", ask());
    result::init().expect("a driver");
    println!("after: {:?}", ask());
}

/// A program that divides free memory by the size of its blocks expects more of them than there are.
fn memory_counted_as_it_was_asked_for() -> bool {
    const BLOCK: usize = 3 << 20;
    let stage = Stage::take(false);
    let (free, total) = result::mem_get_info().expect("information");
    stage.memory(total - free + 12 * BLOCK);
    let (free, _) = result::mem_get_info().expect("information");
    let blocks: Vec<_> =
        (0..free / BLOCK).map(|_| unsafe { result::malloc_sync(BLOCK) }.map_err(|e| e.0)).collect();
    for at in blocks.iter().flatten() {
        unsafe { result::free_sync(*at) }.expect("freed");
    }
    stage.memory(total);
    assert_eq!(blocks.len(), 12);
    blocks.contains(&Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
}

//! Memory: allocation, pools, copies, memsets.

use std::ffi::{c_int, c_uchar, c_uint, c_void};
use std::sync::Arc;

use super::calls;
use crate::driver::{CallResult, Code, Driver};
use crate::memory::Kind;
use crate::work::Work;

/// Handle of the only pool; the emulation does not distinguish pools.
const POOL: usize = 0xb0;

fn allocate_in_order(
    driver: &mut Driver,
    to: *mut usize,
    size: usize,
    stream: usize,
) -> CallResult {
    driver.in_context()?;
    if driver.streams[&driver.stream_id(stream)?].capture.is_some() {
        // The driver would add a node to the graph; nothing here needs that.
        return Err(Code::CAPTURE_UNSUPPORTED);
    }
    let at = driver.allocate(size, Kind::Device)?;
    unsafe { *to = at };
    Ok(())
}

/// Queues a copy or memset on the default stream, for which other streams wait unless they are non-blocking.
fn by_default(driver: &mut Driver, work: Work) -> CallResult {
    driver.in_context()?;
    driver.require_no_capture()?;
    driver.count_wait();
    driver.push(0, work)
}

/// The same, and has run when the call returns.
fn at_once(driver: &mut Driver, work: Work) -> CallResult {
    by_default(driver, work)?;
    let id = driver.stream_id(0)?;
    driver.drain(id)
}

/// A copy from the host of the default stream. Pageable memory may be changed when the call returns, and the copy may land later.
fn upload_by_default(driver: &mut Driver, to: usize, from: usize, size: usize) -> CallResult {
    driver.in_context()?;
    device_range(driver, to, size)?;
    if driver.memory().is_pinned(from) {
        return at_once(driver, Work::Copy { to, from, size });
    }
    let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, size) }.to_vec();
    by_default(driver, Work::Upload { to, bytes: Arc::new(bytes) })
}

/// Checks a device address as far as the call can.
fn device_range(driver: &mut Driver, at: usize, size: usize) -> CallResult {
    let valid = driver.memory().holds(at) && driver.memory().fault(at, size.max(1)).is_none();
    if valid || size == 0 { Ok(()) } else { Err(Code::INVALID_VALUE) }
}

fn upload(driver: &mut Driver, to: usize, from: usize, size: usize, stream: usize) -> CallResult {
    driver.in_context()?;
    device_range(driver, to, size)?;
    let capturing = driver.streams[&driver.stream_id(stream)?].capture.is_some();
    if capturing || driver.memory().is_pinned(from) {
        return driver.push(stream, Work::Copy { to, from, size });
    }
    let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, size) }.to_vec();
    driver.push(stream, Work::Upload { to, bytes: Arc::new(bytes) })
}

fn download(driver: &mut Driver, to: usize, from: usize, size: usize, stream: usize) -> CallResult {
    driver.in_context()?;
    device_range(driver, from, size)?;
    let id = driver.stream_id(stream)?;
    driver.count_by("downloaded", size as u64);
    let capturing = driver.streams[&id].capture.is_some();
    driver.push(stream, Work::Copy { to, from, size })?;
    if !capturing && !driver.memory().is_pinned(to) {
        // The driver copies to pageable host memory before it returns.
        driver.count_wait();
        driver.drain(id)?;
    }
    Ok(())
}

fn fill(
    driver: &mut Driver,
    at: usize,
    value: u32,
    width: usize,
    count: usize,
    stream: Option<usize>,
) -> CallResult {
    driver.in_context()?;
    if !at.is_multiple_of(width) {
        return Err(Code::INVALID_VALUE);
    }
    device_range(driver, at, width * count)?;
    let work = Work::Fill { at, value, width, count };
    match stream {
        Some(stream) => driver.push(stream, work),
        None => by_default(driver, work),
    }
}

fn release(driver: &mut Driver, at: usize, kind: Kind) -> CallResult {
    driver.in_context()?;
    if at == 0 {
        return Ok(());
    }
    driver.require_no_capture()?;
    if !driver.memory().is_live(at, kind) {
        return Err(Code::INVALID_VALUE);
    }
    let (_, context, _) = driver.memory().owner(at).expect("live");
    driver.count_wait();
    driver.drain_context(context)?;
    driver.memory().release(at);
    Ok(())
}

calls! {
    fn cuMemAlloc_v2(driver, to: *mut usize, size: usize) {
        driver.in_context()?;
        driver.require_no_capture()?;
        *to = driver.allocate(size, Kind::Device)?;
    }

    fn cuMemFree_v2(driver, at: usize) { release(driver, at, Kind::Device)? }

    fn cuMemAllocAsync(driver, to: *mut usize, size: usize, stream: usize) {
        allocate_in_order(driver, to, size, stream)?;
    }

    fn cuMemAllocFromPoolAsync(driver, to: *mut usize, size: usize, pool: usize, stream: usize) {
        if pool != POOL { return Err(Code::INVALID_VALUE) }
        allocate_in_order(driver, to, size, stream)?;
    }

    fn cuMemFreeAsync(driver, at: usize, stream: usize) {
        driver.in_context()?;
        if at == 0 { return Ok(()) }
        if !driver.memory().is_live(at, Kind::Device) { return Err(Code::INVALID_VALUE) }
        driver.push(stream, Work::Release(at))?;
    }

    fn cuMemHostAlloc(driver, to: *mut usize, size: usize, _flags: c_uint) {
        driver.in_context()?;
        driver.require_no_capture()?;
        *to = driver.allocate(size, Kind::Pinned)?;
    }

    fn cuMemAllocHost_v2(driver, to: *mut usize, size: usize) {
        driver.in_context()?;
        driver.require_no_capture()?;
        *to = driver.allocate(size, Kind::Pinned)?;
    }

    fn cuMemFreeHost(driver, at: usize) { release(driver, at, Kind::Pinned)? }

    fn cuMemHostGetDevicePointer_v2(driver, to: *mut usize, at: usize, _flags: c_uint) {
        driver.in_context()?;
        if !driver.memory().is_pinned(at) { return Err(Code::INVALID_VALUE) }
        *to = at;
    }

    fn cuPointerGetAttribute(driver, value: *mut c_void, which: c_uint, at: usize) {
        let (kind, context, device) = driver.memory().owner(at).ok_or(Code::INVALID_VALUE)?;
        match which {
            1 => *value.cast::<usize>() = context,
            // Host memory, or the device's.
            2 => *value.cast::<c_uint>() = if kind == Kind::Pinned { 1 } else { 2 },
            9 => *value.cast::<c_int>() = device as c_int,
            _ => return Err(Code::NOT_SUPPORTED),
        }
    }

    fn cuDeviceGetDefaultMemPool(driver, pool: *mut usize, _device: c_int) { *pool = POOL }

    fn cuDeviceGetMemPool(driver, pool: *mut usize, _device: c_int) { *pool = POOL }

    fn cuDeviceSetMemPool(driver, _device: c_int, _pool: usize) {}

    fn cuMemPoolCreate(driver, pool: *mut usize, _properties: *const c_void) { *pool = POOL }

    fn cuMemPoolDestroy(driver, _pool: usize) {}

    fn cuMemPoolTrimTo(driver, _pool: usize, _keep: usize) {}

    fn cuMemPoolSetAttribute(driver, _pool: usize, _which: c_uint, _value: *mut c_void) {}

    fn cuMemPoolGetAttribute(driver, _pool: usize, _which: c_uint, value: *mut u64) {
        let device = driver.current_device()?;
        *value = driver.memory().asked_for(device) as u64;
    }

    fn cuMemcpyHtoD_v2(driver, to: usize, from: usize, size: usize) {
        upload_by_default(driver, to, from, size)?;
    }

    fn cuMemcpyDtoH_v2(driver, to: usize, from: usize, size: usize) {
        driver.in_context()?;
        device_range(driver, from, size)?;
        driver.count_by("downloaded", size as u64);
        at_once(driver, Work::Copy { to, from, size })?;
    }

    fn cuMemcpyDtoD_v2(driver, to: usize, from: usize, size: usize) {
        driver.in_context()?;
        device_range(driver, from, size)?;
        device_range(driver, to, size)?;
        by_default(driver, Work::Copy { to, from, size })?;
    }

    fn cuMemcpyHtoDAsync_v2(driver, to: usize, from: usize, size: usize, stream: usize) {
        upload(driver, to, from, size, stream)?;
    }

    fn cuMemcpyDtoHAsync_v2(driver, to: usize, from: usize, size: usize, stream: usize) {
        download(driver, to, from, size, stream)?;
    }

    fn cuMemcpyDtoDAsync_v2(driver, to: usize, from: usize, size: usize, stream: usize) {
        driver.in_context()?;
        device_range(driver, from, size)?;
        device_range(driver, to, size)?;
        driver.push(stream, Work::Copy { to, from, size })?;
    }

    fn cuMemsetD8_v2(driver, at: usize, value: c_uchar, count: usize) {
        fill(driver, at, u32::from(value), 1, count, None)?;
    }

    fn cuMemsetD16_v2(driver, at: usize, value: u16, count: usize) {
        fill(driver, at, u32::from(value), 2, count, None)?;
    }

    fn cuMemsetD32_v2(driver, at: usize, value: c_uint, count: usize) { fill(driver, at, value, 4, count, None)? }

    fn cuMemsetD8Async(driver, at: usize, value: c_uchar, count: usize, stream: usize) {
        fill(driver, at, u32::from(value), 1, count, Some(stream))?;
    }

    fn cuMemsetD16Async(driver, at: usize, value: u16, count: usize, stream: usize) {
        fill(driver, at, u32::from(value), 2, count, Some(stream))?;
    }

    fn cuMemsetD32Async(driver, at: usize, value: c_uint, count: usize, stream: usize) {
        fill(driver, at, value, 4, count, Some(stream))?;
    }
}

//! Streams, events and graphs.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use super::calls;
use crate::driver::{CallResult, Code, Driver};
use crate::work::{Capture, Event, Graph, Stream, Work};

fn create(driver: &mut Driver, to: *mut usize, flags: c_uint) -> CallResult {
    let context = driver.in_context()?;
    let id = driver.handle();
    let non_blocking = flags & 1 != 0;
    driver.streams.insert(id, Stream { context, non_blocking, ..Stream::default() });
    unsafe { *to = id };
    Ok(())
}

/// The stream, if it exists and is not capturing; a capture on it is invalidated.
fn require_not_capturing(driver: &mut Driver, stream: usize) -> CallResult<usize> {
    let id = driver.stream_id(stream)?;
    let capture = driver.streams[&id].capture;
    match capture.and_then(|c| driver.captures.get_mut(&c)) {
        Some(capture) => {
            capture.invalidated = true;
            Err(Code::CAPTURE_UNSUPPORTED)
        }
        None => Ok(id),
    }
}

fn end_capture(driver: &mut Driver, stream: usize, graph: *mut usize) -> CallResult {
    let id = driver.stream_id(stream)?;
    let capture = driver.streams[&id].capture;
    let key = capture.ok_or(Code::INVALID_VALUE)?;
    let capture = driver.captures.get(&key).ok_or(Code::INVALID_VALUE)?;
    if capture.origin != id {
        return Err(Code::CAPTURE_UNMATCHED);
    }
    if capture.mode != 2 && capture.thread != std::thread::current().id() {
        return Err(Code::CAPTURE_WRONG_THREAD);
    }
    let capture = driver.captures.remove(&key).expect("looked up above");
    for stream in driver.streams.values_mut().filter(|s| s.capture == Some(key)) {
        stream.capture = None;
    }
    unsafe { *graph = 0 };
    if capture.invalidated {
        return Err(Code::CAPTURE_INVALIDATED);
    }
    if capture.joined.values().any(|seen| !seen) {
        return Err(Code::CAPTURE_UNJOINED);
    }
    let handle = driver.handle();
    let context = driver.streams[&id].context;
    driver.graphs.insert(handle, Graph { context, nodes: Arc::new(capture.nodes) });
    unsafe { *graph = handle };
    Ok(())
}

fn instantiate(driver: &mut Driver, to: *mut usize, graph: usize) -> CallResult {
    let graph = driver.graphs.get(&graph).ok_or(Code::INVALID_VALUE)?.clone();
    let handle = driver.handle();
    driver.graphs.insert(handle, graph);
    unsafe { *to = handle };
    Ok(())
}

fn elapsed(driver: &mut Driver, ms: *mut f32, start: usize, end: usize) -> CallResult {
    driver.in_context()?;
    let of = |event: usize| driver.events.get(&event).map(|event| event.context);
    if of(start) != of(end) {
        return Err(Code::INVALID_HANDLE);
    }
    let mut at = [None; 2];
    for (at, event) in at.iter_mut().zip([start, end]) {
        let event = driver.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        if !event.timed || event.last.is_none() {
            return Err(Code::INVALID_HANDLE);
        }
        *at = Some(event.at.ok_or(Code::NOT_READY)?);
    }
    let [Some(start), Some(end)] = at else { return Err(Code::NOT_READY) };
    unsafe { *ms = end.saturating_duration_since(start).as_secs_f32() * 1e3 };
    Ok(())
}

calls! {
    fn cuStreamCreate(driver, stream: *mut usize, flags: c_uint) { create(driver, stream, flags)? }

    fn cuStreamCreateWithPriority(driver, stream: *mut usize, flags: c_uint, _priority: c_int) {
        create(driver, stream, flags)?;
    }

    fn cuStreamDestroy_v2(driver, stream: usize) {
        driver.in_context()?;
        if stream <= 2 || !driver.streams.contains_key(&stream) { return Err(Code::INVALID_HANDLE) }
        // Queued work still runs.
        driver.drain(stream)?;
        driver.streams.remove(&stream);
    }

    fn cuStreamSynchronize(driver, stream: usize) {
        driver.in_context()?;
        let id = require_not_capturing(driver, stream)?;
        driver.count_wait();
        if driver.is_default_stream(id) {
            driver.default_stream_waits(driver.streams[&id].context)?;
        }
        driver.drain(id)?;
    }

    fn cuStreamQuery(driver, stream: usize) {
        let id = require_not_capturing(driver, stream)?;
        // Polling must make progress, but not complete at once.
        driver.run_next(id)?;
        if !driver.is_idle(id) { return Err(Code::NOT_READY) }
    }

    fn cuStreamWaitEvent(driver, stream: usize, event: usize, _flags: c_uint) {
        driver.stream_waits(stream, event)?;
    }

    fn cuStreamGetFlags(driver, stream: usize, flags: *mut c_uint) {
        driver.in_context()?;
        let stream = &driver.streams[&driver.stream_id(stream)?];
        *flags = u32::from(stream.non_blocking);
    }

    fn cuLaunchHostFunc(driver, stream: usize, function: unsafe extern "C" fn(*mut c_void), data: usize) {
        driver.in_context()?;
        driver.push(stream, Work::Host(function, data))?;
    }

    fn cuEventCreate(driver, event: *mut usize, flags: c_uint) {
        let context = driver.in_context()?;
        *event = driver.handle();
        driver.events.insert(*event, Event { context, timed: flags & 2 == 0, ..Event::default() });
    }

    fn cuEventDestroy_v2(driver, event: usize) {
        driver.in_context()?;
        driver.events.remove(&event).ok_or(Code::INVALID_HANDLE)?;
    }

    fn cuEventRecord(driver, event: usize, stream: usize) {
        driver.in_context()?;
        driver.record(event, stream)?;
    }

    fn cuEventRecordWithFlags(driver, event: usize, stream: usize, _flags: c_uint) {
        driver.in_context()?;
        driver.record(event, stream)?;
    }

    fn cuEventSynchronize(driver, event: usize) {
        driver.in_context()?;
        let marker = driver.events.get(&event).ok_or(Code::INVALID_HANDLE)?.last.clone();
        driver.count_wait();
        if let Some(marker) = marker {
            if marker.capture.is_some() { return Err(Code::CAPTURED_EVENT) }
            driver.wait_for(&marker)?;
        }
    }

    fn cuEventQuery(driver, event: usize) {
        let marker = driver.events.get(&event).ok_or(Code::INVALID_HANDLE)?.last.clone();
        if let Some(marker) = marker {
            if marker.capture.is_some() { return Err(Code::CAPTURED_EVENT) }
            driver.run_towards(&marker)?;
            if !marker.passed() { return Err(Code::NOT_READY) }
        }
    }

    fn cuEventElapsedTime(driver, ms: *mut f32, start: usize, end: usize) { elapsed(driver, ms, start, end)? }

    fn cuEventElapsedTime_v2(driver, ms: *mut f32, start: usize, end: usize) { elapsed(driver, ms, start, end)? }

    fn cuStreamBeginCapture_v2(driver, stream: usize, mode: c_uint) {
        let id = driver.stream_id(stream)?;
        // The legacy default stream cannot be captured.
        if driver.is_default_stream(id) { return Err(Code::CAPTURE_UNSUPPORTED) }
        if driver.streams[&id].capture.is_some() { return Err(Code::INVALID_VALUE) }
        let key = driver.handle();
        let thread = std::thread::current().id();
        let capture =
            Capture { origin: id, mode, thread, nodes: Vec::new(), joined: Default::default(), invalidated: false };
        driver.captures.insert(key, capture);
        driver.streams.get_mut(&id).expect("looked up above").capture = Some(key);
    }

    fn cuStreamEndCapture(driver, stream: usize, graph: *mut usize) { end_capture(driver, stream, graph)? }

    fn cuStreamIsCapturing(driver, stream: usize, status: *mut c_uint) {
        let capture = driver.streams[&driver.stream_id(stream)?].capture;
        *status = match capture.and_then(|c| driver.captures.get(&c)) {
            None => 0,
            Some(capture) => 1 + u32::from(capture.invalidated),
        };
    }

    fn cuStreamGetCaptureInfo(driver, stream: usize, status: *mut c_uint, id: *mut u64) {
        let capture = driver.streams[&driver.stream_id(stream)?].capture;
        *status = u32::from(capture.is_some());
        if !id.is_null() { *id = capture.unwrap_or(0) as u64 }
    }

    fn cuThreadExchangeStreamCaptureMode(driver, mode: *mut c_uint) { *mode = 0 }

    fn cuGraphInstantiateWithFlags(driver, to: *mut usize, graph: usize, _flags: u64) {
        instantiate(driver, to, graph)?;
    }

    fn cuGraphInstantiate_v2(
        driver, to: *mut usize, graph: usize, _node: *mut usize, _log: *mut c_char, _size: usize,
    ) {
        instantiate(driver, to, graph)?;
    }

    fn cuGraphUpload(driver, graph: usize, _stream: usize) {
        if !driver.graphs.contains_key(&graph) { return Err(Code::INVALID_VALUE) }
    }

    fn cuGraphLaunch(driver, graph: usize, stream: usize) {
        driver.in_context()?;
        let nodes = driver.graphs.get(&graph).ok_or(Code::INVALID_VALUE)?.nodes.clone();
        driver.push(stream, Work::Graph(nodes))?;
    }

    fn cuGraphGetNodes(driver, graph: usize, _nodes: *mut usize, count: *mut usize) {
        *count = driver.graphs.get(&graph).ok_or(Code::INVALID_VALUE)?.nodes.len();
    }

    fn cuGraphDestroy(driver, graph: usize) { driver.graphs.remove(&graph).ok_or(Code::INVALID_VALUE)?; }

    fn cuGraphExecDestroy(driver, graph: usize) { driver.graphs.remove(&graph).ok_or(Code::INVALID_VALUE)?; }
}

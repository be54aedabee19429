//! Bytes on their way to a GPU while it computes: pinned batches that threads fill, and two tables that a stream of copies of its
//! own fills in turns.
//!
//! Events order the life of a table: a copy waits until the work that reads the table's last contents is done, and the work that
//! reads the new contents waits for the copy. So a batch is copied while the GPU computes with the one before, and the host waits
//! for neither.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

use super::gpu::lock;
use super::{Gpu, Table};
use crate::device::Device;

/// Bytes of a piece of pinned memory, and of a copy.
const CHUNK: usize = 4 << 20;

/// Batches that are pinned at the beginning: one that is being filled, one that waits for the consumer, and those of two steps
/// whose copies are in flight.
const BATCHES: usize = 4;

/// Batches with copies in flight beyond which a thread that wants to fill another one waits. A training run has at most two, so
/// only a consumer that never waits for the GPU itself reaches it.
const IN_FLIGHT: usize = 3;

/// What is reserved for a batch after one of `size`: batches of photos differ in size by a few percent.
fn with_reserve(size: usize) -> usize {
    size + size / 8
}

/// Pinned memory for batches of bytes.
#[derive(Debug)]
pub(crate) struct Pinned {
    device: Device,
    /// Buffers that no batch has, the one given back first in front.
    free: Mutex<Vec<Buffer>>,
    /// The first batch has been filled, and the others have been pinned after its size.
    provided: Mutex<bool>,
}

/// Pieces of pinned memory, and the event after which their last copy is done; null if it could not be made.
#[derive(Debug)]
struct Buffer {
    chunks: Vec<*mut u8>,
    done: CUevent,
}

// SAFETY: pinned memory and events belong to the context, not to a thread.
unsafe impl Send for Buffer {}

/// A batch of bytes in pinned memory. Dropping it gives the memory back.
#[derive(Debug)]
pub(crate) struct PinnedBatch {
    owner: Arc<Pinned>,
    filled: Mutex<Filled>,
}

#[derive(Debug)]
struct Filled {
    /// Present until the batch is dropped.
    buffer: Option<Buffer>,
    bytes: usize,
}

impl Pinned {
    /// Pins nothing yet.
    pub(crate) fn new(device: &Device) -> Arc<Self> {
        let device = device.clone();
        Arc::new(Self { device, free: Mutex::default(), provided: Mutex::default() })
    }

    /// An empty batch. If many are in flight, waits until the oldest one has been copied.
    pub(crate) fn take(self: &Arc<Self>) -> PinnedBatch {
        let mut free = lock(&self.free);
        let copied = free.iter().position(|buffer| self.is_copied(buffer));
        let buffer = match copied {
            Some(i) => free.remove(i),
            None if free.len() < IN_FLIGHT => {
                drop(free);
                self.buffer()
            }
            None => {
                let oldest = free.remove(0);
                // Others give their batches back meanwhile.
                drop(free);
                self.device.gpu().attempt_beside(
                    || "waiting for a copy to the GPU".into(),
                    // SAFETY: the event lives as long as its buffer.
                    |_| unsafe { result::event::synchronize(oldest.done) },
                );
                oldest
            }
        };
        let filled = Mutex::new(Filled { buffer: Some(buffer), bytes: 0 });
        PinnedBatch { owner: self.clone(), filled }
    }

    /// Whether no copy from a buffer is in flight. After a failure nothing is copied any more.
    fn is_copied(&self, buffer: &Buffer) -> bool {
        let copied = self.device.gpu().attempt_beside(
            || "asking whether a copy to the GPU is done".into(),
            // SAFETY: the event lives as long as its buffer.
            |_| match unsafe { result::event::query(buffer.done) } {
                Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
                other => other.map(|()| true),
            },
        );
        copied.unwrap_or(true)
    }

    /// A buffer without memory.
    fn buffer(&self) -> Buffer {
        let done = self.device.gpu().attempt_beside(|| "making an event".into(), |_| event());
        Buffer { chunks: Vec::new(), done: done.unwrap_or(std::ptr::null_mut()) }
    }

    /// Pins memory until a buffer has room for `bytes`, or the GPU has failed.
    fn extend(&self, buffer: &mut Buffer, bytes: usize) {
        while buffer.chunks.len() * CHUNK < bytes {
            let chunk = self.device.gpu().attempt_beside(
                || format!("pinning {CHUNK} bytes"),
                // SAFETY: plain pinned memory of this size, which `drop` frees.
                |_| unsafe { result::malloc_host(CHUNK, 0) },
            );
            let Some(chunk) = chunk else { return };
            buffer.chunks.push(chunk.cast());
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let buffers = std::mem::take(&mut *lock(&self.free));
        self.device.gpu().finish(|| {
            // SAFETY: no batch is left, and no copy is in flight after the wait. Errors are ignored: nothing uses the memory.
            unsafe {
                for buffer in buffers.iter().filter(|buffer| !buffer.done.is_null()) {
                    let _ = result::event::synchronize(buffer.done);
                    let _ = result::event::destroy(buffer.done);
                }
                for chunk in buffers.iter().flat_map(|buffer| &buffer.chunks) {
                    let _ = result::free_host(chunk.cast::<c_void>());
                }
            }
        });
    }
}

impl PinnedBatch {
    /// Appends bytes; returns where they begin. Threads may append at the same time, each to a place of its own.
    pub(crate) fn append(&self, bytes: &[u8]) -> usize {
        let mut filled = self.filled();
        let begin = filled.bytes;
        filled.bytes += bytes.len();
        let end = filled.bytes;
        self.owner.extend(filled.buffer(), end);
        drop(filled);
        let (mut at, mut rest) = (begin, bytes);
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.len().min(CHUNK - at % CHUNK));
            let chunk = self.filled().buffer().chunks.get(at / CHUNK).copied();
            // Without it the GPU has failed and will not miss the bytes.
            let Some(chunk) = chunk else { break };
            // SAFETY: the piece lies within the chunk, which is pinned until `self` is dropped. No one else writes there: `append`
            // gives out each place once, and no copy from the buffer is in flight until the batch is sent, which consumes it.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), chunk.add(at % CHUNK), piece.len());
            }
            (at, rest) = (at + piece.len(), behind);
        }
        begin
    }

    /// Ends the filling. After the first batch, pins what the following ones will need, so that no later step does.
    pub(crate) fn complete(&self) {
        let mut provided = lock(&self.owner.provided);
        if std::mem::replace(&mut *provided, true) {
            return;
        }
        let bytes = with_reserve(self.bytes());
        self.owner.extend(self.filled().buffer(), bytes);
        for _ in 1..BATCHES {
            let mut buffer = self.owner.buffer();
            self.owner.extend(&mut buffer, bytes);
            lock(&self.owner.free).push(buffer);
        }
    }

    /// The number of bytes.
    fn bytes(&self) -> usize {
        self.filled().bytes
    }

    fn filled(&self) -> MutexGuard<'_, Filled> {
        lock(&self.filled)
    }
}

impl Filled {
    fn buffer(&mut self) -> &mut Buffer {
        self.buffer.as_mut().expect("present until the batch is dropped")
    }
}

impl Drop for PinnedBatch {
    fn drop(&mut self) {
        lock(&self.owner.free).extend(self.filled().buffer.take());
    }
}

/// Two tables of bytes on a GPU: queued work reads one while the other is filled.
#[derive(Debug)]
pub(crate) struct Feed {
    device: Device,
    /// The stream of the copies. It and the events are null after a failure, when nothing is queued any more.
    stream: CUstream,
    slots: [Slot; 2],
    next: usize,
}

#[derive(Debug)]
struct Slot {
    table: Table<u8>,
    /// The table's contents have arrived.
    copied: CUevent,
    /// The work that reads them is done.
    read: CUevent,
}

// SAFETY: streams and events belong to the context, not to a thread.
unsafe impl Send for Feed {}

impl Feed {
    /// Empty tables.
    pub(crate) fn new(device: &Device) -> Self {
        let made = device.gpu().attempt_beside(
            || "making a stream of copies".into(),
            |_| {
                let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
                Ok((stream, [event()?, event()?, event()?, event()?]))
            },
        );
        let null = std::ptr::null_mut();
        let (stream, [a, b, c, d]) = made.unwrap_or((null, [null.cast(); 4]));
        let slot = |copied, read| Slot { table: Table::room(device, 0), copied, read };
        Self { device: device.clone(), stream, slots: [slot(a, b), slot(c, d)], next: 0 }
    }

    /// Queues a copy of a batch beside the GPU's other work, and then what `read` queues: work that reads the table with the
    /// batch's bytes. Waits for nothing.
    pub(crate) fn send<R>(&mut self, batch: PinnedBatch, read: impl FnOnce(&Table<u8>) -> R) -> R {
        let bytes = batch.bytes();
        let gpu = self.device.gpu();
        gpu.expect_no_capture("copies from the host");
        gpu.note("copy from the host", || [0, bytes as u64]);
        if bytes > self.slots[0].table.len() {
            self.grow(bytes);
        }
        let (gpu, slot) = (self.device.gpu(), &mut self.slots[self.next]);
        self.next = 1 - self.next;
        let to = slot.table.device_out().address();
        let mut filled = batch.filled();
        let Buffer { chunks, done } = filled.buffer();
        gpu.attempt(
            || format!("copy of {bytes} bytes to the GPU"),
            |gpu| {
                wait_for(self.stream, slot.read)?;
                for (chunk, at) in chunks.iter().zip((0..bytes).step_by(CHUNK)) {
                    // SAFETY: the chunk is pinned and has `CHUNK` bytes, which change only after `done` has passed. The table has room
                    // for all bytes, and no work uses it before `copied` or after `read`.
                    unsafe {
                        let piece = std::slice::from_raw_parts(*chunk, (bytes - at).min(CHUNK));
                        result::memcpy_htod_async(to + at as u64, piece, self.stream)?;
                    }
                }
                // `done` first: where `copied` has passed, the buffer is free, too.
                record(*done, self.stream)?;
                record(slot.copied, self.stream)?;
                wait_for(gpu.stream(), slot.copied)
            },
        );
        drop(filled);
        let result = read(&slot.table);
        gpu.attempt(|| "recording an event".into(), |gpu| record(slot.read, gpu.stream()));
        result
    }

    /// Makes room for batches of `bytes` bytes.
    fn grow(&mut self, bytes: usize) {
        let room = with_reserve(bytes);
        // To few distinct sizes, because the pool keeps freed memory by size.
        let room = room.next_multiple_of((room.next_power_of_two() / 8).max(4096));
        for slot in &mut self.slots {
            slot.table = Table::room(&self.device, room);
            // Queued work may still use the memory's last contents, and poisons it.
            let queue = |gpu: &Gpu| record(slot.read, gpu.stream());
            self.device.gpu().attempt(|| "recording an event".into(), queue);
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if self.stream.is_null() {
            return;
        }
        self.device.gpu().finish(|| {
            // SAFETY: they were made by `new`, and no copy is in flight after the wait. Errors are ignored: nothing uses them any
            // more. The tables' next users are queued on the compute stream, which has waited for every copy.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                for slot in &self.slots {
                    let _ = result::event::destroy(slot.copied);
                    let _ = result::event::destroy(slot.read);
                }
                let _ = result::stream::destroy(self.stream);
            }
        });
    }
}

fn event() -> Result<CUevent, DriverError> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
}

/// Marks the end of what is queued on a stream.
fn record(event: CUevent, stream: CUstream) -> Result<(), DriverError> {
    // SAFETY: both belong to the current context and are alive, as all handles of this file are while nothing has failed.
    unsafe { result::event::record(event, stream) }
}

/// Makes what is queued on a stream from now on wait for an event; not at all if it was never recorded.
fn wait_for(stream: CUstream, event: CUevent) -> Result<(), DriverError> {
    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    // SAFETY: as in `record`.
    unsafe { result::stream::wait_event(stream, event, flags) }
}

//! Memory and streams of other libraries. They share the GPU's primary context with the engine, as everything does that uses CUDA's
//! runtime: PyTorch, CuPy, JAX.

use std::any::Any;
use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUcontext, CUevent_flags, CUevent_wait_flags, CUpointer_attribute, CUresult, CUstream,
    CUstreamCaptureStatus,
};

use super::Gpu;
use crate::error::{Error, Result};

/// The type of memory that lies on a GPU, in the driver's numbers.
const ON_A_GPU: u32 = 2;

/// A stream of another library, in the primary context of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForeignStream(CUstream);

// SAFETY: a handle, which the driver takes from any thread.
unsafe impl Send for ForeignStream {}
// SAFETY: as above.
unsafe impl Sync for ForeignStream {}

impl ForeignStream {
    /// The legacy default stream, in which PyTorch works unless it is told otherwise.
    pub const LEGACY: Self = Self(std::ptr::without_provenance_mut(1));

    /// The stream with this handle, the driver's `CUstream` or the runtime's `cudaStream_t`: 0 and 1 are the legacy default stream,
    /// 2 is that of whichever thread uses it, so all that is shared with it must be dropped on the thread that shared it.
    ///
    /// # Safety
    /// Any other handle is that of a stream in the primary context of each GPU with which this is used, and the stream lives until
    /// the last tensor is dropped that is adopted or lent with it.
    pub unsafe fn from_handle(handle: usize) -> Self {
        Self(std::ptr::with_exposed_provenance_mut::<c_void>(handle.max(1)).cast())
    }
}

/// Memory of another library on a GPU, for [`Tensor::adopt`](crate::tensor::Tensor::adopt).
pub struct Foreign {
    /// The address of the first element.
    pub address: u64,
    /// The stream in which the other library uses the memory.
    pub stream: ForeignStream,
    /// Keeps the memory. It is dropped, on any thread, once nothing of the engine's needs the memory that `stream` does not wait for.
    pub owner: Box<dyn Any + Send>,
}

impl std::fmt::Debug for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "memory at {:#x} of {:?}", self.address, self.stream)
    }
}

/// Runs `f` and leaves the calling thread's current CUDA context as it was. The engine makes its own current in every thread that
/// calls it; CUDA's runtime takes that to be the thread's choice of a GPU. Wrap all calls of a GPU's tensors and operations, and where
/// they are dropped, in a program whose threads use the runtime, too, if it has several GPUs.
pub fn as_guest<R>(f: impl FnOnce() -> R) -> R {
    /// Makes the context current again, even if `f` panics.
    struct Restore(Option<CUcontext>);
    impl Drop for Restore {
        fn drop(&mut self) {
            let context = self.0.unwrap_or(std::ptr::null_mut());
            // SAFETY: it was current before, and null is none. An error is ignored: it is that of a context that is gone.
            let _ = unsafe { result::ctx::set_current(context) };
        }
    }
    // Asked until there is one: to look for it takes longer than what follows.
    static PRESENT: OnceLock<()> = OnceLock::new();
    if PRESENT.get().is_none() {
        // SAFETY: opens a library by name and calls none of its functions.
        if !unsafe { sys::is_culib_present() } {
            return f();
        }
        PRESENT.get_or_init(|| ());
    }
    // Before the driver's start it is an error, and none is current.
    let _restore = Restore(result::ctx::get_current().ok().flatten());
    f()
}

impl Gpu {
    /// Makes work that is queued from now on wait for what `stream` holds now.
    ///
    /// # Errors
    /// If the GPU has failed, or a graph is being captured on the stream.
    pub(crate) fn wait_for(&self, stream: ForeignStream) -> Result<()> {
        self.expect_no_capture_on(stream)?;
        self.attempt(
            || "waiting for another library's stream".into(),
            |gpu| order(stream.0, gpu.stream()),
        );
        self.check()
    }

    /// Makes `stream` wait for all work queued so far.
    ///
    /// # Errors
    /// As [`Gpu::wait_for`].
    pub(crate) fn let_wait(&self, stream: ForeignStream) -> Result<()> {
        self.expect_no_capture_on(stream)?;
        self.attempt(
            || "letting another library's stream wait".into(),
            |gpu| order(gpu.stream(), stream.0),
        );
        self.check()
    }

    /// Orders `stream` behind all queued work, so that memory can be returned to its library, even after a failure; waits here if the
    /// stream cannot. Returns whether it may be returned: not in the midst of a capture of this GPU, whose replays may use it.
    pub(crate) fn return_to(&self, stream: ForeignStream) -> bool {
        if self.capturing.load(Ordering::Acquire) {
            return false;
        }
        as_guest(|| {
            self.finish(|| {
                let follows = is_capturing(stream) == Ok(false);
                if !follows || order(self.stream(), stream.0).is_err() {
                    // SAFETY: the stream lives as long as `self`. After an error nothing is running that could be waited for.
                    let _ = unsafe { result::stream::synchronize(self.stream()) };
                }
            });
        });
        true
    }

    /// Orders the work queued from now on behind what `stream` holds, so that memory which was lent can be used again. Returns
    /// whether it may: not while a graph is captured on either stream, whose replays may use it.
    pub(crate) fn take_back_from(&self, stream: ForeignStream) -> bool {
        let mut may = false;
        if !self.capturing.load(Ordering::Acquire) {
            as_guest(|| {
                self.finish(|| {
                    let follows = is_capturing(stream) == Ok(false);
                    may = follows && order(stream.0, self.stream()).is_ok();
                });
            });
        }
        may
    }

    /// Fails if these bytes are not memory of this GPU.
    pub(crate) fn expect_own(&self, address: u64) -> Result<()> {
        let asked = self.attempt(
            || "asking where memory lies".into(),
            |_| {
                let (mut kind, mut ordinal) = (0_u32, -1_i32);
                let ask = |which, to: *mut c_void| {
                    // SAFETY: each attribute writes one number of 4 bytes. An address that is unknown is an error.
                    unsafe { sys::cuPointerGetAttribute(to, which, address) }.result()
                };
                use CUpointer_attribute as Attribute;
                let known = ask(
                    Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                    std::ptr::from_mut(&mut kind).cast(),
                )
                .and_then(|()| {
                    ask(
                        Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                        std::ptr::from_mut(&mut ordinal).cast(),
                    )
                });
                match known {
                    Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)) => Ok(false),
                    known => known.map(|()| kind == ON_A_GPU && ordinal as usize == self.ordinal()),
                }
            },
        );
        self.check()?;
        match asked {
            Some(true) => Ok(()),
            _ => Err(Error::Device(format!(
                "address {address:#x} is not in the memory of GPU {}",
                self.ordinal()
            ))),
        }
    }

    /// Fails while a graph is being captured on a stream: what would be queued for it is not part of its graph.
    fn expect_no_capture_on(&self, stream: ForeignStream) -> Result<()> {
        self.check()?;
        let capturing = self.attempt(
            || "asking whether a stream is capturing".into(),
            |gpu| match is_capturing(stream) {
                _ if gpu.capturing.load(Ordering::Acquire) => Ok(true),
                // Said of the legacy default stream while another is capturing.
                Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)) => Ok(true),
                capturing => capturing,
            },
        );
        match capturing {
            Some(true) => Err(Error::Device(
                "a CUDA graph is being captured, of which what two libraries exchange cannot be part: call selfsup outside of the capture"
                    .into(),
            )),
            _ => self.check(),
        }
    }
}

/// Whether a graph is being captured on a stream.
fn is_capturing(stream: ForeignStream) -> std::result::Result<bool, DriverError> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the stream is alive, as its maker promised; writes one number.
    unsafe { sys::cuStreamIsCapturing(stream.0, &mut status) }.result()?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Makes what is queued on `then` from now on wait for what `first` holds now. The context of both is current.
fn order(first: CUstream, then: CUstream) -> std::result::Result<(), DriverError> {
    let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
    // SAFETY: both streams are alive, of this context, as their makers promised. The driver keeps an event's resources until the
    // work that waits for it has passed it.
    unsafe {
        let wait =
            || result::stream::wait_event(then, event, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT);
        let ordered = result::event::record(event, first).and_then(|()| wait());
        ordered.and(result::event::destroy(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_and_the_driver_number_the_default_stream_differently() {
        // SAFETY: the numbers of default streams.
        let [runtime, driver, thread] =
            [0, 1, 2].map(|handle| unsafe { ForeignStream::from_handle(handle) });
        assert_eq!(runtime, driver);
        assert_eq!(driver, ForeignStream::LEGACY);
        assert_ne!(thread, driver);
    }

    #[test]
    fn a_guest_returns_what_it_computes() {
        assert_eq!(as_guest(|| 3), 3);
    }
}

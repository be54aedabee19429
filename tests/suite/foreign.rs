//! Tensors in other libraries' memory, and the engine's in theirs: in the order of the two streams, without a wait, with each owner
//! dropped once.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{self, CUstream};
use selfsup::device::{Device, Foreign, ForeignStream, Group, Precision, as_guest};
use selfsup::ops;
use selfsup::tensor::{DType, Tensor};

use crate::driver::{StandIn, alone, gpu};

/// Rows and columns of the scores that travel.
const SHAPE: [usize; 2] = [5, 7];
const BYTES: usize = 5 * 7 * 4;

/// Another library: a stream of its own, and memory in its order.
struct Other {
    stream: CUstream,
    /// What pinned copies read.
    pinned: *mut f32,
}

impl Other {
    /// Needs a context: the engine's, which is the device's primary one.
    fn new() -> Self {
        let stream = result::stream::create(StreamKind::NonBlocking).unwrap();
        // SAFETY: plain pinned memory, which `drop` frees.
        let pinned = unsafe { result::malloc_host(BYTES, 0) }.unwrap().cast();
        Self { stream, pinned }
    }

    fn foreign_stream(&self) -> ForeignStream {
        // SAFETY: the stream lives as long as `self`, and all that is shared with it is dropped before.
        unsafe { ForeignStream::from_handle(self.stream.expose_provenance()) }
    }

    /// Memory whose values land some time after now, in the stream's order.
    fn late(&self, values: &[f32]) -> u64 {
        // SAFETY: both have this many bytes, and the pinned ones stay until the stream has been waited for.
        unsafe {
            let at = result::malloc_sync(BYTES).unwrap();
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.pinned, values.len());
            sys::cuMemcpyHtoDAsync_v2(at, self.pinned.cast::<c_void>(), BYTES, self.stream)
                .result()
                .unwrap();
            at
        }
    }

    /// Reads memory behind all queued work of the stream.
    fn read(&self, at: u64) -> Vec<f32> {
        let mut values = vec![0.0_f32; BYTES / 4];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: there are so many bytes at the address.
        unsafe {
            result::stream::synchronize(self.stream).unwrap();
            result::memcpy_dtoh_sync(bytes, at).unwrap();
        }
        values
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and no longer used.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::free_host(self.pinned.cast());
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// Counts its drops, and overwrites the memory in its stream's order, as the next owner of such memory does.
struct Owner {
    at: u64,
    stream: usize,
    drops: Arc<AtomicUsize>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        let stream = std::ptr::with_exposed_provenance_mut::<c_void>(self.stream).cast();
        // SAFETY: the memory is there until the test ends, and so is the stream.
        unsafe { result::memset_d8_async(self.at, 0xFF, BYTES, stream) }.unwrap();
        self.drops.fetch_add(1, Ordering::Relaxed);
    }
}

fn scores() -> Vec<f32> {
    (0..BYTES / 4).map(|i| (i as f32 * 0.7).sin()).collect()
}

fn assigned(scores: &Tensor) -> Tensor {
    ops::sinkhorn(scores, 0.05, 3, &Group::alone())
}

/// What the values must be.
fn wanted() -> Vec<f64> {
    assigned(&Tensor::from_slice(&Device::cpu(1).unwrap(), SHAPE, &scores())).to_f64()
}

fn close(got: &[f64], want: &[f64]) -> bool {
    got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5)
}

/// Adopts an owner's memory.
fn adopted(device: &Device, other: &Other, drops: &Arc<AtomicUsize>, at: u64) -> Tensor {
    let (stream, drops) = (other.stream.expose_provenance(), drops.clone());
    let owner = Box::new(Owner { at, stream, drops });
    let foreign = Foreign { address: at, stream: other.foreign_stream(), owner };
    // SAFETY: the memory holds the shape's values once the stream has passed the copy, and nobody writes to it before the owner is
    // dropped.
    unsafe { Tensor::adopt(device, DType::F32, SHAPE, foreign) }.unwrap()
}

fn free(at: u64) {
    // SAFETY: allocated by `late`, and no longer used.
    unsafe { result::free_sync(at) }.unwrap();
}

/// For each of several orders in which a driver may run the work of two streams.
fn in_any_order(driver: &StandIn, test: impl Fn(u64)) {
    for seed in 1..=12 {
        driver.seed(seed);
        test(seed);
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn adopted_memory_is_read_after_its_stream_and_returned_before_it_goes_on() {
    alone(
        "foreign::adopted_memory_is_read_after_its_stream_and_returned_before_it_goes_on",
        |driver| {
            let (device, want) = (gpu(Precision::F32), wanted());
            let other = Other::new();
            in_any_order(driver, |seed| {
                let drops = Arc::default();
                let at = other.late(&scores());
                driver.reset();
                let x = adopted(&device, &other, &drops, at);
                let (part, y) = (x.rows(0, 2), assigned(&x));
                drop(x);
                assert_eq!(drops.load(Ordering::Relaxed), 0, "a part is still there");
                drop(part);
                assert_eq!(drops.load(Ordering::Relaxed), 1);
                assert_eq!(driver.count("waits"), 0, "the host waited");
                assert!(close(&y.to_f64(), &want), "seed {seed}: {:?}", y.to_f64());
                assert!(other.read(at).iter().all(|value| value.is_nan()));
                free(at);
            });
            device.check().unwrap();
        },
    );
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn lent_memory_is_read_after_the_engines_stream_and_used_again_after_the_other_one() {
    alone(
        "foreign::lent_memory_is_read_after_the_engines_stream_and_used_again_after_the_other_one",
        |driver| {
            let (device, want) = (gpu(Precision::F32), wanted());
            let other = Other::new();
            in_any_order(driver, |seed| {
                let to = other.late(&scores());
                let x = Tensor::from_slice(&device, SHAPE, &scores());
                driver.reset();
                let lent = assigned(&x).lend(other.foreign_stream()).unwrap();
                assert_eq!(**lent.tensor().shape(), SHAPE);
                let address = lent.address();
                // SAFETY: both have this many bytes.
                unsafe { result::memcpy_dtod_async(to, address, BYTES, other.stream) }.unwrap();
                drop(lent);
                // The next tensor of this size has the same memory.
                let mut again = x.empty_like();
                let at = again.lend(other.foreign_stream()).unwrap().address();
                assert_eq!(at, address);
                again.view_mut().fill(3.0);
                assert_eq!(driver.count("waits"), 0, "the host waited");
                let got: Vec<f64> = other.read(to).into_iter().map(f64::from).collect();
                assert!(close(&got, &want), "seed {seed}: {got:?}");
                free(to);
            });
            device.check().unwrap();
        },
    );
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn what_cannot_be_shared_is_refused_in_a_sentence() {
    alone("foreign::what_cannot_be_shared_is_refused_in_a_sentence", |driver| {
        driver.devices(2);
        let device = gpu(Precision::F32);
        let other = Other::new();
        let (drops, at) = (Arc::<AtomicUsize>::default(), other.late(&scores()));
        let refused = |device: &Device, address: u64| {
            let owner = Box::new(Owner {
                at,
                stream: other.stream.expose_provenance(),
                drops: drops.clone(),
            });
            let foreign = Foreign { address, stream: other.foreign_stream(), owner };
            // SAFETY: it is refused before the memory is used.
            unsafe { Tensor::adopt(device, DType::F32, SHAPE, foreign) }.unwrap_err().to_string()
        };
        let host = [0.0_f32; 4];
        let said = refused(&device, host.as_ptr().expose_provenance() as u64);
        assert!(said.contains("is not in the memory of GPU 0"), "{said}");
        let said = refused(&device, other.pinned.expose_provenance() as u64);
        assert!(said.contains("is not in the memory of GPU 0"), "{said}");
        let said = refused(&device, at + 2);
        assert!(said.contains("no multiple of the 4 bytes of F32"), "{said}");
        let said = refused(&Device::cpu(1).unwrap(), at);
        assert!(said.contains("cannot be a tensor on CPU"), "{said}");
        let second = as_guest(|| Device::cuda(1, Precision::F32).unwrap());
        let said = as_guest(|| refused(&second, at));
        assert!(said.contains("is not in the memory of GPU 1"), "{said}");
        assert_eq!(drops.load(Ordering::Relaxed), 5, "each owner is dropped once");
        // While a graph is captured on the other library's stream, and afterwards.
        let x = Tensor::from_slice(&device, SHAPE, &scores());
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and not the default one.
        unsafe { result::stream::begin_capture(other.stream, mode) }.unwrap();
        let said = x.lend(other.foreign_stream()).unwrap_err().to_string();
        assert!(said.contains("a CUDA graph is being captured"), "{said}");
        // SAFETY: begun above.
        unsafe { result::stream::end_capture(other.stream) }.unwrap();
        let again = other.late(&scores());
        let got = assigned(&adopted(&device, &other, &drops, again)).to_f64();
        assert!(close(&got, &wanted()), "{got:?}");
        drop(x.lend(other.foreign_stream()).unwrap());
        assert!(other.read(again).iter().all(|value| value.is_nan()));
        free(at);
        free(again);
        device.check().unwrap();
    });
}

/// A program that goes on after a GPU has run out of memory has what tensors held.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_guest_leaves_the_context_alone_and_a_failed_gpu_no_memory() {
    alone("foreign::a_guest_leaves_the_context_alone_and_a_failed_gpu_no_memory", |driver| {
        driver.devices(2);
        let device = gpu(Precision::F32);
        let other = Other::new();
        let before = result::ctx::get_current().unwrap();
        as_guest(|| {
            let second = Device::cuda(1, Precision::F32).unwrap();
            let x = Tensor::from_slice(&second, [2], &[1.0_f32, 2.0]);
            assert_eq!(x.copy().to_f64(), [1.0, 2.0]);
            assert_ne!(result::ctx::get_current().unwrap(), before);
        });
        assert_eq!(result::ctx::get_current().unwrap(), before);
        let lent =
            Tensor::from_slice(&device, SHAPE, &scores()).lend(other.foreign_stream()).unwrap();
        let wide = Tensor::zeros(&device, [1 << 10]);
        let held = driver.live_allocations();
        drop(Tensor::zeros(&device, [1 << 40]));
        let said = device.check().unwrap_err().to_string();
        assert!(said.contains("out of memory"), "{said}");
        assert!(wide.lend(other.foreign_stream()).is_err());
        drop((device, wide));
        assert!(driver.live_allocations() > 0, "what is lent is still there");
        let address = lent.address();
        let values: Vec<f32> = other.read(address);
        assert_eq!(values, scores());
        drop(lent);
        assert_eq!(driver.live_allocations(), 0, "of {held}");
    });
}

//! cuDNN through its C interface, versions 8 and 9: convolution, batch norm, pooling, softmax and addition on a GPU.
//!
//! Numbers and types are those of `cudnn_ops.h` and `cudnn_cnn.h`, equal in both versions. Layouts are this program's, channels
//! last. Convolutions run by the algorithm that is the fastest of those that the library tries on this GPU, in f32 without
//! tensor cores. Batch norm, addition and ReLU are calls of their own: the fused ones take no bf16.

mod operations;

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;

use libloading::Library;

use super::queued::{Queued, Status, Words};
use super::{Lack, table};
use crate::device::{Device, Precision};
use crate::error::{Error, Result};

const NAMES: [&str; 3] = ["libcudnn.so.9", "libcudnn.so.8", "libcudnn.so"];

type Handle = *mut c_void;
type Data = *const c_void;
type Out = *mut c_void;

const CHANNELS_FIRST: c_int = 0;
const CHANNELS_LAST: c_int = 1;
const F32: c_int = 0;
const BF16: c_int = 9;
/// What all others call a convolution.
const CROSS_CORRELATION: c_int = 1;
const TENSOR_CORES: c_int = 1;
/// No tensor cores, which would round f32 operands to TF32.
const FMA: c_int = 3;
const NORM_PER_CHANNEL: c_int = 1;
const RELU: c_int = 1;
const KEEP_NAN: c_int = 1;
const POOLING_MAX: c_int = 0;
const POOLING_MEAN: c_int = 1;
const SOFTMAX_ACCURATE: c_int = 1;
const SOFTMAX_OF_IMAGE: c_int = 0;
const ADD: c_int = 0;

/// `cudnnConvolutionFwdAlgoPerf_t`, and those of the gradients: a trial of an algorithm.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Trial {
    algorithm: c_int,
    status: Status,
    milliseconds: f32,
    memory: usize,
    determinism: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

/// Handle, three descriptions and that of the convolution in the function's order, how many trials to report, reported, trials.
type Find = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut c_int,
    *mut Trial,
) -> Status;
/// Handle, 1, two operands with their descriptions, convolution, algorithm, workspace, its size, 0, and the result's.
type Convolve = unsafe extern "C" fn(
    Handle,
    Data,
    Handle,
    Data,
    Handle,
    Data,
    Handle,
    c_int,
    Out,
    usize,
    Data,
    Handle,
    Out,
) -> Status;

table! {
    #[derive(Clone, Copy, Debug)]
    Calls {
        words: "cudnnGetErrorString" (Status) -> *const c_char;
        create: "cudnnCreate" (*mut Handle) -> Status;
        destroy: "cudnnDestroy" (Handle) -> Status;
        set_stream: "cudnnSetStream" (Handle, Handle) -> Status;
        tensor_create: "cudnnCreateTensorDescriptor" (*mut Handle) -> Status;
        tensor_set: "cudnnSetTensor4dDescriptor" (Handle, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
        tensor_destroy: "cudnnDestroyTensorDescriptor" (Handle) -> Status;
        filter_create: "cudnnCreateFilterDescriptor" (*mut Handle) -> Status;
        filter_set: "cudnnSetFilter4dDescriptor" (Handle, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
        filter_destroy: "cudnnDestroyFilterDescriptor" (Handle) -> Status;
        conv_create: "cudnnCreateConvolutionDescriptor" (*mut Handle) -> Status;
        conv_set: "cudnnSetConvolution2dDescriptor"
            (Handle, c_int, c_int, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
        conv_math: "cudnnSetConvolutionMathType" (Handle, c_int) -> Status;
        conv_destroy: "cudnnDestroyConvolutionDescriptor" (Handle) -> Status;
        norm_forward: "cudnnBatchNormalizationForwardTraining"
            (Handle, c_int, Data, Data, Handle, Data, Handle, Out, Handle, Data, Data, f64, Out, Out, f64, Out, Out)
            -> Status;
        norm_backward: "cudnnBatchNormalizationBackward"
            (Handle, c_int, Data, Data, Data, Data, Handle, Data, Handle, Data, Handle, Out, Handle, Data, Out, Out, f64,
             Data, Data) -> Status;
        relu_create: "cudnnCreateActivationDescriptor" (*mut Handle) -> Status;
        relu_set: "cudnnSetActivationDescriptor" (Handle, c_int, c_int, f64) -> Status;
        relu_destroy: "cudnnDestroyActivationDescriptor" (Handle) -> Status;
        relu_forward: "cudnnActivationForward" (Handle, Handle, Data, Handle, Data, Data, Handle, Out) -> Status;
        relu_backward: "cudnnActivationBackward"
            (Handle, Handle, Data, Handle, Data, Handle, Data, Handle, Data, Data, Handle, Out) -> Status;
        pool_create: "cudnnCreatePoolingDescriptor" (*mut Handle) -> Status;
        pool_set: "cudnnSetPooling2dDescriptor"
            (Handle, c_int, c_int, c_int, c_int, c_int, c_int, c_int, c_int) -> Status;
        pool_destroy: "cudnnDestroyPoolingDescriptor" (Handle) -> Status;
        pool_forward: "cudnnPoolingForward" (Handle, Handle, Data, Handle, Data, Data, Handle, Out) -> Status;
        pool_backward: "cudnnPoolingBackward"
            (Handle, Handle, Data, Handle, Data, Handle, Data, Handle, Data, Data, Handle, Out) -> Status;
        softmax: "cudnnSoftmaxForward" (Handle, c_int, c_int, Data, Handle, Data, Data, Handle, Out) -> Status;
        sum_create: "cudnnCreateOpTensorDescriptor" (*mut Handle) -> Status;
        sum_set: "cudnnSetOpTensorDescriptor" (Handle, c_int, c_int, c_int) -> Status;
        sum_destroy: "cudnnDestroyOpTensorDescriptor" (Handle) -> Status;
        sum: "cudnnOpTensor"
            (Handle, Handle, Data, Handle, Data, Data, Handle, Data, Data, Handle, Out) -> Status;
    }
}

/// The functions of a convolution's directions: forward, data gradient, weight gradient.
#[derive(Clone, Copy, Debug)]
struct Directions {
    find: [Find; 3],
    run: [Convolve; 3],
}

/// An open cuDNN.
#[derive(Debug)]
pub(crate) struct Cudnn {
    calls: Calls,
    words: Words,
    directions: Directions,
    handle: Handle,
    name: String,
    device: Device,
    /// Holds the functions; dropped last.
    _library: Library,
}

impl Cudnn {
    pub(super) fn open(path: Option<&Path>, device: &Device) -> Result<Self> {
        let (library, path) = super::find("cuDNN", &NAMES, path)?;
        let lacks = |it: &str, function| {
            Error::Device(format!("{} is {it} lacks `{function}`", path.display()))
        };
        // SAFETY: the function has this type in all versions.
        let version = unsafe {
            let version = library.get::<unsafe extern "C" fn() -> usize>("cudnnGetVersion");
            version.map_err(|_| lacks("no cuDNN: it", "cudnnGetVersion"))?()
        };
        // 8907 is 8.9.7, and 91002 is 9.10.2.
        let thousands = if version < 10_000 { 1000 } else { 10_000 };
        let (major, rest) = (version / thousands, version % thousands);
        let name = format!("cuDNN {major}.{}.{}", rest / 100, rest % 100);
        if !matches!(major, 8 | 9) {
            return Err(Error::Device(format!(
                "{} is {name}; this program speaks to 8 and 9",
                path.display()
            )));
        }
        let but = format!("{name}, but");
        let calls = Calls::of(&library).map_err(|function| lacks(&but, function))?;
        let directions = Directions::of(&library).map_err(|function| lacks(&but, function))?;
        let (mut handle, mut status) = (null_mut(), 0);
        device.gpu().on_stream(|stream| {
            // SAFETY: the argument is a handle to fill in, and the context is current.
            status = unsafe { (calls.create)(&mut handle) };
            if status == 0 {
                // SAFETY: the stream lives as long as the device, which this struct keeps.
                status = unsafe { (calls.set_stream)(handle, stream) };
            }
        });
        device.check()?;
        // SAFETY: the library's texts live for ever.
        let words = unsafe { Words::new(calls.words) };
        if status != 0 {
            return Err(Error::Device(format!("{name} cannot use {device}: {}", words.of(status))));
        }
        Ok(Self {
            calls,
            words,
            directions,
            handle,
            name,
            device: device.clone(),
            _library: library,
        })
    }

    fn job(&self) -> Queued<'_> {
        Queued::new(&self.device, &self.name, self.words)
    }

    /// The type of activations.
    fn kind(&self) -> c_int {
        if self.device.gpu().precision() == Precision::Bf16 { BF16 } else { F32 }
    }

    /// A tensor `[n, h, w, c]`.
    fn tensor(&self, job: &mut Queued<'_>, kind: c_int, shape: [usize; 4]) -> Result<Handle, Lack> {
        let [n, h, w, c] = shape.map(|size| size as c_int);
        let calls = self.calls;
        // SAFETY: here and below, the function fills in a handle.
        let handle = job
            .describe("tensor", calls.tensor_destroy, |to| unsafe { (calls.tensor_create)(to) })?;
        // Rows and parameters, which lie alike in both layouts, are known to all functions in this one.
        let layout = if h * w == 1 { CHANNELS_FIRST } else { CHANNELS_LAST };
        // SAFETY: here and below, the handle is the one just made.
        job.check("tensor", unsafe { (calls.tensor_set)(handle, layout, kind, n, c, h, w) })?;
        Ok(handle)
    }
}

impl Directions {
    /// Returns the name of the first function that the library lacks.
    fn of(library: &Library) -> std::result::Result<Self, &'static str> {
        let find = |name: &'static str| {
            // SAFETY: the function has this type in both versions.
            unsafe { library.get::<Find>(name) }.map(|found| *found).map_err(|_| name)
        };
        let run = |name: &'static str| {
            // SAFETY: as above.
            unsafe { library.get::<Convolve>(name) }.map(|found| *found).map_err(|_| name)
        };
        Ok(Self {
            find: [
                find("cudnnFindConvolutionForwardAlgorithm")?,
                find("cudnnFindConvolutionBackwardDataAlgorithm")?,
                find("cudnnFindConvolutionBackwardFilterAlgorithm")?,
            ],
            run: [
                run("cudnnConvolutionForward")?,
                run("cudnnConvolutionBackwardData")?,
                run("cudnnConvolutionBackwardFilter")?,
            ],
        })
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // SAFETY: created by `open`; jobs, which use it, borrow this struct.
        self.device.gpu().on_stream(|_| unsafe {
            (self.calls.destroy)(self.handle);
        });
    }
}

//! Arrays on GPUs, exchanged by DLPack (<https://dmlc.github.io/dlpack/latest/>): what other libraries hand over becomes tensors of the
//! engine, and the engine's become arrays of theirs. Nothing is copied, and nobody waits on the host.
//!
//! The structures are those of `dlpack.h`, 0.8 (unversioned) and 1.0. A capsule's contents and a stream's number are what the
//! protocol says that they are: neither can be checked, here as in every other library that takes part.

mod given;
mod handed;

use std::ffi::c_void;

pub use given::Given;
pub use handed::GpuArray;

/// `kDLCUDA`.
const CUDA: i32 = 2;
/// `kDLFloat`.
const FLOAT: u8 = 2;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DeviceOf {
    kind: i32,
    ordinal: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TypeOf {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Array {
    data: *mut c_void,
    device: DeviceOf,
    ndim: i32,
    dtype: TypeOf,
    shape: *mut i64,
    /// In elements; null if the array is contiguous.
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`, in capsules of the name `dltensor`.
#[repr(C)]
struct Managed {
    array: Array,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`, in capsules of the name `dltensor_versioned`.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    array: Array,
}

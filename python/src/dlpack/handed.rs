//! The engine's tensors for other libraries.

use std::ffi::{CStr, c_void};
use std::ptr;

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::{ffi, intern};
use selfsup::device::{ForeignStream, as_guest};
use selfsup::tensor::{Lent, Tensor};

use super::{Array, CUDA, DeviceOf, FLOAT, Managed, TypeOf, Versioned};
use crate::error::raised;

/// Float32 values in the engine's memory on a GPU, for `from_dlpack` of another library.
#[pyclass(frozen, module = "selfsup._native")]
pub struct GpuArray {
    /// Taken by `drop` alone.
    tensor: Option<Tensor>,
    ordinal: i32,
    shape: Vec<i64>,
    /// In elements.
    strides: Vec<i64>,
    /// The process that made it: a forked one has no context.
    process: u32,
}

impl GpuArray {
    /// All elements of a tensor of GPU `ordinal`, row-major.
    pub fn whole(tensor: Tensor, ordinal: usize) -> Self {
        let shape = tensor.shape().to_vec();
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        Self::strided(tensor, ordinal, &shape, &strides)
    }

    /// A window into the elements of a tensor of GPU `ordinal`.
    ///
    /// # Panics
    /// If it does not lie within them.
    pub fn strided(tensor: Tensor, ordinal: usize, shape: &[usize], strides: &[usize]) -> Self {
        let last: usize = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum();
        assert!(
            shape.len() == strides.len() && last < tensor.len(),
            "a window {shape:?} with strides {strides:?} into {} elements",
            tensor.len()
        );
        let numbers = |values: &[usize]| values.iter().map(|&value| value as i64).collect();
        Self {
            tensor: Some(tensor),
            ordinal: ordinal as i32,
            shape: numbers(shape),
            strides: numbers(strides),
            process: std::process::id(),
        }
    }
}

#[pymethods]
impl GpuArray {
    /// Its sizes.
    #[getter]
    fn shape(&self) -> Vec<i64> {
        self.shape.clone()
    }

    /// DLPack's type of its device, and the GPU's number.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (CUDA, self.ordinal)
    }

    /// A capsule with the elements, which are ready in `stream`, the consumer's: its number, or none for the legacy default stream.
    #[pyo3(signature = (stream=None, *, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<i64>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(Bound<'py, PyAny>, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if copy == Some(true) {
            return Err(PyBufferError::new_err(
                "selfsup hands arrays on a GPU over without a copy",
            ));
        }
        if let Some((kind, ordinal)) = dl_device {
            let kind: i32 = kind.call_method0(intern!(py, "__int__"))?.extract()?;
            if (kind, ordinal) != self.__dlpack_device__() {
                return Err(PyBufferError::new_err(format!(
                    "the array is on cuda:{}, and selfsup moves it nowhere else",
                    self.ordinal
                )));
            }
        }
        let stream = stream_of(stream)?;
        if self.process != std::process::id() {
            return Err(PyBufferError::new_err(
                "the array is on a GPU of another process, which this one was forked from",
            ));
        }
        let tensor = self.tensor.as_ref().expect("taken by `drop` alone");
        let lent = as_guest(|| tensor.lend(stream)).map_err(|e| raised(&e))?;
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        capsule(py, self, lent, versioned)
    }

    fn __repr__(&self) -> String {
        format!("<selfsup array {:?} of float32 on cuda:{}>", self.shape, self.ordinal)
    }
}

impl Drop for GpuArray {
    fn drop(&mut self) {
        let tensor = self.tensor.take();
        match self.process == std::process::id() {
            // Its memory may be freed here, with calls of the driver.
            true => as_guest(|| drop(tensor)),
            false => std::mem::forget(tensor),
        }
    }
}

/// The consumer's stream by the number that the protocol gives it.
fn stream_of(number: Option<i64>) -> PyResult<ForeignStream> {
    let handle = match number {
        None => 1,
        Some(-1) => {
            return Err(PyBufferError::new_err(
                "stream is -1, which asks for no order; selfsup needs the stream in which the array is used",
            ));
        }
        Some(2) => {
            return Err(PyBufferError::new_err(
                "stream is 2, the default stream of each thread, which is another one where the array is given back",
            ));
        }
        Some(0) => {
            return Err(PyValueError::new_err(
                "stream is 0, which DLPack leaves undefined on CUDA: say 1",
            ));
        }
        Some(number) => usize::try_from(number).map_err(|_| {
            PyValueError::new_err(format!("stream is {number}, which is no stream"))
        })?,
    };
    // SAFETY: by the protocol it is the number of a stream of the array's GPU, in which the consumer uses the array.
    Ok(unsafe { ForeignStream::from_handle(handle) })
}

/// What a capsule holds: the structure that consumers read, and what it points to.
#[repr(C)]
struct Handed<T> {
    /// First: its address is that of the whole.
    managed: T,
    shape: Vec<i64>,
    strides: Vec<i64>,
    lent: Option<Lent>,
    process: u32,
}

/// A capsule with a lent array, in DLPack 1.0 if `versioned`, else in 0.8.
fn capsule<'py>(
    py: Python<'py>,
    array: &GpuArray,
    lent: Lent,
    versioned: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let (mut shape, mut strides) = (array.shape.clone(), array.strides.clone());
    let of = Array {
        data: ptr::with_exposed_provenance_mut::<c_void>(lent.address() as usize),
        device: DeviceOf { kind: CUDA, ordinal: array.ordinal },
        ndim: shape.len() as i32,
        dtype: TypeOf { code: FLOAT, bits: 32, lanes: 1 },
        shape: shape.as_mut_ptr(),
        strides: strides.as_mut_ptr(),
        byte_offset: 0,
    };
    let (lent, process, context) = (Some(lent), array.process, ptr::null_mut());
    // A vector's elements stay where they are when it moves into the box.
    let (held, name, destructor): (*mut c_void, &CStr, ffi::PyCapsule_Destructor) = if versioned {
        let (deleter, flags) = (Some(delete::<Versioned> as unsafe extern "C" fn(_)), 0);
        let managed = Versioned { major: 1, minor: 0, context, deleter, flags, array: of };
        let handed = Box::new(Handed { managed, shape, strides, lent, process });
        (Box::into_raw(handed).cast(), c"dltensor_versioned", forget_versioned)
    } else {
        let deleter = Some(delete::<Managed> as unsafe extern "C" fn(_));
        let managed = Managed { array: of, context, deleter };
        let handed = Box::new(Handed { managed, shape, strides, lent, process });
        (Box::into_raw(handed).cast(), c"dltensor", forget_managed)
    };
    // SAFETY: the pointer is not null, the name is static, and the destructor fits the structure.
    unsafe {
        let capsule = ffi::PyCapsule_New(held, name.as_ptr(), Some(destructor));
        Bound::from_owned_ptr_or_err(py, capsule)
    }
}

impl<T> Drop for Handed<T> {
    fn drop(&mut self) {
        let lent = self.lent.take();
        match self.process == std::process::id() {
            true => as_guest(|| drop(lent)),
            false => std::mem::forget(lent),
        }
    }
}

/// Gives an array back; a consumer calls it once, on any thread.
unsafe extern "C" fn delete<T>(managed: *mut T) {
    // SAFETY: it is the first field of what `capsule` boxed with this type. A panic would end the process.
    drop(unsafe { Box::from_raw(managed.cast::<Handed<T>>()) });
}

/// Gives back what a capsule of this name holds, if no consumer took it.
unsafe fn forget<T>(capsule: *mut ffi::PyObject, name: &CStr) {
    // SAFETY: Python calls this with a capsule that is going away; under this name it holds what `capsule` boxed with this type.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, name.as_ptr()) == 1 {
            delete::<T>(ffi::PyCapsule_GetPointer(capsule, name.as_ptr()).cast());
        }
    }
}

unsafe extern "C" fn forget_managed(capsule: *mut ffi::PyObject) {
    // SAFETY: as for the function called.
    unsafe { forget::<Managed>(capsule, c"dltensor") }
}

unsafe extern "C" fn forget_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as for the function called.
    unsafe { forget::<Versioned>(capsule, c"dltensor_versioned") }
}

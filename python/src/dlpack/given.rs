//! Arrays of other libraries.

use std::ffi::CStr;

use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{ffi, intern};
use selfsup::Result;
use selfsup::device::{Device, Foreign, ForeignStream};
use selfsup::tensor::{DType, Tensor};

use super::{Array, CUDA, FLOAT, Managed, TypeOf, Versioned};

/// An array of float32 on a GPU that another library has handed over, contiguous. It is given back when it is dropped, or the tensor
/// that it became.
pub struct Given {
    shape: Vec<usize>,
    ordinal: usize,
    address: u64,
    held: Held,
}

/// What the array's maker gets back.
enum Held {
    Managed(*mut Managed),
    Versioned(*mut Versioned),
}

// SAFETY: the protocol allows the deleter, which alone uses it, on any thread.
unsafe impl Send for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the structure was taken out of its capsule, so nobody else calls the deleter, and this is the only call.
        unsafe {
            match *self {
                Self::Managed(it) => (*it).deleter.into_iter().for_each(|deleter| deleter(it)),
                Self::Versioned(it) => (*it).deleter.into_iter().for_each(|deleter| deleter(it)),
            }
        }
    }
}

impl Given {
    /// Asks an array for its elements, ready in a stream by its number. `what` names it in messages.
    ///
    /// # Errors
    /// `TypeError` if it is no array by DLPack of float32, `ValueError` if it is not on a GPU or not contiguous; what its `__dlpack__`
    /// raises.
    pub fn of(array: &Bound<'_, PyAny>, stream: usize, what: &str) -> PyResult<Self> {
        let py = array.py();
        let (kind, ordinal) = Self::place(array, what)?;
        if kind != CUDA {
            return Err(PyValueError::new_err(format!(
                "{what} is on a device of DLPack's type {kind}; it must be on a CUDA GPU, type {CUDA}"
            )));
        }
        let words = PyDict::new(py);
        words.set_item(intern!(py, "stream"), stream)?;
        let capsule = array.call_method(intern!(py, "__dlpack__"), (), Some(&words))?;
        let (held, of) = take(&capsule, what)?;
        // From here on `held` gives the array back, whatever is wrong with it.
        if (of.device.kind, of.device.ordinal) != (kind, ordinal) {
            return Err(PyBufferError::new_err(format!(
                "{what}: __dlpack__ hands over memory of another device than __dlpack_device__ says"
            )));
        }
        if of.dtype != (TypeOf { code: FLOAT, bits: 32, lanes: 1 }) {
            return Err(PyTypeError::new_err(format!(
                "{what}: on a GPU an array of float32 is needed"
            )));
        }
        let shape = shape(&of).ok_or_else(|| {
            PyValueError::new_err(format!(
                "{what} is not contiguous and row-major, or has no elements"
            ))
        })?;
        let ordinal = usize::try_from(ordinal)
            .map_err(|_| PyValueError::new_err(format!("{what} is on GPU {ordinal}")))?;
        let address = (of.data.addr() as u64).wrapping_add(of.byte_offset);
        Ok(Self { shape, ordinal, address, held })
    }

    /// The type and number of an array's device.
    fn place(array: &Bound<'_, PyAny>, what: &str) -> PyResult<(i32, i32)> {
        let py = array.py();
        if !array.hasattr(intern!(py, "__dlpack__"))? {
            let class = array.get_type();
            return Err(PyTypeError::new_err(format!(
                "{what} is a {class}, not an array on a GPU"
            )));
        }
        let place = array.call_method0(intern!(py, "__dlpack_device__"))?;
        // The type may be a member of an enum.
        Ok((
            place.get_item(0)?.call_method0(intern!(py, "__int__"))?.extract()?,
            place.get_item(1)?.extract()?,
        ))
    }

    /// The number of its GPU.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The array as a tensor, which gives it back in the order of the stream when it is dropped.
    ///
    /// # Errors
    /// As [`Tensor::adopt`].
    pub fn tensor(self, device: &Device, stream: ForeignStream) -> Result<Tensor> {
        let Self { shape, address, held, .. } = self;
        let foreign = Foreign { address, stream, owner: Box::new(held) };
        // SAFETY: by the protocol the array's elements stay until its deleter is called, by `held`; who handed it over does not write
        // to it during the call.
        unsafe { Tensor::adopt(device, DType::F32, &*shape, foreign) }
    }
}

/// Takes a structure out of a capsule, which remembers that, with a copy of its description.
fn take(capsule: &Bound<'_, PyAny>, what: &str) -> PyResult<(Held, Array)> {
    /// What a capsule of this name holds; the capsule has `used` as its name afterwards.
    fn pointer<T>(capsule: &Bound<'_, PyAny>, name: &CStr, used: &'static CStr) -> Option<*mut T> {
        // SAFETY: the object is alive and the interpreter attached; a capsule keeps the pointer to its name, which is static.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) != 1 {
                return None;
            }
            let held = ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr());
            (ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) == 0).then_some(held.cast())
        }
    }
    if let Some(it) = pointer::<Managed>(capsule, c"dltensor", c"used_dltensor") {
        // SAFETY: a capsule of this name holds such a structure.
        return Ok((Held::Managed(it), unsafe { (*it).array }));
    }
    let name = c"dltensor_versioned";
    let Some(it) = pointer::<Versioned>(capsule, name, c"used_dltensor_versioned") else {
        return Err(PyTypeError::new_err(format!(
            "{what}: __dlpack__ returned no capsule of DLPack"
        )));
    };
    let held = Held::Versioned(it);
    // SAFETY: a capsule of this name holds such a structure, whose first fields are the same in every version.
    let (major, minor) = unsafe { ((*it).major, (*it).minor) };
    if major != 1 {
        return Err(PyBufferError::new_err(format!(
            "{what} is in DLPack {major}.{minor}; 1 is needed"
        )));
    }
    // SAFETY: as above, of a version whose fields are known.
    Ok((held, unsafe { (*it).array }))
}

/// The shape of a contiguous array that is not empty.
fn shape(of: &Array) -> Option<Vec<usize>> {
    let rank = usize::try_from(of.ndim).ok()?;
    if rank == 0 || of.data.is_null() {
        return None;
    }
    // SAFETY: by the protocol both have `ndim` numbers, where they are not null.
    let (sizes, strides) = unsafe {
        (
            std::slice::from_raw_parts(of.shape, rank),
            (!of.strides.is_null()).then(|| std::slice::from_raw_parts(of.strides, rank)),
        )
    };
    let shape: Option<Vec<usize>> =
        sizes.iter().map(|&size| usize::try_from(size).ok().filter(|&size| size > 0)).collect();
    let mut expected = 1_i64;
    for i in (0..rank).rev() {
        // The stride of a single row is never used.
        if strides.is_some_and(|strides| sizes[i] != 1 && strides[i] != expected) {
            return None;
        }
        expected = expected.checked_mul(sizes[i])?;
    }
    shape
}

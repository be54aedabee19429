//! Tensors as NumPy arrays, without copies.

use numpy::ndarray::{ArrayView, IxDyn, ShapeBuilder};
use numpy::{Element, PyArrayDyn};
use pyo3::prelude::*;
use selfsup::tensor::Tensor;

/// Keeps the memory of arrays alive: their `base`.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Memory {
    /// Never touched again: the arrays own the elements now.
    _owner: Owner,
}

enum Owner {
    Tensor { _tensor: Tensor },
    Bytes { _bytes: Box<[u8]> },
    Floats { _floats: Box<[f32]> },
}

/// Elements that arrays share, and the object that keeps them alive.
pub struct Shared<'py, T> {
    first: *mut T,
    len: usize,
    memory: Bound<'py, Memory>,
}

impl<'py> Shared<'py, f32> {
    /// Hands a tensor's elements over to Python.
    ///
    /// # Panics
    /// If the tensor is not the only handle on f32 values of the host.
    pub fn tensor(py: Python<'py>, mut tensor: Tensor) -> PyResult<Self> {
        let (first, len) = (tensor.data_mut::<f32>().as_mut_ptr(), tensor.len());
        Self::new(py, first, len, Owner::Tensor { _tensor: tensor })
    }

    /// Hands values over to Python.
    pub fn floats(py: Python<'py>, mut floats: Box<[f32]>) -> PyResult<Self> {
        let (first, len) = (floats.as_mut_ptr(), floats.len());
        Self::new(py, first, len, Owner::Floats { _floats: floats })
    }
}

impl<'py> Shared<'py, f64> {
    /// Hands a tensor's elements over to Python.
    ///
    /// # Panics
    /// If the tensor is not the only handle on f64 values of the host.
    pub fn tensor_f64(py: Python<'py>, mut tensor: Tensor) -> PyResult<Self> {
        let (first, len) = (tensor.data_mut::<f64>().as_mut_ptr(), tensor.len());
        Self::new(py, first, len, Owner::Tensor { _tensor: tensor })
    }
}

impl<'py> Shared<'py, u8> {
    /// Hands bytes over to Python.
    pub fn bytes(py: Python<'py>, mut bytes: Box<[u8]>) -> PyResult<Self> {
        let (first, len) = (bytes.as_mut_ptr(), bytes.len());
        Self::new(py, first, len, Owner::Bytes { _bytes: bytes })
    }
}

impl<'py, T: Element> Shared<'py, T> {
    fn new(py: Python<'py>, first: *mut T, len: usize, owner: Owner) -> PyResult<Self> {
        Ok(Self { first, len, memory: Bound::new(py, Memory { _owner: owner })? })
    }

    /// An array of the elements from `offset` on, with `strides` in elements.
    ///
    /// # Panics
    /// If it does not lie within the elements.
    pub fn array(
        &self,
        offset: usize,
        shape: &[usize],
        strides: &[usize],
    ) -> Bound<'py, PyArrayDyn<T>> {
        let last: usize =
            shape.iter().zip(strides).map(|(n, stride)| (n.max(&1) - 1) * stride).sum();
        let elements: usize = shape.iter().product();
        assert!(
            shape.len() == strides.len() && (elements == 0 || offset + last < self.len),
            "array: {shape:?} with strides {strides:?} from {offset} on in {} elements",
            self.len
        );
        let shape = IxDyn(shape).strides(IxDyn(strides));
        // SAFETY: the view lies within the elements, as checked; they live, at this address, as long as `memory`, which is the
        // base of the array; and nobody else has a handle on them, so Python may write.
        unsafe {
            let view = ArrayView::from_shape_ptr(shape, self.first.add(offset));
            PyArrayDyn::borrow_from_array(&view, self.memory.clone().into_any())
        }
    }

    /// An array of all elements, row-major.
    pub fn whole(&self, shape: &[usize]) -> Bound<'py, PyArrayDyn<T>> {
        self.array(0, shape, &row_major(shape))
    }
}

/// The strides of a contiguous array, in elements.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

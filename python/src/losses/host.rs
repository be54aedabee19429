//! Losses over arrays of the host.

use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use selfsup::Result;
use selfsup::arena::{Arena, Param};
use selfsup::device::{Device, Group};
use selfsup::ops;
use selfsup::tensor::{DType, Tensor};

use super::{PerProcess, computed, root};
use crate::arrays::Shared;
use crate::error::released;

/// The devices that losses run on: f32 on the CPU's threads, f64 on the reference device.
struct Engine {
    threads: usize,
    f32: Arena,
    f64: Arena,
    root: Param,
}

static ENGINE: PerProcess<Engine> = PerProcess::new();

impl Engine {
    fn new(threads: usize) -> Result<Self> {
        let (layout, root) = root();
        let f32 = Arena::new(&layout, &Device::cpu(threads)?, 0);
        let f64 = Arena::new(&layout, &Device::reference(), 0);
        Ok(Self { threads, f32, f64, root })
    }

    fn arena(&mut self, dtype: DType) -> &mut Arena {
        if dtype == DType::F64 { &mut self.f64 } else { &mut self.f32 }
    }
}

/// Works with the engine; makes it for `threads` threads if there is none in this process.
fn with_engine<T>(threads: usize, work: impl FnOnce(&mut Engine) -> Result<T>) -> Result<T> {
    let mut held = ENGINE.lock();
    if held.as_ref().is_none_or(|engine| engine.threads != threads) {
        *held = None;
        *held = Some(Engine::new(threads)?);
    }
    work(held.as_mut().expect("made above"))
}

/// An array of f32 or f64.
enum Array<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F64(PyReadonlyArrayDyn<'py, f64>),
}

/// The elements of an array, and its shape.
struct View<'a> {
    shape: Vec<usize>,
    elements: Elements<'a>,
}

enum Elements<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'py> Array<'py> {
    fn of(array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = array.extract() {
            return Ok(Self::F32(array));
        }
        match array.extract() {
            Ok(array) => Ok(Self::F64(array)),
            Err(_) => Err(PyTypeError::new_err("an array of float32 or float64 is needed")),
        }
    }

    fn view(&self) -> PyResult<View<'_>> {
        Ok(match self {
            Self::F32(array) => {
                View { shape: array.shape().to_vec(), elements: Elements::F32(array.as_slice()?) }
            }
            Self::F64(array) => {
                View { shape: array.shape().to_vec(), elements: Elements::F64(array.as_slice()?) }
            }
        })
    }
}

impl View<'_> {
    fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F64(_) => DType::F64,
        }
    }

    /// A copy on a device.
    fn tensor(&self, device: &Device) -> Tensor {
        match self.elements {
            Elements::F32(elements) => Tensor::from_slice(device, &*self.shape, elements),
            Elements::F64(elements) => Tensor::from_slice(device, &*self.shape, elements),
        }
    }
}

/// Arrays of one dtype.
fn arrays<'py>(inputs: &[Bound<'py, PyAny>]) -> PyResult<Vec<Array<'py>>> {
    inputs.iter().map(Array::of).collect()
}

/// The mean loss of `name` over contiguous arrays of one dtype, and the gradient of each that `wanted` says.
#[pyfunction]
pub fn loss_and_gradients<'py>(
    py: Python<'py>,
    name: &str,
    inputs: Vec<Bound<'py, PyAny>>,
    wanted: Vec<bool>,
    temperature: f64,
    threads: usize,
) -> PyResult<(f64, Vec<Option<Bound<'py, PyAny>>>)> {
    let arrays = arrays(&inputs)?;
    let views = arrays.iter().map(Array::view).collect::<PyResult<Vec<_>>>()?;
    let (value, gradients) = released(py, || {
        with_engine(threads, |engine| {
            let root = engine.root;
            let arena = engine.arena(views[0].dtype());
            let device = arena.device().clone();
            let tensors: Vec<Tensor> = views.iter().map(|view| view.tensor(&device)).collect();
            let (value, gradients) = computed(arena, root, name, &tensors, &wanted, temperature)?;
            Ok((value.scalar(), gradients))
        })
    })?;
    let arrays = gradients.into_iter().map(|gradient| gradient.map(|g| array(py, g)).transpose());
    Ok((value, arrays.collect::<PyResult<_>>()?))
}

/// A tensor as an array.
fn array(py: Python<'_>, tensor: Tensor) -> PyResult<Bound<'_, PyAny>> {
    let shape = tensor.shape().to_vec();
    Ok(match tensor.dtype() {
        DType::F64 => Shared::tensor_f64(py, tensor)?.whole(&shape).into_any(),
        _ => Shared::tensor(py, tensor)?.whole(&shape).into_any(),
    })
}

/// Soft assignments of rows of scores to prototypes.
#[pyfunction]
pub fn sinkhorn<'py>(
    py: Python<'py>,
    scores: Bound<'py, PyAny>,
    epsilon: f64,
    iterations: usize,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let scores = Array::of(&scores)?;
    let view = scores.view()?;
    let assigned = released(py, || {
        with_engine(threads, |engine| {
            let scores = view.tensor(&engine.arena(view.dtype()).device().clone());
            Ok(ops::sinkhorn(&scores, epsilon, iterations, &Group::alone()))
        })
    })?;
    array(py, assigned)
}

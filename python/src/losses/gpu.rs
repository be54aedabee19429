//! Losses over arrays of other libraries on GPUs, by DLPack.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use selfsup::Result;
use selfsup::arena::{Arena, Layout, Param};
use selfsup::device::{Device, ForeignStream, Group, Precision, as_guest};
use selfsup::ops;
use selfsup::tensor::Tensor;

use super::{PerProcess, computed, root};
use crate::dlpack::{Given, GpuArray};
use crate::error::released;

/// The GPUs that losses run on, in f32, by number.
struct Gpus {
    arenas: BTreeMap<usize, Arena>,
    /// Of all the arenas.
    layout: Arc<Layout>,
    root: Param,
}

static GPUS: PerProcess<Gpus> = PerProcess::new();

/// Works with a GPU; opens it if it is not open. One that has failed is opened anew at the next call: it may have run out of memory that
/// the other library has freed since.
fn with_gpu<T>(ordinal: usize, work: impl FnOnce(&mut Arena, Param) -> Result<T>) -> Result<T> {
    let mut held = GPUS.lock();
    let gpus = held.get_or_insert_with(|| {
        let (layout, root) = root();
        Gpus { arenas: BTreeMap::new(), layout, root }
    });
    if !gpus.arenas.contains_key(&ordinal) {
        let device = Device::cuda(ordinal, Precision::F32)?;
        gpus.arenas.insert(ordinal, Arena::new(&gpus.layout, &device, 0));
    }
    let root = gpus.root;
    let arena = gpus.arenas.get_mut(&ordinal).expect("opened above");
    let device = arena.device().clone();
    let done = work(arena, root).and_then(|value| device.check().map(|()| value));
    if device.check().is_err() {
        gpus.arenas.remove(&ordinal);
    }
    done
}

/// The stream in which the caller's library works, by its number.
fn stream_of(number: usize) -> PyResult<ForeignStream> {
    if number == 0 {
        return Err(PyValueError::new_err("stream is 0; the legacy default stream is 1 in DLPack"));
    }
    // SAFETY: the number of a stream of the arrays' GPU, as the caller says; nothing tells a number that is none from one that is.
    Ok(unsafe { ForeignStream::from_handle(number) })
}

/// The GPU on which all arrays are.
fn gpu_of(given: &[Given]) -> PyResult<usize> {
    let Some(first) = given.first().map(Given::ordinal) else {
        return Err(PyValueError::new_err("at least one array is needed"));
    };
    match given.iter().map(Given::ordinal).find(|&other| other != first) {
        Some(other) => Err(PyValueError::new_err(format!(
            "arrays are on GPU {first} and on GPU {other}; all must be on one"
        ))),
        None => Ok(first),
    }
}

/// Runs `work` on the GPU over given arrays as tensors.
fn over<T: Send>(
    py: Python<'_>,
    ordinal: usize,
    given: Vec<Given>,
    stream: ForeignStream,
    work: impl FnOnce(&mut Arena, Param, &[Tensor]) -> Result<T> + Send,
) -> PyResult<T> {
    released(py, || {
        as_guest(|| {
            // Given back after the GPU is free for others: what gives them back may run any code.
            let (mut given, mut tensors) = (given.into_iter(), Vec::new());
            with_gpu(ordinal, |arena, root| {
                let device = arena.device().clone();
                for given in given.by_ref() {
                    tensors.push(given.tensor(&device, stream)?);
                }
                work(arena, root, &tensors)
            })
        })
    })
}

/// The mean loss of `name` over contiguous arrays of float32 on one GPU, and the gradient of each that `wanted` says. The arrays are
/// used in the order of `stream`, the caller's, by its number in DLPack.
#[pyfunction]
pub fn loss_and_gradients_on_gpu(
    py: Python<'_>,
    name: &str,
    inputs: Vec<Bound<'_, PyAny>>,
    wanted: Vec<bool>,
    temperature: f64,
    stream: usize,
) -> PyResult<(GpuArray, Vec<Option<GpuArray>>)> {
    if wanted.len() != inputs.len() {
        return Err(PyValueError::new_err("wanted says something of each array"));
    }
    let in_order = stream_of(stream)?;
    let name_of = |i: usize| format!("{name}: array {i}");
    let given = inputs.iter().enumerate().map(|(i, array)| Given::of(array, stream, &name_of(i)));
    let given = given.collect::<PyResult<Vec<_>>>()?;
    let ordinal = gpu_of(&given)?;
    let (value, gradients) = over(py, ordinal, given, in_order, |arena, root, tensors| {
        computed(arena, root, name, tensors, &wanted, temperature)
    })?;
    let array = |tensor| GpuArray::whole(tensor, ordinal);
    Ok((array(value), gradients.into_iter().map(|gradient| gradient.map(array)).collect()))
}

/// Soft assignments of rows of scores on a GPU to prototypes, in the order of `stream`.
#[pyfunction]
pub fn sinkhorn_on_gpu(
    py: Python<'_>,
    scores: &Bound<'_, PyAny>,
    epsilon: f64,
    iterations: usize,
    stream: usize,
) -> PyResult<GpuArray> {
    let in_order = stream_of(stream)?;
    let given = Given::of(scores, stream, "sinkhorn: scores")?;
    let ordinal = given.ordinal();
    let assigned = over(py, ordinal, vec![given], in_order, |_, _, tensors| {
        Ok(ops::sinkhorn(&tensors[0], epsilon, iterations, &Group::alone()))
    })?;
    Ok(GpuArray::whole(assigned, ordinal))
}

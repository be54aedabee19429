//! Losses with their gradients, over arrays: what `selfsup.torch` makes operations of.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use selfsup::arena::{Arena, Init, Layout, Param, SlotKind};
use selfsup::device::{Device, Group};
use selfsup::ops::{self, Negatives};
use selfsup::tape::{self, Tape, Var};
use selfsup::tensor::{DType, Tensor};
use selfsup::{Error, Result};

use crate::arrays::Shared;
use crate::error::released;

/// The devices that losses run on: f32 on the CPU's threads, f64 on the reference device.
struct Engine {
    /// The process that made it: its threads exist nowhere else.
    process: u32,
    threads: usize,
    f32: Arena,
    f64: Arena,
    /// What all inputs seem to be computed from, so that they get gradients.
    root: Param,
}

static ENGINE: Mutex<Option<Engine>> = Mutex::new(None);

impl Engine {
    fn new(threads: usize) -> Result<Self> {
        let mut layout = Layout::new();
        let root = layout.param("root", [1], SlotKind::Matrix, Init::Constant(0.0));
        let layout = Arc::new(layout);
        let f32 = Arena::new(&layout, &Device::cpu(threads)?, 0);
        let f64 = Arena::new(&layout, &Device::reference(), 0);
        Ok(Self { process: std::process::id(), threads, f32, f64, root })
    }

    fn arena(&mut self, dtype: DType) -> &mut Arena {
        if dtype == DType::F64 { &mut self.f64 } else { &mut self.f32 }
    }
}

/// Works with the engine; makes it for `threads` threads if there is none in this process.
fn with_engine<T>(threads: usize, work: impl FnOnce(&mut Engine) -> Result<T>) -> Result<T> {
    let mut held = ENGINE.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if held.as_ref().is_some_and(|engine| engine.process != process || engine.threads != threads)
        && let Some(old) = held.take()
        && old.process != process
    {
        // Its threads are in the process that this one was forked from: to end them here would wait for ever.
        std::mem::forget(old);
    }
    if held.is_none() {
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

/// Where a value's gradient is put.
type Slot = Rc<RefCell<Option<Tensor>>>;

/// Puts a tensor on a tape as a value that wants a gradient, which `slot` gets.
fn leaf<'t>(tape: &'t Tape<'t>, root: Param, value: &Tensor, slot: &Slot) -> Var<'t> {
    let slot = slot.clone();
    let root = tape.param(root);
    tape.record("input", value.clone(), &[&root], move |dy, _| *slot.borrow_mut() = Some(dy))
}

/// The loss of `name` over values on a tape.
fn loss<'t>(name: &str, inputs: &[Var<'t>], temperature: f64) -> Result<Var<'t>> {
    Ok(match (name, inputs) {
        ("nt_xent", [z]) => ops::nt_xent(z, temperature),
        ("info_nce", [q, k, queue]) => {
            ops::info_nce(q, k, &Negatives { queue: queue.value(), own: None }, temperature)
        }
        ("neg_cosine", [p, z]) => ops::neg_cosine(p, z),
        ("soft_cross_entropy", [scores, targets]) => {
            ops::soft_cross_entropy(scores, targets.value(), temperature)
        }
        _ => return Err(Error::config(format!("no loss {name} of {} arrays", inputs.len()))),
    })
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
            let slots: Vec<Slot> = views.iter().map(|_| Slot::default()).collect();
            let mut failed = Ok(());
            let value = tape::step(arena, |tape| {
                let input = |(i, tensor): (usize, &Tensor)| match wanted[i] {
                    true => leaf(tape, root, tensor, &slots[i]),
                    false => tape.input(tensor),
                };
                let inputs: Vec<Var<'_>> = tensors.iter().enumerate().map(input).collect();
                loss(name, &inputs, temperature).unwrap_or_else(|error| {
                    failed = Err(error);
                    tape.constant(0.0)
                })
            })?;
            failed?;
            Ok((value.scalar(), slots.iter().map(taken).collect::<Vec<_>>()))
        })
    })?;
    let arrays = gradients.into_iter().map(|gradient| gradient.map(|g| array(py, g)).transpose());
    Ok((value, arrays.collect::<PyResult<_>>()?))
}

/// A gradient from its slot, with no other handle on its memory.
fn taken(slot: &Slot) -> Option<Tensor> {
    let gradient = slot.borrow_mut().take()?;
    Some(if gradient.is_unique() { gradient } else { gradient.copy() })
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

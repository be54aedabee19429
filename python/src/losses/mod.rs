//! Losses with their gradients: what `selfsup.torch` makes operations of.

mod gpu;
mod host;

use std::cell::RefCell;
use std::ptr::null_mut;
use std::rc::Rc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use selfsup::arena::{Arena, Init, Layout, Param, SlotKind};
use selfsup::ops::{self, Negatives};
use selfsup::tape::{self, Tape, Var};
use selfsup::tensor::Tensor;
use selfsup::{Error, Result};

pub use gpu::{loss_and_gradients_on_gpu, sinkhorn_on_gpu};
pub use host::{loss_and_gradients, sinkhorn};

/// A value of each process, behind a lock. A forked process begins with none: the other one's lock may be held by a thread that is not in
/// it, and the other one's value has threads and contexts that are not.
struct PerProcess<T: 'static>(AtomicPtr<Slot<T>>);

struct Slot<T> {
    process: u32,
    value: Mutex<Option<T>>,
}

impl<T: Send> PerProcess<T> {
    const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    fn lock(&self) -> MutexGuard<'static, Option<T>> {
        let process = std::process::id();
        let mut at = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: null or a slot of this function, which are shared and never freed once they are in `self.0`.
            let slot: Option<&'static Slot<T>> = unsafe { at.as_ref() };
            if let Some(slot) = slot.filter(|slot| slot.process == process) {
                return slot.value.lock().unwrap_or_else(PoisonError::into_inner);
            }
            let own = Box::into_raw(Box::new(Slot { process, value: Mutex::new(None) }));
            match self.0.compare_exchange(at, own, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => at = own,
                Err(other) => {
                    // SAFETY: made above, and seen by nobody else.
                    drop(unsafe { Box::from_raw(own) });
                    at = other;
                }
            }
        }
    }
}

/// The layout of an arena with nothing but what all inputs seem to be computed from, so that they get gradients.
fn root() -> (Arc<Layout>, Param) {
    let mut layout = Layout::new();
    let root = layout.param("root", [1], SlotKind::Matrix, Init::Constant(0.0));
    (Arc::new(layout), root)
}

/// Where a value's gradient is put.
type Taken = Rc<RefCell<Option<Tensor>>>;

/// Puts a tensor on a tape as a value that wants a gradient, which `slot` gets.
fn leaf<'t>(tape: &'t Tape<'t>, root: Param, value: &Tensor, slot: &Taken) -> Var<'t> {
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

/// The mean loss of `name` over tensors of one dtype on an arena's device, and the gradient of each that `wanted` says.
fn computed(
    arena: &mut Arena,
    root: Param,
    name: &str,
    tensors: &[Tensor],
    wanted: &[bool],
    temperature: f64,
) -> Result<(Tensor, Vec<Option<Tensor>>)> {
    let slots: Vec<Taken> = tensors.iter().map(|_| Taken::default()).collect();
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
    Ok((value, slots.iter().map(taken).collect()))
}

/// A gradient from its slot, with no other handle on its memory.
fn taken(slot: &Taken) -> Option<Tensor> {
    let gradient = slot.borrow_mut().take()?;
    Some(if gradient.is_unique() { gradient } else { gradient.copy() })
}

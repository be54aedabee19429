//! Training steps and forward passes over an arena.

use super::{Mode, TRAIN, Tape, Var, VarId};
use crate::arena::Arena;
use crate::device::trace_phase;
use crate::error::Result;
use crate::tensor::{Tensor, mean_over_ranks};

/// Runs one training step's forward and backward pass. `loss` builds the graph over the arena's parameters; its gradients
/// replace those in the arena. Returns the loss, a scalar still on the device.
///
/// ```
/// use std::sync::Arc;
/// use selfsup::arena::{Arena, Init, Layout, SlotKind};
/// use selfsup::{device::Device, ops, tape::step, tensor::Tensor};
///
/// let device = Device::cpu(1)?;
/// let mut layout = Layout::new();
/// let w = layout.param("w", [1, 2], SlotKind::Matrix, Init::Constant(3.0));
/// let mut arena = Arena::new(&Arc::new(layout), &device, 0);
/// let x = Tensor::from_slice(&device, [1, 2], &[1.0_f32, 2.0]);
/// let loss = step(&mut arena, |tape| ops::linear(&tape.input(&x), &tape.param(w), None))?;
/// assert_eq!(loss.scalar(), 9.0);
/// assert_eq!(arena.gradient(w).to_f64(), [1.0, 2.0]);
/// # Ok::<(), selfsup::Error>(())
/// ```
///
/// # Errors
/// If the device fails.
///
/// # Panics
/// If the loss is not a scalar.
pub fn step(
    arena: &mut Arena,
    loss: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Result<Tensor> {
    arena.zero_gradients();
    let loss = backward_pass(arena, loss);
    reduce_gradients(arena)?;
    loss
}

/// Like [`step`], but adds to the gradients in the arena. The caller zeroes them first ([`Arena::zero_gradients`]) and
/// weights each loss. For losses that are means over samples; contrastive losses need [`cached_step`].
///
/// # Errors
/// If the device fails.
pub fn backward_pass(
    arena: &mut Arena,
    loss: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Result<Tensor> {
    let tape = Tape::new(arena, TRAIN);
    let loss = trace_phase("forward", || loss(&tape));
    assert_eq!(loss.value().len(), 1, "a loss must be a scalar, not {:?}", loss.shape());
    trace_phase("backward", || tape.backward(loss.id, one(&loss)));
    tape.device().check()?;
    Ok(loss.value.clone())
}

/// Runs a [`step`] over `count` micro-batches whose losses, `loss(tape, i)`, add up. Returns the sum of the losses.
///
/// # Errors
/// If the device fails.
pub fn summed_step(
    arena: &mut Arena,
    count: usize,
    mut loss: impl for<'t> FnMut(&'t Tape<'t>, usize) -> Var<'t>,
) -> Result<Tensor> {
    arena.zero_gradients();
    let mut sum = Tensor::zeros(arena.device(), []);
    for i in 0..count {
        let part = backward_pass(arena, |tape| loss(tape, i))?;
        crate::tensor::add_into(arena.device(), &mut sum.view_mut(), &part);
    }
    reduce_gradients(arena)?;
    Ok(sum)
}

/// Runs a step over micro-batches with a loss that couples all rows, with exact gradients (GradCache, Gao et al. 2021,
/// arXiv:2101.06983).
///
/// `embed(tape, i)` embeds micro-batch `i` of `count` into `[views * m, d]`, view after view; `loss` gets the embeddings of
/// the full batch, `[views * n, d]`, also view after view. The embeddings are computed twice: first without saving anything,
/// then with one tape per micro-batch. Batch norm sees the rows of one micro-batch, and running statistics are updated once
/// per micro-batch, in the second pass.
///
/// # Errors
/// If the device fails.
///
/// # Panics
/// If micro-batches differ in shape.
pub fn cached_step(
    arena: &mut Arena,
    count: usize,
    views: usize,
    mut embed: impl for<'t> FnMut(&'t Tape<'t>, usize) -> Var<'t>,
    loss: impl for<'t> FnOnce(Var<'t>) -> Var<'t>,
) -> Result<Tensor> {
    use crate::tensor::{interleave_views, pick_views};
    arena.zero_gradients();
    let first = Mode { gradients: false, batch_statistics: true, update_running: false };
    let parts: Vec<Tensor> = (0..count).map(|i| embed(&Tape::new(arena, first), i).value).collect();
    let all = interleave_views(&parts, views);
    drop(parts);
    let (loss, dz) = {
        let tape = Tape::new(arena, TRAIN);
        let z = tape.push("embeddings", all, None);
        let id = z.id;
        let loss = loss(z);
        assert_eq!(loss.value().len(), 1, "a loss must be a scalar, not {:?}", loss.shape());
        let mut gradients = tape.backward(loss.id, one(&loss));
        let VarId::Node(index) = id else { unreachable!("`push` gives a node") };
        let dz = gradients[index].take().expect("the loss depends on the embeddings");
        (loss.value.clone(), dz)
    };
    for i in 0..count {
        let tape = Tape::new(arena, TRAIN);
        let z = embed(&tape, i);
        tape.backward(z.id, pick_views(&dz, views, count, i));
    }
    reduce_gradients(arena)?;
    arena.device().check()?;
    Ok(loss)
}

/// The gradient of a loss with respect to itself.
fn one(loss: &Var<'_>) -> Tensor {
    let mut one = loss.value.empty_like();
    one.view_mut().fill(1.0);
    one
}

/// Replaces gradients by their mean over the ranks: a rank's loss is the mean over its rows, or that of all ranks' rows.
fn reduce_gradients(arena: &mut Arena) -> Result<()> {
    let group = arena.group().clone();
    if group.size() > 1 {
        mean_over_ranks(&mut arena.gradients_cell().borrow_mut(), &group, "gradients");
    }
    group.check()
}

/// Runs a forward pass as in training, without gradients: batch norm uses batch statistics and updates the running ones. For
/// momentum encoders.
///
/// # Errors
/// If the device fails.
pub fn forward(
    arena: &mut Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Result<Tensor> {
    let value = forward_in_step(arena, f);
    arena.device().check()?;
    Ok(value)
}

/// [`forward`] inside a step, which checks the device itself.
pub(crate) fn forward_in_step(
    arena: &mut Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Tensor {
    f(&Tape::new(arena, Mode { gradients: false, ..TRAIN })).value
}

/// Runs a forward pass for evaluation: with running statistics, without gradients, saving nothing.
///
/// # Errors
/// If the device fails.
pub fn evaluate(arena: &Arena, f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>) -> Result<Tensor> {
    let value = evaluate_in_step(arena, f);
    arena.device().check()?;
    Ok(value)
}

/// [`evaluate`] inside a step, which checks the device itself.
pub(crate) fn evaluate_in_step(
    arena: &Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Tensor {
    let mode = Mode { gradients: false, batch_statistics: false, update_running: false };
    f(&Tape::new(arena, mode)).value
}

//! The autograd tape.
//!
//! An operation computes its value, then records its backward pass:
//! `tape.record("conv2d", y, &[x, w], move |dy, grads| …)`. The closure's captures are exactly the saved tensors; they are
//! freed as the backward pass consumes the closures. A [`Var`] borrows its tape, and a tape lives inside [`step`], which
//! builds it, runs backward and drops it: a graph cannot be used after the optimiser changed the weights.
//!
//! ```compile_fail
//! # use selfsup::{arena::Arena, tape::{step, Var}};
//! fn leak(arena: &mut Arena) {
//!     let mut kept = None;
//!     step(arena, |tape| { let x = tape.constant(0.0); kept = Some(x.clone()); x });
//! }
//! ```

use std::borrow::Cow;
use std::cell::RefCell;

use crate::arena::{Arena, Layout, Param, Stat};
use crate::device::{Device, Group, Row, trace_operation, trace_phase, trace_span};
use crate::error::Result;
use crate::tensor::{DType, Shape, Tensor, TensorMut, mean_over_ranks};

/// The mode of a tape's operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    /// Record closures for the backward pass.
    gradients: bool,
    /// Batch norm normalises with batch statistics, not with running statistics.
    batch_statistics: bool,
    /// Batch norm updates its running statistics.
    update_running: bool,
}

const TRAIN: Mode = Mode { gradients: true, batch_statistics: true, update_running: true };

/// A recording of operations over one arena's parameters.
#[derive(Debug)]
pub struct Tape<'a> {
    arena: &'a Arena,
    mode: Mode,
    nodes: RefCell<Vec<Node>>,
}

/// The backward pass of an operation: gets the gradient of the operation's value. It owns its saved tensors and does not
/// borrow the tape.
type Backward = Box<dyn FnOnce(Tensor, &mut Gradients<'_>)>;

/// An operation of several primitives that saves only its input and runs again in the backward pass.
struct Recomputed {
    f: Box<dyn for<'t> Fn(&Var<'t>) -> Var<'t>>,
    x: Tensor,
    x_id: VarId,
}

/// How a node's gradient reaches its inputs.
enum Pass {
    Saved(Backward),
    Recomputed(Recomputed),
}

struct Node {
    name: &'static str,
    shape: Shape,
    dtype: DType,
    backward: Option<Pass>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.name, self.shape)
    }
}

/// A description of a recorded operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// The operation.
    pub name: &'static str,
    /// The shape of its value.
    pub shape: Shape,
    /// Bytes of its value.
    pub bytes: usize,
}

/// The destination of a value's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VarId {
    /// None: a constant, or any value on a tape that records no gradients.
    Constant,
    /// The operation that made the value.
    Node(usize),
    /// The arena.
    Param(Param),
}

/// A value on a tape.
#[derive(Clone, Debug)]
pub struct Var<'t> {
    tape: &'t Tape<'t>,
    value: Tensor,
    id: VarId,
}

impl<'t> Var<'t> {
    /// Its value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        self.value.shape()
    }

    /// The tape it is on.
    pub fn tape(&self) -> &'t Tape<'t> {
        self.tape
    }

    /// The destination of its gradient, for the backward closure of an operation that takes it.
    pub fn id(&self) -> VarId {
        self.id
    }

    /// Whether a gradient flows through it.
    pub fn wants_gradient(&self) -> bool {
        self.id != VarId::Constant
    }

    /// The same value without gradient flow: the papers' stop-gradient.
    pub fn detach(&self) -> Var<'t> {
        Var { id: VarId::Constant, ..self.clone() }
    }
}

impl<'a> Tape<'a> {
    fn new(arena: &'a Arena, mode: Mode) -> Self {
        arena.refresh();
        Self { arena, mode, nodes: RefCell::default() }
    }

    /// The device that its operations run on.
    pub fn device(&self) -> &Device {
        self.arena.device()
    }

    /// The group of processes that share the batch.
    pub fn group(&self) -> &Group {
        self.arena.group()
    }

    /// Whether batch norm uses batch statistics.
    pub fn batch_statistics(&self) -> bool {
        self.mode.batch_statistics
    }

    /// Puts a tensor on the tape as a constant.
    ///
    /// # Panics
    /// If the tensor lives on another device than the arena.
    #[track_caller]
    pub fn input<'t>(&'t self, value: &Tensor) -> Var<'t> {
        value.expect_on(self.device(), "input");
        Var { tape: self, value: value.clone(), id: VarId::Constant }
    }

    /// Puts a scalar on the tape as a constant.
    pub fn constant(&self, value: f64) -> Var<'_> {
        let mut scalar = Tensor::floats(self.device(), []);
        scalar.view_mut().fill(value);
        self.input(&scalar)
    }

    /// Puts a parameter of the arena on the tape.
    ///
    /// # Panics
    /// If the parameter belongs to another layout than the arena's.
    #[track_caller]
    pub fn param<'t>(&'t self, param: Param) -> Var<'t> {
        let id = if self.mode.gradients { VarId::Param(param) } else { VarId::Constant };
        Var { tape: self, value: self.arena.working_value(param), id }
    }

    /// The current value of a running statistic.
    ///
    /// # Panics
    /// If the statistic belongs to another layout than the arena's.
    #[track_caller]
    pub fn stat(&self, stat: Stat) -> Tensor {
        self.arena.stat(stat)
    }

    /// Updates a running statistic, unless the tape's mode leaves running statistics unchanged.
    ///
    /// # Panics
    /// If the statistic belongs to another layout than the arena's.
    #[track_caller]
    pub fn update_stat(&self, stat: Stat, f: impl FnOnce(TensorMut<'_>)) {
        if self.mode.update_running {
            self.arena.update_stat(stat, f);
        }
    }

    /// Records an operation that made `value` from `inputs`. `backward` gets the gradient of `value` and adds to the gradients
    /// of the inputs. If no input wants a gradient, `backward` and its saved tensors are dropped at once.
    ///
    /// # Panics
    /// If an input is on another tape or `value` lives on another device than the arena.
    #[track_caller]
    pub fn record<'t>(
        &'t self,
        name: &'static str,
        value: Tensor,
        inputs: &[&Var<'t>],
        backward: impl FnOnce(Tensor, &mut Gradients<'_>) + 'static,
    ) -> Var<'t> {
        trace_operation(name);
        self.expect_inputs(name, inputs);
        value.expect_on(self.device(), name);
        if inputs.iter().any(|input| input.wants_gradient()) {
            self.push(name, value, Some(Pass::Saved(Box::new(backward))))
        } else {
            Var { tape: self, value, id: VarId::Constant }
        }
    }

    /// Computes `f(x)`. If the arena asks for it ([`Arena::with_recompute`]), the forward pass saves `x` alone, and the backward
    /// pass runs `f` again for what its operations save (activation checkpointing: Chen et al. 2016, arXiv:1604.06174): less
    /// memory, one more forward pass.
    ///
    /// Gradients have the same bits either way, as long as `f` alone uses `x`: with other uses, their gradients add up in another
    /// order. Running statistics are updated once. `f` must compute the same each time; it may use parameters and, of other
    /// values, only `x`.
    ///
    /// # Panics
    /// If `x` is on another tape.
    #[track_caller]
    pub fn recompute<'t>(
        &'t self,
        name: &'static str,
        x: &Var<'t>,
        f: impl for<'v> Fn(&Var<'v>) -> Var<'v> + 'static,
    ) -> Var<'t> {
        if !self.mode.gradients || !self.arena.recomputes() {
            return f(x);
        }
        self.expect_inputs(name, &[x]);
        let (x_id, x) = (x.id, x.value.clone());
        let value = {
            let first = Tape::new(self.arena, Mode { gradients: false, ..self.mode });
            f(&first.input(&x)).value
        };
        self.push(name, value, Some(Pass::Recomputed(Recomputed { f: Box::new(f), x, x_id })))
    }

    /// Panics unless all inputs of the operation `name` are on this tape. Operations of several inputs call it before they
    /// compute: a value of another tape may live on another device.
    #[track_caller]
    pub(crate) fn expect_inputs(&self, name: &str, inputs: &[&Var<'_>]) {
        for input in inputs {
            let same = std::ptr::addr_eq(input.tape, self);
            assert!(same, "{name}: an input {:?} is on another tape", input.shape());
        }
    }

    /// The operations recorded so far, in order.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let bytes = |n: &Node| n.shape.elements() * n.dtype.size();
        let info = |n: &Node| NodeInfo { name: n.name, shape: n.shape, bytes: bytes(n) };
        self.nodes.borrow().iter().map(info).collect()
    }

    fn push<'t>(&'t self, name: &'static str, value: Tensor, backward: Option<Pass>) -> Var<'t> {
        let mut nodes = self.nodes.borrow_mut();
        let (shape, dtype) = (*value.shape(), value.dtype());
        nodes.push(Node { name, shape, dtype, backward });
        Var { tape: self, value, id: VarId::Node(nodes.len() - 1) }
    }

    /// Runs the backward pass from `root`, whose gradient is `seed`, and returns the gradients of nodes without a backward
    /// closure.
    fn backward(&self, root: VarId, seed: Tensor) -> Vec<Option<Tensor>> {
        self.backward_into(&mut self.arena.gradients_cell().borrow_mut(), root, seed)
    }

    /// [`Tape::backward`] into the arena's gradients, which the caller has borrowed.
    fn backward_into(
        &self,
        of_arena: &mut Tensor,
        root: VarId,
        seed: Tensor,
    ) -> Vec<Option<Tensor>> {
        let mut nodes = std::mem::take(&mut *self.nodes.borrow_mut());
        let mut gradients = Gradients {
            device: self.device(),
            layout: self.arena.layout(),
            nodes: nodes.iter().map(|_| None).collect(),
            values: nodes.iter().map(|node| (node.shape, node.dtype)).collect(),
            arena: of_arena,
        };
        gradients.add(root, seed);
        while let Some(node) = nodes.pop() {
            let index = nodes.len();
            if let Some(pass) = node.backward
                && let Some(dy) = gradients.nodes[index].take()
            {
                let name = || Cow::Owned(format!("{} backward", node.name));
                trace_span(Row::Operations, name, || match pass {
                    Pass::Saved(backward) => backward(dy, &mut gradients),
                    Pass::Recomputed(again) => self.backward_again(again, dy, &mut gradients),
                });
            }
        }
        gradients.nodes
    }

    /// Runs the forward pass of a recomputed operation again, without touching running statistics, and its backward pass.
    fn backward_again(&self, again: Recomputed, dy: Tensor, gradients: &mut Gradients<'_>) {
        let Recomputed { f, x, x_id } = again;
        let tape = Tape::new(self.arena, Mode { update_running: false, ..self.mode });
        let input = match x_id {
            VarId::Constant => tape.input(&x),
            _ => tape.push("input", x, None),
        };
        let id = input.id;
        let root = f(&input).id;
        drop(input);
        let mut found = tape.backward_into(gradients.arena, root, dy);
        if let VarId::Node(index) = id
            && let Some(dx) = found[index].take()
        {
            gradients.add(x_id, dx);
        }
    }
}

/// The gradients of a backward pass in progress.
#[derive(Debug)]
pub struct Gradients<'g> {
    device: &'g Device,
    layout: &'g Layout,
    nodes: Vec<Option<Tensor>>,
    /// Shape and dtype of the nodes' values.
    values: Vec<(Shape, DType)>,
    arena: &'g mut Tensor,
}

impl Gradients<'_> {
    /// The destination for the gradient of `id`, and whether to add to its contents (`true`) or to overwrite unspecified
    /// contents (`false`). `None` if no gradient is wanted. Gradients of parameters have the arena's dtype, others the dtype
    /// of their value.
    ///
    /// # Panics
    /// If `shape` is not the shape of the value, or the value is on another tape.
    #[track_caller]
    pub fn target(&mut self, id: VarId, shape: &Shape) -> Option<(TensorMut<'_>, bool)> {
        match id {
            VarId::Constant => None,
            VarId::Param(param) => {
                self.layout.expect_param(param);
                assert_eq!(param.shape(), shape, "a gradient's shape must be its parameter's");
                Some((self.arena.view_mut().slice(param.offset(), *shape), true))
            }
            VarId::Node(index) => {
                let (of_value, dtype) = self.value(index);
                assert_eq!(&of_value, shape, "a gradient's shape must be its value's");
                let slot = &mut self.nodes[index];
                let accumulate = slot.is_some();
                let tensor = slot.get_or_insert_with(|| Tensor::empty(self.device, dtype, *shape));
                if !tensor.is_unique() {
                    *tensor = tensor.copy(); // an `add` shared it with another value's gradient
                }
                Some((tensor.view_mut(), accumulate))
            }
        }
    }

    /// [`Gradients::target`] for a kernel that writes this dtype. If the gradient has another one (f32 for a parameter), the
    /// target is made in `own`, for the caller to [add](Gradients::add) afterwards.
    #[track_caller]
    pub(crate) fn target_as<'t>(
        &'t mut self,
        id: VarId,
        dtype: DType,
        shape: &Shape,
        own: &'t mut Option<Tensor>,
    ) -> Option<(TensorMut<'t>, bool)> {
        let of_gradient = match id {
            VarId::Constant => return None,
            VarId::Param(_) => self.arena.dtype(),
            VarId::Node(index) => self.value(index).1,
        };
        if dtype == of_gradient {
            return self.target(id, shape);
        }
        let own = own.insert(Tensor::empty(self.device, dtype, *shape));
        Some((own.view_mut(), false))
    }

    /// [`Gradients::target_as`] for a kernel that writes the dtype and shape of `like`.
    #[track_caller]
    pub(crate) fn target_like<'t>(
        &'t mut self,
        id: VarId,
        like: &Tensor,
        own: &'t mut Option<Tensor>,
    ) -> Option<(TensorMut<'t>, bool)> {
        self.target_as(id, like.dtype(), like.shape(), own)
    }

    /// Adds `dx` to the gradient of `id`, in the gradient's dtype. The first one of that dtype is kept without a copy.
    ///
    /// # Panics
    /// If the shape of `dx` is not the shape of the value, `dx` lives on another device, or the value is on another tape.
    #[track_caller]
    pub fn add(&mut self, id: VarId, dx: Tensor) {
        dx.expect_on(self.device, "backward");
        if let VarId::Node(index) = id {
            let (shape, dtype) = self.value(index);
            assert_eq!(&shape, dx.shape(), "a gradient's shape must be its value's");
            if self.nodes[index].is_none() {
                self.nodes[index] = Some(dx.cast(dtype));
                return;
            }
        }
        let device = self.device;
        if let Some((mut target, _)) = self.target(id, dx.shape()) {
            crate::tensor::add_into(device, &mut target, &dx);
        }
    }

    /// Shape and dtype of a node's value.
    #[track_caller]
    fn value(&self, index: usize) -> (Shape, DType) {
        *self.values.get(index).expect("a gradient of a value on another tape")
    }
}

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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    use super::*;
    use crate::arena::{Init, SlotKind};
    use crate::ops;

    fn arena(device: &Device) -> (Arena, Param) {
        let mut layout = Layout::new();
        let param = layout.param("w", [1, 4], SlotKind::Matrix, Init::Constant(2.0));
        (Arena::new(&Arc::new(layout), device, 1), param)
    }

    fn ones(device: &Device) -> Tensor {
        Tensor::from_f64(device, [1, 4], &[1.0; 4])
    }

    /// The message of the panic that `f` ends in.
    fn refused(f: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("a panic");
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).expect("a message")
    }

    #[test]
    fn values_of_another_device_or_layout_are_refused() {
        let device = Device::reference();
        let ((_, p), (inner, _)) = (arena(&device), arena(&device));
        let elsewhere = ones(&Device::cpu(1).unwrap());
        let message = refused(|| drop(evaluate(&inner, |tape| tape.input(&elsewhere))));
        assert!(message.contains("input: a tensor [1, 4] is on another device"), "{message}");
        let message = refused(|| {
            let made = elsewhere.clone();
            let _ = evaluate(&inner, |tape| tape.record("mine", made, &[], |_, _| {}));
        });
        assert!(message.contains("mine: a tensor [1, 4] is on another device"), "{message}");
        let message = refused(|| drop(evaluate(&inner, |tape| tape.param(p))));
        assert!(message.contains("belongs to another layout"), "{message}");
    }

    /// A step over an operation of one's own whose backward pass is `backward`.
    fn custom(
        arena: &mut Arena,
        param: Param,
        backward: impl FnOnce(VarId, &mut Gradients<'_>) + 'static,
    ) -> Result<Tensor> {
        step(arena, |tape| {
            let x = ops::relu(&tape.param(param));
            let (id, scalar) = (x.id(), Tensor::zeros(tape.device(), []));
            tape.record("mine", scalar, &[&x], move |_, gradients| backward(id, gradients))
        })
    }

    #[test]
    fn gradients_that_do_not_belong_are_refused() {
        let device = Device::reference();
        let ((mut arena, param), (_, other)) = (arena(&device), arena(&device));
        let wide = Tensor::zeros(&device, [1, 5]);
        let message = refused(|| drop(custom(&mut arena, param, move |id, g| g.add(id, wide))));
        assert!(message.contains("a gradient's shape must be its value's"), "{message}");
        let elsewhere = ones(&Device::cpu(1).unwrap());
        let message =
            refused(|| drop(custom(&mut arena, param, move |id, g| g.add(id, elsewhere))));
        assert!(message.contains("backward: a tensor [1, 4] is on another device"), "{message}");
        let dx = ones(&device);
        let message = refused(|| {
            drop(custom(&mut arena, param, move |_, g| g.add(VarId::Node(7), dx)));
        });
        assert!(message.contains("a value on another tape"), "{message}");
        let dx = ones(&device);
        let message = refused(|| {
            drop(custom(&mut arena, param, move |_, g| g.add(VarId::Param(other), dx)));
        });
        assert!(message.contains("belongs to another layout"), "{message}");
    }

    #[test]
    fn an_arena_is_usable_after_a_panic_inside_a_step() {
        let device = Device::cpu(1).unwrap();
        let (mut arena, param) = arena(&device);
        let x = ones(&device);
        for _ in 0..2 {
            assert_eq!(refused(|| drop(custom(&mut arena, param, |_, _| panic!("boom")))), "boom");
            refused(|| drop(step(&mut arena, |_| panic!("boom"))));
            let loss =
                step(&mut arena, |tape| ops::linear(&tape.input(&x), &tape.param(param), None));
            assert_eq!(loss.unwrap().scalar(), 8.0);
            assert_eq!(arena.gradient(param).to_f64(), [1.0; 4]);
        }
    }

    #[test]
    fn tensors_outlive_the_handle_on_their_device() {
        let device = Device::cpu(2).unwrap();
        let (mut arena, param) = arena(&device);
        let x = ones(&device);
        drop(device);
        let loss = step(&mut arena, |tape| ops::linear(&tape.input(&x), &tape.param(param), None));
        drop(arena);
        assert_eq!(loss.unwrap().scalar(), 8.0);
    }
}

//! The autograd tape.
//!
//! An operation computes its value, then records how gradients flow back:
//! `tape.record("conv2d", y, &[x, w], move |dy, grads| …)`. What the closure captures is exactly what is saved, and
//! dropping closures as the backward pass runs frees it. A [`Var`] borrows its tape, and a tape lives inside [`step`],
//! which builds it, runs backward and drops it: a graph cannot be used after the optimiser changed the weights.
//!
//! ```compile_fail
//! # use selfsup::{arena::Arena, tape::{step, Var}};
//! fn leak(arena: &mut Arena) {
//!     let mut kept = None;
//!     step(arena, |tape| { let x = tape.constant(0.0); kept = Some(x.clone()); x });
//! }
//! ```

use std::borrow::Cow;
use std::cell::{RefCell, RefMut};

use crate::arena::{Arena, Param, Stat};
use crate::device::{Device, Group, Row, trace_operation, trace_phase, trace_span};
use crate::error::Result;
use crate::tensor::{DType, Shape, Tensor, TensorMut};

/// How a tape's operations behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    /// Record closures for the backward pass.
    gradients: bool,
    /// Batch norm normalises by its batch, not by running statistics.
    batch_statistics: bool,
    /// Batch norm moves its running statistics.
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

/// What the backward pass of an operation does with the gradient of its value. It owns what it saved, and nothing that
/// borrows the tape.
type Backward = Box<dyn FnOnce(Tensor, &mut Gradients<'_>)>;

struct Node {
    name: &'static str,
    shape: Shape,
    dtype: DType,
    backward: Option<Backward>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.name, self.shape)
    }
}

/// One recorded operation, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// The operation.
    pub name: &'static str,
    /// The shape of its value.
    pub shape: Shape,
    /// Bytes of its value.
    pub bytes: usize,
}

/// Where a gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VarId {
    /// Nowhere: a constant, or anything on a tape that records no gradients.
    Constant,
    /// To the operation that made the value.
    Node(usize),
    /// Into the arena.
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

    /// Where its gradient goes, for the closure of an operation that takes it.
    pub fn id(&self) -> VarId {
        self.id
    }

    /// Whether a gradient flows back through it.
    pub fn wants_gradient(&self) -> bool {
        self.id != VarId::Constant
    }

    /// The same value, through which no gradient flows: the papers' stop-gradient.
    pub fn detach(&self) -> Var<'t> {
        Var { id: VarId::Constant, ..self.clone() }
    }
}

impl<'a> Tape<'a> {
    fn new(arena: &'a Arena, mode: Mode) -> Self {
        arena.refresh();
        Self { arena, mode, nodes: RefCell::default() }
    }

    /// Where its operations run.
    pub fn device(&self) -> &Device {
        self.arena.device()
    }

    /// The processes that share the batch.
    pub fn group(&self) -> &Group {
        self.arena.group()
    }

    /// Whether batch norm uses its batch's statistics.
    pub fn batch_statistics(&self) -> bool {
        self.mode.batch_statistics
    }

    /// A value that no gradient flows to.
    ///
    /// # Panics
    /// When the tensor lives on another device than the arena.
    #[track_caller]
    pub fn input<'t>(&'t self, value: &Tensor) -> Var<'t> {
        assert!(value.device().same(self.device()), "input: the tensor lives on another device");
        Var { tape: self, value: value.clone(), id: VarId::Constant }
    }

    /// A scalar that no gradient flows to.
    pub fn constant(&self, value: f64) -> Var<'_> {
        let mut scalar = Tensor::floats(self.device(), []);
        scalar.view_mut().fill(value);
        self.input(&scalar)
    }

    /// A parameter of the arena.
    pub fn param<'t>(&'t self, param: Param) -> Var<'t> {
        let id = if self.mode.gradients { VarId::Param(param) } else { VarId::Constant };
        Var { tape: self, value: self.arena.working_value(param), id }
    }

    /// A running statistic as it stands.
    pub fn stat(&self, stat: Stat) -> Tensor {
        self.arena.stat(stat)
    }

    /// Moves a running statistic, unless this tape leaves them alone.
    pub fn update_stat(&self, stat: Stat, f: impl FnOnce(TensorMut<'_>)) {
        if self.mode.update_running {
            self.arena.update_stat(stat, f);
        }
    }

    /// Records an operation on `inputs` that made `value`; `backward` gets the gradient of `value` and adds to those of
    /// the inputs. If no input wants a gradient, `backward` is dropped at once with all that it saved.
    pub fn record<'t>(
        &'t self,
        name: &'static str,
        value: Tensor,
        inputs: &[&Var<'t>],
        backward: impl FnOnce(Tensor, &mut Gradients<'_>) + 'static,
    ) -> Var<'t> {
        trace_operation(name);
        if inputs.iter().any(|input| input.wants_gradient()) {
            self.push(name, value, Some(Box::new(backward)))
        } else {
            Var { tape: self, value, id: VarId::Constant }
        }
    }

    /// What has been recorded so far, in order.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let bytes = |n: &Node| n.shape.elements() * n.dtype.size();
        let info = |n: &Node| NodeInfo { name: n.name, shape: n.shape, bytes: bytes(n) };
        self.nodes.borrow().iter().map(info).collect()
    }

    fn push<'t>(
        &'t self,
        name: &'static str,
        value: Tensor,
        backward: Option<Backward>,
    ) -> Var<'t> {
        let mut nodes = self.nodes.borrow_mut();
        let (shape, dtype) = (*value.shape(), value.dtype());
        nodes.push(Node { name, shape, dtype, backward });
        Var { tape: self, value, id: VarId::Node(nodes.len() - 1) }
    }

    /// Runs the backward pass from `root`, whose gradient is `seed`, and returns the gradients of leaves.
    fn backward(&self, root: VarId, seed: Tensor) -> Vec<Option<Tensor>> {
        let mut nodes = std::mem::take(&mut *self.nodes.borrow_mut());
        let mut gradients = Gradients {
            device: self.device(),
            nodes: nodes.iter().map(|_| None).collect(),
            dtypes: nodes.iter().map(|node| node.dtype).collect(),
            arena: self.arena.gradients_cell().borrow_mut(),
        };
        gradients.add(root, seed);
        while let Some(node) = nodes.pop() {
            let index = nodes.len();
            if let Some(backward) = node.backward
                && let Some(dy) = gradients.nodes[index].take()
            {
                let name = || Cow::Owned(format!("{} backward", node.name));
                trace_span(Row::Operations, name, || backward(dy, &mut gradients));
            }
        }
        gradients.nodes
    }
}

/// The gradients of a backward pass under way.
#[derive(Debug)]
pub struct Gradients<'g> {
    device: &'g Device,
    nodes: Vec<Option<Tensor>>,
    /// Of the nodes' values.
    dtypes: Vec<DType>,
    arena: RefMut<'g, Tensor>,
}

impl Gradients<'_> {
    /// Where to write the gradient of `id`, and whether to add to what is there (`true`) or to overwrite contents that
    /// are unspecified (`false`). `None` when no gradient is wanted. Parameters' gradients have the arena's type, others
    /// that of the value they belong to.
    ///
    /// # Panics
    /// When `shape` is not that of the gradients already added.
    #[track_caller]
    pub fn target(&mut self, id: VarId, shape: &Shape) -> Option<(TensorMut<'_>, bool)> {
        match id {
            VarId::Constant => None,
            VarId::Param(param) => {
                assert_eq!(param.shape(), shape, "a gradient's shape must be its parameter's");
                Some((self.arena.view_mut().slice(param.offset(), *shape), true))
            }
            VarId::Node(index) => {
                let slot = &mut self.nodes[index];
                let accumulate = slot.is_some();
                let dtype = self.dtypes[index];
                let tensor = slot.get_or_insert_with(|| Tensor::empty(self.device, dtype, *shape));
                assert_eq!(tensor.shape(), shape, "two gradients of one value differ in shape");
                if !tensor.is_unique() {
                    *tensor = tensor.copy(); // an `add` shared it with another value's gradient
                }
                Some((tensor.view_mut(), accumulate))
            }
        }
    }

    /// [`Gradients::target`] for a kernel that writes the type of `like`, and its shape. Where the gradient has another
    /// type (a parameter's own, which is f32) the target is made in `own`, to be [added](Gradients::add) after.
    #[track_caller]
    pub(crate) fn target_like<'t>(
        &'t mut self,
        id: VarId,
        like: &Tensor,
        own: &'t mut Option<Tensor>,
    ) -> Option<(TensorMut<'t>, bool)> {
        let dtype = match id {
            VarId::Constant => return None,
            VarId::Param(_) => self.arena.dtype(),
            VarId::Node(index) => self.dtypes[index],
        };
        if dtype == like.dtype() {
            return self.target(id, like.shape());
        }
        Some((own.insert(like.empty_like()).view_mut(), false))
    }

    /// Adds `dx` to the gradient of `id`, in its type; the first to come is kept without a copy where it has that type.
    #[track_caller]
    pub fn add(&mut self, id: VarId, dx: Tensor) {
        if let VarId::Node(index) = id
            && self.nodes[index].is_none()
        {
            self.nodes[index] = Some(dx.cast(self.dtypes[index]));
            return;
        }
        let device = self.device;
        if let Some((mut target, _)) = self.target(id, dx.shape()) {
            crate::tensor::add_into(device, &mut target, &dx);
        }
    }
}

/// One training step's forward and backward pass: `loss` builds the graph over the arena's parameters, and the
/// gradients of its value replace those in the arena. Returns the loss, a scalar still on the device.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the value is not a scalar.
pub fn step(
    arena: &mut Arena,
    loss: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Result<Tensor> {
    arena.zero_gradients();
    let loss = backward_pass(arena, loss);
    reduce_gradients(arena);
    loss
}

/// [`step`] that adds to the gradients in the arena: the caller zeroes them first ([`Arena::zero_gradients`]) and
/// weights each loss. For losses that are means over samples; contrastive ones need [`cached_step`].
///
/// # Errors
/// When the device fails.
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

/// [`step`] over `count` micro-batches whose losses, `loss(tape, i)`, add up. Returns their sum.
///
/// # Errors
/// When the device fails.
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
    reduce_gradients(arena);
    Ok(sum)
}

/// A step over micro-batches whose loss couples all rows, with exact gradients (GradCache, Gao et al. 2021,
/// arXiv:2101.06983).
///
/// `embed(tape, i)` embeds micro-batch `i` of `count` into `[views * m, d]`, view after view; `loss` gets the embeddings
/// of the whole batch, `[views * n, d]`, again view after view. The embeddings are computed twice: once without saving
/// anything, then with a tape for each micro-batch in turn. Batch norm sees the rows of a micro-batch, and
/// running statistics move once for each, in the second pass.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When micro-batches differ in shape.
pub fn cached_step(
    arena: &mut Arena,
    count: usize,
    views: usize,
    mut embed: impl for<'t> FnMut(&'t Tape<'t>, usize) -> Var<'t>,
    loss: impl for<'t> FnOnce(Var<'t>) -> Var<'t>,
) -> Result<Tensor> {
    use crate::tensor::{interleave_views, pick_views};
    arena.zero_gradients();
    let look = Mode { gradients: false, batch_statistics: true, update_running: false };
    let parts: Vec<Tensor> = (0..count).map(|i| embed(&Tape::new(arena, look), i).value).collect();
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
    reduce_gradients(arena);
    arena.device().check()?;
    Ok(loss)
}

/// The gradient of a loss.
fn one(loss: &Var<'_>) -> Tensor {
    let mut one = loss.value.empty_like();
    one.view_mut().fill(1.0);
    one
}

/// Sums gradients over the processes of the arena's group.
fn reduce_gradients(arena: &mut Arena) {
    let group = arena.group().clone();
    if group.size() > 1 {
        let mut gradients = arena.gradients_cell().borrow_mut();
        group.all_reduce_sum(gradients.data_mut::<f32>());
    }
}

/// A forward pass as in training, without gradients: batch norm uses and records batch statistics. For momentum
/// encoders.
///
/// # Errors
/// When the device fails.
pub fn forward(
    arena: &mut Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Result<Tensor> {
    let value = forward_in_step(arena, f);
    arena.device().check()?;
    Ok(value)
}

/// [`forward`] inside a step, which tells itself when the device has failed.
pub(crate) fn forward_in_step(
    arena: &mut Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Tensor {
    f(&Tape::new(arena, Mode { gradients: false, ..TRAIN })).value
}

/// A forward pass for evaluation: running statistics, no gradients, nothing saved.
///
/// # Errors
/// When the device fails.
pub fn evaluate(arena: &Arena, f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>) -> Result<Tensor> {
    let value = evaluate_in_step(arena, f);
    arena.device().check()?;
    Ok(value)
}

/// [`evaluate`] inside a step, which tells itself when the device has failed.
pub(crate) fn evaluate_in_step(
    arena: &Arena,
    f: impl for<'t> FnOnce(&'t Tape<'t>) -> Var<'t>,
) -> Tensor {
    let mode = Mode { gradients: false, batch_statistics: false, update_running: false };
    f(&Tape::new(arena, mode)).value
}

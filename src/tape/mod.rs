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

mod gradients;
mod step;

use std::borrow::Cow;
use std::cell::RefCell;

use crate::arena::{Arena, Param, Stat};
use crate::device::{Device, Group, Row, trace_operation, trace_span};
use crate::tensor::{DType, Shape, Tensor, TensorMut};
pub use gradients::Gradients;
pub use step::{backward_pass, cached_step, evaluate, forward, step, summed_step};
pub(crate) use step::{evaluate_in_step, forward_in_step};

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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    use super::*;
    use crate::arena::{Init, Layout, SlotKind};
    use crate::error::Result;
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

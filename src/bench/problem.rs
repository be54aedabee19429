//! A case's operation as data: with the same operands this program, a reference library and the f64 device compute it.

use std::cell::RefCell;
use std::rc::Rc;

use super::case::{Run, filled, tiny_arena};
use crate::device::Device;
use crate::device::peer::{Convolution, Direction as Way, Peer, Pooling, Prepared, Product};
use crate::ops::conv2d::{data_gradient, forward, weight_gradient};
use crate::ops::kernels::conv2d::Direction;
use crate::ops::{BatchNorm, Conv2dDims, add, batch_norm, linear, max_pool, mean_pool, softmax};
use crate::tape::{Tape, Var, step};
use crate::tensor::Tensor;

/// An operation that reference libraries may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Problem {
    /// One direction of a convolution.
    Convolution {
        /// Its sizes.
        dims: Conv2dDims,
        /// What is computed.
        direction: Direction,
    },
    /// Batch norm of `[n, h, w, c]` with a ReLU.
    BatchNorm {
        /// Shape of the input.
        shape: [usize; 4],
        /// Whether a tensor is added before the ReLU.
        residual: bool,
        /// Whether the backward pass follows.
        backward: bool,
    },
    /// 3x3 max pooling of `[n, h, w, c]` with stride 2.
    MaxPool {
        /// Shape of the input.
        shape: [usize; 4],
        /// Whether the backward pass follows.
        backward: bool,
    },
    /// The mean over all pixels of `[n, h, w, c]`, and its backward pass.
    MeanPool {
        /// Shape of the input.
        shape: [usize; 4],
    },
    /// The sum of two tensors.
    Add {
        /// Their shape.
        shape: [usize; 4],
    },
    /// `y [m, n] = x Wᵀ`.
    Linear {
        /// Rows of `x`.
        m: usize,
        /// Columns of `x`.
        k: usize,
        /// Columns of `y`.
        n: usize,
    },
    /// The softmax of each row.
    Softmax {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        columns: usize,
    },
}

/// This program's operation on a device, with the results of its last run.
pub(super) struct Ours {
    pub run: Run,
    pub results: Rc<RefCell<Vec<Tensor>>>,
}

/// Size and stride and padding of ResNet's max pooling.
const MAX_POOL: [usize; 3] = [3, 2, 1];

impl Problem {
    /// Shapes of the operands, in order; `dy` comes last.
    pub(super) fn operands(&self) -> Vec<Vec<usize>> {
        match *self {
            Problem::Convolution { dims: d, direction } => {
                let x = vec![d.n(), d.h(), d.w(), d.c()];
                let w = vec![d.k(), d.r(), d.s(), d.c()];
                let y = vec![d.n(), d.p(), d.q(), d.k()];
                match direction {
                    Direction::Forward => vec![x, w],
                    Direction::DataGradient => vec![y, w],
                    Direction::WeightGradient => vec![x, y],
                }
            }
            Problem::BatchNorm { shape, residual, backward } => {
                vec![shape.to_vec(); 1 + usize::from(residual) + usize::from(backward)]
            }
            Problem::MaxPool { shape, backward } => {
                let mut all = vec![shape.to_vec()];
                all.extend(backward.then(|| pooled(shape).to_vec()));
                all
            }
            Problem::MeanPool { shape } => vec![shape.to_vec(), vec![shape[0], shape[3]]],
            Problem::Add { shape } => vec![shape.to_vec(); 2],
            Problem::Linear { m, k, n } => vec![vec![m, k], vec![n, k]],
            Problem::Softmax { rows, columns } => vec![vec![rows, columns]],
        }
    }

    /// This program's operation on varied values.
    pub(super) fn prepare(&self, device: &Device) -> Run {
        let operands: Vec<Tensor> =
            self.operands().iter().map(|shape| filled(device, shape)).collect();
        self.ours(device, &operands).run
    }

    /// This program's operation; the results are in the order in which a peer has them.
    pub(super) fn ours(&self, device: &Device, operands: &[Tensor]) -> Ours {
        let at = |i: usize| operands[i].clone();
        match *self {
            Problem::Convolution { dims, direction } => {
                convolution(device, dims, direction, at(0), at(1))
            }
            Problem::BatchNorm { residual, backward, .. } => {
                let other = residual.then(|| at(1));
                let dy = backward.then(|| at(operands.len() - 1));
                on_tape(device, at(0), dy, move |x| {
                    let leaf =
                        |other: &Tensor| x.tape().record("leaf", other.clone(), &[x], |_, _| {});
                    let other = other.as_ref().map(leaf);
                    let with =
                        BatchNorm { relu: true, residual: other.as_ref(), ..BatchNorm::default() };
                    batch_norm(x, with)
                })
            }
            Problem::MaxPool { backward, .. } => {
                let [size, stride, pad] = MAX_POOL;
                let dy = backward.then(|| at(1));
                on_tape(device, at(0), dy, move |x| max_pool(x, size, stride, [pad; 2]))
            }
            Problem::MeanPool { .. } => on_tape(device, at(0), Some(at(1)), mean_pool),
            Problem::Add { .. } => {
                let other = at(1);
                on_tape(device, at(0), None, move |x| add(x, &x.tape().input(&other)))
            }
            Problem::Linear { .. } => {
                let w = at(1);
                on_tape(device, at(0), None, move |x| linear(x, &x.tape().input(&w), None))
            }
            Problem::Softmax { .. } => {
                let (x, results) = (at(0), Rc::default());
                let kept: Rc<RefCell<Vec<Tensor>>> = Rc::clone(&results);
                let run = Box::new(move || {
                    kept.borrow_mut().clear();
                    kept.borrow_mut().push(softmax(&x, 1.0));
                });
                Ours { run, results }
            }
        }
    }

    /// A peer's operation on the same operands.
    pub(super) fn theirs<'a>(&self, peer: &'a dyn Peer, operands: &'a [Tensor]) -> Prepared<'a> {
        let at = |i: usize| operands[i].operand();
        match *self {
            Problem::Convolution { dims, direction } => {
                peer.convolution(&sizes(&dims), way(direction), at(0), at(1))
            }
            Problem::Linear { m, k, n } => {
                let p = Product { m, n, k, transpose_a: false, transpose_b: true };
                peer.product(&p, at(0), at(1))
            }
            Problem::BatchNorm { shape, residual, backward } => {
                let dy = backward.then(|| at(operands.len() - 1));
                let epsilon = crate::ops::BATCH_NORM_EPS as f32;
                peer.batch_norm(shape, epsilon, at(0), residual.then(|| at(1)), dy)
            }
            Problem::MaxPool { shape, backward } => {
                let [size, stride, pad] = MAX_POOL;
                let d =
                    Pooling { x: shape, y: pooled(shape), size: [size; 2], stride, pad, max: true };
                peer.pooling(&d, at(0), backward.then(|| at(1)))
            }
            Problem::MeanPool { shape } => {
                let [n, h, w, c] = shape;
                let (y, size) = ([n, 1, 1, c], [h, w]);
                let d = Pooling { x: shape, y, size, stride: 1, pad: 0, max: false };
                peer.pooling(&d, at(0), Some(at(1)))
            }
            Problem::Add { shape } => peer.add(shape, at(0), at(1)),
            Problem::Softmax { rows, columns } => peer.softmax(rows, columns, at(0)),
        }
    }

    /// The same problem without the fourth channel of images, which only pads them: no peer needs it.
    pub(super) fn unpadded(&self) -> Option<Self> {
        match *self {
            Problem::Convolution { dims: d, direction } if d.c() == 4 => {
                let (x, w) = ([d.n(), d.h(), d.w(), 3], [d.k(), d.r(), d.s(), 3]);
                let dims = Conv2dDims::new(x, w, d.stride(), d.pad());
                Some(Problem::Convolution { dims, direction })
            }
            _ => None,
        }
    }
}

fn pooled([n, h, w, c]: [usize; 4]) -> [usize; 4] {
    [n, h.div_ceil(2), w.div_ceil(2), c]
}

fn way(direction: Direction) -> Way {
    match direction {
        Direction::Forward => Way::Forward,
        Direction::DataGradient => Way::DataGradient,
        Direction::WeightGradient => Way::WeightGradient,
    }
}

fn sizes(d: &Conv2dDims) -> Convolution {
    Convolution {
        x: [d.n(), d.h(), d.w(), d.c()],
        filters: [d.k(), d.r(), d.s(), d.c()],
        y: [d.n(), d.p(), d.q(), d.k()],
        stride: d.stride(),
        pad: d.pad(),
    }
}

fn convolution(device: &Device, d: Conv2dDims, direction: Direction, a: Tensor, b: Tensor) -> Ours {
    let result = match direction {
        Direction::Forward => Tensor::empty(device, a.dtype(), [d.n(), d.p(), d.q(), d.k()]),
        Direction::DataGradient => Tensor::empty(device, a.dtype(), [d.n(), d.h(), d.w(), d.c()]),
        Direction::WeightGradient => Tensor::floats(device, [d.k(), d.r(), d.s(), d.c()]),
    };
    let results = Rc::new(RefCell::new(vec![result]));
    let kept = Rc::clone(&results);
    let run: Run = Box::new(move || {
        let to = &mut kept.borrow_mut()[0];
        match direction {
            Direction::Forward => drop(forward(to, &a, &b, &d, None)),
            Direction::DataGradient => data_gradient(&mut to.view_mut(), &a, &b, &d, false),
            Direction::WeightGradient => weight_gradient(&mut to.view_mut(), &a, &b, &d, false),
        }
    });
    Ours { run, results }
}

/// Runs `op` on `x` in training mode and, given `dy`, its backward pass. The results are `y`, then `dx`.
pub(super) fn on_tape(
    device: &Device,
    x: Tensor,
    dy: Option<Tensor>,
    op: impl for<'t> Fn(&Var<'t>) -> Var<'t> + 'static,
) -> Ours {
    let ((mut arena, param), zero) = (tiny_arena(device), Tensor::zeros(device, []));
    let results = Rc::new(RefCell::new(Vec::new()));
    let kept = Rc::clone(&results);
    let run: Run = Box::new(move || {
        // Before the step, so that it finds their memory free.
        kept.borrow_mut().clear();
        let result = step(&mut arena, |tape: &Tape<'_>| {
            let Some(dy) = &dy else {
                kept.borrow_mut().push(op(&tape.input(&x)).value().clone());
                return tape.input(&zero);
            };
            let into = Rc::clone(&kept);
            let leaf = tape.record("leaf", x.clone(), &[&tape.param(param)], move |dx, _| {
                into.borrow_mut().push(dx);
            });
            let y = op(&leaf);
            kept.borrow_mut().push(y.value().clone());
            let (id, dy) = (y.id(), dy.clone());
            tape.record("seed", zero.clone(), &[&y], move |_, gradients| gradients.add(id, dy))
        });
        result.expect("the device");
    });
    Ours { run, results }
}

//! Cases: operations at sizes.

use super::{Unit, Work, arenas, convolutions, layers, losses};
use std::sync::Arc;

use crate::arena::{Arena, Init, Layout, Param, SlotKind};
use crate::device::Device;
use crate::ops::kernels::Gemm;
use crate::tape::{Tape, Var, step};
use crate::tensor::{DType, Tensor};

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Views of ResNet-50 at 224 pixels.
    pub views: usize,
    /// Rows of embeddings of a contrastive loss.
    pub rows: usize,
    /// Rows of MoCo's queue, and images of kNN's bank.
    pub queue: usize,
    /// Rows that share SwAV's 3,000 prototypes.
    pub assigned: usize,
    /// Whether spatial sizes and channels are an eighth of ResNet-50's, for tests.
    pub tiny: bool,
}

impl Extent {
    /// What a GPU trains with.
    pub const GPU: Self =
        Self { views: 256, rows: 16_384, queue: 65_536, assigned: 4096, tiny: false };
    /// What two cores can do.
    pub const CPU: Self = Self { views: 8, rows: 512, queue: 8192, assigned: 256, tiny: false };
    /// Everything, in a second.
    pub const TINY: Self = Self { views: 1, rows: 16, queue: 64, assigned: 8, tiny: true };

    /// A size of ResNet-50.
    pub(super) fn of(&self, size: usize) -> usize {
        if self.tiny { (size / 8).max(1) } else { size }
    }
}

/// A kernel that a case launches on a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Launched {
    /// Its name in `kernels/`.
    pub kernel: String,
    /// Threads of a block.
    pub threads: usize,
    /// Blocks; 0 where they follow from the chip (a grid-stride loop that fills it).
    pub blocks: usize,
    /// What it reads and writes in bytes, which its own loop moves: the case's work is not more than the sum.
    pub bytes: f64,
    /// Operations of it.
    pub operations: f64,
    /// Operations of tensor cores in a product that is none of the tile table's.
    pub products: f64,
    /// The product, where it is one of the tile table's.
    pub product: Option<Gemm>,
}

impl Launched {
    /// A loop over rows or elements that fills the chip.
    pub(super) fn over(kernel: impl Into<String>, bytes: f64, operations: f64) -> Self {
        let (threads, blocks) = (256, 0);
        Self {
            kernel: kernel.into(),
            threads,
            blocks,
            bytes,
            operations,
            products: 0.0,
            product: None,
        }
    }
}

/// Queues the operation once.
pub(super) type Run = Box<dyn FnMut()>;

/// One operation at one size.
pub struct Case {
    /// `conv2d forward 256x56x56 64->64 3x3/1`
    pub name: String,
    /// How often a ResNet-50 has it in a forward and backward pass; 0 where it is no layer of one.
    pub count: usize,
    /// The work in the dtype of activations.
    pub work: Work,
    /// What computes.
    pub unit: Unit,
    /// What a GPU is asked to do, in order.
    pub launched: Vec<Launched>,
    pub(super) prepare: Box<dyn Fn(&Device) -> Run>,
}

impl Case {
    /// Makes the operands on a device; each call of what comes back queues the operation once.
    pub fn prepare(&self, device: &Device) -> impl FnMut() + use<> {
        (self.prepare)(device)
    }
}

/// All cases whose names hold each word of `filter`, for activations of a dtype.
pub fn cases(extent: &Extent, dtype: DType, filter: &str) -> Vec<Case> {
    let mut all = convolutions::cases(extent, dtype);
    all.extend(layers::cases(extent, dtype));
    all.extend(losses::cases(extent, dtype));
    all.extend(arenas::cases(extent, dtype));
    all.retain(|case| filter.split_whitespace().all(|word| case.name.contains(word)));
    all
}

/// The end of a kernel's name.
pub(super) fn suffix(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f32" }
}

/// Values that are neither all alike nor large, in the activations' dtype of a device.
pub(super) fn filled(device: &Device, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> =
        (0..count).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 255) as f32).collect();
    let values: Vec<f32> = values.into_iter().map(|v| v / 128.0 - 0.996).collect();
    let wide = Tensor::from_slice(device, shape, &values);
    wide.cast(DType::of_activations(device))
}

/// What `forward` of constants does, again and again, in training mode.
pub(super) fn forward(
    device: &Device,
    mut forward: impl for<'t> FnMut(&'t Tape<'t>) + 'static,
) -> Run {
    let ((mut arena, _), zero) = (nothing(device), Tensor::zeros(device, []));
    Box::new(move || {
        let done = step(&mut arena, |tape| {
            forward(tape);
            tape.input(&zero)
        });
        done.expect("the device");
    })
}

/// What `op` and its backward pass do for an input, and for the gradient of its value, which is like `dy`.
pub(super) fn both(
    device: &Device,
    x: Tensor,
    dy: Tensor,
    op: impl for<'t> Fn(&Var<'t>) -> Var<'t> + 'static,
) -> Run {
    let ((mut arena, param), zero) = (nothing(device), Tensor::zeros(device, []));
    Box::new(move || {
        let done = step(&mut arena, |tape| {
            let leaf = tape.record("leaf", x.clone(), &[&tape.param(param)], |_, _| {});
            let y = op(&leaf);
            let (id, dy) = (y.id(), dy.clone());
            tape.record("seed", zero.clone(), &[&y], move |_, gradients| gradients.add(id, dy))
        });
        done.expect("the device");
    })
}

/// An arena with one number.
pub(super) fn nothing(device: &Device) -> (Arena, Param) {
    let mut layout = Layout::new();
    let param = layout.param("leaf", [1], SlotKind::Matrix, Init::Constant(0.0));
    (Arena::new(&Arc::new(layout), device, 1), param)
}

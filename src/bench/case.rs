//! A case: one operation at one size, its work, and the kernels that a GPU launches for it.

use std::sync::Arc;

use super::problem::on_tape;
use super::{Bench, Problem, Timing, Unit, Work};
use crate::arena::{Arena, Init, Layout, Param, SlotKind};
use crate::device::Device;
use crate::error::Result;
use crate::ops::kernels::Gemm;
use crate::tape::{Tape, Var, step};
use crate::tensor::{DType, Tensor};

/// The sizes of the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Views in a batch of ResNet-50 at 224 pixels.
    pub views: usize,
    /// Rows of embeddings in a contrastive loss.
    pub rows: usize,
    /// Rows of MoCo's queue, and images in the kNN bank.
    pub queue: usize,
    /// Rows assigned to SwAV's 3,000 prototypes.
    pub assigned: usize,
    /// Whether spatial sizes and channels are an eighth of those of ResNet-50, for tests.
    pub tiny: bool,
}

impl Extent {
    /// Sizes that a GPU trains with.
    pub const GPU: Self =
        Self { views: 256, rows: 16_384, queue: 65_536, assigned: 4096, tiny: false };
    /// Sizes that two CPU cores can run.
    pub const CPU: Self = Self { views: 8, rows: 512, queue: 8192, assigned: 256, tiny: false };
    /// Sizes at which all cases together take a second.
    pub const TINY: Self = Self { views: 1, rows: 16, queue: 64, assigned: 8, tiny: true };

    /// Scales a size of ResNet-50.
    pub(super) fn of(&self, size: usize) -> usize {
        if self.tiny { (size / 8).max(1) } else { size }
    }
}

/// A kernel that a case launches on a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Launched {
    /// Its name in `kernels/`.
    pub kernel: String,
    /// Threads in a block.
    pub threads: usize,
    /// Blocks; 0 if the chip determines them (a grid-stride loop that fills it).
    pub blocks: usize,
    /// Bytes that its loop reads and writes. The sum over a case's kernels is at least the case's work.
    pub bytes: f64,
    /// Its operations.
    pub operations: f64,
    /// Tensor-core operations of a kernel that is not in the GEMM tile table.
    pub mma: f64,
    /// The GEMM, if the kernel is in the tile table.
    pub gemm: Option<Gemm>,
}

impl Launched {
    /// A loop over rows or elements with enough blocks to fill the chip.
    pub(super) fn over(kernel: impl Into<String>, bytes: f64, operations: f64) -> Self {
        let (threads, blocks) = (256, 0);
        Self { kernel: kernel.into(), threads, blocks, bytes, operations, mma: 0.0, gemm: None }
    }
}

/// Runs the operation once, or queues it once on a GPU.
pub(super) type Run = Box<dyn FnMut()>;

/// One operation at one size.
pub struct Case {
    /// `conv2d forward 256x56x56 64->64 3x3/1`
    pub name: String,
    /// Occurrences in a forward and backward pass of ResNet-50; 0 if it is not one of its layers.
    pub count: usize,
    /// The least work, in the dtype of the activations.
    pub work: Work,
    /// The unit that computes.
    pub unit: Unit,
    /// The kernels that a GPU launches, in order.
    pub launched: Vec<Launched>,
    /// The operation as data, if reference libraries may have it.
    pub problem: Option<Problem>,
    pub(super) prepare: Box<dyn Fn(&Device) -> Run>,
}

impl Case {
    /// Whether a run consists of launches only on a GPU, so that it can be replayed from a graph. Augmentation copies its parameters
    /// from the host, and kNN its features and what it found.
    pub fn is_replayed(&self) -> bool {
        !["augment ", "knn "].iter().any(|word| self.name.starts_with(word))
    }

    /// Measures a run on the bench's device: [replayed](Bench::measure_replayed) if it can be.
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure(&self, bench: &mut Bench, device: &Device) -> Result<Timing> {
        let run = self.prepare(device);
        if self.is_replayed() { bench.measure_replayed(run) } else { bench.measure(run) }
    }

    /// Allocates the operands on a device and returns a closure that runs (on a GPU: queues) the operation once.
    pub fn prepare(&self, device: &Device) -> impl FnMut() + use<> {
        (self.prepare)(device)
    }
}

/// The dtype suffix of a kernel's name.
pub(super) fn suffix(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f32" }
}

/// Returns varied values of small magnitude, in the device's dtype for activations.
pub(super) fn filled(device: &Device, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> =
        (0..count).map(|i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 255) as f32).collect();
    let values: Vec<f32> = values.into_iter().map(|v| v / 128.0 - 0.996).collect();
    let wide = Tensor::from_slice(device, shape, &values);
    wide.cast(DType::of_activations(device))
}

/// Runs `forward` on constants in training mode, once per call.
pub(super) fn forward(
    device: &Device,
    mut forward: impl for<'t> FnMut(&'t Tape<'t>) + 'static,
) -> Run {
    let ((mut arena, _), zero) = (tiny_arena(device), Tensor::zeros(device, []));
    Box::new(move || {
        let result = step(&mut arena, |tape| {
            forward(tape);
            tape.input(&zero)
        });
        result.expect("the device");
    })
}

/// Runs `op` on `x` and its backward pass with the output gradient `dy`, once per call.
pub(super) fn both(
    device: &Device,
    x: Tensor,
    dy: Tensor,
    op: impl for<'t> Fn(&Var<'t>) -> Var<'t> + 'static,
) -> Run {
    on_tape(device, x, Some(dy), op).run
}

/// An arena that holds one number: tapes need an arena, and the cases have no weights.
pub(super) fn tiny_arena(device: &Device) -> (Arena, Param) {
    let mut layout = Layout::new();
    let param = layout.param("leaf", [1], SlotKind::Matrix, Init::Constant(0.0));
    (Arena::new(&Arc::new(layout), device, 1), param)
}

//! Optimiser updates on a GPU (`kernels/optimizer.cu`, `kernels/ema.cu`): one launch over the arena for SGD, Adam and
//! momentum encoders, two for LARS.
//!
//! The kernels also write the bf16 working copy of the values, so that no cast has to follow.

use half::bf16;

use super::adam::Adam;
use super::optimizer::{Lars, ParamPolicy, Rule, Segment, Sgd, TrustNorm};
use crate::arena::{Arena, Parts};
use crate::device::Device;
use crate::device::cuda::{self, In, Launch, Out, Table, int};
use crate::tensor::{DType, Tensor};

/// Elements that a block updates: the kernels' `OPTIMIZER_CHUNK`.
const CHUNK: usize = 8192;

/// The policies of slots in `kernels/optimizer.cu`.
const DEFAULT: i32 = 0;
const NO_DECAY: i32 = 1;
const FROZEN: i32 = 2;

/// A slot's rate in the kernels' table: a negative rate is a multiplier of the optimiser's learning rate, here 1.
const OPTIMIZER_RATE: f64 = -1.0;

/// Tables of an arena's slots on its GPU, for the kernels.
#[derive(Debug)]
pub(super) struct Tables {
    /// First element, number of elements and first chunk of each slot.
    slots: Table<u64>,
    /// The slot of each chunk.
    chunks: Table<i32>,
    count: usize,
    policies: Table<i32>,
    rates: Table<f64>,
    updated: Updated,
}

/// What the kernels touch of an arena, which has gaps between its slots.
#[derive(Clone, Copy, Debug)]
struct Updated {
    /// Elements of the slots that are not frozen.
    elements: usize,
    /// Elements, and chunks, of those whose norms LARS takes.
    scaled: [usize; 2],
}

impl Updated {
    fn of(segments: &[Segment], policies: &[i32]) -> Self {
        let with = |wanted: fn(i32) -> bool| {
            segments.iter().zip(policies).filter(move |(_, policy)| wanted(**policy))
        };
        let scaled = || with(|policy| policy == DEFAULT);
        Self {
            elements: with(|policy| policy != FROZEN).map(|(segment, _)| segment.len).sum(),
            scaled: [
                scaled().map(|(segment, _)| segment.len).sum(),
                scaled().map(|(segment, _)| segment.len.div_ceil(CHUNK)).sum(),
            ],
        }
    }

    /// Values, momentum or gradients.
    fn floats(self) -> usize {
        self.elements * size_of::<f32>()
    }
}

impl Tables {
    pub(super) fn new(gpu: &Device, segments: &[Segment]) -> Self {
        let (mut slots, mut chunks) = (Vec::new(), Vec::new());
        for (slot, segment) in segments.iter().enumerate() {
            slots.extend([segment.offset, segment.len, chunks.len()].map(|v| v as u64));
            chunks.resize(chunks.len() + segment.len.div_ceil(CHUNK), int(slot));
        }
        let (policies, rates) = policies_and_rates(segments);
        Self {
            updated: Updated::of(segments, &policies),
            slots: Table::new(gpu, &slots),
            count: chunks.len(),
            chunks: Table::new(gpu, &chunks),
            policies: Table::new(gpu, &policies),
            rates: Table::new(gpu, &rates),
        }
    }

    /// Replaces the policies of all slots, for later steps.
    pub(super) fn set_policies(&mut self, segments: &[Segment]) {
        let (policies, rates) = policies_and_rates(segments);
        self.updated = Updated::of(segments, &policies);
        self.policies.write(&policies);
        self.rates.write(&rates);
    }

    /// Updates the arena's values along its gradients. Consists of launches only, so that a graph can capture it.
    pub(super) fn step(
        &self,
        rule: Rule,
        arena: &mut Arena,
        state: [Option<&mut Tensor>; 2],
        lr: In<'_, f64>,
    ) {
        let parts = arena.parts();
        match (rule, state) {
            (Rule::Sgd(sgd), [Some(momentum), _]) => self.sgd(sgd, parts, momentum, lr),
            (Rule::Lars(lars), [Some(momentum), _]) => self.lars(lars, parts, momentum, lr),
            (Rule::Adam(adam), [Some(mean), Some(squares)]) => {
                self.adam((adam, false), parts, [mean, squares], lr);
            }
            (Rule::AdamW(adam), [Some(mean), Some(squares)]) => {
                self.adam((adam, true), parts, [mean, squares], lr);
            }
            _ => unreachable!("the optimizer makes the state that its rule needs"),
        }
    }

    /// `rule`: the settings, and whether the decay is AdamW's. `lr`: the learning rate and the two corrections.
    fn adam(
        &self,
        (rule, decoupled): (Adam, bool),
        arena: Parts<'_>,
        [mean, squares]: [&mut Tensor; 2],
        lr: In<'_, f64>,
    ) {
        let (Parts { values, working, gradients }, bytes) = (arena, self.updated.floats());
        // SAFETY: the tables, values, working copy, both means and gradients all have the arena's layout; `lr` has three numbers.
        unsafe {
            cuda::adam_step(
                self.launch(gradients),
                values.device_out().writing(bytes).updating(true),
                mean.device_out().writing(bytes).updating(true),
                squares.device_out().writing(bytes).updating(true),
                copy(working, bytes / 2),
                gradients.device_in().reading(bytes),
                self.slots.device_in(),
                self.chunks.device_in(),
                self.policies.device_in(),
                self.rates.device_in(),
                lr,
                int(self.count),
                rule.beta1,
                rule.beta2,
                rule.eps,
                rule.weight_decay,
                i32::from(decoupled),
            );
        }
    }

    fn launch<'d>(&self, on: &'d Tensor) -> Launch<'d> {
        Launch::new(on.device().gpu(), [self.count, 1, 1], [256, 1, 1])
    }

    fn sgd(&self, rule: Sgd, arena: Parts<'_>, momentum: &mut Tensor, lr: In<'_, f64>) {
        let (Parts { values, working, gradients }, bytes) = (arena, self.updated.floats());
        // SAFETY: the tables, values, working copy, momentum and gradients all have the arena's layout.
        unsafe {
            cuda::sgd_step(
                self.launch(gradients),
                values.device_out().writing(bytes).updating(true),
                momentum.device_out().writing(bytes).updating(true),
                copy(working, bytes / 2),
                gradients.device_in().reading(bytes),
                self.slots.device_in(),
                self.chunks.device_in(),
                self.policies.device_in(),
                self.rates.device_in(),
                lr.reading(size_of::<f64>()),
                int(self.count),
                rule.momentum,
                rule.weight_decay,
                i32::from(rule.nesterov),
            );
        }
    }

    fn lars(&self, rule: Lars, arena: Parts<'_>, momentum: &mut Tensor, lr: In<'_, f64>) {
        let (Parts { values, working, gradients }, bytes) = (arena, self.updated.floats());
        let [scaled, chunks] = self.updated.scaled;
        let (read, norms) = (scaled * size_of::<f32>(), chunks * 3 * size_of::<f64>());
        let mut partial = Tensor::empty(gradients.device(), DType::F64, [self.count, 3]);
        // SAFETY: as for SGD; `partial` has three numbers per chunk.
        unsafe {
            cuda::lars_norms(
                self.launch(gradients),
                partial.device_out().writing(norms),
                values.device_in().reading(read),
                gradients.device_in().reading(read),
                self.slots.device_in(),
                self.chunks.device_in(),
                self.policies.device_in(),
                int(self.count),
                rule.weight_decay,
            );
            cuda::lars_step(
                self.launch(gradients),
                values.device_out().writing(bytes).updating(true),
                momentum.device_out().writing(bytes).updating(true),
                copy(working, bytes / 2),
                gradients.device_in().reading(bytes),
                partial.device_in().reading(norms),
                self.slots.device_in(),
                self.chunks.device_in(),
                self.policies.device_in(),
                self.rates.device_in(),
                lr.reading(size_of::<f64>()),
                int(self.count),
                rule.momentum,
                rule.weight_decay,
                rule.trust,
                i32::from(rule.norm == TrustNorm::SumOfNorms),
                i32::from(rule.clip),
                i32::from(rule.lr_in_momentum),
            );
        }
    }
}

/// The `policies` and `rates` of `kernels/optimizer.cu`.
fn policies_and_rates(segments: &[Segment]) -> (Vec<i32>, Vec<f64>) {
    let of = |segment: &Segment| {
        let default = if segment.exempt { NO_DECAY } else { DEFAULT };
        match segment.policy {
            ParamPolicy::Default => (default, OPTIMIZER_RATE),
            ParamPolicy::FixedLr(rate) => (default, rate),
            ParamPolicy::LrMultiplier(factor) => (default, -factor),
            ParamPolicy::Frozen => (FROZEN, OPTIMIZER_RATE),
            ParamPolicy::Exempt => (NO_DECAY, OPTIMIZER_RATE),
        }
    };
    segments.iter().map(of).unzip()
}

/// The working copy, of which a kernel writes so many bytes; null if there is none.
fn copy(working: Option<&mut Tensor>, bytes: usize) -> Out<'_, bf16> {
    working.map_or(Out::null(), |working| working.device_out().writing(bytes))
}

/// `target = m target + (1 - m) online`, `m` on the GPU.
pub(super) fn ema(target: &mut Arena, online: &Arena, momentum: In<'_, f64>) {
    let (online, n) = (online.values(), online.values().len());
    let Parts { values, working, .. } = target.parts();
    let launch = Launch::over(online.device().gpu(), n, 8);
    // SAFETY: all have `n` elements: `ema` has checked that the arenas have one layout.
    unsafe {
        cuda::ema(
            launch,
            values.device_out().updating(true),
            copy(working, n * size_of::<bf16>()),
            online.device_in(),
            momentum,
            n as i64,
        );
    }
}

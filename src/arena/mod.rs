//! Arenas: all weights of a network in one allocation.
//!
//! A network is a description; its layers hold [`Param`] and [`Stat`] handles into a [`Layout`]. An [`Arena`] gives the
//! layout values, gradients and running statistics, each one contiguous tensor, so that an optimiser, a momentum update,
//! a checkpoint or an all-reduce handles one array. A momentum encoder is a second arena of the same layout.
//!
//! All of them are f32 (f64 on the reference device). A device that multiplies in bf16 also keeps a working copy of the values,
//! which tapes hand out for filters and matrices; gains, shifts and biases stay f32.

mod layout;

use std::cell::{Cell, Ref, RefCell};
use std::sync::Arc;

use crate::device::{Device, Group, Philox, Purpose};
use crate::tensor::{DType, Tensor};
use layout::end;
pub use layout::{Init, Layout, Param, SLOT_ALIGNMENT, Slot, SlotKind, Stat};

/// The values, gradients and running statistics of a layout.
#[derive(Debug)]
pub struct Arena {
    layout: Arc<Layout>,
    values: Tensor,
    /// The values in the type of activations, if that type is not the values' own.
    working: RefCell<Option<Tensor>>,
    /// The values have been written since the working copy was made.
    stale: Cell<bool>,
    gradients: RefCell<Tensor>,
    statistics: RefCell<Tensor>,
    group: Group,
    recompute: bool,
}

impl Arena {
    /// Makes an arena with random initial values. The same seed draws the same numbers on every device.
    pub fn new(layout: &Arc<Layout>, device: &Device, seed: u64) -> Self {
        let mut values = vec![0.0; end(layout.params())];
        for (index, slot) in layout.params().iter().enumerate() {
            let mut rng = Philox::new(seed, Purpose::Weights, index as u32, 0);
            let inner = *slot.shape.last().unwrap_or(&1);
            for (i, value) in values[slot.offset..][..slot.shape.elements()].iter_mut().enumerate()
            {
                if i % inner >= slot.channels {
                    continue; // padding stays zero: its inputs are zero, and so are its gradients
                }
                // Rounded to f32, so that the reference device starts from the CPU's weights exactly.
                *value = f64::from(match slot.init {
                    Init::Constant(v) => v as f32,
                    Init::Normal(std) => (std * rng.normal()) as f32,
                    Init::Uniform(bound) => rng.uniform_in(-1.0, 1.0) * bound as f32,
                    Init::TruncatedNormal(std) => (std * truncated_normal(&mut rng)) as f32,
                });
            }
        }
        let mut statistics = vec![0.0; end(layout.stats())];
        for slot in layout.stats() {
            if let Init::Constant(v) = slot.init {
                statistics[slot.offset..][..slot.shape.elements()].fill(v);
            }
        }
        Self {
            layout: layout.clone(),
            working: RefCell::new(working_copy(device, values.len())),
            stale: Cell::new(true),
            values: Tensor::from_f64(device, [values.len()], &values),
            gradients: RefCell::new(Tensor::zeros(device, [values.len()])),
            statistics: RefCell::new(Tensor::from_f64(device, [statistics.len()], &statistics)),
            group: Group::alone(),
            recompute: false,
        }
    }

    /// Makes an arena of the same layout with the same values and statistics, for a momentum encoder.
    pub fn twin(&self) -> Self {
        Self {
            layout: self.layout.clone(),
            working: RefCell::new(working_copy(self.device(), self.values.len())),
            stale: Cell::new(true),
            values: self.values.copy(),
            gradients: RefCell::new(Tensor::zeros(self.device(), [self.values.len()])),
            statistics: RefCell::new(self.statistics.borrow().copy()),
            group: self.group.clone(),
            recompute: self.recompute,
        }
    }

    /// Shares the arena's gradients and batch statistics with the other ranks of a group, whose arenas have the same values.
    pub fn in_group(mut self, group: &Group) -> Self {
        self.group = group.clone();
        self
    }

    /// Saves memory in a step over this arena: residual blocks save only their inputs, and the backward pass computes them again
    /// ([`Tape::recompute`](crate::tape::Tape::recompute)). Does not change results.
    pub fn with_recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    pub(crate) fn recomputes(&self) -> bool {
        self.recompute
    }

    /// The slots.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        self.values.device()
    }

    /// The ranks that share its gradients and batch statistics.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// All values, padding between slots included.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// All values, for writing.
    pub fn values_mut(&mut self) -> &mut Tensor {
        self.stale.set(true);
        &mut self.values
    }

    /// All gradients, in the layout of the values.
    pub fn gradients(&self) -> Ref<'_, Tensor> {
        self.gradients.borrow()
    }

    /// All running statistics.
    pub fn statistics(&self) -> Ref<'_, Tensor> {
        self.statistics.borrow()
    }

    /// All running statistics, for writing.
    pub fn statistics_mut(&mut self) -> &mut Tensor {
        self.statistics.get_mut()
    }

    /// The values, for writing, and the gradients, for optimisers.
    pub fn values_and_gradients(&mut self) -> (&mut Tensor, &Tensor) {
        self.stale.set(true);
        (&mut self.values, self.gradients.get_mut())
    }

    /// The tensors that an update on a GPU reads and writes. The working copy is up to date before the update, which must
    /// keep it so.
    pub(crate) fn parts(&mut self) -> Parts<'_> {
        self.refresh(); // an update may skip parts of the working copy
        Parts {
            values: &mut self.values,
            working: self.working.get_mut().as_mut(),
            gradients: self.gradients.get_mut(),
        }
    }

    /// Sets every gradient to zero.
    pub fn zero_gradients(&mut self) {
        crate::tensor::fill(self.gradients.get_mut(), 0.0);
    }

    /// A parameter's value, sharing the arena's memory: drop it before the next update.
    ///
    /// # Panics
    /// If the parameter belongs to another layout.
    #[track_caller]
    pub fn value(&self, param: Param) -> Tensor {
        self.layout.expect_param(param);
        self.values.slice(param.offset, param.shape)
    }

    /// A parameter's value for use on a tape.
    #[track_caller]
    pub(crate) fn working_value(&self, param: Param) -> Tensor {
        self.layout.expect_param(param);
        match &*self.working.borrow() {
            Some(working) if param.kind.is_multiplied() => {
                debug_assert!(!self.stale.get(), "a tape refreshes the working copy first");
                working.slice(param.offset, param.shape)
            }
            _ => self.value(param),
        }
    }

    /// Brings the working copy up to date. A tape does so when it is made. Code that updates values inside a step does so
    /// itself, so that a captured step does not depend on earlier host work.
    ///
    /// # Panics
    /// If a tensor still shares the memory of the working copy.
    pub(crate) fn refresh(&self) {
        if let Some(working) = &mut *self.working.borrow_mut()
            && self.stale.get()
        {
            working.view_mut().cast_from(&self.values);
        }
        self.stale.set(false);
    }

    /// A parameter's value, for writing.
    ///
    /// # Panics
    /// If a tensor still shares the arena's memory or the parameter belongs to another layout.
    #[track_caller]
    pub fn value_mut(&mut self, param: Param) -> crate::tensor::TensorMut<'_> {
        self.layout.expect_param(param);
        self.stale.set(true);
        self.values.view_mut().slice(param.offset, param.shape)
    }

    /// A copy of a parameter's gradient.
    ///
    /// # Panics
    /// If the parameter belongs to another layout.
    #[track_caller]
    pub fn gradient(&self, param: Param) -> Tensor {
        self.layout.expect_param(param);
        self.gradients.borrow().slice(param.offset, param.shape).copy()
    }

    /// A slot's values as f64: for files and tests.
    pub fn slot_values(&self, slot: &Slot) -> Vec<f64> {
        match slot.kind {
            SlotKind::RunningMean | SlotKind::RunningVariance => {
                self.statistics.borrow().slice(slot.offset, slot.shape).to_f64()
            }
            _ => self.values.slice(slot.offset, slot.shape).to_f64(),
        }
    }

    pub(crate) fn gradients_cell(&self) -> &RefCell<Tensor> {
        &self.gradients
    }

    #[track_caller]
    pub(crate) fn stat(&self, stat: Stat) -> Tensor {
        self.layout.expect_stat(stat);
        self.statistics.borrow().slice(stat.offset, stat.shape)
    }

    #[track_caller]
    pub(crate) fn update_stat(&self, stat: Stat, f: impl FnOnce(crate::tensor::TensorMut<'_>)) {
        self.layout.expect_stat(stat);
        let mut statistics = self.statistics.borrow_mut();
        f(statistics.view_mut().slice(stat.offset, stat.shape));
    }
}

/// An arena's tensors, borrowed separately.
pub(crate) struct Parts<'a> {
    pub(crate) values: &'a mut Tensor,
    /// The values in the type of activations, if that type is not the values' own.
    pub(crate) working: Option<&'a mut Tensor>,
    pub(crate) gradients: &'a Tensor,
}

/// Memory for a working copy, if activations have another type than values.
fn working_copy(device: &Device, len: usize) -> Option<Tensor> {
    let dtype = DType::of_activations(device);
    (dtype != DType::of(device)).then(|| Tensor::empty(device, dtype, [len]))
}

fn truncated_normal(rng: &mut Philox) -> f64 {
    loop {
        let value = rng.normal();
        if value.abs() <= 2.0 {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Arc<Layout> {
        let mut layout = Layout::new();
        layout.padded_param("stem", [2, 3, 3, 4], SlotKind::Filter, Init::Normal(1.0), 3);
        layout.param("gain", [5], SlotKind::Gain, Init::Constant(1.0));
        layout.param("fc", [7, 5], SlotKind::Matrix, Init::Uniform(0.5));
        layout.stat("mean", 5, SlotKind::RunningMean, 0.0);
        Arc::new(layout)
    }

    #[test]
    fn slots_are_aligned_and_padding_is_zero() {
        let layout = layout();
        assert!(layout.params().iter().all(|s| s.offset % SLOT_ALIGNMENT == 0));
        assert_eq!(layout.weights(), 2 * 3 * 3 * 3 + 5 + 35);
        let arena = Arena::new(&layout, &Device::reference(), 3);
        let stem = arena.slot_values(&layout.params()[0]);
        assert!(stem.chunks(4).all(|pixel| pixel[3] == 0.0 && pixel[0] != 0.0));
    }

    #[test]
    fn truncated_filters_have_the_deviation_of_their_inputs() {
        let mut layout = Layout::new();
        layout.padded_param("stem", [64, 7, 7, 4], SlotKind::Filter, Init::Normal(1.0), 3);
        layout.param("fc", [7, 5], SlotKind::Matrix, Init::Uniform(0.5));
        layout.start_truncated(&[SlotKind::Filter], 1.0);
        assert_eq!(layout.params()[1].init, Init::Uniform(0.5));
        let arena = Arena::new(&Arc::new(layout), &Device::reference(), 3);
        let (std, all) = (1.0 / 147_f64.sqrt(), arena.slot_values(&arena.layout().params()[0]));
        let mean_square = all.iter().map(|v| v * v).sum::<f64>() / (64 * 147) as f64;
        assert!((mean_square.sqrt() / std - 0.8796).abs() < 0.02, "{}", mean_square.sqrt() / std);
        assert!(all.iter().all(|v| v.abs() <= 2.0 * std * 1.000_001));
    }

    #[test]
    fn every_device_starts_from_the_same_weights() {
        let layout = layout();
        let reference = Arena::new(&layout, &Device::reference(), 3);
        let cpu = Arena::new(&layout, &Device::cpu(1).unwrap(), 3);
        assert_eq!(reference.values().to_f64(), cpu.values().to_f64());
    }

    #[test]
    fn handles_of_another_layout_are_refused() {
        let make = |sizes: [usize; 2]| {
            let mut layout = Layout::new();
            let param = |layout: &mut Layout, name: &str, n| {
                layout.param(name, [n], SlotKind::Bias, Init::Constant(n as f64))
            };
            let param = sizes.map(|n| param(&mut layout, &format!("p{n}"), n))[0];
            (param, layout.stat("mean", 3, SlotKind::RunningMean, 0.0), layout)
        };
        let ((param, stat, layout), (other, other_stat, _)) = (make([4, 5]), make([4, 5]));
        let mut grown = layout.clone();
        let later = grown.param("later", [4], SlotKind::Bias, Init::Constant(0.0));
        let mut arena = Arena::new(&Arc::new(layout), &Device::reference(), 1);
        assert_eq!(arena.value(param).to_f64(), [4.0; 4]);
        assert_eq!(arena.stat(stat).to_f64(), [0.0; 3]);
        let mut refused = |f: &dyn Fn(&mut Arena)| {
            let call = std::panic::AssertUnwindSafe(|| f(&mut arena));
            let panic = std::panic::catch_unwind(call).unwrap_err();
            let message = panic.downcast_ref::<String>().unwrap();
            assert!(message.contains("belongs to another layout"), "{message}");
        };
        for param in [other, later] {
            refused(&|arena| drop(arena.value(param)));
            refused(&|arena| drop(arena.working_value(param)));
            refused(&|arena| drop(arena.gradient(param)));
            refused(&|arena| arena.value_mut(param).fill(0.0));
        }
        refused(&|arena| drop(arena.stat(other_stat)));
        refused(&|arena| arena.update_stat(other_stat, |_| ()));
    }

    #[test]
    fn an_empty_parameter_has_no_weights() {
        let mut layout = Layout::new();
        layout.param("empty", [3, 0], SlotKind::Matrix, Init::Constant(1.0));
        assert_eq!(layout.weights(), 0);
    }

    #[test]
    #[should_panic(expected = "two slots are named gain")]
    fn slot_names_are_unique() {
        let mut layout = Layout::new();
        layout.param("gain", [1], SlotKind::Gain, Init::Constant(1.0));
        layout.param("gain", [1], SlotKind::Gain, Init::Constant(1.0));
    }
}

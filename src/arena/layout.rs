//! What an arena holds: the slots of a network, and the handles of its layers.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::tensor::Shape;

/// Every slot starts at a multiple of this many elements, so that vectorised kernels can process an arena as one array.
pub const SLOT_ALIGNMENT: usize = 16;

/// What a slot holds. Optimisers use it to choose what to decay, weight files to choose how to transpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotKind {
    /// A convolution's filters `[k, r, s, c]`.
    Filter,
    /// A linear layer's weights `[out, in]`.
    Matrix,
    /// A linear layer's bias `[out]`.
    Bias,
    /// A batch norm's scale `[c]`, gamma.
    Gain,
    /// A batch norm's shift `[c]`, beta.
    Shift,
    /// A batch norm's running mean `[c]`; not a parameter.
    RunningMean,
    /// A batch norm's running variance `[c]`; not a parameter.
    RunningVariance,
}

impl SlotKind {
    /// Whether tensor cores multiply it, from the working copy if the device has one.
    pub(super) fn is_multiplied(self) -> bool {
        matches!(self, SlotKind::Filter | SlotKind::Matrix)
    }

    /// Whether it is a bias or a batch norm parameter, which most recipes exempt from weight decay and LARS.
    pub fn is_bias_or_norm(self) -> bool {
        matches!(self, SlotKind::Bias | SlotKind::Gain | SlotKind::Shift)
    }
}

/// The initial values of a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// This value everywhere.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound)`.
    Uniform(f64),
    /// Normal with mean 0 and this standard deviation, redrawn beyond two standard deviations, which leaves 0.88 of it.
    TruncatedNormal(f64),
}

/// One named piece of an arena.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name in files, torchvision's where torchvision has one.
    pub name: String,
    /// First element in the arena.
    pub offset: usize,
    /// Its shape on a device.
    pub shape: Shape,
    /// What it holds.
    pub kind: SlotKind,
    /// Its initial values.
    pub init: Init,
    /// Innermost size in files, without the device's padding (an RGB stem: 3 of 4).
    pub channels: usize,
}

/// A layer's handle on a parameter. It is valid in arenas of the layout that it was made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    layout: LayoutId,
    index: usize,
    pub(super) offset: usize,
    pub(super) shape: Shape,
    pub(super) kind: SlotKind,
}

impl Param {
    /// The parameter's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }
}

/// A layer's handle on a running statistic. It is valid in arenas of the layout that it was made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    layout: LayoutId,
    index: usize,
    pub(super) offset: usize,
    pub(super) shape: Shape,
}

impl Stat {
    /// The statistic's shape.
    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }
}

/// The identity of a layout, which its clones share. Handles carry it, so that a handle of another layout is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LayoutId(u64);

impl Default for LayoutId {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The slots of a network, in the order in which its layers added them.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    id: LayoutId,
    params: Vec<Slot>,
    stats: Vec<Slot>,
}

impl Layout {
    /// A layout without slots.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter. Use [`Layout::padded_param`] if files hold fewer channels than the device.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn param(
        &mut self,
        name: impl Into<String>,
        shape: impl Into<Shape>,
        kind: SlotKind,
        init: Init,
    ) -> Param {
        let shape = shape.into();
        let channels = shape.last().copied().unwrap_or(1);
        self.padded_param(name, shape, kind, init, channels)
    }

    /// Adds a parameter whose innermost size is padded with zeros from `channels` up.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn padded_param(
        &mut self,
        name: impl Into<String>,
        shape: impl Into<Shape>,
        kind: SlotKind,
        init: Init,
        channels: usize,
    ) -> Param {
        let shape = shape.into();
        let name = self.fresh(name.into());
        let offset = end(&self.params);
        self.params.push(Slot { name, offset, shape, kind, init, channels });
        Param { layout: self.id, index: self.params.len() - 1, offset, shape, kind }
    }

    /// Adds a running statistic of `c` channels that starts at `value`.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn stat(&mut self, name: impl Into<String>, c: usize, kind: SlotKind, value: f64) -> Stat {
        let name = self.fresh(name.into());
        let (offset, shape) = (end(&self.stats), Shape::from([c]));
        let init = Init::Constant(value);
        self.stats.push(Slot { name, offset, shape, kind, init, channels: c });
        Stat { layout: self.id, index: self.stats.len() - 1, offset, shape }
    }

    /// Initialises the parameters of these kinds from a truncated normal with standard deviation `gain / sqrt(fan_in)` before
    /// truncation: TensorFlow's and Haiku's initialisation of filters and matrices.
    pub fn start_truncated(&mut self, kinds: &[SlotKind], gain: f64) {
        for slot in self.params.iter_mut().filter(|slot| kinds.contains(&slot.kind)) {
            let inner = slot.shape.last().copied().unwrap_or(1);
            let inputs = slot.shape.elements() / slot.shape[0] / inner * slot.channels;
            slot.init = Init::TruncatedNormal(gain / (inputs as f64).sqrt());
        }
    }

    /// The parameters, in order.
    pub fn params(&self) -> &[Slot] {
        &self.params
    }

    /// The running statistics, in order.
    pub fn stats(&self) -> &[Slot] {
        &self.stats
    }

    /// Number of weights, without padding.
    pub fn weights(&self) -> usize {
        self.params
            .iter()
            .map(|s| {
                s.shape.elements() / s.shape.last().map_or(1, |&last| last.max(1)) * s.channels
            })
            .sum()
    }

    /// Elements of an arena's values, padding between slots included.
    pub(crate) fn len(&self) -> usize {
        end(&self.params)
    }

    /// Whether the parameters of both layouts have the same offsets and shapes, so that their arenas' values correspond.
    pub(crate) fn has_slots_of(&self, other: &Layout) -> bool {
        let same = |(a, b): (&Slot, &Slot)| (a.offset, a.shape) == (b.offset, b.shape);
        self.params.len() == other.params.len() && self.params.iter().zip(&other.params).all(same)
    }

    /// Panics unless the parameter is one of this layout. A clone of the layout may have got other slots since.
    #[track_caller]
    pub(crate) fn expect_param(&self, param: Param) {
        let slot = self.params.get(param.index).filter(|_| param.layout == self.id);
        let same = |slot: &Slot| (slot.offset, slot.shape) == (param.offset, param.shape);
        assert!(
            slot.is_some_and(same),
            "arena: the parameter {:?} belongs to another layout",
            param.shape
        );
    }

    /// Panics unless the statistic is one of this layout.
    #[track_caller]
    pub(super) fn expect_stat(&self, stat: Stat) {
        let slot = self.stats.get(stat.index).filter(|_| stat.layout == self.id);
        let same = |slot: &Slot| (slot.offset, slot.shape) == (stat.offset, stat.shape);
        assert!(
            slot.is_some_and(same),
            "arena: the statistic {:?} belongs to another layout",
            stat.shape
        );
    }

    fn fresh(&self, name: String) -> String {
        let taken = self.params.iter().chain(&self.stats).any(|s| s.name == name);
        assert!(!taken, "layout: two slots are named {name}: slot names are unique");
        name
    }
}

/// The offset of the next slot.
#[track_caller]
pub(super) fn end(slots: &[Slot]) -> usize {
    let Some(last) = slots.last() else { return 0 };
    let end = last.offset.checked_add(last.shape.elements());
    let end = end.and_then(|end| end.checked_next_multiple_of(SLOT_ALIGNMENT));
    end.expect("layout: the slots have more elements than memory can hold")
}

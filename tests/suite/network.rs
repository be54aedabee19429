//! Networks with seeded weights, and the contents of their arenas by slot name.

use std::collections::BTreeMap;
use std::sync::Arc;

use selfsup::arena::{Arena, Layout, Slot, SlotKind};
use selfsup::device::Device;

use crate::case::write;
pub use crate::seeded::images;
use crate::seeded::{self, pad_channels};

/// An arena whose values and statistics are seeded; `scripts/goldens/backbones.py` has the same.
pub fn seeded_arena(layout: &Arc<Layout>, device: &Device, line: &str) -> Arena {
    let mut arena = Arena::new(layout, device, 0);
    for slot in layout.params() {
        write(arena.values_mut(), slot.offset, &padded(slot, &start(slot, line)));
    }
    for slot in layout.stats() {
        write(arena.statistics_mut(), slot.offset, &start(slot, line));
    }
    arena
}

fn start(slot: &Slot, line: &str) -> Vec<f64> {
    let inner = slot.shape.len() - 1;
    let rest = slot.shape[..inner].iter().product::<usize>();
    let count = rest * slot.channels;
    let (mean, spread) = match slot.kind {
        SlotKind::Filter | SlotKind::Matrix => (0.0, (6.0 / (count / slot.shape[0]) as f64).sqrt()),
        SlotKind::Gain => (1.0, 0.3),
        SlotKind::Bias | SlotKind::Shift => (0.0, 0.2),
        SlotKind::RunningMean => (0.0, 0.1),
        SlotKind::RunningVariance => (1.0, 0.5),
    };
    seeded::around(seeded::seed(&format!("{line}|{}", slot.name)), count, mean, spread)
}

/// The values of a slot padded with zero channels.
fn padded(slot: &Slot, values: &[f64]) -> Vec<f64> {
    pad_channels(values, slot.channels, *slot.shape.last().unwrap())
}

/// Gradients by name, without padding.
pub fn gradients(arena: &Arena) -> BTreeMap<String, Vec<f64>> {
    let all = arena.gradients().to_f64();
    by_name(arena.layout().params(), &all)
}

/// Parameters by name, without padding.
pub fn parameters(arena: &Arena) -> BTreeMap<String, Vec<f64>> {
    by_name(arena.layout().params(), &arena.values().to_f64())
}

/// Running statistics by name.
pub fn statistics(arena: &Arena) -> BTreeMap<String, Vec<f64>> {
    let all = arena.statistics().to_f64();
    by_name(arena.layout().stats(), &all)
}

fn by_name(slots: &[Slot], all: &[f64]) -> BTreeMap<String, Vec<f64>> {
    let values = |slot: &Slot| {
        let pixels =
            all[slot.offset..][..slot.shape.elements()].chunks_exact(*slot.shape.last().unwrap());
        let (kept, padding): (Vec<_>, Vec<_>) =
            pixels.map(|pixel| pixel.split_at(slot.channels)).unzip();
        let name = &slot.name;
        assert!(padding.concat().iter().all(|v| *v == 0.0), "{name}: padding is not zero");
        (name.clone(), kept.concat())
    };
    slots.iter().map(values).collect()
}

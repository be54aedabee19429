//! The momentum encoder's update: `target = m target + (1 - m) online` for every parameter, including batch norm's.
//!
//! Running statistics are not averaged: the target keeps its own, as in facebookresearch/moco (`moco/builder.py` averages
//! parameters only) and BYOL.

use crate::cpu::parallel::Each;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::arena::Arena;
use crate::device::DeviceKind;
use crate::tensor::CHUNK;
use crate::tensor::{Float, Numbers};

/// Moves `target` towards `online`. `momentum`, one number in `0..=1`, is the weight of the old value.
///
/// # Panics
/// If the arenas have different layouts or devices, or the momentum is out of range.
#[track_caller]
pub fn ema(target: &mut Arena, online: &Arena, momentum: &Numbers<f64>) {
    let on_device = momentum.tensor();
    let [momentum] = *momentum.values() else { panic!("ema: the momentum must be one number") };
    assert!((0.0..=1.0).contains(&momentum), "ema: momentum {momentum} is not in 0..=1");
    let (of_target, of_online) = (target.layout(), online.layout());
    assert!(of_target.has_slots_of(of_online), "ema: two different layouts");
    for arena in [&*target, online] {
        let len = arena.values().len();
        assert_eq!(len, arena.layout().len(), "ema: the arena's values were replaced");
    }
    online.values().expect_on(target.device(), "ema");
    on_device.expect_on(target.device(), "ema");
    match online.device().kind() {
        DeviceKind::Cpu => average::<f32>(target, online, momentum),
        DeviceKind::Cuda => super::cuda::ema(target, online, on_device.device_in()),
        DeviceKind::Reference => average::<f64>(target, online, momentum),
    }
    target.refresh();
}

fn average<T: Float>(target: &mut Arena, online: &Arena, momentum: f64) {
    let online = online.values().data::<T>();
    let device = target.device().clone();
    let target = target.values_mut().data_mut::<T>();
    device.run(|| {
        target.par_chunks_mut(CHUNK).zip(online.par_chunks(CHUNK)).each(|(target, online)| {
            blend(target, online, momentum);
        });
    });
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn blend<T: Float>(target: &mut [T], online: &[T], momentum: f64) {
    for (target, online) in target.iter_mut().zip(online) {
        *target = T::narrow(momentum * target.widen() + (1.0 - momentum) * online.widen());
    }
}

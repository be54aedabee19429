//! The precision of a device's activations.

use serde::{Deserialize, Serialize};

use super::{Bf16Path, DeviceKind};
use crate::error::Result;

/// The type in which a device stores activations and the working copies of weights. Sums, statistics, losses, master weights
/// and optimiser state are f32 in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16, on a GPU multiplied by tensor cores: the usual choice for training on one.
    Bf16,
    /// f32 throughout.
    F32,
}

impl Precision {
    /// The precision of a device for which none is asked: bf16 on a GPU, f32 on a CPU. See [`Precision::of_training`] for training.
    pub fn usual(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Cuda => Self::Bf16,
            DeviceKind::Cpu | DeviceKind::Reference => Self::F32,
        }
    }

    /// The precision in which to train on a device for which none is asked: bf16 on a GPU and on a processor whose instructions for
    /// bf16 are faster than f32, where all steps that were measured gain (benches/results/2026-11-30-zen4.md); f32 on other
    /// processors, and where several processes train together (`ranks`), because their processors may differ.
    ///
    /// # Errors
    /// If the variable `SELFSUP_BF16` is wrong.
    pub fn of_training(kind: DeviceKind, ranks: bool) -> Result<Self> {
        Ok(match kind {
            DeviceKind::Cpu if !ranks && Bf16Path::selected()?.instructions().is_some() => {
                Self::Bf16
            }
            _ => Self::usual(kind),
        })
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_processor_with_instructions_trains_alone_in_bf16() {
        let trains = |kind, ranks| Precision::of_training(kind, ranks).unwrap();
        assert_eq!(trains(DeviceKind::Cpu, true), Precision::F32);
        assert_eq!(trains(DeviceKind::Reference, false), Precision::F32);
        assert_eq!(trains(DeviceKind::Cuda, true), Precision::Bf16);
        let pays = Bf16Path::selected().unwrap() != Bf16Path::Portable;
        assert_eq!(trains(DeviceKind::Cpu, false) == Precision::Bf16, pays);
        assert_eq!(Precision::usual(DeviceKind::Cpu), Precision::F32);
    }
}

//! The precision of a device's activations.

use serde::{Deserialize, Serialize};

use super::DeviceKind;

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
    /// The precision of a device for which none is asked: bf16 on a GPU, f32 on a CPU.
    pub(crate) fn usual(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Cuda => Self::Bf16,
            DeviceKind::Cpu | DeviceKind::Reference => Self::F32,
        }
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

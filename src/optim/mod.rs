//! Updates over whole arenas (floor 4): SGD, LARS, the momentum encoder, learning-rate schedules.

mod cuda;
mod ema;
mod optimizer;
mod schedule;

pub use ema::ema;
pub use optimizer::{Care, Exclude, Lars, Optimizer, Rule, Sgd, TrustNorm};
pub use schedule::{Decay, LrRule, Schedule};

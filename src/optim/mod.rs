//! Updates of arenas: SGD, LARS, momentum encoders; and learning-rate schedules.

mod cuda;
mod ema;
mod optimizer;
mod schedule;

pub use ema::ema;
pub use optimizer::{Exclude, Lars, Optimizer, ParamPolicy, Rule, Sgd, TrustNorm};
pub use schedule::{Decay, LrRule, Schedule};

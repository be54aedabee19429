//! Updates of arenas: SGD, LARS, Adam, momentum encoders; and learning-rate schedules.

mod adam;
mod cuda;
mod ema;
mod optimizer;
mod schedule;

pub use adam::Adam;
pub use ema::ema;
pub use optimizer::{Exclude, Lars, Optimizer, ParamPolicy, Rule, Sgd, TrustNorm};
pub use schedule::{Decay, LrRule, Schedule};

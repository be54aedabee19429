//! Training runs (floor 6): the loop, what it writes, and what it does when numbers go wrong.

mod checkpoint;
mod finetune;
mod metrics;
mod run;

pub use checkpoint::{init_weights, load_state, load_weights, newest, save, weights_in};
pub use finetune::{FINETUNES, finetuning};
pub use metrics::Metrics;
pub use run::{EpochReport, Images, Run, StepReport, Watch};

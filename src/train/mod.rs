//! Training runs (floor 6): the loop, what it writes, and what it does when numbers go wrong.

mod checkpoint;
mod metrics;
mod replay;
mod run;
mod step;
mod study;

pub use checkpoint::{init_weights, load_state, load_weights, newest, save, weights_in};
pub use metrics::Metrics;
pub use run::{EpochReport, Images, Run, StepReport, Watch};
pub use step::{Done, Steps, Training};
pub use study::{Arm, Outcome, Plan, Study};

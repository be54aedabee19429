//! Training runs: the loop, its files, how a run resumes after a stop, and how it reacts when numbers go wrong.

mod changes;
mod checkpoint;
mod diagnosis;
mod epoch;
mod evaluation;
mod exchanges;
mod finetune;
mod folder;
mod health;
mod images;
mod inspect;
mod metrics;
mod onnx;
mod parity_dump;
mod plan;
mod ranks;
mod reading;
mod report;
mod resume;
mod run;
mod skipped;
mod step;
mod study;
mod teacher;
mod tensorboard;
mod trace;
mod traffic;
mod trained;
mod tune;

pub use checkpoint::{
    export_backbone, fitted, foreign_prefix, init_weights, load_state, load_weights, newest, save,
};
pub use diagnosis::{Finding, History, Kind, diagnose};
pub use exchanges::{Cluster, Exchange, exchanges};
pub use finetune::{FINETUNES, finetuning};
pub(crate) use folder::check_free;
pub use images::{GIVEN, Images};
pub use inspect::{
    BESIDE_TENSORS, Measured, Need, Scaling, Waiting, fewest, measure, measure_on, memory,
    memory_within, scaling, seconds_per_image,
};
pub use metrics::Metrics;
pub use onnx::export_onnx;
pub use plan::{Pace, Plan, Wishes, check_outside, is_own_folder, plan};
pub(crate) use reading::pack_reading;
pub use reading::{only_reading, own_reading};
pub use report::{REPORT, diagnosis, report, write_report};
pub(crate) use resume::check_trained_on;
pub use resume::{Paused, recipe_in, recipe_of};
pub use run::{EpochReport, Run, StepReport, Watch};
pub use step::{StepResult, Steps, Training};
pub use study::{Arm, Outcome, Study, StudyPlan};
pub use traffic::{StepTraffic, traffic, traffic_on};
pub use trained::Trained;
pub use tune::{Advice, FACTORS, Tried, advise, tune};

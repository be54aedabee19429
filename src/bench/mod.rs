//! Benchmarks: how fast the kernels are, and how close to what the hardware allows.
//!
//! A [`Case`] is one operation at one size, with its [`Work`]: the operations that its definition asks for and the bytes that
//! must move at least. Its *roofline* is the longer of the two times at the machine's ceilings ([`Chip`]); a measured time is
//! judged by its share of the roofline. [`cases`] lists every layer of ResNet-50 in its three directions and the other
//! primitives; [`plan`] predicts what a GPU will do with a case, without a GPU; [`Bench`] measures a case, or a kernel of your
//! own, the same way (`examples/custom_op.rs`). [`Peers`] runs the same operation in a reference library, in turns, and compares
//! the errors of both against f64.

mod case;
mod cases;
mod chip;
mod compare;
mod measure;
mod plan;
mod problem;
mod work;

pub use case::{Case, Extent, Launched};
pub use cases::cases;
pub use chip::{Chip, Unit};
pub use compare::{Beside, Comparison, Distance, Peers};
pub(crate) use measure::name_of;
pub use measure::{Bench, Ceilings, Quantiles, Timing, ceilings};
pub use plan::{LaunchPlan, plan};
pub use problem::Problem;
pub use work::Work;

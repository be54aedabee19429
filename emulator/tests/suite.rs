//! Tests of the stand-in driver, in one binary. They share the driver's state, so `stage` runs one at a time.

#[path = "suite/numbers.rs"]
mod numbers;
#[path = "suite/stage.rs"]
mod stage;

#[path = "suite/assignments.rs"]
mod assignments;
#[path = "suite/conformance.rs"]
mod conformance;
#[path = "suite/contrastive.rs"]
mod contrastive;
#[path = "suite/conv2d.rs"]
mod conv2d;
#[path = "suite/kernels.rs"]
mod kernels;
#[path = "suite/losses.rs"]
mod losses;
#[path = "suite/matmul.rs"]
mod matmul;
#[path = "suite/misuse.rs"]
mod misuse;
#[path = "suite/nccl.rs"]
mod nccl;
#[path = "suite/optimizers.rs"]
mod optimizers;
#[path = "suite/planted_bugs.rs"]
mod planted_bugs;
#[path = "suite/pool.rs"]
mod pool;
#[path = "suite/rows.rs"]
mod rows;
#[path = "suite/selective.rs"]
mod selective;
#[path = "suite/speed.rs"]
mod speed;
#[path = "suite/streams.rs"]
mod streams;

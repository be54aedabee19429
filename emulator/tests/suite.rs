//! Tests of the stand-in driver, in one program. They share the driver's state, so `stage` lets one run at a time.

#[path = "suite/numbers.rs"]
mod numbers;
#[path = "suite/stage.rs"]
mod stage;

#[path = "suite/kernels.rs"]
mod kernels;

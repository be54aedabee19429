//! Tests of the stand-in driver, in one program. They share the driver's state, so `stage` lets one run at a time.

#[path = "suite/numbers.rs"]
mod numbers;
#[path = "suite/stage.rs"]
mod stage;

#[path = "suite/breakages.rs"]
mod breakages;
#[path = "suite/conformance.rs"]
mod conformance;
#[path = "suite/kernels.rs"]
mod kernels;
#[path = "suite/speed.rs"]
mod speed;
#[path = "suite/streams.rs"]
mod streams;

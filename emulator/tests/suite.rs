//! Tests of the stand-in driver, in one program. They share the driver's state, so `stage` lets one run at a time.

#[path = "suite/numbers.rs"]
mod numbers;
#[path = "suite/stage.rs"]
mod stage;

#[path = "suite/arenas.rs"]
mod arenas;
#[path = "suite/assignments.rs"]
mod assignments;
#[path = "suite/breakages.rs"]
mod breakages;
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
#[path = "suite/moves.rs"]
mod moves;
#[path = "suite/pool.rs"]
mod pool;
#[path = "suite/products.rs"]
mod products;
#[path = "suite/selective.rs"]
mod selective;
#[path = "suite/speed.rs"]
mod speed;
#[path = "suite/streams.rs"]
mod streams;

//! The tests of the library in one binary: each module tests one subject, and test names are sentences.
//! Paths are relative to the working directory: the repository, or a bundle (`scripts/gpu-bundle`).

// The cases are the library's: `selfsup check` runs them too.
use selfsup::check::{case, cases, seeded};

#[path = "suite/accumulation.rs"]
mod accumulation;
#[path = "suite/audit.rs"]
mod audit;
#[path = "suite/augmentation.rs"]
mod augmentation;
#[path = "suite/benches.rs"]
mod benches;
#[path = "suite/capture_memory.rs"]
mod capture_memory;
#[path = "suite/channel_views.rs"]
mod channel_views;
#[path = "suite/channels.rs"]
mod channels;
#[path = "suite/check.rs"]
mod check;
#[path = "suite/chips.rs"]
mod chips;
#[path = "suite/collapse.rs"]
mod collapse;
#[path = "suite/compare.rs"]
mod compare;
#[path = "suite/complete.rs"]
mod complete;
#[path = "suite/contexts.rs"]
mod contexts;
#[path = "suite/conv_batch_norm.rs"]
mod conv_batch_norm;
#[path = "suite/crops.rs"]
mod crops;
#[path = "suite/cuda.rs"]
mod cuda;
#[path = "suite/docs.rs"]
mod docs;
#[path = "suite/driver.rs"]
mod driver;
#[path = "suite/examples.rs"]
mod examples;
#[path = "suite/exchanges.rs"]
mod exchanges;
#[path = "suite/fault_injection.rs"]
mod fault_injection;
#[cfg(target_os = "linux")]
#[path = "suite/faults.rs"]
mod faults;
#[cfg(unix)]
#[path = "suite/folders.rs"]
mod folders;
#[path = "suite/foreign.rs"]
mod foreign;
#[path = "suite/golden.rs"]
mod golden;
#[path = "suite/graph_replay.rs"]
mod graph_replay;
#[path = "suite/interchange.rs"]
mod interchange;
#[path = "suite/jpeg.rs"]
mod jpeg;
#[path = "suite/judge.rs"]
mod judge;
#[path = "suite/kernel_fuzz.rs"]
mod kernel_fuzz;
#[path = "suite/labels.rs"]
mod labels;
#[path = "suite/layers.rs"]
mod layers;
#[path = "suite/memory.rs"]
mod memory;
#[path = "suite/methods.rs"]
mod methods;
#[path = "suite/micro_batches.rs"]
mod micro_batches;
#[path = "suite/mistakes.rs"]
mod mistakes;
#[path = "suite/neighbours.rs"]
mod neighbours;
#[path = "suite/network.rs"]
mod network;
#[path = "suite/networks.rs"]
mod networks;
#[path = "suite/optimizers.rs"]
mod optimizers;
#[path = "suite/packs.rs"]
mod packs;
#[path = "suite/parser_fuzz.rs"]
mod parser_fuzz;
#[path = "suite/program.rs"]
mod program;
#[path = "suite/published.rs"]
mod published;
#[path = "suite/random_shapes.rs"]
mod random_shapes;
#[path = "suite/rank_failures.rs"]
mod rank_failures;
#[path = "suite/ranks.rs"]
mod ranks;
#[path = "suite/ranks_on_gpus.rs"]
mod ranks_on_gpus;
#[path = "suite/recipes.rs"]
mod recipes;
#[path = "suite/recompute.rs"]
mod recompute;
#[path = "suite/reference.rs"]
mod reference;
#[path = "suite/results.rs"]
mod results;
#[path = "suite/resume.rs"]
mod resume;
#[path = "suite/run_outputs.rs"]
mod run_outputs;
#[path = "suite/samplers.rs"]
mod samplers;
#[path = "suite/scaling.rs"]
mod scaling;
#[path = "suite/shape_fuzz.rs"]
mod shape_fuzz;
#[path = "suite/shipped_bugs.rs"]
mod shipped_bugs;
#[path = "suite/step_views.rs"]
mod step_views;
#[path = "suite/steps.rs"]
mod steps;
#[path = "suite/stepwise_f32.rs"]
mod stepwise_f32;
#[path = "suite/streaming.rs"]
mod streaming;
#[path = "suite/studies.rs"]
mod studies;
#[path = "suite/surface.rs"]
mod surface;
#[path = "suite/tiles.rs"]
mod tiles;
#[path = "suite/torchrun.rs"]
mod torchrun;
#[path = "suite/traffic.rs"]
mod traffic;

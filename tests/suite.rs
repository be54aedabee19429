//! The project's tests of the library, one binary: each module tests one thing and names its facts as sentences.
//! It finds its files in the folder that it is started in: the repository, or a bundle (`scripts/gpu-bundle`).

#[path = "suite/accumulation.rs"]
mod accumulation;
#[path = "suite/audit.rs"]
mod audit;
#[path = "suite/augmentation.rs"]
mod augmentation;
#[path = "suite/benches.rs"]
mod benches;
#[path = "suite/captured.rs"]
mod captured;
#[path = "suite/case.rs"]
mod case;
#[path = "suite/cases.rs"]
mod cases;
#[path = "suite/collapse.rs"]
mod collapse;
#[path = "suite/compare.rs"]
mod compare;
#[path = "suite/crops.rs"]
mod crops;
#[path = "suite/cuda.rs"]
mod cuda;
#[path = "suite/driver.rs"]
mod driver;
#[path = "suite/examples.rs"]
mod examples;
#[path = "suite/floors.rs"]
mod floors;
#[path = "suite/forced.rs"]
mod forced;
#[path = "suite/fused.rs"]
mod fused;
#[path = "suite/golden.rs"]
mod golden;
#[path = "suite/interchange.rs"]
mod interchange;
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
#[path = "suite/outside.rs"]
mod outside;
#[path = "suite/packs.rs"]
mod packs;
#[path = "suite/program.rs"]
mod program;
#[path = "suite/provoked.rs"]
mod provoked;
#[path = "suite/random_shapes.rs"]
mod random_shapes;
#[path = "suite/recipes.rs"]
mod recipes;
#[path = "suite/resume.rs"]
mod resume;
#[path = "suite/seeded.rs"]
mod seeded;
#[path = "suite/shipped_bugs.rs"]
mod shipped_bugs;
#[path = "suite/signatures.rs"]
mod signatures;
#[path = "suite/steps.rs"]
mod steps;
#[path = "suite/studies.rs"]
mod studies;
#[path = "suite/surface.rs"]
mod surface;
#[path = "suite/truth.rs"]
mod truth;
#[path = "suite/watched.rs"]
mod watched;

//! selfsup: a compute engine for self-supervised vision.
//!
//! Primitives (convolution, batch norm, contrastive losses, optimiser updates) under a small autograd tape, and methods as
//! short compositions of them. This page is the architecture; the README shows how to run the program.
//!
//! # Layers
//!
//! The modules form a total order: each imports only modules below it. `tests/suite/layers.rs` enforces the order.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | the `selfsup` program |
//! | [`check`] | the self-test of a device: `selfsup check` |
//! | [`mod@bench`] | the speed of the primitives, compared with their rooflines |
//! | [`train`] | the training loop, checkpoints, resuming, metrics, reports, studies |
//! | [`eval`] | kNN, linear probes, fine-tuning protocols, the collapse monitor |
//! | `weights` | weight files: safetensors with torchvision's names and layout |
//! | [`recipes`] | all settings of a run, as one TOML file |
//! | [`methods`] | the methods, one file each |
//! | [`data`] | sources, augmentation, loading |
//! | [`optim`] | SGD, LARS, momentum encoders, learning-rate schedules |
//! | [`nn`] | layers, ResNets, heads |
//! | [`ops`] | the primitives: maths, shape rule, gradient, CPU path, CUDA launch, f64 reference |
//! | [`tape`] | autograd |
//! | [`arena`] | all weights of a network in one allocation |
//! | [`tensor`] | shape, dtype, memory |
//! | `cpu` | kernels for the CPU over slices, in f32 and bf16: the twin of `kernels/` |
//! | [`device`] | where memory lives and operations run: memory pool, threads, GPUs, Philox, the group of processes |
//! | `settings` | TOML tables with `--set` overrides, and errors that suggest the nearest key |
//! | `files` | files written completely or not at all |
//! | [`error`] | errors of the run time |
//!
//! # How the parts work together
//!
//! **A network is a description; its weights live in an arena.** Layers hold [`Param`](arena::Param) handles into a
//! [`Layout`](arena::Layout). An [`Arena`](arena::Arena) provides values, gradients and running statistics for a layout, each
//! as one contiguous tensor, so optimisers, momentum encoders ([`optim::ema`]) and checkpoints process one array. A momentum
//! encoder is a second arena with the same layout.
//!
//! **A tape lives inside a step.** [`tape::step`] makes a tape over an arena, calls a closure that builds the loss, runs the
//! backward pass into the arena's gradients and drops the graph. Values borrow the tape, so a graph cannot outlive the weights
//! that it was built from. [`tape::cached_step`] computes the same gradients over micro-batches for losses that couple all
//! rows ([GradCache](https://arxiv.org/abs/2101.06983)).
//!
//! **A primitive is one folder** of [`ops`]: maths, shape checks, gradient, CPU implementation, CUDA launch and a naive f64
//! reference. The interface that primitives use is public, so a program can record operations of its own
//! (`examples/custom_op.rs`).
//!
//! **A GPU is a device.** [`Device::cuda`](device::Device::cuda) runs the kernels in `kernels/`. The build (`cuda-kernels-build`)
//! compiles and embeds them and generates a typed launch function for each; an operation's `cuda.rs` calls these functions.
//! Operations are queued and return no errors; [`Device::check`](device::Device::check), which every step calls, reports the first
//! failure. A training step is captured once as a CUDA graph and replayed as one call ([`train::Steps`]). Numbers that change from
//! step to step are [`Numbers`](tensor::Numbers), which kernels read from memory.
//!
//! **bf16 follows one rule on every device** ([`Precision`](device::Precision)): activations, their gradients and working copies
//! of filters and matrices are bf16; weights and their gradients, sums, statistics, losses and optimiser state are f32. A GPU
//! computes so if it is not told otherwise, a CPU if it is asked to
//! ([`Device::with_precision`](device::Device::with_precision)).
//!
//! **Ground truth is a device.** [`Device::reference`](device::Device::reference) runs the same tape naively in f64. Tests
//! compare every primitive, complete networks and complete training steps with it, and compare it with PyTorch in f64.
//!
//! **The same seed gives the same run**, bit for bit on one machine, with any number of threads: work is partitioned by shape,
//! sums have a fixed order, and random numbers are counter-based ([Philox](device::Philox), keyed by seed, epoch and sample).
//!
//! **A method is one file** that follows its paper: [`methods::moco`] ([v1](https://arxiv.org/abs/1911.05722),
//! [v2](https://arxiv.org/abs/2003.04297)), [`methods::simclr`] ([paper](https://arxiv.org/abs/2002.05709)),
//! [`methods::simclr_v2`] ([paper](https://arxiv.org/abs/2006.10029)), [`methods::swav`]
//! ([paper](https://arxiv.org/abs/2006.09882)), [`methods::byol`] ([paper](https://arxiv.org/abs/2006.07733)) and
//! [`methods::simsiam`] ([paper](https://arxiv.org/abs/2011.10566)), plus [`methods::supervised`] and [`methods::distill`]. The
//! [`Method`](methods::Method) trait is the interface of a method. The variants that the papers compare are settings, and a
//! [`Study`](train::Study) is a file of such comparisons.
//!
//! # Panics and errors
//!
//! API misuse panics, with the operation's name and the shapes: shapes that do not match, a temperature of zero, a tensor of
//! another device, a write to a tensor that is shared. Runtime failures return an [`Error`]: files, recipes, devices, diverging
//! runs. Only [`cli`] prints and exits.

pub mod arena;
pub mod bench;
pub mod check;
pub mod cli;
mod cpu;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
mod files;
pub mod methods;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod recipes;
mod settings;
pub mod tape;
pub mod tensor;
pub mod train;
mod weights;

pub use error::{Error, Result};

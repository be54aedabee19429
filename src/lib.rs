//! selfsup: a compute engine for self-supervised vision.
//!
//! Primitives (convolution, batch norm, contrastive losses, optimiser updates) under a small autograd tape, and methods as
//! thin graphs over them. This page is the architecture; the README shows how to run it.
//!
//! # Layers
//!
//! Modules form a chain: each imports only modules below it, and a test fails if one does not.
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | the `selfsup` program |
//! | [`mod@bench`] | how fast the primitives are, next to their rooflines |
//! | [`train`] | the training loop, checkpoints, resuming, metrics, reports, studies |
//! | [`eval`] | kNN, linear probes, fine-tuning protocols, the collapse monitor |
//! | `weights` | weight files: safetensors with torchvision's names and layout |
//! | [`recipes`] | everything that decides a run, as one TOML file |
//! | [`methods`] | each method one file |
//! | [`data`] | sources, augmentation, loading |
//! | [`optim`] | SGD, LARS, momentum encoders, learning-rate schedules |
//! | [`nn`] | layers, ResNets, heads |
//! | [`ops`] | the primitives: maths, shape rule, gradient, CPU path, CUDA launch, f64 reference |
//! | [`tape`] | autograd |
//! | [`arena`] | all weights of a network in one allocation |
//! | [`tensor`] | shape, dtype, memory |
//! | `cpu` | f32 kernels for the CPU over slices, the twin of `kernels/` |
//! | [`device`] | where memory lives and operations run: pool, threads, GPUs, Philox, the seam between processes |
//! | `settings` | TOML tables with `--set` overrides, and errors that suggest the nearest key |
//! | `files` | files that are written completely or not at all |
//! | [`error`] | what can fail at run time |
//!
//! # How the parts meet
//!
//! **A network is a description; its weights are an arena.** Layers hold [`Param`](arena::Param) handles into a
//! [`Layout`](arena::Layout); an [`Arena`](arena::Arena) gives the layout values, gradients and running statistics, each one
//! contiguous tensor. An optimiser, a momentum encoder ([`optim::ema`]), a checkpoint see one array. A momentum encoder is a
//! second arena run through the same description.
//!
//! **A tape lives inside a step.** [`tape::step`] makes a tape over an arena, lets a closure build the loss, runs backward into
//! the arena's gradients and drops the graph. Values borrow the tape, so a graph cannot outlive the weights it was made from.
//! [`tape::cached_step`] does the same over micro-batches, exactly, for losses that couple all rows
//! ([GradCache](https://arxiv.org/abs/2101.06983)).
//!
//! **A primitive is one folder** of [`ops`]: maths, shape rule, gradient, CPU path and naive f64 reference. It is public, and
//! so is what it is made of: a program can record an operation of its own (`examples/custom_op.rs`).
//!
//! **A GPU is a device.** [`Device::cuda`](device::Device::cuda) queues the kernels of `kernels/`, compiled and embedded by
//! `build.rs`, which also writes a typed launch function for each; an operation's `cuda.rs` has its launch lines. Activations and
//! working copies of weights are bf16 (or f32, as [asked](device::Precision)), sums, statistics and weights are f32. Operations
//! are queued and do not fail; [`Device::check`](device::Device::check), which every step asks, says what did. A training step
//! is recorded once and replayed as one call ([`train::Steps`]); what changes from step to step are
//! [`Numbers`](tensor::Numbers) that kernels read from memory.
//!
//! **Truth is a device.** [`Device::reference`](device::Device::reference) runs the same tape naively in f64; tests hold every
//! primitive, whole networks and whole training steps against it, and it against PyTorch's f64.
//!
//! **The same seed gives the same run**, to the last bit on one machine, whatever the number of threads: work is cut by shape,
//! sums have one order, random numbers are counter-based ([Philox](device::Philox), keyed by seed, epoch and sample).
//!
//! **A method is one file** that reads like its paper: [`methods::moco`] ([v1](https://arxiv.org/abs/1911.05722),
//! [v2](https://arxiv.org/abs/2003.04297)), [`methods::simclr`] ([paper](https://arxiv.org/abs/2002.05709)),
//! [`methods::simclr_v2`] ([paper](https://arxiv.org/abs/2006.10029)), [`methods::swav`]
//! ([paper](https://arxiv.org/abs/2006.09882)), [`methods::byol`] ([paper](https://arxiv.org/abs/2006.07733)),
//! [`methods::simsiam`] ([paper](https://arxiv.org/abs/2011.10566)); [`methods::supervised`] and [`methods::distill`] beside
//! them. What each needs from the outside is the [`Method`](methods::Method) trait. What the papers compare are settings of theirs,
//! and a [`Study`](train::Study) is a file of such comparisons.
//!
//! # Panics and errors
//!
//! A caller's bug panics, with the operation's name and the shapes: shapes that do not fit, a temperature of zero, a tensor
//! written while shared. What a correct program can meet is an [`Error`]: files, recipes, devices, diverging runs. Below
//! [`cli`] nothing prints and nothing exits.

pub mod arena;
pub mod bench;
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

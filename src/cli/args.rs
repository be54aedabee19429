//! What can be typed.

use std::path::PathBuf;

use clap::{Args as Arguments, Parser, Subcommand};

use super::device::Name;
use super::study::StudyArgs;

/// Self-supervised vision: train, look, evaluate.
#[derive(Debug, Parser)]
#[command(name = "selfsup", version, about, long_about = None, arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Train SimCLR on images that come with the program, and show what it learnt
    ///
    /// Takes minutes on two cores and needs nothing else: no files, no network, no GPU.
    Demo(Demo),
    /// Train by a recipe
    #[command(after_help = "Examples:
  selfsup train simclr-cifar10-small --set data.path=data/cifar10 --out runs/first
  selfsup train my-recipe.toml --set train.epochs=20 --set optim.lr=0.1")]
    Train(Train),
    /// Evaluate what a run has learnt
    Eval {
        #[command(subcommand)]
        what: Eval,
    },
    /// List the recipes that come with the program, or print one
    Recipes {
        /// Print this one
        name: Option<String>,
    },
    /// Ask a question: run a small grid of recipes and print a table
    ///
    /// Runs on the images that come with the program unless data.path is set.
    #[command(after_help = "Examples:
  selfsup study                                   # the questions
  selfsup study simclr-head --set data.path=data/cifar10 --seeds 3")]
    Study(StudyArgs),
    /// Say what this machine has to compute with
    Devices,
}

#[derive(Debug, Arguments)]
pub(super) struct Demo {
    /// Override a setting of the demo's recipe (see `selfsup recipes demo`)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Also write recipe, metrics and checkpoints into this folder
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N; a GPU if there is one, else the CPU, if not given
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Arguments)]
pub(super) struct Train {
    /// A recipe file, or the name of a recipe that comes with the program
    pub(super) recipe: String,
    /// Override a setting, such as train.epochs=20; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// The run's folder; runs/RECIPE if not given
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Where to compute: cpu, cuda or cuda:N; a GPU if there is one, else the CPU, if not given
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Eval {
    /// Weighted k-nearest-neighbour accuracy on held-out images
    ///
    /// Beside the same trunk at random initialisation and the raw pixels.
    Knn(EvalKnn),
}

#[derive(Debug, Arguments)]
pub(super) struct EvalKnn {
    /// The run's folder
    pub(super) run: PathBuf,
    /// Neighbours that vote
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) k: u32,
    /// Temperature of the votes
    #[arg(long, default_value_t = 0.1)]
    pub(super) temperature: f64,
    /// Override a setting of the run's recipe, such as data.path
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Where to compute: cpu, cuda or cuda:N; a GPU if there is one, else the CPU, if not given
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

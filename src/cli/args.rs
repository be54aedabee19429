//! What can be typed.

use std::path::PathBuf;

use clap::{Args as Arguments, Parser, Subcommand};

use super::device::Name;
use crate::{eval, train};

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
    /// Beside the same trunk at random initialisation and the raw pixels. Several values of -k and --temperature make a
    /// grid, for which neighbours are looked for once.
    #[command(after_help = "Examples:
  selfsup eval knn runs/first
  selfsup eval knn runs/first --k 10,20,100,200 --temperature 0.07,0.1")]
    Knn(EvalKnn),
    /// Accuracy of a linear classifier on the frozen trunk, by a published protocol
    ///
    /// Beside the same trunk at random initialisation.
    #[command(after_help = "Examples:
  selfsup eval linear runs/first --sweep
  selfsup eval linear runs/first --protocol moco --labels 10%")]
    Linear(EvalLinear),
    /// Accuracy after fine-tuning the whole network on labels
    ///
    /// Beside the same network trained on the same labels from random initialisation.
    #[command(after_help = "Examples:
  selfsup eval finetune runs/first --labels 10%
  selfsup eval finetune runs/first --labels 1percent.txt --protocol simclr-v2 --head-layers 1")]
    Finetune(EvalFinetune),
}

/// What every evaluation takes.
#[derive(Debug, Arguments)]
pub(super) struct Evaluated {
    /// The run's folder
    pub(super) run: PathBuf,
    /// Override a setting of the run's recipe, such as data.path
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Where to compute: cpu, cuda or cuda:N; a GPU if there is one, else the CPU, if not given
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Arguments)]
pub(super) struct EvalKnn {
    #[command(flatten)]
    pub(super) of: Evaluated,
    /// Neighbours that vote
    #[arg(long, value_delimiter = ',', default_value = "200", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) k: Vec<u32>,
    /// Temperature of the votes
    #[arg(long, value_delimiter = ',', default_value = "0.1")]
    pub(super) temperature: Vec<f64>,
}

#[derive(Debug, Arguments)]
pub(super) struct EvalLinear {
    #[command(flatten)]
    pub(super) of: Evaluated,
    /// How the classifier is trained: cached (quick, on standardised features of uncropped images), or as the code of moco,
    /// simclr, swav, byol, simsiam or lightly does it
    #[arg(long, value_name = "NAME", default_value = eval::PROTOCOLS[0])]
    pub(super) protocol: String,
    /// Choose the learning rate among 0.03 to 100 on a tenth of the training images
    #[arg(long)]
    pub(super) sweep: bool,
    /// Learn from these training images only: 10% of each class, or a file that names them
    #[arg(long, value_name = "SHARE|FILE")]
    pub(super) labels: Option<String>,
    /// Epochs, instead of the protocol's
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) epochs: Option<u32>,
}

#[derive(Debug, Arguments)]
pub(super) struct EvalFinetune {
    #[command(flatten)]
    pub(super) of: Evaluated,
    /// Settings to start from: lightly (SGD, 30 epochs) or simclr-v2 (LARS, 60 epochs); --set goes on top
    #[arg(long, value_name = "NAME", default_value = train::FINETUNES[0])]
    pub(super) protocol: String,
    /// Learn from these training images only: 10% of each class, or a file that names them
    #[arg(long, value_name = "SHARE|FILE")]
    pub(super) labels: Option<String>,
    /// Layers of a SimCLR v2 head that stay between trunk and classifier
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) head_layers: usize,
    /// Write the fine-tuned run into this folder
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
}

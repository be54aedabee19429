//! The command line's arguments and help texts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Arguments, Parser, Subcommand};

use super::bench::BenchArgs;
use super::device::Name;
use super::exchanges::{machines, rate, speed};
use super::judge::JudgeArgs;
use super::own::budget;
use super::pack::PackArgs;
use super::skipped::share;
use super::stats::Stats;
use super::study::StudyArgs;
use super::tune::TuneLr;
use crate::data::Split;
use crate::recipes::MAX_SKIPPED;
use crate::settings::bytes;
use crate::{eval, train};

/// Self-supervised vision: train, inspect, evaluate.
#[derive(Debug, Parser)]
#[command(name = "selfsup", version, about, long_about = None, arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Train SimCLR on built-in images, and show what it has learnt
    ///
    /// Takes minutes on two cores; needs no files, no network and no GPU.
    Demo(Demo),
    /// Train on a folder of images, or with a recipe
    ///
    /// Of a folder it looks at the images, measures a few steps, chooses the settings, prints them with their reasons, and trains.
    /// The run's folder then holds the resolved recipe, to keep and to change.
    #[command(after_help = "Examples:
  selfsup train photos                            # images, with or without class folders
  selfsup train photos --plan                     # only the plan: settings, time, memory, disk
  selfsup train photos --budget 2h --method byol
  selfsup train simclr-cifar10-small --set data.path=data/cifar10 --out runs/first
  selfsup train my-recipe.toml --set train.epochs=20 --set optim.lr=0.1
  selfsup train --resume runs/first

Ctrl-C or SIGTERM writes a checkpoint and ends the program (exit code 1); --resume continues from there, to the same bits. A
second Ctrl-C ends it at once.")]
    Train(Train),
    /// Evaluate what a run has learnt
    #[command(after_help = "Examples:
  selfsup eval knn runs/first
  selfsup eval knn runs/first/best.safetensors --k 20 --json")]
    Eval {
        #[command(subcommand)]
        what: Eval,
    },
    /// Write a run's backbone for PyTorch: safetensors with torchvision's names and layout; or as an ONNX model
    #[command(after_help = "Examples:
  selfsup export runs/first
  selfsup export runs/first --onnx
  selfsup export runs/first/best.safetensors --out resnet18.safetensors

In PyTorch:
  model = torchvision.models.resnet18()
  model.fc = torch.nn.Identity()
  model.load_state_dict(safetensors.torch.load_file('resnet18.safetensors'))")]
    Export(Export),
    /// Write the features of a folder of images, computed by a run or by weights from torchvision or timm
    #[command(after_help = "Examples:
  selfsup embed runs/first photos --out features.npy
  selfsup embed runs/first data/cifar10 --split test --out features.safetensors
  selfsup embed --weights resnet50.safetensors --arch resnet50 photos --out features.npy

A .npy file comes with a table of file, label and class (.tsv) in the order of its rows; a .safetensors file holds `features`
and `labels`, and names and classes as JSON lists in its header.")]
    Embed(Embed),
    /// Pack a folder of many images into a few large files, which are faster to list and read
    ///
    /// Packs the splits train, test and val if the folder has them, else the folder as one split. Train with data.path=DIR instead
    /// of data.path=FOLDER. Without --size files are copied unchanged, or decoded with --raw, and training gives the same bits
    /// if no image is broken. Broken images are left out and listed.
    #[command(after_help = "Examples:
  selfsup pack photos --out photos-packed
  selfsup pack data/imagenet --size 256 --out data/imagenet-256
  selfsup pack photos --raw --out photos-raw
  selfsup train simclr-imagenet --set data.path=data/imagenet-256")]
    Pack(PackArgs),
    /// Show a recipe or a run in detail: settings, parameters, the graph of a step, memory
    #[command(after_help = "Examples:
  selfsup inspect simclr-cifar10 --set train.batch=1024
  selfsup inspect moco-v2-imagenet --memory
  selfsup inspect simclr-imagenet --memory --gpu-memory 141GB
  selfsup inspect runs/first --graph --json")]
    Inspect(Inspect),
    /// List the built-in recipes, or print one with its source, its deviations and what it takes
    Recipes {
        /// The recipe to print
        name: Option<String>,
    },
    /// Write a page with curves, pictures, final figures and settings of one run, or of several runs for comparison
    ///
    /// A run writes its own report.html after every epoch and when it stops, with new pictures each time kNN is measured.
    #[command(after_help = "Examples:
  selfsup report runs/first
  selfsup report runs/first runs/second --out compared.html")]
    Report {
        /// Folders of runs, which may still be running
        #[arg(required = true, value_name = "DIR")]
        runs: Vec<PathBuf>,
        /// The page [default: report.html, in the run's folder if there is one run]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Say in sentences how runs went: collapsed, a learning rate too high, views that are too easy or too hard to match
    ///
    /// Reads the runs' logs alone, so it also says again what a finished run showed. The report begins with the same sentences.
    #[command(after_help = "Examples:
  selfsup diagnose runs/first
  selfsup diagnose runs/* --json")]
    Diagnose {
        /// Folders of runs, which may still be running
        #[arg(required = true, value_name = "DIR")]
        runs: Vec<PathBuf>,
        /// Print one JSON list
        #[arg(long)]
        json: bool,
    },
    /// Measure mean and standard deviation of each channel of a set, and write them into a recipe file
    ///
    /// The file keeps its comments; `train FOLDER` does this for its own recipe.
    #[command(after_help = "Examples:
  selfsup stats photos
  selfsup stats photos --write my-recipe.toml")]
    Stats(Stats),
    /// Answer a question by experiment: run a small grid of recipes and print a table
    ///
    /// Uses the built-in images unless data.path is set.
    #[command(after_help = "Examples:
  selfsup study                                   # the questions
  selfsup study simclr-head --set data.path=data/cifar10 --seeds 3")]
    Study(StudyArgs),
    /// Find a learning rate: short runs at seven rates, judged by their features
    ///
    /// Rates are compared by kNN accuracy where there are held-out labels, else by LiDAR, among those whose embeddings stay spread;
    /// never by the loss, which also falls while embeddings collapse.
    #[command(
        after_help = "Examples:
  selfsup tune-lr simclr-cifar10-small --set data.path=data/cifar10
  selfsup tune-lr runs/photos/recipe.toml --steps 400",
        name = "tune-lr"
    )]
    TuneLr(TuneLr),
    /// Measure the primitives against their roofline, or print rooflines and plans
    ///
    /// Each case is a layer of ResNet-50 or another primitive at one size; times are medians. The roofline's bandwidth and
    /// arithmetic peaks are measured first, in the same run.
    #[command(after_help = "Examples:
  selfsup bench                                   # everything; minutes
  selfsup bench conv2d forward --device cpu --threads 1
  selfsup bench sinkhorn --json
  selfsup bench conv2d 3x3 --against onednn       # beside a reference library; scripts/fetch-peers gets two
  selfsup bench --json > before.json; selfsup bench --against before.json --fail-below 0.95
  selfsup bench --paper --chip A100               # no GPU is needed")]
    Bench(BenchArgs),
    /// Judge a CUDA kernel without a GPU: is it right, is it safe, what could its speed be
    ///
    /// Compiles the kernel with g++ and runs it on the CPU at many sizes and in many orders, with every access checked. A TOML file
    /// describes its launch, its arguments and what it should compute. Exit code 0 if it is right and safe.
    #[command(after_help = "Examples:
  selfsup judge --example                         # a kernel and its case, to start from
  selfsup judge kernel.cu --case case.toml
  selfsup judge kernel.cu --mutate                # would the case notice mistakes?")]
    Judge(JudgeArgs),
    /// Prove a device: does it compute what it should, and how fast does it copy and multiply
    ///
    /// Runs every instruction that kernels rely on, every primitive at ordinary and odd sizes in both precisions against f64,
    /// captured steps against launched ones, and each of ten steps of training against the processor's. Run it first on a GPU that
    /// nobody tried, and paste what it prints into a bug report. Exit code 0 if everything is right. Training runs the short form by
    /// itself on the first use of a GPU model (SELFSUP_CHECK=skip leaves it out).
    #[command(after_help = "Examples:
  selfsup check
  selfsup check --device cuda:1 --json
  selfsup check --quick                           # the short form: seconds")]
    Check(Check),
    /// List the devices of this machine
    Devices {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Arguments)]
pub(super) struct Demo {
    /// Override a setting of the demo's recipe (see `selfsup recipes demo`); may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// The run's folder [default: runs/demo, or the first of runs/demo-2, runs/demo-3 that is free]
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Arguments)]
pub(super) struct Train {
    /// A folder of images, a recipe file, or the name of a built-in recipe
    #[arg(required_unless_present = "resume", value_name = "FOLDER|RECIPE")]
    pub(super) recipe: Option<String>,
    /// Of a folder: print the plan without training
    #[arg(long, conflicts_with = "resume")]
    pub(super) plan: bool,
    /// Of a folder: how long the run may take, such as 90s, 30m or 2h; network and epochs are chosen to fit
    #[arg(long, value_name = "TIME", conflicts_with = "resume", value_parser = budget)]
    pub(super) budget: Option<Duration>,
    /// Of a folder: the method: simclr, simclr-v2, moco, swav, byol or simsiam
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    pub(super) method: Option<String>,
    /// Continue the run in this folder from its last checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["recipe", "out"])]
    pub(super) resume: Option<PathBuf>,
    /// Override a setting, such as train.epochs=20; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// The run's folder [default: runs/ and the name of the folder or recipe]
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
    /// Write a Chrome trace of a few steps: phases, operations, GPU kernels
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
    /// Number of steps in the trace
    #[arg(long, value_name = "N", default_value_t = 5, requires = "trace")]
    pub(super) trace_steps: u64,
}

#[derive(Debug, Arguments)]
pub(super) struct Check {
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
    /// The short form that training runs by itself
    #[arg(long)]
    pub(super) quick: bool,
    /// Print one JSON object at the end
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Arguments)]
pub(super) struct Inspect {
    /// A recipe (file or name), a run's folder, or a checkpoint
    #[arg(value_name = "RECIPE|RUN")]
    pub(super) what: String,
    /// Override a setting; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Run a step on a few images and list its graph: operation, shape, bytes
    #[arg(long)]
    pub(super) graph: bool,
    /// Run two steps on a few images and estimate the memory that the recipe's batch needs, with train.recompute and without
    #[arg(long)]
    pub(super) memory: bool,
    /// With --memory: the memory of a GPU, such as 141GB or 24GiB; names the largest batch that fits, in bf16 unless
    /// train.precision is set
    #[arg(long, value_name = "SIZE", requires = "memory", value_parser = bytes)]
    pub(super) gpu_memory: Option<usize>,
    /// Run a step on one thread and tell, by a model, how well so many threads could share it: by how its work is cut into tasks,
    /// without caches, memory bandwidth and the waking of threads
    #[arg(long, value_name = "THREADS", num_args = 0..=1, default_missing_value = "16", value_parser = clap::value_parser!(u16).range(2..=4096))]
    pub(super) scaling: Option<u16>,
    /// Count the bytes that each kernel of a step would move in a GPU's memory, at the recipe's batch; needs no GPU
    #[arg(long)]
    pub(super) traffic: bool,
    /// Count what a step exchanges on so many machines of so many GPUs each, such as 8x8, and what that costs by a model
    #[arg(long, value_name = "MACHINESxGPUS", value_parser = machines)]
    pub(super) ranks: Option<[usize; 2]>,
    /// With --ranks: bytes a second of each GPU's connection to other machines
    #[arg(long, value_name = "SIZE/s", requires = "ranks", value_parser = rate, default_value = "47GB/s")]
    pub(super) network: usize,
    /// With --ranks: bytes a second of an all-reduce within a machine, NCCL's bus bandwidth
    #[arg(long, value_name = "SIZE/s", requires = "ranks", value_parser = rate, default_value = "360GB/s")]
    pub(super) inside: usize,
    /// With --ranks: views a second of one GPU that trains alone; says how much of that remains
    #[arg(long, value_name = "VIEWS", requires = "ranks", value_parser = speed)]
    pub(super) speed: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Arguments)]
pub(super) struct Export {
    /// A run's folder (its newest checkpoint), or one of its checkpoints
    pub(super) run: PathBuf,
    /// Write an ONNX model in evaluation mode, batch norm folded: `input [batch, 3, height, width]`, normalised as in training, to
    /// `output [batch, features]`, operator set 17
    #[arg(long)]
    pub(super) onnx: bool,
    /// The file to write [default: backbone.safetensors, or backbone.onnx, in the run's folder]
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
}

#[derive(Debug, Arguments)]
pub(super) struct Embed {
    /// A run's folder or checkpoint (not with --weights), and a folder of images
    #[arg(required = true, num_args = 1..=2, value_names = ["RUN", "FOLDER"])]
    pub(super) paths: Vec<PathBuf>,
    /// Weights with torchvision's or timm's names, saved as safetensors
    #[arg(long, value_name = "FILE", requires = "arch")]
    pub(super) weights: Option<PathBuf>,
    /// The network of the weights: resnet18, resnet34, resnet50, resnet101, resnet152, wide_resnet50_2 or wide_resnet101_2
    #[arg(long, value_name = "NAME", requires = "weights")]
    pub(super) arch: Option<String>,
    /// The file to write; its name ends in .npy or .safetensors
    #[arg(long, value_name = "FILE")]
    pub(super) out: PathBuf,
    /// Side of the centre crop; the image is resized so that its shorter side is 8/7 of it [default: the recipe's, or 224]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(super) size: Option<u32>,
    /// The split of the data set: train or test
    #[arg(long, default_value = "train")]
    pub(super) split: Split,
    /// Take the classes from a table of files and classes (.csv, .tsv), as data.labels does; images without one are left out
    #[arg(long, value_name = "FILE")]
    pub(super) labels: Option<PathBuf>,
    /// Use this many images, spread evenly over the set; 0 for all
    #[arg(long, default_value_t = 0)]
    pub(super) limit: usize,
    /// Leave out at most this share of unreadable images; write nothing if there are more
    #[arg(long, value_name = "SHARE", default_value_t = MAX_SKIPPED, value_parser = share)]
    pub(super) max_skipped: f64,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Eval {
    /// Weighted k-nearest-neighbour accuracy on held-out images
    ///
    /// Also measures the same backbone at random initialisation, and the raw pixels. Several values of --k and --temperature make
    /// a grid, for which neighbours are searched once.
    #[command(after_help = "Examples:
  selfsup eval knn runs/first
  selfsup eval knn runs/first --k 10,20,100,200 --temperature 0.07,0.1")]
    Knn(EvalKnn),
    /// Accuracy of a linear classifier on the frozen backbone, by a published protocol
    ///
    /// Also measures the same backbone at random initialisation.
    #[command(after_help = "Examples:
  selfsup eval linear runs/first --sweep
  selfsup eval linear runs/first --protocol moco --labels 10%")]
    Linear(EvalLinear),
    /// Accuracy after fine-tuning the complete network on labels
    ///
    /// Also measures the same network trained on the same labels from random initialisation.
    #[command(after_help = "Examples:
  selfsup eval finetune runs/first --labels 10%
  selfsup eval finetune runs/first --labels 1percent.txt --protocol simclr-v2 --head-layers 1")]
    Finetune(EvalFinetune),
}

/// The arguments of every evaluation.
#[derive(Debug, Arguments)]
pub(super) struct Evaluated {
    /// The run's folder (its newest checkpoint), or one of its checkpoints
    pub(super) run: PathBuf,
    /// Override a setting of the run's recipe, such as data.path
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// Leave out at most this share of unreadable images; stop if there are more [default: the recipe's data.max_skipped, 0.01]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub(super) max_skipped: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    pub(super) device: Option<Name>,
}

#[derive(Debug, Arguments)]
pub(super) struct EvalKnn {
    #[command(flatten)]
    pub(super) of: Evaluated,
    /// Number of neighbours that vote
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
    /// How the classifier is trained: cached (quick, on standardised features of centre crops), or as in the published code of
    /// moco, simclr, swav, byol, simsiam or lightly
    #[arg(long, value_name = "NAME", default_value = eval::PROTOCOLS[0])]
    pub(super) protocol: String,
    /// Choose the learning rate, from 0.03 to 100, by accuracy on a tenth of the training images
    #[arg(long)]
    pub(super) sweep: bool,
    /// Learn from these training images only: 10% of each class, or a file that lists them
    #[arg(long, value_name = "SHARE|FILE")]
    pub(super) labels: Option<String>,
    /// Number of epochs [default: the protocol's]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) epochs: Option<u32>,
}

#[derive(Debug, Arguments)]
pub(super) struct EvalFinetune {
    #[command(flatten)]
    pub(super) of: Evaluated,
    /// Settings to start from: lightly (SGD, 30 epochs), simclr-v2 (LARS, 60 epochs), swav-1% or swav-10% (SGD, 20 epochs, a
    /// separate learning rate for the classifier); --set overrides them
    #[arg(long, value_name = "NAME", default_value = train::FINETUNES[0])]
    pub(super) protocol: String,
    /// Learn from these training images only: 10% of each class, or a file that lists them
    #[arg(long, value_name = "SHARE|FILE")]
    pub(super) labels: Option<String>,
    /// Layers of a SimCLR v2 head that are kept between backbone and classifier
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) head_layers: usize,
    /// Write the fine-tuned run into this folder
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// The commands in the `sh` blocks of a page, without comments: `selfsup WORDS` or `cargo run --release -- WORDS`.
    fn commands(page: &str) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        for block in page.split("```sh\n").skip(1) {
            for line in block.split("```").next().unwrap_or_default().lines() {
                let line = line
                    .split(" #")
                    .next()
                    .unwrap_or_default()
                    .replace("cargo run --release --", "selfsup");
                let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
                let start = words.iter().position(|word| {
                    word == "selfsup" && !line.contains("--example ") && !line.contains('…')
                });
                let end = |words: &[String]| {
                    words.iter().position(|word| word == ">").unwrap_or(words.len())
                };
                found.extend(start.map(|at| words[at..end(&words)].to_vec()));
            }
        }
        found
    }

    #[test]
    fn every_command_of_the_pages_is_accepted() {
        let root = Path::new(""); // not the path of the machine that built it: these tests are in bundles, too
        let Ok(pages) = std::fs::read_dir(root.join("docs")) else {
            return; // a package has no pages
        };
        let mut pages: Vec<_> = pages.map(|page| page.unwrap().path()).collect();
        pages.push(root.join("README.md"));
        let mut count = 0;
        for page in pages.iter().filter(|page| page.extension().is_some_and(|e| e == "md")) {
            for words in commands(&std::fs::read_to_string(page).unwrap()) {
                let parsed = Args::try_parse_from(&words);
                assert!(
                    parsed.is_ok(),
                    "{}: {}: {}",
                    page.display(),
                    words.join(" "),
                    parsed.unwrap_err()
                );
                count += 1;
            }
        }
        assert!(count > 30, "only {count} commands were found");
    }
}

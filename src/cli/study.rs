//! `study`: runs the arms of a study and prints their table.

use std::path::PathBuf;

use clap::Args as Arguments;

use super::progress::Progress;
use super::{device, say, talk};
use crate::error::Result;
use crate::recipes::{self, TrainSettings};
use crate::train::{Study, StudyPlan, Watch};

#[derive(Debug, Arguments)]
pub(super) struct StudyArgs {
    /// A built-in study, or a study file; lists the built-in studies if absent
    name: Option<String>,
    /// Override a setting of every arm, such as data.path=data/cifar10; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder of the arms' runs and of the table [default: runs/study-NAME]. Arms that have a result there are not run again
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Runs of each arm, each with its own seed
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    device: Option<device::Name>,
}

pub(super) fn study(args: &StudyArgs) -> Result<()> {
    let Some(name) = &args.name else {
        return recipes::builtin_studies()
            .try_for_each(|name| say(&format!("{name}: {}", Study::load(name)?.question)));
    };
    let study = Study::load(name)?;
    let stem = std::path::Path::new(name).file_stem().unwrap_or_default();
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from("runs").join(format!("study-{}", stem.display())));
    let plan = StudyPlan {
        out: &out,
        settings: &args.set,
        seeds: args.seeds,
        device: &|settings: &TrainSettings| device::open(args.device, settings),
        adjust: &|_| {},
        watch: &|total| Box::new(Progress::new(total)) as Box<dyn Watch>,
        tell: &talk,
    };
    let outcomes = study.run(&plan)?;
    say(study.markdown(&outcomes).trim_end())
}

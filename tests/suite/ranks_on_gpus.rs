//! Two GPUs train as one: two processes of the program on stand-ins for the driver and for NCCL.

use std::path::Path;
use std::process::Command;

use selfsup::device::Device;
use selfsup::recipes::Recipe;

use crate::compare::{close, report};
use crate::driver::{self, StandIn, on_stand_in};
use crate::ranks::succeed;
use crate::recipes::{reduced, small_recipe, teacher};

/// A method's run, and its settings beside the common ones.
pub struct Case {
    pub method: &'static str,
    settings: &'static [&'static str],
    /// Whether it is trained by default. All others take a minute: `RANKS=all` trains them too.
    usual: bool,
}

pub const CASES: [Case; 9] = [
    Case { method: "simclr", settings: &[], usual: true },
    Case { method: "simclr-v2", settings: &["method.memory=32"], usual: false },
    Case {
        method: "moco",
        settings: &["network.norm_groups=2", "method.queue=32", "method.symmetric=false"],
        usual: true,
    },
    Case { method: "moco", settings: &["method.queue=32", "train.micro_batches=2"], usual: false },
    Case { method: "swav", settings: &["method.queue=16"], usual: true },
    Case { method: "byol", settings: &[], usual: false },
    Case { method: "simsiam", settings: &[], usual: false },
    Case { method: "supervised", settings: &[], usual: false },
    Case { method: "distill", settings: &[], usual: false },
];

impl Case {
    /// Six steps of eight images.
    pub fn recipe(&self, folder: &Path) -> Recipe {
        let host = Device::cpu(1).unwrap();
        let mut recipe = reduced(small_recipe(self.method), &host);
        if self.method == "distill" {
            teacher(&mut recipe, folder, &host);
        }
        recipe.network.norm_groups = 1;
        for policy in &mut recipe.augment {
            policy.size = 16; // of the few rows of smaller ones batch norm multiplies rounding errors
        }
        let common = [
            "data.limit=24",
            "data.test_limit=8",
            "optim.lr=0.02", // of a much higher rate rounding errors grow twentyfold with each step
            "train.epochs=2",
            "train.precision=f32",
            "watch.report=false",
            "watch.carry_on=true",
        ];
        let settings = common.iter().chain(self.settings).map(|setting| setting.to_string());
        recipe
            .with(&settings.collect::<Vec<_>>())
            .unwrap_or_else(|e| panic!("{}: {e}", self.method))
    }
}

/// The losses of a run on GPUs, by the stand-ins for the driver and for NCCL: of two steps that are launched, and of others that are
/// captured and replayed.
fn losses(ranks: usize, recipe: &Path, folder: &Path) -> Vec<f64> {
    let out = folder.join(format!("of-{ranks}"));
    let program = crate::program::path();
    let mut command = Command::new(std::fs::canonicalize(".mpi/bin/mpiexec").unwrap());
    command.args(["-n", &ranks.to_string(), program, "train"]).arg(recipe);
    command.args(["--device", "cuda", "--out"]).arg(&out);
    driver::with_driver(&mut command).env("SELFSUP_NCCL", StandIn::path());
    succeed(command);
    logged_losses(&out)
}

/// The losses in a run's folder, of the epochs too; none before its first step.
pub fn logged_losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
#[cfg_attr(
    any(no_mpi, no_kernels),
    ignore = "needs MPI and CUDA kernels: run scripts/fetch-mpi and scripts/fetch-nvcc"
)]
fn two_gpus_train_as_one() {
    on_stand_in("ranks_on_gpus::two_gpus_train_as_one", || {
        let all = std::env::var_os("RANKS").is_some();
        let cases: Vec<&Case> = CASES.iter().filter(|case| case.usual || all).collect();
        for case in &cases {
            let folder = tempfile::tempdir().unwrap();
            let recipe = folder.path().join("recipe.toml");
            std::fs::write(&recipe, case.recipe(folder.path()).to_toml()).unwrap();
            let [one, two] = [1, 2].map(|ranks| losses(ranks, &recipe, folder.path()));
            assert!(one.len() >= 6, "{one:?}");
            // Half the learning rate changes them by a tenth.
            let name = format!("{} {:?} on two GPUs", case.method, case.settings);
            report(&name, vec![close("losses", &two, &one, 1e-4)]);
        }
        println!("two GPUs equal one: {} of {}", cases.len(), cases.len());
    });
}

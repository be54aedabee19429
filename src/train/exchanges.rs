//! What a step of a recipe exchanges between ranks, counted from the step itself, and what that costs by a model of the network.

use serde::Serialize;

use crate::device::{Device, Group, Precision, Traffic};
use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::train::inspect::first_step;
use crate::train::ranks;

/// GPUs that train together, and their connections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cluster {
    /// Machines.
    pub machines: usize,
    /// GPUs of each.
    pub per_machine: usize,
    /// Bytes a second in each direction of one GPU's connection to other machines.
    pub network: f64,
    /// Bytes a second that an all-reduce moves through each GPU within a machine (NCCL's bus bandwidth).
    pub inside: f64,
}

/// The exchanges of one name in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Exchange {
    /// What crosses the ranks.
    pub what: &'static str,
    /// Whether it is gathered; otherwise it is reduced.
    pub gathers: bool,
    /// The number of exchanges.
    pub calls: u64,
    /// Bytes of one rank's values, of all of them together.
    pub bytes: u64,
}

/// Returns what a step of the recipe exchanges on `ranks` ranks, each with its share of the recipe's batch.
///
/// It runs the first step of one of the ranks twice, on the processor, with two small batches: exchanges are counted and change nothing.
/// Bytes at the recipe's batch lie on the line through both.
///
/// # Errors
/// If so many ranks cannot train the recipe, or its settings contradict each other.
pub fn exchanges(recipe: &Recipe, ranks: usize) -> Result<Vec<Exchange>> {
    let share = recipe.train.batch / ranks.max(1);
    if share * ranks != recipe.train.batch {
        return Err(Error::Config(format!(
            "{ranks} ranks cannot have equal shares of train.batch={}",
            recipe.train.batch
        )));
    }
    let groups = (recipe.network.norm_groups / ranks).max(1);
    let least = 2_usize.next_multiple_of(groups) * recipe.train.micro_batches.max(1);
    let (small, large) = (traffic(recipe, ranks, least)?, traffic(recipe, ranks, 2 * least)?);
    let line = |(small, large): (&Traffic, &Traffic)| {
        let (few, many) = (small.bytes as f64, large.bytes as f64);
        let more = (share as f64 - least as f64) / least as f64;
        Exchange {
            what: small.what,
            gathers: small.gathers,
            calls: small.calls,
            bytes: (few + (many - few) * more).round() as u64,
        }
    };
    Ok(small.iter().zip(&large).map(line).collect())
}

/// What the first step exchanges with `images` images on each rank.
fn traffic(recipe: &Recipe, ranks: usize, images: usize) -> Result<Vec<Traffic>> {
    let group = Group::imagined(ranks);
    let device = Device::cpu(recipe.train.threads)?;
    let device = device.with_precision(recipe.train.precision.unwrap_or(Precision::Bf16))?;
    ranks::check(recipe, &*recipe.build_method()?, &group)?;
    first_step(recipe, images, &device, &group, |step| {
        group.traffic(); // what the start exchanged
        step()
    })??;
    Ok(group.traffic())
}

/// Seconds until NCCL has begun a collective.
const BASE: f64 = 6.7e-6;
/// Seconds from one GPU to the next, within a machine, and to another machine in a tree and in a ring.
const HOP: f64 = 0.6e-6;
const TREE_HOP: f64 = 5.0e-6;
const RING_HOP: f64 = 2.7e-6;

impl Cluster {
    /// The number of GPUs.
    pub fn ranks(&self) -> usize {
        self.machines * self.per_machine
    }

    /// The same machines, one of them.
    pub fn one_machine(&self) -> Self {
        Self { machines: 1, ..*self }
    }

    /// The seconds that an exchange takes: NCCL's own model of its rings and trees (`src/graph/tuning.cc`), latency of every hop
    /// and bytes at the bandwidth of the slowest connection. Waiting for the slowest rank is not in it.
    pub fn seconds(&self, exchange: &Exchange) -> f64 {
        let (n, machines) = (self.ranks() as f64, self.machines as f64);
        if self.ranks() < 2 {
            return 0.0;
        }
        let network = self.network * self.per_machine as f64; // each GPU has a connection of its own
        let bandwidth = if self.machines > 1 { self.inside.min(network) } else { self.inside };
        let (calls, bytes) = (exchange.calls as f64, exchange.bytes as f64);
        // Of a ring's steps, those that enter another machine.
        let between = |steps: f64, crossing: f64| (steps - crossing) * HOP + crossing * RING_HOP;
        if exchange.gathers {
            let latency = BASE + between(n - 1.0, machines - 1.0);
            return calls * latency + (n - 1.0) * bytes / bandwidth;
        }
        let crossing = if self.machines > 1 { 2.0 * machines } else { 0.0 };
        let ring = BASE + between(2.0 * (n - 1.0), crossing);
        let tree = 2.0 * ((n / machines - 1.0) * HOP + machines.log2() * TREE_HOP) + BASE;
        calls * ring.min(tree) + 2.0 * (n - 1.0) / n * bytes / bandwidth
    }
}

//! What several ranks of one run agree on: that they train the same, when to stop and to save, and what they evaluate.

use std::sync::atomic::Ordering;

use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::arena::Arena;
use crate::data::{Skipped, Source};
use crate::device::Group;
use crate::error::{Error, Result};
use crate::methods::{Method, State};
use crate::recipes::Recipe;
use crate::tensor::{DType, Element, Tensor, gather_views};
use crate::train::changes::difference;
use crate::train::evaluation::Accuracies;
use crate::train::run::Watch;
use crate::train::skipped::RunSplit;
use crate::train::{Images, Run, images};

/// Refuses a recipe that this group cannot train as one process would.
pub(super) fn check(recipe: &Recipe, method: &dyn Method, group: &Group) -> Result<()> {
    let ranks = group.size();
    if ranks == 1 {
        return Ok(());
    }
    let name = &recipe.method.name;
    if let Some(what) = method.without_ranks() {
        return Err(Error::Config(format!(
            "{name}: {ranks} ranks cannot train {what}: use one process"
        )));
    }
    let groups = recipe.network.norm_groups;
    if groups > 1 && !groups.is_multiple_of(ranks) {
        return Err(Error::Config(format!(
            "{ranks} ranks cannot have equal shares of the groups of batch norm, network.norm_groups={groups}"
        )));
    }
    if recipe.train.dump_views > 0 {
        return Err(Error::Config(format!(
            "train.dump_views dumps complete batches, and {ranks} ranks have shares: use one process"
        )));
    }
    Ok(())
}

/// Fails on all ranks unless they run the same program on the same recipe and images. The first rank that differs from rank 0 says
/// in what.
pub(super) fn compare(run: &Run, group: &Group) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let recipe = group.broadcast_bytes("the recipe", run.recipe.to_toml().into_bytes());
    let own = group.together(known(run))?;
    let first = group.broadcast_bytes("the images", to_bytes(&own));
    group.check()?;
    let first: Vec<(String, String)> = from_bytes(&first);
    let differs = own.iter().zip(&first).find(|(own, first)| own != first);
    let verdict = match (differing_setting(&run.recipe, &recipe), differs) {
        (Some(setting), _) => Err(setting),
        (None, Some(((what, own), (_, first)))) => {
            Err(format!("{what}: {own} here, {first} on rank 0"))
        }
        (None, None) => Ok(()),
    };
    let path = &run.recipe.data.path;
    group.together(verdict.map_err(|what| {
        Error::Config(format!(
            "rank {} differs from rank 0 in {what} (data.path={path})",
            group.rank()
        ))
    }))
}

/// What must be the same on all ranks beside the recipe: as many pairs of a name and a value on each.
fn known(run: &Run) -> Result<Vec<(String, String)>> {
    let mut known = vec![("the program's version".into(), env!("CARGO_PKG_VERSION").into())];
    let Images { train, validation, test, .. } = &run.images;
    let splits = [
        (RunSplit::Training, Some(train)),
        (RunSplit::Validation, validation.as_ref()),
        (RunSplit::HeldOut, test.as_ref()),
    ];
    for (split, source) in splits {
        let [count, names, sizes, pixels] = match source {
            Some(source) => checksums(&**source, run)?,
            None => Default::default(),
        };
        known.push((format!("the number of {split} images"), count.to_string()));
        known.push((format!("names or classes of the {split} images"), format!("{names:08x}")));
        known.push((format!("sizes of the {split} files"), format!("{sizes:08x}")));
        known.push((format!("the pixels of {split} images"), format!("{pixels:08x}")));
    }
    Ok(known)
}

/// The number of images, and checksums of their names and classes, of the sizes of their files, and of the pixels of some.
fn checksums(source: &dyn Source, run: &Run) -> Result<[u32; 4]> {
    let count = source.len();
    let [names, pixels] = images::checksums(source, run.recipe.seed, run.online.device())?;
    run.online.device().host().run(|| {
        let sizes: Vec<u64> =
            (0..count).into_par_iter().map(|i| source.file_bytes(i).unwrap_or(0)).collect();
        Ok([count as u32, names, crc32c::crc32c(bytemuck::cast_slice(&sizes)), pixels])
    })
}

/// The first setting in which a recipe differs from rank 0's. Where the images lie and how many threads there are may differ from
/// machine to machine.
fn differing_setting(own: &Recipe, first: &[u8]) -> Option<String> {
    let first = String::from_utf8_lossy(first).parse::<toml::Table>().ok()?;
    let mut table = own.to_toml().parse::<toml::Table>().ok()?;
    for (part, key) in [("data", "path"), ("train", "threads"), ("train", "loader_threads")] {
        let value = first.get(part).and_then(|table| table.get(key)).cloned();
        if let (Some(toml::Value::Table(own)), Some(value)) = (table.get_mut(part), value) {
            own.insert(key.into(), value);
        }
    }
    let (key, own, first) = difference("", &table.into(), &first.into())?;
    Some(format!("{key}: {own} here, {first} on rank 0"))
}

/// What the ranks want between two steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wishes {
    /// A rank was asked to stop.
    pub(super) stop: bool,
    /// A checkpoint is due by rank 0's clock.
    pub(super) save: bool,
}

impl Run {
    /// The ranks of the run.
    pub(super) fn group(&self) -> &Group {
        self.online.group()
    }

    /// Agrees with the other ranks on what to do after `step` steps; `stop` says that this rank stopped waiting for images.
    pub(super) fn agree(&self, step: u64, stop: bool) -> Result<Wishes> {
        let group = self.group();
        group.enter(&format!("in step {} of {}", step + 1, self.schedule.total));
        let stop = stop || self.stop.load(Ordering::Relaxed);
        let save = group.leads() && self.checkpoint_is_due(step);
        let mut word = [u64::from(stop), u64::from(save)];
        group.all_reduce_max("whether to stop or save", &mut word);
        group.check()?;
        Ok(Wishes { stop: word[0] > 0, save: word[1] > 0 })
    }

    /// Replaces running statistics by their mean over the ranks, before an evaluation or a checkpoint: with several groups of batch
    /// norm each rank has updated them by its own groups. Fails if the weights differ.
    pub(super) fn agree_on_state(&mut self) -> Result<()> {
        let group = self.group().clone();
        if group.size() == 1 || self.agreed_step == Some(self.begun) {
            return Ok(());
        }
        let weights = crc32c::crc32c(&bytes_of(self.online.values()));
        let all = group.all_gather("checksums of the weights", &[weights]).unwrap_or_default();
        group.check()?;
        if let Some(rank) = all.iter().position(|other| *other != all[0]) {
            return Err(Error::Device(format!(
                "after step {} the weights of rank {rank} differ from those of rank 0, which is a bug or a broken machine; resume \
                 from the newest checkpoint",
                self.begun
            )));
        }
        mean_statistics(&mut self.online, &group);
        for (_, part) in self.method.state() {
            if let State::Network(network) = part {
                mean_statistics(network, &group);
            }
        }
        self.agreed_step = Some(self.begun);
        group.check()
    }

    /// The embeddings of the last step, or of its last micro-batch, of all ranks.
    pub(super) fn all_embeddings(&self) -> Option<Tensor> {
        let own = self.steps.embeddings()?;
        let images = self.recipe.train.batch / self.group().size();
        let views = (own.shape()[0] / images).max(1);
        Some(gather_views(own, views, self.group(), "monitors"))
    }

    /// Adds the training images that a rank could not read.
    pub(super) fn add_skipped(&mut self) -> Result<()> {
        let all = shared_skipped(self.group(), self.loader.skipped(), 0)?;
        self.skipped.add(RunSplit::Training, &all);
        Ok(())
    }

    /// Evaluates, each rank a share of the images.
    pub(super) fn evaluate_together(
        &mut self,
        epoch: u32,
        watch: &mut dyn Watch,
    ) -> Result<Accuracies> {
        self.agree_on_state()?;
        let group = self.group().clone();
        group.enter("in an evaluation");
        let mut measured = self.evaluate(epoch, watch)?;
        if group.size() == 1 {
            return Ok(measured);
        }
        // They decide on all ranks which checkpoint is the best, and processors of different kinds round differently.
        let Accuracies { knn, validation, classifier, quality, .. } = &mut measured;
        let rank = quality.as_mut().map(|quality| &mut quality.rank_me);
        let figures = [knn.as_mut(), validation.as_mut(), classifier.as_mut(), rank];
        let mut figures: Vec<&mut f64> = figures.into_iter().flatten().collect();
        let mut values: Vec<f64> = figures.iter().map(|figure| **figure).collect();
        group.broadcast("accuracies", &mut values);
        group.check()?;
        figures.iter_mut().zip(values).for_each(|(figure, value)| **figure = value);
        Ok(measured)
    }

    /// Gives all ranks what rank 0 has read from a checkpoint.
    pub(super) fn share_restored(&mut self, group: &Group) {
        if group.size() == 1 {
            return;
        }
        let restored = "what a checkpoint holds";
        broadcast_arena(&mut self.online, group);
        broadcast(self.optimizer.momentum_mut(), group);
        if let Some(squares) = self.optimizer.squares_mut() {
            broadcast(squares, group);
        }
        for (_, part) in self.method.state() {
            match part {
                State::Network(network) => broadcast_arena(network, group),
                State::Rows(rows) => broadcast(rows, group),
                State::Count(count) => {
                    let mut value = [*count];
                    group.broadcast(restored, &mut value);
                    *count = value[0];
                }
            }
        }
    }
}

/// The images that the ranks could not read. This rank counts its `own` from number `before` on.
pub(super) fn shared_skipped(
    group: &Group,
    own: Vec<Skipped>,
    before: u32,
) -> Result<Vec<Skipped>> {
    let own: Vec<(u32, String)> =
        own.into_iter().map(|Skipped { index, reason }| (before + index, reason)).collect();
    let all = group.all_gather_bytes("skipped images", &to_bytes(&own));
    group.check()?;
    let of_rank = |bytes: &Vec<u8>| -> Vec<(u32, String)> { from_bytes(bytes) };
    let all = all.iter().flat_map(of_rank);
    Ok(all.map(|(index, reason)| Skipped { index, reason }).collect())
}

/// Replaces an arena's running statistics by their mean over the ranks. Where all ranks have the same value, it keeps its bits.
fn mean_statistics(arena: &mut Arena, group: &Group) {
    let own = arena.statistics().to_f64();
    let Some(all) = group.all_gather("running statistics", &own) else { return };
    let rank = |r: usize| &all[r * own.len()..][..own.len()];
    let mean = |i: usize| {
        let values = (0..group.size()).map(|r| rank(r)[i]);
        if values.clone().all(|v| v == own[i]) {
            own[i]
        } else {
            values.sum::<f64>() / group.size() as f64
        }
    };
    let means: Vec<f64> = (0..own.len()).map(mean).collect();
    *arena.statistics_mut() = Tensor::from_f64(&arena.device().clone(), [own.len()], &means);
}

fn broadcast_arena(arena: &mut Arena, group: &Group) {
    broadcast(arena.values_mut(), group);
    broadcast(arena.statistics_mut(), group);
}

fn broadcast(tensor: &mut Tensor, group: &Group) {
    fn of<T: Element>(tensor: &mut Tensor, group: &Group) {
        let mut values = tensor.to_vec::<T>();
        group.broadcast("what a checkpoint holds", &mut values);
        tensor.view_mut().write(&values);
    }
    match tensor.dtype() {
        DType::F64 => of::<f64>(tensor, group),
        DType::F32 => of::<f32>(tensor, group),
        DType::I32 => of::<i32>(tensor, group),
        DType::Bf16 => of::<half::bf16>(tensor, group),
    }
}

/// The bytes of weights.
fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    match tensor.dtype() {
        DType::F64 => bytemuck::cast_slice(&tensor.to_vec::<f64>()).to_vec(),
        _ => bytemuck::cast_slice(&tensor.to_vec::<f32>()).to_vec(),
    }
}

/// A message from one rank to another of the same program.
pub(super) fn to_bytes(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("plain data")
}

pub(super) fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> T {
    serde_json::from_slice(bytes).expect("a message of the same program")
}

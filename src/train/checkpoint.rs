//! Checkpoints: [weight files](crate::weights) that hold the complete state of a run.
//!
//! Weights and running statistics have torchvision's names, those of the backbone under `backbone.`. The momentum of each
//! parameter is stored under `momentum.`, the method's own state under `method.`: queues, counters, and the slots of a second
//! network, prefixed with its name. The run's progress, its recipe and the format's version are notes in the header. A folder
//! keeps the last few checkpoints, named by step, and the best by kNN as `best.safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use crate::arena::{Arena, Layout};
use crate::error::{Error, Result};
use crate::files::replace_by_link;
use crate::methods::State;
use crate::optim::Optimizer;
use crate::tensor::Tensor;
use crate::train::onnx::Values;
use crate::train::teacher;
use crate::weights::{self, Entry, WeightFile, stored_values, write_weights};

const PREFIX: &str = "step-";
const SUFFIX: &str = ".safetensors";
const BEST: &str = "best.safetensors";
const MOMENTUM: &str = "momentum.";
/// The prefix of Adam's means of squares.
const SQUARES: &str = "squares.";
const METHOD: &str = "method.";
/// The prefix of the backbone's slots in a run's own checkpoints.
const BACKBONE: &str = "backbone.";
const CLASSIFIER: &str = "fc.";

/// The note with the format's version.
const FORMAT_NOTE: &str = "selfsup.format";
/// The version; it rises when files of the previous version can no longer be resumed from.
const FORMAT: u32 = 1;

/// Writes weights, running statistics, the optimizer's state and a method's `state` to `folder/step-NNNNNNNN.safetensors` with `notes` in the
/// header, and removes all but the newest `keep` checkpoints of the folder. Returns the file.
///
/// # Errors
/// If the file cannot be written, or the device failed; earlier checkpoints then stay as they were.
pub fn save(
    folder: &Path,
    step: u64,
    arena: &Arena,
    optimizer: &Optimizer,
    state: Vec<(&'static str, State<'_>)>,
    mut notes: HashMap<String, String>,
    keep: usize,
) -> Result<PathBuf> {
    let same = |name: &str| Some(name.to_owned());
    let mut entries: Vec<Entry<'_>> = Entry::network(arena, same).collect();
    entries.extend(arena.layout().params().iter().map(|slot| {
        let momentum = || optimizer.momentum().slice(slot.offset, slot.shape).to_f64();
        Entry::slot(format!("{MOMENTUM}{}", slot.name), slot, momentum)
    }));
    if let Some(squares) = optimizer.squares() {
        entries.extend(arena.layout().params().iter().map(|slot| {
            let squares = || squares.slice(slot.offset, slot.shape).to_f64();
            Entry::slot(format!("{SQUARES}{}", slot.name), slot, squares)
        }));
    }
    for (name, part) in state {
        let name = format!("{METHOD}{name}");
        match part {
            State::Network(network) => {
                let network: &Arena = network;
                entries.extend(Entry::network(network, |slot| Some(format!("{name}.{slot}"))));
            }
            State::Rows(rows) => {
                let rows: &Tensor = rows;
                entries.push(Entry::floats(name, rows.shape().to_vec(), || rows.to_f64()));
            }
            State::Count(count) => entries.push(Entry::count(name, *count)),
        }
    }
    notes.insert("format".into(), "pt".into()); // what PyTorch's loaders look for
    notes.insert(FORMAT_NOTE.into(), FORMAT.to_string());
    let path = of_step(folder, step);
    // A failed device returns garbage.
    write_weights(&path, &entries, notes, || arena.device().check())?;
    let old = checkpoints(folder)?;
    for (_, old) in old.iter().rev().skip(keep.max(1)) {
        std::fs::remove_file(old).map_err(Error::io(old))?;
    }
    Ok(path)
}

/// The checkpoint of a step.
pub(super) fn of_step(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("{PREFIX}{step:08}{SUFFIX}"))
}

/// The best checkpoint of a run, which its folder keeps under this name.
pub(super) fn best(folder: &Path) -> PathBuf {
    folder.join(BEST)
}

/// Keeps a checkpoint as `best.safetensors` next to it, even when the checkpoint itself is removed later.
pub(super) fn keep_as_best(checkpoint: &Path) -> Result<()> {
    replace_by_link(&checkpoint.with_file_name(BEST), checkpoint)
}

/// Returns the newest checkpoint of a run's folder.
///
/// # Errors
/// If the folder cannot be read or holds no checkpoint.
pub fn newest(folder: &Path) -> Result<PathBuf> {
    last(folder)?.ok_or_else(|| Error::format(folder, "holds no checkpoint (step-*.safetensors)"))
}

/// Returns the newest checkpoint of a folder, if it holds one.
pub(super) fn last(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(checkpoints(folder)?.pop().map(|(_, path)| path))
}

/// Lists the checkpoints of a folder by step.
fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let step = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok());
        found.extend(step.map(|step| (step, entry.path())));
    }
    found.sort_unstable();
    Ok(found)
}

/// Fills an arena's weights and running statistics from a checkpoint. Nothing changes unless all of them fit.
///
/// # Errors
/// If the file is damaged, or a slot is missing or has another shape: the message names the first mismatch with both shapes.
pub fn load_weights(path: &Path, arena: &mut Arena) -> Result<()> {
    let mut file = WeightFile::open_whole(path)?;
    check_format(&file)?;
    file.fill_finite(arena, |slot| Some(slot.to_owned()))
}

/// Fills an arena from a weight file, to start a run from: the complete backbone, with torchvision's names or prefixed with
/// `backbone.`, and those slots of the heads that the file has; a classifier only if it has as many classes.
///
/// # Errors
/// If the file is damaged, a slot of the backbone is missing, the file's backbone has others, or a slot has another shape.
pub fn init_weights(path: &Path, arena: &mut Arena) -> Result<()> {
    init_fitted(path, arena, true, false).map(drop)
}

/// As [`init_weights`], without the classifier unless `classifier` asks for it; if `fit`, a backbone over three channels is fitted
/// to images of other channels: the filters of its first convolution are added up for one channel, and repeated and scaled by
/// 3 / channels for more. Returns whether they were.
pub(super) fn init_fitted(
    path: &Path,
    arena: &mut Arena,
    classifier: bool,
    fit: bool,
) -> Result<bool> {
    let mut file = WeightFile::open_whole(path)?;
    let prefix = file.common_prefix(&backbone_slots(arena.layout()))?;
    let names: BTreeSet<String> = file.names().into_iter().collect();
    check_architecture(&file, &prefix, arena.layout())?;
    let starts_anew = !classifier || other_classes(&file, arena.layout()).is_some();
    let name = |slot: &str| match slot.strip_prefix(BACKBONE) {
        Some(inner) => Some(format!("{prefix}{inner}")),
        None if starts_anew && slot.starts_with(CLASSIFIER) => None,
        None => names.contains(slot).then(|| slot.to_owned()),
    };
    let first = ["conv1.weight", "conv1.0.weight"].map(|inner| format!("{BACKBONE}{inner}"));
    let first =
        first.iter().find(|first| arena.layout().params().iter().any(|s| s.name == **first));
    match first.filter(|_| fit) {
        Some(first) => file.fill_fitted(arena, first, name),
        None => file.fill_finite(arena, name).map(|()| false),
    }
}

/// The classes of a file's classifier and of a network's, if they differ in number.
fn other_classes(file: &WeightFile, layout: &Layout) -> Option<[usize; 2]> {
    let slot = layout.params().iter().find(|slot| slot.name == format!("{CLASSIFIER}weight"))?;
    let (then, now) = (*file.shape(&slot.name)?.first()?, slot.shape[0]);
    (then != now).then_some([then, now])
}

/// Says what of a weight file a run starts without or changes: a classifier of other classes than its images' `classes` is not
/// taken, filters over three channels are fitted to images of others.
///
/// # Errors
/// If the file is damaged.
pub fn fitted(path: &Path, layout: &Layout, classes: &[String]) -> Result<Vec<String>> {
    let file = WeightFile::open(path)?;
    let slot = format!("{CLASSIFIER}weight");
    let taken = layout.params().iter().any(|own| own.name == slot) && file.shape(&slot).is_some();
    let anew = match other_classes(&file, layout) {
        Some([then, now]) => Some(format!(
            "its classifier tells {then} classes apart, and this run {now}: a new one is trained"
        )),
        None if taken => teacher::other_classes(&file, classes)?.map(|[of, now]| {
            format!(
                "its classifier was trained with {of}, which is {now} here: a new one is trained"
            )
        }),
        None => None,
    };
    Ok(anew.into_iter().chain(fitted_channels(&file, layout)?).collect())
}

fn fitted_channels(file: &WeightFile, layout: &Layout) -> Result<Option<String>> {
    let prefix = file.common_prefix(&backbone_slots(layout))?;
    let first = layout.params().iter().find_map(|slot| {
        let inner = slot.name.strip_prefix(BACKBONE)?;
        ["conv1.weight", "conv1.0.weight"].contains(&inner).then_some((inner, slot.channels))
    });
    let Some((inner, channels)) = first else { return Ok(None) };
    let from = file.shape(&format!("{prefix}{inner}")).and_then(|shape| shape.get(1).copied());
    Ok((from == Some(3) && channels != 3).then(|| {
        let how = match channels {
            1 => "added up".to_owned(),
            _ => format!("repeated in turn and scaled by 3/{channels}"),
        };
        format!(
            "{inner} has filters over 3 channels, and the images have {channels}: they are {how}"
        )
    }))
}

/// Refuses weights of a larger backbone: those of a ResNet-34 hold all slots of a ResNet-18, in the same shapes.
fn check_architecture(file: &WeightFile, prefix: &str, layout: &Layout) -> Result<()> {
    let slots: BTreeSet<&str> = backbone_slots(layout).into_iter().collect();
    let of_backbone = |inner: &str| {
        let parts = ["layer", "conv1.", "bn1."];
        parts.iter().any(|part| inner.starts_with(part)) && !inner.ends_with("num_batches_tracked")
    };
    let names = file.names();
    let mut inner = names.iter().filter_map(|name| name.strip_prefix(prefix));
    match inner.find(|inner| of_backbone(inner) && !slots.contains(inner)) {
        None => Ok(()),
        Some(inner) => Err(Error::Weights(format!(
            "{}: has a tensor {prefix}{inner}, which this network does not have: choose the architecture of the weights",
            file.path().display()
        ))),
    }
}

/// Returns the prefix that [`init_weights`] strips from a weight file's names, if it is not that of a run's own checkpoints.
///
/// # Errors
/// If the file is damaged, or holds no backbone or several.
pub fn foreign_prefix(path: &Path, layout: &Layout) -> Result<Option<String>> {
    let prefix = WeightFile::open(path)?.common_prefix(&backbone_slots(layout))?;
    Ok(Some(prefix).filter(|prefix| !["", BACKBONE].contains(&&**prefix)))
}

/// Names of the backbone's slots, without `backbone.`.
fn backbone_slots(layout: &Layout) -> Vec<&str> {
    let slots = layout.params().iter().chain(layout.stats());
    slots.filter_map(|slot| slot.name.strip_prefix(BACKBONE)).collect()
}

/// Writes the backbone alone, with torchvision's names, for `load_state_dict`.
///
/// # Errors
/// If the file cannot be written, or the device failed.
pub fn export_backbone(path: &Path, arena: &Arena) -> Result<()> {
    let plain = |slot: &str| slot.strip_prefix(BACKBONE).map(str::to_owned);
    let entries: Vec<Entry<'_>> = Entry::network(arena, plain).collect();
    let notes = [("format", "pt"), (weights::EXPORT, weights::BACKBONE)];
    let notes = notes.map(|(name, note)| (name.to_owned(), note.to_owned()));
    write_weights(path, &entries, HashMap::from(notes), || arena.device().check())
}

/// Shape and values of the backbone's slots under torchvision's names, as a file has them.
pub(super) fn backbone_values(arena: &Arena) -> BTreeMap<String, Values> {
    let plain = |slot: &str| slot.strip_prefix(BACKBONE).map(str::to_owned);
    stored_values(arena, plain).collect()
}

/// Fills a method's `state` from a checkpoint, in place.
///
/// # Errors
/// If the file is damaged, or a part is missing or has another shape.
pub fn load_state(path: &Path, state: Vec<(&'static str, State<'_>)>) -> Result<()> {
    fill_state(&mut WeightFile::open(path)?, state).map(drop)
}

/// Fills a method's state and returns the names of the tensors read.
fn fill_state(file: &mut WeightFile, state: Vec<(&'static str, State<'_>)>) -> Result<Vec<String>> {
    let mut read = Vec::new();
    for (name, part) in state {
        let name = format!("{METHOD}{name}");
        match part {
            State::Network(network) => {
                file.fill(network, |slot| Some(format!("{name}.{slot}")))?;
                let slots = network.layout().params().iter().chain(network.layout().stats());
                read.extend(slots.map(|slot| format!("{name}.{}", slot.name)));
            }
            State::Rows(rows) => {
                let numbers = file.numbers(&name, rows.shape())?;
                *rows = Tensor::from_f64(&rows.device().clone(), *rows.shape(), &numbers);
                read.push(name);
            }
            State::Count(count) => {
                *count = file.count(&name)?;
                read.push(name);
            }
        }
    }
    Ok(read)
}

/// Restores everything that [`save`] wrote from a file that [`open`] returned.
///
/// # Errors
/// If the file is of another architecture or holds a tensor that this run does not have.
pub(super) fn restore(
    file: &mut WeightFile,
    arena: &mut Arena,
    optimizer: &mut Optimizer,
    state: Vec<(&'static str, State<'_>)>,
) -> Result<()> {
    let layout = arena.layout().clone();
    file.fill(arena, |slot| Some(slot.to_owned()))?;
    let device = arena.device().clone();
    let mut read = |prefix: &str, of: &Tensor| -> Result<Tensor> {
        let mut values = of.to_f64();
        file.read_slots(layout.params(), &mut values, |slot| Some(format!("{prefix}{slot}")))?;
        Ok(Tensor::from_f64(&device, [values.len()], &values))
    };
    *optimizer.momentum_mut() = read(MOMENTUM, optimizer.momentum())?;
    if let Some(squares) = optimizer.squares_mut() {
        *squares = read(SQUARES, squares)?;
    }
    let mut known: BTreeSet<String> = fill_state(file, state)?.into_iter().collect();
    for slot in layout.params().iter().chain(layout.stats()) {
        known.insert(slot.name.clone());
        known.insert(format!("{MOMENTUM}{}", slot.name));
        if optimizer.squares().is_some() {
            known.insert(format!("{SQUARES}{}", slot.name));
        }
    }
    match file.names().into_iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let path = file.path().display();
            Err(Error::Weights(format!(
                "{path}: has a tensor {name}, which this network does not have"
            )))
        }
    }
}

/// Opens a checkpoint to resume from.
///
/// # Errors
/// If it is damaged, or of a format that this program does not read.
pub(super) fn open(path: &Path) -> Result<WeightFile> {
    let file = WeightFile::open_whole(path)
        .map_err(|e| Error::Weights(format!("{e}; remove it to resume from the one before it")))?;
    check_format(&file)?;
    if file.note(FORMAT_NOTE).map(str::parse) != Some(Ok(FORMAT)) {
        return Err(Error::format(
            path,
            "is not a checkpoint to resume from: its header has no format version",
        ));
    }
    Ok(file)
}

/// Refuses a checkpoint of a format that only later versions of this program know.
pub(super) fn check_format(file: &WeightFile) -> Result<()> {
    match file.note(FORMAT_NOTE).map(str::parse::<u32>) {
        Some(Ok(format)) if format > FORMAT => Err(Error::format(
            file.path(),
            format!(
                "has format {format}, and this program reads {FORMAT}: use the newer one that wrote it"
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use safetensors::SafeTensors;

    use super::*;
    use crate::device::Device;
    use crate::nn::{ResNet, ResNetConfig, Stem};
    use crate::optim::{Lars, Rule};

    fn arena(width: usize, seed: u64) -> Arena {
        arena_of(18, width, seed)
    }

    fn arena_of(depth: usize, width: usize, seed: u64) -> Arena {
        let mut layout = Layout::new();
        let config = ResNetConfig {
            depth,
            width,
            stem: Stem::Small,
            zero_init_residual: false,
            norm_groups: 1,
            sk_ratio: 0.0,
            bottleneck: 1,
            project: false,
            same_pool: false,
            channels: 3,
        };
        ResNet::new(&mut layout, "backbone.", &config);
        Arena::new(&Arc::new(layout), &Device::cpu(1).unwrap(), seed)
    }

    #[test]
    fn a_saved_checkpoint_loads_and_old_ones_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let saved = arena(2, 1);
        let optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &saved);
        for step in [5, 30, 200] {
            save(folder.path(), step, &saved, &optimizer, Vec::new(), HashMap::new(), 2).unwrap();
        }
        let mut names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["step-00000030.safetensors", "step-00000200.safetensors"]);
        let mut loaded = arena(2, 2);
        load_weights(&newest(folder.path()).unwrap(), &mut loaded).unwrap();
        assert_eq!(loaded.values().to_f64(), saved.values().to_f64());
    }

    #[test]
    fn files_have_the_layout_of_torchvision() {
        let folder = tempfile::tempdir().unwrap();
        let saved = arena(2, 1);
        let optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &saved);
        let path =
            save(folder.path(), 1, &saved, &optimizer, Vec::new(), HashMap::new(), 1).unwrap();
        let data = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        let stem = file.tensor("backbone.conv1.weight").unwrap();
        assert_eq!(stem.shape(), [2, 3, 3, 3]);
        // Element [1, 2, 0, 1] on disk is filter 1, row 0, column 1, channel 2 of [2, 3, 3, 4].
        let at = ((3 + 2) * 3 * 3 + 1) * 4;
        let number = f32::from_le_bytes(stem.data()[at..at + 4].try_into().unwrap());
        let slot = &saved.layout().params()[0];
        assert_eq!(f64::from(number), saved.slot_values(slot)[((3 * 3) + 1) * 4 + 2]);
    }

    /// A ResNet-18 has a part of the slots of a ResNet-34, in the same shapes: read into it, they would be no network at all.
    #[test]
    fn weights_of_a_larger_backbone_are_refused_and_heads_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        export_backbone(&path, &arena_of(34, 2, 1)).unwrap();
        let error = init_weights(&path, &mut arena(2, 1)).unwrap_err().to_string();
        let expected = "has a tensor layer1.2.bn1.bias, which this network does not have: choose the architecture of the weights";
        assert!(error.ends_with(expected), "{error}");
        init_weights(&path, &mut arena_of(34, 2, 2)).unwrap();
        let one = || vec![1.0];
        let others = ["fc.bias", "layer1.0.bn1.num_batches_tracked", "momentum.layer9.weight"];
        let others = others.map(|name| Entry::floats(name.into(), vec![1], one));
        let small = arena(2, 1);
        let all: Vec<Entry<'_>> =
            Entry::network(&small, |slot| slot.strip_prefix(BACKBONE).map(str::to_owned))
                .chain(others)
                .collect();
        write_weights(&path, &all, HashMap::new(), || Ok(())).unwrap();
        init_weights(&path, &mut arena(2, 2)).unwrap();
    }

    #[test]
    fn another_network_is_refused_with_both_shapes() {
        let folder = tempfile::tempdir().unwrap();
        let saved = arena(2, 1);
        let optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &saved);
        let path =
            save(folder.path(), 1, &saved, &optimizer, Vec::new(), HashMap::new(), 1).unwrap();
        let error = load_weights(&path, &mut arena(3, 1)).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "backbone.conv1.weight is F32 [2, 3, 3, 3]; this network has F32 [3, 3, 3, 3]"
            ),
            "{error}"
        );
        std::fs::write(&path, b"garbage").unwrap();
        let error = load_weights(&path, &mut arena(2, 1)).unwrap_err().to_string();
        assert!(error.contains("truncated or corrupt safetensors file"), "{error}");
    }
}

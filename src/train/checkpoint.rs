//! Checkpoints: safetensors files in torchvision's names and layout.
//!
//! Filters are `[k, c, r, s]` with the channels that exist, so that PyTorch loads the trunk with `load_state_dict`. Momentum
//! lies beside each parameter under `momentum.`, what a method owns under `method.`: the slots of a second network with its
//! name before theirs, queues, counters. A file is written under a temporary name, synced and renamed: there is
//! the old one or the new one, never half of one.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::arena::{Arena, Slot, SlotKind};
use crate::error::{Error, Result};
use crate::methods::State;
use crate::optim::Optimizer;
use crate::tensor::Tensor;

const PREFIX: &str = "step-";
const SUFFIX: &str = ".safetensors";
const MOMENTUM: &str = "momentum.";
const METHOD: &str = "method.";

/// A tensor of a file: name, dtype, shape, bytes.
type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

fn push_network(tensors: &mut Vec<Entry>, prefix: &str, arena: &Arena) {
    let layout = arena.layout();
    for slot in layout.params().iter().chain(layout.stats()) {
        let (shape, values) = to_disk(slot, &arena.slot_values(slot));
        tensors.push((format!("{prefix}{}", slot.name), Dtype::F32, shape, bytes(&values)));
    }
}

/// Writes weights, running statistics, momentum and a method's `state` to `folder/step-NNNNNNNN.safetensors` with `metadata` in the header, and
/// removes all but the newest `keep` checkpoints of the folder. Returns the file.
///
/// # Errors
/// When the disk is full or gone, or the device failed; earlier checkpoints are then as they were.
pub fn save(
    folder: &Path,
    step: u64,
    arena: &Arena,
    optimizer: &Optimizer,
    state: Vec<(&'static str, State<'_>)>,
    metadata: HashMap<String, String>,
    keep: usize,
) -> Result<PathBuf> {
    let layout = arena.layout();
    let mut tensors: Vec<Entry> = Vec::new();
    push_network(&mut tensors, "", arena);
    for slot in layout.params() {
        let momentum = optimizer.momentum().slice(slot.offset, slot.shape).to_f64();
        let (shape, values) = to_disk(slot, &momentum);
        tensors.push((format!("{MOMENTUM}{}", slot.name), Dtype::F32, shape, bytes(&values)));
    }
    for (name, part) in state {
        let name = format!("{METHOD}{name}");
        match part {
            State::Network(network) => push_network(&mut tensors, &format!("{name}."), network),
            State::Rows(rows) => {
                tensors.push((name, Dtype::F32, rows.shape().to_vec(), bytes(&rows.to_f64())));
            }
            State::Count(count) => {
                tensors.push((name, Dtype::U64, vec![1], count.to_le_bytes().to_vec()));
            }
        }
    }
    arena.device().check()?; // what a failed device gives is not worth keeping
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        (name.as_str(), view.expect("the bytes are the shape's"))
    });
    let data = safetensors::serialize(views, Some(metadata))
        .expect("names are unique and shapes are their data's");

    let path = folder.join(format!("{PREFIX}{step:08}{SUFFIX}"));
    let partial = folder.join(format!(".{PREFIX}{step:08}.partial"));
    let written = File::create(&partial)
        .and_then(|mut file| file.write_all(&data).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&partial, &path));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial); // the first error is the one to tell
    }
    written.map_err(Error::io(&path))?;
    // The rename itself must survive a power cut, too.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all(); // not every file system can
    }
    let old = checkpoints(folder)?;
    for (_, old) in old.iter().rev().skip(keep.max(1)) {
        std::fs::remove_file(old).map_err(Error::io(old))?;
    }
    Ok(path)
}

/// The newest checkpoint of a run's folder.
///
/// # Errors
/// When the folder cannot be read or holds none.
pub fn newest(folder: &Path) -> Result<PathBuf> {
    checkpoints(folder)?
        .pop()
        .map(|(_, path)| path)
        .ok_or_else(|| Error::format(folder, "holds no checkpoint (step-*.safetensors)"))
}

/// Checkpoints of a folder by step.
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

/// Reads a weight file whole.
///
/// # Errors
/// When it cannot be read.
pub fn weights_in(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(path))
}

/// Fills an arena's weights and running statistics from a checkpoint; nothing is changed unless all of them fit.
///
/// # Errors
/// When the file is damaged, a slot is missing or has another shape: the first mismatch is named with both shapes.
pub fn load_weights(path: &Path, arena: &mut Arena) -> Result<()> {
    fill(path, &parse(path, &weights_in(path)?)?, "", arena, |_| true)
}

/// Fills what an arena has in common with a weight file, to start a run from: the trunk whole, with torchvision's names or with
/// `backbone.` before them; heads where the file has them.
///
/// # Errors
/// When the file is damaged, a slot of the trunk is missing, or a slot has another shape.
pub fn init_weights(path: &Path, arena: &mut Arena) -> Result<()> {
    let data = weights_in(path)?;
    let file = parse(path, &data)?;
    let plain = !file.names().iter().any(|name| name.starts_with(TRUNK));
    let has = |name: &str| file.tensor(name).is_ok();
    let strip = if plain { TRUNK } else { "" };
    fill(path, &file, strip, arena, |name| name.starts_with(TRUNK) || has(name))
}

/// Fills a method's `state` from a checkpoint, in place.
///
/// # Errors
/// When the file is damaged, or a part is missing or has another shape: the run cannot go on from it.
pub fn load_state(path: &Path, state: Vec<(&'static str, State<'_>)>) -> Result<()> {
    let data = weights_in(path)?;
    let file = parse(path, &data)?;
    for (name, part) in state {
        let name = format!("{METHOD}{name}");
        match part {
            State::Network(network) => {
                // Files have the prefix that slots do not.
                fill_named(path, &file, network, |slot| Some(format!("{name}.{slot}")))?;
            }
            State::Rows(rows) => {
                let numbers = numbers(path, &file, &name, rows.shape())?;
                *rows = Tensor::from_f64(&rows.device().clone(), *rows.shape(), &numbers);
            }
            State::Count(count) => {
                let tensor = file.tensor(&name).map_err(|_| missing(path, &name))?;
                let bytes = tensor.data().try_into().map_err(|_| {
                    Error::Weights(format!("{}: {name} is no counter", path.display()))
                })?;
                *count = u64::from_le_bytes(bytes);
            }
        }
    }
    Ok(())
}

/// What trunks' names begin with in a run's own checkpoints.
const TRUNK: &str = "backbone.";

fn parse<'a>(path: &Path, data: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(data)
        .map_err(|e| Error::format(path, format!("is no whole safetensors file: {e}")))
}

fn missing(path: &Path, name: &str) -> Error {
    Error::Weights(format!("{}: has no tensor {name}, which this network needs", path.display()))
}

/// Fills the wanted slots, whose names in the file lack `strip`.
fn fill(
    path: &Path,
    file: &SafeTensors<'_>,
    strip: &str,
    arena: &mut Arena,
    wanted: impl Fn(&str) -> bool,
) -> Result<()> {
    fill_named(path, file, arena, |slot| {
        wanted(slot).then(|| slot.strip_prefix(strip).unwrap_or(slot).to_owned())
    })
}

/// Fills the slots for which `name` has one in the file; nothing is changed unless all of them fit.
fn fill_named(
    path: &Path,
    file: &SafeTensors<'_>,
    arena: &mut Arena,
    name: impl Fn(&str) -> Option<String>,
) -> Result<()> {
    let layout = arena.layout().clone();
    let mut values = arena.values().to_f64();
    let mut statistics = arena.statistics().to_f64();
    for (slots, into) in [(layout.params(), &mut values), (layout.stats(), &mut statistics)] {
        for slot in slots {
            let Some(name) = name(&slot.name) else { continue };
            let numbers = numbers(path, file, &name, &disk_shape(slot))?;
            into[slot.offset..][..slot.shape.elements()]
                .copy_from_slice(&from_disk(slot, &numbers));
        }
    }
    let device = arena.device().clone();
    *arena.values_mut() = Tensor::from_f64(&device, [values.len()], &values);
    *arena.statistics_mut() = Tensor::from_f64(&device, [statistics.len()], &statistics);
    Ok(())
}

/// The numbers of an f32 tensor of this shape.
fn numbers(path: &Path, file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
    let tensor = file.tensor(name).map_err(|_| missing(path, name))?;
    if tensor.shape() != shape || tensor.dtype() != Dtype::F32 {
        return Err(Error::Weights(format!(
            "{}: {name} is {:?} {:?}; this network has F32 {shape:?}",
            path.display(),
            tensor.dtype(),
            tensor.shape(),
        )));
    }
    let number = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(tensor.data().chunks_exact(4).map(number).collect())
}

fn bytes(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect()
}

/// A slot's shape in files: filters `[k, c, r, s]`, without the device's padding.
fn disk_shape(slot: &Slot) -> Vec<usize> {
    match (slot.kind, &*slot.shape) {
        (SlotKind::Filter, &[k, r, s, _]) => vec![k, slot.channels, r, s],
        (_, shape) => shape.to_vec(),
    }
}

/// For each element on disk, its place in the slot.
fn places(slot: &Slot) -> impl Iterator<Item = usize> {
    let (k, r, s, c, channels) = match (slot.kind, &*slot.shape) {
        (SlotKind::Filter, &[k, r, s, c]) => (k, r, s, c, slot.channels),
        (_, shape) => (1, 1, shape.iter().product(), 1, 1),
    };
    (0..k * channels * r * s).map(move |i| {
        let (pixel, rest) = (i % (r * s), i / (r * s));
        let (channel, filter) = (rest % channels, rest / channels);
        (filter * r * s + pixel) * c + channel
    })
}

fn to_disk(slot: &Slot, values: &[f64]) -> (Vec<usize>, Vec<f64>) {
    (disk_shape(slot), places(slot).map(|place| values[place]).collect())
}

fn from_disk(slot: &Slot, numbers: &[f64]) -> Vec<f64> {
    let mut values = vec![0.0; slot.shape.elements()];
    for (place, number) in places(slot).zip(numbers) {
        values[place] = *number;
    }
    values
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::arena::Layout;
    use crate::device::Device;
    use crate::nn::{ResNet, ResNetConfig, Stem};
    use crate::optim::{Lars, Rule};

    fn arena(width: usize, seed: u64) -> Arena {
        let mut layout = Layout::new();
        let config = ResNetConfig {
            depth: 18,
            width,
            stem: Stem::Small,
            zero_init_residual: false,
            norm_groups: 1,
            sk_ratio: 0.0,
        };
        ResNet::new(&mut layout, "backbone.", &config);
        Arena::new(&Arc::new(layout), &Device::cpu(1).unwrap(), seed)
    }

    #[test]
    fn what_was_saved_is_loaded_and_old_files_go() {
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
    fn files_hold_torchvisions_layout() {
        let folder = tempfile::tempdir().unwrap();
        let saved = arena(2, 1);
        let optimizer = Optimizer::new(Rule::Lars(Lars::simclr(0.9, 1e-4)), &saved);
        let path =
            save(folder.path(), 1, &saved, &optimizer, Vec::new(), HashMap::new(), 1).unwrap();
        let data = weights_in(&path).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        let stem = file.tensor("backbone.conv1.weight").unwrap();
        assert_eq!(stem.shape(), [2, 3, 3, 3]);
        // Element [1, 2, 0, 1] on disk is filter 1, row 0, column 1, channel 2 of [2, 3, 3, 4].
        let at = ((3 + 2) * 3 * 3 + 1) * 4;
        let number = f32::from_le_bytes(stem.data()[at..at + 4].try_into().unwrap());
        let slot = &saved.layout().params()[0];
        assert_eq!(f64::from(number), saved.slot_values(slot)[((3 * 3) + 1) * 4 + 2]);
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
        assert!(error.contains("is no whole safetensors file"), "{error}");
    }
}

//! Weight files: safetensors in torchvision's names and layout.
//!
//! Filters are stored as `[k, c, r, s]` without the device's channel padding, so that PyTorch loads a backbone with
//! `load_state_dict`. A file is never trusted: its header is read first and compared with the file's length, and names, dtypes
//! and shapes are compared with the network's before anything is allocated for a tensor. Tensors are read and written one at a
//! time. A file is written under a temporary name, synced and renamed: a reader sees the old file or the new one, never a part.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, View};
use safetensors::{SafeTensorError, serialize_to_file};

use crate::arena::{Arena, Slot, SlotKind};
use crate::error::{Error, Result};
use crate::files::{replace_file, write_error};
use crate::tensor::Tensor;

/// The longest header that is accepted: the limit of the safetensors crate.
const HEADER_LIMIT: u64 = 100_000_000;

/// A weight file whose header has been read; its tensors are read one at a time.
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Offset of the first tensor's bytes.
    data: u64,
}

impl WeightFile {
    /// Opens a file and reads its header.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let damaged = |reason: String| {
            Error::format(path, format!("truncated or corrupt safetensors file: {reason}"))
        };
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a folder" } else { "not a regular file" };
            return Err(Error::format(path, format!("{what}, where a weight file is expected")));
        }
        let (mut file, length) = (File::open(path).map_err(Error::io(path))?, metadata.len());
        let mut start = Vec::new();
        file.by_ref().take(START).read_to_end(&mut start).map_err(Error::io(path))?;
        if let Some(what) = other_format(path, &start) {
            return Err(Error::format(path, what));
        }
        let Some(size) = start.first_chunk::<8>() else {
            return Err(damaged(format!("its length is {length} bytes")));
        };
        let size = u64::from_le_bytes(*size);
        if size > HEADER_LIMIT.min(length.saturating_sub(8)) {
            let reason =
                format!("it declares a header of {size} bytes, but its length is {length} bytes");
            return Err(damaged(reason));
        }
        let mut header = vec![0; size as usize];
        let read = file.seek(SeekFrom::Start(8)).and_then(|_| file.read_exact(&mut header));
        read.map_err(Error::io(path))?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| damaged(format!("its header cannot be read ({e})")))?;
        let (announced, there) = (header.data_len() as u64, length - 8 - size);
        if announced != there {
            let reason =
                format!("its header declares {announced} bytes of tensors, but {there} follow it");
            return Err(damaged(reason));
        }
        Ok(Self { path: path.to_path_buf(), file, header, data: 8 + size })
    }

    /// The file's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// An entry of the header's `__metadata__` table.
    pub(super) fn note(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The names of all tensors, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of the tensor of this name, if the file has it.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| &*info.shape)
    }

    /// Checks that the file has floats of this name and shape; returns dtype, offset and length in bytes.
    fn floats(&self, name: &str, shape: &[usize]) -> Result<(Dtype, u64, usize)> {
        let path = self.path.display();
        let info = self.header.info(name).ok_or_else(|| {
            Error::Weights(format!("{path}: has no tensor {name}, which this network needs"))
        })?;
        let float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        if info.shape != shape || !float {
            return Err(Error::Weights(format!(
                "{path}: {name} is {:?} {:?}; this network has F32 {shape:?}",
                info.dtype, info.shape,
            )));
        }
        let (from, to) = info.data_offsets;
        Ok((info.dtype, self.data + from as u64, to - from))
    }

    fn bytes(&mut self, from: u64, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        let read = self.file.seek(SeekFrom::Start(from));
        read.and_then(|_| self.file.read_exact(&mut bytes)).map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// Reads a tensor of floats of this shape, row-major.
    pub(super) fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let (dtype, from, count) = self.floats(name, shape)?;
        let bytes = self.bytes(from, count)?;
        let number: fn(&[u8]) -> f64 = match dtype {
            Dtype::F64 => |b| f64::from_le_bytes(b.try_into().expect("chunks of 8")),
            Dtype::F16 => |b| f64::from(f16::from_le_bytes([b[0], b[1]])),
            Dtype::BF16 => |b| f64::from(bf16::from_le_bytes([b[0], b[1]])),
            _ => |b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        };
        Ok(bytes.chunks_exact(dtype.bitsize() / 8).map(number).collect())
    }

    /// Reads a counter.
    pub(super) fn count(&mut self, name: &str) -> Result<u64> {
        let info = self.header.info(name).map(|info| (info.dtype, &*info.shape, info.data_offsets));
        let Some((Dtype::U64, [1], (from, _))) = info else {
            let path = self.path.display();
            return Err(Error::Weights(match info {
                Some(_) => format!("{path}: {name} is not a counter (U64 [1])"),
                None => format!("{path}: has no tensor {name}, which this network needs"),
            }));
        };
        let bytes = self.bytes(self.data + from as u64, 8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("8 were asked for")))
    }

    /// Whether a filter of the file has other inputs than the slot and is otherwise alike.
    fn has_other_inputs(&self, name: &str, slot: &Slot) -> bool {
        let wanted = disk_shape(slot);
        self.shape(name).is_some_and(|shape| {
            shape.len() == 4
                && wanted.len() == 4
                && shape[1] != wanted[1]
                && [shape[0], shape[2], shape[3]] == [wanted[0], wanted[2], wanted[3]]
        })
    }

    /// Like [`WeightFile::fill_finite`]; the filters over images of three channels that the slot called `over_images` gets are
    /// fitted to its channels: for one channel they are added up, for more they are repeated in turn and scaled by `3 / channels`,
    /// so that a grey image gives what it gave. Returns whether they were.
    pub(super) fn fill_fitted(
        &mut self,
        arena: &mut Arena,
        over_images: &str,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<bool> {
        let layout = arena.layout().clone();
        let slot = layout.params().iter().find(|slot| slot.name == over_images);
        let other = slot.and_then(|slot| Some((slot, name(&slot.name)?)));
        let other = other.filter(|(slot, name)| {
            self.has_other_inputs(name, slot) && self.shape(name).is_some_and(|s| s[1] == 3)
        });
        let Some((slot, file_name)) = other else {
            return self.fill_finite(arena, name).map(|()| false);
        };
        let shape = disk_shape(slot);
        let numbers = self.numbers(&file_name, &[shape[0], 3, shape[2], shape[3]])?;
        check_numbers(&self.path, &file_name, &numbers)?;
        let fitted = fitted(&numbers, shape[0], shape[1], shape[2] * shape[3]);
        self.fill_finite(arena, |slot| name(slot).filter(|_| slot != over_images))?;
        let mut values = arena.values().to_f64();
        values[slot.offset..][..slot.shape.elements()].copy_from_slice(&from_disk(slot, &fitted));
        *arena.values_mut() = Tensor::from_f64(arena.device(), [values.len()], &values);
        Ok(true)
    }

    /// Fills the slots that `name` maps to a tensor of the file. The arena is unchanged unless all of them fit.
    pub(super) fn fill(
        &mut self,
        arena: &mut Arena,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        self.fill_if(arena, name, |_, _, _| Ok(()))
    }

    /// Like [`WeightFile::fill`], for weights that are used as they are: refuses NaN, infinite numbers and negative running
    /// variances, with which every figure would be that of chance.
    pub(super) fn fill_finite(
        &mut self,
        arena: &mut Arena,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        self.fill_if(arena, name, check_numbers)
    }

    fn fill_if(
        &mut self,
        arena: &mut Arena,
        name: impl Fn(&str) -> Option<String>,
        check: impl Fn(&Path, &str, &[f64]) -> Result<()>,
    ) -> Result<()> {
        let layout = arena.layout().clone();
        for slot in layout.params().iter().chain(layout.stats()) {
            if let Some(name) = name(&slot.name) {
                self.floats(&name, &disk_shape(slot))?;
            }
        }
        let mut values = arena.values().to_f64();
        let mut statistics = arena.statistics().to_f64();
        self.read_slots_if(layout.params(), &mut values, &name, &check)?;
        self.read_slots_if(layout.stats(), &mut statistics, &name, &check)?;
        let device = arena.device().clone();
        *arena.values_mut() = Tensor::from_f64(&device, [values.len()], &values);
        *arena.statistics_mut() = Tensor::from_f64(&device, [statistics.len()], &statistics);
        Ok(())
    }

    /// Reads the slots that `name` maps to a tensor of the file into their places in `into`, an arena's values.
    pub(super) fn read_slots(
        &mut self,
        slots: &[Slot],
        into: &mut [f64],
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        self.read_slots_if(slots, into, name, |_, _, _| Ok(()))
    }

    fn read_slots_if(
        &mut self,
        slots: &[Slot],
        into: &mut [f64],
        name: impl Fn(&str) -> Option<String>,
        check: impl Fn(&Path, &str, &[f64]) -> Result<()>,
    ) -> Result<()> {
        for slot in slots {
            if let Some(name) = name(&slot.name) {
                let numbers = self.numbers(&name, &disk_shape(slot))?;
                check(&self.path, &name, &numbers)?;
                into[slot.offset..][..slot.shape.elements()]
                    .copy_from_slice(&from_disk(slot, &numbers));
            }
        }
        Ok(())
    }
}

/// `filters` over three channels, each of `taps` taps, for `channels`.
fn fitted(numbers: &[f64], filters: usize, channels: usize, taps: usize) -> Vec<f64> {
    let at =
        |filter: usize, channel: usize, tap: usize| numbers[(filter * 3 + channel) * taps + tap];
    let all = (0..filters).flat_map(|f| (0..channels).map(move |c| (f, c)));
    all.flat_map(|(f, c)| (0..taps).map(move |t| (f, c, t)))
        .map(|(f, c, t)| match channels {
            1 => (0..3).map(|c| at(f, c, t)).sum(),
            _ => at(f, c % 3, t) * 3.0 / channels as f64,
        })
        .collect()
}

/// Refuses NaN, numbers beyond f32, and negative running variances.
fn check_numbers(path: &Path, name: &str, numbers: &[f64]) -> Result<()> {
    let refuse = |what: String| Err(Error::Weights(format!("{}: {name} {what}", path.display())));
    if let Some((i, v)) = numbers.iter().enumerate().find(|(_, v)| !(**v as f32).is_finite()) {
        let bad = numbers.iter().filter(|v| !(**v as f32).is_finite()).count();
        return refuse(format!(
            "has {bad} of {} numbers that are NaN or infinite (the first is {v}, at {i}): use another checkpoint",
            numbers.len()
        ));
    }
    let negative = numbers.iter().position(|&v| v < 0.0);
    if let Some(i) = negative.filter(|_| name.ends_with("running_var")) {
        return refuse(format!("is a running variance and negative ({}, at {i})", numbers[i]));
    }
    Ok(())
}

/// Bytes from which a file's format is recognised.
const START: u64 = 1024;

/// Says what a file is, and what to do about it, if its first bytes are those of a format that weights often come in.
fn other_format(path: &Path, start: &[u8]) -> Option<String> {
    if start.get(8) == Some(&b'{') {
        return None; // as every safetensors file
    }
    let begins = |part: &[u8]| start.starts_with(part);
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let holds = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
    // The second byte of a pickle is its protocol, 2 to 5; a legacy PyTorch file is a chain of pickles.
    let is_pickle = matches!(start, [0x80, 2..=5, ..]);
    let is_zip = start.starts_with(b"PK\x03\x04");
    if is_pickle || is_zip && (holds(b"/data.pkl") || holds(b"/version") || holds(b"/byteorder")) {
        Some(format!("a PyTorch file (pickle), and only safetensors is read: {}", conversion(path)))
    } else if is_zip {
        Some("a zip archive, not a safetensors file: unpack it first".into())
    } else if start.starts_with(b"\x1f\x8b") {
        Some("a gzip file, not a safetensors file: unpack it first (gunzip)".into())
    } else if text.starts_with("version https://git-lfs") {
        Some("a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`".into())
    } else if begins(b"\x89HDF\r\n") {
        Some("an HDF5 file (Keras), and only safetensors with PyTorch's names is read".into())
    } else if begins(b"GGUF") {
        Some("a GGUF file, and only safetensors is read".into())
    } else if begins(b"\x93NUMPY") {
        Some("an array of NumPy, and only safetensors is read".into())
    } else if start.get(257..262) == Some(b"ustar") {
        Some("a tar archive, not a safetensors file: unpack it first".into())
    } else if holds(b"\"weight_map\"") {
        Some("an index of weights in several files: join the files that it names into one".into())
    } else if is_onnx(path, start) {
        Some("an ONNX file, and only safetensors is read".into())
    } else if text.starts_with("<!doctype html") || text.starts_with("<html") {
        Some("a web page (HTML), not a safetensors file: download the file itself".into())
    } else {
        None
    }
}

/// Whether a file is an ONNX model: a protobuf message of IR version and producer, whatever its name; or named like one.
fn is_onnx(path: &Path, start: &[u8]) -> bool {
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx"));
    named || matches!(start, [0x08, 1..=20, 0x12, length, ..] if (1..64).contains(length))
}

/// The line of Python that converts a PyTorch file.
fn conversion(path: &Path) -> String {
    let from = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+ ".contains(c);
    let from = if from.chars().all(plain) { from } else { "FILE.pth".into() };
    let to = Path::new(&from).with_extension("safetensors").display().to_string();
    format!(
        "convert it with python3 -c \"import torch, safetensors.torch as s; m = torch.load('{from}', map_location='cpu', weights_only=True); \
         m = m.get('state_dict', m.get('model', m)); \
         s.save_file({{k: v.clone().contiguous() for k, v in m.items() if torch.is_tensor(v)}}, '{to}')\""
    )
}

/// Names under which public checkpoints hold a backbone: parts of the prefixes that are stripped.
const PREFIX_PARTS: [&str; 20] = [
    "_orig_mod",
    "backbone",
    "base_encoder",
    "convnet",
    "encoder",
    "encoder_q",
    "feature_extractor",
    "model",
    "module",
    "momentum_encoder",
    "net",
    "network",
    "online_encoder",
    "online_network",
    "resnet",
    "state_dict",
    "student",
    "target_encoder",
    "teacher",
    "trunk",
];

/// Pairs of which a file may hold both; the published evaluation uses the first: MoCo v3's main_lincls.py the base encoder,
/// BYOL's the online network, DINO's eval_linear.py the teacher.
const PREFERRED: [[&str; 2]; 5] = [
    ["base_encoder", "momentum_encoder"],
    ["encoder", "momentum_encoder"],
    ["online_encoder", "target_encoder"],
    ["online_network", "target_encoder"],
    ["teacher", "student"],
];

impl WeightFile {
    /// Returns what stands before the name of each of `slots` in the file: nothing, a chain of the prefixes that public
    /// checkpoints use, such as `module.encoder_q.`, or, without either, the only prefix under which all slots are there.
    pub(super) fn common_prefix(&self, slots: &[&str]) -> Result<String> {
        let names: BTreeSet<String> = self.names().into_iter().collect();
        let Some(first) = slots.first() else { return Ok(String::new()) };
        let is_chain = |prefix: &str| {
            prefix.is_empty()
                || prefix
                    .strip_suffix('.')
                    .is_some_and(|parts| parts.split('.').all(|part| PREFIX_PARTS.contains(&part)))
        };
        let prefixes = names.iter().filter_map(|name| name.strip_suffix(first));
        let prefixes: Vec<&str> =
            prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')).collect();
        let found = |prefix: &str| {
            slots.iter().filter(|slot| names.contains(&format!("{prefix}{slot}"))).count()
        };
        let mut complete: Vec<&str> =
            prefixes.iter().copied().filter(|prefix| found(prefix) == slots.len()).collect();
        if complete.iter().any(|prefix| is_chain(prefix)) {
            complete.retain(|prefix| is_chain(prefix));
        }
        let has = |prefix: &str, part: &str| prefix.split('.').any(|own| own == part);
        let is_second = |prefix: &str| {
            PREFERRED.iter().any(|[preferred, other]| {
                has(prefix, other) && complete.iter().any(|one| has(one, preferred))
            })
        };
        let chosen: Vec<&str> =
            complete.iter().copied().filter(|prefix| !is_second(prefix)).collect();
        match (&*chosen, prefixes.iter().max_by_key(|prefix| found(prefix))) {
            ([prefix], _) => Ok((*prefix).to_owned()),
            // The message about the first missing tensor then names it as the file would.
            ([], Some(nearest)) => Ok((*nearest).to_owned()),
            ([], None) => Err(Error::Weights(format!(
                "{}: has no tensor {first}, with or without a prefix such as module.; its first tensor is {}",
                self.path.display(),
                names.first().map_or("missing, too", String::as_str)
            ))),
            (several, _) => Err(Error::Weights(format!(
                "{}: holds several backbones, under {}: keep one of them",
                self.path.display(),
                several
                    .iter()
                    .map(|prefix| format!("`{prefix}`"))
                    .collect::<Vec<_>>()
                    .join(" and ")
            ))),
        }
    }
}

/// A tensor to be written. Its bytes are made when its turn comes, so that one tensor at a time is in memory.
pub(crate) struct Entry<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Box<dyn Fn() -> Vec<u8> + 'a>,
}

impl<'a> Entry<'a> {
    /// A tensor of f32.
    pub(crate) fn floats(
        name: String,
        shape: Vec<usize>,
        values: impl Fn() -> Vec<f64> + 'a,
    ) -> Self {
        let le = |v: f64| (v as f32).to_le_bytes();
        let bytes = Box::new(move || values().into_iter().flat_map(le).collect());
        Self { name, dtype: Dtype::F32, shape, bytes }
    }

    /// Classes of images; -1 for an image without a label.
    pub(crate) fn labels(name: String, labels: &'a [i32]) -> Self {
        let le = |&label: &i32| i64::from(label).to_le_bytes();
        let bytes = Box::new(move || labels.iter().flat_map(le).collect());
        Self { name, dtype: Dtype::I64, shape: vec![labels.len()], bytes }
    }

    /// A counter.
    pub(super) fn count(name: String, count: u64) -> Self {
        let bytes = Box::new(move || count.to_le_bytes().to_vec());
        Self { name, dtype: Dtype::U64, shape: vec![1], bytes }
    }

    /// A slot, from values in the device's layout.
    pub(super) fn slot(name: String, slot: &'a Slot, values: impl Fn() -> Vec<f64> + 'a) -> Self {
        Self::floats(name, disk_shape(slot), move || to_disk(slot, &values()))
    }

    /// The slots of a network that `name` maps to a name.
    pub(super) fn network(
        arena: &'a Arena,
        name: impl Fn(&str) -> Option<String>,
    ) -> impl Iterator<Item = Self> {
        let slots = arena.layout().params().iter().chain(arena.layout().stats());
        slots.filter_map(move |slot| {
            Some(Self::slot(name(&slot.name)?, slot, move || arena.slot_values(slot)))
        })
    }
}

/// The slots of a network that `name` maps to a name, each with shape and values as files have them.
pub(super) fn stored_values<'a>(
    arena: &'a Arena,
    name: impl Fn(&str) -> Option<String> + 'a,
) -> impl Iterator<Item = (String, (Vec<usize>, Vec<f64>))> + 'a {
    let slots = arena.layout().params().iter().chain(arena.layout().stats());
    slots.filter_map(move |slot| {
        let values = to_disk(slot, &arena.slot_values(slot));
        Some((name(&slot.name)?, (disk_shape(slot), values)))
    })
}

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (self.bytes)().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a weight file atomically. `sound` is called once all values have been read from their device, before the file is
/// renamed into place: a failed device must not replace a good file.
pub(crate) fn write_weights(
    path: &Path,
    entries: &[Entry<'_>],
    notes: HashMap<String, String>,
    sound: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let entries = entries.iter().map(|entry| (&*entry.name, entry));
    replace_file(path, |partial| {
        serialize_to_file(entries, Some(notes), partial).map_err(|error| match error {
            SafeTensorError::IoError(error) => write_error(path, error),
            other => unreachable!("names are unique and shapes are their data's: {other}"),
        })?;
        sound()
    })
}

/// A slot's shape in files: filters are `[k, c, r, s]`, without the device's channel padding.
fn disk_shape(slot: &Slot) -> Vec<usize> {
    match (slot.kind, &*slot.shape) {
        (SlotKind::Filter, &[k, r, s, _]) => vec![k, slot.channels, r, s],
        (_, shape) => shape.to_vec(),
    }
}

/// For each element in the file's order, its index in the slot's device layout.
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

fn to_disk(slot: &Slot, values: &[f64]) -> Vec<f64> {
    places(slot).map(|place| values[place]).collect()
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
    use crate::arena::{Init, Layout};
    use crate::device::Device;

    /// A file with these tensors of f32, each of one number.
    fn write(path: &Path, tensors: &[(&str, f64)]) {
        let entry = |&(name, value): &(&str, f64)| {
            Entry::floats(name.to_owned(), vec![1], move || vec![value])
        };
        let entries: Vec<Entry<'_>> = tensors.iter().map(entry).collect();
        write_weights(path, &entries, HashMap::new(), || Ok(())).unwrap();
    }

    #[test]
    fn a_prefix_that_all_tensors_share_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let slots = ["conv1.weight", "bn1.running_var", "layer1.0.conv1.weight"];
        let found = |prefixes: &[&str], more: &[&str]| {
            let names = prefixes.iter().flat_map(|p| slots.map(|slot| format!("{p}{slot}")));
            let names: Vec<String> = names.chain(more.iter().map(|s| s.to_string())).collect();
            write(&path, &names.iter().map(|name| (&**name, 1.0)).collect::<Vec<_>>());
            WeightFile::open(&path).unwrap().common_prefix(&slots).map_err(|e| e.to_string())
        };
        let chains = [
            "",
            "module.",
            "encoder_q.",
            "module.encoder_q.",
            "backbone.",
            "model.",
            "encoder.",
            "online_encoder.",
            "online_encoder.net.",
            "state_dict.module.",
            "student.backbone.",
            "teacher.",
            "base_encoder.",
            "module.momentum_encoder.",
            "net.",
            "resnet.",
            "trunk.",
            "convnet.",
        ];
        for prefix in chains {
            assert_eq!(found(&[prefix], &["fc.weight", "module.fc.bias"]).unwrap(), prefix);
        }
        // What the published evaluation uses.
        for (both, chosen) in [
            (["module.base_encoder.", "module.momentum_encoder."], "module.base_encoder."),
            (["student.backbone.", "teacher.backbone."], "teacher.backbone."),
            (["module.encoder_k.", "module.encoder_q."], "module.encoder_q."),
        ] {
            assert_eq!(found(&both, &[]).unwrap(), chosen);
        }
        // Any other prefix, if it is the only one.
        for (prefixes, chosen) in [
            (&["img_backbone.body."][..], "img_backbone.body."),
            (&["a.encoder_k."], "a.encoder_k."),
            (&["a.", "module."], "module."),
        ] {
            assert_eq!(found(prefixes, &["b.conv1.weight"]).unwrap(), chosen);
        }
        let error = found(&["a.", "b."], &[]).unwrap_err();
        assert!(error.contains("several backbones, under `a.` and `b.`"), "{error}");
        let error = found(&["", "module."], &[]).unwrap_err();
        assert!(
            error.ends_with("several backbones, under `` and `module.`: keep one of them"),
            "{error}"
        );
        // Not shared by all: the nearest, so that what is missing is named.
        assert_eq!(
            found(&[], &["module.conv1.weight", "module.bn1.running_var"]).unwrap(),
            "module."
        );
        let error = found(&[], &["blocks.0.attn.weight", "my_conv1.weight"]).unwrap_err();
        assert!(
            error.contains("no tensor conv1.weight") && error.contains("blocks.0.attn.weight"),
            "{error}"
        );
    }

    #[test]
    fn other_formats_are_named_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let zip =
            |name: &str| [&b"PK\x03\x04\x00\x00\x08\x08"[..], &[0; 22], name.as_bytes()].concat();
        let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
        let pytorch = "a PyTorch file (pickle), and only safetensors is read: convert it with python3 -c \"import torch";
        for (name, bytes, expected) in [
            ("zip.pth", zip("archive/data.pkl"), pytorch),
            ("old.pt", legacy, pytorch),
            ("photos.zip", zip("photos/a.jpg"), "a zip archive"),
            ("w.safetensors.gz", b"\x1f\x8b\x08\0\0\0\0\0".to_vec(), "a gzip file"),
            (
                "lfs",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n".to_vec(),
                "a Git LFS pointer",
            ),
            ("page", b"\n<!DOCTYPE html><html>".to_vec(), "a web page"),
            ("keras.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0".to_vec(), "an HDF5 file"),
            ("llm.gguf", b"GGUF\x03\0\0\0\0\0\0\0".to_vec(), "a GGUF file"),
            ("a.npy", b"\x93NUMPY\x01\0v\0{".to_vec(), "an array of NumPy"),
            ("w.onnx", b"\x08\x07\x12\x07pytorch\x1a".to_vec(), "an ONNX file"),
            ("w.tar", [&[b'x'; 257][..], b"ustar\0"].concat(), "a tar archive"),
            (
                "model.safetensors.index.json",
                b"{\"metadata\":{},\"weight_map\":{\"a\":\"b\"}}".to_vec(),
                "an index of weights in several files",
            ),
            ("empty", Vec::new(), "truncated or corrupt safetensors file: its length is 0 bytes"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = WeightFile::open(&path).err().expect(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
        let error = WeightFile::open(&folder.path().join("old.pt")).err().unwrap().to_string();
        let line = "/old.pt', map_location='cpu', weights_only=True)";
        assert!(error.contains(line) && error.contains("/old.safetensors')\""), "{error}");
        let error = WeightFile::open(folder.path()).err().unwrap().to_string();
        assert!(error.ends_with("a folder, where a weight file is expected"), "{error}");
    }

    #[test]
    fn weights_that_are_not_finite_are_refused_by_name_and_leave_the_arena_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let mut layout = Layout::new();
        layout.param("bn1.weight", [1], SlotKind::Bias, Init::Constant(3.0));
        layout.param("bn1.running_var", [1], SlotKind::Bias, Init::Constant(3.0));
        let mut arena = Arena::new(&Arc::new(layout), &Device::reference(), 0);
        let before = arena.values().to_f64();
        let mut fill = |weight: f64, variance: f64| {
            write(&path, &[("bn1.weight", weight), ("bn1.running_var", variance)]);
            let mut file = WeightFile::open(&path).unwrap();
            let result = file.fill_finite(&mut arena, |slot| Some(slot.to_owned()));
            result.map_err(|e| (e.to_string(), arena.values().to_f64()))
        };
        for (weight, variance, expected) in [
            (
                f64::NAN,
                1.0,
                "bn1.weight has 1 of 1 numbers that are NaN or infinite (the first is NaN, at 0)",
            ),
            (1.0, f64::INFINITY, "bn1.running_var has 1 of 1 numbers that are NaN or infinite"),
            (1.0, -0.5, "bn1.running_var is a running variance and negative (-0.5, at 0)"),
        ] {
            let (error, values) = fill(weight, variance).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert_eq!(values, before);
        }
        fill(-1.0, 0.0).unwrap();
    }
}

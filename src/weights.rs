//! Weight files: safetensors in torchvision's names and layout.
//!
//! Filters are stored as `[k, c, r, s]` without the device's channel padding, so that PyTorch loads a backbone with
//! `load_state_dict`. A file is never trusted: its header is read first and compared with the file's length, and names, dtypes
//! and shapes are compared with the network's before anything is allocated for a tensor. Tensors are read and written one at a
//! time. A file is written under a temporary name, synced and renamed: a reader sees the old file or the new one, never a part.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, View};
use safetensors::{SafeTensorError, serialize_to_file};

use crate::arena::{Arena, Slot, SlotKind};
use crate::error::{Error, Result};
use crate::files::no_room;
pub(crate) use crate::files::{whole, write_whole};
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
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut size = [0; 8];
        if length < size.len() as u64 {
            return Err(damaged(format!("its length is {length} bytes")));
        }
        file.read_exact(&mut size).map_err(Error::io(path))?;
        let size = u64::from_le_bytes(size);
        if size > HEADER_LIMIT.min(length - 8) {
            let reason =
                format!("it declares a header of {size} bytes, but its length is {length} bytes");
            return Err(damaged(reason));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(Error::io(path))?;
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

    /// Fills the slots that `name` maps to a tensor of the file. The arena is unchanged unless all of them fit.
    pub(super) fn fill(
        &mut self,
        arena: &mut Arena,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        let layout = arena.layout().clone();
        for slot in layout.params().iter().chain(layout.stats()) {
            if let Some(name) = name(&slot.name) {
                self.floats(&name, &disk_shape(slot))?;
            }
        }
        let mut values = arena.values().to_f64();
        let mut statistics = arena.statistics().to_f64();
        self.read_slots(layout.params(), &mut values, &name)?;
        self.read_slots(layout.stats(), &mut statistics, &name)?;
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
        for slot in slots {
            if let Some(name) = name(&slot.name) {
                let numbers = self.numbers(&name, &disk_shape(slot))?;
                into[slot.offset..][..slot.shape.elements()]
                    .copy_from_slice(&from_disk(slot, &numbers));
            }
        }
        Ok(())
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
    whole(path, |partial| {
        serialize_to_file(entries, Some(notes), partial).map_err(|error| match error {
            SafeTensorError::IoError(error) => no_room(path, error),
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

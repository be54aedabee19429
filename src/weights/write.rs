//! Writing: tensors in the layout of the file, one at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensorError, serialize_to_file};

use crate::arena::{Arena, Slot, SlotKind};
use crate::error::Result;
use crate::files::{replace_file, write_error};

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
    pub(crate) fn count(name: String, count: u64) -> Self {
        let bytes = Box::new(move || count.to_le_bytes().to_vec());
        Self { name, dtype: Dtype::U64, shape: vec![1], bytes }
    }

    /// A slot, from values in the device's layout.
    pub(crate) fn slot(name: String, slot: &'a Slot, values: impl Fn() -> Vec<f64> + 'a) -> Self {
        Self::floats(name, disk_shape(slot), move || to_disk(slot, &values()))
    }

    /// The slots of a network that `name` maps to a name.
    pub(crate) fn network(
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
pub(crate) fn stored_values<'a>(
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

/// The note that has the checksum of all that follows the header: CRC-32 (IEEE), in hexadecimal.
pub(super) const CHECKSUM: &str = "selfsup.crc32";

/// What stands there until the checksum is known.
const UNKNOWN: &str = "unknown.";

/// The checksum of what is left of a file, as its note has it.
pub(super) fn checksum(file: &mut impl Read) -> std::io::Result<String> {
    let (mut hasher, mut buffer) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(format!("{:08x}", hasher.finalize())),
            Ok(len) => hasher.update(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Puts the checksum into a file that was written without, and its notes in order: the crate writes them in any, and the same tensors and
/// notes should be the same file.
fn finish(path: &Path) -> std::io::Result<()> {
    const BEFORE_NOTES: &[u8] = b"{\"__metadata__\":";
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
    let mut header = vec![0; u64::from_le_bytes(size) as usize];
    file.read_exact(&mut header)?;
    let sum = checksum(&mut file)?;
    let odd = || std::io::Error::other("a header whose notes do not stand first");
    let rest = header.strip_prefix(BEFORE_NOTES).ok_or_else(odd)?;
    let mut read = serde_json::Deserializer::from_slice(rest).into_iter();
    let mut notes: BTreeMap<String, String> = read.next().ok_or_else(odd)??;
    notes.insert(CHECKSUM.into(), sum);
    let written = serde_json::to_vec(&notes)?;
    if written.len() != read.byte_offset() {
        return Err(odd());
    }
    file.seek(SeekFrom::Start((size.len() + BEFORE_NOTES.len()) as u64))?;
    file.write_all(&written)
}

/// Writes a weight file atomically, with its checksum in the header. `sound` is called once all values have been read from their device, before the file is
/// renamed into place: a failed device must not replace a good file.
pub(crate) fn write_weights(
    path: &Path,
    entries: &[Entry<'_>],
    mut notes: HashMap<String, String>,
    sound: impl FnOnce() -> Result<()>,
) -> Result<()> {
    notes.insert(CHECKSUM.into(), UNKNOWN.into());
    let entries = entries.iter().map(|entry| (&*entry.name, entry));
    replace_file(path, |partial| {
        serialize_to_file(entries, Some(notes), partial).map_err(|error| match error {
            SafeTensorError::IoError(error) => write_error(path, error),
            other => unreachable!("names are unique and shapes are their data's: {other}"),
        })?;
        finish(partial).map_err(|error| write_error(path, error))?;
        sound()
    })
}

/// A slot's shape in files: filters are `[k, c, r, s]`, without the device's channel padding.
pub(super) fn disk_shape(slot: &Slot) -> Vec<usize> {
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

pub(super) fn to_disk(slot: &Slot, values: &[f64]) -> Vec<f64> {
    places(slot).map(|place| values[place]).collect()
}

pub(super) fn from_disk(slot: &Slot, numbers: &[f64]) -> Vec<f64> {
    let mut values = vec![0.0; slot.shape.elements()];
    for (place, number) in places(slot).zip(numbers) {
        values[place] = *number;
    }
    values
}

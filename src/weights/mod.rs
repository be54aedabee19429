//! Weight files: safetensors in torchvision's names and layout.
//!
//! Filters are stored as `[k, c, r, s]` without the device's channel padding, so that PyTorch loads a backbone with
//! `load_state_dict`. A file is never trusted: its header is read first and compared with the file's length, and names, dtypes
//! and shapes are compared with the network's before anything is allocated for a tensor. Tensors are read and written one at a
//! time. A file is written under a temporary name, synced and renamed: a reader sees the old file or the new one, never a part.

mod formats;
mod prefix;
mod write;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};

use crate::arena::{Arena, Slot};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

use formats::{START, other_format};
use write::{CHECKSUM, checksum, disk_shape, from_disk};
pub(crate) use write::{Entry, stored_values, write_weights};

/// The note of a file that was made for other programs, and what it says: what is in the file.
pub(crate) const EXPORT: &str = "selfsup.export";
pub(crate) const BACKBONE: &str = "backbone";
pub(crate) const FEATURES: &str = "features";

/// The longest header that is accepted: the limit of the safetensors crate.
const HEADER_LIMIT: u64 = 100_000_000;

/// A weight file whose header has been read; its tensors are read one at a time.
pub(crate) struct WeightFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Offset of the first tensor's bytes.
    data: u64,
}

impl WeightFile {
    /// Opens a file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
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

    /// Opens a file and compares its tensors with the checksum in its header, if it has one: files of other programs and of earlier
    /// versions have none.
    pub(crate) fn open_whole(path: &Path) -> Result<Self> {
        let mut file = Self::open(path)?;
        let Some(expected) = file.note(CHECKSUM).map(str::to_owned) else { return Ok(file) };
        let found = file.file.seek(SeekFrom::Start(file.data));
        let found = found.and_then(|_| checksum(&mut file.file)).map_err(Error::io(path))?;
        if found != expected {
            return Err(Error::format(
                path,
                format!(
                    "truncated or corrupt safetensors file: the checksum of its tensors is {found}, and its header says {expected}"
                ),
            ));
        }
        Ok(file)
    }

    /// The file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// An entry of the header's `__metadata__` table.
    pub(crate) fn note(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort_unstable();
        names
    }

    /// The shape of the tensor of this name, if the file has it.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
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
    pub(crate) fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
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
    pub(crate) fn count(&mut self, name: &str) -> Result<u64> {
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
    pub(crate) fn fill_fitted(
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
    pub(crate) fn fill(
        &mut self,
        arena: &mut Arena,
        name: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        self.fill_if(arena, name, |_, _, _| Ok(()))
    }

    /// Like [`WeightFile::fill`], for weights that are used as they are: refuses NaN, infinite numbers and negative running
    /// variances, with which every figure would be that of chance.
    pub(crate) fn fill_finite(
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
    pub(crate) fn read_slots(
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;
    use crate::arena::{Init, Layout, SlotKind};
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
        // The children of a ResNet in a row.
        let parts = ["0.weight", "1.running_var", "4.0.conv1.weight", "7.1.conv1.weight"];
        let numbered = parts.map(|part| format!("backbone.{part}"));
        let said = found(&[], &numbered.each_ref().map(|name| &**name)).unwrap_err();
        assert!(said.contains("has backbone.4.0.conv1.weight: its layers are numbered"), "{said}");
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

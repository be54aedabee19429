//! Checks of output files before the work begins: a command replaces only what a command like it has written.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{check_writable, is_file, is_folder};
use crate::weights::WeightFile;

/// The contents of an output file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Weights without a run's state.
    Weights,
    /// An ONNX model.
    Onnx,
    /// A NumPy array.
    Npy,
    /// The table of an array's rows.
    Table,
    /// A report.
    Page,
    /// A trace.
    Trace,
}

impl Kind {
    /// The kind of a file by its name's ending.
    pub(super) fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("onnx") => Self::Onnx,
            Some("npy") => Self::Npy,
            Some("tsv") => Self::Table,
            Some("html") => Self::Page,
            Some("json") => Self::Trace,
            _ => Self::Weights,
        }
    }
}

/// Checks that a file can be written at `path`, and that a file that is there already may be replaced.
///
/// # Errors
/// If the folder is missing or not writable, or the file is of another kind: a checkpoint, an image, a note.
pub(super) fn check(path: &Path, kind: Kind) -> Result<()> {
    if path.file_name().is_none() || is_folder(path)? {
        return Err(Error::format(path, "is a folder: name a file to write"));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    if !is_folder(folder)? {
        return Err(Error::format(
            path,
            format!("there is no folder {}: create it first", folder.display()),
        ));
    }
    check_writable(path)?; // shows when it is tried
    let is_there = match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io(path)(error)),
    };
    if is_there && !replaceable(path, kind)? {
        let what = if is_checkpoint(path) {
            "is a run's checkpoint"
        } else {
            "is there already, and another kind of file"
        };
        return Err(Error::format(path, format!("{what}: choose another --out")));
    }
    Ok(())
}

/// Whether a file that exists is of this kind.
fn replaceable(path: &Path, kind: Kind) -> Result<bool> {
    if !is_file(path)? {
        return Ok(false);
    }
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(2048).read_to_end(&mut start));
    read.map_err(Error::io(path))?;
    let holds = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
    Ok(match kind {
        Kind::Weights => WeightFile::open(path).is_ok() && !is_checkpoint(path),
        // The format's version, and who wrote it.
        Kind::Onnx => start.starts_with(b"\x08\x08\x12\x07selfsup"),
        Kind::Npy => start.starts_with(b"\x93NUMPY"),
        Kind::Table => start.starts_with(b"file\tlabel\tclass"),
        Kind::Page => holds(b"<title>selfsup"),
        Kind::Trace => start.starts_with(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":"),
    })
}

/// Whether a file holds a run's state.
fn is_checkpoint(path: &Path) -> bool {
    WeightFile::open(path).is_ok_and(|file| file.note("selfsup.format").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_same_kind_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let said = |name: &str| {
            let path = at(name);
            check(&path, Kind::of(&path)).err().map_or(String::new(), |e| e.to_string())
        };
        assert_eq!(said("new.npy"), "");
        assert!(
            said("nowhere/new.npy").contains("there is no folder"),
            "{}",
            said("nowhere/new.npy")
        );
        std::fs::create_dir(at("folder.npy")).unwrap();
        assert!(said("folder.npy").ends_with("is a folder: name a file to write"));
        for (name, good, bad) in [
            ("a.npy", &b"\x93NUMPY\x01\x00"[..], &b"precious"[..]),
            ("a.onnx", b"\x08\x08\x12\x07selfsup\x1a", b"\x08\x08\x12\x07pytorch"),
            ("a.tsv", b"file\tlabel\tclass\n", b"name\tage\n"),
            ("a.html", b"<!DOCTYPE html>\n<title>selfsup</title>", b"<!DOCTYPE html>\n<title>mine"),
            ("a.json", b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[]}", b"{\"traceEvents\":1}"),
            ("a.safetensors", b"\x02\0\0\0\0\0\0\0{}", b"precious"),
        ] {
            std::fs::write(at(name), good).unwrap();
            assert_eq!(said(name), "", "{name}");
            std::fs::write(at(name), bad).unwrap();
            assert!(said(name).ends_with("another kind of file: choose another --out"), "{name}");
        }
        let header = b"{\"__metadata__\":{\"selfsup.format\":\"1\"}}";
        let checkpoint = [&(header.len() as u64).to_le_bytes()[..], header].concat();
        std::fs::write(at("a.safetensors"), checkpoint).unwrap();
        assert!(said("a.safetensors").ends_with("is a run's checkpoint: choose another --out"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 7, "a check leaves nothing");
    }
}

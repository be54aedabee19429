//! Checks of output files before the work begins: a command replaces only what a command like it has written.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{check_writable, is_file, is_folder};
use crate::weights::{BACKBONE, EXPORT, FEATURES, WeightFile};

/// The contents of an output file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An exported backbone.
    Weights,
    /// Features in a safetensors file.
    Features,
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
    /// A list of images that were left out.
    LeftOut,
}

impl Kind {
    /// The kind of a file that is no backbone, by its name's ending.
    pub(super) fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("onnx") => Self::Onnx,
            Some("npy") => Self::Npy,
            Some("tsv") => Self::Table,
            Some("html") => Self::Page,
            Some("json") => Self::Trace,
            Some("txt") => Self::LeftOut,
            _ => Self::Features,
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
    check_replaced(path, kind)
}

/// Checks that a file that is there already may be replaced.
///
/// # Errors
/// If it is of another kind: a checkpoint, an image, a note.
pub(super) fn check_replaced(path: &Path, kind: Kind) -> Result<()> {
    let is_there = match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io(path)(error)),
    };
    if !is_there {
        return Ok(());
    }
    let what = if is_checkpoint(path) {
        "is a run's checkpoint"
    } else {
        match found(path, kind)? {
            Found::Ours => return Ok(()),
            Found::Foreign => "is there already, and nothing says that this program wrote it",
            Found::Other => "is there already, and another kind of file",
        }
    };
    Err(Error::format(path, format!("{what}: choose another --out")))
}

/// What a file is to a command that would replace it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// What such a command wrote before.
    Ours,
    /// Of the same format, from elsewhere.
    Foreign,
    /// Of another format.
    Other,
}

/// What a file that exists is to a command that writes this kind.
fn found(path: &Path, kind: Kind) -> Result<Found> {
    if !is_file(path)? {
        return Ok(Found::Other);
    }
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(2048).read_to_end(&mut start));
    read.map_err(Error::io(path))?;
    let holds = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
    let exported = |what: &str| match WeightFile::open(path) {
        Ok(file) if file.note(EXPORT) == Some(what) => Found::Ours,
        Ok(_) => Found::Foreign,
        Err(_) => Found::Other,
    };
    let ours = |is_ours| if is_ours { Found::Ours } else { Found::Other };
    Ok(match kind {
        Kind::Weights => exported(BACKBONE),
        Kind::Features => exported(FEATURES),
        // The format's version, and who wrote it.
        Kind::Onnx => ours(start.starts_with(b"\x08\x08\x12\x07selfsup")),
        Kind::Npy if !start.starts_with(b"\x93NUMPY") => Found::Other,
        // Arrays of features look like any other; the table beside them tells.
        Kind::Npy => match found(&path.with_extension("tsv"), Kind::Table)? {
            Found::Ours => Found::Ours,
            _ => Found::Foreign,
        },
        Kind::Table => ours(start.starts_with(b"file\tlabel\tclass")),
        Kind::LeftOut => {
            ours(super::skipped::KINDS.iter().any(|kind| start.starts_with(kind.as_bytes())))
        }
        Kind::Page => ours(holds(b"<title>selfsup")),
        Kind::Trace => ours(start.starts_with(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":")),
    })
}

/// Whether a file is there that a command wrote which writes this kind.
///
/// # Errors
/// If the file cannot be read.
pub(super) fn is_own(path: &Path, kind: Kind) -> Result<bool> {
    Ok(is_file(path)? && found(path, kind)? == Found::Ours)
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
        std::fs::write(at("a.npy"), b"\x93NUMPY\x01\x00").unwrap();
        let foreign = "nothing says that this program wrote it: choose another --out";
        assert!(said("a.npy").ends_with(foreign), "an array without a table");
        let safetensors = |notes: &str| {
            let header = format!("{{\"__metadata__\":{{{notes}}}}}");
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
        };
        std::fs::write(at("a.tsv"), b"file\tlabel\tclass\n").unwrap();
        assert!(said("folder.npy").ends_with("is a folder: name a file to write"));
        for (name, good, bad) in [
            ("a.npy", &b"\x93NUMPY\x01\x00"[..], &b"precious"[..]),
            ("a.onnx", b"\x08\x08\x12\x07selfsup\x1a", b"\x08\x08\x12\x07pytorch"),
            ("a.tsv", b"file\tlabel\tclass\n", b"name\tage\n"),
            ("a.txt", b"source image 3: a.png: is damaged\n", b"3: a.png\n"),
            ("a.html", b"<!DOCTYPE html>\n<title>selfsup</title>", b"<!DOCTYPE html>\n<title>mine"),
            ("a.json", b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[]}", b"{\"traceEvents\":1}"),
            (
                "a.safetensors",
                &safetensors("\"selfsup.export\":\"features\""),
                &safetensors("\"format\":\"pt\""),
            ),
        ] {
            std::fs::write(at(name), good).unwrap();
            assert_eq!(said(name), "", "{name}");
            std::fs::write(at(name), bad).unwrap();
            let other = "another kind of file: choose another --out";
            let expected = if name == "a.safetensors" { foreign } else { other };
            assert!(said(name).ends_with(expected), "{name}: {}", said(name));
        }
        // Features do not replace a backbone, nor a backbone features or a checkpoint.
        let path = at("a.safetensors");
        for (notes, replaced_by) in [
            ("\"selfsup.export\":\"backbone\"", Some(Kind::Weights)),
            ("\"selfsup.export\":\"features\"", Some(Kind::Features)),
            ("\"selfsup.format\":\"1\"", None),
        ] {
            std::fs::write(&path, safetensors(notes)).unwrap();
            for kind in [Kind::Weights, Kind::Features] {
                assert_eq!(check(&path, kind).is_ok(), replaced_by == Some(kind), "{notes}");
            }
        }
        assert!(said("a.safetensors").ends_with("is a run's checkpoint: choose another --out"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 8, "a check leaves nothing");
    }
}

//! Files that are written whole or not at all.
//!
//! A file is written under a temporary name, synced and renamed: there is the old one or the new one, never half of one.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a small file, whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    whole(path, |partial| std::fs::write(partial, bytes).map_err(|e| no_room(path, e)))
}

/// Writes `path` by way of a temporary name that `write` fills.
pub(crate) fn whole(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let kept = write(&partial).and_then(|()| {
        let synced = File::open(&partial).and_then(|file| file.sync_all());
        synced.and_then(|()| std::fs::rename(&partial, path)).map_err(|e| no_room(path, e))
    });
    if kept.is_err() {
        let _ = std::fs::remove_file(&partial); // the first error is the one to tell
        return kept;
    }
    // The rename itself must survive a power cut, too.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all(); // not every file system can
    }
    Ok(())
}

/// A failed write; a full disk comes with the remedy.
pub(crate) fn no_room(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::format(
                path,
                format!(
                    "cannot be written ({error}): make room; what was written before it is whole"
                ),
            )
        }
        _ => Error::io(path)(error),
    }
}

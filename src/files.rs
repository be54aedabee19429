//! Files that are written completely or not at all.
//!
//! A file is written under a temporary name, synced and renamed. A reader sees the old file or the new one, never a part of it.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

/// Writes `bytes` to a file, completely or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    whole(path, |partial| std::fs::write(partial, bytes).map_err(|e| no_room(path, e)))
}

/// Replaces `path` by the file that `write` creates under the temporary name that it gets.
pub(crate) fn whole(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let kept = write(&partial).and_then(|()| {
        let synced = File::open(&partial).and_then(|file| file.sync_all());
        synced.and_then(|()| std::fs::rename(&partial, path)).map_err(|e| no_room(path, e))
    });
    if kept.is_err() {
        let _ = std::fs::remove_file(&partial); // the first error matters more
        return kept;
    }
    // Syncing the folder makes the rename itself survive a power cut.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all(); // not every file system supports it
    }
    Ok(())
}

/// The error of a failed write; for a full disk it says what to do.
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

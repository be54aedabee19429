//! A run's folder, which one process at a time writes.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::train::Metrics;
use crate::weights::write_whole;

/// The resolved recipe's name in it.
pub(super) const RECIPE: &str = "recipe.toml";
const LOCK: &str = ".lock";

/// A folder with a run in it, locked.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) metrics: Metrics,
    /// The kernel lets go of it when the process ends, however it ends.
    _lock: File,
    /// Whether this process made the run.
    new: bool,
}

impl Folder {
    /// Makes the folder of a new run and writes its recipe there.
    pub(super) fn create(path: &Path, recipe: &Recipe) -> Result<Self> {
        let taken = || {
            let reason = "already holds a run: choose another --out, or go on with it by --resume";
            Err(Error::format(path, reason))
        };
        if path.join(RECIPE).exists() {
            return taken();
        }
        std::fs::create_dir_all(path).map_err(Error::io(path))?;
        let lock = lock(path)?;
        if path.join(RECIPE).exists() {
            return taken(); // another process was faster
        }
        write_whole(&path.join(RECIPE), recipe.to_toml().as_bytes())?;
        Ok(Self {
            path: path.to_path_buf(),
            metrics: metrics(path, 0, recipe)?,
            _lock: lock,
            new: true,
        })
    }

    /// Opens the folder of a run that ended or was ended; its numbers from `length` bytes on are dropped.
    pub(super) fn open(path: &Path, lock: File, length: u64, recipe: &Recipe) -> Result<Self> {
        Ok(Self {
            path: path.to_path_buf(),
            metrics: metrics(path, length, recipe)?,
            _lock: lock,
            new: false,
        })
    }
}

fn metrics(path: &Path, length: u64, recipe: &Recipe) -> Result<Metrics> {
    let metrics = Metrics::open(path, length)?;
    Ok(if recipe.watch.tensorboard { metrics.with_events() } else { metrics })
}

/// Removes the folder of a new run that came to nothing.
pub(super) fn discard(folder: Folder) {
    if folder.new {
        let Folder { path, .. } = folder;
        for file in [RECIPE, "metrics.jsonl", LOCK] {
            let _ = std::fs::remove_file(path.join(file)); // why it came to nothing is what to tell
        }
        let _ = std::fs::remove_dir(&path); // unless something of somebody else's lies there
    }
}

/// Locks a folder for this process.
pub(super) fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let reason = "is in use: another process trains in it; wait for it or stop it first";
            Err(Error::format(folder, reason))
        }
        Err(TryLockError::Error(error)) => Err(Error::io(&path)(error)),
    }
}

//! The folder of a run, which one process at a time writes to.

use std::ffi::OsString;
use std::fs::TryLockError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::{
    Lock, check_link, create_folder, find, is_partial, open_own, remove_partial_files, write_file,
};
use crate::recipes::Recipe;
use crate::train::Metrics;
use crate::train::resume::Progress;

/// The name of the resolved recipe.
pub(super) const RECIPE: &str = "recipe.toml";
const LOCK: &str = ".lock";

/// The locked folder of a run.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) metrics: Metrics,
    _lock: Lock,
    /// Whether this process made the run.
    new: bool,
}

impl Folder {
    /// Creates the folder of a new run and writes its recipe there.
    pub(super) fn create(path: &Path, recipe: &Recipe) -> Result<Self> {
        check_free(path)?;
        create_folder(path)?;
        let lock = lock(path)?;
        check_free(path)?; // another process may have been faster
        write_file(&path.join(RECIPE), recipe.to_toml().as_bytes())?;
        Ok(Self {
            path: path.to_path_buf(),
            metrics: with_events(Metrics::create(path)?, recipe),
            _lock: lock,
            new: true,
        })
    }

    /// Opens the folder of an earlier run; the log is cut off where that run's checkpoint was.
    pub(super) fn open(path: &Path, lock: Lock, at: &Progress, recipe: &Recipe) -> Result<Self> {
        let log = Metrics::open(path, at.metrics, at.step)?;
        Ok(Self {
            path: path.to_path_buf(),
            metrics: with_events(log, recipe),
            _lock: lock,
            new: false,
        })
    }
}

/// Fails unless a new run can have the folder: it is missing or empty, so that nothing that was there is ever replaced.
pub(crate) fn check_free(path: &Path) -> Result<()> {
    let refused = |reason: &str| Err(Error::format(path, reason));
    if find(&path.join(RECIPE))?.is_some() {
        return refused("already holds a run: choose another --out, or continue it with --resume");
    }
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return check_link(path),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return refused("is a file: choose another --out");
        }
        Err(error) => return Err(Error::io(path)(error)),
    };
    for entry in entries {
        let name = entry.map_err(Error::io(path))?.file_name();
        // A process killed while it wrote the recipe leaves a temporary file.
        if name != LOCK && !is_partial(&name) {
            let name = name.to_string_lossy();
            return refused(&format!("holds other files, such as {name}: choose another --out"));
        }
    }
    Ok(())
}

fn with_events(metrics: Metrics, recipe: &Recipe) -> Metrics {
    if recipe.watch.tensorboard { metrics.with_events() } else { metrics }
}

/// Removes the folder of a new run that failed before its first step.
pub(super) fn discard(folder: Folder) {
    if folder.new {
        let Folder { path, .. } = folder;
        let files = std::fs::read_dir(&path).into_iter().flatten().flatten();
        let names: Vec<_> = files.map(|entry| entry.file_name()).collect();
        let events = |name: &OsString| name.to_string_lossy().starts_with("events.out.tfevents");
        let own = [RECIPE, "metrics.jsonl", LOCK].map(OsString::from);
        for file in own.into_iter().chain(names.into_iter().filter(events)) {
            let _ = std::fs::remove_file(path.join(file)); // the error to report is why the run failed
        }
        let _ = std::fs::remove_dir(&path); // stays if it holds other files
    }
}

/// Locks a folder for this process, and removes what a killed process left half-written.
pub(super) fn lock(folder: &Path) -> Result<Lock> {
    let path = folder.join(LOCK);
    match Lock::take(open_own(&path, false)?) {
        Ok(lock) => {
            remove_partial_files(folder)?;
            Ok(lock)
        }
        Err(TryLockError::WouldBlock) => {
            let reason = "is in use: another process works in it; wait for it or stop it first";
            Err(Error::format(folder, reason))
        }
        Err(TryLockError::Error(error)) => Err(Error::io(&path)(error)),
    }
}

//! `metrics.jsonl`: the log of a run, one JSON object per line, appended as the run goes.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::tensorboard::Events;
use crate::error::{Error, Result};
use crate::files::{open_own, write_error};

/// The open log of a run.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
    events: Option<Events>,
}

impl Metrics {
    /// Creates an empty `metrics.jsonl` in a run's folder.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub fn create(folder: &Path) -> Result<Self> {
        Self::open(folder, 0)
    }

    /// Opens `metrics.jsonl` in a run's folder to append after its first `length` bytes; drops the rest.
    ///
    /// # Errors
    /// If the folder cannot be written to, or the file is shorter.
    pub fn open(folder: &Path, length: u64) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let file = open_own(&path, true)?;
        let found = file.metadata().map_err(Error::io(&path))?.len();
        if found < length {
            let reason = format!("has {found} bytes; the checkpoint was written after {length}");
            return Err(Error::format(&path, reason));
        }
        file.set_len(length).map_err(Error::io(&path))?;
        Ok(Self { path, file, length, events: None })
    }

    /// Also writes the numbers to a TensorBoard event file next to this one.
    pub fn with_events(mut self) -> Self {
        self.events = self.path.parent().map(Events::new);
        self
    }

    /// Appends one line, in one call, so that a reader never sees half of it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("a line is plain data");
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|e| write_error(&self.path, e))?;
        self.length += text.len() as u64;
        match &mut self.events {
            Some(events) => events.write(&json!(line)),
            None => Ok(()),
        }
    }

    /// Waits until everything written so far is on disk, and returns its length in bytes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn synced(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        Ok(self.length)
    }
}

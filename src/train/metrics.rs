//! `metrics.jsonl`: one JSON object a line, appended as the run goes.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::tensorboard::Events;
use crate::error::{Error, Result};

/// The file of a run's numbers.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
    events: Option<Events>,
}

impl Metrics {
    /// Makes `metrics.jsonl` in a run's folder, empty.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        Self::open(folder, 0)
    }

    /// Opens `metrics.jsonl` in a run's folder, to append after its first `length` bytes; later ones are dropped.
    ///
    /// # Errors
    /// When the folder cannot be written, or the file is shorter.
    pub fn open(folder: &Path, length: u64) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        let there = file.metadata().map_err(Error::io(&path))?.len();
        if there < length {
            let reason = format!("has {there} bytes; the checkpoint was written after {length}");
            return Err(Error::format(&path, reason));
        }
        file.set_len(length).map_err(Error::io(&path))?;
        Ok(Self { path, file, length, events: None })
    }

    /// The same numbers also in an event file of TensorBoard's, beside this one.
    pub fn with_events(mut self) -> Self {
        self.events = self.path.parent().map(Events::new);
        self
    }

    /// Writes one line, in one call, so that a reader never sees half of one.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(record).expect("a record is plain data");
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        self.length += line.len() as u64;
        match &mut self.events {
            Some(events) => events.write(&json!(record)),
            None => Ok(()),
        }
    }

    /// Bytes written so far, which are on disk when this returns.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn synced(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        Ok(self.length)
    }
}

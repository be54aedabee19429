//! `metrics.jsonl`: the log of a run, one JSON object per line, appended as the run goes.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;

use super::tensorboard::Events;
use crate::error::{Error, Result};
use crate::files::{open_own, write_error, write_file};

/// The open log of a run.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
    events: Option<Events>,
    loss: Option<String>,
}

impl Metrics {
    /// Creates an empty `metrics.jsonl` in a run's folder.
    ///
    /// # Errors
    /// If the folder cannot be written to.
    pub fn create(folder: &Path) -> Result<Self> {
        Self::open(folder, 0, 0)
    }

    /// Opens `metrics.jsonl` in a run's folder to append after what a checkpoint of `step` knows, its first `length` bytes; drops
    /// the rest. Of a shorter file, which somebody removed or cut off, it keeps the complete lines, and of a damaged one those that can
    /// be read and are not of later steps, which move into the length when earlier lines shrink: a damaged log does not cost the run,
    /// but [`loss`](Metrics::loss) says so.
    ///
    /// # Errors
    /// If the folder cannot be written to, or the file is a link.
    pub fn open(folder: &Path, length: u64, step: u64) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let mut file = open_own(&path, true)?;
        let mut text = Vec::new();
        Read::by_ref(&mut file).take(length).read_to_end(&mut text).map_err(Error::io(&path))?;
        let short = (text.len() as u64) < length;
        if short {
            text.truncate(text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1));
        }
        let missing = length - text.len() as u64;
        let (kept, damaged) = readable(&text, step);
        if damaged > 0 {
            write_file(&path, &kept)?;
            file = open_own(&path, true)?;
        }
        let length = kept.len() as u64;
        file.set_len(length).map_err(Error::io(&path))?;
        let loss = (short || damaged > 0).then(|| {
            format!(
                "{}: the last {missing} bytes that the checkpoint knows are missing and {damaged} lines are damaged, so the report lacks the \
                 figures of these steps; weights and later figures are not touched by it",
                path.display()
            )
        });
        Ok(Self { path, file, length, events: None, loss })
    }

    /// A sentence on what the file had lost when it was opened.
    pub fn loss(&self) -> Option<&str> {
        self.loss.as_deref()
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

    /// Waits until everything written so far is on disk, and returns its length in bytes. A log that somebody removed is written
    /// again, from the file that is still open.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn synced(&mut self) -> Result<u64> {
        if !self.is_in_place() {
            let mut text = Vec::new();
            let read = self.file.rewind().and_then(|()| self.file.read_to_end(&mut text));
            read.map_err(Error::io(&self.path))?;
            write_file(&self.path, &text)?;
            self.file = open_own(&self.path, true)?;
        }
        self.file.sync_data().map_err(|e| write_error(&self.path, e))?;
        // Not the sum of what was written: somebody may have cut the file off.
        self.length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        Ok(self.length)
    }

    /// Whether the path still leads to the open file.
    fn is_in_place(&self) -> bool {
        let (Ok(open), Ok(there)) = (self.file.metadata(), std::fs::symlink_metadata(&self.path))
        else {
            return false;
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            (open.dev(), open.ino()) == (there.dev(), there.ino())
        }
        #[cfg(not(unix))]
        {
            open.len() == there.len()
        }
    }
}

/// The lines that are JSON and of no later step than this one, and the number of the others.
fn readable(text: &[u8], step: u64) -> (Vec<u8>, usize) {
    let mut damaged = 0;
    let is_known = |line: &[u8]| {
        let line = serde_json::from_slice::<serde_json::Value>(line);
        line.is_ok_and(|line| line["step"].as_u64().is_none_or(|of| of <= step))
    };
    let lines = text.split_inclusive(|&byte| byte == b'\n');
    let kept = lines.filter(|line| {
        let known = is_known(line);
        damaged += usize::from(!known);
        known
    });
    (kept.collect::<Vec<_>>().concat(), damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_lost_lines_says_so_and_keeps_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for (text, length, kept, lost) in [
            ("10\n20\n", 6, "10\n20\n", None),
            ("10\n20\n30\n", 6, "10\n20\n", None),
            ("", 6, "", Some("the last 6 bytes that the checkpoint knows are missing and 0 lines")),
            (
                "10\n{\"step\n30\n",
                13,
                "10\n30\n",
                Some("the last 0 bytes that the checkpoint knows are missing and 1 lines"),
            ),
            // The line of step 1 was longer.
            (
                "{\"step\":1}\n{\"step\":9}\n",
                22,
                "{\"step\":1}\n",
                Some("the last 0 bytes that the checkpoint knows are missing and 1 lines"),
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let mut metrics = Metrics::open(folder.path(), length, 5).unwrap();
            match (metrics.loss(), lost) {
                (None, None) => {}
                (Some(found), Some(lost)) => assert!(found.contains(lost), "{found}"),
                other => panic!("{text:?}: {other:?}"),
            }
            metrics.write(&40).unwrap();
            assert_eq!(metrics.synced().unwrap() as usize, kept.len() + 3);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{kept}40\n"));
        }
    }

    #[test]
    fn a_log_that_was_removed_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::create(folder.path()).unwrap();
        metrics.write(&1).unwrap();
        std::fs::remove_file(&path).unwrap();
        metrics.write(&2).unwrap();
        assert_eq!(metrics.synced().unwrap(), 4);
        metrics.write(&3).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
        std::fs::write(&path, "").unwrap();
        metrics.write(&4).unwrap();
        assert_eq!(metrics.synced().unwrap(), 2);
    }

    #[test]
    fn a_log_is_cut_off_at_a_length_or_before_its_first_incomplete_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for (length, kept) in [(4, "10\n2"), (0, ""), (5, "10\n20"), (99, "10\n")] {
            std::fs::write(&path, "10\n20").unwrap();
            let metrics = Metrics::open(folder.path(), length, 5).unwrap();
            assert_eq!(metrics.length, kept.len() as u64);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
        }
    }
}

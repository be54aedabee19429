//! Images that a run could not read: counted, named, and reason enough to stop if there are many.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::data::Skipped;
use crate::error::Result;
use crate::files::write_file;

/// The file that lists them, in a run's folder.
const SKIPPED: &str = "skipped.txt";

/// Number of names that are printed; the file lists the others.
const NAMED: usize = 10;

/// A split of a run's images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RunSplit {
    Training,
    Validation,
    HeldOut,
}

impl fmt::Display for RunSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Training => "training",
            Self::Validation => "validation",
            Self::HeldOut => "held-out",
        })
    }
}

/// The unreadable images that a run has met.
#[derive(Default)]
pub(super) struct SkippedImages {
    /// File and reason by split and place in it.
    reasons: BTreeMap<(RunSplit, u32), String>,
    /// Those that the user has not been told yet.
    news: Vec<(RunSplit, u32)>,
    /// How many names the user has been told.
    named: usize,
}

impl SkippedImages {
    /// Adds images, each once.
    pub(super) fn add(&mut self, split: RunSplit, skipped: &[Skipped]) {
        for Skipped { index, reason } in skipped {
            if self.reasons.insert((split, *index), reason.clone()).is_none() {
                self.news.push((split, *index));
            }
        }
    }

    /// Sentences on the images added since the last call; lists all in the run's folder, if it has one.
    ///
    /// # Errors
    /// If the list cannot be written.
    pub(super) fn tell(&mut self, folder: Option<&Path>) -> Result<Vec<String>> {
        let mut news = std::mem::take(&mut self.news);
        news.sort_unstable();
        if news.is_empty() {
            return Ok(Vec::new());
        }
        let now = news.len().min(NAMED - self.named);
        self.named += now;
        let mut sentences: Vec<String> = news[..now]
            .iter()
            .map(|key @ (split, index)| match split {
                RunSplit::Training => format!("skipped image {index}: {}", self.reasons[key]),
                _ => format!("skipped {split} image {index}: {}", self.reasons[key]),
            })
            .collect();
        if now < news.len() {
            sentences.push(format!("skipped {} more images", news.len() - now));
        }
        if let Some(folder) = folder {
            let file = folder.join(SKIPPED);
            let mut text = String::new();
            for ((split, index), reason) in &self.reasons {
                let reason = reason.replace(['\n', '\r', '\t'], " ");
                writeln!(text, "{split}\t{index}\t{reason}").expect("a string takes all");
            }
            write_file(&file, text.as_bytes())?;
            if let Some(last) = sentences.last_mut().filter(|_| now < news.len()) {
                last.push_str(&format!("; {} lists all", file.display()));
            }
        }
        Ok(sentences)
    }

    /// Complains if more images of a split are unreadable than the share `limit` of its `length`.
    pub(super) fn complaint(&self, split: RunSplit, length: usize, limit: f64) -> Option<String> {
        let own = || self.reasons.iter().filter(|((of, _), _)| *of == split);
        let count = own().count();
        if count as f64 <= limit * length as f64 {
            return None;
        }
        let first = own().next().map_or("", |(_, reason)| reason);
        Some(format!(
            "{count} of {length} {split} images cannot be read, more than data.max_skipped={limit} allows; the first: {first}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(indices: std::ops::Range<u32>) -> Vec<Skipped> {
        indices.map(|index| Skipped { index, reason: format!("{index}.png: broken") }).collect()
    }

    #[test]
    fn ten_are_named_once_and_all_are_listed() {
        let folder = tempfile::tempdir().unwrap();
        let mut images = SkippedImages::default();
        assert_eq!(images.tell(Some(folder.path())).unwrap(), [""; 0]);
        images.add(RunSplit::HeldOut, &skipped(4..5));
        images.add(RunSplit::Training, &skipped(0..2));
        images.add(RunSplit::Training, &skipped(0..2));
        let expected = [
            "skipped image 0: 0.png: broken",
            "skipped image 1: 1.png: broken",
            "skipped held-out image 4: 4.png: broken",
        ];
        assert_eq!(images.tell(Some(folder.path())).unwrap(), expected);
        assert_eq!(images.tell(Some(folder.path())).unwrap(), [""; 0]);
        images.add(RunSplit::Training, &skipped(0..20));
        let sentences = images.tell(Some(folder.path())).unwrap();
        assert_eq!(sentences.len(), 8);
        assert!(sentences[7].starts_with("skipped 11 more images; "), "{sentences:?}");
        let list = std::fs::read_to_string(folder.path().join("skipped.txt")).unwrap();
        assert_eq!(list.lines().count(), 21);
        assert_eq!(list.lines().last(), Some("held-out\t4\t4.png: broken"));
    }

    #[test]
    fn more_than_the_limit_is_a_complaint() {
        let mut images = SkippedImages::default();
        images.add(RunSplit::Training, &skipped(0..2));
        assert_eq!(images.complaint(RunSplit::Training, 200, 0.01), None);
        assert_eq!(images.complaint(RunSplit::HeldOut, 0, 0.01), None);
        let complaint = images.complaint(RunSplit::Training, 199, 0.01).unwrap();
        assert!(complaint.starts_with("2 of 199 training images cannot be read"), "{complaint}");
        assert_eq!(images.complaint(RunSplit::Training, 2, 1.0), None);
    }
}

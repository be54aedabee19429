//! Images that a command leaves out: counted, named, written to a file, and too many are an error.

use std::path::PathBuf;

use super::output::{self, Kind};
use super::talk;
use crate::data::Skipped;
use crate::error::{Error, Result};
use crate::files::write_file;

/// How the lines of a list begin.
pub(super) const KINDS: [&str; 3] = ["source image ", "training image ", "held-out image "];

/// The most names that are printed; the file has all of them.
const PRINTED: usize = 10;

/// The images that a command has left out.
pub(super) struct LeftOut {
    /// The file that lists them.
    file: PathBuf,
    /// The largest share that may be left out.
    most: f64,
    /// The lines of the file.
    lines: String,
}

impl LeftOut {
    /// Nothing is left out yet. The list goes to `file`, and a share above `most` is an error.
    pub(super) fn new(file: PathBuf, most: f64) -> Self {
        Self { file, most, lines: String::new() }
    }

    /// Prints and writes down which of `total` images of a kind could not be read. If there are none, the list of an earlier call,
    /// which would belong to other results now, is removed.
    ///
    /// # Errors
    /// If their share is too large.
    pub(super) fn add(&mut self, kind: &str, total: usize, skipped: &[Skipped]) -> Result<()> {
        if skipped.is_empty() {
            if self.lines.is_empty() && output::is_own(&self.file, Kind::LeftOut)? {
                std::fs::remove_file(&self.file).map_err(Error::io(&self.file))?;
            }
            return Ok(());
        }
        let count = skipped.len();
        talk(&format!("{} of {total} {kind} images; {count} could not be read:", total - count));
        for Skipped { reason, .. } in skipped.iter().take(PRINTED) {
            talk(&format!("  {reason}"));
        }
        for Skipped { index, reason } in skipped {
            self.lines += &format!("{kind} image {index}: {reason}\n");
        }
        let written = write_file(&self.file, self.lines.as_bytes());
        let rest = count.saturating_sub(PRINTED);
        let more = if rest > 0 { format!("{rest} more; ") } else { String::new() };
        talk(&match written {
            Ok(()) => format!("  {more}the list is in {}", self.file.display()),
            Err(error) => format!("  {more}the list could not be written: {error}"),
        });
        if count >= total {
            let first = &skipped[0].reason;
            return Err(Error::Unreadable(format!(
                "none of the {total} {kind} images can be read; the first: {first}"
            )));
        }
        let share = count as f64 / total as f64;
        if share > self.most {
            return Err(Error::Unreadable(format!(
                "{count} of {total} {kind} images could not be read, {:.1}%, and at most {}% may be left out: \
                 repair or remove them, or allow it with --max-skipped {:.2}",
                100.0 * share,
                100.0 * self.most,
                (100.0 * share).ceil() / 100.0,
            )));
        }
        Ok(())
    }
}

/// Parses the value of `--max-skipped`: a share between 0 and 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share between 0 and 1, such as 0.05".into())
}

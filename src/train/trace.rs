//! `train --trace`: writes a few steps as a Chrome trace, for Perfetto or chrome://tracing.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::device::{Device, Row, Span, begin_trace, end_trace};
use crate::error::Result;
use crate::files::write_file;

/// Steps that are left out first: they allocate memory, which later ones do not.
const WARM_UP: u64 = 2;

/// The steps to trace, and how many are done.
pub(super) struct Trace {
    file: PathBuf,
    /// The first step of this process to trace, and the one after the last.
    steps: std::ops::Range<u64>,
    done: u64,
}

impl Trace {
    pub(super) fn new(file: &Path, steps: u64) -> Self {
        let file = file.to_path_buf();
        Self { file, steps: WARM_UP..WARM_UP + steps.max(1), done: 0 }
    }

    /// Begins the trace if the next step is the first one to trace; called before each step.
    pub(super) fn before_step(&self, device: &Device) {
        if self.done == self.steps.start {
            begin_trace(device);
        }
    }

    /// Writes the trace after its last step; called after each step. Returns whether it was written.
    pub(super) fn after_step(&mut self) -> Result<bool> {
        self.done += 1;
        if self.done < self.steps.end {
            return Ok(false);
        }
        write_file(&self.file, chrome(&end_trace()).to_string().as_bytes())?;
        Ok(true)
    }

    /// Says why nothing was written: the run was over before the last step to trace.
    pub(super) fn unwritten(&self) -> String {
        format!(
            "{}: no trace is written, as this took {} steps and a trace of {} needs {}: ask for fewer with --trace-steps",
            self.file.display(),
            self.done,
            self.steps.end - self.steps.start,
            self.steps.end
        )
    }

    /// Says what was written.
    pub(super) fn sentence(&self) -> String {
        let steps = self.steps.end - self.steps.start;
        format!("{}: {steps} steps; open it in Perfetto or chrome://tracing", self.file.display())
    }
}

/// Converts spans to Google's Trace Event Format, times in microseconds.
fn chrome(spans: &[Span]) -> Value {
    let rows =
        [(Row::Phases, "phases"), (Row::Operations, "operations"), (Row::Kernels, "GPU kernels")];
    let place = |row: Row| rows.iter().position(|(known, _)| *known == row).unwrap_or(0);
    let names = rows.iter().map(|&(row, name)| {
        json!({ "ph": "M", "name": "thread_name", "pid": 1, "tid": place(row), "args": { "name": name } })
    });
    let spans = spans.iter().map(|span| {
        json!({
            "ph": "X", "name": span.name, "cat": rows[place(span.row)].1, "pid": 1, "tid": place(span.row),
            "ts": span.begin * 1e6, "dur": (span.end - span.begin) * 1e6,
        })
    });
    json!({ "traceEvents": names.chain(spans).collect::<Vec<_>>(), "displayTimeUnit": "ms" })
}

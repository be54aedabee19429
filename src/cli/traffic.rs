//! `inspect --traffic`: what a step moves in a GPU's memory, kernel by kernel.

use serde::Serialize;

use super::inspect::size;
use super::say;
use crate::device::{KernelTraffic, Precision};
use crate::error::Result;
use crate::recipes::Recipe;
use crate::train::{self, StepTraffic};

/// What a step moves, and in which precision.
#[derive(Debug, Serialize)]
pub(super) struct Moved {
    precision: Precision,
    #[serde(flatten)]
    step: StepTraffic,
    /// Bytes read and written by all kernels.
    bytes: u64,
    /// The same for each view.
    bytes_per_view: u64,
}

/// Counts what `--traffic` asks for.
pub(super) fn traffic(recipe: &Recipe) -> Result<Moved> {
    let precision = recipe.train.precision.unwrap_or(Precision::Bf16);
    let mut step = train::traffic(recipe, precision)?;
    step.kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.read + kernel.written));
    let bytes = step.bytes();
    Ok(Moved { precision, bytes, bytes_per_view: bytes / (step.views.max(1) as u64), step })
}

/// Prints a line for each kernel, those that move most first.
pub(super) fn print(moved: &Moved) -> Result<()> {
    let Moved { precision, step: StepTraffic { images, views, kernels }, .. } = moved;
    say(&format!(
        "a step of {images} images, {views} views, moves in the memory of one GPU in {precision}, each byte once a launch:"
    ))?;
    say(&format!(
        "  {:40} {:>8} {:>11} {:>11} {:>7}",
        "kernel", "launches", "read", "written", ""
    ))?;
    for KernelTraffic { kernel, launches, read, written } in kernels {
        let share = 100.0 * (read + written) as f64 / moved.bytes.max(1) as f64;
        say(&format!(
            "  {kernel:40} {launches:8} {:>11} {:>11} {share:6.1}%",
            size(*read as usize),
            size(*written as usize)
        ))?;
    }
    say(&format!(
        "all kernels: {}, {:.1} MB a view; what caches cannot hold comes on top, and making the views",
        size(moved.bytes as usize),
        moved.bytes_per_view as f64 / 1e6
    ))
}

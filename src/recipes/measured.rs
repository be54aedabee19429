//! What was measured here, run by run: `recipes/measured/runs.toml`, which `selfsup recipes NAME` prints and from which
//! `docs/results.md` is made.

use serde::Deserialize;

/// A measurement, with all that is needed to repeat it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredRun {
    /// The built-in recipe that was trained; none for a measurement of another kind.
    #[serde(default)]
    pub recipe: Option<String>,
    /// What was measured, with the settings that differ from the recipe's.
    pub what: String,
    /// The figures.
    pub figure: String,
    /// The command.
    pub command: String,
    /// The commit of the program, or of the log if the program's was not noted.
    pub commit: String,
    /// The day, `2026-11-25`.
    pub date: String,
    /// The machine and the precision.
    pub machine: String,
    /// The file of the repository that has the details.
    pub log: String,
    /// The change since then that may have changed the figure, which is then struck through.
    #[serde(default)]
    pub predates: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Runs {
    run: Vec<MeasuredRun>,
}

/// Returns all measurements, in the order of the file.
///
/// # Panics
/// If the file, which is part of the program, is malformed.
pub fn measured_runs() -> Vec<MeasuredRun> {
    let text = include_str!("../../recipes/measured/runs.toml");
    toml::from_str::<Runs>(text).expect("recipes/measured/runs.toml").run
}

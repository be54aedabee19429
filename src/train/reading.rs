//! How the files of somebody's own folder are read.

use std::path::Path;

use serde::Deserialize;

use crate::data::{self, Format, Reading};
use crate::error::{Error, Result};
use crate::settings;

/// How a folder's files are read: as the settings say, and what they leave open as the files have it. Samples of 16 bits are
/// stretched from the range that some of them have.
///
/// # Errors
/// If the folder cannot be read, its images have different channels or bits, or a setting of how they are read is out of range.
pub fn own_reading(folder: &Path, settings: &[String]) -> Result<Reading> {
    let (mut reading, found) = given(folder, settings, |_| true)?;
    if reading.format.bits == 16 && found.range.is_none() {
        reading.range = data::extent(folder, &reading)?;
    }
    Ok(reading)
}

/// How a folder's files are read to be packed: photos in RGB unless the settings say otherwise, samples of 16 bits as they are,
/// floats stretched to 16 bits.
pub(crate) fn pack_reading(folder: &Path, settings: &[String]) -> Result<Reading> {
    let is_photo = |format: Format| format.bits == 8 && matches!(format.channels, 1 | 3);
    let (mut reading, found) = given(folder, settings, |format| !is_photo(format))?;
    if found.floats && found.range.is_none() {
        reading.range = data::extent(folder, &reading)?;
    }
    Ok(reading)
}

/// Refuses settings that say nothing of how files are read, for commands that take no others.
///
/// # Errors
/// If there is one.
pub fn only_reading(settings: &[String]) -> Result<()> {
    let is_other = |s: &&String| {
        !READING_KEYS.iter().any(|key| s.trim_start().starts_with(&format!("data.{key}=")))
    };
    let keys = READING_KEYS.map(|key| format!("data.{key}")).join(", ");
    settings.iter().find(is_other).map_or(Ok(()), |other| {
        Err(Error::Config(format!(
            "--set {other}: this command takes {keys}, which say how files are read; a table of classes is given with --labels"
        )))
    })
}

/// What was given, and what the files have.
struct Found {
    range: Option<[f64; 2]>,
    floats: bool,
}

fn given(
    folder: &Path,
    keys: &[String],
    takes: impl Fn(Format) -> bool,
) -> Result<(Reading, Found)> {
    let key = |s: &&String| READING_KEYS.iter().any(|key| s.starts_with(&format!("data.{key}=")));
    // On their own: a recipe of other channels would not be whole without its views.
    let mut table = toml::Table::new();
    keys.iter().filter(key).try_for_each(|setting| settings::set(&mut table, setting))?;
    let data = table.get("data").and_then(toml::Value::as_table).cloned().unwrap_or_default();
    let read: ReadingKeys = settings::read(&data, "data")?;
    let mut reading = Reading { pages: read.pages, axes: read.axes, ..Reading::default() };
    let native = match data::native_format(folder, &reading) {
        // Files of several kinds, and it is said which are read.
        Err(Error::Format { .. }) if read.channels.and(read.bits).is_some() => None,
        found => found?,
    };
    if let Some((native, _)) = native.filter(|(native, _)| takes(*native)) {
        reading.format = native;
    }
    reading.format.channels = read.channels.unwrap_or(reading.format.channels);
    reading.format.bits = read.bits.unwrap_or(reading.format.bits);
    reading.range = read.range;
    reading.check()?;
    let floats = native.is_some_and(|(_, floats)| floats);
    Ok((reading, Found { range: read.range, floats }))
}

/// Keys of `data` that say how files are read.
const READING_KEYS: [&str; 5] = ["channels", "bits", "range", "pages", "axes"];

/// Their values.
#[derive(Deserialize)]
struct ReadingKeys {
    channels: Option<usize>,
    bits: Option<usize>,
    range: Option<[f64; 2]>,
    pages: Option<data::Pages>,
    axes: Option<data::Axes>,
}

//! Recipe files by name or path, on top of their bases.

use std::path::Path;

use super::builtin::{builtin, builtin_names};
use crate::error::{Error, Result};
use crate::settings::{merge, parsed};

fn text(name: &str) -> Result<String> {
    if !Path::new(name).exists() {
        let known = builtin_names().collect::<Vec<_>>().join(", ");
        return Err(Error::Config(format!(
            "there is no recipe file {name}, nor a built-in recipe of that name; built in are: {known}"
        )));
    }
    std::fs::read_to_string(name).map_err(Error::io(name))
}

/// Bases of bases: more are a circle.
const DEEPEST: usize = 4;

/// The table of a recipe file or a built-in recipe, on top of its base's.
pub(super) fn table_of(name: &str, depth: usize) -> Result<toml::Table> {
    let text = match builtin(name) {
        Some(text) => text.to_owned(),
        None => text(name)?,
    };
    let mut table = parsed(&text, name)?;
    let Some(base) = table.remove("base") else { return Ok(table) };
    let Some(base) = base.as_str().filter(|_| depth < DEEPEST) else {
        return Err(Error::Config(format!(
            "recipe {name}: base must be another recipe's name or file, not {base}"
        )));
    };
    let mut whole = table_of(base, depth + 1)?;
    merge(&mut whole, table);
    Ok(whole)
}

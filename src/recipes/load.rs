//! Loads recipes by name or path and merges them into their bases.

use std::path::Path;

use super::builtin::{builtin, builtin_names};
use crate::error::{Error, Result};
use crate::settings::{merge, parsed};

fn text(name: &str) -> Result<String> {
    if !Path::new(name).exists() {
        let known = builtin_names().collect::<Vec<_>>().join(", ");
        return Err(Error::Config(format!(
            "no recipe file or built-in recipe {name}; built-in recipes: {known}"
        )));
    }
    std::fs::read_to_string(name).map_err(Error::io(name))
}

/// The deepest chain of bases; a longer one is taken for a cycle.
const DEEPEST: usize = 4;

/// Returns the table of a recipe file or a built-in recipe, merged into its base's.
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
    let mut merged = table_of(base, depth + 1)?;
    merge(&mut merged, table);
    Ok(merged)
}

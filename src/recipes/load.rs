//! Loads recipes by name or path and merges them into their bases.

use std::path::{Path, PathBuf};

use super::builtin::{builtin, builtin_names};
use super::source::inherit;
use crate::error::{Error, Result};
use crate::files::{find, read_text};
use crate::settings::{merge, parsed};

fn text(name: &str, path: &Path) -> Result<String> {
    if find(path)?.is_none() {
        let known = builtin_names().collect::<Vec<_>>().join(", ");
        return Err(Error::Config(format!(
            "no recipe file or built-in recipe {name}; built-in recipes: {known}"
        )));
    }
    read_text(path, "a recipe (TOML)")
}

/// The deepest chain of bases; a longer one is taken for a cycle.
const DEEPEST: usize = 4;

/// Returns the table of a recipe file or a built-in recipe, merged into its base's.
pub(super) fn table_of(name: &str) -> Result<toml::Table> {
    table_at(name, Path::new(""), 0)
}

/// Likewise, of a recipe that another one in `folder` names: a file is looked for there, and then in the working directory.
fn table_at(name: &str, folder: &Path, depth: usize) -> Result<toml::Table> {
    let mut path = PathBuf::from(name);
    let text = match builtin(name) {
        Some(text) => text.to_owned(),
        None => {
            let neighbour = folder.join(name);
            if find(&neighbour)?.is_some() {
                path = neighbour;
            }
            text(name, &path)?
        }
    };
    let mut table = parsed(&text, name)?;
    let Some(base) = table.remove("base") else { return Ok(table) };
    if depth >= DEEPEST {
        return Err(Error::Config(format!(
            "recipe {name}: its base, {base}, is the {}th in a row: at most {DEEPEST} recipes may be based on one another, and none on itself",
            DEEPEST + 1
        )));
    }
    let Some(base) = base.as_str() else {
        return Err(Error::Config(format!(
            "recipe {name}: base must be another recipe's name or file, not {base}"
        )));
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut merged = table_at(base, folder, depth + 1)?;
    inherit(&mut merged, table.remove("source"));
    merge(&mut merged, table);
    Ok(merged)
}

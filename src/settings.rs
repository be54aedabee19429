//! Settings as TOML tables: merging, `--set key.path=value`, and errors that suggest the nearest known key.

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

pub(crate) fn parsed(text: &str, origin: &str) -> Result<toml::Table> {
    text.parse().map_err(|e| Error::format(origin, format!("is not TOML: {}", one_line(&e))))
}

/// Tables of which one key is chosen: another choice replaces it.
const CHOICES: [&str; 2] = ["rule", "decay"];

/// Puts what differs on top of a base. A table on top of an array of tables goes on top of each.
pub(crate) fn merge(base: &mut toml::Table, over: toml::Table) {
    use toml::Value::{Array, Table};
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Table(inner)), Table(over)) => {
                if CHOICES.contains(&&*key) && !over.keys().all(|k| inner.contains_key(k)) {
                    inner.clear();
                }
                merge(inner, over);
            }
            (Some(Array(items)), Table(over)) => {
                for item in items.iter_mut().filter_map(toml::Value::as_table_mut) {
                    merge(item, over.clone());
                }
            }
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// Sets `a.b.c=value` in a table; the value is TOML, or else a string.
pub(crate) fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let malformed = || {
        Error::config(format!("--set takes key.path=value, such as train.epochs=5, not {setting}"))
    };
    let (path, value) = setting.split_once('=').ok_or_else(malformed)?;
    let value = format!("v = {value}").parse::<toml::Table>().map_or_else(
        |_| toml::Value::String(value.into()),
        |mut t| t.remove("v").expect("set above"),
    );
    let keys: Vec<&str> = path.trim().split('.').collect();
    let (last, parents) = keys.split_last().expect("split gives at least one");
    // `augment.flip=0` reaches every table of an array, `augment.1.flip=0` one.
    fn walk(at: &mut toml::Value, path: &[&str], last: &str, value: &toml::Value) -> Option<()> {
        match (at, path) {
            (toml::Value::Array(items), [index, rest @ ..]) if index.parse::<usize>().is_ok() => {
                walk(items.get_mut(index.parse::<usize>().ok()?)?, rest, last, value)
            }
            (toml::Value::Array(items), path) => {
                items.iter_mut().try_for_each(|item| walk(item, path, last, value))
            }
            (toml::Value::Table(table), [key, rest @ ..]) => {
                let inner = table.entry(*key).or_insert(toml::Value::Table(toml::Table::new()));
                walk(inner, rest, last, value)
            }
            (toml::Value::Table(table), []) => {
                table.insert(last.into(), value.clone());
                Some(())
            }
            _ => None,
        }
    }
    let mut root = toml::Value::Table(std::mem::take(table));
    let done = walk(&mut root, parents, last, &value);
    if let toml::Value::Table(root) = root {
        *table = root;
    }
    done.ok_or_else(|| Error::config(format!("--set {setting}: the recipe has no table there")))
}

/// Reads a table, answering an unknown key with the nearest known one. `place` is the table's own name.
pub(crate) fn read<T: DeserializeOwned>(table: &toml::Table, place: &str) -> Result<T> {
    T::deserialize(table.clone()).map_err(|error| {
        let message = one_line(&error);
        let place = if place.is_empty() { String::new() } else { format!("[{place}] ") };
        Error::Config(format!("recipe: {place}{message}{}", nearest(&message)))
    })
}

/// The largest number of anything but a seed: beyond it no memory holds what is asked for, and sizes overflow.
const LARGEST: i64 = 1 << 24;

/// Fails at a whole number beyond [`LARGEST`], and names its key.
pub(crate) fn check_sizes(table: &toml::Table) -> Result<()> {
    fn walk(key: &str, value: &toml::Value) -> Result<()> {
        let inner = |name: &str| if key.is_empty() { name.into() } else { format!("{key}.{name}") };
        match value {
            toml::Value::Table(table) => {
                table.iter().try_for_each(|(name, value)| walk(&inner(name), value))
            }
            toml::Value::Array(items) => {
                (0..).zip(items).try_for_each(|(i, value)| walk(&inner(&format!("{i}")), value))
            }
            toml::Value::Integer(v) if *v > LARGEST => {
                Err(Error::Config(format!("{key} is {v}, and at most {LARGEST} makes sense")))
            }
            _ => Ok(()),
        }
    }
    let sizes = table.iter().filter(|(name, _)| *name != "seed");
    sizes.into_iter().try_for_each(|(name, value)| walk(name, value))
}

/// What an error of `toml` says in one line, without its drawing of the place: `|`, `1 | seed =`, `  |   ^`.
fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let drawn = |line: &str| {
        line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start().starts_with('|')
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !drawn(line));
    lines.collect::<Vec<_>>().join("; ")
}

/// ` (did you mean …?)` for serde's "unknown field `x`, expected one of `a`, `b`".
fn nearest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown ") {
        return String::new();
    }
    let Some(given) = quoted.next() else { return String::new() };
    let closest = quoted.min_by_key(|known| distance(given, known));
    closest
        .filter(|known| distance(given, known) <= given.len().max(3) / 2 + 1)
        .map_or(String::new(), |known| format!(" (did you mean `{known}`?)"))
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replace = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replace.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

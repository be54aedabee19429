//! Settings as TOML tables: parsing, merging, `--set key.path=value`, and errors that suggest the nearest known key.

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Parses TOML; `origin` is what the error calls the text.
pub(crate) fn parsed(text: &str, origin: &str) -> Result<toml::Table> {
    text.parse().map_err(|e| Error::format(origin, format!("not valid TOML: {}", one_line(&e))))
}

/// Tables that hold one of several alternatives: a different alternative replaces the table instead of merging into it.
const CHOICES: [&str; 2] = ["rule", "decay"];

/// Merges `over` into `base`; `over` wins. A table over an array of tables is merged into each of them.
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

/// The deepest key of a setting. Settings are four deep at most; a longer key is a mistake, and nesting without a limit would
/// overflow the stack.
const DEEPEST: usize = 16;

/// Splits `a.b.c=value` into key and value.
fn split(setting: &str) -> Option<(&str, &str)> {
    setting.split_once('=').map(|(key, value)| (key.trim(), value))
}

/// Applies `a.b.c=value` to a table. The value is read as TOML, and as a string if it is not valid TOML.
pub(crate) fn set(table: &mut toml::Table, setting: &str) -> Result<()> {
    let malformed = || {
        Error::config(format!("--set takes key.path=value, such as train.epochs=5, not {setting}"))
    };
    let (path, text) = split(setting).ok_or_else(malformed)?;
    let parsed = format!("v = {text}").parse::<toml::Table>().ok();
    // A text of several lines may hold more keys, which must not be dropped.
    let value = parsed.filter(|table| table.len() == 1).and_then(|mut table| table.remove("v"));
    let value = value.unwrap_or_else(|| toml::Value::String(text.into()));
    put(table, path, value)
        .map_err(|reason| Error::config(format!("--set {}: {reason}", shown(setting))))
}

/// The beginning of a long text, for messages.
fn shown(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

/// Puts a value at the path `a.b.c`.
fn put(table: &mut toml::Table, path: &str, value: toml::Value) -> Result<(), String> {
    let keys: Vec<&str> = path.split('.').collect();
    if keys.len() > DEEPEST {
        return Err(format!("the key has {} parts; a setting has at most {DEEPEST}", keys.len()));
    }
    let (last, parents) = keys.split_last().expect("split gives at least one");
    // `augment.flip=0` sets the key in every table of an array, `augment.1.flip=0` in one.
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
    done.ok_or_else(|| "the recipe has no table there".into())
}

/// Deserializes a table; the error for an unknown key suggests the nearest known one. `place` is the table's name for messages.
pub(crate) fn read<T: DeserializeOwned>(table: &toml::Table, place: &str) -> Result<T> {
    T::deserialize(table.clone()).map_err(|error| {
        let message = one_line(&error);
        let place = if place.is_empty() { String::new() } else { format!("[{place}] ") };
        if let Some(number) = too_large(&message) {
            return Error::Config(format!(
                "recipe: {place}{number} is too large: the largest whole number is {}{}",
                i64::MAX,
                message.rfind(" in `").map_or("", |key| &message[key..])
            ));
        }
        Error::Config(format!("recipe: {place}{message}{}{}", nearest(&message), advice(&message)))
    })
}

/// What to do about serde's sentences that do not say it.
fn advice(message: &str) -> &'static str {
    if message.contains(WANTS_STRING) {
        ": put it in quotes"
    } else if message.contains("unit variant, expected string only") {
        ": it is one of several choices, given by its name"
    } else if message.contains("wanted exactly 1 element, more than 1 element") {
        ": it is one of several choices: give another one whole, as {name={…}}"
    } else {
        ""
    }
}

/// The whole number in a message that calls it a string, as [`set`] reads numbers that TOML has no room for.
fn too_large(message: &str) -> Option<&str> {
    let (_, rest) = message.split_once("invalid type: string \"")?;
    let (text, _) = rest.split_once('"')?;
    let digits = text.trim().trim_start_matches(['+', '-']);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && text.trim().parse::<i64>().is_err()).then_some(text)
}

/// What serde says of a number where a string is wanted.
const WANTS_STRING: &str = ", expected a string";

/// Like [`read`], for a table to which `settings` have been applied. A value of theirs that looks like a number but stands where
/// a string is wanted is that string as it was typed: `data.path=2024` is a folder.
pub(crate) fn read_with<T: DeserializeOwned>(
    table: &mut toml::Table,
    settings: &[String],
) -> Result<T> {
    for _ in 0..settings.len() {
        let Err(error) = T::deserialize(table.clone()) else { break };
        let message = one_line(&error);
        let at =
            |key: &str| message.contains(WANTS_STRING) && message.ends_with(&format!("in `{key}`"));
        let last =
            settings.iter().rev().filter_map(|setting| split(setting)).find(|(key, _)| at(key));
        let Some((key, text)) = last else { break };
        put(table, key, toml::Value::String(text.trim().into())).map_err(Error::Config)?;
    }
    read(table, "")
}

/// Replaces `~/` at the start of every string by the home folder: shells do not expand it behind `data.path=`, nor in files.
pub(crate) fn expand_home(table: &mut toml::Table, home: Option<&str>) {
    fn walk(value: &mut toml::Value, home: &str) {
        match value {
            toml::Value::Table(table) => table.iter_mut().for_each(|(_, value)| walk(value, home)),
            toml::Value::Array(items) => items.iter_mut().for_each(|value| walk(value, home)),
            toml::Value::String(text) => {
                if let Some(rest) = text.strip_prefix("~/") {
                    *text = format!("{}/{rest}", home.trim_end_matches('/'));
                }
            }
            _ => {}
        }
    }
    if let Some(home) = home.filter(|home| !home.is_empty()) {
        table.iter_mut().for_each(|(_, value)| walk(value, home));
    }
}

/// The largest value of any setting but a seed: beyond it nothing fits in memory, and sizes overflow.
const LARGEST: i64 = 1 << 24;

/// Refuses integers above [`LARGEST`]; the error names the key.
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
                Err(Error::Config(format!("{key} is {v}; the largest accepted value is {LARGEST}")))
            }
            _ => Ok(()),
        }
    }
    let sizes = table.iter().filter(|(name, _)| *name != "seed");
    sizes.into_iter().try_for_each(|(name, value)| walk(name, value))
}

/// The message of a `toml` error in one line, without its source excerpt: `|`, `1 | seed =`, `  |   ^`.
fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let is_excerpt = |line: &str| {
        line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start().starts_with('|')
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !is_excerpt(line));
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

/// The Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Parses a size such as 141GB, 24GiB or 80g; a number alone counts bytes.
pub(crate) fn bytes(text: &str) -> Result<usize, String> {
    let wrong = || format!("expected a size such as 141GB, 24GiB or 16000MB, not `{text}`");
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        "tib" => f64::from(1 << 20) * f64::from(1 << 20),
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * unit;
    if bytes.is_finite() { Ok(bytes as usize) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_toml_has_no_room_for_is_called_too_large() {
        #[derive(Debug, serde::Deserialize)]
        struct Seeded {
            seed: u64,
        }
        for (text, said) in [
            ("9223372036854775807", None),
            (
                "9223372036854775808",
                Some(
                    "recipe: 9223372036854775808 is too large: the largest whole number is 9223372036854775807",
                ),
            ),
            ("99999999999999999999", Some("recipe: 99999999999999999999 is too large")),
            ("seven", Some("recipe: invalid type: string \"seven\"")),
        ] {
            let mut table = toml::Table::new();
            set(&mut table, &format!("seed={text}")).unwrap();
            match (read::<Seeded>(&table, ""), said) {
                (Ok(read), None) => assert_eq!(read.seed, i64::MAX as u64),
                (Err(error), Some(said)) => assert!(error.to_string().contains(said), "{error}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn sizes_of_gpus_are_read_as_people_write_them() {
        assert_eq!(bytes("141GB"), Ok(141_000_000_000));
        assert_eq!(bytes("24 GiB"), Ok(24 << 30));
        assert_eq!(bytes("1.5tb"), Ok(1_500_000_000_000));
        assert_eq!(bytes("1000"), Ok(1000));
        assert_eq!(bytes("0GB"), Ok(0));
        for wrong in ["", "GB", "-1GB", "1.2.3GB", "141 giga", "1e400"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}

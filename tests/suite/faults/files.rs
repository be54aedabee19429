//! The files of a folder: which are whole, and whether two runs wrote the same.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// The files below a folder.
pub(super) fn files(folder: &Path) -> Files {
    let mut all = Files::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                all.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    all
}

pub(super) fn restore(folder: &Path, files: &Files, below: &str) {
    for (name, bytes) in files.iter().filter(|(name, _)| is_below(name, below)) {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

pub(super) fn is_below(name: &str, folder: &str) -> bool {
    folder.is_empty()
        || name.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The bytes of the header of a safetensors file, with the length before it.
fn header(bytes: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*bytes.first_chunk()?) as usize;
    bytes.get(8..8 + length).map(|_| 8 + length)
}

/// What has to be the same of a file at the end of two runs: all but times and what follows from them. `None` if that is nothing.
fn essence(name: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let file = name.rsplit('/').next().unwrap();
    let without = |line: &[u8], keys: &[&str]| -> Vec<u8> {
        let mut line: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
        for key in keys {
            line.as_object_mut().map(|line| line.remove(*key));
            line.get_mut("values")
                .and_then(|v| v.as_object_mut())
                .map(|values| values.remove(*key));
        }
        format!("{line}\n").into_bytes()
    };
    match file {
        ".lock" | "report.html" => Some(Vec::new()),
        "metrics.jsonl" => {
            let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            let keys = ["views_per_second", "waiting", "seconds"];
            Some(lines.flat_map(|line| without(line, &keys)).collect())
        }
        "result.json" => {
            Some(without(bytes, &["seconds", "memory_mib", "views_per_second", "waiting"]))
        }
        _ if file.starts_with("events.out.tfevents.") => None,
        _ if file.starts_with("step-") || file == "best.safetensors" => {
            Some(bytes[header(bytes).unwrap_or(0)..].to_vec())
        }
        _ => Some(bytes.to_vec()),
    }
}

pub(super) fn essences(files: &Files, below: &str) -> Files {
    let own = files.iter().filter(|(name, _)| is_below(name, below));
    own.filter_map(|(name, bytes)| Some((name.clone(), essence(name, bytes)?))).collect()
}

/// Whether a file with the name of a whole one is a whole one. Logs grow by lines and are cut off where the last checkpoint says.
pub(super) fn is_whole(name: &str, bytes: &[u8], end: &Files) -> bool {
    let file = name.rsplit('/').next().unwrap();
    let text = || std::str::from_utf8(bytes).unwrap_or_default();
    match file.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "partial" | "lock" | "jsonl" | "selfsup" => true,
        "safetensors" => header(bytes).is_some_and(|from| {
            let header: serde_json::Value =
                serde_json::from_slice(&bytes[8..from]).unwrap_or_default();
            let ends = header.as_object().into_iter().flatten();
            let ends = ends.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
            ends.max() == Some((bytes.len() - from) as u64)
        }),
        "html" => text().trim_end().ends_with("</html>"),
        "json" => serde_json::from_slice::<serde_json::Value>(bytes).is_ok(),
        "toml" => text().contains("[method]") || text().contains("[[arm]]"),
        "md" | "csv" | "txt" => text().ends_with('\n'),
        _ => end.get(name).is_some_and(|end| end == bytes),
    }
}

/// Compares results. Pictures and pages that a note says are missing may be missing: they are made from the rest.
pub(super) fn same(got: &Files, want: &Files, said: &str) -> Result<(), String> {
    let noted = |name: &str| {
        name.ends_with("report.html") && said.contains("the report could not be written")
            || name.ends_with("gallery.json") && said.contains("the pictures could not be drawn")
            || name.ends_with("eval-skipped.txt") && said.contains("the list could not be written")
    };
    let names: BTreeSet<&String> = got.keys().chain(want.keys()).collect();
    for name in names.into_iter().filter(|name| !noted(name)) {
        match (got.get(name), want.get(name)) {
            (None, _) => return Err(format!("the result lacks {name}")),
            (_, None) => return Err(format!("the result has {name}")),
            (Some(got), Some(want)) if got != want => {
                let [got, want] = [got, want]
                    .map(|bytes| String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]));
                let place = if name.ends_with("jsonl") {
                    format!(": {got} is not {want}")
                } else {
                    String::new()
                };
                return Err(format!("the result differs in {name}{place}"));
            }
            _ => {}
        }
    }
    Ok(())
}

//! Imports point down: the floors of `lib.rs`, read from the source.

use std::path::{Path, PathBuf};

/// Modules from the ground up; those of one row may use each other.
const FLOORS: &[&[&str]] = &[
    &["error", "files"],
    &["device"],
    &["tensor"],
    &["arena", "tape", "ops"],
    &["nn", "optim"],
    &["methods", "data"],
    &["train", "eval"],
    &["cli", "bench"],
];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

pub fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The code of a file: no comments, nothing from the unit tests at its end on.
pub fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]\nmod") && *line != "mod tests {")
        .filter(|line| !line.trim_start().starts_with("//"))
}

/// Modules that a line of code names after `crate::`.
fn imports(line: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = Vec::new();
    for part in line.split("crate::").skip(1) {
        match part.strip_prefix('{') {
            Some(list) => found.extend(list.split(',').map(|item| word(item.trim()))),
            None => found.push(word(part)),
        }
    }
    found
}

fn upward(module: &str, text: &str) -> Vec<String> {
    let own = floor(module).unwrap_or_else(|| panic!("module {module} is on no floor"));
    let above = |line: &str| imports(line).into_iter().find(|m| floor(m).is_some_and(|f| f > own));
    code(text)
        .filter_map(|line| above(line).map(|m| format!("{module} uses {m}: {}", line.trim())))
        .collect()
}

#[test]
fn imports_point_down() {
    let root = Path::new("src");
    let mut files = Vec::new();
    sources(root, &mut files);
    assert!(files.len() > 40, "only {} source files were found", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let inner = file.strip_prefix(root).unwrap();
        let first = inner.iter().next().unwrap().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if module != "lib" && module != "main" {
            wrong.extend(upward(module, &std::fs::read_to_string(&file).unwrap()));
        }
    }
    assert!(wrong.is_empty(), "imports that point up:\n{}", wrong.join("\n"));
}

#[test]
fn an_upward_import_is_caught() {
    assert_eq!(upward("ops", "use crate::nn::ResNet;").len(), 1);
    assert_eq!(upward("tensor", "use crate::{device::Device, tape::Var};").len(), 1);
    assert_eq!(upward("nn", "use crate::ops;\n// use crate::train::Run;").len(), 0);
}

//! Imports point down: the modules of the source must form the chain that `lib.rs` shows.

use std::path::{Path, PathBuf};

/// The modules of `src/`, lowest first: a total order. A module imports only modules before it.
const ORDER: &[&str] = &[
    "error", "files", "settings", "device", "cpu", "tensor", "arena", "tape", "ops", "nn", "optim",
    "data", "methods", "recipes", "weights", "eval", "train", "bench", "check", "cli",
];

fn layer(module: &str) -> Option<usize> {
    ORDER.iter().position(|&known| known == module)
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

/// The code of a file without comments and without the unit tests at its end.
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
    let importer = layer(module).unwrap_or_else(|| panic!("module {module} is missing from ORDER"));
    let above = |line: &str| {
        imports(line).into_iter().find(|m| layer(m).is_some_and(|layer| layer > importer))
    };
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

#[test]
fn the_picture_in_lib_is_the_tested_order() {
    let lib = std::fs::read_to_string("src/lib.rs").unwrap();
    let rows = lib.lines().filter_map(|line| line.strip_prefix("//! | ")?.split('|').next());
    let name = |cell: &str| cell.trim().trim_matches(['[', '`', ']']).replace("mod@", "");
    let mut shown: Vec<String> = rows.map(name).filter(|name| layer(name).is_some()).collect();
    shown.reverse();
    assert_eq!(shown, ORDER, "the table of layers in src/lib.rs, read from its last row up");
    let declared: Vec<&str> = lib
        .lines()
        .filter_map(|line| {
            line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';')
        })
        .collect();
    for module in &declared {
        assert!(layer(module).is_some(), "module {module} is missing from ORDER");
    }
    assert_eq!(
        declared.len(),
        ORDER.len(),
        "ORDER names a module that src/lib.rs does not declare"
    );
}

/// A source distribution has the manifest as it is and neither tests nor benches, for which cargo would look if it had to guess.
#[test]
fn the_manifest_says_where_tests_and_benches_are() {
    let manifest: toml::Table = std::fs::read_to_string("Cargo.toml").unwrap().parse().unwrap();
    for kind in ["test", "bench"] {
        for target in manifest[kind].as_array().unwrap() {
            let path = target.get("path").and_then(toml::Value::as_str);
            assert!(path.is_some_and(|path| Path::new(path).is_file()), "{kind} {target}");
        }
    }
}

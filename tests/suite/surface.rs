//! The public API, item by item, so that changes to it are deliberate.
//!
//! `UPDATE_SURFACE=1 cargo test surface` rewrites `tests/public-surface.txt`; reviewers read the diff.

use std::collections::BTreeSet;
use std::path::Path;

use super::layers::{code, sources};

/// Names in `pub use`, which make items of private modules public.
fn reexported(text: &str) -> BTreeSet<String> {
    let uses = text.split("pub use ").skip(1).map(|part| part.split(';').next().unwrap());
    let mut names = BTreeSet::new();
    for item in uses.flat_map(|list| list.split(|c: char| !(c.is_alphanumeric() || c == '_'))) {
        names.insert(item.to_string());
    }
    names
}

/// Returns `(kind, name)` of a line that declares a public item.
fn declared(line: &str) -> Option<(String, String)> {
    let rest = line.trim_start().strip_prefix("pub ")?;
    let mut words =
        rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty());
    let kind = words.find(|w| !matches!(*w, "unsafe" | "async"))?;
    let known = ["fn", "struct", "enum", "trait", "const", "static", "type", "mod"];
    if known.contains(&kind) {
        return Some((kind.to_string(), words.next()?.to_string()));
    }
    // A public field: `pub name: Type,`
    (kind != "use" && rest.contains(':')).then(|| ("field".to_string(), kind.to_string()))
}

fn surface() -> BTreeSet<String> {
    let root = Path::new("src");
    let mut files = Vec::new();
    sources(root, &mut files);
    let texts: Vec<(String, String)> = files
        .iter()
        .map(|file| {
            let inner = file.strip_prefix(root).unwrap().with_extension("");
            let parts: Vec<_> = inner.iter().map(|p| p.to_str().unwrap().to_string()).collect();
            let path = parts.join("::").trim_end_matches("::mod").to_string();
            (path, std::fs::read_to_string(file).unwrap())
        })
        .collect();
    let public_modules: BTreeSet<String> = texts
        .iter()
        .flat_map(|(path, text)| {
            let prefix = if path == "lib" { String::new() } else { format!("{path}::") };
            let mods = code(text).filter_map(declared).filter(|(kind, _)| kind == "mod");
            mods.map(move |(_, name)| format!("{prefix}{name}")).collect::<Vec<_>>()
        })
        .collect();
    let reachable = |path: &str| {
        let mut so_far = String::new();
        path.split("::").all(|part| {
            so_far = if so_far.is_empty() { part.into() } else { format!("{so_far}::{part}") };
            path == "lib" || public_modules.contains(&so_far)
        })
    };
    let mut surface = BTreeSet::new();
    for (path, text) in texts.iter().filter(|(path, _)| path != "main") {
        // Re-exports of the nearest public parent module.
        let mut parent = path.as_str();
        while !reachable(parent) {
            parent = parent.rsplit_once("::").map_or("lib", |(parent, _)| parent);
        }
        let own = parent == path;
        let names = texts.iter().find(|(p, _)| p == parent).map(|(_, text)| reexported(text));
        let names = names.unwrap_or_default();
        let mut owner: Option<String> = None;
        for line in code(text) {
            let indented = line.starts_with(' ');
            if !indented && (line.starts_with("impl") || line.contains(" struct ")) {
                let text = line.split(" for ").last().unwrap();
                let start =
                    text.find("> ").filter(|_| text.starts_with("impl<")).map_or(0, |i| i + 2);
                let words = text[start..].split(|c: char| !(c.is_alphanumeric() || c == '_'));
                owner = words
                    .filter(|w| !w.is_empty() && !matches!(*w, "impl" | "pub" | "struct"))
                    .map(String::from)
                    .next();
            }
            let Some((kind, name)) = declared(line) else { continue };
            let top = if indented { owner.clone().unwrap_or_default() } else { name.clone() };
            if !own && !names.contains(&top) {
                continue;
            }
            let place = if parent == "lib" { String::new() } else { format!("{parent}::") };
            let item = if indented { format!("{top}::{name}") } else { name };
            surface.insert(format!("{kind} {place}{item}"));
        }
    }
    surface
}

#[test]
fn the_public_surface_equals_its_list() {
    let list = Path::new("tests/public-surface.txt");
    let now = surface();
    assert!(now.contains("fn tape::step") && now.contains("fn ops::conv2d"), "{now:#?}");
    assert!(now.contains("fn tensor::Tensor::from_slice"), "{now:#?}");
    if std::env::var_os("UPDATE_SURFACE").is_some() {
        let text: String = now.iter().map(|item| format!("{item}\n")).collect();
        std::fs::write(list, text).unwrap();
        return;
    }
    let text = std::fs::read_to_string(list).unwrap();
    let then: BTreeSet<String> = text.lines().map(String::from).collect();
    let (new, gone): (Vec<_>, Vec<_>) =
        (now.difference(&then).collect(), then.difference(&now).collect());
    assert!(
        new.is_empty() && gone.is_empty(),
        "the public surface changed; new: {new:#?}; gone: {gone:#?}; if on purpose, run UPDATE_SURFACE=1 cargo test surface"
    );
}

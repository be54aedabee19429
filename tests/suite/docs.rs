//! The pages of `docs/`: each is in the book, and every link leads to a file and a heading that exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The targets of the links of a page, outside of code.
fn links(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (i, prose) in page.split("```").enumerate() {
        if i % 2 == 0 {
            let targets = prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
            found.extend(targets.map(str::to_owned));
        }
    }
    found
}

/// The anchors of a page's headings, as GitHub and mdBook name them.
fn anchors(page: &str) -> BTreeSet<String> {
    let prose = page.split("```").step_by(2).flat_map(str::lines);
    let headings = prose.filter(|line| line.starts_with('#'));
    let named = |line: &str| {
        let text = line.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(named).collect()
}

fn pages() -> Vec<PathBuf> {
    let files = std::fs::read_dir("docs").unwrap().map(|file| file.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|end| end == "md")).collect()
}

#[test]
fn every_page_is_in_the_book() {
    let summary = std::fs::read_to_string("docs/SUMMARY.md").unwrap();
    let listed = links(&summary);
    let distinct: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(listed.len(), distinct.len(), "docs/SUMMARY.md lists a page twice");
    let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let there: BTreeSet<String> =
        pages().into_iter().map(name).filter(|name| name != "SUMMARY.md").collect();
    assert_eq!(distinct, there, "docs/SUMMARY.md against the files of docs/");
}

#[test]
fn every_link_leads_somewhere() {
    let mut broken = Vec::new();
    for path in pages().into_iter().chain([PathBuf::from("README.md")]) {
        let page = std::fs::read_to_string(&path).unwrap();
        for link in links(&page).into_iter().filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap_or(Path::new("")).join(file),
            };
            let has = |anchor: &str| {
                let text = std::fs::read_to_string(&target).unwrap_or_default();
                anchors(&text).contains(anchor)
            };
            if !target.exists() || !(anchor.is_empty() || has(anchor)) {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

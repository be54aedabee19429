//! Compiled files by the content of their sources: a file whose source, headers, flags and compiler are the same is not compiled again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Returns the text that names a compiled file: the source and the headers that it includes, each once, after `start`. Headers are
/// searched for as nvcc does, next to the file and in `folders`; those of the toolkit, which are elsewhere, belong to its version.
pub(crate) fn content(source: &Path, folders: &[PathBuf], start: String) -> String {
    let mut content = start;
    append(source, folders, &mut BTreeSet::new(), &mut content);
    content
}

fn append(
    path: &Path,
    folders: &[PathBuf],
    seen: &mut BTreeSet<PathBuf>,
    content: &mut String,
) -> bool {
    let Ok(source) = fs::read(path) else { return false };
    let source = String::from_utf8_lossy(&source);
    if !seen.insert(path.to_owned()) {
        return true;
    }
    for name in source.lines().filter_map(included) {
        let own = path.parent().into_iter();
        for folder in own.chain(folders.iter().map(PathBuf::as_path)) {
            if append(&folder.join(name), folders, seen, content) {
                break;
            }
        }
    }
    content.push_str(&source);
    true
}

/// The name in an `#include` line.
fn included(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
    let rest = rest.trim_start();
    let close = if rest.starts_with('<') { '>' } else { '"' };
    rest.strip_prefix(['"', '<'])?.split(close).next()
}

/// FNV-1a in 128 bits, which names cached files by their content.
pub(crate) fn hash(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_header_changes_the_content_and_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("common")).unwrap();
        fs::write(path("a.cu"), "#include \"b.cuh\"\n  #  include <c.cuh>\n#include <stdint.h>\n")
            .unwrap();
        fs::write(path("b.cuh"), "#include \"a.cu\"\nint b;\n").unwrap(); // a circle
        fs::write(path("common/c.cuh"), "int c;\n").unwrap();
        let content = || content(&path("a.cu"), &[path("common")], "13.0\n".into());
        let first = content();
        assert!(
            first.starts_with("13.0\n") && first.contains("int b;") && first.contains("int c;")
        );
        assert_eq!(first, content());
        fs::write(path("common/c.cuh"), "int c = 1;\n").unwrap();
        assert_ne!(hash(first.as_bytes()), hash(content().as_bytes()));
    }

    #[test]
    fn names_are_those_of_fnv_1a() {
        assert_eq!(hash(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(hash(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }
}

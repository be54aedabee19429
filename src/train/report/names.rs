//! Names for a page that leaves the machine: what tells things apart, without the folders around them.

use std::path::{Component, Path};

/// Returns the shortest ends of paths that still tell different paths apart, of at least one component.
pub(super) fn short(paths: &[&Path]) -> Vec<String> {
    let parts: Vec<Vec<String>> = paths.iter().map(|path| components(path)).collect();
    let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
    let ends = |length: usize| -> Vec<String> {
        let end = |parts: &Vec<String>| parts[parts.len().saturating_sub(length)..].join("/");
        parts.iter().map(end).collect()
    };
    let tells_apart = |ends: &[String]| {
        let pairs = ends.iter().zip(&parts).enumerate();
        pairs.clone().all(|(i, (end, parts))| {
            pairs.clone().skip(i + 1).all(|(_, (other, more))| end != other || parts == more)
        })
    };
    (1..longest).map(ends).find(|ends| tells_apart(ends)).unwrap_or_else(|| ends(longest))
}

fn components(path: &Path) -> Vec<String> {
    let named = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(named).collect()
}

/// Returns the name of an image relative to its data folder; outside it, an absolute name is reduced to its file name.
pub(super) fn relative(name: &str, data: &str) -> String {
    let path = Path::new(name);
    match path.strip_prefix(data) {
        Ok(rest) if !data.is_empty() && rest.components().next().is_some() => {
            rest.display().to_string()
        }
        _ if path.is_absolute() => {
            path.file_name().unwrap_or_default().to_string_lossy().into_owned()
        }
        _ => name.to_owned(),
    }
}

/// Replaces each absolute path in a sentence by its last component.
pub(super) fn without_folders(sentence: &str) -> String {
    let shortened = sentence.split_inclusive(char::is_whitespace).map(|word| {
        let starts_path = |at: usize| {
            let before = word[..at].chars().next_back();
            before.is_none_or(|c| !(c.is_alphanumeric() || "./:".contains(c)))
        };
        match (word.find('/'), word.trim_end().trim_end_matches('/').rfind('/')) {
            (Some(first), Some(last)) if starts_path(first) => {
                format!("{}{}", &word[..first], &word[last + 1..])
            }
            _ => word.to_owned(),
        }
    });
    shortened.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_as_short_as_their_differences_allow() {
        let short = |paths: &[&str]| short(&paths.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(short(&["/home/me/runs/a", "/home/me/runs/b"]), ["a", "b"]);
        assert_eq!(short(&["/home/me/one/a", "/home/me/two/a"]), ["one/a", "two/a"]);
        assert_eq!(short(&["/x/a", "/x/a", "runs/b/"]), ["a", "a", "b"]);
        assert_eq!(short(&["/a", "/b/a"]), ["a", "b/a"]);
        assert_eq!((short(&["/"]), short(&[])), (vec![String::new()], vec![]));
    }

    #[test]
    fn names_of_images_start_at_the_data_folder() {
        assert_eq!(
            relative("/home/me/photos/train/ape/0.png", "/home/me/photos"),
            "train/ape/0.png"
        );
        assert_eq!(relative("photos/train/ape/0.png", "photos/"), "train/ape/0.png");
        assert_eq!(relative("/mnt/other/0.png", "/home/me/photos"), "0.png");
        assert_eq!(relative("/mnt/a/batch.bin, image 3", ""), "batch.bin, image 3");
        assert_eq!(relative("ape/0.png", "/home/me/set.pack"), "ape/0.png");
    }

    #[test]
    fn sentences_lose_their_folders() {
        let sentence =
            "`/home/me/data/a.png`: damaged; 900/s of http://x/y and a/b, see /tmp/logs/";
        let kept = "`a.png`: damaged; 900/s of http://x/y and a/b, see logs/";
        assert_eq!(without_folders(sentence), kept);
    }
}

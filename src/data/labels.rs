//! Which images of a set have labels: a share of each class, or a list.
//!
//! A share is the same for every seed of a run, as a published list is; the images of 1% are among those of 10%.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Component, Path};

use unicode_normalization::UnicodeNormalization;

use super::source::Source;
use crate::device::{Philox, Purpose};
use crate::error::{Error, Result, printable};
use crate::files::is_file;

/// Seed of the shuffle that picks a share.
const SEED: u64 = 0;

/// Returns the indices of a set's labelled images in ascending order. `which` is a share such as `10%` (of each class, at
/// least one image) or a file with one image per line: a file name (`n01440764_10074.JPEG`), with as much of its path as
/// makes it unique and with the extension or without, or an index into the set, from 0.
///
/// # Errors
/// If the share is out of range, the set has no labels, or a line names no image or several.
pub fn labelled(source: &dyn Source, which: &str) -> Result<Vec<u32>> {
    let Some(percent) = which.trim().strip_suffix('%') else {
        let file = Path::new(which);
        if !file.exists() && which.trim().parse::<f64>().is_ok() {
            let reason =
                "a share ends in %, such as 10%; anything else is a file with one image per line";
            return Err(Error::config(format!("data.labels = {which}: {reason}")));
        }
        if !is_file(file)? {
            return Err(Error::format(
                file,
                "is no file: data.labels is a share such as 10%, or a list with the name of an image on each line",
            ));
        }
        return listed(source, file);
    };
    let percent = percent.trim().parse().ok().filter(|&p: &f64| p > 0.0 && p <= 100.0);
    let percent = percent.ok_or_else(|| {
        Error::config(format!("data.labels = {which}: a share is above 0% and at most 100%"))
    })?;
    let labels = labels_of(source)?;
    let share = |members: usize| ((members as f64 * percent / 100.0).round() as usize).max(1);
    let mut chosen = of_each_class(&labels, share, SEED, 0);
    chosen.sort_unstable();
    Ok(chosen)
}

/// Returns the class of each image.
///
/// # Errors
/// If the set has no labels.
pub fn labels_of(source: &dyn Source) -> Result<Vec<u32>> {
    let label = |i| {
        source.label(i).ok_or_else(|| {
            Error::config(format!("{} has no label: put images into class folders", source.name(i)))
        })
    };
    (0..source.len()).map(label).collect()
}

/// Returns `count(members)` images of each class (all if there are fewer) in class order, each class shuffled by `seed` and
/// `draw`. A greater count returns the same images and more.
pub fn of_each_class(
    labels: &[u32],
    count: impl Fn(usize) -> usize,
    seed: u64,
    draw: u32,
) -> Vec<u32> {
    let classes = labels.iter().max().map_or(0, |&l| l as usize + 1);
    let mut members = vec![Vec::new(); classes];
    labels.iter().zip(0..).for_each(|(&label, i)| members[label as usize].push(i));
    let mut chosen = Vec::new();
    for (class, mut members) in members.into_iter().enumerate() {
        Philox::new(seed, Purpose::Labels, draw, class as u32).shuffle(&mut members);
        members.truncate(count(members.len()));
        chosen.extend(members);
    }
    chosen
}

/// The places of the images that a file names.
fn listed(source: &dyn Source, file: &Path) -> Result<Vec<u32>> {
    let bytes = std::fs::read(file).map_err(Error::io(file))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::format(file, "is not UTF-8 text with one image per line"))?;
    // Editors of Windows begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let lines: Vec<(usize, &str)> =
        (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()).collect();
    let all = lines.iter().flat_map(|(_, line)| readings(line));
    let wanted: HashSet<String> = all.map(|reading| last_part(&comparable(&reading))).collect();
    let named = || {
        let all = whole_paths((0..source.len()).map(|i| source.name(i)));
        (0_u32..).zip(all.map(|name| comparable(&name)))
    };
    let names = Names::of(named().filter(|(_, name)| wanted.contains(&last_part(name))));
    let without_extension = named().map(|(i, name)| (i, stem(&name).to_owned()));
    let stems = Names::of(without_extension.filter(|(_, name)| wanted.contains(&last_part(name))));
    let mut chosen = Vec::new();
    for (number, line) in lines {
        let wrong = |what: String| Error::format(file, format!("line {number}: {what}"));
        let (mut found, by_stem) = (names.called(line), stems.called(line));
        let line = line.trim();
        if found.is_empty() {
            let place = line.parse().ok().filter(|&i: &u32| (i as usize) < source.len());
            found = by_stem;
            match (place, &found[..]) {
                (Some(place), [image, ..]) if place != *image => {
                    return Err(wrong(format!(
                        "{line} may be {} or the index {place}: write the whole name",
                        source.name(*image as usize)
                    )));
                }
                // Numbers in file names have leading zeros, indices have none.
                (Some(place), []) if line == place.to_string() => found.push(place),
                _ => {}
            }
        }
        match found[..] {
            [place] => chosen.push(place),
            [] => {
                let line = printable(OsStr::new(line));
                return Err(wrong(format!(
                    "the training images have no {line}: a line is a file, CLASS/FILE or an index from 0"
                )));
            }
            _ if line.contains('/') => {
                return Err(wrong(format!(
                    "several images are called {line}: write more of the path"
                )));
            }
            _ => {
                return Err(wrong(format!("several images are called {line}: write CLASS/{line}")));
            }
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(Error::format(file, "names no image"));
    }
    Ok(chosen)
}

/// What a line may be: a name, a name as the program prints it, either between spaces that do not belong to it, and a path
/// with the separators of Windows.
fn readings(line: &str) -> [String; 5] {
    let printed = |line: &str| printable(OsStr::new(line));
    let trimmed = line.trim();
    [printed(line), line.into(), printed(trimmed), trimmed.into(), trimmed.replace('\\', "/")]
}

/// A path as paths are compared: macOS decomposes the accents of file names, and who writes a list does not see it.
fn comparable(path: &str) -> String {
    slashes(path).nfc().collect()
}

fn slashes(path: &str) -> String {
    if cfg!(windows) { path.replace('\\', "/") } else { path.to_owned() }
}

/// The names of images as they are compared with those in lists and tables: whole paths where they are files, so that it is the same how
/// the folder was typed.
pub(super) fn whole_paths(names: impl IntoIterator<Item = String>) -> impl Iterator<Item = String> {
    let mut names = names.into_iter().peekable();
    // Images of a pack have names of files that need not be there any more.
    let are_files = names.peek().is_some_and(|name| Path::new(name).is_file());
    names.map(move |name| if are_files { whole_path(&name).unwrap_or(name) } else { name })
}

fn whole_path(name: &str) -> Option<String> {
    let path = Path::new(name);
    let whole = match path.components().any(|part| part == Component::ParentDir) {
        true => path.parent()?.canonicalize().ok()?.join(path.file_name()?),
        false => std::path::absolute(path).ok()?,
    };
    whole.to_str().map(Into::into)
}

pub(super) fn last_part(path: &str) -> String {
    let path = slashes(path);
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

/// A path without the extension of its last part.
pub(super) fn stem(path: &str) -> &str {
    let last = last_part(path).len();
    match path[path.len() - last..].rfind('.') {
        Some(dot) if dot > 0 => &path[..path.len() - last + dot],
        _ => path,
    }
}

/// Images by the last parts of their names.
pub(super) struct Names(HashMap<String, Vec<(u32, String)>>);

impl Names {
    pub(super) fn of(images: impl IntoIterator<Item = (u32, String)>) -> Self {
        let mut all: HashMap<String, Vec<(u32, String)>> = HashMap::new();
        for (image, name) in images {
            let name = comparable(&name);
            all.entry(last_part(&name)).or_default().push((image, name));
        }
        Self(all)
    }

    /// The images that a line of a list may mean: of its several readings, by that which agrees with more of an image's path.
    pub(super) fn called(&self, line: &str) -> Vec<u32> {
        let best = readings(line).iter().fold((0, Vec::new()), |best, reading| {
            let named = self.ending(reading);
            if named.0 > best.0 { named } else { best }
        });
        best.1
    }

    /// The end of an image's path must be the line, or the line may be a longer path of which the image's is the end; of an
    /// absolute path, which may be that of another machine, only the longest common end counts, at least a folder and a file.
    /// Comes with the length of that end, in parts; 0 without an image.
    fn ending(&self, line: &str) -> (usize, Vec<u32>) {
        let line = comparable(line);
        let parts = |path: &str| -> Vec<String> {
            path.split('/').filter(|part| !matches!(*part, "" | ".")).map(Into::into).collect()
        };
        let wanted = parts(&line);
        let mut best = (0, Vec::new());
        for (image, name) in self.0.get(&last_part(&line)).into_iter().flatten() {
            let name = parts(name);
            let same =
                wanted.iter().rev().zip(name.iter().rev()).take_while(|(a, b)| a == b).count();
            let shorter = wanted.len().min(name.len());
            let needed = if line.starts_with('/') { shorter.min(2) } else { shorter };
            if same >= needed.max(best.0).max(1) {
                if same > best.0 {
                    best = (same, Vec::new());
                }
                best.1.push(*image);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Folder, Split, fashion_scattered};

    #[test]
    fn a_share_has_every_class_alike_and_a_smaller_one_is_part_of_it() {
        let set = fashion_scattered(Split::Test);
        let [some, few, least] =
            ["10%", "1 %", "0.01%"].map(|share| labelled(&set, share).unwrap());
        let of = |class, i: u32| set.label(i as usize) == Some(class);
        for (chosen, share) in [(&some, 0.1), (&few, 0.01), (&least, 0.0001)] {
            assert!(chosen.is_sorted_by(|a, b| a < b));
            for class in 0..10 {
                let members = (0..set.len() as u32).filter(|&i| of(class, i)).count();
                let each = ((members as f64 * share).round() as usize).max(1);
                let got = chosen.iter().filter(|&&i| of(class, i)).count();
                assert_eq!(got, each, "class {class} of {members}");
            }
        }
        assert!(few.iter().all(|i| some.contains(i)) && least.iter().all(|i| few.contains(i)));
        for wrong in ["0%", "101%", "x%", "nan%"] {
            let message = labelled(&set, wrong).unwrap_err().to_string();
            assert!(message.contains("above 0% and at most 100%"), "{message}");
        }
        let message = labelled(&set, "0.1").unwrap_err().to_string();
        assert!(message.contains("a share ends in %, such as 10%"), "{message}");
        for nowhere in ["missing.txt", "src"] {
            let message = labelled(&set, nowhere).unwrap_err().to_string();
            assert!(
                message.contains(&format!("{nowhere}: is no file: data.labels is")),
                "{message}"
            );
        }
    }

    #[test]
    fn a_list_names_images_and_its_mistakes_are_reported_by_line() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cat/1.png", "cat/2.png", "dog/1.png"] {
            let path = root.path().join("train").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::new(2, 2).save(path).unwrap();
        }
        let set = Folder::open(&root.path().join("train")).unwrap();
        let list = root.path().join("list.txt");
        let read = |text: &str| {
            std::fs::write(&list, text).unwrap();
            labelled(&set, list.to_str().unwrap()).map_err(|e| e.to_string())
        };
        assert_eq!(read("dog/1.png\n\n2.png\r\n").unwrap(), [1, 2]);
        assert_eq!(read("0\n0\n").unwrap(), [0]);
        assert_eq!(read("\u{feff}dog/1.png\r\n./cat/1.png\r\n").unwrap(), [0, 2]);
        assert_eq!(read(" 2.png \ndog\\1.png\n").unwrap(), [1, 2]);
        let whole = root.path().join("train/dog/1.png").display().to_string();
        assert_eq!(read(&whole).unwrap(), [2]);
        assert_eq!(read("/another/machine/train/cat/1.png\ntrain/dog/1.png").unwrap(), [0, 2]);
        for (text, message) in [
            ("2.png\n1.png", "line 2: several images are called 1.png: write CLASS/1.png"),
            (
                "3",
                "line 1: the training images have no 3: a line is a file, CLASS/FILE or an index from 0",
            ),
            (
                "bird/2.png",
                "line 1: the training images have no bird/2.png: a line is a file, CLASS/FILE or an index from 0",
            ),
            (
                "/x/bird/2.png",
                "line 1: the training images have no /x/bird/2.png: a line is a file, CLASS/FILE or an index from 0",
            ),
            ("\n", "names no image"),
        ] {
            let got = read(text).unwrap_err();
            assert!(got.ends_with(message), "{got}");
        }
    }

    #[test]
    fn a_number_in_a_list_is_a_name_or_an_index_and_never_either() {
        let root = tempfile::tempdir().unwrap();
        for name in ["cat/1.png", "cat/2.png", "dog/0.png", "dog/0007.png", "dog/9.png"] {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::new(2, 2).save(path).unwrap();
        }
        let set = Folder::open(root.path()).unwrap(); // in this order
        let list = root.path().join("list.txt");
        let read = |text: &str| {
            std::fs::write(&list, text).unwrap();
            labelled(&set, list.to_str().unwrap()).map_err(|e| e.to_string())
        };
        // 3 and 4 are no names, 9 and 0007 no indices.
        assert_eq!(read("0007\ncat/1\n9\n4\n3\n").unwrap(), [0, 3, 4]);
        for (text, message) in [
            ("0", "line 1: 0 may be "),
            ("0", "dog/0.png or the index 0: write the whole name"),
            ("2", "cat/2.png or the index 2: write the whole name"),
            ("0003", "line 1: the training images have no 0003"),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(message), "{said}");
        }
    }
}

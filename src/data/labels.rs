//! Which images of a set have labels: a share of each class, or a list.
//!
//! A share is the same images for every seed of a run, as a published list is; 1% is part of 10%.

use std::collections::HashMap;
use std::path::Path;

use super::source::Source;
use crate::device::{Philox, Purpose};
use crate::error::{Error, Result};

/// What decides the images of a share.
const SEED: u64 = 0;

/// The places of a set's labelled images, rising: `10%` of each class, at least one, or the images that a file names, one a
/// line: a file's name (`n01440764_10074.JPEG`), with its class folder where names repeat, or a place in the set, from 0.
///
/// # Errors
/// When the share is none, the set has no labels, or a line names no image or several.
pub fn labelled(source: &dyn Source, which: &str) -> Result<Vec<u32>> {
    let Some(percent) = which.trim().strip_suffix('%') else {
        return listed(source, Path::new(which));
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

/// The class of each image.
///
/// # Errors
/// When the set has no labels.
pub fn labels_of(source: &dyn Source) -> Result<Vec<u32>> {
    let label = |i| {
        source.label(i).ok_or_else(|| {
            Error::config(format!("{} has no label: put images into class folders", source.name(i)))
        })
    };
    (0..source.len()).map(label).collect()
}

/// `count(members)` images of each class, or all where there are fewer, in class order, each class shuffled by `seed` and
/// `draw`: with a greater count come the same and more.
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

fn listed(source: &dyn Source, file: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
    // By the last part of a name, and by the last two; `None` where several images have it.
    let mut places: HashMap<String, Option<u32>> = HashMap::new();
    for i in 0..source.len() {
        let name = source.name(i).replace('\\', "/");
        let parts: Vec<&str> = name.rsplitn(3, '/').collect();
        let short = parts[0].to_owned();
        let long = parts.get(1).map(|folder| format!("{folder}/{short}"));
        for key in std::iter::once(short).chain(long) {
            places.entry(key).and_modify(|place| *place = None).or_insert(Some(i as u32));
        }
    }
    let mut chosen = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let name = line.trim();
        if name.is_empty() {
            continue;
        }
        let place = places.get(name).copied().or_else(|| {
            let place = name.parse().ok().filter(|&i: &u32| (i as usize) < source.len())?;
            Some(Some(place))
        });
        let wrong = |what: &str| Error::format(file, format!("line {}: {what}", number + 1));
        chosen.push(match place {
            Some(Some(place)) => place,
            Some(None) => {
                return Err(wrong(&format!(
                    "several images are called {name}: write CLASS/{name}"
                )));
            }
            None => return Err(wrong(&format!("the training images have no {name}"))),
        });
    }
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(Error::format(file, "names no image"));
    }
    Ok(chosen)
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
    }

    #[test]
    fn a_list_is_taken_by_name_and_its_mistakes_by_line() {
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
        assert_eq!(read("0\n2\n2\n").unwrap(), [0, 2]);
        for (text, message) in [
            ("2.png\n1.png", "line 2: several images are called 1.png: write CLASS/1.png"),
            ("3", "line 1: the training images have no 3"),
            ("\n", "names no image"),
        ] {
            let got = read(text).unwrap_err();
            assert!(got.ends_with(message), "{got}");
        }
    }
}

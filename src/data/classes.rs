//! One list of classes for all splits of a set.
//!
//! Every split of a set has folders (or an index) of its own, and a split may lack a class. A label means the same in all
//! splits only if classes are numbered by name: the training split's classes come first, in its order; classes that only
//! another split has come after them, so that no training image shares their numbers.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use unicode_normalization::UnicodeNormalization;

use crate::error::{Error, Result, printable};

/// Class names in a message.
const NAMED: usize = 10;

/// The classes of a split under the numbers of a set.
#[derive(Debug)]
pub struct Merged {
    /// The training split's classes, then those that only this split has.
    pub classes: Vec<String>,
    /// For each class of the split, its place in `classes`.
    pub numbers: Vec<u32>,
    /// How many of `classes` are the training split's.
    first: usize,
}

/// What a person sees of a name: not its case, spaces around it, or how its accents are encoded (macOS decomposes them). Of a number
/// its value: tables that other programs wrote have `1.0` and `01` for `1`.
fn look(name: &str) -> String {
    match number(name) {
        Some(value) => value.to_string(),
        None => name.trim().nfc().flat_map(char::to_lowercase).collect(),
    }
}

/// The value of a name that is a number, not a word such as `inf`.
fn number(name: &str) -> Option<f64> {
    let is_digits = |c: char| c.is_ascii_digit() || "+-.eE".contains(c);
    let name = name.trim();
    name.chars().all(is_digits).then(|| name.parse().ok()).flatten()
}

/// In what two names of one look differ.
fn difference(a: &str, b: &str) -> &'static str {
    if a.trim() != a || b.trim() != b {
        "spaces around it"
    } else if number(a).is_some() {
        "how the number is written"
    } else if a.to_lowercase() == b.to_lowercase() {
        "case"
    } else {
        "how accents are encoded (Unicode NFC or NFD)"
    }
}

/// Numbers the classes of the split at `path` as the training split does.
///
/// # Errors
/// If a class differs from one of the training split by case, spaces around it, the encoding of accents or the form of a number
/// only, or the two splits share no class.
pub fn merge(path: &Path, first: &[String], own: &[String]) -> Result<Merged> {
    let places: HashMap<&str, u32> = first.iter().map(String::as_str).zip(0..).collect();
    let alike: HashMap<String, &str> =
        first.iter().map(|name| (look(name), name.as_str())).collect();
    let mut merged = Merged { classes: first.to_vec(), numbers: Vec::new(), first: first.len() };
    for name in own {
        if let Some(&place) = places.get(name.as_str()) {
            merged.numbers.push(place);
            continue;
        }
        if let Some(other) = alike.get(&look(name)) {
            let reason = format!(
                "has class {name}, and the train split has class {other}, which differs in {}: if they are the same class, give them the same name",
                difference(name, other)
            );
            return Err(Error::format(path, reason));
        }
        merged.numbers.push(merged.classes.len() as u32);
        merged.classes.push(name.clone());
    }
    let new = merged.classes.len() - first.len();
    if !first.is_empty() && new == own.len() && new > 0 {
        let reason = format!(
            "has classes ({}), none of which the train split has ({}): no image of it could be right",
            list(own),
            list(first)
        );
        return Err(Error::format(path, reason));
    }
    Ok(merged)
}

/// A sentence on classes of one split that look alike, if there are any: they count as different ones.
pub fn twins(path: &Path, classes: &[String]) -> Option<String> {
    let mut seen: HashMap<String, &str> = HashMap::new();
    let twins = classes.iter().filter_map(|name| {
        let first = seen.insert(look(name), name)?;
        Some(format!("{first} and {name} (in {})", difference(first, name)))
    });
    let twins: Vec<String> = twins.collect();
    (!twins.is_empty()).then(|| {
        format!(
            "{}: classes that look alike count as different ones: {}; if they are the same, give them the same name",
            printable(path.as_os_str()),
            list(&twins)
        )
    })
}

/// Compares the classes that a split's images have with those of the training split's images, where both have the numbers of one list:
/// the errors of [`merge`], or a sentence on those that no training image has.
pub fn compare(
    path: &Path,
    classes: &[String],
    training: impl Iterator<Item = u32>,
    labels: &[u32],
) -> Result<Option<String>> {
    let [first, own] = [training.collect(), labels.iter().copied().collect::<BTreeSet<u32>>()];
    let names = |used: &BTreeSet<u32>| -> Vec<String> {
        used.iter().map(|&class| classes[class as usize].clone()).collect()
    };
    let merged = merge(path, &names(&first), &names(&own))?;
    let places: HashMap<u32, u32> = own.into_iter().zip(merged.numbers.iter().copied()).collect();
    Ok(merged.note(path, labels.iter().map(|label| places[label])))
}

impl Merged {
    /// A sentence on the classes that the training split lacks, if there are any; `labels` are those of the split's images.
    pub fn note(&self, path: &Path, labels: impl Iterator<Item = u32>) -> Option<String> {
        let new = &self.classes[self.first..];
        if new.is_empty() || self.first == 0 {
            return None;
        }
        let images = labels.filter(|&label| label as usize >= self.first).count();
        let (what, have) = if new.len() == 1 { ("class", "has") } else { ("classes", "have") };
        Some(format!(
            "{}: {what} {} {have} no training images: {images} images count as never right",
            printable(path.as_os_str()),
            list(new)
        ))
    }
}

/// Names for a message, the first few.
fn list(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED);
    let named = names[..names.len() - more].join(", ");
    if more > 0 { format!("{named} and {more} more") } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn classes_keep_the_numbers_of_the_training_part_and_new_ones_follow() {
        let path = Path::new("set/test");
        let merged = merge(path, &names("ape bee cow"), &names("aaa bee cow")).unwrap();
        assert_eq!(
            (merged.classes.clone(), &merged.numbers),
            (names("ape bee cow aaa"), &vec![3, 1, 2])
        );
        let note = merged.note(path, [3, 1, 3].into_iter()).unwrap();
        assert_eq!(
            note,
            "set/test: class aaa has no training images: 2 images count as never right"
        );
        let fewer = merge(path, &names("ape bee cow"), &names("cow")).unwrap();
        assert_eq!((fewer.numbers.clone(), fewer.note(path, [2].into_iter())), (vec![2], None));
    }

    #[test]
    fn names_that_look_alike_are_asked_about() {
        for (train, test, in_what) in [
            ("dog", "Dog", "case"),
            ("dog", "dog ", "spaces around it"),
            ("1", "01", "how the number is written"),
            ("1", "1.0", "how the number is written"),
            ("\u{e9}t\u{e9}", "e\u{301}te\u{301}", "how accents are encoded (Unicode NFC or NFD)"),
        ] {
            let [first, own] = [train, test].map(|name| ["ape".to_owned(), name.to_owned()]);
            let said = merge(Path::new("set/test"), &first, &own).unwrap_err().to_string();
            let expected = format!(
                "has class {test}, and the train split has class {train}, which differs in {in_what}: if"
            );
            assert!(said.contains(&expected), "{said}");
        }
        // Within the training split they are classes of their own: letters, for instance.
        let merged = merge(Path::new("set/test"), &names("A a"), &names("A a")).unwrap();
        assert_eq!(merged.numbers, [0, 1]);
    }

    #[test]
    fn twins_of_one_split_are_told() {
        let said = twins(Path::new("set/train"), &names("A a cat dog 1 01")).unwrap();
        let expected = "set/train: classes that look alike count as different ones: A and a (in case), 1 and 01 (in how the number is written); if";
        assert!(said.starts_with(expected), "{said}");
        assert_eq!(twins(Path::new("set/train"), &names("ape bee 1 2")), None);
    }

    #[test]
    fn parts_that_share_no_class_are_refused() {
        let said =
            merge(Path::new("set/test"), &names("0 1"), &names("cat dog")).unwrap_err().to_string();
        assert!(said.contains("(cat, dog), none of which the train split has (0, 1)"), "{said}");
    }
}

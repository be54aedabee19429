//! What a folder must be read as, from what was written and from the rules alone: nothing here looks at the disk or shares
//! code with the program.
//!
//! The rules are torchvision's `ImageFolder`; one class list by name for all parts; names that a person may take for one
//! class are asked about.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::write::{CLASSES, Part, Written, name};

/// An image that must be listed.
#[derive(Clone)]
pub struct Listed {
    pub path: PathBuf,
    /// Printable, below the folder of the part.
    pub inner: String,
    pub label: Option<u32>,
    /// Its colour, if it can be decoded.
    pub colour: Option<[u8; 3]>,
}

/// What a part must be read as.
#[derive(Clone)]
pub struct Expected {
    pub classes: Vec<String>,
    pub images: Vec<Listed>,
    /// Classes without training images.
    pub new: Vec<String>,
}

impl Expected {
    /// The images that can be decoded.
    pub fn readable(&self) -> impl Iterator<Item = &Listed> {
        self.images.iter().filter(|image| image.colour.is_some())
    }
}

/// A name or a path as it must be printed.
pub fn printed(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = bytes;
    while let Some(&first) = rest.first() {
        let length = (1..=rest.len().min(4)).find(|&n| std::str::from_utf8(&rest[..n]).is_ok());
        match length.map(|n| (n, std::str::from_utf8(&rest[..n]).unwrap())) {
            Some((n, c)) => {
                text += match c {
                    "\t" => "\\t",
                    "\n" => "\\n",
                    "\x1b" => "\\u{1b}",
                    "\\" => "\\\\",
                    c => c,
                };
                rest = &rest[n..];
            }
            None => {
                text += &format!("\\x{first:02x}");
                rest = &rest[1..];
            }
        }
    }
    text
}

/// The class folders of a part.
pub fn classes(part: &Part) -> BTreeMap<&'static [u8], &Written> {
    let all = part.classes.iter().map(|(name, written)| (*name, written));
    all.filter(|(_, written)| !written.is_for_runs()).collect()
}

/// What `part`, written into `folder`, must be read as, if `train` is the training split that its classes are numbered by;
/// or words, one of which the error must have.
pub fn expected(folder: &Path, part: &Part, train: Option<&Part>) -> Result<Expected, Vec<String>> {
    let own = classes(part);
    let mut wrong: Vec<String> = Vec::new();
    if own.values().any(|written| written.images.is_empty()) {
        wrong.push("is a class folder without images".into());
    }
    if own.is_empty() && part.loose.is_empty() {
        wrong.push("has neither class folders nor images".into());
    }
    if !own.is_empty() && !part.loose.is_empty() {
        wrong.push("has both class folders and images of its own".into());
    }
    let known: Vec<usize> =
        train.iter().flat_map(|train| classes(train)).map(|(_, w)| w.class).collect();
    let mut list = known.clone();
    for class in own.values().map(|written| written.class).filter(|class| !known.contains(class)) {
        let (name, alike) = (CLASSES[class].printed, CLASSES[class].alike);
        if let Some(&other) = known.iter().find(|&&other| CLASSES[other].alike == alike) {
            let other = CLASSES[other].printed;
            wrong.push(format!("has class {name}, and the train split has class {other}"));
        }
        list.push(class);
    }
    let shared = own.values().any(|written| known.contains(&written.class));
    if !known.is_empty() && !own.is_empty() && !shared {
        wrong.push("none of which the train split has".into());
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let mut images = Vec::new();
    let mut list_images = |base: &[u8], class: Option<usize>, of: &super::write::Images| {
        for ((below, file), colour) in of {
            let inner = [base, below, b"/", file].concat();
            images.push(Listed {
                path: PathBuf::from(name(
                    &[folder.as_os_str().as_encoded_bytes(), b"/", &inner].concat(),
                )),
                inner: printed(&inner),
                label: class.map(|class| list.iter().position(|&c| c == class).unwrap() as u32),
                colour: *colour,
            });
        }
    };
    for (base, written) in &own {
        list_images(base, Some(written.class), &written.images);
    }
    if own.is_empty() {
        list.clear(); // a part without labels has no classes
    }
    let printed_of = |class: &usize| CLASSES[*class].printed.to_owned();
    let new = if known.is_empty() { &[] } else { list.get(known.len()..).unwrap_or_default() };
    let (classes, new) =
        (list.iter().map(printed_of).collect(), new.iter().map(printed_of).collect());
    for ((_, file), colour) in &part.loose {
        images.push(Listed {
            path: folder.join(name(file)),
            inner: printed(file),
            label: None,
            colour: *colour,
        });
    }
    Ok(Expected { classes, images, new })
}

/// How many held-out images a vote of all training images, or of the nearest alone, gets right, at least and at most: votes
/// weigh `exp(cosine / temperature)`, and votes within a hundredth of each other may go either way, since JPEG is off a little.
pub fn knn_right(train: &Expected, test: &Expected, nearest: bool, temperature: f64) -> [usize; 2] {
    let unit = |image: &Listed| {
        let c = image.colour.unwrap().map(f64::from);
        let norm = c.iter().map(|v| v * v).sum::<f64>().sqrt();
        c.map(|v| v / norm)
    };
    let mut right = [0, 0];
    for query in test.readable() {
        let q = unit(query);
        let mut votes: BTreeMap<u32, f64> = BTreeMap::new();
        for image in train.readable() {
            let v = unit(image);
            let weight = ((q[0] * v[0] + q[1] * v[1] + q[2] * v[2]) / temperature).exp();
            let vote = votes.entry(image.label.unwrap()).or_default();
            *vote = if nearest { vote.max(weight) } else { *vote + weight };
        }
        let own = votes.remove(&query.label.unwrap()).unwrap_or(0.0);
        let other = votes.values().copied().fold(0.0, f64::max);
        right[0] += usize::from(own > other * 1.01);
        right[1] += usize::from(own > other * 0.99);
    }
    right
}

//! Folders drawn at random, read as the model here says: which images, in what order, of what class, and what kNN makes
//! of a set whose classes are plain colours.
//!
//! The model knows what it wrote and never looks at the disk; the rules are torchvision's `ImageFolder` and those of one
//! class list for all splits. `FOLDERS=10000 cargo test folders` draws more.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use selfsup::data::{self, Image, Source, Split};
use selfsup::device::{Device, Philox, Purpose};
use selfsup::eval::{self, Knn};

/// Names of classes as bytes, and as they are printed.
const CLASSES: [(&[u8], &str); 14] = [
    (b"ape", "ape"),
    (b"bee", "bee"),
    (b"Bee", "Bee"),
    (b"cow", "cow"),
    (b"dog", "dog"),
    (b"DOG", "DOG"),
    (b"2024", "2024"),
    (b"a b", "a b"),
    ("ä".as_bytes(), "ä"),
    (b"t\tab", "t\\tab"),
    (b"z\xfe", "z\\xfe"),
    (b"z\xff", "z\\xff"),
    (b"back\\slash", "back\\\\slash"),
    (b"x-ray", "x-ray"),
];

/// A colour for each class; no two point the same way.
const COLOURS: [[u8; 3]; 14] = [
    [255, 0, 0],
    [0, 255, 0],
    [0, 0, 255],
    [255, 255, 0],
    [255, 0, 255],
    [0, 255, 255],
    [255, 255, 255],
    [255, 128, 0],
    [255, 0, 128],
    [128, 255, 0],
    [0, 255, 128],
    [128, 0, 255],
    [0, 128, 255],
    [255, 128, 128],
];

const IMAGES: [&str; 6] = ["png", "jpg", "JPG", "jpeg", "jfif", "jpe"];
const FOREIGN: [&str; 6] = ["webp", "bmp", "gif", "TIF", "heic", "avif"];
const NESTED: [&str; 5] = ["2024", "a", "a-b", "a b", "z"];

/// What was written of a class: the path of each image below the class folder, and whether it can be decoded.
type Written = BTreeMap<(Vec<u8>, Vec<u8>), bool>;

/// A part as it was written.
#[derive(Default)]
struct Part {
    /// Which of `CLASSES`, with its images; sorted by torchvision's key, the folder's path and the file's name.
    classes: BTreeMap<&'static [u8], (usize, Written)>,
    foreign: usize,
    special: usize,
    dangling: usize,
}

/// Draws numbers.
struct Draw(Philox);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0.below(n as u32) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

fn name(bytes: &[u8]) -> OsString {
    std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec())
}

fn bytes_of(name: &OsStr) -> Vec<u8> {
    name.as_encoded_bytes().to_vec()
}

/// PNG files of one pixel, one per class.
fn pictures() -> Vec<Vec<u8>> {
    let picture = |&colour: &[u8; 3]| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let image = image::RgbImage::from_pixel(1, 1, image::Rgb(colour));
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    COLOURS.iter().map(picture).collect()
}

/// Writes files into a folder of a class and says which are images.
fn fill(
    folder: &Path,
    below: &str,
    depth: usize,
    picture: &[u8],
    draw: &mut Draw,
    part: &mut Part,
    into: &mut Written,
) {
    std::fs::create_dir_all(folder).unwrap();
    let key = |file: &str| (below.as_bytes().to_vec(), file.as_bytes().to_vec());
    for i in 0..draw.below(4) {
        let file = format!("{}{i}.{}", draw.of(&["", "b", "B", "-"]), draw.of(&IMAGES));
        let broken = draw.one_in(6);
        std::fs::write(folder.join(&file), if broken { &b"no image"[..] } else { picture })
            .unwrap();
        into.insert(key(&file), !broken);
    }
    if draw.one_in(3) {
        for i in 0..1 + draw.below(2) {
            std::fs::write(folder.join(format!("f{i}.{}", draw.of(&FOREIGN))), "x").unwrap();
            part.foreign += 1;
        }
    }
    if draw.one_in(3) {
        for file in [".DS_Store", "._0.jpg", ".hidden.png", "Thumbs.db", "notes.txt", "jpg"] {
            std::fs::write(folder.join(file), picture).unwrap();
        }
        std::fs::create_dir_all(folder.join(".git")).unwrap();
        std::fs::write(folder.join(".git/x.png"), picture).unwrap();
    }
    if draw.one_in(8) {
        link(Path::new("nowhere.png"), &folder.join("dangling.png"));
        part.dangling += 1;
    }
    if draw.one_in(8) {
        link(folder, &folder.join("circle"));
    }
    if draw.one_in(12) {
        special(&folder.join("pipe.jpg"));
        part.special += 1;
    }
    let mut nested = BTreeSet::new();
    for _ in 0..if depth < 3 { draw.below(3) } else { 0 } {
        nested.insert(draw.of(&NESTED));
    }
    for inner in nested {
        let (folder, below) = (folder.join(inner), format!("{below}/{inner}"));
        fill(&folder, &below, depth + 1, picture, draw, part, into);
    }
}

fn link(to: &Path, from: &Path) {
    std::os::unix::fs::symlink(to, from).unwrap();
}

/// A special file with an image's name. A pipe in its place would block anyone who opens it.
fn special(path: &Path) {
    // The path of a socket has at most 108 bytes, so it is made elsewhere and moved.
    let short = tempfile::tempdir().unwrap();
    std::os::unix::net::UnixListener::bind(short.path().join("s")).unwrap();
    std::fs::rename(short.path().join("s"), path).unwrap();
}

/// Writes a part with some of `CLASSES`.
fn part(
    folder: &Path,
    among: &[usize],
    elsewhere: &Path,
    pictures: &[Vec<u8>],
    draw: &mut Draw,
) -> Part {
    std::fs::create_dir_all(folder).unwrap();
    let mut part = Part::default();
    for &class in among {
        let bytes = CLASSES[class].0;
        let mut written = Written::new();
        let at = folder.join(name(bytes));
        if draw.one_in(8) {
            // The class folder is a link.
            let real = elsewhere.join(format!("{}-{class}", folder.file_name().unwrap().display()));
            fill(&real, "", 0, &pictures[class], draw, &mut part, &mut written);
            link(&real, &at);
        } else {
            fill(&at, "", 0, &pictures[class], draw, &mut part, &mut written);
        }
        if draw.one_in(6) {
            let real = elsewhere.join(format!("linked-{class}.png"));
            std::fs::write(&real, &pictures[class]).unwrap();
            let _ = std::fs::remove_file(at.join("link.png"));
            link(&real, &at.join("link.png"));
            written.insert((Vec::new(), b"link.png".to_vec()), true);
        }
        part.classes.insert(bytes, (class, written));
    }
    part
}

/// What the model expects of a part: its classes, and of each image its file, class and whether it can be read.
struct Expected {
    classes: Vec<String>,
    images: Vec<(PathBuf, u32, bool)>,
}

/// The classes that a set of parts must have, or words of the error.
fn expected(folder: &Path, part: &Part, train: Option<&Part>) -> Result<Expected, String> {
    if part.classes.values().any(|(_, written)| written.is_empty()) {
        return Err("is a class folder without images".into());
    }
    if part.classes.is_empty() {
        return Err("has neither class folders nor images".into());
    }
    let printed = |class: usize| CLASSES[class].1.to_owned();
    let own: Vec<usize> = part.classes.values().map(|(class, _)| *class).collect();
    let mut list: Vec<usize> = match train {
        Some(train) => train.classes.values().map(|(class, _)| *class).collect(),
        None => own.clone(),
    };
    let known = list.clone();
    for &class in own.iter().filter(|class| !known.contains(class)) {
        let lower = printed(class).to_lowercase();
        if let Some(other) = known.iter().find(|&&other| printed(other).to_lowercase() == lower) {
            return Err(format!(
                "has class {}, and the train split has class {}",
                printed(class),
                printed(*other)
            ));
        }
        list.push(class);
    }
    if train.is_some() && !known.is_empty() && !own.iter().any(|class| known.contains(class)) {
        return Err("none of which the train split has".into());
    }
    let mut images = Vec::new();
    for (bytes, (class, written)) in &part.classes {
        let label = list.iter().position(|other| other == class).unwrap() as u32;
        let base = bytes_of(folder.join(name(bytes)).as_os_str());
        for ((below, file), readable) in written {
            let path = [&base[..], below, b"/", file].concat();
            images.push((PathBuf::from(name(&path)), label, *readable));
        }
    }
    Ok(Expected { classes: list.into_iter().map(printed).collect(), images })
}

fn printed(path: &Path) -> String {
    let mut text = String::new();
    for chunk in path.as_os_str().as_encoded_bytes().utf8_chunks() {
        text += &chunk.valid().replace('\\', "\\\\").replace('\t', "\\t");
        chunk.invalid().iter().for_each(|byte| text += &format!("\\x{byte:02x}"));
    }
    text
}

/// Compares an opened part with the model; `None` if both refuse it.
fn compare(
    what: &str,
    opened: selfsup::Result<Box<dyn Source>>,
    expected: Result<Expected, String>,
    part: &Part,
) -> Option<(Box<dyn Source>, Expected)> {
    let (set, expected) = match (opened, expected) {
        (Ok(set), Ok(expected)) => (set, expected),
        (Err(said), Err(words)) => {
            let said = said.to_string();
            assert!(said.contains(&words), "{what}: expected `{words}` in `{said}`");
            return None;
        }
        (Ok(_), Err(words)) => panic!("{what}: opened, but expected `{words}`"),
        (Err(said), Ok(_)) => panic!("{what}: {said}"),
    };
    assert_eq!(set.classes(), expected.classes, "{what}: classes");
    let names: Vec<_> = (0..set.len()).map(|i| set.name(i)).collect();
    let wanted: Vec<_> = expected.images.iter().map(|(path, ..)| printed(path)).collect();
    assert_eq!(names, wanted, "{what}: images");
    let mut image = Image::default();
    for (i, (path, label, readable)) in expected.images.iter().enumerate() {
        assert_eq!(set.label(i), Some(*label), "{what}: label of {}", path.display());
        assert_eq!(set.read(i, &mut image).is_ok(), *readable, "{what}: {}", path.display());
        if *readable {
            let class =
                CLASSES.iter().position(|(_, name)| *name == expected.classes[*label as usize]);
            assert_eq!(
                image.pixels,
                COLOURS[class.unwrap()],
                "{what}: pixels of {}",
                path.display()
            );
        }
    }
    let notes = set.notes().join("\n");
    for (count, words) in [
        (part.foreign, "of other formats"),
        (part.special, "no regular files and are not read"),
        (part.dangling, "links that lead nowhere and are not read"),
    ] {
        assert_eq!(notes.contains(words), count > 0, "{what}: {count} `{words}` in `{notes}`");
        let told =
            notes.contains(&format!("{count} file")) || notes.contains(&format!(": {count}, "));
        assert!(count == 0 || told, "{what}: {count} `{words}` in `{notes}`");
    }
    Some((set, expected))
}

/// kNN over the pixels: right for a held-out image exactly if a training image of its class can be read.
fn compare_knn(
    what: &str,
    train: (&dyn Source, &Expected),
    test: (&dyn Source, &Expected),
    device: &Device,
) {
    let readable = |of: &Expected| -> Vec<u32> {
        of.images.iter().filter(|image| image.2).map(|image| image.1).collect()
    };
    let (bank, queries) = (readable(train.1), readable(test.1));
    if bank.is_empty() || queries.is_empty() {
        return;
    }
    let known: BTreeSet<u32> = bank.iter().copied().collect();
    let right = queries.iter().filter(|label| known.contains(label)).count();
    let features = |source| eval::pixel_features(source, 1, device).unwrap();
    let (bank_features, query_features) = (features(train.0), features(test.0));
    assert_eq!((&bank_features.labels, &query_features.labels), (&bank, &queries), "{what}");
    assert_eq!(
        query_features.skipped.len(),
        test.1.images.len() - queries.len(),
        "{what}: skipped"
    );
    let knn = Knn { k: 1, temperature: 0.1 };
    let got = eval::knn_accuracy(&bank_features, &query_features, knn, device).unwrap();
    let want = right as f64 / queries.len() as f64;
    assert!((got - want).abs() < 1e-12, "{what}: kNN {got}, expected {want}");
}

#[test]
fn folders_are_read_as_the_model_says() {
    let count = std::env::var("FOLDERS").map_or(300, |count| count.parse().unwrap());
    let (pictures, device) = (pictures(), Device::cpu(1).unwrap());
    let (mut compared, mut refused) = (0, 0);
    for i in 0..count {
        let mut draw = Draw(Philox::new(16, Purpose::Test, i, 0));
        let root = tempfile::tempdir().unwrap();
        let (set, elsewhere) = (root.path().join("set"), root.path().join("elsewhere"));
        std::fs::create_dir_all(&elsewhere).unwrap();
        let mut classes: Vec<usize> = (0..CLASSES.len()).collect();
        draw.0.shuffle(&mut classes);
        // Few classes, so that parts share some; rarely none.
        let pool = &classes[..3 + draw.below(4)];
        let some = |draw: &mut Draw| -> Vec<usize> {
            pool.iter().copied().filter(|_| !draw.one_in(4)).collect()
        };
        let (first, second) = (some(&mut draw), some(&mut draw));
        let what = format!("folder {i}");
        if draw.one_in(5) {
            // Class folders at the root, perhaps with a run next to them.
            let train = part(&set, &first, &elsewhere, &pictures, &mut draw);
            if draw.one_in(2) {
                std::fs::create_dir_all(set.join("runs/demo")).unwrap();
                std::fs::write(set.join("runs/demo/recipe.toml"), "").unwrap();
                std::fs::write(set.join("runs/demo/picture.png"), &pictures[0]).unwrap();
            }
            let opened = data::open(&set, Split::Train);
            match compare(&what, opened, expected(&set, &train, None), &train) {
                Some(_) => compared += 1,
                None => refused += 1,
            }
            assert!(data::open(&set, Split::Test).is_err(), "{what}: nothing is held out");
            continue;
        }
        let held_out = draw.of(&["test", "val", "valid"]);
        let (train_folder, test_folder) = (set.join("train"), set.join(held_out));
        let train = part(&train_folder, &first, &elsewhere, &pictures, &mut draw);
        let test = part(&test_folder, &second, &elsewhere, &pictures, &mut draw);
        let opened = [Split::Train, Split::Test].map(|split| data::open(&set, split));
        let [train_set, test_set] = opened;
        let train_model = expected(&train_folder, &train, None);
        let test_model = expected(&test_folder, &test, (!first.is_empty()).then_some(&train));
        let train = compare(&format!("{what}, train"), train_set, train_model, &train);
        let test = compare(&format!("{what}, {held_out}"), test_set, test_model, &test);
        match (&train, &test) {
            (Some(train), Some(test)) => {
                compare_knn(&what, (&*train.0, &train.1), (&*test.0, &test.1), &device);
                compared += 1;
            }
            _ => refused += 1,
        }
    }
    println!("folders: {compared} compared, {refused} refused as expected");
    assert!(compared > count / 4, "only {compared} folders of {count} could be compared");
}

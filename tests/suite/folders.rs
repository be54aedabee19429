//! Folders drawn at random, read as the model says: which images, in what order, of what class, what is told of the rest, and
//! what kNN makes of a set whose classes are plain colours; as folders, as packs, and through lists of labelled images.
//!
//! `FOLDERS=10000 cargo test --test suite folders` draws more; `FOLDER=17` draws that one.

#[path = "folders/lists.rs"]
mod lists;
#[path = "folders/model.rs"]
mod model;
#[path = "folders/write.rs"]
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use selfsup::data::{self, Image, PackSettings, Source, Split, Stored};
use selfsup::device::Device;
use selfsup::eval::{self, Knn};

use model::{Expected, expected};
use write::{CLASSES, Draw, Part, Stock, Writer};

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    folders: usize,
    parts: usize,
    images: usize,
    skipped: usize,
    refused: usize,
    packs: usize,
    knn: usize,
    lists: usize,
}

/// A part that was opened, and what it must be.
type Opened<'a> = (Box<dyn Source>, &'a Expected);

/// Compares an opened part with the model; `None` if both refuse it.
fn compare<'a>(
    what: &str,
    opened: selfsup::Result<Box<dyn Source>>,
    model: &'a Result<Expected, Vec<String>>,
    tally: &mut Tally,
) -> Option<Opened<'a>> {
    let (set, model) = match (opened, model) {
        (Ok(set), Ok(model)) => (set, model),
        (Err(said), Err(words)) => {
            let said = said.to_string();
            assert!(
                words.iter().any(|w| said.contains(w)),
                "{what}: expected {words:?} in `{said}`"
            );
            tally.refused += 1;
            return None;
        }
        (Ok(_), Err(words)) => panic!("{what}: opened, but expected {words:?}"),
        (Err(said), Ok(_)) => panic!("{what}: {said}"),
    };
    let all: Vec<_> = model.images.iter().collect();
    compare_images(what, &*set, &model.classes, &all, |image| {
        model::printed(image.path.as_os_str().as_encoded_bytes())
    });
    tally.parts += 1;
    tally.images += all.len();
    tally.skipped += all.len() - model.readable().count();
    Some((set, model))
}

/// Compares the classes and images of a source.
fn compare_images(
    what: &str,
    set: &dyn Source,
    classes: &[String],
    images: &[&model::Listed],
    name: impl Fn(&model::Listed) -> String,
) {
    assert_eq!(set.classes(), classes, "{what}: classes");
    let names: Vec<_> = (0..set.len()).map(|i| set.name(i)).collect();
    let wanted: Vec<_> = images.iter().map(|image| name(image)).collect();
    assert_eq!(names, wanted, "{what}: images");
    let mut image = Image::default();
    for (i, listed) in images.iter().enumerate() {
        let what = format!("{what}: {}", listed.inner);
        assert_eq!(set.label(i), listed.label, "{what}: label");
        let read = set.read(i, &mut image);
        let Some(colour) = listed.colour else {
            assert!(read.is_err(), "{what}: it can be read");
            continue;
        };
        read.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(set.size(i).unwrap(), [image.width, image.height], "{what}");
        // JPEG of the best quality is off by a level or two.
        let far = |pixel: &[u8]| (0..3).any(|c| pixel[c].abs_diff(colour[c]) > 2);
        assert!(
            !image.pixels.chunks_exact(3).any(far),
            "{what}: {:?}, not {colour:?}",
            image.pixels
        );
    }
}

/// What must be told of a part, and only then.
fn compare_notes(
    what: &str,
    notes: &[String],
    parts: &[&Part],
    new: &[String],
    more: &[(&str, bool)],
) {
    let notes = notes.join("\n");
    let sum = |count: fn(&Part) -> usize| parts.iter().map(|part| count(part)).sum::<usize>();
    for (count, words) in [
        (sum(|part| part.foreign), "of other formats"),
        (sum(|part| part.special), "image names that are no regular files and are not read: "),
        (sum(|part| part.dangling), "links that lead nowhere and are not read: "),
        (
            sum(|part| part.runs_passed()),
            "folders of training runs or packs, which are not read as images: ",
        ),
    ] {
        assert_eq!(notes.contains(words), count > 0, "{what}: {count} `{words}` in `{notes}`");
        if let ([_], true) = (parts, count > 0) {
            let told = notes.contains(&format!("{words}{count}, such as "))
                || notes.contains(&format!("{count} file"));
            assert!(told, "{what}: {count} `{words}` in `{notes}`");
        }
    }
    assert_eq!(notes.contains("never right"), !new.is_empty(), "{what}: {new:?} in `{notes}`");
    for class in new {
        assert!(notes.contains(class), "{what}: {class} in `{notes}`");
    }
    for (words, told) in more {
        assert_eq!(notes.contains(words), *told, "{what}: `{words}` in `{notes}`");
    }
}

/// kNN over the pixels: the model knows every colour, and so every vote.
fn compare_knn(what: &str, train: &Opened, test: &Opened, tally: &mut Tally, device: &Device) {
    let labels =
        |of: &Expected| of.readable().map(|image| image.label.unwrap()).collect::<Vec<_>>();
    let (bank, queries) = (labels(train.1), labels(test.1));
    if bank.is_empty() || queries.is_empty() {
        return;
    }
    let features = |of: &Opened| eval::pixel_features(&*of.0, 1, device).unwrap();
    let (bank_features, query_features) = (features(train), features(test));
    assert_eq!((&bank_features.labels, &query_features.labels), (&bank, &queries), "{what}");
    for (of, features) in [(train, &bank_features), (test, &query_features)] {
        let broken: Vec<u32> = (0..)
            .zip(&of.1.images)
            .filter(|(_, image)| image.colour.is_none())
            .map(|(i, _)| i)
            .collect();
        let skipped: Vec<u32> = features.skipped.iter().map(|skipped| skipped.index).collect();
        let in_files = of.0.len() == of.1.images.len();
        assert_eq!(skipped, if in_files { broken } else { Vec::new() }, "{what}: skipped");
    }
    for (k, nearest_only) in [(1, true), (bank.len() + 7, false)] {
        let knn = Knn { k, temperature: 0.1 };
        let got = eval::knn_accuracy(&bank_features, &query_features, knn, device).unwrap();
        let [least, most] = model::knn_right(train.1, test.1, nearest_only, knn.temperature);
        let right = got * queries.len() as f64;
        assert!(
            (least as f64 - 1e-9..most as f64 + 1e-9).contains(&right),
            "{what}: kNN of {k} has {right} right, expected {least} to {most} of {}",
            queries.len()
        );
    }
    tally.knn += 1;
}

/// A set as it was written: its parts by name, `""` for the folder itself.
struct Set {
    parts: BTreeMap<&'static str, Part>,
    /// The part that must be taken for the held-out one.
    held_out: Option<&'static str>,
    /// What must be told of the set, and only then.
    notes: Vec<(&'static str, bool)>,
    /// Words of the error, one of them, if the set is refused as a whole.
    refused: Option<&'static [&'static str]>,
}

/// Words of the notes that sets have.
const NOT_USED: &str = " is the held-out split, and ";
const BESIDE: &str = "folders of images next to the splits, which are not read: ";

fn write_set(root: &Path, writer: &mut Writer) -> Set {
    let mut classes: Vec<usize> = (0..CLASSES.len()).collect();
    writer.draw.0.shuffle(&mut classes);
    // Few classes, so that parts share some; rarely none.
    let pool = classes[..3 + writer.draw.below(4)].to_vec();
    let mut some = |writer: &mut Writer| -> Vec<usize> {
        pool.iter().copied().filter(|_| !writer.draw.one_in(4)).collect()
    };
    let mut parts = BTreeMap::new();
    let (mut held_out, mut notes, mut refused) =
        (None, vec![(NOT_USED, false), (BESIDE, false)], None);
    let layout = writer.draw.below(20);
    let with_classes = |name: &'static str,
                        writer: &mut Writer,
                        some: &mut dyn FnMut(&mut Writer) -> Vec<usize>| {
        let among = some(writer);
        writer.part(&root.join(name), &among)
    };
    let flat = |name: &'static str, writer: &mut Writer| writer.flat(&root.join(name));
    match layout {
        0..3 => {
            parts.insert("", with_classes("", writer, &mut some));
            if writer.draw.one_in(2) && !root.join("runs").exists() {
                std::fs::create_dir_all(root.join("runs/demo")).unwrap();
                std::fs::write(root.join("runs/demo/recipe.toml"), "").unwrap();
                std::fs::copy("tests/fixtures/palette.png", root.join("runs/demo/x.png")).unwrap();
                parts.get_mut("").unwrap().runs += 1;
            }
        }
        3 => drop(parts.insert("", flat("", writer))),
        4 => drop(parts.insert("train", with_classes("train", writer, &mut some))),
        5 => {
            held_out = Some("test");
            parts.insert("test", with_classes("test", writer, &mut some));
        }
        6 => {
            held_out = Some("val");
            parts.insert("train", flat("train", writer));
            parts.insert("val", with_classes("val", writer, &mut some));
        }
        7 => {
            held_out = Some("valid");
            parts.insert("train", with_classes("train", writer, &mut some));
            parts.insert("valid", flat("valid", writer));
        }
        8 => {
            // As ImageNet comes: the test images have no labels, the validation images do.
            held_out = Some("val");
            parts.insert("train", with_classes("train", writer, &mut some));
            parts.insert("test", flat("test", writer));
            let mut val = Vec::new();
            while val.is_empty() {
                val = some(writer);
            }
            parts.insert("val", writer.part(&root.join("val"), &val));
            notes[0].1 = true;
        }
        9 => {
            held_out = Some("test");
            for name in ["train", "test", "valid"] {
                parts.insert(name, with_classes(name, writer, &mut some));
            }
            let no_classes = |part: &Part| model::classes(part).is_empty();
            if no_classes(&parts["test"]) && !no_classes(&parts["valid"]) {
                held_out = Some("valid");
            }
            notes[0].1 = true;
        }
        10 => {
            held_out = Some("test");
            for name in ["train", "test"] {
                parts.insert(name, with_classes(name, writer, &mut some));
            }
            writer.flat(&root.join("unlabeled/2024"));
            writer.flat(&root.join(".cache"));
            std::fs::create_dir_all(root.join("notes")).unwrap();
            notes[1].1 = true;
        }
        11 => {
            // A class may be called like a part.
            for name in ["train", "car"] {
                parts.insert(name, flat(name, writer));
            }
            refused = Some(&["is `train` the training split, or a class"][..]);
        }
        12 => {
            for name in ["Train", "TEST"] {
                parts.insert(name, with_classes(name, writer, &mut some));
            }
            refused = Some(&["rename", "is a class folder without images"][..]);
        }
        _ => {
            let name = writer.draw.of(&["test", "val", "valid", "validation"]);
            held_out = Some(name);
            for name in ["train", name] {
                parts.insert(name, with_classes(name, writer, &mut some));
            }
        }
    }
    Set { parts, held_out, notes, refused }
}

/// Opens the set in `root` and compares it with the model.
fn check(what: &str, root: &Path, set: &Set, draw: &mut Draw, tally: &mut Tally, device: &Device) {
    tally.folders += 1;
    let opened = |split| data::open(root, split);
    let pack_to = root.with_file_name("packed");
    if let Some(words) = set.refused {
        for said in [opened(Split::Train).err(), pack(root, &pack_to, draw).err()] {
            let said = said.unwrap_or_else(|| panic!("{what}: opened")).to_string();
            let right = words.iter().any(|words| said.contains(words));
            assert!(right, "{what}: expected {words:?} in `{said}`");
        }
        tally.refused += 1;
        return;
    }
    let at = |name: &str| if name.is_empty() { root.to_path_buf() } else { root.join(name) };
    let train_name = ["train", ""].into_iter().find(|name| set.parts.contains_key(name));
    let train = train_name.map(|name| &set.parts[name]);
    let missing = |words: &str| Err(vec![words.to_owned()]);
    let train_model = match train_name {
        Some(name) => expected(&at(name), &set.parts[name], None),
        None => missing("has no train/: the train split is missing"),
    };
    let test_model = match set.held_out {
        Some(name) => expected(&at(name), &set.parts[name], train),
        None => match (train_name, &train_model) {
            (Some(""), Err(words)) => Err(words.clone()),
            (Some(""), Ok(model)) if model.classes.is_empty() => {
                missing("which has a train split only")
            }
            (Some(""), Ok(_)) => {
                missing("has class folders but no test/, val/, valid/ or validation/")
            }
            _ => {
                missing("has no test/ or val/ or valid/ or validation/: the test split is missing")
            }
        },
    };
    let train_set = compare(&format!("{what}, train"), opened(Split::Train), &train_model, tally);
    let test_set = compare(&format!("{what}, held out"), opened(Split::Test), &test_model, tally);
    if let Some((source, _)) = &train_set {
        let parts: Vec<_> = train.into_iter().collect();
        compare_notes(what, source.notes(), &parts, &[], &set.notes[1..]);
        lists::compare(what, &**source, train_set.as_ref().unwrap().1, root, draw, tally);
    }
    if let (Some((source, model)), Some(name)) = (&test_set, set.held_out) {
        compare_notes(what, source.notes(), &[&set.parts[name]], &model.new, &set.notes[..1]);
    }
    if let (Some(train), Some(test)) = (&train_set, &test_set)
        && !train.1.classes.is_empty()
        && !test.1.classes.is_empty()
    {
        compare_knn(what, train, test, tally, device);
    }
    check_pack(what, root, set, [&train_model, &test_model], draw, tally, device);
}

fn pack(root: &Path, to: &Path, draw: &mut Draw) -> selfsup::Result<data::Packed> {
    let stored = if draw.one_in(2) { Stored::Raw } else { Stored::Files { quality: 95 } };
    let file_bytes = draw.of(&[800, 1 << 20, 1 << 20]);
    data::pack(
        root,
        to,
        &PackSettings { reading: Default::default(), labels: None, size: None, stored, file_bytes },
        |_, _| (),
    )
}

/// Packs the set: a pack holds what can be read, under the same labels.
fn check_pack(
    what: &str,
    root: &Path,
    set: &Set,
    [train_model, test_model]: [&Result<Expected, Vec<String>>; 2],
    draw: &mut Draw,
    tally: &mut Tally,
    device: &Device,
) {
    let to = root.with_file_name("packed");
    let train = set.parts.get("train");
    let models: Vec<_> = set
        .parts
        .iter()
        .map(|(name, part)| expected(&root.join(name), part, train.filter(|_| *name != "train")))
        .collect();
    let broken = models.iter().flatten().any(|model| model.readable().next().is_none());
    let packed = pack(root, &to, draw);
    if models.iter().any(Result::is_err) || broken {
        let said = packed.err().unwrap_or_else(|| panic!("{what}: packed")).to_string();
        let words = models.iter().filter_map(|model| model.as_ref().err()).flatten();
        let right = words.map(String::as_str).chain(broken.then_some("images can be read"));
        assert!(right.into_iter().any(|words| said.contains(words)), "{what}: {said}");
        assert!(!to.exists() || std::fs::read_dir(&to).unwrap().next().is_none(), "{what}");
        return;
    }
    let packed = packed.unwrap_or_else(|e| panic!("{what}: {e}"));
    let counts = models.iter().flatten().map(|m| [m.readable().count(), m.images.len()]);
    let [readable, all] = counts.fold([0, 0], |a, b| [a[0] + b[0], a[1] + b[1]]);
    assert_eq!((packed.images, packed.skipped.len()), (readable, all - readable), "{what}: packed");
    let parts: Vec<_> = set.parts.values().collect();
    let new: Vec<String> = models.iter().flatten().flat_map(|model| model.new.clone()).collect();
    compare_notes(what, &packed.notes, &parts, &new, &[(BESIDE, set.notes[1].1)]);
    let read = |split, model: &Expected, part: &str| {
        let what = format!("{what}, packed {split}");
        let source = data::open(&to, split).unwrap_or_else(|e| panic!("{what}: {e}"));
        let images: Vec<_> = model.readable().collect();
        let name = |image: &model::Listed| {
            let part = if part.is_empty() { "train" } else { part };
            let (start, end) = (
                format!("{}/{part}-", to.display()),
                format!("/{}", image.inner.trim_start_matches('/')),
            );
            let found = (0..source.len()).map(|i| source.name(i)).find(|n| {
                n.starts_with(&start)
                    && n.ends_with(&end)
                    && n.len() == start.len() + "00000.pack".len() + end.len()
            });
            found.unwrap_or_else(|| panic!("{what}: no {start}NNNNN.pack{end}"))
        };
        compare_images(&what, &*source, &model.classes, &images, name);
        source
    };
    let train_name = if train.is_some() { "train" } else { "" };
    let sources = [
        train_model.as_ref().ok().map(|model| (read(Split::Train, model, train_name), model)),
        test_model
            .as_ref()
            .ok()
            .map(|model| (read(Split::Test, model, set.held_out.unwrap()), model)),
    ];
    if let [Some(train), Some(test)] = &sources
        && !train.1.classes.is_empty()
        && !test.1.classes.is_empty()
    {
        compare_notes(what, test.0.notes(), &[], &test.1.new, &set.notes[..1]);
        compare_knn(&format!("{what}, packed"), train, test, tally, device);
    }
    tally.packs += 1;
}

#[test]
fn folders_are_read_as_the_model_says() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let range = match (number("FOLDER"), number("FOLDERS")) {
        (Some(one), _) => one..one + 1,
        (None, count) => 0..count.unwrap_or(200),
    };
    let (stock, device) = (Stock::new(), Device::cpu(1).unwrap());
    let mut tally = Tally::default();
    let count = range.len();
    for i in range {
        let root = tempfile::tempdir().unwrap();
        let (folder, elsewhere) = (root.path().join("set"), root.path().join("elsewhere"));
        [&folder, &elsewhere].iter().for_each(|path| std::fs::create_dir_all(path).unwrap());
        let mut draw = Draw::new(i);
        let set = write_set(&folder, &mut Writer { stock: &stock, draw: &mut draw, elsewhere });
        check(&format!("folder {i}"), &folder, &set, &mut draw, &mut tally, &device);
    }
    println!("folders without a wrong number: {count} of {count}; {tally:?}");
    assert!(count < 100 || tally.knn > count / 4 && tally.packs > count / 4, "{tally:?}");
}

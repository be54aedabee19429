//! Parsers of external bytes: each accepts any input and returns a value or an error, never a panic. `fuzz/` calls these
//! functions; the suite replays the small corpus in `tests/corpus/`, which keeps every input that once caused a failure.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use selfsup::arena::Arena;
use selfsup::data::{self, Cifar, Folder, Idx, Image, Source, Split, fashion_scattered};
use selfsup::device::Device;
use selfsup::recipes::Recipe;
use selfsup::train::{self, Outcome, Paused, Study};
use tempfile::TempDir;

/// A parser's name, which is also its folder in `tests/corpus/`, and the function to feed.
type Parser = (&'static str, fn(&[u8]));

const PARSERS: &[Parser] = &[
    ("checkpoint", checkpoint),
    ("cifar", cifar),
    #[cfg(unix)]
    ("folder", folder),
    ("idx", idx),
    ("image", image),
    ("jpeg", jpeg),
    ("labels", labels),
    ("metrics", metrics),
    ("pack", pack),
    ("recipe", recipe),
    ("study", study),
    ("weights", weights),
];

/// A temporary folder with files of the given names and contents.
fn holding(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("a temporary file");
    }
    folder
}

/// Settings of a cheap network.
fn small() -> Recipe {
    let settings = ["network.width=2", "method.hidden=4", "method.embedding=4"];
    Recipe::load("demo", &settings.map(str::to_owned)).expect("a built-in recipe")
}

fn arena() -> &'static Mutex<Arena> {
    static ARENA: OnceLock<Mutex<Arena>> = OnceLock::new();
    ARENA.get_or_init(|| {
        let method = small().build_method().expect("a built-in recipe");
        Mutex::new(Arena::new(method.layout(), &Device::cpu(1).expect("a processor"), 1))
    })
}

/// Reads every image of a source that decodes, and checks its size.
fn read_all(source: &dyn Source) {
    let mut image = Image::default();
    for index in 0..source.len().min(4) {
        let told = source.size(index);
        match source.read(index, &mut image) {
            Ok(()) => {
                assert_eq!(image.pixels.len(), image.width * image.height * 3);
                assert_eq!(
                    told.expect("the size of what can be read"),
                    [image.width, image.height]
                );
            }
            // A decoder's panic is caught, and told as an error.
            Err(error) => assert!(!error.to_string().contains("panicked"), "{error}"),
        }
    }
}

/// A JPEG or PNG file.
pub fn image(bytes: &[u8]) {
    let folder = holding(&[("a.jpg", bytes)]);
    read_all(&Folder::open(folder.path()).expect("a folder with a file"));
}

/// A JPEG file, whose pixels depend on nothing but its bytes: not on what the buffers held before.
pub fn jpeg(bytes: &[u8]) {
    /// One file that is written again and again, in a set that reads it each time.
    static SET: OnceLock<Mutex<(TempDir, Folder)>> = OnceLock::new();
    if !bytes.starts_with(&[0xFF, 0xD8]) {
        return;
    }
    let set = SET.get_or_init(|| {
        let folder = holding(&[("a.jpg", bytes)]);
        let set = Folder::open(folder.path()).expect("a folder with a file");
        Mutex::new((folder, set))
    });
    let (folder, set) = &*set.lock().expect("no panic before");
    fs::write(folder.path().join("a.jpg"), bytes).expect("a temporary file");
    read_all(set);
    let read = |mut image: Image| set.read(0, &mut image).map(|()| image);
    let dirty = Image { width: 1, height: 1, pixels: vec![0xA5; 5000], ..Image::default() };
    match [read(Image::default()), read(dirty)] {
        [Ok(first), Ok(second)] => assert!(first == second, "the pixels differ from time to time"),
        [Err(first), Err(second)] => assert_eq!(first.to_string(), second.to_string()),
        [first, second] => panic!("{first:?}, then {second:?}"),
    }
}

/// A set of idx files: images followed by labels. The first byte gives the length of the labels.
pub fn idx(bytes: &[u8]) {
    let Some((&labels, bytes)) = bytes.split_first() else { return };
    let (images, labels) = bytes.split_at(bytes.len().saturating_sub(labels.into()));
    let named = |name| Path::new(name);
    for labels in [None, Some((named("labels"), labels))] {
        if let Ok(set) = Idx::from_bytes((named("images"), images), labels) {
            read_all(&set);
        }
    }
}

/// A CIFAR-10 or CIFAR-100 batch and the names of its classes.
pub fn cifar(bytes: &[u8]) {
    for files in [["test_batch.bin", "batches.meta.txt"], ["test.bin", "fine_label_names.txt"]] {
        let folder = holding(&files.map(|name| (name, bytes)));
        if let Ok(set) = Cifar::open(folder.path(), Split::Test) {
            read_all(&set);
        }
    }
}

/// A list of labelled images.
pub fn labels(bytes: &[u8]) {
    static SET: OnceLock<Idx> = OnceLock::new();
    let set = SET.get_or_init(|| fashion_scattered(Split::Test));
    let folder = holding(&[("list.txt", bytes)]);
    if let Ok(chosen) = data::labelled(set, &folder.path().join("list.txt").to_string_lossy()) {
        assert!(chosen.is_sorted() && chosen.iter().all(|&i| (i as usize) < set.len()));
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && text.trim().ends_with('%')
    {
        let _ = data::labelled(set, text);
    }
}

/// A packed file, once unchanged and once with corrected checksums, so that the code behind them is reached.
pub fn pack(bytes: &[u8]) {
    let mut fits = bytes.to_vec();
    if let Some((header, rest)) = fits.split_at_mut_checked(64) {
        let at = u64::from_le_bytes(header[40..48].try_into().expect("8 bytes")).wrapping_sub(64);
        let index = rest.get(at.try_into().unwrap_or(usize::MAX)..).unwrap_or_default();
        header[20..24].copy_from_slice(&crc32fast::hash(index).to_le_bytes());
        let crc = crc32fast::hash(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
    }
    for bytes in [bytes, &fits] {
        let folder = holding(&[("train-00000.pack", bytes)]);
        if let Ok(set) = data::open(folder.path(), Split::Train) {
            read_all(&*set);
        }
    }
}

/// A recipe, and a setting that overrides one.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for recipe in [Recipe::parse(text, "recipe.toml", &[]), small().with(&[text.to_owned()])] {
        let Ok(recipe) = recipe else { continue };
        let again = Recipe::parse(&recipe.to_toml(), "again", &[]);
        assert_eq!(again.expect("what a recipe writes").to_toml(), recipe.to_toml());
        let _ = recipe.build_method().map(|method| recipe.policies(method.views()));
    }
}

/// A weight file: to start a run from, to load, and to re-export.
pub fn weights(bytes: &[u8]) {
    let folder = holding(&[("w.safetensors", bytes)]);
    let file = folder.path().join("w.safetensors");
    let mut arena = arena().lock().expect("no panic before");
    let _ = train::init_weights(&file, &mut arena);
    let _ = train::load_weights(&file, &mut arena);
    let _ = train::recipe_in(&file, &[]);
}

/// The newest checkpoint of a run that is resumed.
pub fn checkpoint(bytes: &[u8]) {
    let recipe = small().to_toml();
    let files = [("recipe.toml", recipe.as_bytes()), ("step-00000001.safetensors", bytes)];
    let folder = holding(&files);
    let _ = Paused::open(folder.path(), &[]).map(|paused| paused.recipe().to_toml());
}

/// A study, its recipes and its table; an input that is JSON is an outcome of it.
pub fn study(bytes: &[u8]) {
    let folder = holding(&[("study.toml", bytes)]);
    let outcome = serde_json::from_slice::<Outcome>(bytes).ok();
    let known = Study::load("simclr-head").expect("a built-in study");
    let read = Study::load(&folder.path().join("study.toml").to_string_lossy());
    for study in [Ok(known), read].into_iter().flatten() {
        let _ = study.markdown(outcome.as_slice());
        for arm in &study.arms {
            let _ = study.recipe(arm, &[]);
        }
    }
}

/// A folder of images: a line of the input is a file, a first byte that says what lies there and its path.
#[cfg(unix)]
pub fn folder(bytes: &[u8]) {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    const PNG: &[u8] = include_bytes!("../fixtures/palette.png");
    let root = tempfile::tempdir().expect("a temporary folder");
    for line in bytes.split(|&byte| byte == b'\n').take(24) {
        let Some((&kind, path)) = line.split_first() else { continue };
        let parts = path.split(|&byte| byte == b'/');
        let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b"." | b"..")).collect();
        let fits = |part: &&[u8]| part.len() <= 100 && !part.contains(&0);
        if parts.is_empty() || parts.len() > 5 || !parts.iter().all(fits) {
            continue;
        }
        let place =
            parts.iter().fold(root.path().to_owned(), |at, part| at.join(OsStr::from_bytes(part)));
        // A file may already be where a folder should go.
        let _ = fs::create_dir_all(place.parent().expect("below the root"));
        let _ = match kind % 5 {
            0 => fs::write(&place, b""),
            1 => fs::create_dir(&place),
            2 => std::os::unix::fs::symlink(OsStr::from_bytes(parts[0]), &place),
            _ => fs::write(&place, PNG),
        };
    }
    for split in [Split::Train, Split::Test] {
        let set = match data::open(root.path(), split) {
            Ok(set) => set,
            Err(error) => {
                assert!(
                    !error.to_string().chars().any(|c| c.is_control() && c != '\n'),
                    "{error:?}"
                );
                continue;
            }
        };
        read_all(&*set);
        assert!(!set.is_empty());
        let mut names: Vec<String> = (0..set.len()).map(|index| set.name(index)).collect();
        let texts = names.iter().chain(set.classes()).chain(set.notes());
        assert!(texts.flat_map(|text| text.chars()).all(|c| !c.is_control()), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), set.len(), "two images have one name");
        for index in 0..set.len() {
            let label = set.label(index);
            assert_eq!(label.is_some(), !set.classes().is_empty());
            assert!(label.is_none_or(|label| (label as usize) < set.classes().len()));
        }
    }
}

/// The files from which a run's report is built.
pub fn metrics(bytes: &[u8]) {
    for name in ["metrics.jsonl", "gallery.json"] {
        let recipe = small().to_toml();
        let mut files = vec![("recipe.toml", recipe.as_bytes()), (name, bytes)];
        if name != "metrics.jsonl" {
            files.push(("metrics.jsonl", b""));
        }
        let _ = train::report(&[holding(&files).path()]);
    }
}

#[test]
fn inputs_that_once_caused_failures_are_handled() {
    for &(name, parser) in PARSERS {
        let folder = Path::new("tests/corpus").join(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&folder).expect("a folder for each parser") {
            parser(&fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs >= 3, "{}: {inputs} inputs", folder.display());
    }
}

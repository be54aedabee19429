//! JPEG files of every kind: the pixels are Pillow's, or the file is refused for what it is.
//!
//! `scripts/make-jpeg-cases` wrote the files and what Pillow 13 (libjpeg-turbo 3.2) makes of them: a checksum of all
//! values, and every so many of them to say how far off a wrong decoder is.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use selfsup::data::{Folder, Image, Source};
use serde_json::Value;

const CASES: &str = "tests/fixtures/jpeg.safetensors";

/// What was found of the cases of a class.
#[derive(Default)]
struct Found {
    read: usize,
    refused: usize,
    /// The largest deviation from Pillow, in levels.
    worst: u8,
    wrong: Vec<String>,
}

fn crc(bytes: &[u8]) -> u64 {
    u64::from(crc32fast::hash(bytes))
}

/// What is wrong with a decoded image, and its largest deviation.
fn compare(image: &Image, note: &Value, kept: &[u8]) -> (Option<String>, u8) {
    let number = |key: &str| note[key].as_u64().unwrap();
    let (width, height) = (number("width") as usize, number("height") as usize);
    if (image.width, image.height) != (width, height) {
        return (Some(format!("{} x {}, not {width} x {height}", image.width, image.height)), 255);
    }
    let values = image.pixels.iter().step_by(number("step") as usize);
    let worst = values.zip(kept).map(|(got, want)| got.abs_diff(*want)).max().unwrap();
    let wrong = crc(&image.pixels) != number("crc");
    (wrong.then(|| format!("{worst} levels from Pillow")), worst)
}

#[test]
fn jpeg_files_of_every_kind_have_pillows_pixels_or_are_refused() {
    let bytes = fs::read(CASES).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let notes: BTreeMap<String, String> = header.metadata().clone().unwrap().into_iter().collect();
    assert!(notes.len() > 250, "{} cases", notes.len());

    let folder = tempfile::tempdir().unwrap();
    for (i, name) in notes.keys().enumerate() {
        let data = file.tensor(name).unwrap();
        fs::write(folder.path().join(format!("{i:04}.jpg")), data.data()).unwrap();
    }
    let set = Folder::open(folder.path()).unwrap();
    assert_eq!(set.len(), notes.len());

    let mut classes: BTreeMap<&str, Found> = BTreeMap::new();
    let mut image = Image::default();
    for (i, (name, note)) in notes.iter().enumerate() {
        let note: Value = serde_json::from_str(note).unwrap();
        let class = classes.entry(name.split("__").next().unwrap()).or_default();
        let wrong = match (set.read(i, &mut image), note["refused"].as_str()) {
            (Err(error), Some(words)) => {
                class.refused += 1;
                let said = error.to_string();
                (!said.contains(words)).then(|| format!("`{said}` lacks `{words}`"))
            }
            (Err(error), None) => Some(error.to_string()),
            (Ok(()), Some(_)) => Some("it is to be refused".to_owned()),
            (Ok(()), None) => {
                class.read += 1;
                let kept = file.tensor(&format!("{name}.pixels")).unwrap();
                let (wrong, worst) = compare(&image, &note, kept.data());
                class.worst = class.worst.max(worst);
                wrong
            }
        };
        class.wrong.extend(wrong.map(|wrong| format!("{name}: {wrong}")));
    }
    let mut wrong = Vec::new();
    for (class, found) in &mut classes {
        let Found { read, refused, worst, .. } = found;
        println!("{class}: {read} read, at most {worst} levels from Pillow, {refused} refused");
        wrong.append(&mut found.wrong);
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), notes.len(), wrong.join("\n"));
}

/// The segments of a file: code, where it begins and where it ends, data included.
fn segments(file: &[u8]) -> Vec<(u8, usize, usize)> {
    let mut found: Vec<(u8, usize, usize)> = Vec::new();
    let mut at = 2;
    while file[at + 1] != 0xD9 {
        let length = usize::from(u16::from_be_bytes([file[at + 2], file[at + 3]]));
        let mut end = at + 2 + length;
        if file[at + 1] == 0xDA {
            let is_data = |pair: &[u8]| pair[0] != 0xFF || matches!(pair[1], 0 | 0xD0..=0xD7);
            end += file[end..].windows(2).take_while(|pair| is_data(pair)).count();
        }
        found.push((file[at + 1], at, end));
        at = end;
    }
    found
}

/// Files that break the rules in ways in which libjpeg refuses them, or reads another image than a decoder that ignores the
/// breach: all are refused.
#[test]
fn files_with_a_scan_too_many_or_a_header_that_is_wrong_are_refused() {
    let bytes = fs::read(CASES).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let fixture = |name: &str| fs::read(format!("tests/fixtures/{name}")).unwrap();
    let with =
        |of: &[u8], place: usize, inserted: &[u8]| [&of[..place], inserted, &of[place..]].concat();
    // Two scans of a file in one, and one alone.
    let (baseline, progressive) = (fixture("colour.jpg"), fixture("progressive.jpg"));
    let scans = file.tensor("scans-baseline__420-each-34x19").unwrap().data().to_vec();
    let mut broken: Vec<(&str, Vec<u8>, &str)> = Vec::new();
    for (what, whole) in [("baseline", &baseline), ("progressive", &progressive), ("scans", &scans)]
    {
        let parts = segments(whole);
        let &(_, begin, end) = parts.iter().rfind(|part| part.0 == 0xDA).unwrap();
        let again = with(whole, end, &whole[begin..end]);
        broken.push((what, again, "it has a scan after its image is complete"));
        for (code, name) in [(0xDA, "scan"), (0xC0, "frame"), (0xC2, "frame")] {
            let Some(&(_, at, _)) = parts.iter().find(|part| part.0 == code) else { continue };
            let length = usize::from(u16::from_be_bytes([whole[at + 2], whole[at + 3]]));
            let mut longer = with(whole, at + 2 + length, &[0]);
            longer[at + 3] += 1;
            broken.push((
                what,
                longer,
                if name == "scan" {
                    "a scan segment has a wrong length"
                } else {
                    "a frame segment has a wrong length"
                },
            ));
        }
        let restart = with(whole, 2, &[0xFF, 0xDD, 0, 5, 0, 0, 0]);
        broken.push((what, restart, "a restart segment has a wrong length"));
        broken.push((what, with(whole, 2, &[0xFF, 0xC8, 0, 2]), "a frame segment is too short"));
    }
    // The first scan of a component once more, before the others.
    let &(_, begin, end) = segments(&scans).iter().find(|part| part.0 == 0xDA).unwrap();
    broken.push((
        "scans",
        with(&scans, end, &scans[begin..end]),
        "two scans have the same colour component",
    ));
    // Only sequential files may leave out the standard's tables.
    let tables = segments(&progressive).into_iter().rev().filter(|part| part.0 == 0xC4);
    let bare = tables
        .fold(progressive.clone(), |file, (_, begin, end)| [&file[..begin], &file[end..]].concat());
    broken.push(("progressive", bare, "it lacks a Huffman table"));

    let folder = tempfile::tempdir().unwrap();
    for (i, (_, data, _)) in broken.iter().enumerate() {
        fs::write(folder.path().join(format!("{i:03}.jpg")), data).unwrap();
    }
    let set = Folder::open(folder.path()).unwrap();
    for (i, (what, _, words)) in broken.iter().enumerate() {
        let error = set.read(i, &mut Image::default()).expect_err(words).to_string();
        assert!(error.contains(words), "{what}: expected `{words}` in `{error}`");
    }
}

/// Whatever bytes are changed or missing, decoding ends with an image or an error, never with a panic, which would be
/// told as one.
#[test]
fn changed_and_cut_jpeg_files_do_not_make_the_decoder_panic() {
    let bytes = fs::read(CASES).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut names = Vec::new();
    let mut state = 1u64;
    let mut draw = |below: usize| {
        // A linear congruential generator: the same files each time.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut all: Vec<(String, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.ends_with(".pixels"))
        .map(|(name, view)| (name, view.data().to_vec()))
        .collect();
    all.sort();
    for (i, (name, data)) in all.iter().enumerate() {
        for copy in 0..8 {
            let mut data = data.clone();
            for _ in 0..1 + draw(3) {
                // Half of the changes hit the headers.
                let reach = if draw(2) == 0 { data.len().min(700) } else { data.len() };
                let at = draw(reach);
                data[at] = draw(256) as u8;
            }
            if draw(4) == 0 {
                data.truncate(1 + draw(data.len()));
            }
            fs::write(folder.path().join(format!("{i:04}-{copy}.jpg")), data).unwrap();
            names.push(name);
        }
    }
    let set = Folder::open(folder.path()).unwrap();
    let mut image = Image::default();
    for (i, name) in names.iter().enumerate() {
        let size = set.size(i);
        match set.read(i, &mut image) {
            Ok(()) => assert_eq!(size.unwrap(), [image.width, image.height], "{name}"),
            Err(error) => assert!(!error.to_string().contains("panicked"), "{name}: {error}"),
        }
    }
}

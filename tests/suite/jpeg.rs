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

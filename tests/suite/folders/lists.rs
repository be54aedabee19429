//! Lists of labelled images, drawn at random: which images they mean.

use std::path::Path;

use selfsup::data::{self, Source};

use super::Tally;
use super::model::{Expected, Listed};
use super::write::Draw;

/// What a line must mean, by the parts of paths alone: the images that share the longest end with it. A relative line is all
/// of that end; of an absolute one, which may be another machine's, at least a folder and a file.
fn meant(line: &str, images: &[Listed], whole: &[String]) -> Vec<u32> {
    let parts = |path: &str| -> Vec<String> {
        path.split('/').filter(|part| !["", "."].contains(part)).map(Into::into).collect()
    };
    let wanted = parts(line);
    let same = |path: &String| {
        wanted.iter().rev().zip(parts(path).iter().rev()).take_while(|(a, b)| a == b).count()
    };
    let needed = if line.starts_with('/') { 2 } else { wanted.len() };
    let ends: Vec<usize> = whole.iter().map(same).collect();
    let longest = ends.iter().copied().max().unwrap_or(0).max(needed);
    (0..images.len() as u32).filter(|&i| ends[i as usize] == longest).collect()
}

/// Draws lists, and compares what is read with what is meant.
pub fn compare(
    what: &str,
    set: &dyn Source,
    model: &Expected,
    root: &Path,
    draw: &mut Draw,
    tally: &mut Tally,
) {
    let file = root.with_file_name("list.txt");
    let whole: Vec<String> = model
        .images
        .iter()
        .map(|image| super::model::printed(image.path.as_os_str().as_encoded_bytes()))
        .collect();
    let without_extension = |path: &String| match path.rsplit_once('.') {
        Some((stem, end)) if !end.contains('/') && !stem.is_empty() && !stem.ends_with('/') => {
            stem.to_owned()
        }
        _ => path.clone(),
    };
    let stems: Vec<String> = whole.iter().map(without_extension).collect();
    for _ in 0..3 {
        let (mut text, mut wanted, mut wrong) = (String::new(), Vec::new(), None);
        if draw.one_in(4) {
            text.push('\u{feff}');
        }
        for number in 1..=1 + draw.below(4) {
            let at = draw.below(model.images.len());
            let inner = model.images[at].inner.trim_start_matches('/').to_owned();
            let last = inner.rsplit('/').next().unwrap().to_owned();
            let line = match draw.below(9) {
                0 => at.to_string(),
                1 => last.clone(),
                2 => format!("./{inner}"),
                3 => whole[at].clone(),
                4 => format!("/another/machine/{inner}"),
                5 => format!("no-such/{last}"),
                6 => (model.images.len() + at).to_string(),
                7 => without_extension(&last),
                _ => inner,
            };
            let mut found = meant(&line, &model.images, &whole);
            // An index, if nothing is called so with or without its extension; never one of two.
            let index = line.parse().ok().filter(|&i: &u32| (i as usize) < model.images.len());
            let mut unclear = false;
            if found.is_empty() {
                found = meant(&line, &model.images, &stems);
                match (index, found.first()) {
                    (Some(index), Some(&first)) => unclear = index != first,
                    (Some(index), None) if line == index.to_string() => found.push(index),
                    _ => {}
                }
            }
            match found[..] {
                [one] if !unclear => wanted.push(one),
                _ => {
                    let words = match (unclear, found.is_empty()) {
                        (true, _) => &format!("{line} may be "),
                        (_, true) => "the training images have no ",
                        (_, false) => "several images are called ",
                    };
                    wrong.get_or_insert(format!("line {number}: {words}"));
                }
            }
            text += &line;
            text += draw.of(&["\n", "\r\n"]);
        }
        std::fs::write(&file, &text).unwrap();
        let got = data::labelled(set, file.to_str().unwrap());
        match (got, wrong) {
            (Ok(got), None) => {
                wanted.sort_unstable();
                wanted.dedup();
                assert_eq!(got, wanted, "{what}: {text:?}");
            }
            (Err(said), Some(words)) => {
                let said = said.to_string();
                assert!(said.contains(&words), "{what}: {text:?}: `{words}` in `{said}`");
            }
            (got, wrong) => panic!("{what}: {text:?}: {got:?}, expected {wrong:?}"),
        }
        tally.lists += 1;
    }
    share(what, set, model, draw);
}

/// A share is so many images of each class, at least one.
fn share(what: &str, set: &dyn Source, model: &Expected, draw: &mut Draw) {
    let percent = draw.of(&[1, 10, 50, 100]);
    let got = data::labelled(set, &format!("{percent}%"));
    if model.classes.is_empty() {
        assert!(got.unwrap_err().to_string().contains("has no label"), "{what}");
        return;
    }
    let got = got.unwrap();
    assert!(got.is_sorted_by(|a, b| a < b), "{what}: {got:?}");
    for class in 0..model.classes.len() as u32 {
        let members = model.images.iter().filter(|image| image.label == Some(class)).count();
        // Half an image is one.
        let wanted = ((members * percent * 2 + 100) / 200).max(1);
        let chosen = got.iter().filter(|&&i| model.images[i as usize].label == Some(class)).count();
        assert_eq!(chosen, wanted.min(members), "{what}: {percent}% of {members}");
    }
}

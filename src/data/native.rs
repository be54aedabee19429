//! What the files of a folder hold, before they are read as images: channels, bits, and the range of their samples.

use std::path::{Path, PathBuf};

use super::decode::{self, Native, Reading};
use super::folder::Folder;
use super::open::{SplitFolders, open_as};
use super::pack::Pack;
use super::source::{Format, Source, Split};
use crate::error::{Error, Result};
use crate::files::{find, is_folder};

/// Files that are looked at.
const LOOKED_AT: usize = 64;

/// Files that are looked at if all of the first are grey: one in colour makes the set one in colour.
const LOOKED_AT_IN_GREY: usize = 4096;

/// The files of a folder's training split, and the places of at most `most` of them.
fn some_files(
    folder: &Path,
    reading: &Reading,
    most: usize,
) -> Result<Option<(Folder, Vec<usize>)>> {
    if !is_folder(folder)? || Pack::is_at(folder)? {
        return Ok(None);
    }
    let train = SplitFolders::of(folder)?.and_then(|splits| splits.train);
    let Ok(all) = Folder::open_as(train.as_deref().unwrap_or(folder), reading) else {
        return Ok(None); // opening it as a set says what is wrong
    };
    let places = spread(all.len(), most);
    Ok(Some((all, places)))
}

/// At most `most` of the numbers below `len`, spread over them.
fn spread(len: usize, most: usize) -> Vec<usize> {
    let count = len.min(most);
    (0..count).map(|i| i * len / count).collect()
}

/// Channels and bits of the images in a folder, if all that are looked at have the same: alpha channels aside, and 16 bits for
/// floats, with whether they are floats. Files that cannot be read are passed over. `None` if there is nothing to look at.
///
/// # Errors
/// If the folder cannot be read, or its images have different channels, some of them more than three.
pub fn native_format(folder: &Path, reading: &Reading) -> Result<Option<(Format, bool)>> {
    if find(folder)?.is_none() {
        return Ok(None); // opening it as a set says so
    }
    if is_folder(folder)? && Pack::is_at(folder)? {
        return Pack::open(folder, Split::Train).map(|pack| Some((pack.format(), false)));
    }
    let Some((all, places)) = some_files(folder, reading, LOOKED_AT)? else { return Ok(None) };
    let look = |places: Vec<usize>| -> Result<Vec<(PathBuf, Native)>> {
        let mut found = Vec::new();
        // The pages of a file follow one another, and have one look.
        let mut files: Vec<&Path> = places.into_iter().map(|place| all.file(place)).collect();
        files.dedup();
        for path in files {
            match decode::native(path, reading.axes) {
                Ok(native) => found.push((path.to_path_buf(), native)),
                Err(Error::Format { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    };
    let mut found = look(places)?;
    let is_grey =
        |native: &Native| (native.channels - usize::from(native.alpha), native.bits) == (1, 8);
    if found.iter().all(|(_, native)| is_grey(native)) {
        found = look(spread(all.len(), LOOKED_AT_IN_GREY))?;
    }
    let format = |native: &Native| {
        let of_pages = reading.pages == Some(decode::Pages::Channels) && native.pages > 1;
        let pages = if of_pages { native.pages } else { 1 };
        let channels = (native.channels - usize::from(native.alpha)) * pages;
        Format { channels, bits: if native.bits == 8 { 8 } else { 16 } }
    };
    let Some((first_file, first)) = found.first() else { return Ok(None) };
    let floats = first.bits == 32;
    let first = format(first);
    if found.iter().all(|(_, other)| format(other) == first) {
        return Ok(Some((first, floats)));
    }
    // Photos in grey and in colour are all RGB.
    let is_photo = |format: Format| matches!(format.channels, 1 | 3) && format.bits == 8;
    let differs = |other: Format| other != first && !(is_photo(first) && is_photo(other));
    let Some((other_file, other)) = found.iter().find(|(_, other)| differs(format(other))) else {
        return Ok(Some((Format::RGB, false)));
    };
    let other = format(other);
    Err(Error::format(
        folder,
        format!(
            "has images of {first} ({}) and of {other} ({}): keep those of one kind, or say with data.channels and data.bits which are read",
            first_file.display(),
            other_file.display()
        ),
    ))
}

/// The least and the largest sample of some images of 16 bits or of floats; `None` if nothing can be read or all are equal.
///
/// # Errors
/// If a file cannot be read.
pub fn extent(folder: &Path, reading: &Reading) -> Result<Option<[f64; 2]>> {
    if Pack::is_at(folder)?
        && let Some(packed) = Pack::open(folder, Split::Train)?.packed_range()
    {
        return Ok(Some(packed));
    }
    let mut all = [f64::INFINITY, f64::NEG_INFINITY];
    let mut add = |[low, high]: [f64; 2]| all = [all[0].min(low), all[1].max(high)];
    if let Some((files, places)) = some_files(folder, reading, LOOKED_AT)? {
        for place in places {
            match decode::extent(files.file(place), files.page(place), reading) {
                Ok(extent) => add(extent),
                Err(Error::Format { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    } else {
        let set = open_as(folder, Split::Train, reading)?;
        let mut image = super::Image::default();
        for place in spread(set.len(), LOOKED_AT) {
            if set.read(place, &mut image).is_ok() {
                for sample in image.pixels.as_chunks::<2>().0 {
                    let value = f64::from(u16::from_le_bytes(*sample));
                    add([value, value]);
                }
            }
        }
    }
    Ok((all[0] < all[1]).then_some(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_photo_in_colour_makes_a_grey_folder_one_in_colour() {
        let root = tempfile::tempdir().unwrap();
        let name = |i: usize| root.path().join(format!("{i:03}.png"));
        for i in 0..100 {
            image::GrayImage::new(2, 2).save(name(i)).unwrap();
        }
        let format = || native_format(root.path(), &Reading::default()).unwrap().unwrap().0;
        assert_eq!(format(), Format { channels: 1, bits: 8 });
        assert!(!spread(100, LOOKED_AT).contains(&2));
        image::RgbImage::new(2, 2).save(name(2)).unwrap();
        assert_eq!(format(), Format::RGB);
    }
}

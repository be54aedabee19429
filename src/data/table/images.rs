//! What a label table says of the images of a folder: its rows find them by name.

use std::ffi::OsStr;
use std::path::Path;

use super::{LabelTable, Row};
use crate::data::classes;
use crate::data::labels::{Names, stem, whole_paths};
use crate::data::source::Split;
use crate::error::{Error, Result, printable};

/// What a table says of the images of a folder.
pub(in crate::data) struct Labelled {
    /// The class of each image and the split of its row, if it has one; `None` if the table has no class for it.
    pub(in crate::data) classes: Vec<Option<(u32, Option<Split>)>>,
    /// Sentences on images without a class and rows without an image.
    pub(in crate::data) notes: Vec<String>,
}

impl LabelTable {
    /// Finds the class of each image of a folder by its name there. A row may leave out folders and the extension, if only one image
    /// has that name. `others` are the names of the set's other images: rows of theirs are passed over.
    ///
    /// # Errors
    /// If a row names several images, two rows give an image different classes or splits, or no row names an image.
    pub(in crate::data) fn of_images(
        &self,
        folder: &Path,
        images: &[String],
        others: &[String],
    ) -> Result<Labelled> {
        let wrong = |line: u64, what: String| {
            Err(Error::format(&self.file, format!("line {line}: {what}")))
        };
        let (named, named_elsewhere) = (Named::new(images), Named::new(others));
        let mut found: Vec<Option<&Row>> = vec![None; images.len()];
        let mut missing: Vec<&Row> = Vec::new();
        for row in &self.rows {
            let image = match named.find(&row.name)[..] {
                [image] => image as usize,
                [] if named_elsewhere.find(&row.name).is_empty() => {
                    missing.push(row);
                    continue;
                }
                [] => continue,
                _ => {
                    let name = printable(OsStr::new(&row.name));
                    let what = format!("several images are called {name}: write more of the path");
                    return wrong(row.line, what);
                }
            };
            let first = found[image].get_or_insert(row);
            if (first.class, first.split) != (row.class, row.split) {
                let [here, there] = [row, *first].map(|row| {
                    let class = self.classes[row.class as usize].clone();
                    match row.split.filter(|_| self.has_splits) {
                        Some(split) => format!("{class} ({split})"),
                        None => class,
                    }
                });
                let (name, line) = (&images[image], first.line);
                return wrong(
                    row.line,
                    format!("{name} is {here} here and {there} in line {line}"),
                );
            }
        }
        if let [first, ..] = missing[..]
            && self.may_be_header(first)
        {
            let what = "names no image and has a class that no other row has: if it names the columns, call them `file` and `label`; \
                        else remove it";
            return wrong(first.line, what.into());
        }
        let table = self.file.display();
        if found.iter().all(Option::is_none) {
            let example = images.first().map_or("", String::as_str);
            return Err(Error::format(
                &self.file,
                format!("no row names an image of {}, such as {example}", folder.display()),
            ));
        }
        let unlisted: Vec<&String> = images
            .iter()
            .zip(&found)
            .filter(|(_, class)| class.is_none())
            .map(|(i, _)| i)
            .collect();
        let mut notes = Vec::from_iter(classes::twins(&self.file, &self.classes));
        if let [first, ..] = unlisted[..] {
            let (some, all) = (unlisted.len(), images.len());
            notes.push(format!(
                "{table}: {some} of {all} images in {} have no class there and are left out, such as {first}",
                folder.display()
            ));
        }
        if let [Row { line, name, .. }, ..] = missing[..] {
            let (count, first) = (missing.len(), printable(OsStr::new(name)));
            notes.push(format!(
                "{table}: {count} rows name no image of the set and are passed over, such as line {line}: {first}"
            ));
        }
        let classes = found.iter().map(|row| row.map(|row| (row.class, row.split))).collect();
        Ok(Labelled { classes, notes })
    }

    /// Whether a row that names no image may be a first row of names that are not known.
    fn may_be_header(&self, row: &Row) -> bool {
        let is_first = self.rows.first().is_some_and(|first| first.line == row.line);
        let alone = self.rows.iter().filter(|other| other.class == row.class).count() == 1;
        !self.has_header && is_first && alone && self.rows.len() > 1
    }
}

/// Images by their names, with the extension and without.
struct Named {
    whole: Names,
    stems: Names,
}

impl Named {
    fn new(images: &[String]) -> Self {
        let images: Vec<String> = whole_paths(images.iter().cloned()).collect();
        Self {
            stems: Names::of((0..).zip(images.iter().map(|name| stem(name).to_owned()))),
            whole: Names::of((0..).zip(images)),
        }
    }

    fn find(&self, name: &str) -> Vec<u32> {
        let found = self.whole.called(name);
        if found.is_empty() { self.stems.called(name) } else { found }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::labelled;
    use super::*;
    use crate::data::{Reading, open_labelled};

    #[test]
    fn images_without_a_row_and_rows_without_an_image_are_counted() {
        let (rows, notes) =
            labelled("file,label\na.png,cat\nx.png,cat\nc.png,\nd.png,dog\n", Split::Train)
                .unwrap();
        assert_eq!(rows, ["a.png cat", "d.png dog"]);
        assert!(notes[0].contains("labels.csv: 2 of 4 images in "), "{notes:?}");
        assert!(notes[0].ends_with("b.png"), "{notes:?}");
        assert!(notes[1].contains("1 rows name no image of the set"), "{notes:?}");
        assert!(notes[1].ends_with("such as line 3: x.png"), "{notes:?}");
    }

    #[test]
    fn one_table_serves_all_splits_and_nested_folders() {
        let root = tempfile::tempdir().unwrap();
        for name in ["train/x/1.png", "train/y/2.png", "test/x/1.png", "test/y/3.png"] {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::new(2, 2).save(path).unwrap();
        }
        let file = root.path().join("labels.csv");
        let read = |table: &str, split| {
            std::fs::write(&file, table).unwrap();
            let table = LabelTable::read(&file).unwrap();
            let set = open_labelled(root.path(), split, &Reading::default(), Some(&table))
                .map_err(|error| error.to_string())?;
            let labels: Vec<u32> = (0..set.len()).map(|i| set.label(i).unwrap()).collect();
            Ok::<_, String>((labels, set.notes().len()))
        };
        let table = "train/x/1.png,owl\n2,kea\ntest/x/1.png,kea\n3.png,owl\n";
        assert_eq!(read(table, Split::Train), Ok((vec![1, 0], 0)));
        assert_eq!(read(table, Split::Test), Ok((vec![0, 1], 0)));
        // The name fits an image of each split; one image has no row, and one row no image.
        assert_eq!(read("x/1.png,owl\n4.png,kea\n", Split::Train), Ok((vec![1], 2)));
    }
}

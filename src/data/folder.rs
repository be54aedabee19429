//! A folder of class folders, or one folder of images without labels.
//!
//! `listing` says which files and in what order. Decoded images are kept in memory up to a budget.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::classes;
use super::decode::{Place, Reading, decode, decode_page, images, page_size, size};
use super::listing::Listing;
use super::source::{Format, Image, Source, Split};
use super::table::{LabelTable, Labelled};
use crate::error::{Error, Result, printable};

/// Images in files.
pub struct Folder {
    root: PathBuf,
    files: Vec<ImageFile>,
    classes: Vec<String>,
    reading: Reading,
    notes: Vec<String>,
    cache: Cache,
}

/// The place of an image.
struct ImageFile {
    path: PathBuf,
    class: u32,
    /// Which of the images of a file that holds several.
    page: Option<Place>,
}

impl Folder {
    /// Lists a folder of images that are read as RGB of 8 bits; see [`Folder::open_as`].
    ///
    /// # Errors
    /// As [`Folder::open_as`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, &Reading::default())
    }

    /// Lists a folder: class folders if it has sub-folders, a set without labels otherwise. The images of a class are
    /// those of its folder and of all folders below it, as torchvision's `ImageFolder` reads them.
    ///
    /// # Errors
    /// If the folder is missing or holds no images, a class folder holds none, or images lie next to class folders.
    pub fn open_as(path: &Path, reading: &Reading) -> Result<Self> {
        let Listing { files: listed, classes, notes } = Listing::of(path, reading.axes.is_some())?;
        let files = images_of(listed, reading)?;
        let (cache, reading) = (Cache::new(files.len()), *reading);
        Ok(Self { root: path.to_path_buf(), files, classes, reading, notes, cache })
    }

    /// Makes a set without labels of these files, in this order, each of which may hold several images.
    ///
    /// # Errors
    /// If the reading is out of range, or a file that may hold several images cannot be opened.
    pub fn of_files(files: Vec<PathBuf>, reading: &Reading) -> Result<Self> {
        reading.check()?;
        let files = images_of(files.into_iter().map(|file| (file, 0)).collect(), reading)?;
        let (root, cache, reading) = (PathBuf::new(), Cache::new(files.len()), *reading);
        Ok(Self { root, files, classes: Vec::new(), reading, notes: Vec::new(), cache })
    }

    /// Numbers the classes as `first` does, the training split's classes; classes that it lacks come after them.
    ///
    /// # Errors
    /// If a class differs from one of `first` by case only, or `first` has none of the classes.
    pub(super) fn with_classes_of(mut self, path: &Path, first: &[String]) -> Result<Self> {
        if self.classes.is_empty() {
            return Ok(self);
        }
        let merged = classes::merge(path, first, &self.classes)?;
        self.files.iter_mut().for_each(|file| file.class = merged.numbers[file.class as usize]);
        let labels = self.files.iter().map(|file| file.class);
        self.notes.extend(merged.note(path, labels));
        self.classes = merged.classes;
        Ok(self)
    }

    /// Takes the classes of its images from a table; images without one are left out, and those of other splits than `split` if it is
    /// given. `others` are the names of the set's other images.
    ///
    /// # Errors
    /// If a row of the table names several images, two rows give an image different classes, or no row names an image.
    pub(super) fn labelled_by(
        mut self,
        table: &LabelTable,
        others: &[String],
        split: Option<Split>,
    ) -> Result<Self> {
        // A file of several images has one row.
        let file = |image: &ImageFile| printable(image.path.as_os_str());
        let mut names: Vec<String> = self.files.iter().map(file).collect();
        names.dedup();
        let Labelled { classes, notes } = table.of_images(&self.root, &names, others)?;
        let classes: HashMap<String, Option<(u32, Option<Split>)>> =
            names.into_iter().zip(classes).collect();
        self.files.retain_mut(|image| {
            let of_split = |(_, of): &(u32, Option<Split>)| split.is_none() || split == *of;
            let class = classes[&file(image)].filter(of_split);
            image.class = class.map_or(0, |(class, _)| class);
            class.is_some()
        });
        if let (true, Some(split)) = (self.files.is_empty(), split) {
            let reason = format!("has no images of the {split} split by the table of labels");
            return Err(Error::format(&self.root, reason));
        }
        self.classes = table.classes().to_vec();
        if split != Some(Split::Test) {
            self.notes.extend(notes); // once, with the training split
            self.notes.extend(split.and_then(|_| table.not_read()));
        }
        self.cache = Cache::new(self.files.len());
        Ok(self)
    }

    /// Compares the classes of its images with those of the training split's images, which have the same numbers from the same table.
    ///
    /// # Errors
    /// As for [`classes::compare`].
    pub(super) fn beside(mut self, training: &Self, table: &LabelTable) -> Result<Self> {
        let labels: Vec<u32> = self.files.iter().map(|file| file.class).collect();
        let training = training.files.iter().map(|file| file.class);
        self.notes.extend(classes::compare(table.file(), &self.classes, training, &labels)?);
        Ok(self)
    }

    /// Adds a sentence that a user of the set should read.
    pub(super) fn with_note(mut self, note: Option<String>) -> Self {
        self.notes.extend(note);
        self
    }

    /// Sets how many bytes of decoded images are kept in memory (default: 1 GiB); 0 keeps none.
    pub fn with_cache(mut self, bytes: usize) -> Self {
        self.cache.limit(bytes);
        self
    }

    /// Returns the file of image `index`.
    pub(super) fn file(&self, index: usize) -> &Path {
        &self.files[index].path
    }

    /// Returns the image's place in its file, if the file holds several.
    pub(super) fn page(&self, index: usize) -> Option<Place> {
        self.files[index].page
    }

    /// Returns how its files are read.
    pub(super) fn reading(&self) -> &Reading {
        &self.reading
    }

    /// Returns the path of image `index` below the folder, printable, with `/` between its parts.
    pub(super) fn name_in_folder(&self, index: usize) -> String {
        let path = self.file(index);
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let name = below.iter().map(printable).collect::<Vec<_>>().join("/");
        name + &self.files[index].number()
    }
}

impl ImageFile {
    fn of((path, class): (PathBuf, u32)) -> Self {
        Self { path, class, page: None }
    }

    /// What stands behind the file's name in that of the image.
    fn number(&self) -> String {
        self.page.map_or_else(String::new, |page| format!("[{}]", page.number))
    }
}

/// The images of files, with the class of each file.
fn images_of(listed: Vec<(PathBuf, u32)>, reading: &Reading) -> Result<Vec<ImageFile>> {
    match reading.pages.is_some() || reading.axes.is_some() {
        true => each_image(listed, reading),
        false => Ok(listed.into_iter().map(ImageFile::of).collect()),
    }
}

/// An entry for each image of files that may hold several. A file that cannot be opened counts as one image, and its reading fails.
fn each_image(listed: Vec<(PathBuf, u32)>, reading: &Reading) -> Result<Vec<ImageFile>> {
    let mut all = Vec::with_capacity(listed.len());
    for (path, class) in listed {
        match images(&path, reading) {
            Ok(places) if !places.is_empty() => {
                let page = |page| ImageFile { path: path.clone(), class, page: Some(page) };
                all.extend(places.into_iter().map(page));
            }
            Ok(_) | Err(Error::Format { .. }) => all.push(ImageFile { path, class, page: None }),
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

impl Source for Folder {
    fn format(&self) -> Format {
        self.reading.format
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        if let Some(kept) = self.cache.get(index) {
            into.clone_from(kept);
            return Ok(());
        }
        let ImageFile { path, page, .. } = &self.files[index];
        match page {
            Some(page) => decode_page(path, *page, &self.reading, into)?,
            None => {
                let bytes = std::fs::read(path).map_err(Error::io(path))?;
                decode(path, &bytes, &self.reading, into)?;
            }
        }
        self.cache.keep(index, into);
        Ok(())
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        if let Some(kept) = self.cache.get(index) {
            return Ok([kept.width, kept.height]);
        }
        let ImageFile { path, page, .. } = &self.files[index];
        match page {
            Some(page) => page_size(path, *page, &self.reading),
            None => size(path, &std::fs::read(path).map_err(Error::io(path))?, &self.reading),
        }
    }

    fn file_bytes(&self, index: usize) -> Option<u64> {
        Some(std::fs::metadata(&self.files[index].path).ok()?.len())
    }

    fn label(&self, index: usize) -> Option<u32> {
        (!self.classes.is_empty()).then_some(self.files[index].class)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        printable(self.files[index].path.as_os_str()) + &self.files[index].number()
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, value: u8) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::GrayImage::from_pixel(3, 2, image::Luma([value]))
            .save_with_format(path, image::ImageFormat::Png)
            .unwrap();
    }

    #[test]
    fn classes_and_files_come_in_order_and_hidden_ones_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        for (file, value) in [
            ("dog/b.png", 3),
            ("dog/a.PNG", 2),
            ("cat/z.png", 1),
            (".git/x.png", 9),
            ("cat/.y.png", 9),
        ] {
            write(root.path().join(file), value);
        }
        std::fs::write(root.path().join("cat/notes.txt"), "").unwrap();
        let set = Folder::open(root.path()).unwrap();
        assert_eq!((set.len(), set.classes()), (3, &["cat".to_string(), "dog".to_string()][..]));
        let mut image = Image::default();
        let read: Vec<_> = (0..3)
            .map(|i| {
                set.read(i, &mut image).unwrap();
                (image.pixels[0], set.label(i))
            })
            .collect();
        assert_eq!(read, [(1, Some(0)), (2, Some(1)), (3, Some(1))]);
        let flat = Folder::open(&root.path().join("dog")).unwrap();
        assert_eq!((flat.len(), flat.label(0), flat.classes().len()), (2, None, 0));
        assert!(flat.name(1).ends_with("b.png"));
    }

    #[test]
    fn an_image_is_decoded_once_while_the_budget_lasts() {
        let root = tempfile::tempdir().unwrap();
        write(root.path().join("a.png"), 5);
        write(root.path().join("b.png"), 6);
        let set = Folder::open(root.path()).unwrap().with_cache(18);
        let mut image = Image::default();
        set.read(0, &mut image).unwrap();
        set.read(1, &mut image).unwrap();
        std::fs::remove_file(root.path().join("a.png")).unwrap();
        std::fs::remove_file(root.path().join("b.png")).unwrap();
        set.read(0, &mut image).unwrap();
        assert_eq!(
            (image.width, image.height, image.pixels.as_slice()),
            (3, 2, [5; 18].as_slice())
        );
        assert!(set.read(1, &mut image).unwrap_err().to_string().contains("b.png"));
    }

    #[test]
    fn errors_name_the_fault_of_a_folder_and_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("bare")).unwrap();
        write(at("empty-class/cat/a.png"), 1);
        std::fs::create_dir_all(at("empty-class/dog")).unwrap();
        write(at("mixed/cat/a.png"), 1);
        write(at("mixed/b.png"), 1);
        for (name, expected) in [
            ("nowhere", "nowhere: "),
            (
                "bare",
                "has neither class folders nor images (jpg, jpeg, jpe, jfif, png, tif, tiff, webp, bmp)",
            ),
            (
                "empty-class",
                "dog: is a class folder without images (jpg, jpeg, jpe, jfif, png, tif, tiff, webp, bmp) in it: fill it or remove it",
            ),
            ("mixed", "has both class folders and images of its own"),
        ] {
            let message = Folder::open(&at(name)).err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

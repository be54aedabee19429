//! A folder of class folders, or one folder of images without labels.
//!
//! Classes are the sub-folders that are not hidden, files the JPEG and PNG files directly in them, both in byte
//! order of their names, so that indices mean the same everywhere (torchvision's `ImageFolder` sorts alike).
//! Decoded images are kept in memory up to a budget.

use std::path::{Path, PathBuf};

use super::cache::Cache;
use super::decode::{EXTENSIONS, decode, size};
use super::source::{Image, Source};
use crate::error::{Error, Result};

/// Images in files.
pub struct Folder {
    files: Vec<(PathBuf, u32)>,
    classes: Vec<String>,
    cache: Cache,
}

impl Folder {
    /// Lists a folder: class folders if it has sub-folders, a set without labels otherwise.
    ///
    /// # Errors
    /// When the folder is missing or holds no images, when a class folder holds none, or images lie beside class
    /// folders.
    pub fn open(path: &Path) -> Result<Self> {
        let (folders, loose) = list(path)?;
        let (mut files, mut classes) = (Vec::new(), Vec::new());
        if folders.is_empty() {
            if loose.is_empty() {
                let reason =
                    format!("has neither class folders nor images ({})", EXTENSIONS.join(", "));
                return Err(Error::format(path, reason));
            }
            files.extend(loose.into_iter().map(|file| (file, 0)));
        } else {
            if let Some(file) = loose.first() {
                let reason = format!(
                    "has both class folders and images of its own (such as {}): move the images into a class folder, or away",
                    file.display()
                );
                return Err(Error::format(path, reason));
            }
            for folder in folders {
                let (_, images) = list(&folder)?;
                if images.is_empty() {
                    let reason = format!(
                        "is a class folder without images ({}) in it: fill it or remove it",
                        EXTENSIONS.join(", ")
                    );
                    return Err(Error::format(&folder, reason));
                }
                files.extend(images.into_iter().map(|file| (file, classes.len() as u32)));
                classes.push(file_name(&folder));
            }
        }
        let cache = Cache::new(files.len());
        Ok(Self { files, classes, cache })
    }

    /// Sets how many bytes of decoded images are kept in memory (1 GiB unless said otherwise); 0 keeps none.
    pub fn with_cache(mut self, bytes: usize) -> Self {
        self.cache.limit(bytes);
        self
    }

    /// The file of image `index`.
    pub(super) fn file(&self, index: usize) -> &Path {
        &self.files[index].0
    }
}

/// The last part of a path.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// The sub-folders and the image files of a folder, each sorted; hidden ones left out.
fn list(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut folders, mut images) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if file_name(&path).starts_with('.') {
            continue;
        }
        // Not the entry's own type: links to folders and files count as what they lead to.
        if path.is_dir() {
            folders.push(path);
        } else if is_image(&path) {
            images.push(path);
        }
    }
    folders.sort_unstable();
    images.sort_unstable();
    Ok((folders, images))
}

/// Whether a file's name says that it is an image.
fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

impl Source for Folder {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        if let Some(kept) = self.cache.get(index) {
            into.clone_from(kept);
            return Ok(());
        }
        let path = &self.files[index].0;
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        decode(path, &bytes, into)?;
        self.cache.keep(index, into);
        Ok(())
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        if let Some(kept) = self.cache.get(index) {
            return Ok([kept.width, kept.height]);
        }
        let path = &self.files[index].0;
        size(path, &std::fs::read(path).map_err(Error::io(path))?)
    }

    fn label(&self, index: usize) -> Option<u32> {
        let (_, class) = self.files[index];
        (!self.classes.is_empty()).then_some(class)
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        self.files[index].0.display().to_string()
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
    fn classes_and_files_come_in_order_and_hidden_ones_not_at_all() {
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
    fn what_is_wrong_with_a_folder_is_said_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::create_dir_all(at("bare")).unwrap();
        write(at("empty-class/cat/a.png"), 1);
        std::fs::create_dir_all(at("empty-class/dog")).unwrap();
        write(at("mixed/cat/a.png"), 1);
        write(at("mixed/b.png"), 1);
        for (name, expected) in [
            ("nowhere", "nowhere: "),
            ("bare", "has neither class folders nor images (jpg, jpeg, jpe, png)"),
            (
                "empty-class",
                "dog: is a class folder without images (jpg, jpeg, jpe, png) in it: fill it or remove it",
            ),
            ("mixed", "has both class folders and images of its own"),
        ] {
            let message = Folder::open(&at(name)).err().expect(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

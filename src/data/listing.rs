//! Lists the images of a folder.
//!
//! The rules are those of torchvision's `ImageFolder` (`find_classes` and `make_dataset`): the sub-folders are the classes,
//! in byte order of their names; the images of a class are those of its folder and of all folders below it, folders in
//! byte order of their paths, files in byte order of their names; links are followed. In addition hidden files and folders
//! are ignored, and only regular files (or links to regular files) are listed, so that opening one never blocks. What a
//! user may have expected to be read is counted and told once ([`Listing::notes`]).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::classes;
use super::pack::MANIFEST;
use crate::error::{Error, Result, printable};
use crate::files::is_file;

/// File extensions that are read, in lower case.
pub const EXTENSIONS: [&str; 9] =
    ["jpg", "jpeg", "jpe", "jfif", "png", "tif", "tiff", "webp", "bmp"];

/// Of NumPy arrays, which are images only if it is said what their axes are: embeddings and labels are arrays, too.
const ARRAYS: &str = "npy";

/// Extensions of other picture formats, in lower case: counted, not read.
const OTHER_FORMATS: [&str; 33] = [
    "dib", "gif", "apng", "ppm", "pgm", "pbm", "pnm", "pam", "heic", "heif", "hif", "avif", "jxl",
    "jp2", "j2k", "jpx", "jxr", "ico", "tga", "dds", "exr", "hdr", "qoi", "psd", "svg", "dng",
    "cr2", "cr3", "nef", "arw", "raf", "orf", ARRAYS,
];

/// Folders that tools leave next to images: archives of macOS, and Synology's thumbnails.
const FOLDERS_OF_TOOLS: [&str; 2] = ["__MACOSX", "@eaDir"];

/// Folders below a class folder: a deeper tree is refused, so that no chain of links overflows the stack.
const DEEPEST: usize = 64;

/// The images of a folder.
#[derive(Debug, Default)]
pub struct Listing {
    /// Each file with its class; 0 if there are no classes.
    pub files: Vec<(PathBuf, u32)>,
    /// Names of the class folders, printable; empty if the folder holds images only.
    pub classes: Vec<String>,
    /// Sentences on what is in the folder and is not read.
    pub notes: Vec<String>,
}

impl Listing {
    /// Lists a folder: class folders if it has sub-folders, images without labels otherwise. NumPy arrays are images if `arrays`.
    ///
    /// # Errors
    /// If the folder is missing or cannot be read, holds no images, a class folder holds none, or images lie next to class
    /// folders.
    pub fn of(root: &Path, arrays: bool) -> Result<Self> {
        let mut passed_over = PassedOver { arrays, ..PassedOver::default() };
        let Entries { folders, images: loose } = passed_over.list(root)?;
        let mut listing = Self::default();
        for folder in folders {
            if is_called_runs(&folder) && has_a_run(&folder)? {
                passed_over.runs.push(folder);
                continue;
            }
            let mut images = Vec::new();
            collect(&folder, &mut vec![identity(&folder)?], &mut passed_over, &mut images)?;
            if images.is_empty() {
                if is_called_runs(&folder) || has_a_run(&folder)? {
                    passed_over.runs.push(folder);
                    continue;
                }
                return Err(without_images(&folder, &passed_over));
            }
            images.sort_by(|a, b| order(a).cmp(&order(b)));
            let class = listing.classes.len() as u32;
            listing.files.extend(images.into_iter().map(|file| (file, class)));
            listing.classes.push(name_of(&folder));
        }
        match (listing.classes.is_empty(), loose.first()) {
            (true, None) => {
                let reason = format!(
                    "has neither class folders nor images ({}){}",
                    EXTENSIONS.join(", "),
                    passed_over.in_brackets()
                );
                return Err(Error::format(root, reason));
            }
            (true, Some(_)) => listing.files.extend(loose.into_iter().map(|file| (file, 0))),
            (false, None) => {}
            (false, Some(file)) => {
                let reason = format!(
                    "has both class folders and images of its own (such as {}): move the images into a class folder, or away",
                    printable(file.as_os_str())
                );
                return Err(Error::format(root, reason));
            }
        }
        if let Some(pair) = listing.classes.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::format(root, format!("has two class folders called {}", pair[0])));
        }
        listing.notes = passed_over.notes();
        listing.notes.extend(classes::twins(root, &listing.classes));
        Ok(listing)
    }
}

/// Names of the class folders of a part, as [`Listing::of`] has them, without listing their images; empty if there are none.
///
/// # Errors
/// If the folder cannot be read.
pub fn class_names(root: &Path, arrays: bool) -> Result<Vec<String>> {
    let mut classes = Vec::new();
    for folder in PassedOver::default().list(root)?.folders {
        let runs = (is_called_runs(&folder) && has_a_run(&folder)?)
            || (!has_an_image(&folder, usize::MAX, arrays)?
                && (is_called_runs(&folder) || has_a_run(&folder)?));
        if !runs {
            classes.push(name_of(&folder));
        }
    }
    Ok(classes)
}

/// Whether a file is called like an image, of the formats that are read or of others.
pub(crate) fn is_image_name(path: &Path) -> bool {
    extension(path).is_some_and(|extension| {
        EXTENSIONS.contains(&&*extension) || OTHER_FORMATS.contains(&&*extension)
    })
}

/// The last part of a path, printable.
pub fn name_of(path: &Path) -> String {
    printable(path.file_name().unwrap_or(path.as_os_str()))
}

/// What the images of a class are sorted by: the bytes of the folder's path, then those of the name.
fn order(path: &Path) -> (&[u8], &[u8]) {
    fn bytes(part: Option<&OsStr>) -> &[u8] {
        part.map_or(&[], OsStr::as_encoded_bytes)
    }
    // Not the path itself: it is compared by its parts, and `a/b` comes before `a-b`; torchvision sorts text.
    (bytes(path.parent().map(Path::as_os_str)), bytes(path.file_name()))
}

/// Sub-folders and image files of a folder, each in byte order of their names.
struct Entries {
    folders: Vec<PathBuf>,
    images: Vec<PathBuf>,
}

/// What was found and is not read.
#[derive(Default)]
struct PassedOver {
    /// Whether NumPy arrays are images.
    arrays: bool,
    /// Files by extension.
    formats: BTreeMap<&'static str, usize>,
    /// Image names that are neither files nor links to files: pipes, sockets, devices.
    special: Vec<PathBuf>,
    /// Names of images or folders that link to nothing.
    dangling: Vec<PathBuf>,
    /// Folders of training runs and packs.
    runs: Vec<PathBuf>,
}

impl PassedOver {
    fn list(&mut self, folder: &Path) -> Result<Entries> {
        let mut entries = Entries { folders: Vec::new(), images: Vec::new() };
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            let (name, path) = (entry.file_name(), entry.path());
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let mut kind = entry.file_type().map_err(Error::io(&path))?;
            if kind.is_symlink() {
                // Links count as what they lead to.
                kind = match std::fs::metadata(&path) {
                    Ok(target) => target.file_type(),
                    Err(e) if e.kind() == ErrorKind::NotFound || is_loop(&e) => {
                        // Without an extension it may have been a class folder.
                        let extension = extension(&path);
                        if extension.is_none_or(|e| EXTENSIONS.contains(&e.as_str())) {
                            self.dangling.push(path);
                        }
                        continue;
                    }
                    Err(e) => return Err(Error::io(&path)(e)),
                };
            }
            if kind.is_dir() {
                if is_run(&path)? || is_pack(&path)? {
                    self.runs.push(path);
                } else if !FOLDERS_OF_TOOLS.iter().any(|tool| name == *tool) {
                    entries.folders.push(path);
                }
                continue;
            }
            let Some(extension) = extension(&path) else { continue };
            let is_array = self.arrays && extension == ARRAYS;
            let other = OTHER_FORMATS.iter().find(|&&format| format == extension);
            if let Some(format) = other.filter(|_| !is_array) {
                *self.formats.entry(format).or_default() += 1;
            } else if is_array || EXTENSIONS.contains(&extension.as_str()) {
                if kind.is_file() { entries.images.push(path) } else { self.special.push(path) }
            }
        }
        entries.folders.sort_by(|a, b| order(a).1.cmp(order(b).1));
        entries.images.sort_by(|a, b| order(a).1.cmp(order(b).1));
        Ok(entries)
    }

    fn formats(&self) -> Option<String> {
        let count: usize = self.formats.values().sum();
        let names: Vec<_> = self.formats.keys().copied().collect();
        let (files, are) = if count == 1 { ("file", "is") } else { ("files", "are") };
        let hint = match self.formats.contains_key(ARRAYS) {
            true => "; arrays are read if data.axes says what their axes are",
            false => "",
        };
        (count > 0).then(|| {
            format!("{count} {files} of other formats ({}) {are} not read{hint}", names.join(", "))
        })
    }

    fn in_brackets(&self) -> String {
        self.formats().map_or_else(String::new, |formats| format!("; {formats}"))
    }

    fn notes(&self) -> Vec<String> {
        let some = |what: &str, paths: &[PathBuf]| {
            let first = printable(paths.first()?.as_os_str());
            Some(format!("{what}: {}, such as {first}", paths.len()))
        };
        let notes = [
            self.formats(),
            some("image names that are no regular files and are not read", &self.special),
            some("links that lead nowhere and are not read", &self.dangling),
            some("folders of training runs or packs, which are not read as images", &self.runs),
        ];
        notes.into_iter().flatten().collect()
    }
}

/// The images of a folder and of the folders below it; `above` are the identities of the folders on the way down.
fn collect(
    folder: &Path,
    above: &mut Vec<Identity>,
    passed_over: &mut PassedOver,
    into: &mut Vec<PathBuf>,
) -> Result<()> {
    let entries = passed_over.list(folder)?;
    into.extend(entries.images);
    for folder in entries.folders {
        let identity = identity(&folder)?;
        // A link to a folder above would be followed for ever, and on the way find the images of other classes.
        if above.iter().any(|below| below.starts_with(&identity)) {
            continue;
        }
        if above.len() == DEEPEST {
            let reason = format!("lies more than {DEEPEST} folders below its class folder");
            return Err(Error::format(folder, reason));
        }
        above.push(identity);
        collect(&folder, above, passed_over, into)?;
        above.pop();
    }
    Ok(())
}

/// What tells a folder from all others, however it is reached.
type Identity = PathBuf;

fn identity(folder: &Path) -> Result<Identity> {
    std::fs::canonicalize(folder).map_err(Error::io(folder))
}

/// Whether an error of the operating system says that links lead in a circle (ELOOP).
fn is_loop(error: &std::io::Error) -> bool {
    cfg!(unix) && matches!(error.raw_os_error(), Some(40 | 62))
}

fn extension(path: &Path) -> Option<String> {
    path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase)
}

/// Whether a folder is that of a training run.
fn is_run(folder: &Path) -> Result<bool> {
    Ok(is_file(&folder.join("recipe.toml"))? && is_file(&folder.join("metrics.jsonl"))?)
}

/// Whether a folder holds packed images.
fn is_pack(folder: &Path) -> Result<bool> {
    is_file(&folder.join(MANIFEST))
}

/// Whether a folder has the name under which runs are kept unless `--out` says otherwise.
fn is_called_runs(folder: &Path) -> bool {
    folder.file_name() == Some(OsStr::new("runs"))
}

/// Whether a folder holds folders of training runs, one of which may have just begun.
fn has_a_run(folder: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let kind = entry.file_type().map_err(Error::io(entry.path()))?;
        if kind.is_dir() && is_file(&entry.path().join("recipe.toml"))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether there is an image in a folder or below it; looks no further than the first, and into at most `folders` folders.
fn has_an_image(folder: &Path, mut folders: usize, arrays: bool) -> Result<bool> {
    fn below(
        folder: &Path,
        above: &mut Vec<Identity>,
        folders: &mut usize,
        arrays: bool,
    ) -> Result<bool> {
        let Some(left) = folders.checked_sub(1) else { return Ok(false) };
        *folders = left;
        let entries = PassedOver { arrays, ..PassedOver::default() }.list(folder)?;
        if !entries.images.is_empty() {
            return Ok(true);
        }
        for folder in entries.folders {
            let identity = identity(&folder)?;
            if above.len() == DEEPEST || above.iter().any(|below| below.starts_with(&identity)) {
                continue;
            }
            above.push(identity);
            if below(&folder, above, folders, arrays)? {
                return Ok(true);
            }
            above.pop();
        }
        Ok(false)
    }
    below(folder, &mut vec![identity(folder)?], &mut folders, arrays)
}

/// The sub-folders of a folder that may be classes or splits: hidden ones, runs, packs and what tools leave are none.
///
/// # Errors
/// If the folder cannot be read.
pub fn sub_folders(root: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = PassedOver::default().list(root)?.folders;
    folders.retain(|folder| !is_called_runs(folder));
    Ok(folders)
}

/// Folders that are looked into for a sentence: it is not worth a walk through a large tree.
const GLANCE: usize = 100;

/// Whether a glance shows images in a folder or below it; not if it cannot be read, as the `lost+found` of a disk.
pub fn seems_to_hold_images(folder: &Path) -> bool {
    has_an_image(folder, GLANCE, false).unwrap_or(false)
}

/// Whether images lie in a folder itself, not only in folders below it.
///
/// # Errors
/// If the folder cannot be read.
pub fn has_loose_images(folder: &Path) -> Result<bool> {
    Ok(!PassedOver::default().list(folder)?.images.is_empty())
}

fn without_images(folder: &Path, passed_over: &PassedOver) -> Error {
    let reason = format!(
        "is a class folder without images ({}) in it: fill it or remove it{}",
        EXTENSIONS.join(", "),
        passed_over.in_brackets()
    );
    Error::format(folder, reason)
}

//! Files that are written completely or not at all, and never through a link.
//!
//! A file is written under a temporary name next to it, synced and renamed, so that a reader sees the old contents or the new
//! ones, never a part. Temporary names are unique and created exclusively: two processes that write the same file do not
//! collide, and a link that somebody planted under such a name is not followed. A rename replaces a link instead of writing
//! through it.

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// The end of temporary names.
const PARTIAL: &str = ".partial";

/// A file that this process has locked; the kernel gives the lock back when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    /// The process that locked it.
    process: u32,
}

impl Lock {
    /// Locks a file, unless another process has.
    pub(crate) fn take(file: File) -> std::result::Result<Self, TryLockError> {
        file.try_lock()?;
        Ok(Self { file, process: std::process::id() })
    }
}

impl Drop for Lock {
    /// Gives the lock back: a process that was forked meanwhile has the file open, too, and to close it here would not be enough.
    fn drop(&mut self) {
        if self.process == std::process::id() {
            let _ = self.file.unlock();
        }
    }
}

/// Reads a text file; `what` says what the text is, for the error about a file that holds none.
pub(crate) fn read_text(path: &Path, what: &str) -> Result<String> {
    if path.is_dir() {
        return Err(Error::format(path, format!("is a folder, where {what} is expected")));
    }
    std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::InvalidData => {
            Error::format(path, format!("is not UTF-8 text, and so not {what}"))
        }
        _ => Error::io(path)(error),
    })
}

/// Writes a small file.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_file(path, |partial| fill(path, partial, bytes))
}

/// Writes new contents into a file of the user's, which keeps its permissions; of a link, into the file that it names.
pub(crate) fn rewrite_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let path = path.canonicalize().map_err(Error::io(path))?;
    let permissions = std::fs::metadata(&path).map_err(Error::io(&path))?.permissions();
    replace_file(&path, |partial| {
        fill(&path, partial, bytes)?;
        std::fs::set_permissions(partial, permissions).map_err(|e| write_error(&path, e))
    })
}

/// Writes two small files that belong together: there is never a `main` file next to the other one of an earlier pair. If the
/// process is killed in between, the `main` file is missing.
pub(crate) fn write_pair(other: (&Path, &[u8]), main: (&Path, &[u8])) -> Result<()> {
    replace_file(main.0, |partial| {
        fill(main.0, partial, main.1)?;
        sync(main.0, partial)?;
        replace_file(other.0, |partial| {
            fill(other.0, partial, other.1)?;
            match std::fs::remove_file(main.0) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(write_error(main.0, error))
                }
                _ => Ok(()),
            }
        })
    })
}

/// Writes `path` by way of a temporary file, which exists and is empty when `write` fills it.
pub(crate) fn replace_file(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = temporary(path, |partial| File::create_new(partial).map(drop))?;
    let written = write(&partial).and_then(|()| sync(path, &partial));
    rename(&partial, path, written)
}

/// Fills the temporary file of `path`.
fn fill(path: &Path, partial: &Path, bytes: &[u8]) -> Result<()> {
    let file = OpenOptions::new().write(true).truncate(true).open(partial);
    file.and_then(|mut file| file.write_all(bytes)).map_err(|e| write_error(path, e))
}

fn sync(path: &Path, partial: &Path) -> Result<()> {
    let synced = File::open(partial).and_then(|file| file.sync_all());
    synced.map_err(|e| write_error(path, e))
}

/// Makes `path` another name of the file `from`; a copy of it if the file system has no hard links.
pub(crate) fn replace_by_link(path: &Path, from: &Path) -> Result<()> {
    match temporary(path, |partial| std::fs::hard_link(from, partial)) {
        Ok(partial) => rename(&partial, path, Ok(())),
        Err(_) => replace_file(path, |partial| {
            std::fs::copy(from, partial).map(drop).map_err(|e| write_error(path, e))
        }),
    }
}

/// Calls `create` with temporary names for `path` until one is free.
fn temporary(path: &Path, create: impl Fn(&Path) -> std::io::Result<()>) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    loop {
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let partial = path.with_file_name(format!(".{name}.{process}-{count}{PARTIAL}"));
        match create(&partial) {
            Ok(()) => return Ok(partial),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(write_error(path, error)),
        }
    }
}

/// Gives a temporary file its name, or removes it if it could not be written.
fn rename(partial: &Path, path: &Path, written: Result<()>) -> Result<()> {
    let renamed = written
        .and_then(|()| std::fs::rename(partial, path).map_err(|error| write_error(path, error)));
    // If both names were links to one file, renaming has left both. The first error is the one to report.
    let _ = std::fs::remove_file(partial);
    renamed?;
    // The rename itself must survive a power cut, too.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all(); // not supported by every file system
    }
    Ok(())
}

/// Whether a file of this name is a temporary one.
pub(crate) fn is_partial(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b".") && name.ends_with(PARTIAL.as_bytes())
}

/// Removes the temporary files that killed processes left in a folder.
///
/// # Errors
/// If the folder cannot be listed.
pub(crate) fn remove_partial_files(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        if is_partial(&entry.file_name()) {
            let _ = std::fs::remove_file(entry.path()); // a leftover does no harm
        }
    }
    Ok(())
}

/// Creates a folder and those above it, unless it is there.
///
/// # Errors
/// If it cannot be created.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    check_link(path)?;
    std::fs::create_dir_all(path).map_err(|error| write_error(path, error))
}

/// Fails if `path` is a link to something that is missing: no folder can be created there.
///
/// # Errors
/// If so, or if what is there cannot be found out.
pub(crate) fn check_link(path: &Path) -> Result<()> {
    let is_link = std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    if is_link && find(path)?.is_none() {
        return Err(Error::format(
            path,
            "is a link to a folder that is missing: create that folder, or remove the link",
        ));
    }
    Ok(())
}

/// Fails if no file can be created next to `path`.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let partial = temporary(path, |partial| File::create_new(partial).map(drop))?;
    std::fs::remove_file(partial).map_err(|error| write_error(path, error))
}

/// What is at a path, links followed; `None` if nothing is there.
///
/// `Path::exists` and the like also say no when a disk or a network fails: what is there would be taken for missing.
///
/// # Errors
/// If that cannot be found out.
pub(crate) fn find(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// Whether a regular file is at a path; an error as in [`find`].
pub(crate) fn is_file(path: &Path) -> Result<bool> {
    Ok(find(path)?.is_some_and(|found| found.is_file()))
}

/// Whether a folder is at a path; an error as in [`find`].
pub(crate) fn is_folder(path: &Path) -> Result<bool> {
    Ok(find(path)?.is_some_and(|found| found.is_dir()))
}

/// Opens `path` for reading and writing without truncating it, and creates it if it is missing.
///
/// # Errors
/// If it is a link: in a folder from elsewhere, a link leads to a file that is not the run's.
pub(crate) fn open_own(path: &Path, append: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(!append).append(append).create(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK); // a named pipe does not block
    }
    match options.open(path) {
        Ok(file) if file.metadata().is_ok_and(|data| data.is_file()) => Ok(file),
        Err(error) if !std::fs::symlink_metadata(path).is_ok_and(|data| data.is_symlink()) => {
            Err(write_error(path, error))
        }
        _ => Err(Error::format(
            path,
            "is a link or a special file, which a run does not write to: remove it",
        )),
    }
}

/// Converts a failed write to an error; a full disk comes with the remedy.
pub(crate) fn write_error(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::format(
                path,
                format!(
                    "cannot be written ({error}): make room; files written earlier are complete"
                ),
            )
        }
        _ => Error::io(path)(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_lock_is_given_back_though_a_forked_process_has_its_file_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".lock");
        let file = File::create(&path).unwrap();
        let of_a_forked_process = file.try_clone().unwrap(); // the same open file
        let lock = Lock::take(file).unwrap();
        let again = || Lock::take(File::open(&path).unwrap());
        assert!(matches!(again(), Err(TryLockError::WouldBlock)));
        drop(lock);
        assert!(again().is_ok());
        drop(of_a_forked_process);
    }

    #[test]
    fn many_writers_of_one_file_leave_one_complete_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        std::thread::scope(|scope| {
            for letter in b'a'..b'i' {
                let path = &path;
                scope.spawn(move || {
                    (0..20).for_each(|_| write_file(path, &[letter; 5000]).unwrap());
                });
            }
        });
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() == 5000 && bytes.iter().all(|byte| *byte == bytes[0]));
        assert_eq!(names(folder.path()), ["page.html"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        write_file(&path, b"old").unwrap();
        let failed = replace_file(&path, |partial| {
            std::fs::write(partial, "half").unwrap();
            Err(Error::config("no more"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no more");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["table"]);
    }

    #[test]
    fn a_second_name_shares_the_file_and_can_be_made_twice() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["step", "best"].map(|name| folder.path().join(name));
        write_file(&from, b"weights").unwrap();
        for _ in 0..2 {
            replace_by_link(&to, &from).unwrap();
            assert_eq!(std::fs::read(&to).unwrap(), b"weights");
            assert_eq!(names(folder.path()), ["best", "step"]);
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_replaced_or_refused_and_never_written_through() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("run");
        std::fs::create_dir(&folder).unwrap();
        let victim = root.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        let link = |name: &str| {
            let path = folder.join(name);
            std::os::unix::fs::symlink(&victim, &path).unwrap();
            path
        };
        write_file(&link("recipe.toml"), b"new").unwrap();
        assert!(!folder.join("recipe.toml").is_symlink());
        for append in [false, true] {
            let path = link(if append { "metrics.jsonl" } else { ".lock" });
            let error = open_own(&path, append).unwrap_err().to_string();
            assert!(error.contains("is a link or a special file"), "{error}");
        }
        // A name that the next temporary file would have is passed over.
        for count in 0..1000 {
            let name = format!(".page.{}-{count}{PARTIAL}", std::process::id());
            link(&name);
        }
        write_file(&folder.join("page"), b"new").unwrap();
        remove_partial_files(&folder).unwrap();
        assert_eq!(names(&folder), [".lock", "metrics.jsonl", "page", "recipe.toml"]);
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    }
}

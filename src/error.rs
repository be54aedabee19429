//! Runtime failures: files, recipes, devices, damaged data.
//!
//! The rule of the crate: API misuse (shapes that do not match, a temperature of zero) panics with the operation's name and the
//! shapes; runtime failures return [`Error`], which names the thing and, where it is known, the remedy. Messages are lower case
//! without a full stop, so that they chain.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What can go wrong outside the program's control.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed.
    #[error("{}: {source}", printable(path.as_os_str()))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// A file or folder exists but its contents are not what they should be.
    #[error("{}: {reason}", printable(path.as_os_str()))]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what was expected.
        reason: String,
    },
    /// A recipe, a flag or a setting asks for something impossible.
    #[error("{0}")]
    Config(String),
    /// A checkpoint or weight file does not fit the network.
    #[error("{0}")]
    Weights(String),
    /// A device cannot be used.
    #[error("{0}")]
    Device(String),
    /// A worker thread panicked: a bug, in the program or in the caller's image source.
    #[error("{0}")]
    Worker(String),
    /// Too many images of a set cannot be read.
    #[error("{0}")]
    Unreadable(String),
    /// A run stopped because its loss diverged or became NaN.
    #[error("{0}")]
    Diverged(String),
    /// A run stopped because its embeddings collapsed.
    #[error("{0}")]
    Collapsed(String),
    /// A run was asked to stop, and did.
    #[error("{0}")]
    Stopped(String),
    /// Another rank failed, and reports why.
    #[error("rank {0} failed")]
    Elsewhere(usize),
}

/// Returns a file name or path as text that can be printed anywhere: control characters (line feeds, tabs, escape sequences,
/// marks of writing direction), backslashes and bytes that are not UTF-8 are escaped, so that two names never look alike.
pub(crate) fn printable(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_encoded_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            let direction = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            // Windows separates the parts of a path with backslashes.
            if c.is_control() || direction || (c == '\\' && cfg!(unix)) {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text += &format!("\\x{byte:02x}");
        }
    }
    text
}

/// Returns a path as one word of a shell's command line, for commands that a message suggests.
pub(crate) fn as_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%~".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Returns a function that wraps an I/O error as [`Error::Io`] at `path`, for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// Returns an [`Error::Format`] at a path.
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Format { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }

    /// Returns an [`Error::Config`].
    pub fn config(reason: impl Into<String>) -> Error {
        Error::Config(reason.into())
    }
}

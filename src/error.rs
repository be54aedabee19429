//! Errors of the world: files, recipes, devices, broken data.
//!
//! The rule of the crate: a caller's bug (shapes that do not fit, a temperature of zero) panics with the
//! operation's name and the shapes; whatever a correct program can meet returns [`Error`], which names the
//! thing and, where it is known, the remedy. Messages are lower case without a full stop, so that they chain.

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
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is there but is not what it should be.
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
    /// A worker thread panicked: a bug, in the program or in an image source of its caller.
    #[error("{0}")]
    Worker(String),
    /// Too many images of a set cannot be read.
    #[error("{0}")]
    Unreadable(String),
    /// A run stopped because its numbers went wrong.
    #[error("{0}")]
    Diverged(String),
    /// A run was asked to stop, and did.
    #[error("{0}")]
    Stopped(String),
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

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] at a path, for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Format`] at a path.
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Error {
        Error::Format { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }

    /// An [`Error::Config`].
    pub fn config(reason: impl Into<String>) -> Error {
        Error::Config(reason.into())
    }
}

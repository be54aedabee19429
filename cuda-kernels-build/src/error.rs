//! What ends a build.

use std::fmt;

/// Why a build of kernels failed, in sentences. A build script returns it from `main`: shown for debugging it is the same text, so
/// that cargo prints it as it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Error(String);

/// What can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

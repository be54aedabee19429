//! Reasons to refuse a JPEG file.

use std::fmt;

/// A reason to refuse a JPEG file. Its text continues a sentence that begins with the file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The file stops before the image is complete.
    EndsEarly,
    /// The file breaks the rules of the format.
    Damaged(String),
    /// The file may be sound, but the decoder does not support it: what it has, and what to do.
    Unsupported(&'static str),
}

impl Fault {
    pub fn damaged(what: impl Into<String>) -> Self {
        Fault::Damaged(what.into())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::EndsEarly => {
                f.write_str("is a JPEG file that ends early: copy or download it again")
            }
            Fault::Damaged(what) => write!(f, "is a damaged JPEG file: {what}"),
            Fault::Unsupported(what) => write!(f, "is a JPEG file {what}"),
        }
    }
}

pub type Result<T> = std::result::Result<T, Fault>;

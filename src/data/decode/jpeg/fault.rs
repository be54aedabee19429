//! Why a JPEG file is not decoded. Layer 5.

use std::fmt;

/// Why a JPEG file is not decoded. It reads on from the name of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The file stops before the image is complete.
    EndsEarly,
    /// The file breaks the format's rules, as told.
    Damaged(String),
    /// The file is sound; the decoder does not support what it uses. What that is, and what to do.
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

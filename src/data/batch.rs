//! What a loader or an evaluation hands to a network, and the images that it had to leave out.

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Samples of one step.
#[derive(Debug)]
pub struct Batch {
    /// From 0.
    pub epoch: u32,
    /// Position in the epoch, from 0.
    pub position: usize,
    /// The index of each sample in the source.
    pub indices: Vec<u32>,
    /// The class of each sample; -1 if it has none.
    pub labels: Vec<i32>,
    /// One tensor `[views * batch, s, s, channels]` per distinct crop size, in the order in which the sizes first occur
    /// among the views; all samples of a size's first view, then all of its second. The fourth channel is zero.
    pub crops: Vec<Tensor>,
}

/// An image that is broken and was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its index in the source.
    pub index: u32,
    /// The file, and the reason.
    pub reason: String,
}

impl Skipped {
    /// Takes note of a broken image. An I/O error says nothing about the image: it is returned as it is.
    pub(crate) fn new(index: usize, error: Error) -> Result<Self> {
        match error {
            Error::Io { .. } => Err(error),
            error => Ok(Self { index: index as u32, reason: error.to_string() }),
        }
    }
}

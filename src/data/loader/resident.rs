//! A set whose pixels a loader has uploaded to a GPU.

use std::sync::Arc;

use super::prepared::Place;
use crate::data::source::{Format, Image, OnGpu, Source};
use crate::device::cuda::Table;
use crate::error::Result;

/// A source that knows where its images lie.
pub struct Resident {
    pub source: Arc<dyn Source>,
    pub pixels: Arc<Table<u8>>,
    pub places: Arc<[Place]>,
}

impl Source for Resident {
    fn format(&self) -> Format {
        self.source.format()
    }

    fn len(&self) -> usize {
        self.source.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        self.source.read(index, into)
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        self.source.size(index)
    }

    fn file_bytes(&self, index: usize) -> Option<u64> {
        self.source.file_bytes(index)
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.source.label(index)
    }

    fn classes(&self) -> &[String] {
        self.source.classes()
    }

    fn name(&self, index: usize) -> String {
        self.source.name(index)
    }

    fn on_gpu(&self, index: usize) -> Option<OnGpu> {
        let Place { at, size, .. } = self.places[index];
        (size != [0; 2]).then(|| OnGpu { pixels: self.pixels.clone(), at, size })
    }

    fn notes(&self) -> &[String] {
        self.source.notes()
    }
}

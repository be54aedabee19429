//! What a set of images is to the rest of the program.
//!
//! A source maps an index to an RGB image of 8-bit values and, where it has one, a label. Reading goes into a
//! buffer of the caller, so that a loader's threads allocate nothing per image. A source knows nothing of order,
//! batches or augmentation.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};

/// An RGB image; a buffer to be read into again and again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// `[height, width, 3]`, row-major.
    pub pixels: Vec<u8>,
}

impl Image {
    /// Takes on a size; the pixels' contents are unspecified.
    pub fn resize(&mut self, width: usize, height: usize) {
        (self.width, self.height) = (width, height);
        self.pixels.resize(width * height * 3, 0);
    }
}

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Test,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Test => "test",
        })
    }
}

impl FromStr for Split {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "train" => Ok(Split::Train),
            "test" | "val" => Ok(Split::Test),
            _ => Err(Error::config(format!("split `{text}` is none of `train`, `test`, `val`"))),
        }
    }
}

/// A set of images, safe to read from many threads.
pub trait Source: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are none; sources that `open` hands out never are.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads image `index` in `0..len` into a buffer.
    ///
    /// # Errors
    /// When the image cannot be read or decoded; the message names it. The buffer's contents are then unspecified.
    ///
    /// # Panics
    /// When `index` is not in `0..len`.
    fn read(&self, index: usize, into: &mut Image) -> Result<()>;

    /// Width and height of image `index`, without decoding it where a source knows better than to.
    ///
    /// # Errors
    /// As [`Source::read`], though what is damaged further on may go unnoticed.
    fn size(&self, index: usize) -> Result<[usize; 2]> {
        let mut image = Image::default();
        self.read(index, &mut image)?;
        Ok([image.width, image.height])
    }

    /// The class of image `index`, a place in [`Source::classes`]; `None` where the set has no labels.
    fn label(&self, index: usize) -> Option<u32>;

    /// Names of the classes; empty where the set has no labels.
    fn classes(&self) -> &[String];

    /// What to call image `index` in a message: a file, or a file and a place in it.
    fn name(&self, index: usize) -> String;
}

/// Some images of another source.
pub struct Subset {
    source: Arc<dyn Source>,
    indices: Vec<u32>,
}

impl Subset {
    /// The images at `indices` of `source`, in that order.
    ///
    /// # Panics
    /// When an index is not in the source.
    pub fn new(source: Arc<dyn Source>, indices: Vec<u32>) -> Self {
        let length = source.len();
        if let Some(wrong) = indices.iter().find(|&&i| i as usize >= length) {
            panic!("subset: index {wrong} of a source of {length} images");
        }
        Self { source, indices }
    }

    /// The first `count` images, or all where there are fewer.
    pub fn first(source: Arc<dyn Source>, count: usize) -> Self {
        let count = count.min(source.len());
        Self::new(source, (0..count as u32).collect())
    }

    /// `count` images spread evenly over the source's order: of a folder sorted by class, from all classes.
    pub fn spread(source: Arc<dyn Source>, count: usize) -> Self {
        let length = source.len();
        let count = count.min(length);
        let indices = (0..count).map(|i| (i * length / count) as u32).collect();
        Self::new(source, indices)
    }

    /// The places in the other source.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }
}

impl Source for Subset {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        self.source.read(self.indices[index] as usize, into)
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        self.source.size(self.indices[index] as usize)
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.source.label(self.indices[index] as usize)
    }

    fn classes(&self) -> &[String] {
        self.source.classes()
    }

    fn name(&self, index: usize) -> String {
        self.source.name(self.indices[index] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fashion_scattered;

    #[test]
    fn a_subset_shows_the_images_it_was_given() {
        let all: Arc<dyn Source> = Arc::new(fashion_scattered(Split::Test));
        let some = Subset::new(all.clone(), vec![7, 3]);
        let (mut a, mut b) = (Image::default(), Image::default());
        some.read(1, &mut a).unwrap();
        all.read(3, &mut b).unwrap();
        assert_eq!((some.len(), some.label(1), &a), (2, all.label(3), &b));
        assert_eq!(Subset::first(all.clone(), 5).indices(), [0, 1, 2, 3, 4]);
        assert_eq!(Subset::spread(all, 4).indices(), [0, 500, 1000, 1500]);
    }

    #[test]
    #[should_panic(expected = "index 2000 of a source of 2000 images")]
    fn an_index_outside_the_source_is_named() {
        Subset::new(Arc::new(fashion_scattered(Split::Test)), vec![2000]);
    }
}

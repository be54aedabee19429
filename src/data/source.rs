//! The interface of a set of images.
//!
//! A source maps an index to an image and, if the set is labelled, a class. All images of a source have one [`Format`], mostly
//! RGB of 8 bits. Images are read into a buffer of the caller, so that a loader's threads allocate nothing per image. Order,
//! batches and augmentation are decided elsewhere.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::device::cuda::Table;
use crate::error::{Error, Result};
use crate::tensor::device_channels;

/// Channels and bits of an image's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Samples of a pixel, at least 1.
    pub channels: usize,
    /// Bits of a sample, 8 or 16.
    pub bits: usize,
}

impl Format {
    /// Three channels of 8 bits.
    pub const RGB: Self = Self { channels: 3, bits: 8 };

    /// Bytes of a pixel.
    pub fn bytes(self) -> usize {
        self.channels * self.bits / 8
    }

    /// Channels of a view on a device, the last of them zero: 4, or a multiple of 8.
    pub fn device_channels(self) -> usize {
        device_channels(self.channels)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { channels, bits } = self;
        write!(f, "{channels} channel{} of {bits} bits", if *channels == 1 { "" } else { "s" })
    }
}

/// An image: a buffer that is read into again and again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// What the samples are.
    pub format: Format,
    /// `[height, width, channels]`, row-major; samples of 16 bits are two bytes, little-endian.
    pub pixels: Vec<u8>,
}

impl Default for Image {
    fn default() -> Self {
        Self { width: 0, height: 0, format: Format::RGB, pixels: Vec::new() }
    }
}

impl Image {
    /// Sets the size of an RGB image of 8 bits; the contents of the pixels become unspecified.
    pub fn resize(&mut self, width: usize, height: usize) {
        self.reshape(width, height, Format::RGB);
    }

    /// Sets size and format; the contents of the pixels become unspecified.
    pub fn reshape(&mut self, width: usize, height: usize, format: Format) {
        (self.width, self.height, self.format) = (width, height, format);
        self.pixels.resize(width * height * format.bytes(), 0);
    }

    /// Panics unless there are as many pixels as width and height say.
    #[track_caller]
    pub(crate) fn expect_whole(&self) {
        let (width, height, len) = (self.width, self.height, self.pixels.len());
        let bytes = self.format.bytes();
        let values = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(bytes));
        assert!(values == Some(len), "image: {len} values for {width} x {height} pixels");
    }
}

/// A split of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The training split.
    Train,
    /// The held-out split.
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
            "test" | "val" | "valid" | "validation" => Ok(Split::Test),
            _ => Err(Error::config(format!(
                "unknown split `{text}`: `train`, `test`, `val`, `valid` or `validation`"
            ))),
        }
    }
}

/// A set of images, safe to read from many threads.
pub trait Source: Send + Sync {
    /// What the samples of all its images are.
    fn format(&self) -> Format {
        Format::RGB
    }

    /// Number of images.
    fn len(&self) -> usize;

    /// Whether it holds no images; a source from `open` always holds some.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads image `index` in `0..len` into a buffer.
    ///
    /// # Errors
    /// If the image is broken, or with [`Error::Io`] if it cannot be read; the message names it. A broken image is skipped by
    /// loaders and evaluations, an I/O error ends them. The contents of the buffer are then unspecified.
    ///
    /// # Panics
    /// If `index` is not in `0..len`.
    fn read(&self, index: usize, into: &mut Image) -> Result<()>;

    /// Returns width and height of image `index`, without decoding it if the source can tell them from a header.
    ///
    /// # Errors
    /// As [`Source::read`], except that damage behind the header may go unnoticed.
    fn size(&self, index: usize) -> Result<[usize; 2]> {
        let mut image = Image::default();
        self.read(index, &mut image)?;
        Ok([image.width, image.height])
    }

    /// Returns the length in bytes of the file that image `index` is, as the file system has it; `None` if the image is no file of its
    /// own, or cannot be found.
    fn file_bytes(&self, index: usize) -> Option<u64> {
        let _ = index;
        None
    }

    /// Returns the class of image `index`, an index into [`Source::classes`]; `None` if the set has no labels.
    fn label(&self, index: usize) -> Option<u32>;

    /// Returns the names of the classes, printable; empty if the set has no labels.
    fn classes(&self) -> &[String];

    /// Returns the name of image `index` for messages and tables: a file, or a file and a position in it. Names are printable
    /// and differ where files do: control characters, backslashes and bytes that are not UTF-8 are escaped.
    fn name(&self, index: usize) -> String;

    /// Returns where image `index` lies on a GPU, if it does: what computes there need not read it.
    fn on_gpu(&self, index: usize) -> Option<OnGpu> {
        let _ = index;
        None
    }

    /// Returns sentences that a user of the set should read: what lies there and is not read, classes that the training split
    /// lacks.
    fn notes(&self) -> &[String] {
        &[]
    }
}

/// An image whose pixels lie on a GPU.
#[derive(Debug)]
pub struct OnGpu {
    /// The pixels of a set.
    pub(crate) pixels: Arc<Table<u8>>,
    /// Where the image begins in them.
    pub(crate) at: i64,
    /// Its width and height.
    pub(crate) size: [usize; 2],
}

/// Some images of another source.
pub struct Subset {
    source: Arc<dyn Source>,
    indices: Vec<u32>,
}

impl Subset {
    /// Creates a source of the images at `indices` of `source`, in that order.
    ///
    /// # Panics
    /// If an index is not in the source.
    pub fn new(source: Arc<dyn Source>, indices: Vec<u32>) -> Self {
        let length = source.len();
        if let Some(wrong) = indices.iter().find(|&&i| i as usize >= length) {
            panic!("subset: index {wrong} of a source of {length} images");
        }
        Self { source, indices }
    }

    /// Returns the first `count` images, or all if there are fewer.
    pub fn first(source: Arc<dyn Source>, count: usize) -> Self {
        let count = count.min(source.len());
        Self::new(source, (0..count as u32).collect())
    }

    /// Returns `count` images spread evenly over the source's order: from all classes, since folders are sorted by class.
    pub fn spread(source: Arc<dyn Source>, count: usize) -> Self {
        let length = source.len();
        let count = count.min(length);
        let indices = (0..count).map(|i| (i * length / count) as u32).collect();
        Self::new(source, indices)
    }

    /// Returns the indices into the other source.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }
}

impl Source for Subset {
    fn format(&self) -> Format {
        self.source.format()
    }

    fn len(&self) -> usize {
        self.indices.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> Result<()> {
        self.source.read(self.indices[index] as usize, into)
    }

    fn size(&self, index: usize) -> Result<[usize; 2]> {
        self.source.size(self.indices[index] as usize)
    }

    fn file_bytes(&self, index: usize) -> Option<u64> {
        self.source.file_bytes(self.indices[index] as usize)
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

    fn on_gpu(&self, index: usize) -> Option<OnGpu> {
        self.source.on_gpu(self.indices[index] as usize)
    }

    fn notes(&self) -> &[String] {
        self.source.notes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fashion_scattered;

    #[test]
    fn a_subset_reads_the_images_at_its_indices() {
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

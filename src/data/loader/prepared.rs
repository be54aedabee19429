//! What the worker threads hand over for a batch.

use crate::data::augment::Made;
use crate::data::batch::Batch;
use crate::device::cuda::PinnedBatch;

/// A batch from the threads. If a GPU makes the crops, the batch has none yet and the parameters come with it.
pub type PreparedBatch = (Batch, Option<AugmentParams>);

/// The views of a batch as a GPU needs them to make the crops.
#[derive(Debug, Default)]
pub struct AugmentParams {
    /// For each crop size the views, and the weights of their blurs.
    pub groups: Vec<(Made, Vec<f32>)>,
    /// The pixels of all samples, where the views have them; `None` if the whole set is on the GPU.
    pub pixels: Option<PinnedBatch>,
}

/// Where an image of a set on a GPU lies.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Offset of its first byte.
    pub at: i64,
    /// Width and height; zeros if the image cannot be read.
    pub size: [usize; 2],
    /// Bytes of a pixel.
    pub pixel: usize,
}

impl Place {
    /// Bytes of its pixels.
    pub fn bytes(&self) -> i64 {
        (self.pixel * self.size[0] * self.size[1]) as i64
    }
}

//! Augmentation: parameters are drawn first, then applied.
//!
//! [`Policy::draw`] draws every parameter of one view from a random stream; [`Policy::apply`] is a pure function of these
//! [`Params`] and the image. There are two kinds of arithmetic, because the published methods used two and the
//! difference shows in accuracy: 8-bit between operations as torchvision has it over Pillow, and float in `[0,
//! 1]` clipped after each operation as SimCLR and BYOL have it. Images of other formats than RGB of 8 bits are computed in float. [`center`] is the evaluation's transform. On a GPU
//! one kernel makes a batch of views from the same numbers ([`apply_on_gpu`]).

mod apply;
mod blur;
mod channels;
mod colour;
mod cuda;
mod float;
mod params;
mod policy;
mod resize;
mod view;

pub(super) use apply::transform;
pub use apply::{Scratch, Transform, center};
pub(super) use channels::are_needed as channels_are_needed;
pub(crate) use cuda::GpuAugmenter;
pub(super) use cuda::MOST_SHRINKING;
pub(super) use cuda::Made;
pub use cuda::apply_on_gpu;
pub use params::{ChannelParams, ColourOp, CropBox, JitterParams, Params};
pub use policy::{
    Blur, BlurKind, Filter, Jitter, Noise, Normalise, Pixels, Policy, Sampler, Solarise,
};
pub(super) use resize::{Buffers, Resize};
pub(crate) use view::View;
pub(super) use view::taps;

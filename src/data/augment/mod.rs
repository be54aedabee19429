//! Augmentation: parameters first, then their application.
//!
//! [`Policy::draw`] draws every number of one view from a random stream; [`Policy::apply`] is a pure function of
//! those [`Params`] and the image. Two kinds of arithmetic exist, because the published methods used two and the
//! difference shows in accuracy: 8-bit between operations as torchvision has it over Pillow, and float in `[0,
//! 1]` clipped after each operation as SimCLR and BYOL have it. [`center`] is the evaluation's transform. Floor
//! 5.

mod apply;
mod blur;
mod colour;
mod float;
mod params;
mod policy;
mod resize;

pub use apply::{Scratch, center, resized_center};
pub use params::{ColourOp, CropBox, JitterParams, Params};
pub use policy::{Blur, BlurKind, Filter, Jitter, Normalise, Pixels, Policy, Solarise};

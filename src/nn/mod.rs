//! Networks, as descriptions without weights.
//!
//! A layer knows its slots and settings and owns no memory: `forward` uses the weights of the tape's arena, so an online
//! encoder and its momentum encoder are one description run on two arenas.

mod conv_bn;
mod mlp;
mod resnet;
mod selective;

pub use conv_bn::{ConvBn, Norm};
pub use mlp::{Mlp, MlpLayer, NormKind};
pub use resnet::{ResNet, ResNetConfig, Stem};
pub use selective::SelectiveConv;

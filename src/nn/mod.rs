//! Networks as descriptions.
//!
//! A layer knows its slots and its settings and owns no memory: `forward` takes the weights of the arena that the tape was
//! made over, so that an online and a momentum encoder are one description run on two arenas.

mod conv_bn;
mod mlp;
mod resnet;
mod selective;

pub use conv_bn::{ConvBn, Norm};
pub use mlp::{Mlp, MlpLayer, NormKind};
pub use resnet::{ResNet, ResNetConfig, Stem};
pub use selective::SelectiveConv;

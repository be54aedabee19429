//! ResNets (He et al. 2016, arXiv:1512.03385) as torchvision has them: 18 and 34 of basic blocks, 50, 101 and 152 of
//! bottlenecks with the stride in the 3x3 convolution ("v1.5"), without the classifier.

use serde::{Deserialize, Serialize};

use crate::arena::Layout;
use crate::nn::ConvBn;
use crate::ops;
use crate::tape::Var;

/// The layers before the first block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7x7 convolution of stride 2, then 3x3 max pooling of stride 2: for images from about 100 pixels.
    Image,
    /// 3x3 convolution of stride 1, no pooling: for images of about 32 pixels (SimCLR, appendix B.9).
    Small,
}

/// The settings of a ResNet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// 18, 34, 50, 101 or 152.
    pub depth: usize,
    /// Channels of the first stage: 64 as published, 128 for SimCLR's 2x, less for small machines.
    pub width: usize,
    /// The layers before the first block.
    pub stem: Stem,
    /// Start the last gain of every residual branch at 0, so that blocks start as identities.
    pub zero_init_residual: bool,
    /// Runs of rows that batch norm treats apart: 1, or MoCo's split on one device.
    #[serde(default = "one")]
    pub norm_groups: usize,
}

fn one() -> usize {
    1
}

impl ResNetConfig {
    /// Blocks of each stage, and whether they are bottlenecks.
    fn blocks(&self) -> ([usize; 4], bool) {
        match self.depth {
            18 => ([2, 2, 2, 2], false),
            34 => ([3, 4, 6, 3], false),
            50 => ([3, 4, 6, 3], true),
            101 => ([3, 4, 23, 3], true),
            152 => ([3, 8, 36, 3], true),
            depth => panic!("resnet: depth {depth}, not 18, 34, 50, 101 or 152"),
        }
    }

    /// What a recipe may ask for.
    ///
    /// # Errors
    /// When the depth does not exist or the width is 0.
    pub fn check(&self) -> crate::Result<()> {
        if ![18, 34, 50, 101, 152].contains(&self.depth) {
            let message = format!("network.depth is {}, not 18, 34, 50, 101 or 152", self.depth);
            return Err(crate::Error::Config(message));
        }
        if self.width == 0 || self.norm_groups == 0 {
            return Err(crate::Error::config("network.width and network.norm_groups start at 1"));
        }
        Ok(())
    }
}

/// A residual block: convolutions in a row, and a projection where shapes change.
#[derive(Clone, Debug)]
struct Block {
    convolutions: Vec<ConvBn>,
    projection: Option<ConvBn>,
}

impl Block {
    fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let shortcut = match &self.projection {
            Some(projection) => projection.forward(x, None, false),
            None => x.clone(),
        };
        let (last, first) = self.convolutions.split_last().expect("a block has convolutions");
        let inner = first.iter().fold(x.clone(), |x, conv| conv.forward(&x, None, true));
        last.forward(&inner, Some(&shortcut), true)
    }
}

/// A ResNet trunk: images `[n, h, w, 4]` to features `[n, features]`.
#[derive(Clone, Debug)]
pub struct ResNet {
    stem: ConvBn,
    pool: bool,
    blocks: Vec<Block>,
    features: usize,
}

impl ResNet {
    /// Adds the slots of a ResNet, each name after `prefix`.
    ///
    /// # Panics
    /// When [`ResNetConfig::check`] would have complained.
    pub fn new(layout: &mut Layout, prefix: &str, config: &ResNetConfig) -> Self {
        let (stages, bottleneck) = config.blocks();
        let (width, groups) = (config.width, config.norm_groups);
        let expansion = if bottleneck { 4 } else { 1 };
        let last_gain = if config.zero_init_residual { 0.0 } else { 1.0 };
        let mut unit = |conv: String, norm: String, c, k, size, stride, gain| {
            let names = (&*format!("{prefix}{conv}"), &*format!("{prefix}{norm}"));
            ConvBn::new(layout, names, c, k, size, stride, gain, groups)
        };
        let (size, stride) = if config.stem == Stem::Image { (7, 2) } else { (3, 1) };
        let stem = unit("conv1".into(), "bn1".into(), 3, width, size, stride, 1.0);

        let mut c = width;
        let mut blocks = Vec::new();
        for (stage, &count) in stages.iter().enumerate() {
            let inner = width << stage;
            let k = inner * expansion;
            for i in 0..count {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                // (filter size, channels out, stride) of the residual branch
                let branch: &[(usize, usize, usize)] = if bottleneck {
                    &[(1, inner, 1), (3, inner, stride), (1, k, 1)]
                } else {
                    &[(3, inner, stride), (3, k, 1)]
                };
                let name = format!("layer{}.{i}", stage + 1);
                let mut input = c;
                let convolutions = branch
                    .iter()
                    .enumerate()
                    .map(|(j, &(size, k, stride))| {
                        let gain = if j + 1 == branch.len() { last_gain } else { 1.0 };
                        let (conv, norm) = (format!("conv{}", j + 1), format!("bn{}", j + 1));
                        let (conv, norm) = (format!("{name}.{conv}"), format!("{name}.{norm}"));
                        let unit = unit(conv, norm, input, k, size, stride, gain);
                        input = k;
                        unit
                    })
                    .collect();
                let projection = (c != k || stride != 1).then(|| {
                    let (conv, norm) =
                        (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
                    unit(conv, norm, c, k, 1, stride, 1.0)
                });
                blocks.push(Block { convolutions, projection });
                c = k;
            }
        }
        Self { stem, pool: config.stem == Stem::Image, blocks, features: c }
    }

    /// How many features it ends in.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Images `x [n, h, w, 4]`, the fourth channel zero, to features `[n, features]`.
    #[track_caller]
    pub fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let mut x = self.stem.forward(x, None, true);
        if self.pool {
            x = ops::max_pool(&x, 3, 2, 1);
        }
        ops::mean_pool(&self.blocks.iter().fold(x, |x, block| block.forward(&x)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(depth: usize) -> usize {
        let mut layout = Layout::new();
        let config = ResNetConfig {
            depth,
            width: 64,
            stem: Stem::Image,
            zero_init_residual: true,
            norm_groups: 1,
        };
        ResNet::new(&mut layout, "", &config);
        layout.weights()
    }

    /// torchvision's parameter counts less those of the classifier, `features * 1000 + 1000`.
    #[test]
    fn weights_are_as_many_as_torchvisions() {
        assert_eq!(weights(18), 11_689_512 - 513_000);
        assert_eq!(weights(34), 21_797_672 - 513_000);
        assert_eq!(weights(50), 25_557_032 - 2_049_000);
        assert_eq!(weights(101), 44_549_160 - 2_049_000);
        assert_eq!(weights(152), 60_192_808 - 2_049_000);
    }
}

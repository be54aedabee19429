//! ResNets (He et al. 2016, arXiv:1512.03385) as in torchvision, without the classifier: 18 and 34 with basic blocks, 50, 101
//! and 152 with bottlenecks and the stride in the 3x3 convolution ("v1.5"); 200 as in SimCLR v2. With selective kernels they
//! are SimCLR v2's (google-research/simclr, `resnet.py`).

use serde::{Deserialize, Serialize};

use crate::arena::Layout;
use crate::nn::{ConvBn, SelectiveConv};
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

/// Supported depths.
const DEPTHS: [usize; 6] = [18, 34, 50, 101, 152, 200];

/// The settings of a ResNet.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNetConfig {
    /// 18, 34, 50, 101, 152 or 200.
    pub depth: usize,
    /// Channels of the first stage: 64 as published, 128 for SimCLR's 2x, fewer for small machines.
    pub width: usize,
    /// The layers before the first block.
    pub stem: Stem,
    /// Initialise the last gain of every residual branch to 0, so that blocks start as identities.
    pub zero_init_residual: bool,
    /// Groups of rows that batch norm normalises separately: 1, or more to emulate MoCo's per-GPU statistics on one device.
    #[serde(default = "one")]
    pub norm_groups: usize,
    /// Above 0: selective kernels in every bottleneck, with an attention layer of this fraction of the channels (at least
    /// 32), and, as in SimCLR v2's reference code, ResNet-D's stem and shortcuts. Published: 0.0625.
    #[serde(default)]
    pub sk_ratio: f64,
    /// Width multiplier of the inside of a bottleneck: 1, or 2 in torchvision's `wide_resnet50_2` and `wide_resnet101_2`
    /// (Zagoruyko and Komodakis 2016, arXiv:1605.07146).
    #[serde(default = "one")]
    pub bottleneck: usize,
    /// Whether the first block of every stage projects its shortcut, as in google-research/simclr (`resnet.py`) and BYOL's Haiku
    /// networks. torchvision projects only where shapes change, which leaves out the first stage of ResNet-18 and 34.
    #[serde(default, skip_serializing_if = "is_false")]
    pub project: bool,
    /// Whether the stem's max pooling pads as TensorFlow's `SAME`, an even side below and to the right alone: google-research/simclr
    /// and BYOL. Convolutions pad evenly in any case, as in SimCLR; Haiku's, and so BYOL's, do not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub same_pool: bool,
    /// Channels of the images, at least 1. A recipe has them as `data.channels`.
    #[serde(skip, default = "three")]
    pub channels: usize,
}

fn three() -> usize {
    3
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn one() -> usize {
    1
}

/// torchvision's names, shared by timm, with depth and bottleneck width multiplier.
const NAMES: [(&str, usize, usize); 7] = [
    ("resnet18", 18, 1),
    ("resnet34", 34, 1),
    ("resnet50", 50, 1),
    ("resnet101", 101, 1),
    ("resnet152", 152, 1),
    ("wide_resnet50_2", 50, 2),
    ("wide_resnet101_2", 101, 2),
];

impl ResNetConfig {
    /// The network that torchvision and timm call `name`.
    ///
    /// # Errors
    /// If the name is unknown; the message lists the valid names.
    pub fn named(name: &str) -> crate::Result<Self> {
        let found = NAMES.iter().find(|(known, ..)| *known == name);
        let &(_, depth, bottleneck) = found.ok_or_else(|| {
            let known = NAMES.map(|(name, ..)| name).join(", ");
            crate::Error::Config(format!(
                "unknown architecture {name}; known architectures: {known}"
            ))
        })?;
        let (width, stem, zero_init_residual) = (64, Stem::Image, false);
        let (norm_groups, sk_ratio, project, same_pool) = (1, 0.0, false, false);
        Ok(Self {
            depth,
            width,
            stem,
            zero_init_residual,
            norm_groups,
            sk_ratio,
            bottleneck,
            project,
            same_pool,
            channels: three(),
        })
    }

    /// Its name in torchvision, if torchvision has this network.
    pub fn name(&self) -> Option<&'static str> {
        let adds = self.project && !self.blocks().1; // a bottleneck's first block projects anyway
        let in_torchvision = self.width == 64
            && self.channels == 3
            && self.stem == Stem::Image
            && !(self.selective() || adds || self.same_pool);
        let same = |&&(_, depth, bottleneck): &&(&str, usize, usize)| {
            [depth, bottleneck] == [self.depth, self.bottleneck]
        };
        NAMES.iter().filter(|_| in_torchvision).find(same).map(|&(name, ..)| name)
    }

    /// Blocks of each stage, and whether they are bottlenecks.
    fn blocks(&self) -> ([usize; 4], bool) {
        match self.depth {
            18 => ([2, 2, 2, 2], false),
            34 => ([3, 4, 6, 3], false),
            50 => ([3, 4, 6, 3], true),
            101 => ([3, 4, 23, 3], true),
            152 => ([3, 8, 36, 3], true),
            200 => ([3, 24, 36, 3], true),
            depth => panic!("resnet: depth {depth}, not one of {DEPTHS:?}"),
        }
    }

    fn selective(&self) -> bool {
        self.sk_ratio > 0.0
    }

    /// Width of the attention over two streams of `c` channels.
    fn selective_middle(&self, c: usize) -> usize {
        ((c as f64 * self.sk_ratio) as usize).max(32)
    }

    /// Checks the settings of a recipe.
    ///
    /// # Errors
    /// If a setting is out of range or two settings contradict each other.
    pub fn check(&self) -> crate::Result<()> {
        if !DEPTHS.contains(&self.depth) {
            let message = format!("network.depth is {}, not one of {DEPTHS:?}", self.depth);
            return Err(crate::Error::Config(message));
        }
        if !(0.0..=1.0).contains(&self.sk_ratio) || (self.selective() && self.width < 2) {
            return Err(crate::Error::config(
                "network.sk_ratio is in 0..=1, and selective kernels need a width of 2 or more",
            ));
        }
        if self.selective() && self.depth < 50 {
            // The reference code pools basic blocks twice, which is surely a bug.
            return Err(crate::Error::config(
                "network.sk_ratio needs bottlenecks: network.depth of 50 or more",
            ));
        }
        if self.width == 0 || self.norm_groups == 0 || self.bottleneck == 0 {
            return Err(crate::Error::config(
                "network.width, network.norm_groups and network.bottleneck start at 1",
            ));
        }
        if self.channels == 0 {
            return Err(crate::Error::config("a network's images have at least one channel"));
        }
        // The widest published network has width 192; sizes beyond these limits would overflow.
        if self.width > 4096 || self.bottleneck > 64 {
            return Err(crate::Error::config(
                "network.width is at most 4096 and network.bottleneck at most 64",
            ));
        }
        if self.bottleneck > 1 && (self.depth < 50 || self.selective()) {
            return Err(crate::Error::config(
                "network.bottleneck needs bottlenecks (network.depth of 50 or more) without selective kernels",
            ));
        }
        Ok(())
    }
}

/// One convolution of a residual branch.
#[derive(Clone, Debug)]
enum Unit {
    Plain(ConvBn),
    Selective(SelectiveConv),
}

impl Unit {
    fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        match self {
            Unit::Plain(conv) => conv.forward(x, None, true),
            Unit::Selective(conv) => conv.forward(x),
        }
    }
}

/// A residual block: a chain of convolutions, the last of which adds the shortcut, and a projection if shapes change.
#[derive(Clone, Debug)]
struct Block {
    first: Vec<Unit>,
    last: ConvBn,
    projection: Option<ConvBn>,
    /// ResNet-D's shortcut: the stride of an average pooling before the projection.
    pool: Option<usize>,
}

impl Block {
    fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let shortcut = match (&self.projection, self.pool) {
            (Some(projection), Some(stride)) => {
                projection.forward(&ops::avg_pool(x, 2, stride), None, false)
            }
            (Some(projection), None) => projection.forward(x, None, false),
            (None, _) => x.clone(),
        };
        let inner = self.first.iter().fold(x.clone(), |x, unit| unit.forward(&x));
        self.last.forward(&inner, Some(&shortcut), true)
    }
}

/// A ResNet backbone: images `[n, h, w, channels]`, padded as on a device, to features `[n, features]`.
#[derive(Clone, Debug)]
pub struct ResNet {
    stem: StemLayers,
    blocks: Vec<Block>,
    features: usize,
}

/// What comes before the first block.
#[derive(Clone, Debug)]
struct StemLayers {
    convs: Vec<ConvBn>,
    pool: bool,
    same_pool: bool,
}

/// Adds a backbone's slots.
struct Builder<'l> {
    layout: &'l mut Layout,
    prefix: &'l str,
    groups: usize,
}

impl Builder<'_> {
    /// `k` filters of `size x size` over `c` channels; `names` of convolution and batch norm.
    fn unit(
        &mut self,
        names: (String, String),
        [c, k, size, stride]: [usize; 4],
        gain: f64,
    ) -> ConvBn {
        let prefix = self.prefix;
        let names = (&*format!("{prefix}{}", names.0), &*format!("{prefix}{}", names.1));
        ConvBn::new(self.layout, names, c, k, size, stride, gain, self.groups)
    }

    fn stem(&mut self, config: &ResNetConfig) -> Vec<ConvBn> {
        let (width, half) = (config.width, config.width / 2);
        match (config.stem, config.selective()) {
            (Stem::Small, _) => vec![self.first(("conv1", "bn1"), config, [width, 3, 1])],
            (Stem::Image, false) => vec![self.first(("conv1", "bn1"), config, [width, 7, 2])],
            (Stem::Image, true) => {
                let name = |i| (format!("conv1.{i}"), format!("bn1.{i}"));
                let first = self.first(("conv1.0", "bn1.0"), config, [half, 3, 2]);
                let second = self.unit(name(1), [half, half, 3, 1], 1.0);
                vec![first, second, self.unit(name(2), [half, width, 3, 1], 1.0)]
            }
        }
    }

    /// The convolution over the images: `k` filters of `size x size`.
    fn first(
        &mut self,
        names: (&str, &str),
        config: &ResNetConfig,
        [k, size, stride]: [usize; 3],
    ) -> ConvBn {
        let names = [names.0, names.1].map(|name| format!("{}{name}", self.prefix));
        let names = (&*names[0], &*names[1]);
        ConvBn::over_images(self.layout, names, config.channels, [k, size, stride], self.groups)
    }

    /// A block called `name` from `c` channels to `k`, with `inner` channels inside the branch; `is_first` of its stage or not.
    fn block(
        &mut self,
        name: &str,
        config: &ResNetConfig,
        [c, inner, k, stride]: [usize; 4],
        is_first: bool,
    ) -> Block {
        let (_, bottleneck) = config.blocks();
        // (filter size, channels out, stride) of the branch
        let branch: &[[usize; 3]] = if bottleneck {
            &[[1, inner, 1], [3, inner, stride], [1, k, 1]]
        } else {
            &[[3, inner, stride], [3, k, 1]]
        };
        let names = |j| (format!("{name}.conv{}", j + 1), format!("{name}.bn{}", j + 1));
        let (last, rest) = branch.split_last().expect("a branch has convolutions");
        let mut input = c;
        let mut first = Vec::with_capacity(rest.len());
        for (j, &[size, k, stride]) in rest.iter().enumerate() {
            first.push(if config.selective() && size == 3 {
                let streams = self.unit(names(j), [input, 2 * k, size, stride], 1.0);
                let name = format!("{}{name}.select", self.prefix);
                let middle = config.selective_middle(k);
                Unit::Selective(SelectiveConv::new(
                    self.layout,
                    &name,
                    streams,
                    k,
                    middle,
                    self.groups,
                ))
            } else {
                Unit::Plain(self.unit(names(j), [input, k, size, stride], 1.0))
            });
            input = k;
        }
        let last_gain = if config.zero_init_residual { 0.0 } else { 1.0 };
        let last = self.unit(names(rest.len()), [input, k, last[0], last[2]], last_gain);
        let pool = config.selective().then_some(stride);
        let projects = c != k || stride != 1 || (config.project && is_first);
        let projection = projects.then(|| {
            let names = (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
            self.unit(names, [c, k, 1, if pool.is_some() { 1 } else { stride }], 1.0)
        });
        Block { first, last, projection, pool }
    }
}

impl ResNet {
    /// Adds the slots of a ResNet, each name after `prefix`.
    ///
    /// # Panics
    /// If [`ResNetConfig::check`] fails.
    pub fn new(layout: &mut Layout, prefix: &str, config: &ResNetConfig) -> Self {
        let (stages, bottleneck) = config.blocks();
        let expansion = if bottleneck { 4 } else { 1 };
        let mut builder = Builder { layout, prefix, groups: config.norm_groups };
        let convs = builder.stem(config);
        let mut c = config.width;
        let mut blocks = Vec::new();
        for (stage, &count) in stages.iter().enumerate() {
            let k = (config.width << stage) * expansion;
            let inner = (config.width << stage) * config.bottleneck;
            for i in 0..count {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                let name = format!("layer{}.{i}", stage + 1);
                blocks.push(builder.block(&name, config, [c, inner, k, stride], i == 0));
                c = k;
            }
        }
        let (pool, same_pool) = (config.stem == Stem::Image, config.same_pool);
        Self { stem: StemLayers { convs, pool, same_pool }, blocks, features: c }
    }

    /// The number of output features.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Images `x [n, h, w, 4]`, the fourth channel zero, or with as many channels as [`device_channels`](crate::tensor::device_channels)
    /// says, to features `[n, features]`. Stem and blocks are recomputed in the backward pass if the arena asks for it
    /// ([`Arena::with_recompute`](crate::arena::Arena::with_recompute)).
    #[track_caller]
    pub fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let (tape, stem) = (x.tape(), self.stem.clone());
        let x = tape.recompute("stem", x, move |x| stem.forward(x));
        let block = |x: Var<'t>, block: &Block| {
            let block = block.clone();
            tape.recompute("block", &x, move |x| block.forward(x))
        };
        ops::mean_pool(&self.blocks.iter().fold(x, block))
    }
}

impl StemLayers {
    #[track_caller]
    fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let x = self.convs.iter().fold(x.clone(), |x, conv| conv.forward(&x, None, true));
        if !self.pool {
            return x;
        }
        let [_, h, w, _] = x.value().dims("resnet: the input of the pooling");
        let pads =
            if self.same_pool { [h, w].map(|side| same_pads(side, 3, 2)) } else { [[1; 2]; 2] };
        assert_eq!(pads[0], pads[1], "resnet: SAME padding of {h} x {w} pixels is uneven");
        ops::max_pool(&x, 3, 2, pads[0])
    }
}

/// TensorFlow's `SAME` padding of a side: the output has `length / stride` pixels, rounded up, and the padding that this takes lies
/// half on each end, the larger half below and to the right.
fn same_pads(length: usize, size: usize, stride: usize) -> [usize; 2] {
    let outputs = length.div_ceil(stride);
    let padded = (outputs.saturating_sub(1) * stride + size).saturating_sub(length);
    [padded / 2, padded.div_ceil(2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(depth: usize, sk_ratio: f64, widths: usize) -> usize {
        let resnet50 = ResNetConfig::named("resnet50").unwrap();
        count(&ResNetConfig { depth, width: 64 * widths, sk_ratio, ..resnet50 })
    }

    fn count(config: &ResNetConfig) -> usize {
        let mut layout = Layout::new();
        ResNet::new(&mut layout, "", config);
        layout.weights()
    }

    /// The trunks of google-research/simclr's ResNet-18 for CIFAR-10 and of BYOL's for Imagenette, as those codes count them.
    #[test]
    fn the_number_of_weights_with_a_projection_in_every_stage_is_simclrs_and_byols() {
        let resnet18 = ResNetConfig { project: true, ..ResNetConfig::named("resnet18").unwrap() };
        assert_eq!(count(&resnet18), 11_180_736);
        assert_eq!(count(&ResNetConfig { stem: Stem::Small, ..resnet18 }), 11_173_056);
        assert_eq!(resnet18.name(), None);
        // A bottleneck's first block projects anyway: shapes change.
        let resnet50 = ResNetConfig::named("resnet50").unwrap();
        let projecting = ResNetConfig { project: true, ..resnet50 };
        assert_eq!((count(&projecting), projecting.name()), (count(&resnet50), Some("resnet50")));
    }

    #[test]
    fn same_padding_is_tensorflows() {
        let pads: Vec<_> = [112, 48, 7, 2, 1].map(|side| same_pads(side, 3, 2)).into();
        assert_eq!(pads, [[0, 1], [0, 1], [1, 1], [0, 1], [1, 1]]);
        let resnet50 = ResNetConfig::named("resnet50").unwrap();
        assert_eq!(ResNetConfig { same_pool: true, ..resnet50 }.name(), None);
    }

    /// torchvision's parameter counts less those of the classifier, `features * 1000 + 1000`.
    #[test]
    fn the_number_of_weights_is_torchvisions() {
        assert_eq!(weights(18, 0.0, 1), 11_689_512 - 513_000);
        assert_eq!(weights(34, 0.0, 1), 21_797_672 - 513_000);
        assert_eq!(weights(50, 0.0, 1), 25_557_032 - 2_049_000);
        assert_eq!(weights(101, 0.0, 1), 44_549_160 - 2_049_000);
        assert_eq!(weights(152, 0.0, 1), 60_192_808 - 2_049_000);
        let wide = |name| count(&ResNetConfig::named(name).unwrap());
        assert_eq!(wide("wide_resnet50_2"), 68_883_240 - 2_049_000);
        assert_eq!(wide("wide_resnet101_2"), 126_886_696 - 2_049_000);
    }

    /// Parameters in millions from the paper's table 1, which counts backbone and classifier (2048 features per width to 1000
    /// classes): 24, 35, 94, 140, 355 and 795 (arXiv:2006.10029).
    #[test]
    fn the_number_of_weights_is_simclr_v2s() {
        for (depth, widths, sk_ratio, millions) in [
            (50, 1, 0.0, 24),
            (50, 1, 0.0625, 35),
            (50, 2, 0.0, 94),
            (50, 2, 0.0625, 140),
            (152, 2, 0.0, 233),
            (152, 3, 0.0625, 795),
        ] {
            let all = weights(depth, sk_ratio, widths);
            let got = (all as f64 / 1e6).round() as i64;
            println!("{depth} {widths}x {sk_ratio}: {all}");
            assert!((got - millions).abs() <= 1, "{depth} {widths}x {sk_ratio}: {all}");
        }
    }
}

//! A convolution with selective kernels: two streams and attention that weights them per channel.

use crate::arena::Layout;
use crate::nn::{ConvBn, Mlp, MlpLayer, NormKind};
use crate::ops;
use crate::tape::Var;

/// `sk_conv2d` of google-research/simclr, `resnet.py`: a 3x3 convolution to twice the channels with batch norm and ReLU;
/// then a narrow layer with batch norm and ReLU over the mean of both streams, and one logit per stream and channel.
#[derive(Clone, Debug)]
pub struct SelectiveConv {
    streams: ConvBn,
    attention: Mlp,
}

impl SelectiveConv {
    /// Adds the slots of the attention under `name`; `streams` has `2 c` filters, `middle` is the narrow layer's width.
    pub fn new(
        layout: &mut Layout,
        name: &str,
        streams: ConvBn,
        c: usize,
        middle: usize,
        groups: usize,
    ) -> Self {
        let layer = |width, inputs: usize, norm| MlpLayer {
            width,
            bias: false,
            norm,
            relu: norm != NormKind::None,
            std: Some(1.0 / (inputs as f64).sqrt()),
        };
        let layers = [layer(middle, c, NormKind::Affine), layer(2 * c, middle, NormKind::None)];
        Self { streams, attention: Mlp::new(layout, name, c, &layers, groups) }
    }

    /// `[n, h, w, c_in]` to `[n, h', w', c]`.
    #[track_caller]
    pub fn forward<'t>(&self, x: &Var<'t>) -> Var<'t> {
        let x = self.streams.forward(x, None, true);
        let logits = self.attention.forward(ops::stream_mean(&x));
        ops::stream_select(&x, &logits)
    }
}

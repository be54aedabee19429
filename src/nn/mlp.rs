//! Heads: linear layers, each with an optional bias, batch norm and ReLU.

use crate::arena::{Init, Layout, Param, SlotKind};
use crate::nn::Norm;
use crate::ops;
use crate::tape::Var;

/// The batch norm after a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// No batch norm.
    None,
    /// With scale and shift.
    Affine,
    /// With scale, without shift (SimCLR's last layer).
    ScaleOnly,
    /// Without scale and shift (SimSiam's last layer).
    Plain,
}

/// One layer of a head.
#[derive(Clone, Copy, Debug)]
pub struct MlpLayer {
    /// Outputs.
    pub width: usize,
    /// Whether the linear layer has a bias.
    pub bias: bool,
    /// The batch norm that follows.
    pub norm: NormKind,
    /// Whether a ReLU comes last.
    pub relu: bool,
    /// Standard deviation of the initial weights, with zero biases; `None` for PyTorch's default, uniform within
    /// `1 / sqrt(inputs)` for weights and biases.
    pub std: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Layer {
    weights: Param,
    bias: Option<Param>,
    norm: Option<Norm>,
    relu: bool,
}

/// A multi-layer perceptron.
#[derive(Clone, Debug)]
pub struct Mlp {
    layers: Vec<Layer>,
}

impl Mlp {
    /// Adds the slots of a head over `inputs` features under `name`: layer `i` is `name.i`, its norm `name.i.norm`.
    pub fn new(
        layout: &mut Layout,
        name: &str,
        inputs: usize,
        layers: &[MlpLayer],
        groups: usize,
    ) -> Self {
        let mut d = inputs;
        let mut build = |(i, layer): (usize, &MlpLayer)| {
            let name = format!("{name}.{i}");
            let (k, bound) = (layer.width, 1.0 / (d as f64).sqrt());
            let (weight_init, bias_init) = match layer.std {
                Some(std) => (Init::Normal(std), Init::Constant(0.0)),
                None => (Init::Uniform(bound), Init::Uniform(bound)),
            };
            let weight_name = format!("{name}.weight");
            let weights = layout.param(weight_name, [k, d], SlotKind::Matrix, weight_init);
            let bias = layer
                .bias
                .then(|| layout.param(format!("{name}.bias"), [k], SlotKind::Bias, bias_init));
            let mut norm = |gain, shift| {
                Some(Norm::new(layout, &format!("{name}.norm"), k, gain, shift, groups))
            };
            let norm = match layer.norm {
                NormKind::None => None,
                NormKind::Affine => norm(Some(1.0), true),
                NormKind::ScaleOnly => norm(Some(1.0), false),
                NormKind::Plain => norm(None, false),
            };
            d = k;
            Layer { weights, bias, norm, relu: layer.relu }
        };
        Self { layers: layers.iter().enumerate().map(&mut build).collect() }
    }

    /// `x [n, inputs]` to `[n, outputs]`.
    #[track_caller]
    pub fn forward<'t>(&self, x: Var<'t>) -> Var<'t> {
        let tape = x.tape();
        self.layers.iter().fold(x, |x, layer| {
            let bias = layer.bias.map(|p| tape.param(p));
            let y = ops::linear(&x, &tape.param(layer.weights), bias.as_ref());
            match layer.norm {
                Some(norm) => norm.forward(&y, None, layer.relu),
                None if layer.relu => ops::relu(&y),
                None => y,
            }
        })
    }
}

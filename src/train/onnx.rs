//! A backbone as an ONNX model: in evaluation mode, batch norm folded into the convolutions.
//!
//! The few messages of ONNX's protocol buffers that a ResNet needs are written by hand, from
//! [onnx.proto](https://github.com/onnx/onnx/blob/main/onnx/onnx.proto): a field is its number and wire type, then a varint or a
//! length and bytes.

use std::collections::BTreeMap;
use std::path::Path;

use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::files::write_file;
use crate::ops::BATCH_NORM_EPS;
use crate::train::checkpoint::backbone_values;

/// The operator set: the first that PyTorch 2's exporters and every runtime since 2022 know.
const OPSET: u64 = 17;
/// The format's version that came with it.
const IR_VERSION: u64 = 8;
/// `TensorProto.DataType.FLOAT`.
const FLOAT: u64 = 1;

/// Writes the arena's backbone as an ONNX model of operator set 17: `input [batch, channels, height, width]`, normalised as in training, to
/// `output [batch, features]`, for any batch size and image size. Batch norm uses its running statistics, folded into the weights
/// of the convolutions, which keep torchvision's names.
///
/// # Errors
/// If the network has selective kernels, the device fails, or the file cannot be written.
pub fn export_onnx(path: &Path, arena: &Arena) -> Result<()> {
    let model = model(backbone_values(arena))?;
    arena.device().check()?; // a failed device returns garbage
    write_file(path, &model)
}

/// A tensor as files have it: shape and values.
pub(super) type Values = (Vec<usize>, Vec<f64>);

/// A protocol buffer in progress.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(self, field: u64, inner: &Self) -> Self {
        self.bytes(field, &inner.0)
    }
}

/// The nodes and weights of a model in progress.
#[derive(Default)]
struct Graph {
    weights: BTreeMap<String, Values>,
    message: Message,
    /// The number of channels of the last convolution.
    channels: usize,
}

impl Graph {
    fn push(&mut self, field: u64, inner: &Message) {
        let message = std::mem::take(&mut self.message);
        self.message = message.message(field, inner);
    }

    /// Adds a node with one output, which has the node's name.
    fn node(&mut self, kind: &str, name: &str, inputs: &[&str], attributes: &[Message]) -> String {
        let mut node = inputs.iter().fold(Message::default(), |node, input| node.text(1, input));
        node = node.text(2, name).text(3, name).text(4, kind);
        node = attributes.iter().fold(node, |node, attribute| node.message(5, attribute));
        self.push(1, &node);
        name.to_owned()
    }

    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f64]) {
        let raw: Vec<u8> = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
        let dims = |message: Message, &size: &usize| message.number(1, size as u64);
        let tensor = shape.iter().fold(Message::default(), dims);
        self.push(5, &tensor.number(2, FLOAT).text(8, name).bytes(9, &raw));
    }

    fn take(&mut self, name: &str) -> Result<Values> {
        self.weights
            .remove(name)
            .ok_or_else(|| Error::Weights(format!("the backbone has no {name}")))
    }

    /// A convolution with the batch norm that follows it, and a ReLU if asked for.
    fn conv(
        &mut self,
        x: &str,
        [conv, norm]: [&str; 2],
        stride: u64,
        relu: bool,
    ) -> Result<String> {
        let (shape, mut filters) = self.take(&format!("{conv}.weight"))?;
        let mut of_norm = |part: &str| self.take(&format!("{norm}.{part}")).map(|(_, v)| v);
        let (gain, shift) = (of_norm("weight")?, of_norm("bias")?);
        let (mean, variance) = (of_norm("running_mean")?, of_norm("running_var")?);
        let of_one = filters.len() / shape[0];
        let mut bias = Vec::with_capacity(shape[0]);
        for (k, filter) in filters.chunks_exact_mut(of_one).enumerate() {
            let scale = gain[k] / (variance[k] + BATCH_NORM_EPS).sqrt();
            filter.iter_mut().for_each(|weight| *weight *= scale);
            bias.push(shift[k] - mean[k] * scale);
        }
        let (weight_name, bias_name) = (format!("{conv}.weight"), format!("{conv}.bias"));
        self.tensor(&weight_name, &shape, &filters);
        self.tensor(&bias_name, &shape[..1], &bias);
        self.channels = shape[0];
        let (size, pad) = (shape[2] as u64, shape[2] as u64 / 2);
        let attributes = [
            numbers("kernel_shape", &[size; 2]),
            numbers("strides", &[stride; 2]),
            numbers("pads", &[pad; 4]),
        ];
        let y = self.node("Conv", conv, &[x, &weight_name, &bias_name], &attributes);
        Ok(if relu { self.node("Relu", &format!("{conv}.relu"), &[&y], &[]) } else { y })
    }

    /// A residual block; `stride` is that of its first block's downsampling.
    fn block(&mut self, x: String, name: &str, stride: u64) -> Result<String> {
        let has = |graph: &Self, part: &str| graph.weights.contains_key(&format!("{name}.{part}"));
        let bottleneck = has(self, "conv3.weight");
        let shortcut = if has(self, "downsample.0.weight") {
            let names = [0, 1].map(|i| format!("{name}.downsample.{i}"));
            self.conv(&x, [&names[0], &names[1]], stride, false)?
        } else {
            x.clone()
        };
        let strides: &[u64] = if bottleneck { &[1, stride, 1] } else { &[stride, 1] };
        let mut y = x;
        for (j, &stride) in strides.iter().enumerate() {
            let names = ["conv", "bn"].map(|kind| format!("{name}.{kind}{}", j + 1));
            y = self.conv(&y, [&names[0], &names[1]], stride, j + 1 < strides.len())?;
        }
        let sum = self.node("Add", &format!("{name}.add"), &[&y, &shortcut], &[]);
        Ok(self.node("Relu", &format!("{name}.relu"), &[&sum], &[]))
    }
}

/// An attribute of several integers.
fn numbers(name: &str, values: &[u64]) -> Message {
    const INTS: u64 = 7;
    let attribute = Message::default().text(1, name).number(20, INTS);
    values.iter().fold(attribute, |attribute, &value| attribute.number(8, value))
}

/// A graph's input or output, each size a name or a number.
fn value(name: &str, sizes: &[std::result::Result<usize, &str>]) -> Message {
    let shape = sizes.iter().fold(Message::default(), |shape, size| {
        let size = match size {
            Ok(number) => Message::default().number(1, *number as u64),
            Err(name) => Message::default().text(2, name),
        };
        shape.message(1, &size)
    });
    let tensor = Message::default().number(1, FLOAT).message(2, &shape);
    Message::default().text(1, name).message(2, &Message::default().message(1, &tensor))
}

/// The model of a ResNet with torchvision's names, which tell its structure.
fn model(weights: BTreeMap<String, Values>) -> Result<Vec<u8>> {
    let Some((stem, _)) = weights.get("conv1.weight").cloned() else {
        return Err(Error::Weights(
            "networks with selective kernels cannot be written as ONNX models".into(),
        ));
    };
    let mut graph = Graph { weights, ..Graph::default() };
    let is_large = stem[2] == 7;
    let mut x = graph.conv("input", ["conv1", "bn1"], if is_large { 2 } else { 1 }, true)?;
    if is_large {
        let attributes = [
            numbers("kernel_shape", &[3; 2]),
            numbers("strides", &[2; 2]),
            numbers("pads", &[1; 4]),
        ];
        x = graph.node("MaxPool", "maxpool", &[&x], &attributes);
    }
    for stage in 1..=4 {
        for block in 0.. {
            let name = format!("layer{stage}.{block}");
            if !graph.weights.contains_key(&format!("{name}.conv1.weight")) {
                break;
            }
            x = graph.block(x, &name, if stage > 1 && block == 0 { 2 } else { 1 })?;
        }
    }
    if let Some(left) = graph.weights.keys().next() {
        return Err(Error::Weights(format!(
            "{left} has no place in an ONNX model: networks with selective kernels cannot be written as one"
        )));
    }
    let x = graph.node("GlobalAveragePool", "avgpool", &[&x], &[]);
    graph.node("Flatten", "output", &[&x], &[]);
    let input = value("input", &[Err("batch"), Ok(stem[1]), Err("height"), Err("width")]);
    let output = value("output", &[Err("batch"), Ok(graph.channels)]);
    let graph = graph.message.text(2, "backbone").message(11, &input).message(12, &output);
    let model = Message::default().number(1, IR_VERSION).text(2, "selfsup");
    let model = model.text(3, env!("CARGO_PKG_VERSION")).message(7, &graph);
    Ok(model.message(8, &Message::default().number(2, OPSET)).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_lengths_are_varints() {
        let message = Message::default().number(20, 300).text(1, "ab");
        assert_eq!(message.0, [0xA0, 0x01, 0xAC, 0x02, 0x0A, 0x02, b'a', b'b']);
    }

    #[test]
    fn what_is_no_plain_resnet_is_refused() {
        let selective = BTreeMap::from([("conv1.0.weight".to_owned(), (vec![1], vec![1.0]))]);
        let said = model(selective).unwrap_err().to_string();
        assert!(said.starts_with("networks with selective kernels"), "{said}");
    }
}

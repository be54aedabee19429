//! The primitives in f64, as references of `selfsup judge`.

use std::sync::Arc;

use cuda_on_host::judge::Operand;

use super::judge::Numbers;
use crate::arena::{Arena, Layout};
use crate::device::Device;
use crate::ops::{self, BatchNorm};
use crate::tape::{Tape, Var, forward};
use crate::tensor::Tensor;

/// Names, number of operands, their ranks, and the numbers that they take.
type Known = (&'static str, &'static [usize], &'static [&'static str]);

/// Rank 0 stands for any.
const KNOWN: &[Known] = &[
    ("copy", &[0], &[]),
    ("add", &[0, 0], &[]),
    ("mul", &[0, 0], &[]),
    ("scale", &[0], &["by"]),
    ("square", &[0], &[]),
    ("relu", &[0], &[]),
    ("softmax", &[2], &["temperature"]),
    ("l2_normalize", &[2], &[]),
    ("transpose", &[2], &[]),
    ("sum", &[2], &["axis"]),
    ("mean", &[2], &["axis"]),
    ("matmul", &[2, 2], &[]),
    ("linear", &[2, 2], &[]),
    ("conv2d", &[4, 4], &["stride", "pad"]),
    ("batch_norm", &[0], &[]),
    ("max_pool", &[4], &["size", "stride", "pad"]),
    ("mean_pool", &[4], &[]),
];

/// Computes a primitive on the reference device.
pub(super) fn primitive(
    name: &str,
    operands: &[Operand],
    with: &Numbers,
) -> Result<Vec<Vec<f64>>, String> {
    let Some((_, ranks, numbers)) = KNOWN.iter().find(|(known, ..)| *known == name) else {
        let all: Vec<&str> = KNOWN.iter().map(|(known, ..)| *known).collect();
        return Err(format!("is not known; known are {}", all.join(", ")));
    };
    if operands.len() != ranks.len() {
        return Err(format!("takes {} operands, not {}", ranks.len(), operands.len()));
    }
    for (operand, &rank) in operands.iter().zip(*ranks) {
        if rank != 0 && operand.shape.len() != rank {
            return Err(format!("takes an operand of rank {rank}, not {:?}", operand.shape));
        }
    }
    if let Some(unknown) = with.keys().find(|key| !numbers.contains(&key.as_str())) {
        return Err(format!("has no number `{unknown}`"));
    }
    fits(name, operands, with)?;
    let device = Device::reference();
    let tensors: Vec<Tensor> = operands
        .iter()
        .map(|operand| Tensor::from_f64(&device, operand.shape.as_slice(), &operand.values))
        .collect();
    if name == "softmax" {
        return Ok(vec![ops::softmax(&tensors[0], number(with, "temperature", 1.0)).to_f64()]);
    }
    let mut arena = Arena::new(&Arc::new(Layout::new()), &device, 1);
    // As in training: batch norm normalises by the batch's statistics.
    let result = forward(&mut arena, |tape| apply(name, tape, &tensors, with));
    Ok(vec![result.map_err(|e| e.to_string())?.to_f64()])
}

fn number(with: &Numbers, key: &str, default: f64) -> f64 {
    with.get(key).copied().unwrap_or(default)
}

/// A number that counts something.
fn whole(with: &Numbers, key: &str, default: usize) -> usize {
    number(with, key, default as f64) as usize
}

fn apply<'t>(name: &str, tape: &'t Tape<'t>, of: &[Tensor], with: &Numbers) -> Var<'t> {
    let at = |i: usize| tape.input(&of[i]);
    let [stride, pad] = [whole(with, "stride", 1), whole(with, "pad", 0)];
    match name {
        "add" => ops::add(&at(0), &at(1)),
        "mul" => ops::mul(&at(0), &at(1)),
        "scale" => ops::scale(&at(0), number(with, "by", 1.0)),
        "square" => ops::square(&at(0)),
        "relu" => ops::relu(&at(0)),
        "l2_normalize" => ops::l2_normalize(&at(0)),
        "transpose" => ops::transpose(&at(0)),
        "sum" => ops::sum(&at(0), whole(with, "axis", 1)),
        "mean" => ops::mean(&at(0), whole(with, "axis", 1)),
        "matmul" => ops::linear(&at(0), &ops::transpose(&at(1)), None),
        "linear" => ops::linear(&at(0), &at(1), None),
        "conv2d" => ops::conv2d(&at(0), &at(1), stride, pad),
        "batch_norm" => ops::batch_norm(&at(0), BatchNorm::default()),
        "max_pool" => {
            ops::max_pool(&at(0), whole(with, "size", 2), whole(with, "stride", 2), [pad; 2])
        }
        "mean_pool" => ops::mean_pool(&at(0)),
        _ => at(0), // copy
    }
}

/// Refuses what the operations would panic over.
fn fits(name: &str, operands: &[Operand], with: &Numbers) -> Result<(), String> {
    for (key, &value) in with {
        let counts = !matches!(key.as_str(), "by" | "temperature");
        if !value.is_finite() || (counts && (value < 0.0 || value.fract() != 0.0 || value > 1e6)) {
            return Err(format!("cannot take {key} = {value}"));
        }
    }
    let shape = |i: usize| operands[i].shape.as_slice();
    let differ = || Err(format!("cannot take {:?} and {:?}", shape(0), shape(1)));
    let [stride, pad] = [whole(with, "stride", 1), whole(with, "pad", 0)];
    match name {
        "add" | "mul" if shape(0) != shape(1) => differ(),
        "matmul" if shape(0)[1] != shape(1)[0] => differ(),
        "linear" if shape(0)[1] != shape(1)[1] => differ(),
        "sum" | "mean" if whole(with, "axis", 1) > 1 => Err("has the axes 0 and 1".into()),
        "softmax" if number(with, "temperature", 1.0) <= 0.0 => {
            Err("needs a temperature above 0".into())
        }
        "conv2d" => {
            let small = (1..3).any(|i| shape(0)[i] + 2 * pad < shape(1)[i]);
            if shape(0)[3] != shape(1)[3] || small || stride == 0 { differ() } else { Ok(()) }
        }
        "max_pool" => {
            let (size, stride) = (whole(with, "size", 2), whole(with, "stride", 2));
            let small = (1..3).any(|i| shape(0)[i] + 2 * pad < size);
            if size == 0 || stride == 0 || pad >= size || small {
                return Err(format!("cannot pool {:?} by {size}, {stride} and {pad}", shape(0)));
            }
            Ok(())
        }
        "batch_norm" if shape(0).is_empty() => Err("needs an operand with channels".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operand(shape: &[usize]) -> Operand {
        let count = shape.iter().product();
        Operand {
            shape: shape.to_vec(),
            values: (0..count).map(|i: usize| i as f64 - 2.0).collect(),
        }
    }

    /// Every name computes something of operands that fit, and refuses those that do not in words.
    #[test]
    fn every_primitive_is_a_reference() {
        for &(name, ranks, _) in KNOWN {
            let shape = |rank: usize| [2, 3, 3, 2][..if rank == 0 { 2 } else { rank }].to_vec();
            let mut operands: Vec<Operand> =
                ranks.iter().map(|&rank| operand(&shape(rank))).collect();
            match name {
                "matmul" => operands[1] = operand(&[3, 4]),
                "conv2d" => operands[1] = operand(&[4, 1, 1, 2]),
                _ => {}
            }
            let results = primitive(name, &operands, &Numbers::new())
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(results.len() == 1 && !results[0].is_empty(), "{name}");
            assert!(results[0].iter().all(|value| value.is_finite()), "{name}");
        }
        let product = primitive("matmul", &[operand(&[1, 2]), operand(&[2, 1])], &Numbers::new());
        assert_eq!(product.unwrap(), [[(-2.0) * (-2.0) + (-1.0) * (-1.0)]]);
        let refused = |name: &str, shapes: &[&[usize]], with: &[(&str, f64)]| {
            let operands: Vec<Operand> = shapes.iter().map(|shape| operand(shape)).collect();
            let with = with.iter().map(|&(key, value)| (key.to_owned(), value)).collect();
            primitive(name, &operands, &with).expect_err(name)
        };
        assert!(refused("gelu", &[&[1]], &[]).contains("is not known; known are copy"));
        assert!(refused("add", &[&[1], &[2]], &[]).contains("cannot take [1] and [2]"));
        assert!(refused("sum", &[&[2]], &[]).contains("rank 2"));
        assert!(refused("sum", &[&[2, 2]], &[("axis", 2.0)]).contains("axes 0 and 1"));
        assert!(refused("scale", &[&[2]], &[("factor", 2.0)]).contains("no number `factor`"));
        assert!(refused("conv2d", &[&[1, 2, 2, 1], &[1, 3, 3, 1]], &[]).contains("cannot take"));
        assert!(refused("max_pool", &[&[1, 2, 2, 1]], &[("pad", 0.5)]).contains("pad = 0.5"));
    }
}

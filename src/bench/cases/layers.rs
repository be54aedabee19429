//! The layers of ResNet-50 and its head that are not convolutions: batch norm, pooling, additions, linear layers.

use super::convolutions::{gemm_launches, unit_of};
use crate::bench::case::{Case, Extent, Launched, suffix};
use crate::bench::{Problem, Unit, Work};
use crate::ops::kernels::{Gemm, GemmKind};
use crate::tensor::DType;

pub(super) fn cases(extent: &Extent, dtype: DType) -> Vec<Case> {
    let mut all = Vec::new();
    // Side, channels, occurrences, and whether a shortcut is added before the ReLU.
    for (side, c, count, residual) in [
        (112, 64, 1, false),
        (56, 64, 6, false),
        (56, 256, 3, true),
        (28, 128, 7, false),
        (28, 512, 4, true),
        (14, 256, 11, false),
        (14, 1024, 6, true),
        (7, 512, 5, false),
        (7, 2048, 3, true),
    ] {
        let shape = [extent.views, extent.of(side), extent.of(side), extent.of(c)];
        all.extend([false, true].map(|both| batch_norm_case(shape, count, residual, both, dtype)));
    }
    let n = extent.views;
    all.extend(
        [false, true]
            .map(|both| max_pool_case([n, extent.of(112), extent.of(112), 64], both, dtype)),
    );
    all.push(mean_pool_case([n, extent.of(7), extent.of(7), extent.of(2048)], dtype));
    all.push(add_case([n, extent.of(56), extent.of(56), extent.of(256)], dtype));
    all.push(linear_case([2 * n, extent.of(2048), extent.of(2048)], dtype));
    all.push(linear_case([2 * n, extent.of(2048), 128], dtype));
    all
}

fn len(shape: &[usize]) -> f64 {
    shape.iter().product::<usize>() as f64
}

fn dims(shape: [usize; 4]) -> String {
    shape.map(|size| size.to_string()).join("x")
}

/// The statistics need one pass over `x` and their use another, as do the sums of the backward pass and theirs: on-chip memory is
/// too small for one of the larger layers.
fn batch_norm_case(
    shape: [usize; 4],
    count: usize,
    residual: bool,
    backward: bool,
    dtype: DType,
) -> Case {
    let (size, name) = (dtype.size() as f64 * len(&shape), suffix(dtype));
    let residual_size = if residual { size } else { 0.0 };
    let mut launched = vec![
        Launched::over(format!("batch_norm_moments_{name}"), size, 3.0 * len(&shape)),
        Launched::over("batch_norm_finish", 0.0, 0.0),
        Launched::over(
            format!("batch_norm_apply_{name}"),
            2.0 * size + residual_size,
            4.0 * len(&shape),
        ),
    ];
    if backward {
        // The ReLU's mask is `y`.
        launched.extend([
            Launched::over(
                format!("batch_norm_backward_sums_{name}"),
                3.0 * size,
                4.0 * len(&shape),
            ),
            Launched::over("batch_norm_backward_finish", 0.0, 0.0),
            Launched::over(
                format!("batch_norm_backward_apply_{name}"),
                4.0 * size + residual_size,
                6.0 * len(&shape),
            ),
        ]);
    }
    let bytes = launched.iter().map(|l| l.bytes).sum();
    let operations = launched.iter().map(|l| l.operations).sum();
    let way = if backward { "forward+backward" } else { "forward" };
    let with = if residual { "+add+relu" } else { "+relu" };
    let problem = Problem::BatchNorm { shape, residual, backward };
    Case {
        name: format!("batch_norm{with} {way} {}", dims(shape)),
        count: if backward { count } else { 0 },
        work: Work { operations, bytes },
        unit: Unit::Vector,
        launched,
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

fn max_pool_case(shape: [usize; 4], backward: bool, dtype: DType) -> Case {
    let [n, h, w, c] = shape;
    let out = [n, h.div_ceil(2), w.div_ceil(2), c];
    let (e, name) = (dtype.size() as f64, suffix(dtype));
    let (x, y) = (len(&shape), len(&out));
    // A GPU saves the argmax, a byte for each output.
    let mut launched = vec![Launched::over(format!("max_pool_{name}"), e * (x + y) + y, 9.0 * y)];
    if backward {
        let bytes = e * (x + y) + y;
        launched.push(Launched::over(format!("max_pool_backward_{name}"), bytes, 4.0 * x));
    }
    let (way, count) = if backward { ("forward+backward", 1) } else { ("forward", 0) };
    let passes = if backward { 2.0 } else { 1.0 };
    let problem = Problem::MaxPool { shape, backward };
    Case {
        name: format!("max_pool {way} {} 3x3/2", dims(shape)),
        count,
        work: Work { operations: 9.0 * y, bytes: passes * e * (x + y) },
        unit: Unit::Vector,
        launched,
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

fn mean_pool_case(shape: [usize; 4], dtype: DType) -> Case {
    let (bytes, name) = (dtype.size() as f64 * len(&shape), suffix(dtype));
    let problem = Problem::MeanPool { shape };
    Case {
        name: format!("mean_pool forward+backward {}", dims(shape)),
        count: 1,
        work: Work { operations: 2.0 * len(&shape), bytes: 2.0 * bytes },
        unit: Unit::Vector,
        launched: vec![
            Launched::over(format!("mean_pool_{name}"), bytes, len(&shape)),
            Launched::over(format!("mean_pool_backward_{name}"), bytes, len(&shape)),
        ],
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

fn add_case(shape: [usize; 4], dtype: DType) -> Case {
    let bytes = 3.0 * dtype.size() as f64 * len(&shape);
    let problem = Problem::Add { shape };
    Case {
        name: format!("add forward {}", dims(shape)),
        count: 0,
        work: Work { operations: len(&shape), bytes },
        unit: Unit::Vector,
        launched: vec![Launched::over(format!("add_{}", suffix(dtype)), bytes, len(&shape))],
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

/// `y [m, n] = x Wᵀ` forward.
fn linear_case([m, k, n]: [usize; 3], dtype: DType) -> Case {
    let e = dtype.size() as f64;
    let (operations, bytes) = (2.0 * (m * n * k) as f64, e * (m * k + n * k + m * n) as f64);
    let run = if dtype == DType::Bf16 && k.is_multiple_of(8) { 8 } else { 1 };
    let gemm = Gemm { kind: GemmKind::Nt, m, n, k, count: 1, k_of_all: k, run, splittable: false };
    let problem = Problem::Linear { m, k, n };
    Case {
        name: format!("linear forward {m}x{k}->{n}"),
        count: 0,
        work: Work { operations, bytes },
        unit: unit_of(dtype),
        launched: gemm_launches(gemm, dtype, bytes, operations),
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

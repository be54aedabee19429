//! The distinct convolutions of ResNet-50 at 224 pixels, each in its three directions.

use crate::bench::case::{Case, Extent, Launched, suffix};
use crate::bench::{Problem, Unit, Work};
use crate::ops::Conv2dDims;
use crate::ops::gemm::reduce_block;
use crate::ops::kernels::conv2d::Direction;
use crate::ops::kernels::{Gemm, GemmKind, Tile, TileShape};
use crate::tensor::DType;

/// A convolution of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    /// Side of the input in pixels.
    size: usize,
    c: usize,
    k: usize,
    filter: usize,
    stride: usize,
    count: usize,
}

/// Returns every distinct convolution of ResNet-50 v1.5 with its number of occurrences.
fn layers() -> Vec<Layer> {
    let layer = |size, c, k, filter, stride, count| Layer { size, c, k, filter, stride, count };
    // The images' three channels are padded to four.
    let mut all = vec![layer(224, 4, 64, 7, 2, 1)];
    let mut c = 64;
    for (stage, (size, blocks)) in [(56, 3), (28, 4), (14, 6), (7, 3)].into_iter().enumerate() {
        let (inner, outer) = (64 << stage, 256 << stage);
        let (before, stride) = if stage == 0 { (size, 1) } else { (2 * size, 2) };
        all.extend([
            layer(before, c, inner, 1, 1, 1),
            layer(before, inner, inner, 3, stride, 1),
            layer(before, c, outer, 1, stride, 1),
            layer(size, inner, outer, 1, 1, blocks),
            layer(size, outer, inner, 1, 1, blocks - 1),
            layer(size, inner, inner, 3, 1, blocks - 1),
        ]);
        c = outer;
    }
    // Equal layers of the first stage are merged.
    let mut distinct: Vec<Layer> = Vec::new();
    for layer in all {
        let same = |other: &&mut Layer| Layer { count: layer.count, ..**other } == layer;
        match distinct.iter_mut().find(same) {
            Some(known) => known.count += layer.count,
            None => distinct.push(layer),
        }
    }
    distinct
}

pub(super) fn cases(extent: &Extent, dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for layer in layers() {
        let channels = |c: usize| if c > 4 { extent.of(c) } else { c };
        let (size, n) = (extent.of(layer.size).max(layer.filter), extent.views);
        let (c, k, filter) = (channels(layer.c), channels(layer.k), layer.filter);
        let d =
            Conv2dDims::new([n, size, size, c], [k, filter, filter, c], layer.stride, filter / 2);
        for direction in [Direction::Forward, Direction::DataGradient, Direction::WeightGradient] {
            if direction == Direction::DataGradient && layer.c == 4 {
                continue; // no gradient flows to the images
            }
            cases.push(case(&d, layer.count, direction, dtype));
        }
    }
    cases
}

fn case(d: &Conv2dDims, count: usize, direction: Direction, dtype: DType) -> Case {
    let Conv2dDims { n, h, w, c, k, r, s, p, q, stride, .. } = *d;
    let real = if c == 4 { 3 } else { c };
    let operations = 2.0 * (n * p * q * k * r * s * real) as f64;
    let [x, y, filters] = [n * h * w * c, n * p * q * k, k * r * s * c].map(|len| len as f64);
    let (e, way) = (dtype.size() as f64, name(direction));
    // Weight gradients are f32 in every dtype.
    let bytes = match direction {
        Direction::WeightGradient => e * (x + y) + 4.0 * filters,
        _ => e * (x + y + filters),
    };
    let problem = Problem::Convolution { dims: *d, direction };
    Case {
        name: format!("conv2d {way} {n}x{h}x{w} {c}->{k} {r}x{s}/{stride}"),
        count,
        work: Work { operations, bytes },
        unit: unit_of(dtype),
        launched: launched(d, direction, dtype, bytes, operations),
        problem: Some(problem),
        prepare: Box::new(move |device| problem.prepare(device)),
    }
}

/// The unit that multiplies numbers of a dtype; a CPU has one rate for both.
pub(super) fn unit_of(dtype: DType) -> Unit {
    if dtype == DType::Bf16 { Unit::Matrix } else { Unit::Vector }
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Forward => "forward",
        Direction::DataGradient => "data gradient",
        Direction::WeightGradient => "weight gradient",
    }
}

/// The launches on a GPU: an implicit GEMM of the tile table and the reduction of its splits. A 1x1 convolution of stride 1 is
/// a plain GEMM.
fn launched(
    d: &Conv2dDims,
    direction: Direction,
    dtype: DType,
    bytes: f64,
    operations: f64,
) -> Vec<Launched> {
    let implicit = match direction {
        Direction::Forward => Gemm::convolution(d),
        Direction::DataGradient => Gemm::data_gradient(d),
        Direction::WeightGradient => Gemm::weight_gradient(d),
    };
    let plain = d.r == 1 && d.stride == 1;
    let kind = match direction {
        Direction::Forward => GemmKind::Nt,
        Direction::DataGradient => GemmKind::Nn,
        Direction::WeightGradient => GemmKind::Tn,
    };
    let mut gemm = if plain { Gemm { kind, ..implicit } } else { implicit };
    if dtype != DType::Bf16 {
        gemm.run = 1;
    }
    gemm_launches(gemm, dtype, bytes, operations)
}

/// The launch of a GEMM, and that of the reduction of its splits.
pub(super) fn gemm_launches(
    gemm: Gemm,
    dtype: DType,
    bytes: f64,
    operations: f64,
) -> Vec<Launched> {
    let tile = gemm.tile();
    let name = match gemm.kind {
        GemmKind::Nt => "matmul_nt",
        GemmKind::Nn => "matmul_nn",
        GemmKind::Tn => "matmul_tn",
        GemmKind::Convolution => "conv2d",
        GemmKind::DataGradient => "conv2d_data_gradient",
        GemmKind::WeightGradient => "conv2d_weight_gradient",
    };
    let (threads, shape) = match dtype {
        DType::Bf16 => (128, format!("_{}", shape_of(&tile))),
        _ => (256, String::new()),
    };
    let (splits, outputs) = (tile.splits, (gemm.m * gemm.n) as f64);
    let mut all = vec![Launched {
        kernel: format!("{name}_{}{shape}", suffix(dtype)),
        threads,
        blocks: tile.tiles * splits,
        bytes: if splits > 1 { bytes + 4.0 * outputs * (splits as f64 - 1.0) } else { bytes },
        operations,
        mma: 0.0,
        gemm: Some(gemm),
    }];
    if splits > 1 {
        let bytes = 4.0 * outputs * (splits as f64 + 1.0);
        let [elements, runs] = reduce_block(gemm.m * gemm.n, splits);
        let blocks = (gemm.m * gemm.n).div_ceil(elements);
        all.push(Launched {
            threads: elements * runs,
            // Of many elements, the chip gets as many blocks as it holds.
            blocks: if blocks < 8 * 132 { blocks } else { 0 },
            ..Launched::over("split_k_reduce_f32", bytes, outputs * splits as f64)
        });
    }
    all
}

fn shape_of(tile: &Tile) -> String {
    match tile.shape {
        TileShape::Stem => "stem".into(),
        _ => format!("{}x{}", tile.m, tile.n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_and_operations_add_up_to_resnet_50() {
        let layers = layers();
        assert_eq!(layers.iter().map(|layer| layer.count).sum::<usize>(), 53);
        // 4.087 billion multiply-adds forward, and 24.29 billion operations with both gradients (the stem has one).
        let cases = cases(&Extent { views: 1, ..Extent::GPU }, DType::Bf16);
        let sum = |way: &str| -> f64 {
            let those = cases.iter().filter(|case| case.name.contains(way));
            those.map(|case| case.count as f64 * case.work.operations).sum()
        };
        assert!((sum("conv2d forward") / 2.0 - 4.087e9).abs() < 1e6, "{}", sum("conv2d forward"));
        assert!((sum("conv2d") - 24.29e9).abs() < 1e7, "{}", sum("conv2d"));
    }
}

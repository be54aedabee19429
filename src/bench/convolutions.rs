//! ResNet-50's convolutions at 224 pixels, each distinct one in its three directions.

use super::case::{Case, Extent, Launched, Run, filled, suffix};
use super::{Unit, Work};
use crate::device::Device;
use crate::ops::Conv2dDims;
use crate::ops::conv2d::{data_gradient, forward, weight_gradient};
use crate::ops::kernels::{Gemm, GemmKind, Tile, TileShape};
use crate::tensor::{DType, Tensor};

/// A layer of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    /// Pixels of a side of the input.
    size: usize,
    c: usize,
    k: usize,
    filter: usize,
    stride: usize,
    count: usize,
}

/// Every distinct convolution of ResNet-50 v1.5, and how many of it there are.
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
    // Those of the first stage that are alike are one.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Forward,
    DataGradient,
    WeightGradient,
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
                continue; // nobody wants the gradient of images
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
    let (e, way) = (dtype.size() as f64, direction.words());
    // Sums of filters are f32 in every dtype.
    let bytes = match direction {
        Direction::WeightGradient => e * (x + y) + 4.0 * filters,
        _ => e * (x + y + filters),
    };
    let dims = *d;
    Case {
        name: format!("conv2d {way} {n}x{h}x{w} {c}->{k} {r}x{s}/{stride}"),
        count,
        work: Work { operations, bytes },
        unit: unit(dtype),
        launched: launched(d, direction, dtype, bytes, operations),
        prepare: Box::new(move |device| prepare(device, dims, direction)),
    }
}

/// What multiplies numbers of a dtype. (A processor has one rate for both.)
pub(super) fn unit(dtype: DType) -> Unit {
    if dtype == DType::Bf16 { Unit::Product } else { Unit::Vector }
}

impl Direction {
    fn words(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::DataGradient => "data gradient",
            Direction::WeightGradient => "weight gradient",
        }
    }
}

fn prepare(device: &Device, d: Conv2dDims, direction: Direction) -> Run {
    let x = [d.n, d.h, d.w, d.c];
    let y = [d.n, d.p, d.q, d.k];
    let w = [d.k, d.r, d.s, d.c];
    let filled = |shape: &[usize]| filled(device, shape);
    match direction {
        Direction::Forward => {
            let (x, w) = (filled(&x), filled(&w));
            let mut y = Tensor::empty(device, x.dtype(), y);
            Box::new(move || drop(forward(&mut y, &x, &w, &d, None)))
        }
        Direction::DataGradient => {
            let (dy, w) = (filled(&y), filled(&w));
            let mut dx = Tensor::empty(device, dy.dtype(), x);
            Box::new(move || data_gradient(&mut dx.view_mut(), &dy, &w, &d, false))
        }
        Direction::WeightGradient => {
            let (x, dy) = (filled(&x), filled(&y));
            let mut dw = Tensor::floats(device, w);
            Box::new(move || weight_gradient(&mut dw.view_mut(), &x, &dy, &d, false))
        }
    }
}

/// What a GPU launches: a product of the tile table, and the sum of its slices. 1x1 of stride 1 is a plain matrix product.
fn launched(
    d: &Conv2dDims,
    direction: Direction,
    dtype: DType,
    bytes: f64,
    operations: f64,
) -> Vec<Launched> {
    let of_images = match direction {
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
    let mut product = if plain { Gemm { kind, ..of_images } } else { of_images };
    if dtype != DType::Bf16 {
        product.run = 1;
    }
    of_product(product, dtype, bytes, operations)
}

/// A product's launch, and that of the sum of its slices.
pub(super) fn of_product(
    product: Gemm,
    dtype: DType,
    bytes: f64,
    operations: f64,
) -> Vec<Launched> {
    let tile = product.tile();
    let name = match product.kind {
        GemmKind::Nt => "matmul_nt",
        GemmKind::Nn => "matmul_nn",
        GemmKind::Tn => "matmul_tn",
        GemmKind::Convolution => "conv2d",
        GemmKind::DataGradient => "conv2d_data_gradient",
        GemmKind::WeightGradient => "conv2d_weight_gradient",
    };
    let (threads, form) = match dtype {
        DType::Bf16 => (128, format!("_{}", form_of(&tile))),
        _ => (256, String::new()),
    };
    let (slices, c) = (tile.splits, (product.m * product.n) as f64);
    let mut all = vec![Launched {
        kernel: format!("{name}_{}{form}", suffix(dtype)),
        threads,
        blocks: tile.tiles * slices,
        bytes: if slices > 1 { bytes + 4.0 * c * (slices as f64 - 1.0) } else { bytes },
        operations,
        products: 0.0,
        product: Some(product),
    }];
    if slices > 1 {
        let bytes = 4.0 * c * (slices as f64 + 1.0);
        all.push(Launched::over("split_k_reduce_f32", bytes, c * slices as f64));
    }
    all
}

fn form_of(tile: &Tile) -> String {
    match tile.shape {
        TileShape::Stem => "stem".into(),
        _ => format!("{}x{}", tile.m, tile.n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layers_are_resnet_50s() {
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

//! Convolution on the CPU, layer by layer and direction by direction: criterion's Gelem/s are GFLOP/s.
//!
//! The first lines give the machine's multiply-add peak, measured in the same run: what the figures are a share of. Layers
//! are every distinct one of ResNet-50 at 224 pixels, batch 8, and of a narrow ResNet-18 at 32 pixels, batch 128. Operations are
//! those of the direct sum: where Winograd's transform is taken, a share can pass 100%.

#![allow(missing_docs)] // criterion's macro makes a public function

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use selfsup::device::Device;
use selfsup::ops::Conv2dDims;
use selfsup::ops::kernels::conv2d::{self, Direction};

/// `(n, h = w, c, k, r, stride)`
fn layers() -> Vec<(usize, usize, usize, usize, usize, usize)> {
    let mut layers = vec![(8, 224, 4, 64, 7, 2)];
    let mut c = 64;
    for (stage, size) in [56, 28, 14, 7].into_iter().enumerate() {
        let inner = 64 << stage;
        if stage == 0 {
            layers.extend([(8, size, c, inner, 1, 1), (8, size, c, 4 * inner, 1, 1)]);
        } else {
            let before = 2 * size;
            layers.extend([
                (8, before, c, inner, 1, 1),
                (8, before, inner, inner, 3, 2),
                (8, before, c, 4 * inner, 1, 2),
            ]);
        }
        c = 4 * inner;
        layers.extend([(8, size, c, inner, 1, 1), (8, size, inner, inner, 3, 1)]);
        if stage > 0 {
            layers.push((8, size, inner, c, 1, 1));
        }
    }
    layers.extend([(128, 32, 4, 16, 3, 1), (128, 32, 16, 16, 3, 1), (128, 32, 16, 32, 3, 2)]);
    layers.extend([(128, 16, 32, 32, 3, 1), (128, 8, 64, 64, 3, 1), (128, 4, 128, 128, 3, 1)]);
    layers
}

/// GFLOP/s of independent multiply-adds on all threads of the device: the compiler's own vectors over 512 running values, which
/// fill the registers of every instruction set without spilling into memory beyond the first cache.
fn peak(device: &Device) -> f64 {
    #[multiversion::multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
    fn burn(rounds: usize) -> f32 {
        let mut values = [1.0_f32; 256];
        let (a, b) = (black_box(0.999_f32), black_box(0.001_f32));
        for _ in 0..rounds {
            for v in &mut values {
                *v = v.mul_add(a, b);
            }
        }
        values.iter().sum()
    }
    let rounds = 400_000;
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            device.run(|| rayon::broadcast(|_| black_box(burn(rounds))));
            start.elapsed().as_secs_f64()
        })
        .fold(f64::MAX, f64::min);
    (device.threads() * rounds * 256 * 2) as f64 / best / 1e9
}

fn bench(criterion: &mut Criterion) {
    let device = Device::cpu(0).expect("threads");
    println!("multiply-add peak, {} threads: {:.0} GFLOP/s", device.threads(), peak(&device));
    for (n, size, c, k, r, stride) in layers() {
        let d = Conv2dDims::new([n, size, size, c], [k, r, r, c], stride, r / 2);
        let mut group =
            criterion.benchmark_group(format!("{n}x{size}x{size} {c}->{k} {r}x{r}/{stride}"));
        group.throughput(Throughput::Elements((2 * n * d.p * d.q * k * r * r * c) as u64));
        let mut x = vec![0.5; n * size * size * c];
        let mut w = vec![0.25; k * r * r * c];
        let mut y = vec![0.125; n * d.p * d.q * k];
        for direction in [Direction::Forward, Direction::DataGradient, Direction::WeightGradient] {
            let mut scratch = vec![0.0; conv2d::workspace_len(&d, direction)];
            group.bench_function(BenchmarkId::from_parameter(format!("{direction:?}")), |b| {
                device.run(|| {
                    b.iter(|| match direction {
                        Direction::Forward => conv2d::forward(&mut y, &x, &w, &mut scratch, &d),
                        Direction::DataGradient => {
                            conv2d::data_gradient(&mut x, &y, &w, &mut scratch, &d, false);
                        }
                        Direction::WeightGradient => {
                            conv2d::weight_gradient(&mut w, &x, &y, &mut scratch, &d, false);
                        }
                    });
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = bench
}
criterion_main!(benches);

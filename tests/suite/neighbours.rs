//! Nearest neighbours on a GPU equal those on the CPU for any sizes.

use selfsup::device::{Device, Precision};
use selfsup::eval::{Features, Knn, knn_accuracy};

use crate::driver::gpu;
use crate::seeded;

/// `n` rows of `d` numbers around the centres of their classes, close enough to each other that votes are close.
fn features(what: &str, n: usize, d: usize, classes: usize) -> Features {
    let noise = seeded::unit(seeded::seed(what), n * d);
    let labels: Vec<u32> = seeded::indices(seeded::seed(&format!("{what}|labels")), n, classes)
        .iter()
        .map(|&l| l as u32)
        .collect();
    let value = |(i, noise): (usize, &f64)| {
        let (row, column) = (i / d, i % d);
        let centre = if labels[row] as usize % d == column { 0.5 } else { 0.0 };
        (centre + noise) as f32
    };
    Features {
        values: noise.iter().enumerate().map(value).collect(),
        d,
        labels,
        skipped: Vec::new(),
    }
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_gpu_finds_the_neighbours_that_the_cpu_finds() {
    let (cpu, gpu) = (Device::cpu(2).unwrap(), gpu(Precision::Bf16));
    // (bank, queries, d, classes, k): one of each; fewer rows than k; more classes than threads; two chunks of the bank;
    // more neighbours than the kernels sort.
    for (n, m, d, classes, k) in [
        (1, 1, 1, 1, 1),
        (9, 5, 3, 2, 200),
        (301, 67, 17, 5, 20),
        (130, 65, 64, 300, 7),
        (16_384 + 37, 3, 4, 6, 256),
        (300, 9, 5, 3, 257),
    ] {
        let what = format!("{n} rows, {m} queries, d {d}, {classes} classes, k {k}");
        let bank = features(&format!("bank|{what}"), n, d, classes);
        let queries = features(&format!("queries|{what}"), m, d, classes);
        let knn = Knn { k, temperature: 0.1 };
        let [want, got] = [&cpu, &gpu].map(|on| knn_accuracy(&bank, &queries, knn, on).unwrap());
        println!("{what}: {want:.3}");
        assert_eq!(got, want, "{what}");
    }
}

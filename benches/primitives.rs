//! The cases of `selfsup bench` on the CPU under criterion, which compares runs and reports changes. Gelem/s are GFLOP/s;
//! `cargo bench --bench primitives -- sinkhorn` runs a subset.

#![allow(missing_docs)] // criterion's macro makes a public function

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use selfsup::bench::{Extent, cases};
use selfsup::device::Device;
use selfsup::tensor::DType;

fn bench(criterion: &mut Criterion) {
    let device = Device::cpu_with_this_thread(0).expect("threads");
    let mut group = criterion.benchmark_group("cpu");
    for case in cases(&Extent::CPU, DType::F32, "") {
        group.throughput(Throughput::Elements(case.work.operations as u64));
        // Operands are allocated only for the cases that the filter selects.
        group.bench_function(&case.name, |b| {
            let mut run = case.prepare(&device);
            b.iter(&mut run);
        });
    }
    group.finish();
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

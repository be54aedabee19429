//! A step over micro-batches equals the step of one batch whose batch norm normalises each micro-batch separately.

use selfsup::arena::Arena;
use selfsup::device::{Device, Precision};
use selfsup::methods::Method;
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::ops;
use selfsup::tape::{self, Var};
use selfsup::tensor::Tensor;

use crate::compare::{close, report};
use crate::driver::gpu;
use crate::network;

/// Number of micro-batches, images in each, views of each image.
const COUNT: usize = 4;
const IMAGES: usize = 3;
const VIEWS: usize = 2;
/// Rows of a micro-batch.
const ROWS: usize = IMAGES * VIEWS;

fn method(norm_groups: usize) -> SimClr {
    let (depth, width, stem) = (18, 4, Stem::Small);
    let network = ResNetConfig {
        depth,
        width,
        stem,
        zero_init_residual: false,
        norm_groups,
        sk_ratio: 0.0,
        bottleneck: 1,
        project: false,
        same_pool: false,
        channels: 3,
    };
    SimClr::new(
        &network,
        &Settings { temperature: 0.2, hidden: 16, embedding: 8, ..Settings::default() },
    )
}

fn arena(method: &SimClr, device: &Device) -> Arena {
    network::seeded_arena(method.layout(), device, "accumulation")
}

/// The images of all micro-batches in order; within a micro-batch, all rows of a view before those of the next.
fn images(device: &Device) -> Tensor {
    // The seed "accumulation|images" gives one ReLU an input so close to zero that f32 flips it.
    network::images(device, "accumulation|images 2", [COUNT * ROWS, 8, 8])
}

/// Reorders rows from micro-batch after micro-batch to view after view.
fn view_after_view<'t>(z: &Var<'t>) -> Var<'t> {
    let [rows, d] = z.value().dims("embeddings");
    let from: Vec<usize> = (0..VIEWS)
        .flat_map(|view| (0..COUNT).map(move |part| part * ROWS + view * IMAGES))
        .flat_map(|first| first..first + IMAGES)
        .collect();
    let values = z.value().to_f64();
    let moved: Vec<f64> =
        from.iter().flat_map(|&row| values[row * d..][..d].iter().copied()).collect();
    let (id, device) = (z.id(), z.tape().device().clone());
    let value = Tensor::from_f64(&device, [rows, d], &moved);
    z.tape().record("view_after_view", value, &[z], move |dy, gradients| {
        let mut dz = vec![0.0; rows * d];
        for (&row, dy) in from.iter().zip(dy.to_f64().chunks_exact(d)) {
            dz[row * d..][..d].copy_from_slice(dy);
        }
        gradients.add(id, Tensor::from_f64(&device, [rows, d], &dz));
    })
}

/// The loss, and the gradients by name.
type Outcome = (f64, std::collections::BTreeMap<String, Vec<f64>>);

fn one_batch(device: &Device, groups: usize) -> Outcome {
    let method = method(groups);
    let mut arena = arena(&method, device);
    let images = images(device);
    let loss = tape::step(&mut arena, |tape| {
        method.contrast(&view_after_view(&method.embed(&tape.input(&images))))
    });
    (loss.unwrap().scalar(), network::gradients(&arena))
}

fn micro_batches(device: &Device) -> Outcome {
    let method = method(1);
    let mut arena = arena(&method, device);
    let images = images(device);
    let loss = tape::cached_step(
        &mut arena,
        COUNT,
        VIEWS,
        |tape, i| method.embed(&tape.input(&images.rows(i * ROWS, ROWS))),
        |z| method.contrast(&z),
    );
    (loss.unwrap().scalar(), network::gradients(&arena))
}

fn compare(got: &Outcome, want: &Outcome, tolerance: f64) -> Vec<Result<f64, String>> {
    assert!(got.1.keys().eq(want.1.keys()));
    let slots = got.1.iter().zip(want.1.values());
    let mut results = vec![close("loss", &[got.0], &[want.0], tolerance)];
    results.extend(slots.map(|((name, got), want)| close(name, got, want, tolerance)));
    results
}

#[test]
fn micro_batches_equal_one_batch_with_grouped_batch_norm() {
    let device = Device::reference().poisoned();
    let results = compare(&micro_batches(&device), &one_batch(&device, COUNT), 1e-10);
    report("four micro-batches in f64", results);
}

#[test]
fn micro_batches_on_the_cpu_equal_those_of_the_reference() {
    let cpu = micro_batches(&Device::cpu(2).unwrap().poisoned());
    let results = compare(&cpu, &micro_batches(&Device::reference()), 1e-4);
    report("four micro-batches on the CPU", results);
}

/// Activations are the same in a micro-batch and in the batch; sums over rows are cut elsewhere, which may round one the other way.
#[test]
fn micro_batches_in_bf16_equal_one_batch_with_grouped_batch_norm() {
    let cpu = Device::cpu(2).unwrap().with_precision(Precision::Bf16).unwrap().poisoned();
    let results = compare(&micro_batches(&cpu), &one_batch(&cpu, COUNT), 1e-2);
    report("four micro-batches on the CPU in bf16", results);
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn micro_batches_on_a_gpu_equal_those_of_the_reference() {
    let gpu = micro_batches(&gpu(Precision::F32));
    let results = compare(&gpu, &micro_batches(&Device::reference()), 1e-4);
    report("four micro-batches on a GPU", results);
}

#[test]
fn one_batch_norm_over_all_micro_batches_is_caught() {
    let device = Device::reference();
    let results = compare(&micro_batches(&device), &one_batch(&device, 1), 1e-3);
    assert!(results.iter().all(Result::is_err), "{results:?}");
}

/// The loss over the rows of one micro-batch has fewer negatives; only caching makes it exact.
#[test]
fn the_mean_of_losses_of_micro_batches_is_caught() {
    let device = Device::reference();
    let method = method(1);
    let mut arena = arena(&method, &device);
    let images = images(&device);
    let mut losses = Vec::new();
    arena.zero_gradients();
    for i in 0..COUNT {
        let loss = tape::backward_pass(&mut arena, |tape| {
            let z = method.embed(&tape.input(&images.rows(i * ROWS, ROWS)));
            ops::scale(&method.contrast(&z), 1.0 / COUNT as f64)
        });
        losses.push(loss.unwrap().scalar());
    }
    let wrong = (losses.iter().sum(), network::gradients(&arena));
    let results = compare(&wrong, &one_batch(&device, COUNT), 1e-3);
    assert!(results.iter().all(Result::is_err), "{results:?}");
}

/// Gradients of losses that are means over images add up without caching.
#[test]
fn backward_passes_add_their_gradients() {
    let device = Device::reference().poisoned();
    let method = method(1);
    let images = images(&device).rows(0, ROWS);
    let mut once = arena(&method, &device);
    tape::step(&mut once, |tape| method.contrast(&method.embed(&tape.input(&images)))).unwrap();
    let mut thrice = arena(&method, &device);
    thrice.zero_gradients();
    for factor in [0.5, 0.25, 0.25] {
        tape::backward_pass(&mut thrice, |tape| {
            ops::scale(&method.contrast(&method.embed(&tape.input(&images))), factor)
        })
        .unwrap();
    }
    let (want, got) = (network::gradients(&once), network::gradients(&thrice));
    let results =
        got.iter().zip(want.values()).map(|((name, got), want)| close(name, got, want, 1e-12));
    report("three backward passes", results.collect());
}

//! Sets that do not fit on a GPU: their batches are copied while the GPU computes, and nothing waits for that.

use std::sync::Arc;

use selfsup::data::augment::Policy;
use selfsup::data::{Batch, Image, Loader, Source};
use selfsup::device::{Device, Precision};
use selfsup::tensor::Tensor;

use crate::driver::{StandIn, alone, gpu};
use crate::graph_replay::{ManualRun, Outcome};
use crate::seeded::{bits, seed};

/// Images of noise, of several shapes and about as many pixels, so that no later batch needs more room than the first.
struct Noise;

const SHAPES: [[usize; 2]; 4] = [[24, 10], [12, 20], [16, 15], [30, 8]];

impl Source for Noise {
    fn len(&self) -> usize {
        24
    }

    fn read(&self, index: usize, into: &mut Image) -> selfsup::Result<()> {
        let [width, height] = SHAPES[index % SHAPES.len()];
        let seed = seed(&format!("noise {index}"));
        let value = |i| (bits(seed, i) >> 56) as u8;
        *into = Image { width, height, ..Image::default() };
        into.pixels.extend((0..(3 * width * height) as u64).map(value));
        Ok(())
    }

    fn label(&self, _: usize) -> Option<u32> {
        None
    }

    fn classes(&self) -> &[String] {
        &[]
    }

    fn name(&self, index: usize) -> String {
        format!("noise {index}")
    }
}

/// A loader of pairs of views of [`ManualRun`]'s size; the images stay on the GPU if they take at most `budget` bytes.
fn loader(device: &Device, budget: usize) -> Loader {
    let policies = vec![Policy { flip: 0.5, ..Policy::crop(8) }; 2];
    Loader::new(Arc::new(Noise), policies, 4, 11, 2, device).unwrap().keep_at_most(budget)
}

const COUNTED: [&str; 3] = ["allocations", "waits", "cuGraphLaunch"];

/// A run of twelve steps, two epochs; and what is counted in each step, from the request for its batch to the next.
fn train(driver: &StandIn, budget: usize) -> (Outcome, Vec<[u64; 3]>) {
    let device = gpu(Precision::Bf16);
    let (mut loader, mut manual) = (loader(&device, budget), ManualRun::new(&device, 0, true));
    let mut steps = Vec::new();
    for iteration in 0..12 {
        let before = COUNTED.map(|what| driver.count(what));
        let mut crops = manual.steps.take_views();
        let batch = if crops.is_empty() {
            loader.next_batch().unwrap()
        } else {
            let batch = loader.next_into(&mut crops).unwrap();
            Batch { crops, ..batch }
        };
        manual.step_with(batch, iteration).unwrap();
        let after = COUNTED.map(|what| driver.count(what));
        steps.push([0, 1, 2].map(|i| after[i] - before[i]));
    }
    (manual.left(Vec::new()), steps)
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn batches_are_copied_beside_the_steps_which_wait_for_nothing() {
    alone("streaming::batches_are_copied_beside_the_steps_which_wait_for_nothing", |driver| {
        driver.check(false);
        let (want, _) = train(driver, usize::MAX);
        assert!(want.tensors.iter().flatten().all(|v| v.is_finite()));
        // A device that is never ahead of the host, and orders of its streams that differ.
        for (seed, polls) in [(1, 0), (2, 0), (3, 0), (4, 50)] {
            driver.seed(seed);
            driver.stall(polls);
            let (got, steps) = train(driver, 0);
            driver.stall(0);
            println!("allocations, waits and replays of each step: {steps:?}");
            assert!(got == want, "{polls} polls: {got:?}, resident {want:?}");
            assert!(steps[0][0] > 10, "the driver counts allocations: {steps:?}");
            assert!(steps[1..].iter().all(|step| step[1] == 0), "waits: {steps:?}");
            assert_eq!(steps[2..], [[0, 0, 1]; 10], "{steps:?}");
        }
    });
}

/// A consumer that takes batches and never waits for the GPU: the threads do, and pin no more.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn threads_wait_for_a_slow_gpu_in_place_of_pinning_more() {
    alone("streaming::threads_wait_for_a_slow_gpu_in_place_of_pinning_more", |driver| {
        driver.check(false);
        let device = gpu(Precision::F32);
        let batches = |budget: usize| {
            let before = driver.count("cuMemHostAlloc");
            let mut loader = loader(&device, budget);
            let batches: Vec<Batch> = (0..20).map(|_| loader.next_batch().unwrap()).collect();
            let pinned = driver.count("cuMemHostAlloc") - before;
            let crops = batches.iter().map(|batch| batch.crops[0].to_vec::<f32>());
            (crops.collect::<Vec<_>>(), pinned)
        };
        driver.stall(1 << 20);
        // Pins what the tables of views need, which the second run uses again.
        let (want, tables) = batches(usize::MAX);
        let (got, pinned) = batches(0);
        driver.stall(0);
        println!("{tables} blocks pinned for tables, {pinned} for batches");
        assert!(got == want, "the views of images that lie on the GPU");
        assert!(tables >= 20 && (4..=8).contains(&pinned), "{tables} and {pinned}");
        device.check().unwrap();
    });
}

/// Pinning fails on a thread of the loader.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_failure_to_pin_a_batch_is_an_error_of_the_device() {
    alone("streaming::a_failure_to_pin_a_batch_is_an_error_of_the_device", |driver| {
        driver.check(false);
        let device = gpu(Precision::F32);
        let mut loader = loader(&device, 0);
        driver.fail("cuMemHostAlloc", 1, 2);
        let batch = loader.next_batch().unwrap();
        assert!(batch.crops[0].to_f64().iter().all(|v| v.is_nan()));
        let error = device.check().unwrap_err().to_string();
        assert!(error.contains("pinning") && error.contains("OUT_OF_MEMORY"), "{error}");
        drop::<Vec<Tensor>>(batch.crops);
        drop(loader);
    });
}

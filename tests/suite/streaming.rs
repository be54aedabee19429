//! Sets that do not fit on a GPU: their batches are copied while the GPU computes, and nothing waits for that.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use selfsup::arena::Arena;
use selfsup::data::augment::Policy;
use selfsup::data::{Batch, Image, Loader, Source, Transform, transformed_batch};
use selfsup::device::{Device, Precision};
use selfsup::methods::Method;
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::tensor::Tensor;
use selfsup::{Error, eval, tape};

use crate::driver::{StandIn, alone, gpu};
use crate::graph_replay::{ManualRun, Outcome};
use crate::methods::small;
use crate::seeded::{bits, seed};

/// Images of noise, of several shapes and as many pixels, so that no later batch needs more room than the first.
struct Noise {
    images: usize,
    /// This one cannot be read.
    broken: Option<usize>,
    reads: AtomicUsize,
}

impl Noise {
    fn new(images: usize, broken: Option<usize>) -> Arc<Self> {
        Arc::new(Self { images, broken, reads: AtomicUsize::new(0) })
    }
}

const SHAPES: [[usize; 2]; 4] = [[24, 10], [12, 20], [16, 15], [30, 8]];

impl Source for Noise {
    fn len(&self) -> usize {
        self.images
    }

    fn read(&self, index: usize, into: &mut Image) -> selfsup::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.broken == Some(index) {
            return Err(Error::format(self.name(index), "is broken".to_owned()));
        }
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
    Loader::new(Noise::new(24, None), policies, 4, 11, 2, device).unwrap().keep_at_most(budget)
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

/// Features of 200 images, 64 at a time, one of which is broken.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn an_evaluation_reads_ahead_and_reads_nothing_that_lies_on_the_gpu() {
    alone(
        "streaming::an_evaluation_reads_ahead_and_reads_nothing_that_lies_on_the_gpu",
        |driver| {
            driver.check(false);
            let device = gpu(Precision::Bf16);
            let settings = Settings { hidden: 16, embedding: 8, ..Settings::default() };
            let method = SimClr::new(&small(1), &settings);
            let (arena, backbone) = (Arena::new(method.layout(), &device, 3), method.backbone());
            let (set, policy, by) = (Noise::new(200, Some(70)), Policy::crop(8), Transform::Center);
            // Batch after batch, each waited for.
            let mut want = Vec::new();
            for from in (0..200).step_by(64) {
                let range = from..(from + 64).min(200);
                let (batch, _) = transformed_batch(by, &*set, range, &policy, &device).unwrap();
                let features =
                    tape::evaluate(&arena, |tape| backbone.forward(&tape.input(&batch.crops[0])));
                want.extend(features.unwrap().to_f64().into_iter().map(|v| v as f32));
            }
            assert!(want.iter().all(|v| v.is_finite()) && want.len() == 199 * backbone.features());
            let mut loader =
                Loader::new(set.clone(), vec![policy.clone()], 4, 11, 2, &device).unwrap();
            assert!(loader.images().on_gpu(3).is_none(), "before they are placed");
            loader.place_images().unwrap();
            assert!(loader.images().on_gpu(3).is_some() && loader.images().on_gpu(70).is_none());
            let read_again = [(set.clone() as Arc<dyn Source>, 200), (loader.images(), 1)];
            for (source, reads) in &read_again {
                for (seed, polls) in [(1, 0), (2, 0), (3, 50)] {
                    driver.seed(seed);
                    driver.stall(polls);
                    let before = set.reads.load(Ordering::Relaxed);
                    let mut done = Vec::new();
                    let found = eval::embed(&arena, backbone, &**source, &policy, by, |images| {
                        done.push(images);
                    });
                    driver.stall(0);
                    let found = found.unwrap();
                    assert!(found.values == want, "{seed}, {reads} read");
                    assert_eq!(set.reads.load(Ordering::Relaxed) - before, *reads);
                    assert_eq!(done, [64, 128, 192, 200]);
                    let skipped: Vec<u32> = found.skipped.iter().map(|image| image.index).collect();
                    assert_eq!(skipped, [70]);
                    assert_eq!((found.names.len(), found.labels), (199, vec![-1; 199]));
                }
            }
        },
    );
}

//! Captures on a GPU with little memory: a batch whose steps can be launched is trained, whether or not one can be captured.

use std::sync::atomic::{AtomicUsize, Ordering};

use selfsup::device::{Device, Precision};
use selfsup::tensor::{DType, Tensor};

use crate::driver::{StandIn, alone, gpu};
use crate::graph_replay::{ManualRun, Outcome, some_steps};

const OUT_OF_MEMORY: u32 = 2;

/// Makes the pool return its free list to the driver, by a request that finds no memory; returns what is reserved then, for a tensor
/// that nothing else is nearly as large as.
fn return_free_list(driver: &StandIn, device: &Device) -> usize {
    static TURN: AtomicUsize = AtomicUsize::new(0);
    // By turns of two sizes: the block of the turn before must not serve the request.
    let elements = (3 << 20) << (TURN.fetch_add(1, Ordering::Relaxed) % 2);
    driver.fail("cuMemAlloc", 1, OUT_OF_MEMORY);
    drop(Tensor::empty(device, DType::F32, [elements]));
    device.check().unwrap();
    4 * elements
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_capture_without_memory_is_given_up_at_any_of_its_allocations() {
    alone(
        "capture_memory::a_capture_without_memory_is_given_up_at_any_of_its_allocations",
        |driver| {
            driver.check(false);
            let device = gpu(Precision::Bf16);
            let run = |captures: bool, fail: Option<u64>| {
                let mut manual = ManualRun::new(&device, 0, captures);
                let (mut replays, mut allocations) = (0, 0);
                for iteration in 0..6 {
                    let batch = manual.batch(iteration);
                    if iteration == 2 {
                        return_free_list(driver, &device);
                        fail.iter().for_each(|nth| driver.fail("cuMemAlloc", *nth, OUT_OF_MEMORY));
                    }
                    let before = ["cuMemAlloc", "cuGraphLaunch"].map(|what| driver.count(what));
                    manual.step_with(batch, iteration).unwrap();
                    if iteration == 2 {
                        allocations = driver.count("cuMemAlloc") - before[0];
                    }
                    replays += driver.count("cuGraphLaunch") - before[1];
                }
                let notices = [manual.steps.take_notice(), manual.steps.take_notice()];
                (manual.left(Vec::new()), notices, replays, allocations)
            };
            let (want, notices, replays, _) = run(false, None);
            assert_eq!((notices, replays), ([None, None], 0));
            let (got, notices, replays, allocations) = run(true, None);
            assert_eq!((&got, notices, replays), (&want, [None, None], 4));
            assert!(allocations > 20, "{allocations} allocations of a capture");
            for nth in [1, allocations / 3, allocations / 2, allocations] {
                let (got, [notice, again], replays, _) = run(true, Some(nth));
                let notice = notice.unwrap_or_else(|| panic!("allocation {nth}: nothing was said"));
                assert!(notice.contains("steps are launched kernel by kernel"), "{notice}");
                assert!(notice.contains("GPU 0: out of memory: wanted "), "{notice}");
                assert_eq!((again, replays), (None, 0), "allocation {nth}");
                assert!(got == want, "allocation {nth}: {got:?}, launched {want:?}");
            }
            // What was allocated and given up is accounted for.
            let large = return_free_list(driver, &device);
            let used = device.memory_use();
            assert_eq!((used.live, used.reserved), (0, large));
        },
    );
}

/// Queues, target networks, labels and several phases: a step that is given up leaves nothing half-way.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_given_up_step_leaves_every_method_as_it_was() {
    alone("capture_memory::a_given_up_step_leaves_every_method_as_it_was", |driver| {
        driver.check(false);
        let device = gpu(Precision::Bf16);
        let two: &[(usize, usize)] = &[(2, 8)];
        for (name, views, count) in [
            ("moco v2", two, 4),
            ("simclr v2 memory", two, 4),
            ("byol", two, 4),
            ("swav", &[(2, 8), (2, 4)], 9),
            ("supervised", &[(1, 8)], 4),
        ] {
            let run = |captures, gives_up: bool| {
                let replays = driver.count("cuGraphLaunch");
                let outcome = some_steps(name, views, count, &device, (captures, false), |step| {
                    // The fifth request comes after those for the views of one size or two. Outside of a capture it is served after all.
                    if step >= 2 && gives_up {
                        return_free_list(driver, &device);
                        driver.fail("cuMemAlloc", 5, OUT_OF_MEMORY);
                    }
                });
                (outcome, driver.count("cuGraphLaunch") - replays)
            };
            let (launched, none) = run(false, false);
            let (given_up, replays) = run(true, true);
            assert_eq!((none, replays), (0, 0), "{name}");
            assert!(given_up == launched, "{name}: {given_up:?}, launched {launched:?}");
        }
    });
}

/// The losses and tensors of a run of five steps, or its error; and whether a capture was given up.
fn run(device: &Device, captures: bool) -> (selfsup::Result<Outcome>, bool) {
    let mut manual = ManualRun::new(device, 0, captures);
    manual.side = 32;
    let ended = (0..5).try_for_each(|iteration| manual.step(iteration));
    let gave_up = manual.steps.take_notice().is_some();
    (ended.map(|()| manual.left(Vec::new())), gave_up)
}

/// From memory for everything down to too little: wherever a step can be launched, capturing costs no run.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_batch_that_can_be_launched_can_be_trained() {
    const PAGE: usize = 2 << 20;
    alone("capture_memory::a_batch_that_can_be_launched_can_be_trained", |driver| {
        driver.check(false);
        let all = driver.memory(usize::MAX);
        driver.memory(all);
        let open = || Device::cuda(0, Precision::F32).unwrap();
        let device = open();
        let (want, _) = run(&device, true);
        let (want, reserved) = (want.unwrap(), device.memory_use().reserved);
        drop(device);
        let (mut captured, mut given_up) = (0, 0);
        for pages in (1..).map(|less| (reserved / PAGE + 3).saturating_sub(less)) {
            driver.memory((256 << 20) + pages * PAGE);
            let Ok(launched) = run(&open(), false).0 else { break };
            driver.recover();
            let (got, gave_up) = run(&open(), true);
            let got = got.unwrap_or_else(|e| panic!("{pages} pages: {e}"));
            assert!(launched == want && got == want, "{pages} pages");
            captured += usize::from(!gave_up);
            given_up += usize::from(gave_up);
        }
        driver.recover();
        println!("pages of memory: {captured} with a capture, {given_up} without");
        assert!(captured > 0 && given_up > 0, "{captured} {given_up}");
    });
}

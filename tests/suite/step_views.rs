//! Where a GPU's steps read their views: in buffers that a loader may write to, so that nothing is copied.

use selfsup::device::Precision;
use selfsup::tensor::Tensor;

use crate::driver::{alone, gpu};
use crate::graph_replay::{ManualRun, Outcome};

/// A run of six steps, and the copies within the GPU of each; `write` says in which of them the views are written in place.
fn run(driver: &crate::driver::StandIn, write: impl Fn(u64) -> bool) -> (Outcome, Vec<u64>) {
    let device = gpu(Precision::Bf16);
    let mut manual = ManualRun::new(&device, 3, true);
    let mut copies = Vec::new();
    for iteration in 0..6 {
        let mut batch = manual.batch(iteration);
        if write(iteration) {
            let mut views = manual.steps.take_views();
            assert_eq!(views.is_empty(), iteration == 0, "before the first step there are none");
            for (view, made) in views.iter_mut().zip(&batch.crops) {
                view.view_mut().write_f64(&made.to_f64());
            }
            batch.crops = if views.is_empty() { batch.crops } else { views };
        }
        let before = driver.count("cuMemcpyDtoDAsync");
        manual.step_with(batch, iteration).unwrap();
        copies.push(driver.count("cuMemcpyDtoDAsync") - before);
    }
    (manual.left(Vec::new()), copies)
}

/// The second phase begins with the fourth step.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn views_written_in_place_are_not_copied_and_change_no_bit() {
    alone("step_views::views_written_in_place_are_not_copied_and_change_no_bit", |driver| {
        driver.check(false);
        let (want, copied) = run(driver, |_| false);
        let (got, in_place) = run(driver, |_| true);
        println!("copies of steps: {copied:?}, with views in place {in_place:?}");
        assert_eq!(got, want);
        let saved: Vec<u64> = copied.iter().zip(&in_place).map(|(a, b)| a - b).collect();
        assert_eq!(saved, [0, 1, 1, 1, 1, 1]);
        let (mixed, _) = run(driver, |iteration| iteration % 2 == 1);
        assert_eq!(mixed, want);
    });
}

/// A captured step reads where the buffers were when it was captured: it is given up with them.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn buffers_that_do_not_come_back_cost_another_capture() {
    alone("step_views::buffers_that_do_not_come_back_cost_another_capture", |driver| {
        driver.check(false);
        let device = gpu(Precision::F32);
        let run = |lose: bool| {
            let mut manual = ManualRun::new(&device, 0, true);
            let replays = driver.count("cuGraphLaunch");
            // Kept, so that the next views do not come to lie in the same place, which would be as good.
            let mut lost: Vec<Tensor> = Vec::new();
            for iteration in 0..8 {
                if lose && iteration == 4 {
                    lost = manual.steps.take_views();
                    assert_eq!(lost.len(), 1);
                }
                manual.step(iteration).unwrap();
            }
            drop(lost);
            (manual.left(Vec::new()), driver.count("cuGraphLaunch") - replays)
        };
        let (want, replays) = run(false);
        assert_eq!(replays, 6);
        let (got, replays) = run(true);
        assert_eq!(got, want);
        assert_eq!(replays, 4, "two launched, two replayed, two launched, two replayed");
    });
}

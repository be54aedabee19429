//! Sinkhorn-Knopp: soft assignments of rows to prototypes that use all prototypes equally (SwAV, section 3.1,
//! arXiv:2006.09882; Cuturi 2013, arXiv:1306.0895). No gradient.
//!
//! Scores `s [b, k]`: `Q = exp(s / epsilon)`, divided by its sum; then `iterations` times: each prototype's column is
//! divided by its sum and by `k`, each row by its sum and by `b`; the result is `b Q`, whose rows sum to 1.
//!
//! The maximum over all scores is subtracted first. This is exact, because a factor of `Q` cancels. Subtracting each row's own
//! maximum would change the result, since the first step weights rows against each other (facebookresearch/dinov2, pull request
//! 583, does that). For scores that are cosines, exponentials stay in the range of f32 for `epsilon >= 0.023`. A prototype whose
//! column underflows to zero is assigned nothing. Several processes share sums and maximum through their [`Group`].

mod cpu;
mod cuda;
mod reference;

pub(crate) use cuda::rows_per_chunk as sinkhorn_rows_per_chunk;

use crate::device::{DeviceKind, Group};
use crate::tensor::{DType, Tensor};

/// The sizes and settings.
#[derive(Clone, Copy, Debug)]
struct SinkhornDims {
    /// Number of rows of this process.
    b: usize,
    /// Number of prototypes.
    k: usize,
    epsilon: f64,
    iterations: usize,
}

/// Returns assignments `[b, k]` of `scores [b, k]`, each row summing to 1; f32, even if scores are bf16. `epsilon > 0`
/// (0.05 in the paper), `iterations >= 1` (3 in the paper).
///
/// # Panics
/// If `scores` is empty or does not have rank 2, or a setting is out of range.
#[track_caller]
pub fn sinkhorn(scores: &Tensor, epsilon: f64, iterations: usize, group: &Group) -> Tensor {
    let [b, k] = scores.dims("sinkhorn: the scores");
    assert!(b > 0 && k > 0, "sinkhorn: the scores [{b}, {k}] are empty");
    assert!(
        epsilon > 0.0 && iterations > 0,
        "sinkhorn: epsilon {epsilon}, {iterations} iterations"
    );
    let dims = SinkhornDims { b, k, epsilon, iterations };
    let mut q = Tensor::floats(scores.device(), [b, k]);
    match scores.device().kind() {
        DeviceKind::Cpu => {
            let (q, scores) = (q.data_mut(), scores.cast(DType::F32));
            scores.device().run(|| cpu::assign(q, scores.data(), dims, group));
        }
        DeviceKind::Cuda => cuda::assign(&mut q, scores, dims, group),
        DeviceKind::Reference => reference::assign(q.data_mut(), scores.data(), dims, group),
    }
    q
}

/// Returns `1 / (parts sum)`, or 0 if `sum` is 0.
fn share(sum: f64, parts: f64) -> f64 {
    if sum > 0.0 { 1.0 / (parts * sum) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, Philox, Purpose};

    fn scores(device: &Device, b: usize, k: usize) -> Tensor {
        let mut rng = Philox::new(9, Purpose::Test, 0, 0);
        let values: Vec<f64> = (0..b * k).map(|_| f64::from(rng.uniform_in(-1.0, 1.0))).collect();
        Tensor::from_f64(device, [b, k], &values)
    }

    #[test]
    fn rows_sum_to_one_and_prototypes_are_used_equally() {
        let q = sinkhorn(&scores(&Device::reference(), 24, 6), 0.5, 50, &Group::alone());
        let q = q.data::<f64>();
        assert!(q.chunks(6).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        for j in 0..6 {
            let used: f64 = q.iter().skip(j).step_by(6).sum();
            assert!((used - 4.0).abs() < 1e-6, "prototype {j}: {used} of 24 rows");
        }
    }

    #[test]
    fn the_cpu_agrees_with_the_reference() {
        for (b, k, epsilon, iterations) in
            [(1, 1, 0.05, 3), (7, 13, 0.05, 3), (130, 67, 0.03, 1), (300, 5, 1.0, 10)]
        {
            let cpu = Device::cpu(2).unwrap().poisoned();
            let got = sinkhorn(&scores(&cpu, b, k), epsilon, iterations, &Group::alone()).to_f64();
            let reference = Device::reference().poisoned();
            let want = sinkhorn(&scores(&reference, b, k), epsilon, iterations, &Group::alone());
            for (i, (got, want)) in got.iter().zip(want.data::<f64>()).enumerate() {
                assert!((got - want).abs() < 1e-5, "[{b}, {k}] at {i}: {got}, expected {want}");
            }
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let device = Device::cpu(1).unwrap();
        let q = sinkhorn(
            &Tensor::from_slice(&device, [2, 2], &[1000.0_f32, 999.9, 999.8, 1000.0]),
            0.05,
            3,
            &Group::alone(),
        );
        assert!(q.data::<f32>().iter().all(|v| v.is_finite()), "{q:?}");
    }
}

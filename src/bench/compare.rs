//! This program beside a reference library: the same operation on the same operands in one process, in turns, and the error of
//! both against f64.

use std::time::{Duration, Instant};

use super::{Case, Problem};
use crate::device::peer::Peer;
use crate::device::{Device, DeviceKind, Philox, Purpose};
use crate::error::{Error, Result};
use crate::ops::kernels::conv2d::Direction;
use crate::tensor::Tensor;

/// Turns of both sides.
const ROUNDS: usize = 3;
/// The fewest runs of a turn.
const RUNS: usize = 3;

/// Reference libraries, open.
#[derive(Debug)]
pub struct Peers {
    device: Device,
    all: Vec<Peer>,
}

/// How far results are from those in f64.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// The largest difference over the largest magnitude.
    pub max: f64,
    /// The L2 norm of the differences over that of the f64 results.
    pub l2: f64,
}

/// A case beside one library.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The library and its version.
    pub peer: String,
    /// What both sides took, or why the library has no such operation.
    pub outcome: std::result::Result<Beside, String>,
}

/// Times and errors of both sides.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// The least seconds of this program.
    pub ours: f64,
    /// The least seconds of the library.
    pub theirs: f64,
    /// The library's seconds over this program's, the median over the rounds; above 1 this program is faster.
    pub ratio: f64,
    /// Half of the spread of that ratio over the rounds, over the ratio.
    pub noise: f64,
    /// The error of this program and of the library, the larger of all results.
    pub errors: [Distance; 2],
}

impl Peers {
    /// Opens libraries: `onednn` and `blas`, each with `=PATH` or without. They compute in f32 on the threads of the device, and
    /// only for the calling thread.
    ///
    /// # Errors
    /// If the device is not a CPU in f32, or a library is missing, cannot be opened, is too old or lacks a function.
    pub fn open(names: &[&str], device: &Device) -> Result<Self> {
        let precision = crate::tensor::DType::of_activations(device);
        if device.kind() != DeviceKind::Cpu || precision != crate::tensor::DType::F32 {
            return Err(Error::Config(format!(
                "--against a library compares in f32 on the CPU, and this is {device}: add --device cpu and leave out --bf16"
            )));
        }
        let open = |name: &&str| Peer::open(name, device.threads());
        Ok(Self { device: device.clone(), all: names.iter().map(open).collect::<Result<_>>()? })
    }

    /// The libraries and their versions.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(Peer::name)
    }

    /// Measures a case beside each library; a turn of either side takes `budget`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn compare(&self, case: &Case, budget: Duration) -> Result<Vec<Comparison>> {
        let lacking = |peer: &Peer, lack: String| Comparison {
            peer: peer.name().to_owned(),
            outcome: Err(lack),
        };
        let Some(problem) = &case.problem else {
            let lack = |peer: &Peer| format!("{} has no such operation", peer.name());
            return Ok(self.all.iter().map(|peer| lacking(peer, lack(peer))).collect());
        };
        let setting = Setting::new(problem, &self.device);
        let mut exact = None;
        let mut found = Vec::new();
        for peer in &self.all {
            match setting.beside(peer, &mut exact, budget)? {
                Ok(beside) => {
                    found.push(Comparison { peer: peer.name().to_owned(), outcome: Ok(beside) })
                }
                Err(lack) => found.push(lacking(peer, lack)),
            }
        }
        Ok(found)
    }
}

/// A problem with its operands.
struct Setting<'p> {
    problem: &'p Problem,
    /// What the libraries compute: without the channel that pads images.
    theirs: Problem,
    device: &'p Device,
    operands: Vec<Tensor>,
    /// The operands of `theirs`, if they differ.
    packed: Option<Vec<Vec<f32>>>,
}

impl<'p> Setting<'p> {
    fn new(problem: &'p Problem, device: &'p Device) -> Self {
        let unpadded = problem.unpadded();
        let mut values: Vec<Vec<f32>> = Vec::new();
        for (i, shape) in problem.operands().iter().enumerate() {
            let mut rng = Philox::new(1, Purpose::Test, 0, i as u32);
            let len = shape.iter().product::<usize>();
            let mut operand: Vec<f32> = (0..len).map(|_| rng.uniform_in(-1.0, 1.0)).collect();
            if unpadded.is_some() && shape.last() == Some(&4) {
                operand.iter_mut().skip(3).step_by(4).for_each(|padding| *padding = 0.0);
            }
            values.push(operand);
        }
        let shapes = problem.operands();
        let tensor = |(values, shape): (&Vec<f32>, &Vec<usize>)| {
            Tensor::from_slice(device, shape.as_slice(), values)
        };
        let operands = values.iter().zip(&shapes).map(tensor).collect();
        let packed = unpadded.map(|_| {
            let pack = |(values, shape): (Vec<f32>, &Vec<usize>)| match shape.last() {
                Some(4) => three_of_four(&values),
                _ => values,
            };
            values.into_iter().zip(&shapes).map(pack).collect()
        });
        Self { problem, theirs: unpadded.unwrap_or(*problem), device, operands, packed }
    }

    /// Measures both sides; `exact` keeps the f64 results for the next library.
    fn beside(
        &self,
        peer: &Peer,
        exact: &mut Option<Vec<Vec<f64>>>,
        budget: Duration,
    ) -> Result<std::result::Result<Beside, String>> {
        let slices: Vec<&[f32]> = match &self.packed {
            Some(packed) => packed.iter().map(Vec::as_slice).collect(),
            None => self.operands.iter().map(|operand| operand.data()).collect(),
        };
        let mut job = match self.theirs.theirs(peer, &slices) {
            Ok(job) => job,
            Err(lack) => return Ok(Err(lack)),
        };
        let mut ours = self.problem.ours(self.device, &self.operands);
        (ours.run)();
        job.run();
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let own = least(budget, &mut ours.run);
            rounds.push((own, least(budget, || job.run())));
        }
        self.device.check()?;
        let exact = exact.get_or_insert_with(|| self.exact());
        let own: Vec<Vec<f64>> = ours.results.borrow().iter().map(Tensor::to_f64).collect();
        let own = own.into_iter().map(|values| self.unpad(values)).collect::<Vec<_>>();
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let their: Vec<Vec<f64>> = job.outputs().into_iter().map(wide).collect();
        let errors = [&own, &their].map(|found| farthest(found, exact));
        let mut ratios: Vec<f64> = rounds.iter().map(|(own, their)| their / own).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[ROUNDS / 2];
        let least = |of: fn(&(f64, f64)) -> f64| rounds.iter().map(of).fold(f64::MAX, f64::min);
        Ok(Ok(Beside {
            ours: least(|round| round.0),
            theirs: least(|round| round.1),
            ratio,
            noise: (ratios[ROUNDS - 1] - ratios[0]) / 2.0 / ratio,
            errors,
        }))
    }

    /// The results in f64.
    fn exact(&self) -> Vec<Vec<f64>> {
        let reference = Device::reference();
        let wide =
            |operand: &Tensor| Tensor::from_f64(&reference, *operand.shape(), &operand.to_f64());
        let operands: Vec<Tensor> = self.operands.iter().map(wide).collect();
        let mut exact = self.problem.ours(&reference, &operands);
        (exact.run)();
        let results = exact.results.borrow();
        results.iter().map(|result| self.unpad(result.to_f64())).collect()
    }

    /// A result without the gradients of the padding filters.
    fn unpad(&self, values: Vec<f64>) -> Vec<f64> {
        match self.problem {
            Problem::Convolution { direction: Direction::WeightGradient, .. }
                if self.packed.is_some() =>
            {
                three_of_four(&values)
            }
            _ => values,
        }
    }
}

fn three_of_four<T: Copy>(values: &[T]) -> Vec<T> {
    values.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect()
}

/// The least seconds of a few runs.
fn least(budget: Duration, mut run: impl FnMut()) -> f64 {
    let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
    while runs < RUNS || start.elapsed() < budget {
        let before = Instant::now();
        run();
        best = best.min(before.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

/// The largest distances over all results.
fn farthest(found: &[Vec<f64>], exact: &[Vec<f64>]) -> Distance {
    assert_eq!(found.len(), exact.len(), "both sides have the same results");
    let distances = found.iter().zip(exact).map(|(found, exact)| distance(found, exact));
    distances.fold(Distance { max: 0.0, l2: 0.0 }, |a, b| Distance {
        // `max` would drop a NaN.
        max: if b.max > a.max || b.max.is_nan() { b.max } else { a.max },
        l2: if b.l2 > a.l2 || b.l2.is_nan() { b.l2 } else { a.l2 },
    })
}

/// NaN if any result is NaN.
fn distance(found: &[f64], exact: &[f64]) -> Distance {
    assert_eq!(found.len(), exact.len(), "both sides have results of the same size");
    let (mut largest, mut magnitude, mut squares, mut norm) = (0.0_f64, 0.0_f64, 0.0, 0.0);
    for (&a, &b) in found.iter().zip(exact) {
        let difference = (a - b).abs();
        largest = if difference > largest || difference.is_nan() { difference } else { largest };
        magnitude = magnitude.max(b.abs());
        squares += difference * difference;
        norm += b * b;
    }
    let scaled = |value: f64, by: f64| if by > 0.0 { value / by } else { value };
    Distance { max: scaled(largest, magnitude), l2: scaled(squares.sqrt(), norm.sqrt()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Extent, cases};
    use crate::tensor::DType;

    #[test]
    fn a_distance_scales_with_the_results_and_keeps_nan() {
        let near = distance(&[1.0, 2.5], &[1.0, 2.0]);
        assert_eq!((near.max, near.l2), (0.25, 0.5 / 5.0_f64.sqrt()));
        assert!(distance(&[f64::NAN, 2.0], &[1.0, 2.0]).max.is_nan());
        let all =
            farthest(&[vec![1.0], vec![f64::NAN], vec![2.0]], &[vec![1.0], vec![1.0], vec![1.0]]);
        assert!(all.max.is_nan() && all.l2.is_nan());
    }

    /// Every problem computes the same on the CPU as in f64, results in the same order: what a library is compared with.
    #[test]
    fn problems_agree_with_f64() {
        let device = Device::cpu(1).unwrap();
        let mut count = 0;
        for case in cases(&Extent::TINY, DType::F32, "") {
            let Some(problem) = &case.problem else { continue };
            let setting = Setting::new(problem, &device);
            let mut ours = problem.ours(&device, &setting.operands);
            (ours.run)();
            (ours.run)();
            let own: Vec<Vec<f64>> = ours.results.borrow().iter().map(Tensor::to_f64).collect();
            let own: Vec<Vec<f64>> = own.into_iter().map(|values| setting.unpad(values)).collect();
            let error = farthest(&own, &setting.exact());
            assert!(error.max < 1e-4 && error.l2 < 1e-4, "{}: {error:?}", case.name);
            count += 1;
        }
        assert!(count > 50, "{count}");
    }
}

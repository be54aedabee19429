//! This program beside a reference library: the same operation on the same operands in one process, in turns, and the error of
//! both against f64.

use std::time::{Duration, Instant};

use super::{Case, Problem};
use crate::device::cuda::Timer;
use crate::device::peer::{self, Peer};
use crate::device::{Device, DeviceKind, Philox, Purpose};
use crate::error::Result;
use crate::ops::kernels::conv2d::Direction;
use crate::tensor::{DType, Tensor};

/// Turns of both sides.
const ROUNDS: usize = 3;
/// The fewest runs of a turn.
const RUNS: usize = 3;
/// Seconds of work that a GPU is given at once.
const QUEUED: f64 = 2e-3;

/// Reference libraries, open.
#[derive(Debug)]
pub struct Peers {
    device: Device,
    all: Vec<Box<dyn Peer>>,
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
    /// Opens libraries, each by its name or `NAME=PATH`: `onednn` and `blas`, which compute in f32 on the threads of a CPU, `cudnn`
    /// and `cublaslt` for a GPU. They serve only the calling thread.
    ///
    /// # Errors
    /// If a library is for other devices, is missing, cannot be opened, is too old, lacks a function or cannot use the device.
    pub fn open(names: &[&str], device: &Device) -> Result<Self> {
        let open = |name: &&str| peer::open(name, device);
        Ok(Self { device: device.clone(), all: names.iter().map(open).collect::<Result<_>>()? })
    }

    /// The libraries and their versions.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|peer| peer.name())
    }

    /// Measures a case beside each library; a turn of either side takes `budget`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn compare(&self, case: &Case, budget: Duration) -> Result<Vec<Comparison>> {
        let lacking = |peer: &dyn Peer, lack: String| Comparison {
            peer: peer.name().to_owned(),
            outcome: Err(lack),
        };
        let Some(problem) = &case.problem else {
            let lack = |peer: &dyn Peer| format!("{} has no such operation", peer.name());
            let all = self.all.iter().map(|peer| lacking(&**peer, lack(&**peer)));
            return Ok(all.collect());
        };
        let setting = Setting::new(problem, &self.device);
        let mut exact = None;
        let mut found = Vec::new();
        for peer in &self.all {
            match setting.beside(&**peer, &mut exact, budget)? {
                Ok(beside) => {
                    found.push(Comparison { peer: peer.name().to_owned(), outcome: Ok(beside) })
                }
                Err(lack) => found.push(lacking(&**peer, lack)),
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
    packed: Option<Vec<Tensor>>,
    /// Of a GPU.
    timer: Option<Timer>,
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
        let tensor = |values: &Vec<f32>, shape: &[usize]| {
            let wide = Tensor::from_slice(device, shape, values);
            wide.cast(DType::of_activations(device))
        };
        let with = |shapes: Vec<Vec<usize>>| values.iter().zip(shapes);
        let operands =
            with(problem.operands()).map(|(values, shape)| tensor(values, &shape)).collect();
        let packed = unpadded.map(|unpadded| {
            let pack = |(values, shape): (&Vec<f32>, Vec<usize>)| match shape.last() {
                Some(3) => tensor(&three_of_four(values), &shape),
                _ => tensor(values, &shape),
            };
            with(unpadded.operands()).map(pack).collect()
        });
        let timer = (device.kind() == DeviceKind::Cuda).then(|| Timer::new(device));
        let theirs = unpadded.unwrap_or(*problem);
        Self { problem, theirs, device, operands, packed, timer }
    }

    /// Measures both sides; `exact` keeps the f64 results for the next library.
    fn beside(
        &self,
        peer: &dyn Peer,
        exact: &mut Option<Vec<Vec<f64>>>,
        budget: Duration,
    ) -> Result<std::result::Result<Beside, String>> {
        let operands = self.packed.as_ref().unwrap_or(&self.operands);
        let mut job = match self.theirs.theirs(peer, operands) {
            Ok(job) => job,
            Err(lack) => return Ok(Err(lack)),
        };
        let mut ours = self.problem.ours(self.device, &self.operands);
        (ours.run)();
        job.run();
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let own = self.least(budget, &mut ours.run);
            rounds.push((own, self.least(budget, || job.run())));
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

    /// The least seconds of a few runs. On a GPU one run is as many in a row as take [`QUEUED`] seconds, so that the host, which
    /// queues them, is ahead of it.
    fn least(&self, budget: Duration, mut run: impl FnMut()) -> f64 {
        let mut time = |count: usize| match &self.timer {
            Some(timer) => {
                let all = timer.time(|| (0..count).for_each(|_| run()));
                all.unwrap_or(f64::NAN) / count as f64
            }
            None => {
                let before = Instant::now();
                run();
                before.elapsed().as_secs_f64()
            }
        };
        let count = match self.timer {
            Some(_) => ((QUEUED / time(1)) as usize).clamp(1, 1000),
            None => 1,
        };
        let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
        while runs < RUNS || start.elapsed() < budget {
            best = best.min(time(count));
            runs += 1;
        }
        best
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

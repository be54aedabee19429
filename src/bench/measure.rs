//! The harness: median times, with warm caches and with cold ones.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::{Chip, Unit, Work};
use crate::device::cuda::Timer;
use crate::device::{Device, DeviceKind};
use crate::error::Result;
use crate::ops::linear;
use crate::tape::evaluate;
use crate::tensor::{DType, Tensor};

/// Times of many runs, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantiles {
    /// A fifth of the runs is faster.
    pub low: f64,
    /// Half of the runs.
    pub median: f64,
    /// A fifth is slower.
    pub high: f64,
}

/// What was measured of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Runs one after another: small operands are in caches.
    pub hot: Quantiles,
    /// Caches emptied before each run.
    pub cold: Quantiles,
    /// Runs of each kind.
    pub runs: usize,
}

/// Measures operations on a device, against ceilings that it measures first.
pub struct Bench {
    device: Device,
    chip: Chip,
    budget: Duration,
    timer: Option<Timer>,
    /// What is written to empty caches.
    flush: Tensor,
}

/// The fewest and most runs of an operation.
const RUNS: [usize; 2] = [5, 1000];
/// Bytes that are copied for the ceiling.
const COPIED: usize = 256 << 20;
/// A processor's last cache, as far as one program has it to itself.
const CACHE: usize = 64 << 20;

impl Bench {
    /// Prepares a device, with so much time for each operation hot and again cold. Measures its ceilings: a second.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device, budget: Duration) -> Result<Self> {
        let gpu = device.kind() == DeviceKind::Cuda;
        let known = if gpu { Chip::known(device.gpu().name()) } else { None };
        let mut bench = Self::against(device, known.unwrap_or_else(|| unknown(device)), budget);
        bench.find_ceilings()?;
        Ok(bench)
    }

    /// Prepares a device whose ceilings are known.
    pub fn against(device: &Device, chip: Chip, budget: Duration) -> Self {
        let timer = (device.kind() == DeviceKind::Cuda).then(|| Timer::new(device));
        let of = DType::of(device);
        // Twice a cache, so that nothing of before is left.
        let flush = Tensor::zeros(device, [(2 * chip.cache / of.size()).max(1)]);
        Self { device: device.clone(), chip, budget, timer, flush }
    }

    /// The ceilings that shares are of.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Median times of what `f` does, or, on a GPU, queues.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(&mut self, mut f: impl FnMut()) -> Result<Timing> {
        f(); // memory, caches of the allocator, and code
        let once = self.time(&mut f)?;
        let fit = (self.budget.as_secs_f64() / once.max(1e-9)) as usize;
        let runs = fit.clamp(RUNS[0], RUNS[1]);
        let hot = (0..runs).map(|_| self.time(&mut f)).collect::<Result<Vec<_>>>()?;
        let mut cold = Vec::with_capacity(runs);
        for _ in 0..runs {
            self.empty_caches();
            cold.push(self.time(&mut f)?);
        }
        Ok(Timing { hot: quantiles(hot), cold: quantiles(cold), runs })
    }

    /// The share of the floor that a time reaches, in `0..=1` but for noise.
    pub fn share(&self, work: &Work, unit: Unit, seconds: f64) -> f64 {
        work.floor(&self.chip, unit) / seconds
    }

    fn time(&self, f: &mut impl FnMut()) -> Result<f64> {
        let seconds = match &self.timer {
            Some(timer) => timer.time(f).unwrap_or(f64::NAN),
            None => {
                let start = Instant::now();
                f();
                start.elapsed().as_secs_f64()
            }
        };
        self.device.check()?;
        Ok(seconds)
    }

    fn empty_caches(&mut self) {
        match self.device.kind() {
            DeviceKind::Cpu => {
                let (device, values) = (&self.device, self.flush.data_mut::<f32>());
                device.run(|| {
                    let chunks = values.par_chunks_mut(1 << 16);
                    chunks.for_each(|chunk| chunk.iter_mut().for_each(|v| *v += 1.0));
                });
            }
            _ => self.flush.view_mut().fill(1.0),
        }
    }

    fn find_ceilings(&mut self) -> Result<()> {
        let of = DType::of(&self.device);
        let count = COPIED / of.size();
        let (from, mut to) =
            (Tensor::zeros(&self.device, [count]), Tensor::zeros(&self.device, [count]));
        let device = self.device.clone();
        let copied = self.measure(|| match device.kind() {
            DeviceKind::Cpu => {
                let (from, to) = (from.data::<f32>(), to.data_mut::<f32>());
                let chunks = to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16));
                device.run(|| chunks.for_each(|(to, from)| to.copy_from_slice(from)));
            }
            // A copy on the device is what reads and writes most.
            _ => to = from.copy(),
        })?;
        self.chip.copy = 2.0 * COPIED as f64 / copied.hot.median;
        let source = match self.device.kind() {
            DeviceKind::Cuda if Chip::known(self.device.gpu().name()).is_some() => {
                "copy measured now, product as known of this chip"
            }
            DeviceKind::Cuda => {
                let side = 4096;
                let [x, w] = [0, 1].map(|_| super::case::filled(&device, &[side, side]));
                let arena = super::case::nothing(&device).0;
                let product = self.measure(|| {
                    let y = evaluate(&arena, |tape| linear(&tape.input(&x), &tape.input(&w), None));
                    drop(y.expect("the device"));
                })?;
                self.chip.product = 2.0 * (side as f64).powi(3) / product.hot.median;
                "copy and this program's own product of 4096 x 4096 x 4096, measured now"
            }
            _ => {
                self.chip.product = peak(&self.device);
                self.chip.vector = self.chip.product;
                "copy and multiply-adds in registers, measured now"
            }
        };
        self.chip.source = source.into();
        self.chip.name = name_of(&self.device);
        Ok(())
    }
}

/// A chip of which only what the driver says is known.
fn unknown(device: &Device) -> Chip {
    let gpu = device.kind() == DeviceKind::Cuda;
    let processors = if gpu { device.gpu().multiprocessors() } else { device.threads() };
    // A guess of the clock; what is judged by it are only operations in f32 lanes.
    let clock = if gpu { 1.4e9 } else { f64::NAN };
    let vector = (processors * 128 * 2) as f64 * clock;
    let (copy, product) = (f64::NAN, f64::NAN);
    let (name, source) = (String::new(), String::new());
    Chip { name, source, copy, product, vector, processors, clock, shared: 0, cache: CACHE }
}

fn name_of(device: &Device) -> String {
    if device.kind() == DeviceKind::Cuda {
        return device.gpu().name().to_owned();
    }
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = about.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    let clock = field("cpu MHz").map_or(String::new(), |mhz| format!(", {mhz} MHz just now"));
    format!(
        "{model}, {} threads, {} kernels{clock}",
        device.threads(),
        crate::ops::instruction_set()
    )
}

/// Operations a second of independent multiply-adds on all threads of a processor: the compiler's own vectors over running
/// values that fill the registers of every instruction set without spilling beyond the first cache.
fn peak(device: &Device) -> f64 {
    #[multiversion::multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
    fn burn(rounds: usize) -> f32 {
        let mut values = [1.0_f32; 256];
        let (a, b) = (black_box(0.999_f32), black_box(0.001_f32));
        for _ in 0..rounds {
            for v in &mut values {
                *v = v.mul_add(a, b);
            }
        }
        values.iter().sum()
    }
    let rounds = 400_000;
    let once = |_| {
        let start = Instant::now();
        device.run(|| rayon::broadcast(|_| black_box(burn(rounds))));
        start.elapsed().as_secs_f64()
    };
    let best = (0..5).map(once).fold(f64::MAX, f64::min);
    (device.threads() * rounds * 256 * 2) as f64 / best
}

fn quantiles(mut seconds: Vec<f64>) -> Quantiles {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() - 1) as f64 * share).round() as usize];
    Quantiles { low: at(0.2), median: at(0.5), high: at(0.8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let times = quantiles((0..=10).rev().map(f64::from).collect());
        assert_eq!(times, Quantiles { low: 2.0, median: 5.0, high: 8.0 });
        let one = quantiles(vec![3.0]);
        assert_eq!((one.low, one.median, one.high), (3.0, 3.0, 3.0));
    }
}

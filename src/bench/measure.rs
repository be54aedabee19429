//! The harness: median times, with warm and with cold caches.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::cpu::parallel::Each;
use rayon::prelude::*;

use super::{Chip, Unit, Work};
use crate::device::cuda::{Graph, Timer};
use crate::device::{Device, DeviceKind};
use crate::error::Result;
use crate::ops::linear;
use crate::tape::evaluate;
use crate::tensor::{DType, Tensor};

/// Quantiles of the times of many runs, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantiles {
    /// The first fifth: 20% of the runs are faster.
    pub low: f64,
    /// The median.
    pub median: f64,
    /// The last fifth: 20% of the runs are slower.
    pub high: f64,
}

/// The measured times of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Runs back to back: small operands stay in the caches.
    pub hot: Quantiles,
    /// Runs with the caches emptied before each one.
    pub cold: Quantiles,
    /// Number of runs, hot and again cold; hot at least as many if they were replayed.
    pub runs: usize,
}

/// Measures operations on a device and compares them with ceilings that it measures first.
pub struct Bench {
    device: Device,
    chip: Chip,
    budget: Duration,
    timer: Option<Timer>,
    /// Written to empty the caches.
    flush: Tensor,
}

/// The fewest and most runs of an operation.
const RUNS: [usize; 2] = [5, 1000];
/// Seconds of a graph's runs, against which the launch of the graph is little; and the most runs of a graph.
const REPLAYED: (f64, usize) = (2e-3, 200);
/// Bytes copied to measure the copy ceiling.
const COPIED: usize = 256 << 20;
/// A CPU's last-level cache, as much as one program can count on.
const CACHE: usize = 64 << 20;

impl Bench {
    /// Prepares a device and measures its ceilings, which takes a second. `budget` is the time for each operation hot, and again
    /// cold.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(device: &Device, budget: Duration) -> Result<Self> {
        let gpu = device.kind() == DeviceKind::Cuda;
        let known = if gpu { Chip::known(device.gpu().name()) } else { None };
        let mut bench = Self::against(device, known.unwrap_or_else(|| unknown(device)), budget);
        bench.find_ceilings()?;
        Ok(bench)
    }

    /// Prepares a device with known ceilings.
    pub fn against(device: &Device, chip: Chip, budget: Duration) -> Self {
        let timer = (device.kind() == DeviceKind::Cuda).then(|| Timer::new(device));
        // Twice the cache, so that no earlier line survives.
        let flush = Tensor::zeros(device, [(2 * chip.cache / DType::of(device).size()).max(1)]);
        Self { device: device.clone(), chip, budget, timer, flush }
    }

    /// The ceilings that [`Bench::share`] compares with.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Measures what `f` does or, on a GPU, queues. A GPU that is faster than the host launches is measured waiting for the host:
    /// see [`Bench::measure_replayed`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure(&mut self, mut f: impl FnMut()) -> Result<Timing> {
        f(); // warms up memory, the allocator's cache and the code
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

    /// Measures what `f` queues on a GPU, replayed from a graph, without the host's time for launches: hot, many runs in one graph,
    /// one of which counts as a run; cold, a graph of one run behind the emptying of the caches, which takes longer than its launch.
    /// `f` must consist of launches only. On a CPU, with `SELFSUP_SYNC=1` and without memory for a graph it is [`Bench::measure`].
    ///
    /// # Errors
    /// If the device fails, or `f` cannot be captured: it copies from the host or waits.
    pub fn measure_replayed(&mut self, mut f: impl FnMut()) -> Result<Timing> {
        if self.device.kind() != DeviceKind::Cuda || self.device.gpu().is_synchronous() {
            return self.measure(f);
        }
        f(); // warms up memory and the code
        f(); // takes all memory from the free list
        let Some(one) = self.captured(1, &mut f)? else { return self.measure(f) };
        self.time(&mut || one.replay())?;
        let once = self.time(&mut || one.replay())?.max(1e-9);
        let times = ((REPLAYED.0 / once) as usize).clamp(1, REPLAYED.1);
        let many = self.captured(times, &mut f)?;
        let (hot, times) = many.as_ref().map_or((&one, 1), |many| (many, times));
        let runs = ((self.budget.as_secs_f64() / once) as usize).clamp(RUNS[0], RUNS[1]);
        let replays = runs.div_ceil(times).max(RUNS[0]);
        self.time(&mut || hot.replay())?;
        let each = |seconds: Result<f64>| seconds.map(|seconds| seconds / times as f64);
        let hot: Result<Vec<f64>> =
            (0..replays).map(|_| each(self.time(&mut || hot.replay()))).collect();
        let mut cold = Vec::with_capacity(runs);
        for _ in 0..runs {
            self.empty_caches();
            cold.push(self.time(&mut || one.replay())?);
        }
        Ok(Timing { hot: quantiles(hot?), cold: quantiles(cold), runs })
    }

    /// A graph of `times` runs; `None` if there is too little memory for it.
    fn captured(&self, times: usize, f: &mut impl FnMut()) -> Result<Option<Graph>> {
        let runs = || {
            (0..times).for_each(|_| f());
            Ok(())
        };
        Ok(Graph::capture(&self.device, runs)?.ok().map(|(graph, ())| graph))
    }

    /// Returns roofline time over measured time, in `0..=1` up to noise.
    pub fn share(&self, work: &Work, unit: Unit, seconds: f64) -> f64 {
        work.roofline(&self.chip, unit) / seconds
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
                    chunks.each(|chunk| chunk.iter_mut().for_each(|v| *v += 1.0));
                });
            }
            _ => self.flush.view_mut().fill(1.0),
        }
    }

    fn find_ceilings(&mut self) -> Result<()> {
        let count = COPIED / DType::of(&self.device).size();
        let (from, mut to) =
            (Tensor::zeros(&self.device, [count]), Tensor::zeros(&self.device, [count]));
        let device = self.device.clone();
        let copied = self.measure(|| match device.kind() {
            DeviceKind::Cpu => {
                let (from, to) = (from.data::<f32>(), to.data_mut::<f32>());
                let chunks = to.par_chunks_mut(1 << 16).zip(from.par_chunks(1 << 16));
                device.run(|| chunks.each(|(to, from)| to.copy_from_slice(from)));
            }
            // A device-to-device copy has the highest rate.
            _ => to = from.copy(),
        })?;
        self.chip.copy = 2.0 * COPIED as f64 / copied.hot.median;
        let source = match self.device.kind() {
            DeviceKind::Cuda if Chip::known(self.device.gpu().name()).is_some() => {
                "copy measured now, GEMM from the table of known chips"
            }
            DeviceKind::Cuda => {
                self.chip.gemm = self.own_gemm(4096)?;
                "copy and this program's own GEMM of 4096 x 4096 x 4096, measured now"
            }
            _ if DType::of_activations(&self.device) == DType::Bf16 => {
                self.chip.vector = peak(&self.device);
                self.chip.gemm = self.own_gemm(1024)?;
                "copy and this program's own GEMM of 1024 x 1024 x 1024 in bf16, measured now"
            }
            _ => {
                self.chip.vector = peak(&self.device);
                self.chip.gemm = self.chip.vector;
                "copy and multiply-adds in registers, measured now"
            }
        };
        self.chip.source = source.into();
        self.chip.name = name_of(&self.device);
        Ok(())
    }

    /// Operations per second of a square GEMM in the type of activations.
    fn own_gemm(&mut self, side: usize) -> Result<f64> {
        let [x, w] = [0, 1].map(|_| super::case::filled(&self.device, &[side, side]));
        let arena = super::case::tiny_arena(&self.device).0;
        let timing = self.measure(|| {
            let y = evaluate(&arena, |tape| linear(&tape.input(&x), &tape.input(&w), None));
            drop(y.expect("the device"));
        })?;
        Ok(2.0 * (side as f64).powi(3) / timing.hot.median)
    }
}

/// A chip that is not in the table: only what the driver reports is known.
fn unknown(device: &Device) -> Chip {
    let gpu = device.kind() == DeviceKind::Cuda;
    let processors = if gpu { device.gpu().multiprocessors() } else { device.threads() };
    // The clock is a guess; only operations in f32 lanes are judged by it.
    let clock = if gpu { 1.4e9 } else { f64::NAN };
    let vector = (processors * 128 * 2) as f64 * clock;
    let (copy, gemm) = (f64::NAN, f64::NAN);
    let (name, source) = (String::new(), String::new());
    Chip { name, source, copy, gemm, vector, processors, clock, shared: 0, cache: CACHE }
}

/// The highest rates that a device reaches in this program, by a short measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Copy rate in bytes per second, reads and writes added.
    pub copy: f64,
    /// Bytes that were copied to measure it.
    pub copied: usize,
    /// Operations per second of a square GEMM in the type of activations.
    pub gemm: f64,
    /// Rows of its matrices.
    pub side: usize,
}

/// Measures copy and GEMM rate. Sizes grow until one run takes a millisecond, or until they are those of large layers: so slow
/// devices are measured quickly.
///
/// # Errors
/// If the device fails.
pub fn ceilings(device: &Device) -> Result<Ceilings> {
    const ENOUGH: f64 = 1e-3;
    let chip = Chip { cache: 0, ..unknown(device) };
    let mut bench = Bench::against(device, chip, Duration::from_millis(50));
    let (mut copied, mut copy) = (1 << 20, 0.0);
    loop {
        let from = Tensor::zeros(device, [copied / DType::of(device).size()]);
        let seconds = bench.measure(|| drop(from.copy()))?.hot.median;
        copy = f64::max(copy, 2.0 * copied as f64 / seconds);
        if seconds >= ENOUGH || copied >= 1 << 30 {
            break;
        }
        copied *= 4;
    }
    let (mut side, mut gemm) = (256, 0.0);
    loop {
        let rate = bench.own_gemm(side)?;
        gemm = f64::max(gemm, rate);
        if 2.0 * (side as f64).powi(3) / rate >= ENOUGH || side >= 8192 {
            break;
        }
        side *= 2;
    }
    Ok(Ceilings { copy, copied, gemm, side })
}

/// A device's model and what it computes with, for reports.
pub(crate) fn name_of(device: &Device) -> String {
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

/// Measures the operations per second of independent multiply-adds on all threads of a CPU. The compiler vectorises over
/// accumulators that fill the registers of every instruction set; what spills stays in the first-level cache.
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
    fn quantiles_sort_the_times_first() {
        let times = quantiles((0..=10).rev().map(f64::from).collect());
        assert_eq!(times, Quantiles { low: 2.0, median: 5.0, high: 8.0 });
        let one = quantiles(vec![3.0]);
        assert_eq!((one.low, one.median, one.high), (3.0, 3.0, 3.0));
    }
}

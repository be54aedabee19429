//! Times single operations and complete steps on request, for the scripts in `benches/peers` that compare them with PyTorch.
//!
//! Each line on stdin is a request, each line on stdout an answer, so that both sides measure in the same minute:
//!
//! - `conv N H W C K R STRIDE PAD forward|data|weight`: the minimum seconds of a few repetitions.
//! - `conv_bf16`, with the arguments of `conv`: the same in bf16, with the moments of a batch norm in the forward pass.
//! - `tiles`: 1 if the processor multiplies bf16 by instructions of its own, otherwise 0.
//! - `step DEPTH WIDTH image|small SIZE BATCH`: the same for a SimCLR step.
//! - `median`, with the arguments of `step`: the median instead, on a GPU of the replayed step, without the host's launches.
//! - `phases`, with the arguments of `step`: the seconds of the forward pass, the backward pass and the update.
//! - `crops DEPTH WIDTH BATCH SIDE SMALL`: the seconds of a SwAV step on two crops of `SIDE` pixels, and on two plus six of `SMALL`.
//! - `memory`: the peak resident bytes of the process.
//!
//! With the argument `bf16` steps run in bf16, with `cuda` on the GPU in bf16; `step` and `phases` are launched one by one there.

use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use half::bf16;
use selfsup::arena::Arena;
use selfsup::bench::{Bench, Chip};
use selfsup::device::{Bf16Path, Device, Philox, Precision, Purpose};
use selfsup::methods::simclr::{Settings, SimClr};
use selfsup::methods::swav::{self, Swav};
use selfsup::methods::{Method, RunInfo};
use selfsup::nn::{ResNetConfig, Stem};
use selfsup::ops::Conv2dDims;
use selfsup::ops::kernels::bf16::{self as kernels_bf16, Moments};
use selfsup::ops::kernels::conv2d::{self, Direction};
use selfsup::optim::{Exclude, Optimizer, Rule, Sgd};
use selfsup::tape::step;
use selfsup::tensor::{DType, Tensor};

/// Returns the minimum time of at least three runs, and of more as long as `budget` lasts, after a warm-up run.
fn minimum_time(budget: Duration, mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best, mut runs) = (Instant::now(), f64::MAX, 0);
    while runs < 3 || start.elapsed() < budget {
        let before = Instant::now();
        f();
        best = best.min(before.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn noise(n: usize) -> Vec<f32> {
    let mut rng = Philox::new(1, Purpose::Test, 0, 0);
    (0..n).map(|_| rng.uniform_in(-1.0, 1.0)).collect()
}

/// The sizes and the direction of a request.
fn convolution(words: &[&str]) -> (Conv2dDims, Direction) {
    let n: Vec<usize> = words[..8].iter().map(|w| w.parse().expect("a size")).collect();
    let (input, filters) = ([n[0], n[1], n[2], n[3]], [n[4], n[5], n[5], n[3]]);
    let direction = match words[8] {
        "forward" => Direction::Forward,
        "data" => Direction::DataGradient,
        _ => Direction::WeightGradient,
    };
    (Conv2dDims::new(input, filters, n[6], n[7]), direction)
}

fn conv_bf16(device: &Device, words: &[&str]) -> f64 {
    let (d, direction) = convolution(words);
    let noise = |len| noise(len).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let mut x = noise(d.n() * d.h() * d.w() * d.c());
    let w = noise(d.k() * d.r() * d.s() * d.c());
    let mut y = noise(d.n() * d.p() * d.q() * d.k());
    let mut dw = vec![0.0; w.len()];
    let (mut mean, mut variance) = (vec![0.0; d.k()], vec![0.0; d.k()]);
    let mut scratch = vec![0.0; kernels_bf16::conv2d::workspace_len(&d, direction)];
    device.run(|| {
        minimum_time(Duration::from_millis(250), || match direction {
            Direction::Forward => {
                let (mean, variance) = (&mut mean[..], &mut variance[..]);
                let moments = Some(Moments { groups: 1, mean, variance });
                kernels_bf16::conv2d::forward(&mut y, &x, &w, moments, &mut scratch, &d);
            }
            Direction::DataGradient => {
                kernels_bf16::conv2d::data_gradient(&mut x, &y, &w, &mut scratch, &d, false);
            }
            Direction::WeightGradient => {
                kernels_bf16::conv2d::weight_gradient(&mut dw, &x, &y, &mut scratch, &d, false);
            }
        })
    })
}

fn conv(device: &Device, words: &[&str]) -> f64 {
    let (d, direction) = convolution(words);
    let mut x = noise(d.n() * d.h() * d.w() * d.c());
    let mut w = noise(d.k() * d.r() * d.s() * d.c());
    let mut y = noise(d.n() * d.p() * d.q() * d.k());
    let mut scratch = vec![0.0; conv2d::workspace_len(&d, direction)];
    device.run(|| {
        minimum_time(Duration::from_millis(250), || match direction {
            Direction::Forward => conv2d::forward(&mut y, &x, &w, &mut scratch, &d),
            Direction::DataGradient => {
                conv2d::data_gradient(&mut x, &y, &w, &mut scratch, &d, false);
            }
            Direction::WeightGradient => {
                conv2d::weight_gradient(&mut w, &x, &y, &mut scratch, &d, false);
            }
        })
    })
}

fn network(depth: usize, width: usize, stem: Stem) -> ResNetConfig {
    ResNetConfig {
        depth,
        width,
        stem,
        zero_init_residual: true,
        norm_groups: 1,
        sk_ratio: 0.0,
        bottleneck: 1,
        project: false,
        same_pool: false,
        channels: 3,
    }
}

/// Crops `[rows, size, size, 4]`; the fourth channel is zero.
fn crops(device: &Device, rows: usize, size: usize) -> Tensor {
    let mut pixels = noise(rows * size * size * 4);
    pixels.iter_mut().skip(3).step_by(4).for_each(|fourth| *fourth = 0.0);
    let crops = Tensor::from_slice(device, [rows, size, size, 4], &pixels);
    crops.cast(DType::of_activations(device))
}

/// Seconds of a SwAV step without and with six small crops, measured alternately.
fn swav_crops(device: &Device, words: &[&str]) -> String {
    let n: Vec<usize> = words.iter().map(|w| w.parse().expect("a size")).collect();
    let [depth, width, batch, side, small] = n[..] else { panic!("crops: five sizes") };
    let large = crops(device, 2 * batch, side);
    let kinds = [vec![large.clone()], vec![large, crops(device, 6 * batch, small)]];
    let mut trainings = [2, 8].map(|crops| {
        let settings = swav::Settings {
            hard_codes: false,
            crops,
            prototypes: 300,
            temperature: 0.1,
            epsilon: 0.05,
            sinkhorn_iterations: 3,
            hidden: 32 * width,
            embedding: 128,
            freeze_steps: 0,
            queue: 0,
            queue_from: 0,
        };
        let mut method = Swav::new(&network(depth, width, Stem::Image), &settings);
        let online = Arena::new(method.layout(), device, 1);
        let run = RunInfo { seed: 1, batch, images: batch, per_epoch: 1, total: 1 };
        method.start(&online, &run).expect("no queue to check");
        (method, online)
    });
    let mut best = [f64::MAX; 2];
    for round in 0..8 {
        for ((best, (method, online)), views) in best.iter_mut().zip(&mut trainings).zip(&kinds) {
            let start = Instant::now();
            step(online, |tape| method.loss(tape, views)).expect("a training step");
            if round > 0 {
                *best = best.min(start.elapsed().as_secs_f64());
            }
        }
    }
    best.map(|seconds| seconds.to_string()).join(" ")
}

/// A SimCLR training step on a prepared batch.
struct Training {
    method: SimClr,
    online: Arena,
    optimizer: Optimizer,
    views: Tensor,
}

impl Training {
    fn new(device: &Device, words: &[&str]) -> Self {
        let number = |i: usize| words[i].parse::<usize>().expect("a size");
        let stem = if words[2] == "image" { Stem::Image } else { Stem::Small };
        let config = network(number(0), number(1), stem);
        let hidden = number(1) * if number(0) < 50 { 8 } else { 32 };
        let settings = Settings { hidden, ..Settings::default() };
        let method = SimClr::new(&config, &settings);
        let online = Arena::new(method.layout(), device, 1);
        let rule =
            Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4, exclude: Exclude::Nothing };
        let optimizer = Optimizer::new(Rule::Sgd(rule), &online);
        let views = crops(device, 2 * number(4), number(3));
        Self { method, online, optimizer, views }
    }

    /// Runs one step; returns the seconds of its forward pass, backward pass and update.
    fn step(&mut self) -> [f64; 3] {
        let method = &mut self.method;
        let views = std::slice::from_ref(&self.views);
        let start = Instant::now();
        let mut forward = 0.0;
        let loss = step(&mut self.online, |tape| {
            let loss = method.loss(tape, views);
            forward = start.elapsed().as_secs_f64();
            loss
        });
        assert!(loss.expect("a training step").scalar().is_finite());
        let both = start.elapsed().as_secs_f64();
        self.optimizer.step(&mut self.online, 1e-3);
        self.method.take_embeddings();
        [forward, both - forward, start.elapsed().as_secs_f64() - both]
    }

    /// The median seconds of a step with a fixed learning rate, whose loss nobody reads.
    fn median(&mut self, device: &Device) -> f64 {
        self.step(); // which gets the memory, and whose loss is checked
        self.optimizer.set_rate(1e-3);
        let Self { method, online, optimizer, views } = self;
        // Of the chip only the cache counts, which is emptied for the cold times.
        let chip = Chip::known("H200").expect("in the table");
        let mut bench = Bench::against(device, chip, Duration::from_secs(2));
        let timing = bench.measure_replayed(|| {
            let views = std::slice::from_ref(views);
            step(online, |tape| method.loss(tape, views)).expect("a training step");
            optimizer.update(online);
            method.take_embeddings();
        });
        timing.expect("the device").hot.median
    }

    /// The minimum of each phase over a few steps, after a warm-up step.
    fn phases(&mut self) -> String {
        self.step();
        let mut best = [f64::MAX; 3];
        for _ in 0..5 {
            for (best, now) in best.iter_mut().zip(self.step()) {
                *best = best.min(now);
            }
        }
        best.map(|seconds| seconds.to_string()).join(" ")
    }
}

fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().split(' ').next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn main() {
    let device = match std::env::args().nth(1).as_deref() {
        Some("cuda") => Device::cuda(0, Precision::Bf16).unwrap_or_else(|e| panic!("{e}")),
        precision => {
            let precision =
                if precision == Some("bf16") { Precision::Bf16 } else { Precision::F32 };
            let device = Device::cpu_with_this_thread(0).expect("threads");
            device.with_precision(precision).unwrap_or_else(|e| panic!("{e}"))
        }
    };
    let mut training: Option<(String, Training)> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("stdin");
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words.as_slice() {
            ["conv", rest @ ..] => conv(&device, rest).to_string(),
            ["conv_bf16", rest @ ..] => conv_bf16(&device, rest).to_string(),
            ["tiles"] => u8::from(Bf16Path::current().instructions().is_some()).to_string(),
            [what @ ("step" | "median" | "phases"), rest @ ..] => {
                let name = rest.join(" ");
                if training.as_ref().is_none_or(|(made, _)| *made != name) {
                    training = Some((name, Training::new(&device, rest)));
                }
                let (_, training) = training.as_mut().expect("made above");
                match *what {
                    "step" => {
                        let step = || {
                            training.step();
                        };
                        minimum_time(Duration::from_secs(2), step).to_string()
                    }
                    "median" => training.median(&device).to_string(),
                    _ => training.phases(),
                }
            }
            ["crops", rest @ ..] => swav_crops(&device, rest),
            ["memory"] => peak_memory().to_string(),
            _ => continue,
        };
        println!("{answer}");
        std::io::stdout().flush().expect("stdout");
    }
}

//! `selfsup bench`: measured times with their rooflines, or rooflines and predictions without a device.

use std::time::Duration;

use clap::Args as Arguments;
use serde_json::json;

use super::against::Against;
use super::{device, say, talk};
use crate::bench::{Bench, Case, Chip, Extent, LaunchPlan, cases, plan};
use crate::device::{DeviceKind, Mix, Precision};
use crate::error::{Error, Result};
use crate::tensor::DType;

#[derive(Debug, Arguments)]
pub(super) struct BenchArgs {
    /// Only cases whose names contain these words, such as `conv2d forward` or `sinkhorn`
    filter: Vec<String>,
    /// Where to measure: cpu, cuda or cuda:N; by default a GPU if there is one
    #[arg(long)]
    device: Option<device::Name>,
    /// Threads on the CPU; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Activations in f32 instead of bf16, the usual precision of a GPU
    #[arg(long)]
    f32: bool,
    /// Activations in bf16 instead of f32, the usual precision of a CPU
    #[arg(long, conflicts_with = "f32")]
    bf16: bool,
    /// Seconds for each case hot, and again with cold caches
    #[arg(long, default_value_t = 0.3, value_name = "S")]
    seconds: f64,
    /// Measure nothing: print rooflines, tiles, waves, registers and a prediction for a GPU
    #[arg(long, conflicts_with_all = ["device", "threads", "seconds"])]
    paper: bool,
    /// The GPU that --paper is for: H200, H100 or A100
    #[arg(long, default_value = "H200", requires = "paper")]
    chip: String,
    /// Tiny sizes, to see that everything runs; they say nothing about speed
    #[arg(long)]
    tiny: bool,
    /// Compare with a reference library, in turns on the same operands: onednn or blas on the CPU, cudnn or cublaslt on a GPU, or
    /// NAME=PATH; or with an earlier result (a .json file that --json has printed); may be repeated
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "paper")]
    against: Vec<String>,
    /// Fail if a case is slower than this share of the other side's speed, by more than the noise
    #[arg(long, value_name = "RATIO", requires = "against")]
    fail_below: Option<f64>,
    /// One JSON object per case
    #[arg(long)]
    pub(super) json: bool,
    /// A Markdown table
    #[arg(long, conflicts_with = "json")]
    pub(super) markdown: bool,
}

pub(super) fn bench(args: &BenchArgs) -> Result<()> {
    let filter = args.filter.join(" ");
    let some = |all: Vec<Case>| match all.is_empty() {
        true => Err(Error::Config(format!(
            "no case has all of the words `{filter}`; `selfsup bench --paper` lists the cases"
        ))),
        false => Ok(all),
    };
    let dtype = if args.f32 { DType::F32 } else { DType::Bf16 };
    if args.paper {
        let extent = if args.tiny { Extent::TINY } else { Extent::GPU };
        let known = || Chip::names().collect::<Vec<_>>().join(", ");
        let chip = Chip::known(&args.chip).ok_or_else(|| {
            Error::Config(format!("unknown chip {}; known chips: {}", args.chip, known()))
        })?;
        return paper(args, &some(cases(&extent, dtype, &filter))?, &chip, &extent);
    }
    if !(args.seconds > 0.0 && args.seconds <= 60.0) {
        return Err(Error::Config(format!(
            "--seconds {}: must be above 0 and at most 60",
            args.seconds
        )));
    }
    let bf16 = args.bf16.then_some(Precision::Bf16);
    let precision = bf16.or(args.f32.then_some(Precision::F32));
    let device = device::choose(args.device, precision, args.threads)?;
    let extent = match device.kind() {
        _ if args.tiny => Extent::TINY,
        DeviceKind::Cuda => Extent::GPU,
        _ => Extent::CPU,
    };
    let cases = some(cases(&extent, DType::of_activations(&device), &filter))?;
    let seconds = Duration::from_secs_f64(args.seconds);
    let against = Against::open(&args.against, args.fail_below, &device)?;
    let mut bench = Bench::new(&device, seconds)?;
    let chip = bench.chip().clone();
    talk(&about(&chip));
    if let Some(against) = against {
        return against.run(args, &mut bench, &device, &cases, seconds);
    }
    let mut table = Table::new(
        args.markdown,
        &[
            "case",
            "in a step",
            "hot us",
            "20% to 80%",
            "cold us",
            "GFLOP/s",
            "GB/s",
            "roofline us",
            "share",
            "bound by",
        ],
    );
    for case in &cases {
        let timing = case.measure(&mut bench, &device)?;
        let (hot, cold) = (timing.hot, timing.cold);
        let roofline = case.work.roofline(&chip, case.unit);
        // Of the hot time: operands that exceed the caches are as slow hot as cold.
        let share = bench.share(&case.work, case.unit, hot.median);
        let memory = case.work.is_bound_by_memory(&chip, case.unit);
        if args.json {
            say(&json!({
                "case": case.name, "count": case.count, "device": chip.name,
                "dtype": name_of(DType::of_activations(&device)),
                "hot": [hot.low, hot.median, hot.high], "cold": [cold.low, cold.median, cold.high],
                "runs": timing.runs, "operations": case.work.operations, "bytes": case.work.bytes,
                "roofline": roofline, "share": share, "copy": chip.copy, "gemm": chip.gemm,
            })
            .to_string())?;
            continue;
        }
        table.row([
            case.name.clone(),
            times(case),
            microseconds(hot.median),
            format!("{} to {}", microseconds(hot.low), microseconds(hot.high)),
            microseconds(cold.median),
            format!("{:.1}", case.work.operations / hot.median / 1e9),
            format!("{:.1}", case.work.bytes / hot.median / 1e9),
            microseconds(roofline),
            format!("{:.2}", share),
            bound(memory),
        ])?;
    }
    table.end()
}

pub(super) fn name_of(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f32" }
}

fn about(chip: &Chip) -> String {
    format!(
        "{}: copy {:.1} GB/s, GEMM {:.1} GFLOP/s ({})",
        chip.name,
        chip.copy / 1e9,
        chip.gemm / 1e9,
        chip.source
    )
}

fn times(case: &Case) -> String {
    if case.count == 0 { String::new() } else { case.count.to_string() }
}

pub(super) fn microseconds(seconds: f64) -> String {
    let us = seconds * 1e6;
    if us < 100.0 { format!("{us:.1}") } else { format!("{us:.0}") }
}

fn bound(memory: bool) -> String {
    if memory { "memory" } else { "compute" }.into()
}

/// Cycles of the main loop's step and of a store of 16 bytes in the shortest and the longest epilogue, with `held` resident blocks; empty without mma.
fn cycles(mix: &Mix, held: usize) -> String {
    let i = held.clamp(1, mix.hot_cycles.len()) - 1;
    if mix.hot_cycles[i] == 0 {
        return String::new();
    }
    let of_store = |which: usize| match mix.epilogues[which].stores_16 {
        0 => String::new(),
        stores => format!(" {:.0}", f64::from(mix.epilogue_cycles[which][i]) / stores as f64),
    };
    format!("{}{}{}", mix.hot_cycles[i], of_store(0), of_store(1))
}

/// How to read the table of `--paper`.
const PAPER: &str = "\
The roofline of a case is the longer of two times: the bytes that it must move at the chip's copy rate, and its operations at the GEMM
rate (`src/bench`). The prediction is a model, not a measurement (`src/bench/plan.rs`): a GEMM costs what its machine code does on the
schedulers of the busiest multiprocessor, prologue, main loop and epilogue, or its traffic at 0.85 of the copy rate, whichever is
longer; other loops run at 0.85 of the copy rate and 0.6 of the f32 lanes; a launch costs 2 us. The model's assumptions, and what will
settle each on a GPU, are at the head of `cuda-kernels-build/src/sass/scoreboard.rs`. Waves are blocks over the number that the chip
holds at once; occupancy is of 64 warps. The hot loop, from the disassembly, counts all instructions, mma, ldmatrix, 16-byte accesses
to global memory, and narrower ones; the cycles are the model's for a multiprocessor that is full of such blocks: of one step of all
of them, and of one store of 16 bytes by every thread of all of them in the shortest and in the longest epilogue. The sums of a step
count each layer as often as it occurs in ResNet-50.
";

fn paper(args: &BenchArgs, cases: &[Case], chip: &Chip, extent: &Extent) -> Result<()> {
    let sm = if chip.name.contains("A100") { "sm_80" } else { "sm_90a" };
    let dtype = if args.f32 { "f32" } else { "bf16" };
    if args.markdown {
        let command = format!("selfsup bench --paper --chip {} --markdown", chip.name);
        say(&format!(
            "# Rooflines and predictions: {}, {dtype}\n\nMade by `{command}`; {}.\n",
            chip.name,
            about(chip)
        ))?;
        say(PAPER)?;
    } else if !args.json {
        talk(&about(chip));
    }
    let mut table = Table::new(
        args.markdown,
        &[
            "case",
            "in a step",
            "roofline us",
            "bound by",
            "predicted us",
            "predicted share",
            "kernel",
            "tile",
            "blocks",
            "waves",
            "registers",
            "shared",
            "occupancy",
            "hot loop",
            "cycles",
        ],
    );
    let plans: Vec<LaunchPlan> = cases.iter().map(|case| plan(case, chip, sm)).collect();
    for (case, plan) in cases.iter().zip(&plans) {
        if args.json {
            let kernels: Vec<_> = plan.kernels.iter().map(|k| json!({
                "kernel": k.kernel, "tile": k.tile, "blocks": k.blocks, "waves": k.waves, "occupancy": k.occupancy,
                "registers": k.resources.map(|r| r.registers), "shared": k.resources.map(|r| r.shared), "seconds": k.seconds,
            })).collect();
            say(&json!({
                "case": case.name, "count": case.count, "chip": chip.name, "dtype": dtype, "roofline": plan.roofline,
                "predicted": plan.seconds, "share": plan.roofline / plan.seconds, "operations": case.work.operations,
                "bytes": case.work.bytes, "kernels": kernels,
            }).to_string())?;
            continue;
        }
        for (i, kernel) in plan.kernels.iter().enumerate() {
            let first = |text: String| if i == 0 { text } else { String::new() };
            let resource = |of: fn(&crate::device::Resources) -> usize| {
                kernel.resources.as_ref().map_or("?".into(), |r| of(r).to_string())
            };
            table.row([
                first(case.name.clone()),
                first(times(case)),
                first(microseconds(plan.roofline)),
                first(bound(plan.memory)),
                first(microseconds(plan.seconds)),
                first(format!("{:.2}", plan.roofline / plan.seconds)),
                kernel.kernel.clone(),
                kernel.tile.clone(),
                kernel.blocks.to_string(),
                format!("{:.2}", kernel.waves),
                resource(|r| r.registers),
                resource(|r| r.shared),
                format!("{:.2}", kernel.occupancy),
                kernel.resources.and_then(|r| r.mix).map_or("?".into(), |mix| {
                    let hot = mix.hot;
                    let kinds = [hot.all, hot.mma, hot.ldmatrix, hot.global_16, hot.global];
                    kinds.map(|count| count.to_string()).join(" ")
                }),
                kernel
                    .resources
                    .and_then(|r| r.mix)
                    .map_or("?".into(), |mix| cycles(&mix, kernel.held)),
            ])?;
        }
    }
    table.end()?;
    if args.json {
        return Ok(());
    }
    let mut sums = Table::new(
        args.markdown,
        &["of a step of ResNet-50", "roofline us per view", "predicted us per view", "share"],
    );
    let parts = [
        "conv2d forward",
        "conv2d data gradient",
        "conv2d weight gradient",
        "batch_norm",
        "pool",
        "",
    ];
    for part in parts {
        let of = |value: fn(&LaunchPlan) -> f64| -> f64 {
            let all = cases.iter().zip(&plans).filter(|(case, _)| case.name.contains(part));
            all.map(|(case, plan)| case.count as f64 * value(plan)).sum::<f64>()
                / extent.views as f64
        };
        let (roofline, predicted) = (of(|plan| plan.roofline), of(|plan| plan.seconds));
        if predicted > 0.0 {
            let name = if part.is_empty() { "all of these" } else { part };
            let share = format!("{:.2}", roofline / predicted);
            sums.row([name.into(), microseconds(roofline), microseconds(predicted), share])?;
        }
    }
    say("")?;
    sums.end()
}

/// A table of text cells, printed at the end: aligned for a terminal, or as Markdown.
pub(super) struct Table {
    markdown: bool,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(markdown: bool, head: &[&str]) -> Self {
        Self { markdown, rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) -> Result<()> {
        self.rows.push(cells.into());
        Ok(())
    }

    pub(super) fn end(self) -> Result<()> {
        if self.rows.len() == 1 {
            return Ok(());
        }
        let columns = self.rows[0].len();
        let widest =
            |j: usize| self.rows.iter().map(|row| row[j].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(widest).collect();
        for (i, row) in self.rows.iter().enumerate() {
            if self.markdown {
                say(&format!("| {} |", row.join(" | ")))?;
                if i == 0 {
                    let rule = |j: usize| if j == 0 { "---|" } else { "---:|" };
                    say(&format!("|{}", (0..columns).map(rule).collect::<String>()))?;
                }
                continue;
            }
            let cells = row.iter().zip(&widths).enumerate();
            let padded = cells.map(|(j, (cell, &width))| match j {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            say(padded.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

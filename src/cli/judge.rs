//! `selfsup judge`: whether somebody's CUDA kernel is right and safe, and what can be said of its speed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args as Arguments;
use cuda_on_host::host::Host;
use cuda_on_host::judge::{
    Aspect, Fate, Finding, Footprint, Judge, Options, Sizes, Verdict, example,
};
use serde_json::json;

use super::nvcc::{self, Compiled};
use super::primitives::primitive;
use super::{say, talk};
use crate::bench::Chip;
use crate::error::{Error, Result, as_word};

#[derive(Debug, Arguments)]
pub(super) struct JudgeArgs {
    /// The kernel's source, a .cu file
    #[arg(required_unless_present = "example")]
    kernel: Option<PathBuf>,
    /// The case: sizes, launch, arguments and reference [default: the source's name with .toml]
    #[arg(long, value_name = "FILE")]
    case: Option<PathBuf>,
    /// Judge a built-in kernel, and print its source and its case, to start from
    #[arg(long, conflicts_with_all = ["kernel", "case"])]
    example: bool,
    /// Also judge mutants of the kernel, and list those that the case does not notice
    #[arg(long)]
    mutate: bool,
    /// Schedules at the case's sizes; other sizes get two
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    schedules: u64,
    /// Only these sizes, such as rows=1,columns=7; sizes that are not named keep the case's value
    #[arg(long, value_name = "SIZES")]
    at: Option<String>,
    /// Only the schedule and the inputs of this seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Seconds that a launch may take
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    patience: u64,
    /// The GPU of the estimate on paper: H200, H100 or A100
    #[arg(long, default_value = "H200")]
    chip: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn judge(args: &JudgeArgs) -> Result<()> {
    let chip = Chip::known(&args.chip).ok_or_else(|| {
        let known = Chip::names().collect::<Vec<_>>().join(", ");
        Error::Config(format!("unknown chip {}; known chips: {known}", args.chip))
    })?;
    let at = args.at.as_deref().map(sizes).transpose()?;
    let host = Host::new(&Host::default_cache()).map_err(Error::Device)?;
    if args.example {
        let folder = host.new_folder().map_err(Error::Device)?;
        let done = on_example(args, &chip, at, &host, &folder);
        let _ = std::fs::remove_dir_all(&folder); // two small files of a cache
        return done;
    }
    let kernel = args.kernel.clone().expect("clap requires it");
    let case = args.case.clone().unwrap_or_else(|| kernel.with_extension("toml"));
    on_files(args, &chip, at, &host, &kernel, &case)
}

fn on_example(
    args: &JudgeArgs,
    chip: &Chip,
    at: Option<Sizes>,
    host: &Host,
    folder: &Path,
) -> Result<()> {
    let [kernel, case] = [("row_sum.cu", example::KERNEL), ("row_sum.toml", example::CASE)].map(
        |(name, text)| -> Result<PathBuf> {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(Error::io(&path))?;
            if !args.json {
                say(&format!("---- {name}\n{}", text.trim_end()))?;
            }
            Ok(path)
        },
    );
    if !args.json {
        say("----")?;
    }
    on_files(args, chip, at, host, &kernel?, &case?)
}

fn on_files(
    args: &JudgeArgs,
    chip: &Chip,
    at: Option<Sizes>,
    host: &Host,
    kernel: &Path,
    case: &Path,
) -> Result<()> {
    let judge = Judge::new(host, kernel, case).map_err(Error::Config)?;
    if let Some(at) = &at {
        judge.check_sizes(at).map_err(Error::Config)?;
    }
    let compiled = nvcc::compile(kernel, judge.kernel());
    let unknown = judge.unknown();
    if !unknown.is_empty() {
        let list = unknown.iter().map(|u| format!("line {}: {}", u.line, u.what));
        let list = list.collect::<Vec<_>>().join("; ");
        let footprint = judge.footprint().map_err(Error::Config)?;
        say(&format!("kernel `{}`: right and safe cannot be judged on a CPU", judge.kernel()))?;
        paper(&footprint, &compiled, chip)?;
        return Err(Error::format(kernel, format!("the host does not know {list}")));
    }
    let options = Options {
        schedules: args.schedules,
        at,
        seed: args.seed,
        patience: Duration::from_secs(args.patience),
        first: false,
    };
    let verdict = judge.run(&options, &primitive).map_err(Error::Device)?;
    let mutants = match args.mutate && verdict.findings.is_empty() {
        true => Some(judge.mutate(&options, &primitive).map_err(Error::Device)?),
        false => None,
    };
    let (right, safe) = (verdict.is(Aspect::Right), verdict.is(Aspect::Safe));
    if args.json {
        let found = |f: &Finding| {
            let aspect = if f.aspect == Aspect::Right { "right" } else { "safe" };
            json!({ "aspect": aspect, "what": f.what, "sizes": f.sizes, "seed": f.seed, "times": f.times })
        };
        let survivors = mutants.as_ref().map(|all| {
            let survived = all.iter().filter(|(_, fate)| *fate == Fate::Survived);
            survived.map(|(m, _)| json!({ "line": m.line, "what": m.what })).collect::<Vec<_>>()
        });
        say(&json!({
            "kernel": judge.kernel(), "right": (verdict.compared > 0).then_some(right), "safe": safe, "error": verdict.error, "tolerance": verdict.tolerance,
            "launches": verdict.launches, "sizes": verdict.sizes,
            "findings": verdict.findings.iter().map(found).collect::<Vec<_>>(),
            "blocks": verdict.footprint.blocks, "threads": verdict.footprint.threads, "bytes": verdict.footprint.bytes,
            "floor": verdict.footprint.bytes / chip.copy, "survivors": survivors,
        })
        .to_string())?;
    } else {
        report(&verdict, judge.kernel(), kernel, case)?;
        paper(&verdict.footprint, &compiled, chip)?;
        match &mutants {
            Some(mutants) => tested(mutants)?,
            None if args.mutate => say("tested: mutants of a kernel with faults say nothing")?,
            None => {}
        }
    }
    let not = match (right, safe) {
        (true, true) => return Ok(()),
        (false, true) => "not right",
        (true, false) => "not safe",
        (false, false) => "neither right nor safe",
    };
    Err(Error::format(kernel, format!("`{}` is {not}", judge.kernel())))
}

/// `rows=1,columns=7`
fn sizes(text: &str) -> Result<Sizes> {
    let size = |part: &str| {
        let (name, value) = part.split_once('=')?;
        Some((
            name.trim().to_owned(),
            value.trim().parse().ok().filter(|&v| (1..=1 << 24).contains(&v))?,
        ))
    };
    text.split(',')
        .map(|part| {
            size(part).ok_or_else(|| {
                Error::Config(format!("--at {text}: it is NAME=SIZE,… with sizes of 1 to 16777216"))
            })
        })
        .collect()
}

fn report(verdict: &Verdict, name: &str, kernel: &Path, case: &Path) -> Result<()> {
    say(&format!(
        "kernel `{name}`, {} launches with new inputs at {} sizes",
        verdict.launches, verdict.sizes
    ))?;
    let error = format!(
        "largest error {:.1e} of the largest magnitude, {:.0e} passes",
        verdict.error, verdict.tolerance
    );
    aspect(verdict, Aspect::Right, "right", &error, kernel, case)?;
    let what = "no race, uninitialised, out-of-bounds or misaligned access, no divergent barrier";
    aspect(verdict, Aspect::Safe, "safe", what, kernel, case)
}

fn aspect(
    verdict: &Verdict,
    aspect: Aspect,
    word: &str,
    good: &str,
    kernel: &Path,
    case: &Path,
) -> Result<()> {
    if aspect == Aspect::Right && verdict.compared == 0 {
        return say(&format!("{word}: not known: no launch came to its end"));
    }
    if verdict.is(aspect) {
        return say(&format!("{word}: yes: {good}"));
    }
    say(&format!("{word}: NO"))?;
    for finding in verdict.findings.iter().filter(|finding| finding.aspect == aspect).take(10) {
        let sizes: Vec<String> =
            finding.sizes.iter().map(|(name, size)| format!("{name}={size}")).collect();
        let sizes = sizes.join(",");
        let at = if sizes.is_empty() { String::new() } else { format!(" --at {sizes}") };
        say(&format!("  {} ({} of the launches)", finding.what, finding.times))?;
        say(&format!(
            "    again: selfsup judge {} --case {}{at} --seed {}",
            as_word(kernel),
            as_word(case),
            finding.seed
        ))?;
    }
    Ok(())
}

/// What can be said of the speed without a GPU.
fn paper(
    of: &Footprint,
    compiled: &std::result::Result<Compiled, String>,
    chip: &Chip,
) -> Result<()> {
    let floor = of.bytes / chip.copy * 1e6;
    say(&format!(
        "fast, on paper ({}): {} blocks of {} threads; its tensors are {:.0} bytes, {floor:.3} us to move once",
        chip.name, of.blocks, of.threads, of.bytes
    ))?;
    match compiled {
        Ok(code) => {
            let shared = code.shared + of.shared as usize;
            let held = chip.blocks(of.threads as usize, code.registers, shared).max(1);
            let occupancy = (held * (of.threads as usize).div_ceil(32)) as f64 / 64.0;
            let waves = of.blocks as f64 / (held * chip.processors) as f64;
            say(&format!(
                "  {} registers, {} bytes of static shared memory, {} bytes spilled; occupancy {occupancy:.2}, {waves:.2} waves",
                code.registers, code.shared, code.spilled
            ))?;
            match &code.mix {
                Some(mix) => say(&format!(
                    "  hot loop: {} instructions: {} mma, {} ldmatrix, {} accesses of 16 bytes and {} smaller ones to global \
                     memory, {} to shared, {} to local memory",
                    mix.all,
                    mix.mma,
                    mix.ldmatrix,
                    mix.global_16,
                    mix.global,
                    mix.shared,
                    mix.local
                ))?,
                None => say("  cuobjdump next to nvcc would add the instructions of the hot loop")?,
            }
        }
        Err(why) => say(&format!(
            "  nvcc would add registers, spills, occupancy, waves and the hot loop ({why})"
        ))?,
    }
    say("  a GPU would add measured times; the judge does not measure yet")
}

fn tested(mutants: &[(cuda_on_host::judge::Mutant, Fate)]) -> Result<()> {
    let count = |wanted: fn(&Fate) -> bool| mutants.iter().filter(|(_, fate)| wanted(fate)).count();
    let killed = count(|fate| matches!(fate, Fate::Killed(_)));
    let survived = count(|fate| *fate == Fate::Survived);
    say(&format!(
        "tested: {killed} of {} mutants are noticed ({} more are no programs)",
        killed + survived,
        mutants.len() - killed - survived
    ))?;
    for (mutant, _) in mutants.iter().filter(|(_, fate)| *fate == Fate::Survived) {
        say(&format!("  not noticed: line {}: {}", mutant.line, mutant.what))?;
    }
    if survived == 0 {
        talk("every mutant is noticed");
    }
    Ok(())
}

/// Numbers that a primitive takes, by name.
pub(super) type Numbers = BTreeMap<String, f64>;

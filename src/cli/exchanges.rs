//! `inspect --ranks`: what a step exchanges between ranks, and what that costs by a model.

use serde::Serialize;

use super::args::Inspect;
use super::inspect::size;
use super::say;
use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::settings::bytes;
use crate::train::{self, Cluster, Exchange};

/// The parts of a step that exchange numbers.
const PHASES: [&str; 4] = ["forward pass", "loss", "backward pass", "gradients"];

/// What a step exchanges, and the seconds that it takes.
#[derive(Debug, Serialize)]
pub(super) struct Exchanges {
    cluster: Cluster,
    /// Images of a rank in a step.
    images: usize,
    exchanges: Vec<Priced>,
    /// Seconds of all exchanges of a step.
    seconds: f64,
    /// Seconds of all exchanges if batch norm's crossed only the ranks of a machine.
    with_norm_by_machine: f64,
    /// Seconds of a step without exchanges, if the speed of a rank is known.
    computing: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Priced {
    #[serde(flatten)]
    exchange: Exchange,
    phase: &'static str,
    seconds: f64,
}

/// Counts the exchanges that `--ranks` asks for.
///
/// # Errors
/// If so many ranks cannot train the recipe.
pub(super) fn exchanges(
    recipe: &Recipe,
    args: &Inspect,
    views: usize,
) -> Result<Option<Exchanges>> {
    let Some([machines, per_machine]) = args.ranks else { return Ok(None) };
    let (network, inside) = (args.network as f64, args.inside as f64);
    let cluster = Cluster { machines, per_machine, network, inside };
    if cluster.ranks() < 2 {
        return Err(Error::config("--ranks: one rank exchanges nothing"));
    }
    let priced = |exchange: Exchange| Priced {
        phase: phase(exchange.what),
        seconds: cluster.seconds(&exchange),
        exchange,
    };
    let exchanges: Vec<Priced> =
        train::exchanges(recipe, cluster.ranks())?.into_iter().map(priced).collect();
    let by_machine = |priced: &Priced| match is_norm(priced.exchange.what) {
        true => cluster.one_machine().seconds(&priced.exchange),
        false => priced.seconds,
    };
    let images = recipe.train.batch / cluster.ranks();
    Ok(Some(Exchanges {
        cluster,
        images,
        seconds: exchanges.iter().map(|priced| priced.seconds).sum(),
        with_norm_by_machine: exchanges.iter().map(by_machine).sum(),
        computing: args.speed.map(|speed| (images * views) as f64 / speed),
        exchanges,
    }))
}

fn is_norm(what: &str) -> bool {
    what.starts_with("batch norm's")
}

fn phase(what: &str) -> &'static str {
    match what {
        "batch norm's statistics" => PHASES[0],
        "batch norm's gradients" | "gradients of rows" => PHASES[2],
        "gradients" => PHASES[3],
        _ => PHASES[1],
    }
}

/// Prints the exchanges, and what they cost.
pub(super) fn print(all: &Exchanges) -> Result<()> {
    let Exchanges { cluster, images, exchanges, seconds, with_norm_by_machine, computing } = all;
    say(&format!(
        "exchanges of a step on {} ranks, {} machines of {} GPUs, {images} images each:",
        cluster.ranks(),
        cluster.machines,
        cluster.per_machine,
    ))?;
    for Priced { exchange: Exchange { what, gathers, calls, bytes }, phase, seconds } in exchanges {
        let kind = if *gathers { "gathered" } else { "reduced" };
        say(&format!(
            "  {what:26} {calls:5} {kind:8}  {:>10} of each rank  {:>9}  {phase}",
            size(*bytes as usize),
            milliseconds(*seconds)
        ))?;
    }
    let of_phase = |phase: &str| {
        let own = exchanges.iter().filter(|priced| priced.phase == phase);
        let share = own.map(|priced| priced.seconds).sum::<f64>() / seconds;
        format!("{phase} {:.0}%", 100.0 * share)
    };
    let shares = PHASES.map(of_phase).join(", ");
    say(&format!("all exchanges: {}: {shares}", milliseconds(*seconds)))?;
    let mut alternatives = vec![("", *seconds)];
    if cluster.machines > 1 && with_norm_by_machine < seconds {
        say(&format!(
            "with batch norm over the ranks of each machine only: {}",
            milliseconds(*with_norm_by_machine)
        ))?;
        alternatives.push((", with batch norm by machine", *with_norm_by_machine));
    }
    let Some(computing) = computing else { return Ok(()) };
    let scaling = |(what, exchanging): (&str, f64)| {
        format!("{:.1}%{what}", 100.0 * computing / (computing + exchanging))
    };
    let scaling: Vec<String> = alternatives.into_iter().map(scaling).collect();
    say(&format!(
        "of a rank's speed alone ({} a step) there remains {}",
        milliseconds(*computing),
        scaling.join("; ")
    ))
}

/// Reads `--ranks`.
pub(super) fn machines(text: &str) -> std::result::Result<[usize; 2], String> {
    let number = |text: &str| text.parse().ok().filter(|&number| number > 0);
    let parts = text.split_once('x').and_then(|(a, b)| Some([number(a)?, number(b)?]));
    parts.ok_or_else(|| "machines and GPUs of each, such as 8x8".into())
}

/// Reads bytes a second.
pub(super) fn rate(text: &str) -> std::result::Result<usize, String> {
    let size = text.strip_suffix("/s").ok_or("bytes a second, such as 47GB/s")?;
    bytes(size).and_then(|bytes| if bytes > 0 { Ok(bytes) } else { Err("more than 0".into()) })
}

/// Reads `--speed`.
pub(super) fn speed(text: &str) -> std::result::Result<f64, String> {
    let speed = text.parse().ok().filter(|speed: &f64| speed.is_finite() && *speed > 0.0);
    speed.ok_or_else(|| "a number above 0".into())
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1e3 * seconds)
}

//! `tune-lr`: a learning-rate range probe.

use clap::Args as Arguments;

use super::{device, say, talk};
use crate::error::Result;
use crate::recipes::Recipe;
use crate::train::{self, Tried};

#[derive(Debug, Arguments)]
pub(super) struct TuneLr {
    /// A recipe file, or the name of a built-in recipe
    recipe: String,
    /// Override a setting, such as data.path=photos; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps at each rate
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(10..=100_000))]
    steps: u64,
    /// The device: cpu, cuda or cuda:N [default: a GPU if there is one, else the CPU]
    #[arg(long, value_name = "DEVICE")]
    device: Option<device::Name>,
}

/// Columns of the bar of the best rate.
const BAR: f64 = 24.0;

pub(super) fn tune_lr(args: &TuneLr) -> Result<()> {
    let recipe = Recipe::load(&args.recipe, &args.set)?;
    let device = device::open_to_train(args.device, &recipe.train)?;
    let rates = train::FACTORS.len();
    talk(&format!(
        "{rates} short runs of about {} steps around optim.lr={}",
        args.steps, recipe.optim.lr
    ));
    let tried = train::tune(&recipe, &device, args.steps, &mut |tried| talk(&line(tried, None)))?;
    let best = tried.iter().filter_map(Tried::figure).fold(0.0, f64::max);
    tried.iter().try_for_each(|tried| say(&line(tried, Some(best))))?;
    let advice = train::advise(&tried);
    match advice.lr {
        Some(lr) => say(&format!("optim.lr={lr}: {}", advice.why)),
        None => say(&advice.why),
    }
}

/// A rate in figures; with the best figure of all, also as a bar.
fn line(tried: &Tried, best: Option<f64>) -> String {
    let mut line = format!("{:>8}  loss {:>7.3}", tried.lr, tried.loss);
    if let Some(spread) = tried.spread {
        line += &format!("  std {:.2}  rank {:>5.1}", spread.std, spread.effective_rank);
    }
    if let Some(quality) = &tried.quality {
        line += &format!("  RankMe {:>5.1}  LiDAR {:>5.1}", quality.rank_me, quality.lidar);
    }
    if let Some(knn) = tried.knn {
        line += &format!("  kNN {:>4.1}%", 100.0 * knn);
    }
    if let Some(failed) = &tried.failed {
        line += &format!("  {failed}");
    } else if let (Some(best), Some(figure)) = (best, tried.figure()) {
        line += &format!("  {}", "#".repeat((BAR * figure / best.max(1e-9)).round() as usize));
    }
    line
}

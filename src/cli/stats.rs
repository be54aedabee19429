//! `stats`: the mean and standard deviation of a set's channels.

use std::path::PathBuf;

use clap::Args as Arguments;
use serde_json::json;

use super::{say, talk};
use crate::data::{self, Split};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::{is_file, read_text, rewrite_file};
use crate::recipes::{self, Recipe};
use crate::train;

#[derive(Debug, Arguments)]
pub(super) struct Stats {
    /// A folder of images, as for data.path
    folder: PathBuf,
    /// Write the values into every [[augment]] table of this recipe file, whose data.channels and so on say how the images are read
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Read this many images, spread evenly over the training split; 0 for all
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    limit: usize,
    /// How the files are read: data.channels, data.bits, data.range, data.pages, data.axes
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "write")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn stats(args: &Stats) -> Result<()> {
    train::only_reading(&args.set)?;
    let name = args.write.as_ref().map(|file| file.display().to_string());
    let reading = match &name {
        Some(name) if recipes::builtin(name).is_some() && !PathBuf::from(name).exists() => {
            return Err(Error::Config(format!(
                "{name} is a built-in recipe: selfsup recipes {name} > my.toml makes a file of it"
            )));
        }
        Some(name) => Recipe::reading_of(name)?,
        None => train::own_reading(&args.folder, &args.set)?,
    };
    let source = data::open_as(&args.folder, Split::Train, &reading)?;
    let limit = if args.limit == 0 { source.len() } else { args.limit };
    let survey = data::survey(&*source, limit, &Device::cpu(0)?)?;
    let read = survey.looked_at - survey.broken.len();
    if let Some(first) = survey.broken.first() {
        let (broken, reason) = (survey.broken.len(), &first.reason);
        talk(&format!("{broken} images cannot be read and are left out; the first: {reason}"));
    }
    if read == 0 {
        return Err(Error::format(&args.folder, "none of its images can be read"));
    }
    // A set is not known more exactly, and a deviation of 0 would divide by it.
    let rounded = |v: f64| (1e4 * v).round() / 1e4;
    let mean: Vec<f64> = survey.mean.iter().map(|&v| rounded(v)).collect();
    let std: Vec<f64> = survey.std.iter().map(|&v| rounded(v.max(1e-3))).collect();
    if let (Some(file), Some(name)) = (&args.write, &name) {
        if is_file(&file.with_file_name("metrics.jsonl"))? {
            return Err(Error::format(
                file,
                "is the recipe of a run, whose weights were trained with it: copy it to another folder first",
            ));
        }
        let text = read_text(file, "a recipe (TOML)")?;
        let new = recipes::with_normalise(&text, name, &mean, &std)?;
        // TOML's writer ends lines as Unix does.
        let ends = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let new = new.replace("\r\n", "\n").replace('\n', ends);
        rewrite_file(file, new.as_bytes())?;
        talk(&format!("{name}: normalise set in every view"));
    }
    let images = source.len();
    talk(&format!("{read} of {images} images, {}", reading.format));
    if args.json {
        let range = reading.range;
        let of =
            json!({ "images": images, "read": read, "range": range, "mean": mean, "std": std });
        return say(&of.to_string());
    }
    let list = |numbers: &[f64]| numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
    say(&format!("normalise = {{ mean = [{}], std = [{}] }}", list(&mean), list(&std)))?;
    // The values above are of samples that were stretched from it.
    let Some(range) = reading.range else { return Ok(()) };
    say(&format!("range = [{}] # in [data], without which these are other values", list(&range)))
}

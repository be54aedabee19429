//! `pack`: packs a folder of images into a few large files.

use std::path::PathBuf;

use clap::Args as Arguments;
use indicatif::ProgressBar;

use super::output::{self, Kind};
use super::skipped::{LeftOut, share};
use super::{on_terminal, say, talk};
use crate::data::{self, LabelTable, PackSettings, Packed, Stored};
use crate::error::{Error, Result};
use crate::recipes::MAX_SKIPPED;
use crate::train;

#[derive(Debug, Arguments)]
pub(super) struct PackArgs {
    /// A folder of images, as for data.path
    folder: PathBuf,
    /// The folder to write; it must be empty or absent
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Shrink larger images so that their shorter side has this many pixels
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    size: Option<u32>,
    /// Store pixels instead of JPEG: larger files, but nothing to decode while training
    #[arg(long)]
    raw: bool,
    /// JPEG quality of shrunk images, 1 to 100
    #[arg(long, value_name = "Q", default_value_t = 95, conflicts_with = "raw", requires = "size",
        value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: u8,
    /// Start another file after this many MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    shard_mib: u32,
    /// Leave out at most this share of broken images; remove the pack if there are more
    #[arg(long, value_name = "SHARE", default_value_t = MAX_SKIPPED, value_parser = share)]
    max_skipped: f64,
    /// Take the classes from a table of files and classes (.csv, .tsv), as data.labels does
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// How the files are read: data.channels, data.bits, data.range, data.pages, data.axes
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(super) fn pack(args: &PackArgs) -> Result<()> {
    let stored = if args.raw { Stored::Raw } else { Stored::Files { quality: args.quality } };
    output::check_replaced(&list_of_skipped(args), Kind::LeftOut)?;
    train::only_reading(&args.set)?;
    let reading = train::pack_reading(&args.folder, &args.set)?;
    if !reading.is_rgb() {
        talk(&format!("images of {}, stored as samples", reading.format));
    }
    let settings = PackSettings {
        reading,
        labels: args.labels.as_deref().map(LabelTable::read).transpose()?,
        size: args.size.map(|size| size as usize),
        stored,
        file_bytes: u64::from(args.shard_mib) << 20,
    };
    // Packing uses rayon's own pool, which would panic if it could not be started.
    rayon::ThreadPoolBuilder::new()
        .build_global()
        .map_err(|e| Error::Device(format!("cannot start the threads: {e}")))?;
    let bar = on_terminal().then(|| ProgressBar::new(0));
    let progress = |done, total| {
        if let Some(bar) = &bar {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        }
    };
    // A pack that lacks too many images is never complete.
    let packed = data::pack_if(&args.folder, &args.out, &settings, progress, |packed| {
        bar.iter().for_each(ProgressBar::finish_and_clear);
        list_skipped(args, packed)
    });
    bar.iter().for_each(ProgressBar::finish_and_clear);
    let packed = packed?;
    talk(&format!(
        "{} images in {} files, {:.1} MiB",
        packed.images,
        packed.files.len(),
        packed.bytes as f64 / f64::from(1 << 20)
    ));
    packed.notes.iter().for_each(|note| talk(note));
    say(&args.out.display().to_string())
}

/// Counts, names and lists the images that are left out.
fn list_skipped(args: &PackArgs, packed: &Packed) -> Result<()> {
    let all = packed.images + packed.skipped.len();
    LeftOut::new(list_of_skipped(args), args.max_skipped).add("source", all, &packed.skipped)
}

/// The file that lists them: next to the folder, which has to be empty for another attempt.
fn list_of_skipped(args: &PackArgs) -> PathBuf {
    let mut list = args.out.components().collect::<PathBuf>().into_os_string();
    list.push(".skipped.txt");
    list.into()
}

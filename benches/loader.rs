//! Times the loader on request, for `benches/peers/loader.py`, which compares it with those of others.
//!
//! Each line on stdin is a request, `32 FOLDER SECONDS THREADS` or `112 FOLDER SECONDS THREADS`; the answer on stdout is a line with
//! the number of views, the seconds, and the CPU seconds of all threads. A pipeline stays open between requests, as the peer's does.
//!
//! `read PATH THREADS` opens the training split of a data set and reads every image once: the answer is the number of images, the
//! seconds to open the set, and the seconds to read and decode the images.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use selfsup::data::augment::{Blur, BlurKind, Jitter, Normalise};
use selfsup::data::{self, Folder, Image, Loader, Policy, Source, Split};
use selfsup::device::Device;

const BATCH: usize = 256;

/// Batches that may be prepared before the clock starts; they are not counted.
const AHEAD: usize = 3;

fn jitter(strength: f32) -> Option<Jitter> {
    let (strong, hue) = (0.8 * strength, 0.2 * strength);
    Some(Jitter {
        p: 0.8,
        brightness: strong,
        contrast: strong,
        saturation: strong,
        hue,
        additive_brightness: false,
        per_channel: false,
    })
}

/// The same pipelines as `benches/peers/loader_peers.py` builds from torchvision's transforms.
fn policy(size: usize) -> Policy {
    let (mean, std) = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]);
    let blur = Blur { p: 0.5, sigma: [0.1, 2.0], kind: BlurKind::Gaussian };
    let small = size == 32;
    Policy {
        flip: 0.5,
        jitter: jitter(if small { 0.5 } else { 1.0 }),
        grey: 0.2,
        blur: (!small).then_some(blur),
        normalise: Some(Normalise { mean: mean.into(), std: std.into() }),
        ..Policy::crop(size)
    }
}

/// Small images are held decoded in memory; others are read from their files each time.
fn open(size: usize, folder: &str, threads: usize) -> Loader {
    let folder = Folder::open(Path::new(folder)).expect("a folder of images");
    let folder = if size == 32 { folder } else { folder.with_cache(0) };
    if size == 32 {
        let mut image = Image::default();
        (0..folder.len()).for_each(|i| folder.read(i, &mut image).expect("an intact image"));
    }
    let device = Device::cpu(1).expect("a thread");
    let policies = vec![policy(size); 2];
    Loader::new(Arc::new(folder), policies, BATCH, 1, threads, &device).expect("a loader")
}

/// CPU seconds of this process, with a resolution of 1/100 s.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks =
        after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

fn measure(loader: &mut Loader, seconds: f64) -> (usize, f64, f64) {
    (0..AHEAD).for_each(|_| drop(loader.next_batch().expect("a batch")));
    let (start, cpu, mut views) = (Instant::now(), cpu_seconds(), 0);
    while start.elapsed().as_secs_f64() < seconds {
        views += loader.next_batch().expect("a batch").indices.len() * loader.views();
    }
    (views, start.elapsed().as_secs_f64(), cpu_seconds() - cpu)
}

/// Opens a data set and reads it once.
fn read(path: &str, threads: usize) -> (usize, f64, f64) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let start = Instant::now();
    let set = data::open(Path::new(path), Split::Train).expect("a set of images");
    let opened = start.elapsed().as_secs_f64();
    let read = |image: &mut Image, i| set.read(i, image).expect("an intact image");
    pool.install(|| (0..set.len()).into_par_iter().for_each_init(Image::default, read));
    (set.len(), opened, start.elapsed().as_secs_f64() - opened)
}

fn main() {
    let mut loaders: HashMap<String, Loader> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("stdin");
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["read", path, threads] = words[..] {
            let (images, opened, reading) = read(path, threads.parse().expect("threads"));
            println!("{images} {opened} {reading}");
            std::io::stdout().flush().expect("stdout");
        }
        let [size, folder, seconds, threads] = words[..] else { continue };
        let size = size.parse().expect("32 or 112");
        let threads = threads.parse().expect("a number of threads");
        let loader = loaders.entry(line.clone()).or_insert_with(|| open(size, folder, threads));
        let (views, wall, cpu) = measure(loader, seconds.parse().expect("seconds"));
        println!("{views} {wall} {cpu}");
        std::io::stdout().flush().expect("stdout");
    }
}

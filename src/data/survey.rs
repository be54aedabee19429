//! Looks at a set of images before a run is planned: sizes, colours, copies, what cannot be read.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;

use super::batch::Skipped;
use super::source::{Format, Image, Source};
use crate::device::Device;
use crate::error::Result;

/// What a look at a set has found.
#[derive(Clone, Debug, PartialEq)]
pub struct Survey {
    /// Images in the set.
    pub images: usize,
    /// Images that were read: all, or some of a large set, spread evenly over it.
    pub looked_at: usize,
    /// Those of them that cannot be read.
    pub broken: Vec<Skipped>,
    /// Shorter sides in pixels: least, median, largest.
    pub sides: [usize; 3],
    /// Images without colour: their three channels of 8 bits are equal.
    pub grey: usize,
    /// Images whose pixels are those of an earlier one.
    pub copies: usize,
    /// Mean number of pixels of an image.
    pub pixels: f64,
    /// Mean of each channel, in `0..=1`.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel over all pixels, in `0..=1`.
    pub std: Vec<f64>,
}

/// One image, as far as the survey needs it.
struct Seen {
    side: usize,
    pixels: usize,
    grey: bool,
    /// Of size and pixels: two of 64 bits differ by chance in all sets that fit on a disk.
    hash: u64,
    /// Of each channel, in units of the samples.
    sums: Vec<u64>,
    squares: Vec<u64>,
}

impl Seen {
    fn of(image: &Image) -> Self {
        let mut hasher = DefaultHasher::new();
        ([image.width, image.height], &image.pixels).hash(&mut hasher);
        let Format { channels, bits } = image.format;
        let (mut sums, mut squares) = (vec![0; channels], vec![0; channels]);
        let mut grey = image.format == Format::RGB;
        for pixel in image.pixels.chunks_exact(image.format.bytes()) {
            grey = grey && pixel[0] == pixel[1] && pixel[1] == pixel[2];
            for (c, sample) in pixel.chunks_exact(bits / 8).enumerate() {
                let high = sample.get(1).map_or(0, |&byte| u64::from(byte));
                let value = u64::from(sample[0]) | high << 8;
                sums[c] += value;
                squares[c] += value * value;
            }
        }
        Self {
            side: image.width.min(image.height),
            pixels: image.width * image.height,
            grey,
            hash: hasher.finish(),
            sums,
            squares,
        }
    }
}

/// Reads at most `limit` images of a set, spread evenly over it, on a device's host threads.
///
/// # Errors
/// If an image cannot be read for another reason than that it is broken.
///
/// # Panics
/// If `limit` is 0.
pub fn survey(source: &dyn Source, limit: usize, device: &Device) -> Result<Survey> {
    assert!(limit > 0, "survey: a limit of 0 images");
    let (images, looked_at) = (source.len(), source.len().min(limit));
    let look = |image: &mut Image, i: usize| {
        let index = i * images / looked_at;
        match source.read(index, image) {
            Ok(()) => Ok(Ok(Seen::of(image))),
            Err(error) => Skipped::new(index, error).map(Err),
        }
    };
    let all: Vec<Result<Seen, Skipped>> = device.run(|| {
        (0..looked_at).into_par_iter().map_init(Image::default, look).collect::<Result<_>>()
    })?;
    let (mut seen, mut broken) = (Vec::new(), Vec::new());
    for one in all {
        match one {
            Ok(one) => seen.push(one),
            Err(skipped) => broken.push(skipped),
        }
    }
    let mut times: HashMap<u64, usize> = HashMap::new();
    seen.iter().for_each(|one| *times.entry(one.hash).or_default() += 1);
    let mut sides: Vec<usize> = seen.iter().map(|one| one.side).collect();
    sides.sort_unstable();
    let side = |at: usize| sides.get(at).copied().unwrap_or(0);
    let pixels: usize = seen.iter().map(|one| one.pixels).sum();
    let count = pixels.max(1) as f64;
    let Format { channels, bits } = source.format();
    let most = ((1 << bits) - 1) as f64;
    let mut mean = vec![0.0; channels];
    let mut square = vec![0.0; channels];
    for one in &seen {
        for c in 0..channels {
            mean[c] += one.sums[c] as f64 / count / most;
            square[c] += one.squares[c] as f64 / count / (most * most);
        }
    }
    let std = (0..channels).map(|c| (square[c] - mean[c] * mean[c]).max(0.0).sqrt()).collect();
    Ok(Survey {
        images,
        looked_at,
        broken,
        sides: [side(0), side(sides.len() / 2), side(sides.len().saturating_sub(1))],
        grey: seen.iter().filter(|one| one.grey).count(),
        copies: times.values().map(|times| times - 1).sum(),
        pixels: pixels as f64 / seen.len().max(1) as f64,
        mean,
        std,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Folder;

    #[test]
    fn a_survey_counts_sizes_colours_copies_and_broken_images() {
        let root = tempfile::tempdir().unwrap();
        let save = |name: &str, width: u32, height: u32, pixel: [u8; 3]| {
            let image = image::RgbImage::from_pixel(width, height, image::Rgb(pixel));
            image.save(root.path().join(name)).unwrap();
        };
        save("a.png", 4, 8, [0, 0, 0]);
        save("b.png", 8, 4, [255, 255, 255]); // not a copy: neither its size nor its pixels
        save("c.png", 4, 8, [0, 0, 0]);
        save("d.png", 16, 16, [255, 0, 0]);
        std::fs::write(root.path().join("e.png"), "broken").unwrap();
        let set = Folder::open(root.path()).unwrap();
        let all = survey(&set, 100, &Device::cpu(2).unwrap()).unwrap();
        assert_eq!((all.images, all.looked_at, all.grey, all.copies), (5, 5, 3, 1));
        assert_eq!((all.sides, all.pixels), ([4, 4, 16], 88.0));
        assert_eq!(all.broken.len(), 1);
        assert!(all.broken[0].reason.contains("e.png"), "{:?}", all.broken);
        // 32 white pixels and 256 red ones of 352.
        let share = [288.0 / 352.0, 32.0 / 352.0, 32.0 / 352.0];
        for ((mean, std), share) in all.mean.iter().zip(&all.std).zip(share) {
            assert!((mean - share).abs() < 1e-12, "{all:?}");
            assert!((std - (share * (1.0 - share)).sqrt()).abs() < 1e-12, "{all:?}");
        }
        assert_eq!(survey(&set, 2, &Device::cpu(1).unwrap()).unwrap().looked_at, 2);
    }
}

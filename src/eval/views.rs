//! Measures the features of augmented views: which images are told apart, what the views leave to match by, and what the features
//! still know of the augmentation. None of it needs labels.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rank::{lidar, rank_me};
use super::spectrum::{cholesky, gram, solve_lower, solve_upper};
use crate::arena::Arena;
use crate::data::augment::{Params, Scratch};
use crate::data::{Image, Policy, Skipped, Source, Subset};
use crate::device::{DeviceKind, Philox, Purpose};
use crate::error::Result;
use crate::eval::features::features_of;
use crate::nn::ResNet;
use crate::tape::evaluate;
use crate::tensor::{DType, Tensor};

/// Images whose views are measured.
pub const IMAGES: usize = 256;
/// Views of each of them.
pub const VIEWS: usize = 8;

/// Images whose features have their rank measured.
pub(crate) const RANKED: usize = 1024;

/// The epoch under which the random numbers of these views are drawn: none that a run reaches.
const EPOCH: u32 = u32::MAX;

/// Features above which the regression onto the augmentation's parameters would take too long.
const MOST_FEATURES: usize = 1024;

/// What crosses the ranks of an evaluation.
pub(crate) const FEATURES: &str = "features";

/// What a backbone's features are worth, measured without labels. Shares are in `0..=1`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Images whose views were compared, and features of each: with few of either, ranks are low and views are matched by chance.
    pub compared: [usize; 2],
    /// [`rank_me`] of the features of up to 1,024 images.
    pub rank_me: f64,
    /// [`lidar`] of the features of [`VIEWS`] views of up to [`IMAGES`] images.
    pub lidar: f64,
    /// The mean squared distance of the centred unit features of two views of one image (Wang and Isola 2020, alpha = 2): 0 if all
    /// views agree, 2 if they have nothing in common.
    pub alignment: f64,
    /// `ln` of the mean of `exp(-2 |x - y|^2)` over views of different images: lower is more evenly spread (t = 2).
    pub uniformity: f64,
    /// The share of images whose view is nearest to another view of itself, among one view of each.
    pub matched: f64,
    /// The same by the views' mean colours and contrasts alone: what can be matched without seeing a shape.
    pub matched_by_colour: f64,
    /// The same by the pixels of the views.
    pub matched_by_pixels: f64,
    /// The share of the variance of the place and size of the crop that the features predict linearly, on other images; `None` if it
    /// does not vary.
    pub knows_crop: Option<f64>,
    /// The same of the colour jitter's parameters.
    pub knows_colour: Option<f64>,
}

/// Measures features on images of `source`, the training images, spread evenly. Every view has the first policy's size; the policies of
/// that size take turns. Images that cannot be read are left out. `None` if fewer than two can be read.
///
/// The ranks of a run, which all call this, each compute a share of the features and return the same.
///
/// # Errors
/// On all ranks if on one: if reading fails for another reason than broken images, features are NaN or infinite, or the device fails.
pub fn quality(
    arena: &Arena,
    backbone: &ResNet,
    source: &Arc<dyn Source>,
    policies: &[Policy],
    seed: u64,
) -> Result<Option<Quality>> {
    let d = backbone.features();
    let group = arena.group();
    let ranked = Subset::spread(source.clone(), RANKED);
    let share = group.share(ranked.len());
    let own = group.together(features_of(arena, backbone, &ranked, share, &policies[0]))?;
    let clean = group.all_gather_rows(FEATURES, own);
    if clean.len() < 2 * d {
        return Ok(None);
    }
    let of_size: Vec<&Policy> =
        policies.iter().filter(|policy| policy.size == policies[0].size).collect();
    let device = arena.device();
    let views = group.together(device.run(|| Views::make(source, &of_size, seed)))?;
    let n = views.params.len() / VIEWS;
    if n < 2 {
        return Ok(None);
    }
    let own = group.together(views.features(arena, backbone, policies[0].size))?;
    let features = group.all_gather_rows(FEATURES, own);
    group.check()?;
    Ok(Some(views.measured(&features, d, rank_me(&clean, d))))
}

/// Views of some images, on the host.
struct Views {
    /// Image after image, [`VIEWS`] of each.
    params: Vec<Params>,
    /// Width and height of the image of each view.
    sizes: Vec<[usize; 2]>,
    /// `[n * VIEWS, size, size, channels]`.
    pixels: Vec<f32>,
    /// Channels of the images, and with the padding.
    channels: [usize; 2],
}

impl Views {
    fn make(source: &Arc<dyn Source>, policies: &[&Policy], seed: u64) -> Result<Self> {
        let count = source.len().min(IMAGES);
        let format = source.format();
        let channels = [format.channels, format.device_channels()];
        let row = policies[0].size * policies[0].size * channels[1];
        let make = |(image, scratch): &mut (Image, Scratch), i: usize| -> Result<Option<_>> {
            let index = i * source.len() / count;
            if let Err(error) = source.read(index, image) {
                return Skipped::new(index, error).map(|_| None);
            }
            let mut pixels = vec![0.0; VIEWS * row];
            let mut params = Vec::with_capacity(VIEWS);
            for (view, out) in pixels.chunks_exact_mut(row).enumerate() {
                let policy = policies[view % policies.len()];
                let stream = (i * VIEWS + view) as u32;
                let mut rng = Philox::new(seed, Purpose::Augmentation, EPOCH, stream);
                let drawn = policy.draw(&mut rng, image.width, image.height);
                policy.apply(&drawn, image, out, scratch);
                params.push(drawn);
            }
            Ok(Some((params, [image.width, image.height], pixels)))
        };
        let made: Vec<Option<_>> = (0..count)
            .into_par_iter()
            .map_init(<(Image, Scratch)>::default, make)
            .collect::<Result<_>>()?;
        let mut all = Self { params: Vec::new(), sizes: Vec::new(), pixels: Vec::new(), channels };
        for (params, size, pixels) in made.into_iter().flatten() {
            all.params.extend(params);
            all.sizes.extend([size; VIEWS]);
            all.pixels.extend(pixels);
        }
        Ok(all)
    }

    /// The features of this rank's share of the images, `[images * VIEWS, d]`.
    fn features(&self, arena: &Arena, backbone: &ResNet, size: usize) -> Result<Vec<f32>> {
        let (device, channels) = (arena.device(), self.channels[1]);
        let row = size * size * channels;
        let share = arena.group().share(self.params.len() / VIEWS);
        let mut features = Vec::with_capacity(share.len() * VIEWS * backbone.features());
        let own = &self.pixels[share.start * VIEWS * row..share.end * VIEWS * row];
        for rows in own.chunks(256 * row) {
            let pixels: Vec<f64> = rows.iter().map(|&v| f64::from(v)).collect();
            let shape = [rows.len() / row, size, size, channels];
            let images = Tensor::from_f64(device, shape, &pixels);
            // Crops are f32 on a processor, and activations on a GPU.
            let on_gpu = device.kind() == DeviceKind::Cuda;
            let dtype = if on_gpu { DType::of_activations(device) } else { images.dtype() };
            let images = images.cast(dtype);
            let found = evaluate(arena, |tape| backbone.forward(&tape.input(&images)))?;
            features.extend(found.to_f64().iter().map(|&v| v as f32));
            device.check()?;
        }
        Ok(features)
    }

    fn measured(&self, features: &[f32], d: usize, rank_me: f64) -> Quality {
        let n = self.params.len() / VIEWS;
        let unit = centred_unit_rows(features, d);
        let view = |i: usize, v: usize| &unit[(i * VIEWS + v) * d..][..d];
        let apart =
            |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum() };
        let alignment = (0..n).map(|i| apart(view(i, 0), view(i, 1))).sum::<f64>() / n as f64;
        let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
        let near: f64 = pairs.map(|(i, j)| (-2.0 * apart(view(i, 0), view(j, 0))).exp()).sum();
        let row = self.pixels.len() / self.params.len();
        let colours = |view| colours(view, self.channels);
        let colours: Vec<f32> = self.pixels.chunks_exact(row).flat_map(colours).collect();
        let count = 2 * self.channels[0];
        Quality {
            compared: [n, d],
            rank_me,
            lidar: lidar(features, d, VIEWS),
            alignment,
            uniformity: (near / (n * (n - 1) / 2) as f64).ln(),
            matched: matched(&unit, d),
            matched_by_colour: matched(&standardised(&colours, count), count),
            matched_by_pixels: matched(&centred_unit_rows(&self.pixels, row), row),
            knows_crop: self.known(&unit, d, &self.crops()),
            knows_colour: self.known(&unit, d, &self.jitters()),
        }
    }

    /// Centre and logarithm of the size of each view's crop, in shares of the image.
    fn crops(&self) -> Vec<Vec<f64>> {
        let crop = |(params, [width, height]): (&Params, &[usize; 2])| {
            let (w, h, c) = (*width as f64, *height as f64, params.crop);
            vec![
                (c.left as f64 + c.width as f64 / 2.0) / w,
                (c.top as f64 + c.height as f64 / 2.0) / h,
                ((c.width * c.height) as f64 / (w * h)).ln(),
            ]
        };
        self.params.iter().zip(&self.sizes).map(crop).collect()
    }

    /// Brightness, contrast, saturation, hue and greyness of each view.
    fn jitters(&self) -> Vec<Vec<f64>> {
        let jitter = |params: &Params| {
            let [b, c, s, h] = params.jitter.as_ref().map_or([1.0, 1.0, 1.0, 0.0], |jitter| {
                [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
            });
            let grey = f64::from(u8::from(params.grey));
            vec![f64::from(b), f64::from(c), f64::from(s), f64::from(h), grey]
        };
        self.params.iter().map(jitter).collect()
    }

    /// The share of the variance of targets that a ridge regression from features explains: it learns on the views of every other
    /// image and is measured on the rest.
    fn known(&self, unit: &[f64], d: usize, targets: &[Vec<f64>]) -> Option<f64> {
        if d > MOST_FEATURES {
            return None;
        }
        let split = |odd: bool| (0..targets.len()).filter(move |row| (row / VIEWS % 2 == 1) == odd);
        let x: Vec<f64> = split(false).flat_map(|row| unit[row * d..][..d].to_vec()).collect();
        let mut factor = gram(&x, d);
        let rows = split(false).count();
        // Unit rows: each feature has a variance of about 1 / d.
        (0..d).for_each(|i| factor[i * d + i] += 0.1 * rows as f64 / d as f64);
        if !cholesky(&mut factor, d) {
            return None;
        }
        let (mut unexplained, mut all) = (0.0, 0.0);
        let count = targets.first().map_or(0, Vec::len);
        for target in 0..count {
            let column: Vec<f64> = targets.iter().map(|row| row[target]).collect();
            let mean = split(false).map(|row| column[row]).sum::<f64>() / rows as f64;
            let variance =
                split(false).map(|row| (column[row] - mean).powi(2)).sum::<f64>() / rows as f64;
            if variance < 1e-9 {
                continue; // this policy does not change it
            }
            let mut weights = vec![0.0; d];
            for row in split(false) {
                let above = column[row] - mean;
                weights.iter_mut().zip(&unit[row * d..]).for_each(|(w, x)| *w += x * above);
            }
            solve_lower(&factor, d, &mut weights);
            solve_upper(&factor, d, &mut weights);
            for row in split(true) {
                let said: f64 = weights.iter().zip(&unit[row * d..]).map(|(w, x)| w * x).sum();
                // Each target counts alike.
                unexplained += (column[row] - mean - said).powi(2) / variance;
                all += (column[row] - mean).powi(2) / variance;
            }
        }
        (all > 0.0).then(|| (1.0 - unexplained / all).max(0.0))
    }
}

/// Means and then deviations of the channels of a view.
fn colours(view: &[f32], [channels, padded]: [usize; 2]) -> Vec<f32> {
    let n = (view.len() / padded) as f32;
    let (mut sums, mut squares) = (vec![0.0; channels], vec![0.0; channels]);
    for pixel in view.chunks_exact(padded) {
        for (c, &value) in pixel[..channels].iter().enumerate() {
            sums[c] += value;
            squares[c] += value * value;
        }
    }
    let mean = |c: usize| sums[c] / n;
    let deviation = |c: usize| (squares[c] / n - mean(c).powi(2)).max(0.0).sqrt();
    (0..channels).map(mean).chain((0..channels).map(deviation)).collect()
}

/// Rows of length 1 after the mean row was subtracted; a row of zeros stays one.
fn centred_unit_rows(rows: &[f32], d: usize) -> Vec<f64> {
    let mut rows = standardised_by(rows, d, |_| 1.0);
    for row in rows.chunks_exact_mut(d) {
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
        row.iter_mut().for_each(|v| *v /= norm);
    }
    rows
}

/// Rows whose columns have mean 0 and deviation 1.
fn standardised(rows: &[f32], d: usize) -> Vec<f64> {
    standardised_by(rows, d, |variance| variance.sqrt().max(1e-12))
}

fn standardised_by(rows: &[f32], d: usize, by: impl Fn(f64) -> f64) -> Vec<f64> {
    let n = (rows.len() / d).max(1) as f64;
    let (mut means, mut squares) = (vec![0.0; d], vec![0.0; d]);
    for row in rows.chunks_exact(d) {
        for (j, &v) in row.iter().enumerate() {
            means[j] += f64::from(v) / n;
            squares[j] += f64::from(v).powi(2) / n;
        }
    }
    let scale: Vec<f64> =
        means.iter().zip(&squares).map(|(m, s)| by((s - m * m).max(0.0))).collect();
    rows.iter().enumerate().map(|(i, &v)| (f64::from(v) - means[i % d]) / scale[i % d]).collect()
}

/// The share of images whose first view is nearer to their second than to any other image's second.
fn matched(rows: &[f64], d: usize) -> f64 {
    let n = rows.len() / (d * VIEWS);
    let view = |i: usize, v: usize| &rows[(i * VIEWS + v) * d..][..d];
    let apart = |i: usize, j: usize| -> f64 {
        view(i, 0).iter().zip(view(j, 1)).map(|(a, b)| (a - b).powi(2)).sum()
    };
    // A tie is no match: all views alike must not count as all matched.
    let right = |i: &usize| (0..n).all(|j| j == *i || apart(*i, *i) < apart(*i, j));
    (0..n).filter(right).count() as f64 / n as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Layout;
    use crate::data::{Split, fashion_scattered};
    use crate::device::Device;
    use crate::nn::{ResNetConfig, Stem};

    fn measured(policy: &Policy, scale: f64) -> Quality {
        let mut layout = Layout::new();
        let mut config = ResNetConfig::named("resnet18").unwrap();
        (config.width, config.stem) = (4, Stem::Small);
        let backbone = ResNet::new(&mut layout, "backbone.", &config);
        let device = Device::cpu(2).unwrap();
        let mut arena = Arena::new(&Arc::new(layout), &device, 1);
        let values: Vec<f64> = arena.values().to_f64().iter().map(|v| v * scale).collect();
        *arena.values_mut() = Tensor::from_f64(&device, [values.len()], &values);
        let set = Subset::first(Arc::new(fashion_scattered(Split::Test)), 60);
        let set: Arc<dyn Source> = Arc::new(set);
        quality(&arena, &backbone, &set, std::slice::from_ref(policy), 1).unwrap().unwrap()
    }

    #[test]
    fn equal_views_are_matched_whole_and_a_dead_network_matches_none() {
        let same = Policy { area: [1.0, 1.0], aspect: [1.0, 1.0], ..Policy::crop(16) };
        let all = measured(&same, 1.0);
        assert_eq!((all.matched, all.matched_by_pixels), (1.0, 1.0), "{all:?}");
        assert!(all.alignment < 1e-9 && all.knows_crop.is_none() && all.knows_colour.is_none());
        assert!((1.0..=60.0).contains(&all.rank_me) && all.lidar > 1.0, "{all:?}");
        let dead = measured(&same, 0.0);
        assert_eq!((dead.matched, dead.rank_me), (0.0, 0.0), "{dead:?}");
        let crops = measured(&Policy { flip: 0.5, ..Policy::crop(16) }, 1.0);
        assert!(crops.alignment > 0.1 && crops.matched < 0.9, "{crops:?}");
        assert!(crops.knows_crop.is_some() && crops.knows_colour.is_none(), "{crops:?}");
    }

    #[test]
    fn a_linear_trace_of_the_crop_is_found() {
        let policy = Policy { area: [0.1, 1.0], ..Policy::crop(8) };
        let set: Arc<dyn Source> = Arc::new(fashion_scattered(Split::Test));
        let views = Views::make(&set, &[&policy], 1).unwrap();
        let crops = views.crops();
        let traces: Vec<f32> =
            crops.iter().flat_map(|c| [c[0] as f32, c[1] as f32, c[2] as f32, 0.5]).collect();
        let known = views.known(&standardised(&traces, 4), 4, &crops).unwrap();
        assert!(known > 0.9, "{known}");
        let nothing: Vec<f32> = (0..traces.len()).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
        assert!(views.known(&standardised(&nothing, 4), 4, &crops).unwrap() < 0.1);
    }
}

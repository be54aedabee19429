//! Draws the parameters of one view.
//!
//! Every number is drawn whether it is used or not, in one order, and the crop, which alone needs a varying number of
//! draws, comes last: a change of one probability or range leaves all other numbers as they were.

use super::policy::{Policy, Sampler};
use crate::device::Philox;

/// Attempts to draw a crop before the centre is used instead (torchvision's `RandomResizedCrop`).
const CROP_TRIES: usize = 10;

/// Attempts of TensorFlow's sampler, and the share of the image that a crop must cover (google-research/simclr, `data_util.py`).
const BOX_TRIES: usize = 100;
const COVERED: f32 = 0.1;

/// The parameters of one view.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// The crop in the image.
    pub crop: CropBox,
    /// Whether it is mirrored.
    pub flip: bool,
    /// Colour jitter; `None` leaves the colours as they are.
    pub jitter: Option<JitterParams>,
    /// Whether it is converted to grey.
    pub grey: bool,
    /// Standard deviation of the blur in pixels of the crop; `None` does not blur.
    pub blur: Option<f32>,
    /// Whether bright values are inverted.
    pub solarise: bool,
    /// What only float pixels have; `None` if the policy has none of it.
    pub channels: Option<ChannelParams>,
}

/// The parameters of the operations on channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChannelParams {
    /// Which channel becomes zero, as a share of their number in `0..1`; `None` drops none.
    pub drop: Option<f32>,
    /// Standard deviation of the noise; `None` adds none.
    pub noise: Option<f32>,
    /// The key of the random numbers of each channel and sample.
    pub key: [u32; 2],
}

/// A rectangle in an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First column.
    pub left: usize,
    /// First row.
    pub top: usize,
    /// Columns, at least 1.
    pub width: usize,
    /// Rows, at least 1.
    pub height: usize,
}

/// The parameters of a colour jitter.
#[derive(Clone, Debug, PartialEq)]
pub struct JitterParams {
    /// The four operations in the order in which they are applied.
    pub order: [ColourOp; 4],
    /// A factor, or the summand with `additive_brightness`.
    pub brightness: f32,
    /// A factor.
    pub contrast: f32,
    /// A factor.
    pub saturation: f32,
    /// A rotation of the colour circle, in `-0.5..=0.5`.
    pub hue: f32,
}

/// An operation of a colour jitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // their names say it
pub enum ColourOp {
    Brightness,
    Contrast,
    Saturation,
    Hue,
}

impl Policy {
    /// Draws the parameters of one view of an image of `width` x `height` pixels (both at least 1).
    pub fn draw(&self, rng: &mut Philox, width: usize, height: usize) -> Params {
        let flip = rng.chance(self.flip);
        let jitter = self.draw_jitter(rng);
        let grey = rng.chance(self.grey);
        let (blur, sigma) = (rng.uniform(), rng.uniform());
        let blur = self.blur.as_ref().filter(|b| blur < b.p).map(|b| {
            let [low, high] = b.sigma;
            low + (high - low) * sigma
        });
        let solarise = rng.uniform();
        let solarise = self.solarise.as_ref().is_some_and(|s| solarise < s.p);
        let crop = match self.sampler {
            Sampler::Torchvision => self.draw_crop(rng, width, height),
            Sampler::Tensorflow => self.draw_distorted_box(rng, width, height),
            Sampler::Clamped => self.draw_clamped_box(rng, width, height),
        };
        // After the crop, so that what a policy without them draws is what it always was.
        let channels = self.has_channel_operations().then(|| self.draw_channels(rng));
        Params { crop, flip, jitter, grey, blur, solarise, channels }
    }

    fn draw_channels(&self, rng: &mut Philox) -> ChannelParams {
        let unit: [f32; 4] = std::array::from_fn(|_| rng.uniform());
        let key = [rng.next_u32(), rng.next_u32()];
        let noise = self.noise.as_ref().filter(|noise| unit[2] < noise.p).map(|noise| {
            let [low, high] = noise.std;
            low + (high - low) * unit[3]
        });
        ChannelParams { drop: (unit[0] < self.channel_drop).then_some(unit[1]), noise, key }
    }

    fn draw_jitter(&self, rng: &mut Philox) -> Option<JitterParams> {
        let happens = rng.uniform();
        let mut rank = (rng.uniform() * 24.0) as usize; // of the 4! orders
        let unit: [f32; 4] = std::array::from_fn(|_| rng.uniform());
        let jitter = self.jitter.as_ref().filter(|jitter| happens < jitter.p)?;
        use ColourOp::*;
        let mut order = [Brightness, Contrast, Saturation, Hue];
        for place in 0..3 {
            let choices = 4 - place;
            order[place..=place + rank % choices].rotate_right(1);
            rank /= choices;
        }
        let within = |low: f32, high: f32, unit: f32| low + (high - low) * unit;
        let factor = |range: f32, unit: f32| within((1.0 - range).max(0.0), 1.0 + range, unit);
        Some(JitterParams {
            order,
            brightness: if jitter.additive_brightness {
                within(-jitter.brightness, jitter.brightness, unit[0])
            } else {
                factor(jitter.brightness, unit[0])
            },
            contrast: factor(jitter.contrast, unit[1]),
            saturation: factor(jitter.saturation, unit[2]),
            hue: within(-jitter.hue, jitter.hue, unit[3]),
        })
    }

    fn draw_crop(&self, rng: &mut Philox, width: usize, height: usize) -> CropBox {
        let (across, down) = (f64::from(rng.uniform()), f64::from(rng.uniform()));
        let (area, log_aspect) = (self.area.map(f64::from), self.aspect.map(|a| f64::from(a).ln()));
        let within = |[low, high]: [f64; 2], unit: f32| low + (high - low) * f64::from(unit);
        for _ in 0..CROP_TRIES {
            let pixels = (width * height) as f64 * within(area, rng.uniform());
            let aspect = within(log_aspect, rng.uniform()).exp();
            // Rounds ties to even, as Python.
            let w = (pixels * aspect).sqrt().round_ties_even() as usize;
            let h = (pixels / aspect).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                return CropBox {
                    left: (across * (width - w + 1) as f64) as usize,
                    top: (down * (height - h + 1) as f64) as usize,
                    width: w,
                    height: h,
                };
            }
        }
        self.fallback_crop(width, height)
    }

    /// Draws as `tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc` does for a bounding box of the whole image.
    fn draw_distorted_box(&self, rng: &mut Philox, width: usize, height: usize) -> CropBox {
        let pixels = (width * height) as f32;
        let [narrow, wide] = self.aspect;
        for _ in 0..BOX_TRIES {
            let aspect = narrow + (wide - narrow) * rng.uniform();
            let Some([w, h]) = self.distorted_sides(rng, aspect, [width, height]) else { continue };
            // The last place is never drawn: the reference takes a number below the difference.
            let mut place = |room: usize| (rng.uniform() * room as f32) as usize;
            let (top, left) = (place(height - h), place(width - w));
            if (w * h) as f32 / pixels >= COVERED {
                return CropBox { left, top, width: w, height: h };
            }
        }
        CropBox { left: 0, top: 0, width, height }
    }

    /// Returns width and height of a box of an aspect, the height uniform; `None` if it would leave the image or the range of areas.
    fn distorted_sides(
        &self,
        rng: &mut Philox,
        aspect: f32,
        image: [usize; 2],
    ) -> Option<[usize; 2]> {
        let [width, height] = image;
        let [least, most] = self.area.map(|share| share * (width * height) as f32);
        let width_of = |h: usize| (h as f32 * aspect).round_ties_even() as usize;
        let height_of = |area: f32| (area / aspect).sqrt().round_ties_even() as usize;
        let mut tallest = height_of(most);
        if width_of(tallest) > width {
            tallest = ((width as f32 + 0.5) / aspect) as usize;
            tallest -= usize::from(width_of(tallest) > width);
        }
        let tallest = tallest.min(height);
        let lowest = height_of(least).min(tallest);
        let mut h = lowest + (rng.uniform() * (tallest - lowest + 1) as f32) as usize;
        // Rounding may have put the area just outside its range.
        let area = |h: usize| (width_of(h) * h) as f32;
        h += usize::from(area(h) < least);
        h -= usize::from(area(h) > most);
        let w = width_of(h);
        let fits = (1..=width).contains(&w) && (1..=height).contains(&h);
        (fits && (least..=most).contains(&area(h))).then_some([w, h])
    }

    /// Draws as deepmind-research, `byol/utils/dataset.py`.
    fn draw_clamped_box(&self, rng: &mut Philox, width: usize, height: usize) -> CropBox {
        let within = |[low, high]: [f32; 2], unit: f32| low + (high - low) * unit;
        let pixels = (width * height) as f32 * within(self.area, rng.uniform());
        let aspect = within(self.aspect.map(f32::ln), rng.uniform()).exp();
        let side =
            |square: f32, most: usize| (square.sqrt().round_ties_even() as usize).clamp(1, most);
        let (w, h) = (side(pixels * aspect, width), side(pixels / aspect, height));
        let mut place = |room: usize| (rng.uniform() * (room + 1) as f32) as usize;
        CropBox { left: place(width - w), top: place(height - h), width: w, height: h }
    }

    /// Returns the largest central crop with an aspect in range.
    fn fallback_crop(&self, width: usize, height: usize) -> CropBox {
        let [narrow, wide] = self.aspect.map(f64::from);
        let aspect = width as f64 / height as f64;
        let (mut w, mut h) = (width, height);
        if aspect < narrow {
            h = ((width as f64 / narrow).round_ties_even() as usize).clamp(1, height);
        } else if aspect > wide {
            w = ((height as f64 * wide).round_ties_even() as usize).clamp(1, width);
        }
        CropBox { left: (width - w) / 2, top: (height - h) / 2, width: w, height: h }
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::{Blur, BlurKind, Jitter, Solarise};
    use super::*;
    use crate::device::Purpose;

    fn policy() -> Policy {
        Policy {
            flip: 0.5,
            jitter: Some(Jitter {
                p: 0.8,
                brightness: 0.4,
                contrast: 0.3,
                saturation: 1.2,
                hue: 0.1,
                additive_brightness: false,
                per_channel: false,
            }),
            grey: 0.2,
            blur: Some(Blur { p: 0.5, sigma: [0.1, 2.0], kind: BlurKind::Gaussian }),
            solarise: Some(Solarise { p: 0.3, threshold: 0.5 }),
            ..Policy::crop(24)
        }
    }

    fn draws(policy: &Policy, count: u32) -> Vec<Params> {
        (0..count).map(|i| policy.draw(&mut Philox::new(5, Purpose::Test, 0, i), 40, 30)).collect()
    }

    #[test]
    fn probabilities_and_ranges_are_those_of_the_policy() {
        let all = draws(&policy(), 20_000);
        let share = |f: &dyn Fn(&Params) -> bool| {
            all.iter().filter(|p| f(p)).count() as f32 / all.len() as f32
        };
        for (name, got, expected) in [
            ("flip", share(&|p| p.flip), 0.5),
            ("jitter", share(&|p| p.jitter.is_some()), 0.8),
            ("grey", share(&|p| p.grey), 0.2),
            ("blur", share(&|p| p.blur.is_some()), 0.5),
            ("solarise", share(&|p| p.solarise), 0.3),
            (
                "hue first",
                share(&|p| p.jitter.as_ref().is_some_and(|j| j.order[0] == ColourOp::Hue)),
                0.2,
            ),
            (
                "contrast last",
                share(&|p| p.jitter.as_ref().is_some_and(|j| j.order[3] == ColourOp::Contrast)),
                0.2,
            ),
        ] {
            // Five standard deviations of a share of 20,000.
            assert!((got - expected).abs() < 0.018, "{name}: got {got}, expected {expected}");
        }
        let spans = |name: &str, values: Vec<f32>, low: f32, high: f32| {
            let least = values.iter().copied().fold(f32::INFINITY, f32::min);
            let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let slack = 0.01 * (high - low);
            assert!(least >= low && least < low + slack, "{name}: from {least}, expected {low}");
            assert!(most <= high && most > high - slack, "{name}: to {most}, expected {high}");
        };
        let jitters: Vec<_> = all.iter().filter_map(|p| p.jitter.as_ref()).collect();
        spans("brightness", jitters.iter().map(|j| j.brightness).collect(), 0.6, 1.4);
        spans("contrast", jitters.iter().map(|j| j.contrast).collect(), 0.7, 1.3);
        spans("saturation", jitters.iter().map(|j| j.saturation).collect(), 0.0, 2.2);
        spans("hue", jitters.iter().map(|j| j.hue).collect(), -0.1, 0.1);
        spans("sigma", all.iter().filter_map(|p| p.blur).collect(), 0.1, 2.0);
    }

    #[test]
    fn all_orders_of_the_jitter_occur() {
        let orders = draws(&policy(), 2000)
            .into_iter()
            .filter_map(|p| p.jitter)
            .map(|j| format!("{:?}", j.order));
        assert_eq!(orders.collect::<std::collections::HashSet<_>>().len(), 24);
    }

    #[test]
    fn crops_lie_in_the_image_and_reach_all_of_it() {
        let crops: Vec<_> = draws(&policy(), 20_000).into_iter().map(|p| p.crop).collect();
        for c in &crops {
            assert!(
                c.width > 0 && c.height > 0 && c.left + c.width <= 40 && c.top + c.height <= 30,
                "{c:?}"
            );
            // Rounding moves a side by half a pixel.
            let (w, h) = (c.width as f32, c.height as f32);
            assert!((w + 0.5) / (h - 0.5) > 0.75 && (w - 0.5) / (h + 0.5) < 4.0 / 3.0, "{c:?}");
            assert!((w + 0.5) * (h + 0.5) > 0.08 * 1200.0, "{c:?}");
        }
        assert!(crops.iter().any(|c| c.left + c.width == 40) && crops.iter().any(|c| c.left == 0));
        assert!(crops.iter().any(|c| c.top + c.height == 30) && crops.iter().any(|c| c.top == 0));
        let area = crops.iter().map(|c| (c.width * c.height) as f64 / 1200.0).sum::<f64>()
            / crops.len() as f64;
        assert!((0.43..0.46).contains(&area), "mean area {area}"); // torchvision 0.24: 0.445
    }

    #[test]
    fn one_probability_does_not_shift_the_other_numbers() {
        let before = draws(&policy(), 500);
        let mut changed = policy();
        changed.flip = 0.0;
        changed.blur = None;
        changed.jitter.as_mut().unwrap().p = 1.0;
        for (a, b) in before.iter().zip(draws(&changed, 500)) {
            assert_eq!((a.crop, a.grey, a.solarise), (b.crop, b.grey, b.solarise));
            if a.jitter.is_some() {
                assert_eq!(a.jitter, b.jitter);
            }
        }
    }

    #[test]
    fn an_image_that_no_crop_fits_gives_its_middle() {
        let policy = Policy { area: [1.0, 1.0], ..Policy::crop(8) };
        let crop = |w, h| policy.draw(&mut Philox::new(1, Purpose::Test, 0, 0), w, h).crop;
        assert_eq!(crop(100, 30), CropBox { left: 30, top: 0, width: 40, height: 30 });
        assert_eq!(crop(30, 100), CropBox { left: 0, top: 30, width: 30, height: 40 });
        assert_eq!(crop(1, 1), CropBox { left: 0, top: 0, width: 1, height: 1 });
    }
}

//! The settings of an augmentation, as they stand in a recipe.
//!
//! The operations come in one order: crop and resize, flip, jitter, grey (or grey, then jitter), channel drop, blur, noise, solarise,
//! normalise. All but saturation, hue and grey are defined for any number of channels, in float; 8-bit arithmetic is that of RGB.
//! Flipping commutes with the others, so its place in a paper's list does not matter.

use serde::{Deserialize, Serialize};

use crate::data::source::Format;
use crate::error::{Error, Result};

/// One distribution of views of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Side of the square crop in pixels, 1 to 1024.
    pub size: usize,
    /// Number of views of each image with these settings, at least 1: six for SwAV's small crops.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: usize,
    /// The crop's share of the image's area, low and high, in `(0, 1]`.
    #[serde(default = "default_area")]
    pub area: [f32; 2],
    /// The crop's width over its height, low and high, > 0; drawn uniformly in the logarithm, except by TensorFlow's sampler.
    #[serde(default = "default_aspect")]
    pub aspect: [f32; 2],
    /// How the crop is drawn.
    #[serde(default, skip_serializing_if = "is_torchvision")]
    pub sampler: Sampler,
    /// How the crop is resized.
    #[serde(default)]
    pub filter: Filter,
    /// Whether shrinking widens the filter, as Pillow does; TensorFlow's resize, and so SimCLR, does not.
    #[serde(default = "yes")]
    pub antialias: bool,
    /// How pixels are stored between operations.
    #[serde(default)]
    pub pixels: Pixels,
    /// Probability of a horizontal flip.
    #[serde(default)]
    pub flip: f32,
    /// Colour jitter; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Jitter>,
    /// Probability of a conversion to grey.
    #[serde(default)]
    pub grey: f32,
    /// Whether grey comes before the jitter instead of after it: MoCo v1.
    #[serde(default)]
    pub grey_first: bool,
    /// Probability that one channel, any of them with equal chance, becomes zero: what grey and hue are to RGB, for images of other
    /// channels. With float pixels only.
    #[serde(default, skip_serializing_if = "is_never")]
    pub channel_drop: f32,
    /// Noise; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<Noise>,
    /// Blur; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blur: Option<Blur>,
    /// Inversion of bright pixels; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solarise: Option<Solarise>,
    /// Normalisation of channels; values stay in `[0, 1]` if absent, as in SimCLR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalise: Option<Normalise>,
}

/// How a crop is drawn from the ranges of area and aspect. The distributions differ: of an image of 500 x 375 pixels the crop covers
/// 0.43, 0.39 and 0.52 on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// `RandomResizedCrop`: ten boxes of uniform area are tried, then the middle is taken (MoCo, SwAV, SimSiam).
    #[default]
    Torchvision,
    /// TensorFlow's `sample_distorted_bounding_box` with `min_object_covered` 0.1 and 100 tries: the aspect is uniform, then the
    /// height is uniform between those of the least and the largest area; then the whole image is taken (SimCLR).
    Tensorflow,
    /// One box of uniform area, cut to the image (BYOL).
    Clamped,
}

/// How an image is resampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// A triangle; torchvision's.
    #[default]
    Bilinear,
    /// Keys' cubic with a = -1/2; SimCLR's and BYOL's.
    Bicubic,
}

/// How pixels are stored between operations; decides the arithmetic of colour operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pixels {
    /// 8-bit, rounded as Pillow does: torchvision's transforms on Pillow images (MoCo, SwAV, SimSiam).
    #[default]
    U8,
    /// Float in `[0, 1]`, clipped after each operation: SimCLR and BYOL.
    Float,
}

/// Changes of brightness, contrast, saturation and hue, in random order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jitter {
    /// Probability that any of it happens.
    pub p: f32,
    /// Factor in `max(0, 1 - b) ..= 1 + b`; or, if `additive_brightness`, what is added, in `-b ..= b`. `b >= 0`.
    #[serde(default)]
    pub brightness: f32,
    /// Factor in `max(0, 1 - c) ..= 1 + c`, `c >= 0`.
    #[serde(default)]
    pub contrast: f32,
    /// Factor in `max(0, 1 - s) ..= 1 + s`, `s >= 0`.
    #[serde(default)]
    pub saturation: f32,
    /// Rotation of the colour circle in `-h ..= h`, `h` in `0..=0.5`.
    #[serde(default)]
    pub hue: f32,
    /// Brightness is added instead of multiplied (BYOL, SimCLR's `simclrv1`); with float pixels only.
    #[serde(default)]
    pub additive_brightness: bool,
    /// Brightness and contrast are drawn for each channel; with float pixels only.
    #[serde(default, skip_serializing_if = "is_false")]
    pub per_channel: bool,
}

/// Gaussian noise, drawn for each sample of a view; with float pixels only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Noise {
    /// Probability that it happens.
    pub p: f32,
    /// Standard deviation, low and high, in `(0, 1]` of the range of samples; drawn uniformly.
    pub std: [f32; 2],
}

/// The largest mean and deviation that pixels are normalised by; the smallest deviation is one over it. With others f32 overflows.
const MOST_OF_PIXELS: f32 = 1e6;

/// The largest standard deviation of a blur.
pub const MOST_SIGMA: f32 = 100.0;

/// Gaussian blur.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blur {
    /// Probability that it happens.
    pub p: f32,
    /// Standard deviation in pixels, low and high, > 0; drawn uniformly.
    #[serde(default = "default_sigma")]
    pub sigma: [f32; 2],
    /// How it is computed.
    #[serde(default)]
    pub kind: BlurKind,
}

/// How a blur is computed. The difference is worth several points of accuracy (lightly-ai/lightly#1051).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlurKind {
    /// A sampled Gaussian of `2 * (size / 20) + 1` taps (23 at 224), zeros outside the image: SimCLR and BYOL.
    /// Below 20 pixels it does nothing.
    #[default]
    Gaussian,
    /// Three box blurs of fractional radius, borders repeated: Pillow's `GaussianBlur` (MoCo, SwAV, SimSiam);
    /// with 8-bit pixels only.
    PillowBox,
}

/// Inversion of values from a threshold on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Solarise {
    /// Probability that it happens.
    pub p: f32,
    /// In `[0, 1]`; 0.5 inverts 8-bit values from 128 on.
    #[serde(default = "half")]
    pub threshold: f32,
}

/// `(value - mean) / std` per channel, values in `[0, 1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalise {
    /// Of each channel: red, green, blue.
    pub mean: Vec<f32>,
    /// Of each channel; > 0.
    pub std: Vec<f32>,
}

impl Normalise {
    /// ImageNet's, as torchvision and timm have them.
    pub fn imagenet() -> Self {
        Self { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] }
    }
}

fn default_area() -> [f32; 2] {
    [0.08, 1.0]
}

fn default_aspect() -> [f32; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

fn default_sigma() -> [f32; 2] {
    [0.1, 2.0]
}

fn is_torchvision(sampler: &Sampler) -> bool {
    *sampler == Sampler::Torchvision
}

fn one() -> usize {
    1
}

fn is_never(probability: &f32) -> bool {
    *probability == 0.0
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_one(repeat: &usize) -> bool {
    *repeat == 1
}

fn half() -> f32 {
    0.5
}

fn yes() -> bool {
    true
}

impl Policy {
    /// Returns the random crop and flip of linear probes and fine-tuning, with this policy's size, sampler, resampling, pixels
    /// and normalisation.
    pub fn crop_and_flip(&self) -> Self {
        let &Self { size, sampler, filter, antialias, pixels, .. } = self;
        let normalise = self.normalise.clone();
        Self { flip: 0.5, sampler, filter, antialias, pixels, normalise, ..Self::crop(size) }
    }

    /// Returns the plain random crop: area 0.08 to 1, aspect 3/4 to 4/3, bilinear, 8-bit, and nothing else.
    pub fn crop(size: usize) -> Self {
        Self {
            size,
            repeat: 1,
            area: default_area(),
            aspect: default_aspect(),
            sampler: Sampler::Torchvision,
            filter: Filter::Bilinear,
            antialias: true,
            pixels: Pixels::U8,
            flip: 0.0,
            jitter: None,
            grey: 0.0,
            grey_first: false,
            channel_drop: 0.0,
            noise: None,
            blur: None,
            solarise: None,
            normalise: None,
        }
    }

    /// Whether it has operations that 8-bit arithmetic does not have.
    pub(super) fn has_channel_operations(&self) -> bool {
        self.channel_drop > 0.0
            || self.noise.is_some()
            || self.jitter.as_ref().is_some_and(|jitter| jitter.per_channel)
    }

    /// Checks that the operations are defined for images of a format.
    ///
    /// # Errors
    /// If one is not; the message says what to write instead.
    pub fn check_for(&self, format: Format) -> Result<()> {
        let channels = format.channels;
        let refuse = |message: String| Err(Error::Config(format!("augmentation: {message}")));
        if let Some(normalise) = &self.normalise
            && [normalise.mean.len(), normalise.std.len()] != [channels; 2]
        {
            return refuse(format!(
                "normalise has {} means and {} deviations, and the images have {channels} channels: write one of each for each (`selfsup train FOLDER --plan` measures them)",
                normalise.mean.len(),
                normalise.std.len()
            ));
        }
        if self.channel_drop > 0.0 && channels == 1 {
            return refuse("channel_drop would leave nothing of images of one channel: write channel_drop = 0, and noise in its place".into());
        }
        if format == Format::RGB {
            return Ok(());
        }
        if self.pixels == Pixels::U8 {
            return refuse(format!(
                "pixels = \"u8\" is the arithmetic of three channels of 8 bits, and the images have {format}: write pixels = \"float\""
            ));
        }
        if channels == 3 {
            return Ok(());
        }
        let instead = match channels {
            1 => "noise = { p = 0.5, std = [0.01, 0.1] }",
            _ => "channel_drop = 0.2, or per_channel = true in the jitter",
        };
        for (name, value) in [
            ("jitter.saturation", self.jitter.as_ref().map_or(0.0, |jitter| jitter.saturation)),
            ("jitter.hue", self.jitter.as_ref().map_or(0.0, |jitter| jitter.hue)),
            ("grey", self.grey),
        ] {
            if value > 0.0 {
                return refuse(format!(
                    "{name} = {value} is defined for red, green and blue, and the images have {channels} channel{}: write {name} = 0, and in its place {instead}",
                    if channels == 1 { "" } else { "s" }
                ));
            }
        }
        Ok(())
    }

    /// Checks that every number is in its range and the operations can be combined.
    ///
    /// # Errors
    /// If a setting is out of range; the message names the first and its range.
    pub fn check(&self) -> Result<()> {
        let rule =
            |holds: bool, message: String| if holds { Ok(()) } else { Err(Error::config(message)) };
        let range = |name: &str, [low, high]: [f32; 2], most: f32| {
            let holds = 0.0 < low && low <= high && high <= most;
            rule(
                holds,
                format!("augmentation: {name} = [{low}, {high}] must rise within (0, {most}]"),
            )
        };
        let chance = |name: &str, p: f32| {
            rule(
                (0.0..=1.0).contains(&p),
                format!("augmentation: {name} = {p} must be a probability in 0..=1"),
            )
        };
        rule(
            (1..=1024).contains(&self.size),
            format!("augmentation: size = {} must be in 1..=1024", self.size),
        )?;
        rule(
            (1..=1024).contains(&self.repeat),
            format!("augmentation: repeat = {} must be in 1..=1024", self.repeat),
        )?;
        range("area", self.area, 1.0)?;
        range("aspect", self.aspect, 100.0)?;
        chance("flip", self.flip)?;
        chance("grey", self.grey)?;
        if let Some(jitter) = &self.jitter {
            chance("jitter.p", jitter.p)?;
            for (name, value, most) in [
                ("brightness", jitter.brightness, 10.0),
                ("contrast", jitter.contrast, 10.0),
                ("saturation", jitter.saturation, 10.0),
                ("hue", jitter.hue, 0.5),
            ] {
                let message =
                    format!("augmentation: jitter.{name} = {value} must be in 0..={most}");
                rule((0.0..=most).contains(&value), message)?;
            }
            let holds = !jitter.additive_brightness || self.pixels == Pixels::Float;
            rule(
                holds,
                "augmentation: jitter.additive_brightness needs pixels = \"float\"".into(),
            )?;
        }
        chance("channel_drop", self.channel_drop)?;
        if let Some(noise) = &self.noise {
            chance("noise.p", noise.p)?;
            range("noise.std", noise.std, 1.0)?;
        }
        rule(
            !self.has_channel_operations() || self.pixels == Pixels::Float,
            "augmentation: channel_drop, noise and jitter.per_channel need pixels = \"float\""
                .into(),
        )?;
        if let Some(blur) = &self.blur {
            chance("blur.p", blur.p)?;
            range("blur.sigma", blur.sigma, MOST_SIGMA)?;
            let holds = blur.kind == BlurKind::Gaussian || self.pixels == Pixels::U8;
            rule(holds, "augmentation: blur.kind = \"pillow_box\" needs pixels = \"u8\"".into())?;
        }
        if let Some(solarise) = &self.solarise {
            chance("solarise.p", solarise.p)?;
            chance("solarise.threshold", solarise.threshold)?;
        }
        if let Some(normalise) = &self.normalise {
            let fits = |&value: &f32| value.is_finite() && value.abs() <= MOST_OF_PIXELS;
            let holds = normalise.mean.iter().all(fits);
            rule(
                holds,
                format!("augmentation: normalise.mean = {:?} must be numbers", normalise.mean),
            )?;
            let fits = |&s: &f32| (1.0 / MOST_OF_PIXELS..=MOST_OF_PIXELS).contains(&s);
            let holds = normalise.std.iter().all(fits);
            rule(
                holds,
                format!(
                    "augmentation: normalise.std = {:?} must be positive, between {:e} and {MOST_OF_PIXELS:e}",
                    normalise.std,
                    1.0 / MOST_OF_PIXELS
                ),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_says_what_it_wants_and_no_more() {
        let text = "size = 32\nflip = 0.5\njitter = { p = 0.8, brightness = 0.4, hue = 0.1 }\nblur = { p = 0.5 }";
        let policy: Policy = toml::from_str(text).unwrap();
        assert_eq!(policy.blur.as_ref().unwrap().sigma, [0.1, 2.0]);
        assert_eq!((policy.area, policy.pixels), ([0.08, 1.0], Pixels::U8));
        let again: Policy = toml::from_str(&toml::to_string(&policy).unwrap()).unwrap();
        assert_eq!(again, policy);
        let error = toml::from_str::<Policy>("size = 32\nflipp = 0.5").unwrap_err().to_string();
        assert!(error.contains("flipp"), "{error}");
    }

    #[test]
    fn a_setting_out_of_range_is_named() {
        for (text, expected) in [
            ("size = 0", "size = 0 must be in 1..=1024"),
            ("size = 8\nrepeat = 0", "repeat = 0 must be in 1..=1024"),
            ("size = 8\narea = [0.5, 0.1]", "area = [0.5, 0.1] must rise within (0, 1]"),
            ("size = 8\nflip = 1.5", "flip = 1.5 must be a probability"),
            ("size = 8\nflip = nan", "flip = NaN must be a probability"),
            ("size = 8\njitter = { p = 1.0, hue = 0.6 }", "jitter.hue = 0.6 must be in 0..=0.5"),
            (
                "size = 8\njitter = { p = 1.0, additive_brightness = true }",
                "needs pixels = \"float\"",
            ),
            (
                "size = 8\npixels = \"float\"\nblur = { p = 1.0, kind = \"pillow_box\" }",
                "needs pixels = \"u8\"",
            ),
            ("size = 8\nnormalise = { mean = [0, 0, 0], std = [1, 0, 1] }", "must be positive"),
        ] {
            let message =
                toml::from_str::<Policy>(text).unwrap().check().expect_err(expected).to_string();
            assert!(message.contains(expected), "expected `{expected}` in `{message}`");
        }
    }
}

//! Views of images of any channels and bits, in float: three channels at a time.
//!
//! An image of more channels is one of three after another, since no operation but saturation, hue and grey, which only RGB has,
//! looks at two channels. What 8-bit arithmetic does not have is here, too: a channel that is dropped, brightness and contrast of
//! each channel, noise.

use super::params::{ChannelParams, ColourOp, Params};
use super::policy::{Jitter, Normalise, Policy};
use super::resize::Resize;
use super::{Scratch, blur, float};
use crate::data::source::{Format, Image};
use crate::device::philox4x32;

/// Channels that are computed together.
pub const TOGETHER: usize = 3;

/// The last word of the counters that give brightness and contrast of a channel, and of those that give noise.
const OF_CHANNEL: u32 = 0;
const OF_NOISE: u32 = 1;

/// What differs between the channels of a view, for those from `first` on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// Factors of brightness, or summands.
    pub brightness: [f32; TOGETHER],
    /// Factors of contrast.
    pub contrast: [f32; TOGETHER],
    /// Which of them becomes zero.
    pub dropped: Option<usize>,
}

impl Factors {
    /// The factors of the channels from `first` on, of `count` in all.
    pub fn of(policy: &Policy, params: &Params, first: usize, count: usize) -> Self {
        let (mut brightness, mut contrast) = ([1.0; TOGETHER], [1.0; TOGETHER]);
        if let (Some(drawn), Some(jitter)) = (&params.jitter, &policy.jitter) {
            brightness = [drawn.brightness; TOGETHER];
            contrast = [drawn.contrast; TOGETHER];
            if let (true, Some(own)) = (jitter.per_channel, &params.channels) {
                for c in 0..TOGETHER {
                    [brightness[c], contrast[c]] = of_channel(jitter, own, first + c);
                }
            }
        }
        let dropped = params.channels.and_then(|own| own.drop);
        let dropped = dropped.map(|share| ((share * count as f32) as usize).min(count - 1));
        let dropped = dropped.and_then(|c| c.checked_sub(first)).filter(|&c| c < TOGETHER);
        Self { brightness, contrast, dropped }
    }
}

/// Brightness and contrast of a channel.
fn of_channel(jitter: &Jitter, own: &ChannelParams, channel: usize) -> [f32; 2] {
    let words = philox4x32(own.key, [channel as u32, 0, 0, OF_CHANNEL]);
    let within = |low: f32, high: f32, word: u32| low + (high - low) * unit(word);
    let factor = |range: f32, word| within((1.0 - range).max(0.0), 1.0 + range, word);
    let brightness = match jitter.additive_brightness {
        true => within(-jitter.brightness, jitter.brightness, words[0]),
        false => factor(jitter.brightness, words[0]),
    };
    [brightness, factor(jitter.contrast, words[1])]
}

/// Uniform in `[0, 1)`.
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 / 16_777_216.0
}

/// A number of nearly a normal distribution: the sum of the sixteen bytes of a block, which is the same to the bit on a GPU.
fn normal(key: [u32; 2], pixel: usize, channel: usize) -> f32 {
    let words = philox4x32(key, [pixel as u32, channel as u32, 0, OF_NOISE]);
    let sum: i32 = words.iter().flat_map(|word| word.to_le_bytes()).map(i32::from).sum();
    // Of a byte: mean 127.5, variance (256^2 - 1) / 12.
    (sum - 2040) as f32 / 295.601_08
}

/// Whether views of such images are made here, and not in the arithmetic of RGB of 8 bits.
pub fn are_needed(policy: &Policy, format: Format) -> bool {
    format != Format::RGB || policy.has_channel_operations()
}

/// Writes a view to `out`, `[size, size, device_channels]`; without parameters only resampled and normalised.
pub fn write(
    policy: &Policy,
    resize: &Resize,
    params: Option<&Params>,
    image: &Image,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (channels, padded) = (image.format.channels, image.format.device_channels());
    out.fill(0.0);
    for first in (0..channels).step_by(TOGETHER) {
        resize.to_float_from(image, first, &mut scratch.resize, &mut scratch.floats);
        if let Some(params) = params {
            let factors = Factors::of(policy, params, first, channels);
            change(policy, params, &factors, first, channels, scratch);
        }
        let count = (channels - first).min(TOGETHER);
        let (mean, std) = scale(policy.normalise.as_ref(), first);
        for (out, pixel) in out.chunks_exact_mut(padded).zip(&scratch.floats) {
            for (c, out) in out[first..first + count].iter_mut().enumerate() {
                *out = (pixel[c] - mean[c]) / std[c];
            }
        }
    }
}

/// Mean and standard deviation of the channels from `first` on.
pub fn scale(normalise: Option<&Normalise>, first: usize) -> ([f32; TOGETHER], [f32; TOGETHER]) {
    let mut scale = ([0.0; TOGETHER], [1.0; TOGETHER]);
    if let Some(Normalise { mean, std }) = normalise {
        for (c, (mean, std)) in mean.iter().zip(std).skip(first).take(TOGETHER).enumerate() {
            (scale.0[c], scale.1[c]) = (*mean, *std);
        }
    }
    scale
}

fn change(
    policy: &Policy,
    params: &Params,
    factors: &Factors,
    first: usize,
    channels: usize,
    scratch: &mut Scratch,
) {
    let Scratch { floats: pixels, blur: buffers, .. } = scratch;
    let is_rgb = channels == 3;
    if params.grey && policy.grey_first && is_rgb {
        float::grey(pixels);
    }
    if let (Some(drawn), Some(jitter)) = (&params.jitter, &policy.jitter) {
        for op in drawn.order {
            match op {
                ColourOp::Brightness if jitter.additive_brightness => {
                    each(pixels, |c, v| v + factors.brightness[c]);
                }
                ColourOp::Brightness => each(pixels, |c, v| v * factors.brightness[c]),
                ColourOp::Contrast => contrast(pixels, factors.contrast),
                ColourOp::Saturation if is_rgb => float::saturation(pixels, drawn.saturation),
                ColourOp::Hue if is_rgb => float::hue(pixels, drawn.hue),
                ColourOp::Saturation | ColourOp::Hue => {}
            }
        }
    }
    if params.grey && !policy.grey_first && is_rgb {
        float::grey(pixels);
    }
    if let Some(dropped) = factors.dropped {
        pixels.iter_mut().for_each(|pixel| pixel[dropped] = 0.0);
    }
    if let Some(sigma) = params.blur {
        blur::gaussian(pixels, policy.size, sigma, buffers);
    }
    if let Some((own, std)) = params.channels.and_then(|own| Some((own, own.noise?))) {
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let count = (channels - first).min(TOGETHER);
            for (c, value) in (first..).zip(&mut pixel[..count]) {
                *value = (*value + std * normal(own.key, i, c)).clamp(0.0, 1.0);
            }
        }
    }
    if let (true, Some(solarise)) = (params.solarise, &policy.solarise) {
        float::solarise(pixels, solarise.threshold);
    }
}

/// Changes each value, clipped.
fn each(pixels: &mut [[f32; 4]], change: impl Fn(usize, f32) -> f32) {
    for pixel in pixels {
        for (c, value) in pixel[..TOGETHER].iter_mut().enumerate() {
            *value = change(c, *value).clamp(0.0, 1.0);
        }
    }
}

/// Scales around each channel's mean.
fn contrast(pixels: &mut [[f32; 4]], factors: [f32; TOGETHER]) {
    let mut sums = [0.0f64; TOGETHER];
    for pixel in pixels.iter() {
        (0..TOGETHER).for_each(|c| sums[c] += f64::from(pixel[c]));
    }
    let mean = sums.map(|sum| (sum / pixels.len().max(1) as f64) as f32);
    each(pixels, |c, v| (v - mean[c]) * factors[c] + mean[c]);
}

//! The parameters of a view in the layout of `kernels/augment.cu`.

use bytemuck::{Pod, Zeroable};

use super::apply::{Transform, middle, scale};
use super::blur::{self, BoxBlur};
use super::channels::{self, Factors, TOGETHER};
use super::colour;
use super::params::{ColourOp, Params};
use super::policy::{BlurKind, Filter, Pixels, Policy};
use super::resize::Resize;
use crate::data::source::Format;

/// One view of an image: `View` of `kernels/augment.cuh`, field by field. It combines the policy and the drawn parameters.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C)]
pub struct View {
    /// Byte offset of the image's first pixel.
    pub pixels: i64,
    /// Width of the image.
    width: i32,
    corner: [i32; 2],
    crop: [i32; 2],
    target: [i32; 2],
    first: [i32; 2],
    flags: u32,
    /// Colour operations, 4 bits each, the first in the lowest bits.
    program: u32,
    brightness: f32,
    contrast: f32,
    saturation: f32,
    hue: f32,
    turn: i32,
    solarise: f32,
    mean: [f32; 3],
    deviation: [f32; 3],
    box_whole: i32,
    box_weight: u32,
    box_fraction: u32,
}

/// Three channels of a view of an image of any format: `ChannelView` of `kernels/augment.cuh`, field by field.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C)]
pub struct ChannelView {
    /// What all channels have in common; its mean and deviation are those of the three.
    pub view: View,
    channels: i32,
    first: i32,
    bits: i32,
    padded: i32,
    brightness: [f32; 3],
    contrast: [f32; 3],
    dropped: i32,
    noise: f32,
    key: [u32; 2],
}

const _: () = assert!(size_of::<ChannelView>() == 168, "as augment.cuh has it");

impl ChannelView {
    /// Returns the groups of three channels of a view of an image of a format; without parameters only resampled and normalised.
    pub fn of(view: &View, policy: &Policy, params: Option<&Params>, format: Format) -> Vec<Self> {
        let group = |first: usize| {
            let mut own = Self { view: *view, ..Self::zeroed() };
            (own.view.mean, own.view.deviation) = channels::scale(policy.normalise.as_ref(), first);
            own.view.flags |= FLOAT;
            own.channels = format.channels as i32;
            own.first = first as i32;
            own.bits = format.bits as i32;
            own.padded = format.device_channels() as i32;
            own.dropped = -1;
            if let Some(params) = params {
                own.view.program = policy.program_of(params, format);
                let factors = Factors::of(policy, params, first, format.channels);
                (own.brightness, own.contrast) = (factors.brightness, factors.contrast);
                own.dropped = factors.dropped.map_or(-1, |dropped| dropped as i32);
                if let Some((channels, noise)) = params.channels.and_then(|c| Some((c, c.noise?))) {
                    (own.noise, own.key) = (noise, channels.key);
                }
                if let (true, Some(solarise)) = (params.solarise, &policy.solarise) {
                    own.view.solarise = solarise.threshold;
                }
            }
            own
        };
        (0..format.channels).step_by(TOGETHER).map(group).collect()
    }

    /// Returns the offset behind the last pixel of its crop.
    pub fn end(&self) -> i64 {
        let pixel = i64::from(self.channels * self.bits / 8);
        self.view.end_with(pixel)
    }

    /// Returns the channels of the output.
    pub fn padded(&self) -> usize {
        self.padded as usize
    }
}

// As `augment.cuh` has them.
const FLIP: u32 = 1;
const BICUBIC: u32 = 2;
const ANTIALIAS: u32 = 4;
const FLOAT: u32 = 8;
const SOLARISE: u32 = 16;
const GAUSSIAN: u32 = 32;
const BOX: u32 = 64;

const BRIGHTNESS: u32 = 1;
const CONTRAST: u32 = 2;
const SATURATION: u32 = 3;
const HUE: u32 = 4;
const GREY: u32 = 5;
const ADD: u32 = 6;

const _: () = assert!(size_of::<View>() == 112, "as augment.cuh has it");

/// Number of weights of a sampled Gaussian for crops of `size` pixels.
pub fn taps(size: usize) -> usize {
    2 * blur::radius(size) + 1
}

impl View {
    /// Returns the view that `params` describe, of an image of `[width, height]` pixels that begin at byte `pixels`. Appends
    /// the [`taps`] weights of its blur to `gaussian`, zeros if it has none.
    ///
    /// # Panics
    /// If the parameters are not those of such an image, or it is larger than the kernel's integers.
    #[track_caller]
    pub fn new(
        policy: &Policy,
        params: &Params,
        size @ [width, _]: [usize; 2],
        pixels: i64,
        gaussian: &mut Vec<f32>,
    ) -> Self {
        params.expect_fit(size);
        let view = Self::resampled(&policy.resize(params), policy, width, pixels);
        let mut view = view.unwrap_or_else(|| panic!("augment: an image of {size:?} on a GPU"));
        let float = policy.pixels == Pixels::Float;
        view.program = policy.program(params);
        if let Some(factors) = &params.jitter {
            view.brightness = factors.brightness;
            view.contrast = factors.contrast;
            view.saturation = factors.saturation;
            view.hue = factors.hue;
            view.turn = colour::steps(factors.hue);
        }
        if let (true, Some(solarise)) = (params.solarise, &policy.solarise) {
            view.flags |= SOLARISE;
            view.solarise = solarise.threshold * if float { 1.0 } else { 255.0 };
        }
        let kind = policy.blur.as_ref().map(|blur| blur.kind);
        let end = gaussian.len() + taps(policy.size);
        match params.blur.zip(kind) {
            Some((sigma, BlurKind::Gaussian)) => {
                view.flags |= GAUSSIAN;
                blur::weights(policy.size, sigma, gaussian);
            }
            Some((sigma, BlurKind::PillowBox)) => {
                let BoxBlur { whole, weight, fraction } = BoxBlur::of(sigma);
                view.flags |= BOX;
                (view.box_whole, view.box_weight, view.box_fraction) =
                    (whole as i32, weight, fraction);
            }
            None => {}
        }
        gaussian.resize(end, 0.0);
        view
    }

    /// Returns the view of a transform of an image of `width` x `height` pixels that begin at byte `pixels`; `None` if the
    /// image, or what it would be resized to, is larger than the kernel's integers.
    pub fn middle(
        by: Transform,
        [width, height]: [usize; 2],
        policy: &Policy,
        pixels: i64,
    ) -> Option<Self> {
        Self::resampled(&middle(by, width, height, policy), policy, width, pixels)
    }

    /// Returns the offset behind the last pixel of its crop.
    pub fn end(&self) -> i64 {
        self.end_with(3)
    }

    /// As [`View::end`], of pixels of so many bytes.
    fn end_with(&self, pixel: i64) -> i64 {
        let row = i64::from(self.corner[1] + self.crop[1] - 1);
        self.pixels
            + pixel * (row * i64::from(self.width) + i64::from(self.corner[0] + self.crop[0]))
    }

    /// Returns the larger ratio of crop side to target side, rounded up.
    pub fn shrinks_by(&self) -> usize {
        let axes = self.crop.iter().zip(self.target);
        axes.map(|(&from, to)| (from as usize).div_ceil(to as usize)).max().unwrap_or(0)
    }

    fn resampled(resize: &Resize, policy: &Policy, width: usize, pixels: i64) -> Option<Self> {
        let pair = |a: usize, b: usize| {
            // A sum of two of them must not wrap either.
            let fits = |v: usize| i32::try_from(v).ok().filter(|v| *v <= i32::MAX / 2);
            Some([fits(a)?, fits(b)?])
        };
        let (crop, [x, y], [across, down]) = (resize.crop, resize.first, resize.target);
        let flag = |holds: bool, flag: u32| if holds { flag } else { 0 };
        let ([r, g, b, _], [dr, dg, db, _]) = scale(policy.normalise.as_ref());
        Some(Self {
            pixels,
            width: pair(width, 0)?[0],
            corner: pair(crop.left, crop.top)?,
            crop: pair(crop.width, crop.height)?,
            target: pair(across, down)?,
            first: pair(x, y)?,
            flags: flag(resize.flip, FLIP)
                | flag(resize.filter == Filter::Bicubic, BICUBIC)
                | flag(resize.antialias, ANTIALIAS)
                | flag(policy.pixels == Pixels::Float, FLOAT),
            mean: [r, g, b],
            deviation: [dr, dg, db],
            ..Self::zeroed()
        })
    }
}

impl Policy {
    /// As [`Policy::program`], in float and without those that images of other channels than RGB do not have.
    fn program_of(&self, params: &Params, format: Format) -> u32 {
        let all = Self { pixels: Pixels::Float, ..self.clone() }.program(params);
        if format.channels == 3 {
            return all;
        }
        let operations = (0..8).map(|at| all >> (4 * at) & 15);
        let kept: Vec<u32> =
            operations.filter(|op| [BRIGHTNESS, CONTRAST, ADD].contains(op)).collect();
        kept.iter().rev().fold(0, |program, op| program << 4 | op)
    }

    /// Returns the colour operations that are applied, in order.
    fn program(&self, params: &Params) -> u32 {
        let mut operations = Vec::with_capacity(6);
        if params.grey && self.grey_first {
            operations.push(GREY);
        }
        if let (Some(factors), Some(jitter)) = (&params.jitter, &self.jitter) {
            operations.extend(factors.order.iter().filter_map(|op| match op {
                ColourOp::Brightness if jitter.additive_brightness => Some(ADD),
                ColourOp::Brightness => Some(BRIGHTNESS),
                ColourOp::Contrast => Some(CONTRAST),
                ColourOp::Saturation => Some(SATURATION),
                // As in `Policy::apply`: in 8 bits the conversion to HSV and back is not exact.
                ColourOp::Hue => (jitter.hue > 0.0 || self.pixels == Pixels::Float).then_some(HUE),
            }));
        }
        if params.grey && !self.grey_first {
            operations.push(GREY);
        }
        operations.iter().rev().fold(0, |program, op| program << 4 | op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shorter side becomes that of the view: a line of pixels becomes longer than 2^31.
    #[test]
    fn an_image_that_would_be_resized_beyond_the_kernels_integers_has_no_view() {
        let policy = Policy::crop(224);
        let view = |size| View::middle(Transform::ResizedCenter, size, &policy, 0);
        assert!(view([500, 375]).is_some_and(|view| view.end() == 500 * 375 * 3));
        assert!(view([20_000_000, 1]).is_none());
        assert!(view([1, 20_000_000]).is_none());
    }
}

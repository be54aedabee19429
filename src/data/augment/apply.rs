//! Applies drawn parameters to an image.

use multiversion::multiversion;

use super::params::{ColourOp, CropBox, Params};
use super::policy::{BlurKind, MOST_SIGMA, Normalise, Pixels, Policy};
use super::resize::Resize;
use super::{blur, channels, colour, float, resize};
use crate::data::source::{Format, Image};

/// Buffers that [`Policy::apply`] and [`center`] reuse; one per thread.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) resize: resize::Buffers,
    pub(super) blur: blur::Buffers,
    bytes: Vec<[u8; 4]>,
    pub(super) floats: Vec<[f32; 4]>,
}

impl Params {
    /// Panics unless these are parameters that a policy could draw for an image of this width and height.
    #[track_caller]
    pub(super) fn expect_fit(&self, [width, height]: [usize; 2]) {
        let crop = self.crop;
        let within = |first: usize, count: usize, of: usize| {
            count > 0 && first.checked_add(count).is_some_and(|end| end <= of)
        };
        assert!(
            within(crop.left, crop.width, width) && within(crop.top, crop.height, height),
            "augment: {crop:?} in an image of {width} x {height}"
        );
        let sigma = self.blur.unwrap_or(1.0);
        // What is drawn may be larger by a rounding.
        assert!(sigma > 0.0 && sigma < 1.01 * MOST_SIGMA, "augment: a blur of sigma {sigma}");
        let turn = self.jitter.as_ref().map_or(0.0, |jitter| jitter.hue);
        assert!((-0.5..=0.5).contains(&turn), "augment: a hue of {turn}");
    }
}

impl Policy {
    /// Writes the view of `image` that `params` describe to `out`, `[size, size, 4]`, the fourth channel zero; of an image of
    /// another format `[size, size, device_channels]`, in float whatever the policy's `pixels` are.
    ///
    /// # Panics
    /// If `out` has another length, the crop exceeds the image, or another parameter is not one that [`Policy::draw`] draws.
    #[track_caller]
    pub fn apply(&self, params: &Params, image: &Image, out: &mut [f32], scratch: &mut Scratch) {
        let (size, padded) = (self.size, image.format.device_channels());
        assert_eq!(out.len(), size * size * padded, "augment: room for [{size}, {size}, {padded}]");
        params.expect_fit([image.width, image.height]);
        image.expect_whole();
        let resize = self.resize(params);
        if channels::are_needed(self, image.format) {
            return channels::write(self, &resize, Some(params), image, out, scratch);
        }
        match self.pixels {
            Pixels::U8 => {
                resize.to_u8(image, &mut scratch.resize, &mut scratch.bytes);
                self.change_u8(params, scratch);
                write_u8(&scratch.bytes, self.normalise.as_ref(), out);
            }
            Pixels::Float => {
                resize.to_float(image, &mut scratch.resize, &mut scratch.floats);
                self.change_float(params, scratch);
                write_float(&scratch.floats, self.normalise.as_ref(), out);
            }
        }
    }

    /// Returns the resampling of the crop.
    pub(super) fn resize(&self, params: &Params) -> Resize {
        Resize {
            crop: params.crop,
            target: [self.size; 2],
            first: [0; 2],
            size: self.size,
            filter: self.filter,
            antialias: self.antialias,
            flip: params.flip,
        }
    }

    fn change_u8(&self, params: &Params, scratch: &mut Scratch) {
        let Scratch { bytes: pixels, floats, blur: buffers, .. } = scratch;
        if params.grey && self.grey_first {
            colour::grey(pixels);
        }
        if let (Some(factors), Some(jitter)) = (&params.jitter, &self.jitter) {
            for op in factors.order {
                match op {
                    ColourOp::Brightness => colour::brightness(pixels, factors.brightness),
                    ColourOp::Contrast => colour::contrast(pixels, factors.contrast),
                    ColourOp::Saturation => colour::saturation(pixels, factors.saturation),
                    // The conversion to HSV and back is not exact, so the step is skipped if its range is 0, as in
                    // torchvision.
                    ColourOp::Hue if jitter.hue > 0.0 => colour::hue(pixels, factors.hue),
                    ColourOp::Hue => {}
                }
            }
        }
        if params.grey && !self.grey_first {
            colour::grey(pixels);
        }
        if let (Some(sigma), Some(blur)) = (params.blur, &self.blur) {
            match blur.kind {
                BlurKind::Gaussian => blur::gaussian_u8(pixels, self.size, sigma, floats, buffers),
                BlurKind::PillowBox => blur::pillow(pixels, self.size, sigma, buffers),
            }
        }
        if let (true, Some(solarise)) = (params.solarise, &self.solarise) {
            colour::solarise(pixels, solarise.threshold);
        }
    }

    fn change_float(&self, params: &Params, scratch: &mut Scratch) {
        let Scratch { floats: pixels, blur: buffers, .. } = scratch;
        if params.grey && self.grey_first {
            float::grey(pixels);
        }
        if let (Some(factors), Some(jitter)) = (&params.jitter, &self.jitter) {
            for op in factors.order {
                match op {
                    ColourOp::Brightness if jitter.additive_brightness => {
                        float::brightness_added(pixels, factors.brightness);
                    }
                    ColourOp::Brightness => float::brightness(pixels, factors.brightness),
                    ColourOp::Contrast => float::contrast(pixels, factors.contrast),
                    ColourOp::Saturation => float::saturation(pixels, factors.saturation),
                    ColourOp::Hue => float::hue(pixels, factors.hue),
                }
            }
        }
        if params.grey && !self.grey_first {
            float::grey(pixels);
        }
        if let Some(sigma) = params.blur {
            blur::gaussian(pixels, self.size, sigma, buffers);
        }
        if let (true, Some(solarise)) = (params.solarise, &self.solarise) {
            float::solarise(pixels, solarise.threshold);
        }
    }
}

/// The deterministic transform of an image for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// The central 7/8, resampled and normalised by the policy; an image that already has `size` is only normalised. With 8-bit
    /// pixels as torchvision does it: the shorter side is resized to 8/7 of `size` (256 for 224), then the centre is cropped.
    /// With floats as SimCLR and BYOL do it: a square of 7/8 of the shorter side is resized to `size` (google-research/simclr,
    /// data_util.py, `center_crop`; BYOL rounds that square down, which can be a pixel less).
    Center,
    /// The same, but every image is resized, as torchvision's presets do: for networks that were trained with them.
    ResizedCenter,
}

/// Writes the evaluation's view of an image, [`Transform::Center`], to `out`, `[size, size, 4]`, or with the image's
/// [`device_channels`](crate::data::Format::device_channels).
///
/// # Panics
/// If `out` has another length.
#[track_caller]
pub fn center(image: &Image, policy: &Policy, out: &mut [f32], scratch: &mut Scratch) {
    transform(Transform::Center, image, policy, out, scratch);
}

/// As [`center`], under any transform.
#[track_caller]
pub(crate) fn transform(
    by: Transform,
    image: &Image,
    policy: &Policy,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let (size, padded) = (policy.size, image.format.device_channels());
    assert_eq!(out.len(), size * size * padded, "center: room for [{size}, {size}, {padded}]");
    let resize = middle(by, image.width, image.height, policy);
    if image.format != Format::RGB {
        return channels::write(policy, &resize, None, image, out, scratch);
    }
    match policy.pixels {
        Pixels::U8 => {
            resize.to_u8(image, &mut scratch.resize, &mut scratch.bytes);
            write_u8(&scratch.bytes, policy.normalise.as_ref(), out);
        }
        Pixels::Float => {
            resize.to_float(image, &mut scratch.resize, &mut scratch.floats);
            write_float(&scratch.floats, policy.normalise.as_ref(), out);
        }
    }
}

/// Returns the resampling of a transform for an image of `width` x `height` pixels.
pub(super) fn middle(by: Transform, width: usize, height: usize, policy: &Policy) -> Resize {
    let &Policy { size, filter, antialias, pixels, .. } = policy;
    let all = CropBox { left: 0, top: 0, width, height };
    let (crop, target_size) = if by == Transform::Center && [width, height] == [size; 2] {
        (all, [size; 2])
    } else if pixels == Pixels::Float {
        // Rounds halves to even, as TensorFlow's `rint`.
        let side = ((width.min(height) * 7) as f64 / 8.0).round_ties_even().max(1.0) as usize;
        let [left, top] = [width, height].map(|length| (length - side).div_ceil(2));
        (CropBox { left, top, width: side, height: side }, [size; 2])
    } else {
        let (short, target) = (width.min(height), (size * 8 + 3) / 7); // rounded
        // The longer side is truncated, as in torchvision's `Resize`.
        (all, [target * width / short, target * height / short])
    };
    // Rounds halves to even, as torchvision's `CenterCrop`.
    let first = target_size.map(|side| ((side - size) as f64 / 2.0).round_ties_even() as usize);
    Resize { crop, target: target_size, first, size, filter, antialias, flip: false }
}

/// Returns mean and standard deviation per channel.
pub(super) fn scale(normalise: Option<&Normalise>) -> ([f32; 4], [f32; 4]) {
    let ([r, g, b], [sr, sg, sb]) = channels::scale(normalise, 0);
    ([r, g, b, 0.0], [sr, sg, sb, 1.0])
}

fn write_u8(pixels: &[[u8; 4]], normalise: Option<&Normalise>, out: &mut [f32]) {
    let (mean, std) = scale(normalise);
    // A channel has 256 values, so divisions are done once per value, not per pixel.
    let table =
        |c: usize| -> [f32; 256] { std::array::from_fn(|v| (v as f32 / 255.0 - mean[c]) / std[c]) };
    let (red, green, blue) = (table(0), table(1), table(2));
    for (out, &[r, g, b, _]) in out.as_chunks_mut::<4>().0.iter_mut().zip(pixels) {
        *out = [red[usize::from(r)], green[usize::from(g)], blue[usize::from(b)], 0.0];
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
fn write_float(pixels: &[[f32; 4]], normalise: Option<&Normalise>, out: &mut [f32]) {
    let (mean, std) = scale(normalise);
    for (out, pixel) in out.as_chunks_mut::<4>().0.iter_mut().zip(pixels) {
        for c in 0..4 {
            out[c] = (pixel[c] - mean[c]) / std[c];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::params::JitterParams;
    use super::super::policy::{Blur, Filter, Jitter, Solarise};
    use super::*;
    use crate::device::{Philox, Purpose};

    fn noise(width: usize, height: usize) -> Image {
        let mut rng = Philox::new(9, Purpose::Test, 0, 0);
        Image {
            format: Format::RGB,
            width,
            height,
            pixels: (0..width * height * 3).map(|_| rng.next_u32() as u8).collect(),
        }
    }

    fn view(policy: &Policy, params: &Params, image: &Image) -> Vec<f32> {
        let mut out = vec![f32::NAN; policy.size * policy.size * 4];
        policy.apply(params, image, &mut out, &mut Scratch::default());
        out
    }

    fn plain(crop: CropBox) -> Params {
        Params {
            crop,
            flip: false,
            jitter: None,
            grey: false,
            blur: None,
            solarise: false,
            channels: None,
        }
    }

    #[test]
    fn parameters_that_no_policy_draws_are_refused() {
        let image = noise(6, 5);
        let whole = CropBox { left: 0, top: 0, width: 6, height: 5 };
        let crop = |crop| plain(crop);
        let blurred = |sigma| Params { blur: Some(sigma), ..plain(whole) };
        let turned = |hue| {
            let order = [ColourOp::Hue; 4];
            let factors =
                JitterParams { order, brightness: 1.0, contrast: 1.0, saturation: 1.0, hue };
            Params { jitter: Some(factors), ..plain(whole) }
        };
        let refused = |params: &Params, image: &Image| {
            let apply = || view(&Policy::crop(4), params, image);
            let panic = std::panic::catch_unwind(apply).expect_err("must be refused");
            *panic.downcast::<String>().unwrap()
        };
        for params in [
            crop(CropBox { left: usize::MAX, ..whole }),
            crop(CropBox { left: 1, ..whole }),
            crop(CropBox { top: usize::MAX - 4, ..whole }),
            crop(CropBox { width: 0, ..whole }),
            blurred(f32::NAN),
            blurred(1e9),
            blurred(0.0),
            turned(f32::INFINITY),
            turned(f32::NAN),
        ] {
            let message = refused(&params, &image);
            assert!(message.starts_with("augment: "), "{message}");
        }
        let cut = Image { pixels: vec![0; 17], ..image };
        assert_eq!(refused(&plain(whole), &cut), "image: 17 values for 6 x 5 pixels");
    }

    #[test]
    fn an_identity_crop_leaves_pixels_as_they_are() {
        let image = noise(6, 6);
        let whole = CropBox { left: 0, top: 0, width: 6, height: 6 };
        for pixels in [Pixels::U8, Pixels::Float] {
            let policy = Policy { pixels, ..Policy::crop(6) };
            let (same, mirrored) = (
                view(&policy, &plain(whole), &image),
                view(&policy, &Params { flip: true, ..plain(whole) }, &image),
            );
            for (i, rgb) in image.pixels.chunks_exact(3).enumerate() {
                let expected = [rgb[0], rgb[1], rgb[2], 0].map(|v| f32::from(v) / 255.0);
                let other = i / 6 * 6 + 5 - i % 6;
                assert_eq!(same[i * 4..][..4], expected, "{pixels:?}");
                assert_eq!(mirrored[other * 4..][..4], expected, "{pixels:?}");
            }
        }
    }

    #[test]
    fn the_fourth_channel_is_zero_and_values_in_range_after_everything() {
        let image = noise(37, 50);
        for (pixels, kind) in [
            (Pixels::U8, BlurKind::PillowBox),
            (Pixels::U8, BlurKind::Gaussian),
            (Pixels::Float, BlurKind::Gaussian),
        ] {
            let additive_brightness = pixels == Pixels::Float;
            let policy = Policy {
                pixels,
                filter: Filter::Bicubic,
                flip: 0.5,
                jitter: Some(Jitter {
                    p: 0.8,
                    brightness: 0.8,
                    contrast: 0.8,
                    saturation: 0.8,
                    hue: 0.2,
                    additive_brightness,
                    per_channel: false,
                }),
                grey: 0.2,
                blur: Some(Blur { p: 0.5, sigma: [0.1, 2.0], kind }),
                solarise: Some(Solarise { p: 0.2, threshold: 0.5 }),
                ..Policy::crop(40)
            };
            policy.check().unwrap();
            for i in 0..50 {
                let params = policy.draw(&mut Philox::new(2, Purpose::Test, 0, i), 37, 50);
                let out = view(&policy, &params, &image);
                for pixel in out.chunks_exact(4) {
                    // A float sum of the blur's weights may exceed 1 by rounding.
                    assert!(
                        pixel[..3].iter().all(|v| (0.0..1.00001).contains(v)),
                        "{pixel:?} of {params:?}"
                    );
                    assert_eq!(pixel[3], 0.0, "{params:?}");
                }
            }
        }
    }

    #[test]
    fn normalisation_subtracts_the_mean_and_divides_by_the_deviation() {
        let image = Image { width: 1, height: 1, pixels: vec![255, 51, 0], ..Image::default() };
        let normalise = Some(Normalise { mean: vec![0.5, 0.1, 0.2], std: vec![0.5, 0.2, 0.1] });
        let policy = Policy { normalise, ..Policy::crop(1) };
        let got = view(&policy, &plain(CropBox { left: 0, top: 0, width: 1, height: 1 }), &image);
        for (got, expected) in got.iter().zip([1.0f32, 0.5, -2.0, 0.0]) {
            assert!((got - expected).abs() < 1e-6, "got {got}, expected {expected}");
        }
        let mut centred = [9.0; 4];
        center(&image, &policy, &mut centred, &mut Scratch::default());
        assert_eq!(got, centred);
    }

    #[test]
    fn the_centre_of_an_image_of_eight_sevenths_is_cropped_without_resampling() {
        let image = noise(8, 8);
        let mut out = [0.0; 7 * 7 * 4];
        center(&image, &Policy::crop(7), &mut out, &mut Scratch::default());
        assert_eq!(out[0], f32::from(image.pixels[0]) / 255.0);
        let mut out = [0.0; 14 * 14 * 4];
        center(&noise(20, 16), &Policy::crop(14), &mut out, &mut Scratch::default());
        assert_eq!(out[1], f32::from(noise(20, 16).pixels[(20 + 3) * 3 + 1]) / 255.0);
    }

    #[test]
    fn the_centre_in_floats_is_seven_eighths_of_the_shorter_side_resized() {
        let policy = Policy {
            pixels: Pixels::Float,
            filter: Filter::Bicubic,
            antialias: false,
            ..Policy::crop(5)
        };
        for (width, height, side, left, top) in
            [(500, 375, 328, 86, 24), (20, 16, 14, 3, 1), (3, 4, 3, 0, 1)]
        {
            let image = noise(width, height);
            let expected =
                view(&policy, &plain(CropBox { left, top, width: side, height: side }), &image);
            let mut out = vec![9.0; 5 * 5 * 4];
            center(&image, &policy, &mut out, &mut Scratch::default());
            assert_eq!(out, expected, "{width} x {height}");
        }
    }

    #[test]
    fn the_smallest_images_are_enlarged() {
        let mut out = [0.0; 5 * 5 * 4];
        center(&noise(1, 3), &Policy::crop(5), &mut out, &mut Scratch::default());
        assert!(out.iter().any(|&v| v > 0.0));
    }
}

//! Colour operations on float images in `[0, 1]`, as in SimCLR and BYOL.
//!
//! Contrast is around each channel's mean, saturation and hue in HSV, grey with the weights .2989, .5870, .1140
//! (simclr:data_util.py over tf.image, byol:utils/augmentations.py); values are clipped after each operation.
//! Pixels are `[r, g, b, 0]`.

use multiversion::multiversion;

#[inline(always)]
fn clip(v: f32) -> f32 {
    v.clamp(0.0, 1.0)
}

/// Adds `delta` in `-1..=1`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn brightness_added(pixels: &mut [[f32; 4]], delta: f32) {
    let deltas = [delta, delta, delta, 0.0];
    for pixel in pixels {
        *pixel = std::array::from_fn(|c| clip(pixel[c] + deltas[c]));
    }
}

/// Multiplies. `factor >= 0`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn brightness(pixels: &mut [[f32; 4]], factor: f32) {
    pixels.as_flattened_mut().iter_mut().for_each(|v| *v = clip(*v * factor));
}

/// Scales around each channel's mean. `factor >= 0`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn contrast(pixels: &mut [[f32; 4]], factor: f32) {
    let mut mean = [0.0f64; 4];
    for pixel in pixels.iter() {
        (0..4).for_each(|c| mean[c] += f64::from(pixel[c]));
    }
    let mean = mean.map(|sum| (sum / pixels.len().max(1) as f64) as f32);
    for pixel in pixels {
        *pixel = std::array::from_fn(|c| clip((pixel[c] - mean[c]) * factor + mean[c]));
    }
}

/// Multiplies the saturation (in HSV, at most 1). `factor >= 0`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn saturation(pixels: &mut [[f32; 4]], factor: f32) {
    for pixel in pixels {
        let [r, g, b, _] = *pixel;
        let (value, range) = (r.max(g).max(b), r.max(g).max(b) - r.min(g).min(b));
        // s = range / value; s becomes min(factor * s, 1), and the distance of every channel from the value is scaled alike.
        // If the range is zero, so are all distances.
        let some = if range > 0.0 { range } else { 1.0 };
        let factor = factor.min(value / some);
        *pixel = [r, g, b].map(|v| clip(value - (value - v) * factor)).to_pixel();
    }
}

/// Rotates the colour circle by `turn` in `-0.5..=0.5`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn hue(pixels: &mut [[f32; 4]], turn: f32) {
    for pixel in pixels {
        let [r, g, b, _] = *pixel;
        let (value, range) = (r.max(g).max(b), r.max(g).max(b) - r.min(g).min(b));
        // If the range is zero, every channel equals the value, whatever the hue.
        let some = if range > 0.0 { range } else { 1.0 };
        let from_others = if g == value { 2.0 + (b - r) / some } else { 4.0 + (r - g) / some };
        let sixth = if r == value { (g - b) / some } else { from_others };
        // In -1..=5 before the rotation, so that the remainder by 6 takes at most one step.
        let turned = sixth + 6.0 * turn;
        let above = if turned < 0.0 { turned + 6.0 } else { turned };
        let sixth = if above >= 6.0 && turned >= 0.0 { above - 6.0 } else { above };
        // A channel lies below the value by a part of the range that depends on its distance on the circle.
        let channel = |offset: f32| {
            let k = offset + sixth;
            let k = if k >= 6.0 { k - 6.0 } else { k };
            value - range * clip(k.min(4.0 - k))
        };
        *pixel = [channel(5.0), channel(3.0), channel(1.0)].to_pixel();
    }
}

/// Grey in three channels.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn grey(pixels: &mut [[f32; 4]]) {
    for pixel in pixels {
        let [r, g, b, _] = *pixel;
        *pixel = [clip(0.2989 * r + 0.5870 * g + 0.1140 * b); 3].to_pixel();
    }
}

/// Inverts values from `threshold` in `[0, 1]` on.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma"))]
pub fn solarise(pixels: &mut [[f32; 4]], threshold: f32) {
    for pixel in pixels {
        let [r, g, b, _] = *pixel;
        *pixel = [r, g, b].map(|v| if v < threshold { v } else { 1.0 - v }).to_pixel();
    }
}

trait ToPixel {
    fn to_pixel(self) -> [f32; 4];
}

impl ToPixel for [f32; 3] {
    fn to_pixel(self) -> [f32; 4] {
        [self[0], self[1], self[2], 0.0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: [[f32; 4]; 3] = [[0.2, 0.6, 0.4, 0.0], [1.0, 0.0, 0.5, 0.0], [0.3, 0.3, 0.3, 0.0]];

    fn close(got: [f32; 4], expected: [f32; 4]) {
        let worst = (0..4).map(|c| (got[c] - expected[c]).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "got {got:?}, expected {expected:?}");
    }

    #[test]
    fn neutral_factors_change_nothing() {
        for (op, neutral) in [
            (brightness as fn(&mut [[f32; 4]], f32), 1.0),
            (brightness_added, 0.0),
            (contrast, 1.0),
            (saturation, 1.0),
            (hue, 0.0),
        ] {
            let mut pixels = IMAGE;
            op(&mut pixels, neutral);
            for (got, expected) in pixels.into_iter().zip(IMAGE) {
                close(got, expected);
            }
        }
    }

    #[test]
    fn each_operation_gives_a_known_pixel() {
        let apply = |op: fn(&mut [[f32; 4]], f32), x: f32, pixel: [f32; 4]| {
            let mut pixels = [pixel];
            op(&mut pixels, x);
            pixels[0]
        };
        close(apply(hue, 1.0 / 3.0, [1.0, 0.25, 0.0, 0.0]), [0.0, 1.0, 0.25, 0.0]);
        close(apply(hue, -0.5, [0.8, 0.2, 0.2, 0.0]), [0.2, 0.8, 0.8, 0.0]);
        close(apply(saturation, 0.5, [0.8, 0.4, 0.0, 0.0]), [0.8, 0.6, 0.4, 0.0]);
        close(apply(saturation, 9.0, [0.8, 0.6, 0.4, 0.0]), [0.8, 0.4, 0.0, 0.0]);
        close(apply(brightness_added, 0.5, [0.8, 0.4, 0.0, 0.0]), [1.0, 0.9, 0.5, 0.0]);
        close(apply(solarise, 0.5, [0.5, 0.4, 1.0, 0.0]), [0.5, 0.4, 0.0, 0.0]);
        let mut pixels = [[0.2, 0.0, 1.0, 0.0], [0.6, 0.0, 0.0, 0.0]];
        contrast(&mut pixels, 0.5);
        close(pixels[0], [0.3, 0.0, 0.75, 0.0]);
        grey(&mut pixels);
        close(pixels[1], [0.17795, 0.17795, 0.17795, 0.0]);
    }
}

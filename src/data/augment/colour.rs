//! Colour operations on 8-bit images, bit-identical to Pillow.
//!
//! Brightness, contrast and saturation are Pillow's `ImageEnhance`: a blend, truncated, between the image and
//! black, its mean grey, and its own grey. Hue goes through Pillow's 8-bit HSV
//! (src/libImaging/{Blend,Convert}.c); the conversion to HSV and back loses up to a few levels, as in training with
//! torchvision. Pixels are `[r, g, b, 0]`.

use multiversion::multiversion;

/// Grey value of a pixel, with ITU-R 601-2 weights in 16 bits.
#[inline(always)]
fn luma([r, g, b]: [u32; 3]) -> u32 {
    (19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16
}

/// `from + factor * (to - from)`, truncated and clipped.
#[inline(always)]
fn blend(from: u32, to: u32, factor: f32) -> u32 {
    let (from, to) = (from as i32 as f32, to as i32 as f32);
    clipped(from + factor * (to - from)) as u32
}

/// Truncated and clipped to 8 bits.
#[inline(always)]
#[allow(clippy::manual_clamp)] // which keeps a NaN
pub fn clipped(value: f32) -> i32 {
    let value = value.max(0.0).min(255.0);
    // SAFETY: in 0..=255, a NaN too. `as` would be the same one value at a time: it tests each for its range.
    unsafe { value.to_int_unchecked() }
}

/// Truncated, of what is in 0..=256.
#[inline(always)]
fn truncated(value: f64) -> i32 {
    debug_assert!((0.0..=256.0).contains(&value), "{value} is outside the levels");
    // SAFETY: every caller has quotients of levels between 0 and 1, times at most 255.
    unsafe { value.to_int_unchecked() }
}

/// A pixel's channels, in the width that all arithmetic here has: so the loops run on whole vectors.
#[inline(always)]
fn wide(pixel: [u8; 4]) -> [u32; 3] {
    let word = u32::from_le_bytes(pixel);
    [word & 255, (word >> 8) & 255, (word >> 16) & 255]
}

/// Back from [`wide`]; each channel below 256.
#[inline(always)]
fn narrow([r, g, b]: [u32; 3]) -> [u8; 4] {
    (r | (g << 8) | (b << 16)).to_le_bytes()
}

/// Scales towards black. `factor >= 0`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn brightness(pixels: &mut [[u8; 4]], factor: f32) {
    for pixel in pixels {
        *pixel = narrow(wide(*pixel).map(|v| blend(0, v, factor)));
    }
}

/// Scales around the mean grey. `factor >= 0`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn contrast(pixels: &mut [[u8; 4]], factor: f32) {
    // 2^16 greys of 8 bits fit in 32.
    let run = |pixels: &[[u8; 4]]| u64::from(pixels.iter().map(|&p| luma(wide(p))).sum::<u32>());
    let sum: u64 = pixels.chunks(1 << 16).map(run).sum();
    let mean = (sum as f64 / pixels.len().max(1) as f64 + 0.5) as u32;
    for pixel in pixels {
        *pixel = narrow(wide(*pixel).map(|v| blend(mean, v, factor)));
    }
}

/// Scales around each pixel's grey. `factor >= 0`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn saturation(pixels: &mut [[u8; 4]], factor: f32) {
    for pixel in pixels {
        let rgb = wide(*pixel);
        let grey = luma(rgb);
        *pixel = narrow(rgb.map(|v| blend(grey, v, factor)));
    }
}

/// A rotation of the colour circle in 255ths: truncated, and wrapped later, as torchvision's `np.int32(hue_factor *
/// 255).astype(np.uint8)`.
pub fn steps(turn: f32) -> i32 {
    (f64::from(turn) * 255.0) as i32
}

/// Rotates the colour circle by `turn` in `-0.5..=0.5`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn hue(pixels: &mut [[u8; 4]], turn: f32) {
    let shift = steps(turn);
    for pixel in pixels {
        let [h, s, v] = to_hsv(wide(*pixel).map(|v| v as i32));
        *pixel = narrow(from_hsv([(h + shift) & 255, s, v]).map(|v| v as u32));
    }
}

/// Grey in three channels.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn grey(pixels: &mut [[u8; 4]]) {
    for pixel in pixels {
        *pixel = narrow([luma(wide(*pixel)); 3]);
    }
}

/// Inverts values from `threshold` in `[0, 1]` on.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
pub fn solarise(pixels: &mut [[u8; 4]], threshold: f32) {
    let first = threshold * 255.0;
    for pixel in pixels {
        let inverted = |v: u32| if v as i32 as f32 >= first { 255 - v } else { v };
        *pixel = narrow(wide(*pixel).map(inverted));
    }
}

// Both conversions avoid branches, which noise would mispredict. The mixture of f32 and f64 is that of the C code, where a
// literal is a double. Integers are signed because vector instructions convert those.

#[inline(always)]
fn to_hsv([r, g, b]: [i32; 3]) -> [i32; 3] {
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    // Grey and black pixels would divide by zero; by one they get hue and saturation 0, as they should.
    let range = (max - min).max(1) as f32;
    let saturation = (max - min) as f32 / max.max(1) as f32;
    let away = |v: i32| f64::from((max - v) as f32 / range);
    let (r_away, g_away, b_away) = (away(r), away(g), away(b));
    // Exact in f64, so rounded once: the same where C subtracts two f32.
    let from_red = b_away - g_away;
    let from_green = 2.0 + r_away - b_away;
    let from_blue = 4.0 + g_away - r_away;
    let others = if g == max { from_green } else { from_blue };
    let sixth = (if r == max { from_red } else { others }) as f32;
    // In 5/6..2, so that the remainder by 1 takes at most one subtraction.
    let turn = f64::from(sixth) / 6.0 + 1.0;
    let hue = (if turn >= 1.0 { turn - 1.0 } else { turn }) as f32;
    [truncated(f64::from(hue) * 255.0), truncated(f64::from(saturation) * 255.0), max]
}

#[inline(always)]
fn from_hsv([h, s, v]: [i32; 3]) -> [i32; 3] {
    let sixth = f64::from(h) * 6.0 / 255.0;
    let sector = truncated(sixth); // 6 at the very end, which is 0 again
    let f = f64::from((sixth - f64::from(sector)) as f32);
    let s = f64::from((f64::from(s) / 255.0) as f32);
    let level = |x: f64| truncated(f64::from(v) * x + 0.5); // of what is never negative: rounds
    // Without saturation all three are the value.
    let (p, q, t) = (level(1.0 - s), level(1.0 - s * f), level(1.0 - s * (1.0 - f)));
    let choose = |[a, b, c, d, e, f]: [i32; 6]| {
        let (low, high) = (if sector == 1 { b } else { c }, if sector == 3 { d } else { e });
        let inner = if sector <= 2 { low } else { high };
        let outer = if sector == 5 { f } else { a };
        if sector % 6 == 0 || sector == 5 { outer } else { inner }
    };
    [choose([v, q, p, p, t, v]), choose([t, v, v, q, p, p]), choose([p, p, t, v, v, q])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_of_one_changes_nothing_and_of_zero_everything() {
        let image = [[10, 200, 30, 0], [255, 0, 128, 0], [7, 7, 7, 0]];
        for op in [brightness, contrast, saturation] {
            let mut same = image;
            op(&mut same, 1.0);
            assert_eq!(same, image);
        }
        let zero = |op: fn(&mut [[u8; 4]], f32)| {
            let mut pixels = image;
            op(&mut pixels, 0.0);
            pixels
        };
        assert_eq!(zero(brightness), [[0; 4]; 3]);
        assert_eq!(zero(contrast), [[74, 74, 74, 0]; 3]);
        assert_eq!(zero(saturation), [[124, 124, 124, 0], [91, 91, 91, 0], [7, 7, 7, 0]]);
    }

    #[test]
    fn a_third_of_the_circle_takes_red_to_green() {
        let mut pixels = [[255, 0, 0, 0], [0, 255, 0, 0], [90, 90, 90, 0]];
        hue(&mut pixels, 1.0 / 3.0);
        assert_eq!(pixels, [[0, 255, 0, 0], [0, 0, 255, 0], [90, 90, 90, 0]]);
    }

    #[test]
    fn grey_and_solarised_pixels_are_known_ones() {
        let mut pixels = [[255, 0, 0, 0], [1, 2, 3, 0]];
        grey(&mut pixels);
        assert_eq!(pixels, [[76, 76, 76, 0], [2, 2, 2, 0]]);
        let mut pixels = [[127, 128, 255, 0]];
        solarise(&mut pixels, 0.5);
        assert_eq!(pixels, [[127, 127, 0, 0]]);
    }
}

//! Colours of 8-bit images, to the bit as Pillow changes them.
//!
//! Brightness, contrast and saturation are Pillow's `ImageEnhance`: a blend, truncated, between the image and
//! black, its mean grey, and its own grey. Hue goes through Pillow's 8-bit HSV
//! (src/libImaging/{Blend,Convert}.c); that conversion there and back loses up to a few levels, which training
//! with torchvision sees, and so does this. Pixels are `[r, g, b, 0]`. Floor 5.

/// Grey value of a pixel, with ITU-R 601-2 weights in 16 bits.
pub fn luma(pixel: [u8; 4]) -> u8 {
    let [r, g, b, _] = pixel.map(u32::from);
    ((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8
}

/// `from + factor * (to - from)`, truncated and clipped.
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let (from, to) = (f32::from(from), f32::from(to));
    (from + factor * (to - from)) as u8
}

/// Scales towards black. `factor >= 0`.
pub fn brightness(pixels: &mut [[u8; 4]], factor: f32) {
    pixels.as_flattened_mut().iter_mut().for_each(|v| *v = blend(0, *v, factor));
}

/// Scales around the mean grey. `factor >= 0`.
pub fn contrast(pixels: &mut [[u8; 4]], factor: f32) {
    let sum: u64 = pixels.iter().map(|&p| u64::from(luma(p))).sum();
    let mean = (sum as f64 / pixels.len().max(1) as f64 + 0.5) as u8;
    // A value has one of 256 results.
    let table: [u8; 256] = std::array::from_fn(|v| blend(mean, v as u8, factor));
    for [r, g, b, _] in pixels {
        (*r, *g, *b) = (table[usize::from(*r)], table[usize::from(*g)], table[usize::from(*b)]);
    }
}

/// Scales around each pixel's grey. `factor >= 0`.
pub fn saturation(pixels: &mut [[u8; 4]], factor: f32) {
    for pixel in pixels {
        let grey = luma(*pixel);
        let [r, g, b, _] = *pixel;
        *pixel = [blend(grey, r, factor), blend(grey, g, factor), blend(grey, b, factor), 0];
    }
}

/// Turns the colour circle by `turn` in `-0.5..=0.5`.
pub fn hue(pixels: &mut [[u8; 4]], turn: f32) {
    // Truncated and wrapped, as torchvision's `np.int32(hue_factor * 255).astype(np.uint8)`.
    let shift = (f64::from(turn) * 255.0) as i32 as u8;
    for pixel in pixels {
        let [h, s, v] = to_hsv(*pixel);
        *pixel = from_hsv([h.wrapping_add(shift), s, v]);
    }
}

/// Grey in three channels.
pub fn grey(pixels: &mut [[u8; 4]]) {
    for pixel in pixels {
        let grey = luma(*pixel);
        *pixel = [grey, grey, grey, 0];
    }
}

/// Inverts values from `threshold` in `[0, 1]` on.
pub fn solarise(pixels: &mut [[u8; 4]], threshold: f32) {
    for [r, g, b, _] in pixels {
        for value in [r, g, b] {
            if f32::from(*value) >= threshold * 255.0 {
                *value = 255 - *value;
            }
        }
    }
}

fn to_hsv([r, g, b, _]: [u8; 4]) -> [u8; 3] {
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    if max == min {
        return [0, 0, max];
    }
    let range = f32::from(max - min);
    let saturation = range / f32::from(max);
    let away = |v: u8| f32::from(max - v) / range;
    // The mixture of f32 and f64 is that of the C code, where a literal is a double.
    let sixth = if r == max {
        away(b) - away(g)
    } else if g == max {
        (2.0 + f64::from(away(r)) - f64::from(away(b))) as f32
    } else {
        (4.0 + f64::from(away(g)) - f64::from(away(r))) as f32
    };
    // In 5/6..2, so that the remainder by 1 is at most one subtraction.
    let turn = f64::from(sixth) / 6.0 + 1.0;
    let hue = (if turn >= 1.0 { turn - 1.0 } else { turn }) as f32;
    [(f64::from(hue) * 255.0) as u8, (f64::from(saturation) * 255.0) as u8, max]
}

fn from_hsv([h, s, v]: [u8; 3]) -> [u8; 4] {
    if s == 0 {
        return [v, v, v, 0];
    }
    let sixth = f64::from(f32::from(h)) * 6.0 / 255.0;
    let sector = sixth as u8;
    let f = f64::from((sixth - f64::from(sector)) as f32);
    let s = f64::from((f64::from(s) / 255.0) as f32);
    let level = |x: f64| (f64::from(v) * x + 0.5) as u8; // of what is never negative: rounds
    let (p, q, t) = (level(1.0 - s), level(1.0 - s * f), level(1.0 - s * (1.0 - f)));
    match sector % 6 {
        0 => [v, t, p, 0],
        1 => [q, v, p, 0],
        2 => [p, v, t, 0],
        3 => [p, q, v, 0],
        4 => [t, p, v, 0],
        _ => [v, p, q, 0],
    }
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

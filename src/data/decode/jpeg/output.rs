//! From samples to RGB: upsampling and colour conversion as in libjpeg-turbo (`jdsample.c`, `jdcolor.c`), and CMYK as in
//! Pillow (`Convert.c`), to the bit.

use multiversion::multiversion;

use super::header::{Colour, Component, Frame};
use super::scan::Plane;

/// How the samples of a component become as many as the image has pixels.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Upsampling {
    /// They are as many.
    None,
    /// Twice as many across, interpolated.
    Across,
    /// Twice as many down, interpolated.
    Down,
    /// Twice as many across and down, interpolated.
    Both,
    /// Each is repeated.
    Repeat,
}

fn upsampling(frame: &Frame, component: &Component) -> Upsampling {
    let times = [0, 1].map(|i| frame.factors[i] / component.factors[i]);
    // libjpeg interpolates across from three samples on.
    let wide = component.size[0] > 2;
    match times {
        [1, 1] => Upsampling::None,
        [2, 1] if wide => Upsampling::Across,
        [1, 2] => Upsampling::Down,
        [2, 2] if wide => Upsampling::Both,
        _ => Upsampling::Repeat,
    }
}

/// Writes an image of `[height, width, 3]` values.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub fn to_rgb(frame: &Frame, colour: Colour, planes: &[Plane], pixels: &mut [u8]) {
    let width = frame.width;
    let kinds: Vec<Upsampling> = frame.components.iter().map(|c| upsampling(frame, c)).collect();
    // Twice the samples of a component, which may exceed the width by one; and sums of two rows.
    let mut rows = vec![vec![0u8; width + 8]; frame.components.len()];
    let mut sums = vec![0u16; width + 8];
    for (y, out) in pixels.chunks_exact_mut(3 * width).enumerate() {
        for (i, component) in frame.components.iter().enumerate() {
            upsample(frame, component, kinds[i], &planes[i], y, &mut sums, &mut rows[i]);
        }
        let row = |i: usize| -> &[u8] {
            if kinds[i] == Upsampling::None {
                &planes[i].samples[y * planes[i].stride..][..width]
            } else {
                &rows[i][..width]
            }
        };
        match colour {
            Colour::Grey => grey(row(0), out),
            Colour::Rgb => interleave(row(0), row(1), row(2), out),
            Colour::YCbCr => from_ycbcr(row(0), row(1), row(2), out),
            Colour::Cmyk => {
                interleave(row(0), row(1), row(2), out);
                darken(out, row(3));
            }
            Colour::Ycck => {
                from_ycbcr(row(0), row(1), row(2), out);
                out.iter_mut().for_each(|value| *value = 255 - *value);
                darken(out, row(3));
            }
        }
    }
}

#[inline(always)]
fn upsample(
    frame: &Frame,
    component: &Component,
    kind: Upsampling,
    plane: &Plane,
    y: usize,
    sums: &mut [u16],
    into: &mut [u8],
) {
    let [across, down] = [0, 1].map(|i| frame.factors[i] / component.factors[i]);
    let count = component.size[0];
    let row = |y: usize| &plane.samples[y * plane.stride..][..count];
    // The row that is nearest, and the one that is nearest on the other side; at an edge the same once more.
    let near = row(y / down);
    let far = |y: usize| {
        let other = if y.is_multiple_of(2) { (y / 2).saturating_sub(1) } else { y / 2 + 1 };
        row(other.min(component.size[1] - 1))
    };
    match kind {
        Upsampling::None => {}
        Upsampling::Across => {
            let into = &mut into[..2 * count];
            for i in 1..count - 1 {
                let middle = 3 * u16::from(near[i]);
                into[2 * i] = ((middle + u16::from(near[i - 1]) + 1) >> 2) as u8;
                into[2 * i + 1] = ((middle + u16::from(near[i + 1]) + 2) >> 2) as u8;
            }
            let edge =
                |one: u8, two: u8, bias| ((3 * u16::from(one) + u16::from(two) + bias) >> 2) as u8;
            (into[0], into[1]) = (near[0], edge(near[0], near[1], 2));
            let last = count - 1;
            (into[2 * last], into[2 * last + 1]) =
                (edge(near[last], near[last - 1], 1), near[last]);
        }
        Upsampling::Down => {
            let bias = 1 + (y % 2) as u16;
            for ((place, near), far) in into.iter_mut().zip(near).zip(far(y)) {
                *place = ((3 * u16::from(*near) + u16::from(*far) + bias) >> 2) as u8;
            }
        }
        Upsampling::Both => {
            let sums = &mut sums[..count];
            for ((sum, near), far) in sums.iter_mut().zip(near).zip(far(y)) {
                *sum = 3 * u16::from(*near) + u16::from(*far);
            }
            let into = &mut into[..2 * count];
            for i in 1..count - 1 {
                into[2 * i] = ((3 * sums[i] + sums[i - 1] + 8) >> 4) as u8;
                into[2 * i + 1] = ((3 * sums[i] + sums[i + 1] + 7) >> 4) as u8;
            }
            let last = count - 1;
            into[0] = ((4 * sums[0] + 8) >> 4) as u8;
            into[1] = ((3 * sums[0] + sums[1] + 7) >> 4) as u8;
            into[2 * last] = ((3 * sums[last] + sums[last - 1] + 8) >> 4) as u8;
            into[2 * last + 1] = ((4 * sums[last] + 7) >> 4) as u8;
        }
        Upsampling::Repeat => {
            for (places, value) in into[..frame.width].chunks_mut(across).zip(near) {
                places.fill(*value);
            }
        }
    }
}

#[inline(always)]
fn grey(values: &[u8], out: &mut [u8]) {
    for (place, value) in out.chunks_exact_mut(3).zip(values) {
        place.fill(*value);
    }
}

#[inline(always)]
fn interleave(red: &[u8], green: &[u8], blue: &[u8], out: &mut [u8]) {
    for (((place, &r), &g), &b) in out.chunks_exact_mut(3).zip(red).zip(green).zip(blue) {
        (place[0], place[1], place[2]) = (r, g, b);
    }
}

#[inline(always)]
fn from_ycbcr(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [u8]) {
    for (((place, &y), &cb), &cr) in out.chunks_exact_mut(3).zip(y).zip(cb).zip(cr) {
        let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
        // 1.402, 0.34414, 0.71414 and 1.772 in 16 bits.
        let half = 1 << 15;
        place[0] = (y + ((91_881 * cr + half) >> 16)).clamp(0, 255) as u8;
        place[1] = (y + ((half - 22_554 * cb - 46_802 * cr) >> 16)).clamp(0, 255) as u8;
        place[2] = (y + ((116_130 * cb + half) >> 16)).clamp(0, 255) as u8;
    }
}

/// CMYK as Adobe writes it, inverted: each colour times the key over 255, rounded as Pillow does.
#[inline(always)]
fn darken(colours: &mut [u8], key: &[u8]) {
    for (place, &key) in colours.chunks_exact_mut(3).zip(key) {
        for value in place {
            let product = u32::from(255 - *value) * u32::from(key) + 128;
            *value = key.saturating_sub((((product >> 8) + product) >> 8) as u8);
        }
    }
}

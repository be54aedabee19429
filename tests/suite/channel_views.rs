//! Views of images of any channels and bits, against a naive reference in f64, and what is refused.

use selfsup::data::augment::{
    Blur, BlurKind, ChannelParams, ColourOp, Filter, Jitter, Noise, Normalise, Params, Pixels,
    Policy, Scratch, Solarise,
};
use selfsup::data::{Format, Image};
use selfsup::device::{Philox, Purpose, philox4x32};

/// Brightness and contrast of a channel: the first two words of a block.
fn of_channel(jitter: &Jitter, own: &ChannelParams, channel: usize) -> [f32; 2] {
    let words = philox4x32(own.key, [channel as u32, 0, 0, 0]);
    let unit = |word: u32| (word >> 8) as f32 / 16_777_216.0;
    let factor = |range: f32, word: u32| {
        let low = (1.0 - range).max(0.0);
        low + (1.0 + range - low) * unit(word)
    };
    let brightness = match jitter.additive_brightness {
        true => 2.0 * jitter.brightness * unit(words[0]) - jitter.brightness,
        false => factor(jitter.brightness, words[0]),
    };
    [brightness, factor(jitter.contrast, words[1])]
}

/// The sum of a block's bytes, centred and scaled.
fn normal(key: [u32; 2], pixel: usize, channel: usize) -> f64 {
    let words = philox4x32(key, [pixel as u32, channel as u32, 0, 1]);
    let sum: f64 = words.iter().flat_map(|word| word.to_le_bytes()).map(f64::from).sum();
    (sum - 16.0 * 127.5) / (16.0 * 65_535.0 / 12.0f64).sqrt()
}

fn noise_image(width: usize, height: usize, format: Format) -> Image {
    let mut image = Image::default();
    image.reshape(width, height, format);
    let mut rng = Philox::new(3, Purpose::Test, 0, format.channels as u32);
    image.pixels.iter_mut().for_each(|v| *v = rng.next_u32() as u8);
    image
}

fn sample(image: &Image, x: usize, y: usize, c: usize) -> f64 {
    let at = (y * image.width + x) * image.format.channels + c;
    match image.format.bits {
        8 => f64::from(image.pixels[at]) / 255.0,
        _ => {
            let bytes = [image.pixels[2 * at], image.pixels[2 * at + 1]];
            f64::from(u16::from_le_bytes(bytes)) / 65535.0
        }
    }
}

/// Weights of the input pixels of an axis for output pixel `i`: a filter of this support, widened by the scale.
fn weights(input: usize, output: usize, i: usize, bicubic: bool) -> Vec<f64> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let center = (i as f64 + 0.5) * scale;
    let support = stretch * if bicubic { 2.0 } else { 1.0 };
    let from = (center - support + 0.5).max(0.0) as usize;
    let to = ((center + support + 0.5) as usize).min(input);
    let weight = |k: usize| {
        let x = ((k as f64 + 0.5 - center) / stretch).abs();
        match bicubic {
            false => (1.0 - x).max(0.0),
            true if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            true if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            true => 0.0,
        }
    };
    let all: Vec<f64> =
        (0..input).map(|k| if (from..to).contains(&k) { weight(k) } else { 0.0 }).collect();
    let sum: f64 = all.iter().sum();
    all.iter().map(|w| w / sum).collect()
}

/// A view computed naively in f64, channel by channel.
fn reference(policy: &Policy, params: &Params, image: &Image) -> Vec<f64> {
    let (size, format, crop) = (policy.size, image.format, params.crop);
    let (channels, padded) = (format.channels, format.device_channels());
    let bicubic = policy.filter == Filter::Bicubic;
    let mut out = vec![0.0; size * size * padded];
    for c in 0..channels {
        let mut plane = vec![0.0; size * size];
        for (i, value) in plane.iter_mut().enumerate() {
            let (x, y) = (i % size, i / size);
            let x = if params.flip { size - 1 - x } else { x };
            let (across, down) =
                (weights(crop.width, size, x, bicubic), weights(crop.height, size, y, bicubic));
            let mut sum = 0.0;
            for (v, w) in down.iter().enumerate().filter(|(_, w)| **w != 0.0) {
                for (u, z) in across.iter().enumerate().filter(|(_, z)| **z != 0.0) {
                    sum += w * z * sample(image, crop.left + u, crop.top + v, c);
                }
            }
            *value = sum.clamp(0.0, 1.0);
        }
        if let (Some(drawn), Some(jitter)) = (&params.jitter, &policy.jitter) {
            let own = match (jitter.per_channel, &params.channels) {
                (true, Some(own)) => of_channel(jitter, own, c),
                _ => [drawn.brightness, drawn.contrast],
            };
            let [brightness, factor] = own.map(f64::from);
            for op in drawn.order {
                let mean = plane.iter().sum::<f64>() / plane.len() as f64;
                let change = |v: f64| match op {
                    ColourOp::Brightness if jitter.additive_brightness => v + brightness,
                    ColourOp::Brightness => v * brightness,
                    ColourOp::Contrast => (v - mean) * factor + mean,
                    _ => v,
                };
                plane.iter_mut().for_each(|v| *v = change(*v).clamp(0.0, 1.0));
            }
        }
        let own = params.channels;
        let dropped = own.and_then(|own| own.drop).map(|share| (share * channels as f32) as usize);
        if dropped == Some(c) {
            plane.fill(0.0);
        }
        if let Some(sigma) = params.blur {
            let radius = (size / 20) as isize;
            let bell = |t: isize| (-((t * t) as f64) / (2.0 * f64::from(sigma).powi(2))).exp();
            let sum: f64 = (-radius..=radius).map(bell).sum();
            for step in [1, size] {
                let before = plane.clone();
                for (i, value) in plane.iter_mut().enumerate() {
                    let place = if step == 1 { i % size } else { i / size } as isize;
                    let inside = |t: &isize| (0..size as isize).contains(&(place + t));
                    let taps = (-radius..=radius).filter(inside);
                    *value = taps
                        .map(|t| bell(t) / sum * before[(i as isize + t * step as isize) as usize])
                        .sum();
                }
            }
        }
        if let Some((own, std)) = own.and_then(|own| Some((own, own.noise?))) {
            for (i, value) in plane.iter_mut().enumerate() {
                let drawn = f64::from(std) * normal(own.key, i, c);
                *value = (*value + drawn).clamp(0.0, 1.0);
            }
        }
        if let (true, Some(solarise)) = (params.solarise, &policy.solarise) {
            let inverted = |v: f64| if v < f64::from(solarise.threshold) { v } else { 1.0 - v };
            plane.iter_mut().for_each(|v| *v = inverted(*v));
        }
        let (mean, std) = policy.normalise.as_ref().map_or((0.0, 1.0), |n| (n.mean[c], n.std[c]));
        for (i, value) in plane.iter().enumerate() {
            out[i * padded + c] = (value - f64::from(mean)) / f64::from(std);
        }
    }
    out
}

/// A policy with everything that images of these channels have.
fn policy(channels: usize, size: usize) -> Policy {
    Policy {
        pixels: Pixels::Float,
        flip: 0.5,
        jitter: Some(Jitter {
            p: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.0,
            hue: 0.0,
            additive_brightness: size.is_multiple_of(3),
            per_channel: channels > 1,
        }),
        channel_drop: if channels > 1 { 0.5 } else { 0.0 },
        noise: Some(Noise { p: 0.5, std: [0.01, 0.1] }),
        blur: Some(Blur { p: 0.5, sigma: [0.1, 2.0], kind: BlurKind::Gaussian }),
        // Off the levels that rounding puts on either side.
        solarise: Some(Solarise { p: 0.3, threshold: 0.5 }),
        filter: if size > 20 { Filter::Bicubic } else { Filter::Bilinear },
        normalise: Some(Normalise {
            mean: (0..channels).map(|c| 0.3 + 0.02 * c as f32).collect(),
            std: (0..channels).map(|c| 0.2 + 0.01 * c as f32).collect(),
        }),
        ..Policy::crop(size)
    }
}

#[test]
fn views_of_any_channels_and_bits_are_those_of_a_naive_f64_reference() {
    let mut compared = 0;
    for (channels, bits) in [(1, 8), (1, 16), (2, 16), (3, 16), (4, 16), (7, 8), (13, 16)] {
        let format = Format { channels, bits };
        let image = noise_image(29, 23, format);
        for size in [8, 15, 24, 45] {
            let policy = policy(channels, size);
            policy.check().and_then(|()| policy.check_for(format)).unwrap();
            for i in 0..6 {
                let mut rng = Philox::new(1, Purpose::Test, size as u32, i);
                let mut params = policy.draw(&mut rng, 29, 23);
                // A value at the threshold may fall on either side of it.
                params.solarise &= i == 5 && params.blur.is_none();
                let mut out = vec![f32::NAN; size * size * format.device_channels()];
                policy.apply(&params, &image, &mut out, &mut Scratch::default());
                let want = reference(&policy, &params, &image);
                let far = |(got, want): &(&f32, f64)| {
                    let inverted =
                        params.solarise && (want.abs() - f64::from(got.abs())).abs() > 1.0;
                    (f64::from(**got) - want).abs() > 2e-5 && !inverted
                };
                let wrong = out.iter().zip(want).filter(far).count();
                assert_eq!(wrong, 0, "{format}, {size}, {params:?}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 168);
}

#[test]
fn what_is_not_defined_for_the_channels_is_refused_with_what_to_write() {
    let four = Format { channels: 4, bits: 16 };
    let said = |change: &dyn Fn(&mut Policy), format: Format| {
        let mut policy = policy(format.channels, 16);
        change(&mut policy);
        policy.check_for(format).unwrap_err().to_string()
    };
    let hue = said(&|p| p.jitter.as_mut().unwrap().hue = 0.1, four);
    assert!(
        hue.contains("jitter.hue = 0.1 is defined for red, green and blue")
            && hue.contains("write jitter.hue = 0, and in its place channel_drop = 0.2"),
        "{hue}"
    );
    assert!(said(&|p| p.grey = 0.2, four).contains("grey = 0.2 is defined for red"));
    assert!(said(&|p| p.pixels = Pixels::U8, four).contains("write pixels = \"float\""));
    assert!(said(&|p| p.normalise = Some(Normalise::imagenet()), four).contains("has 3 means"));
    let one = Format { channels: 1, bits: 8 };
    assert!(said(&|p| p.channel_drop = 0.1, one).contains("would leave nothing"));
    let grey = said(&|p| p.grey = 0.2, one);
    assert!(grey.contains("1 channel: write grey = 0, and in its place noise"), "{grey}");
}

#[test]
fn every_channel_can_be_dropped_and_noise_is_nearly_normal() {
    for channels in [2, 4, 7] {
        let format = Format { channels, bits: 16 };
        let mut image = Image::default();
        image.reshape(8, 8, format);
        image.pixels.fill(0x77);
        let policy = Policy { pixels: Pixels::Float, ..Policy::crop(8) };
        let policy = Policy { channel_drop: 1.0, ..policy };
        let mut seen = std::collections::BTreeSet::new();
        for i in 0..200 {
            let params = policy.draw(&mut Philox::new(2, Purpose::Test, 0, i), 8, 8);
            let mut out = vec![f32::NAN; 64 * format.device_channels()];
            policy.apply(&params, &image, &mut out, &mut Scratch::default());
            let dropped: Vec<usize> = (0..channels).filter(|&c| out[c] == 0.0).collect();
            assert_eq!(dropped.len(), 1, "{out:?}");
            seen.extend(dropped);
        }
        assert_eq!(seen.len(), channels);
    }
    let drawn: Vec<f64> = (0..20_000).map(|i| normal([7, 9], i, 2)).collect();
    let mean = drawn.iter().sum::<f64>() / 20_000.0;
    let moment = |k: i32| drawn.iter().map(|v| v.powi(k)).sum::<f64>() / 20_000.0;
    assert!(mean.abs() < 0.03 && (moment(2) - 1.0).abs() < 0.05, "{mean} {}", moment(2));
    // 3 of a normal distribution; of the sum of sixteen uniform numbers 3 - 6 / (5 * 16).
    assert!((moment(4) - 2.925).abs() < 0.2, "{}", moment(4));
}

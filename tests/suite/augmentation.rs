//! Augmentation compared with Pillow and torchvision bit for bit, and with TensorFlow's definitions in numpy's f64.
//!
//! `scripts/make-goldens augmentation` writes the goldens. The name of each is its case in JSON: an image given by a formula, the
//! policy as in a recipe, and the random numbers that the policy would draw. See scripts/goldens/augmentation.py.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};
use selfsup::data::Image;
use selfsup::data::augment::{
    ColourOp, CropBox, JitterParams, Params, Pixels, Policy, Scratch, center,
};
use serde_json::Value;

use crate::seeded::{bits, seed};

/// Allowed difference of f32 from f64 for values in `[0, 1]`. The worst chain reaches 9e-7.
pub const FLOAT: f64 = 4e-6;

const LEVELS: [u8; 12] = [0, 1, 36, 73, 109, 127, 128, 146, 182, 219, 254, 255];

fn image(kind: &str, width: usize, height: usize) -> Image {
    let seed = seed(&format!("{kind} {width} {height}"));
    let noise = |i: usize| (bits(seed, i as u64) >> 56) as usize;
    let columns = width / 8 + 2;
    let value = |x: usize, y: usize, c: usize| match kind {
        "levels" => LEVELS[(y * width + x) * 37 % 1728 / 12usize.pow(c as u32) % 12],
        "noise" => noise((y * width + x) * 3 + c) as u8,
        "clouds" => {
            let corner = |down: usize, across: usize| {
                let weight = |far: usize, at: usize| if far == 1 { at % 8 } else { 8 - at % 8 };
                let at = ((y / 8 + down) * columns + x / 8 + across) * 3 + c;
                weight(down, y) * weight(across, x) * noise(at)
            };
            ((corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)) / 64) as u8
        }
        _ => panic!("no image of kind {kind}"),
    };
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            pixels.extend((0..3).map(|c| value(x, y, c)));
        }
    }
    Image { width, height, pixels, ..Image::default() }
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a size")) as usize
}

fn number(value: &Value) -> f32 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number")) as f32
}

pub fn params(case: &Value) -> Params {
    let crop = case["crop"].as_array().unwrap();
    let crop = CropBox {
        left: size(&crop[0]),
        top: size(&crop[1]),
        width: size(&crop[2]),
        height: size(&crop[3]),
    };
    let jitter = case.get("jitter").map(|drawn| {
        use ColourOp::*;
        let order = std::array::from_fn(|i| {
            [Brightness, Contrast, Saturation, Hue][size(&drawn["order"][i])]
        });
        let [brightness, contrast, saturation, hue] =
            ["brightness", "contrast", "saturation", "hue"].map(|name| number(&drawn[name]));
        JitterParams { order, brightness, contrast, saturation, hue }
    });
    let is = |name: &str| case.get(name).is_some_and(|v| v.as_bool().unwrap());
    Params {
        crop,
        flip: is("flip"),
        jitter,
        grey: is("grey"),
        blur: case.get("sigma").map(number),
        solarise: is("solarise"),
        channels: None,
    }
}

/// The input image of a case.
pub fn image_of(case: &Value) -> Image {
    let [kind, width, height] = case["image"].as_array().unwrap().as_slice() else {
        panic!("{case}: an image is a kind, a width and a height")
    };
    image(kind.as_str().unwrap(), size(width), size(height))
}

/// The view that a case describes, `[size, size, 3]`, values in `[0, 1]`.
fn view(case: &Value, policy: &Policy, scratch: &mut Scratch) -> Vec<f32> {
    let image = image_of(case);
    let mut out = vec![f32::NAN; policy.size * policy.size * 4];
    if case.get("center").is_some() {
        center(&image, policy, &mut out, scratch);
    } else {
        policy.apply(&params(case), &image, &mut out, scratch);
    }
    let pixels = out.as_chunks::<4>().0;
    assert!(pixels.iter().all(|p| p[3] == 0.0), "{case}: the fourth channel is not zero");
    pixels.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect()
}

/// The subject of a case: its colour and blur operations, or its resampling if it has none.
fn subject(case: &Value, policy: &Policy) -> String {
    let mut parts: Vec<&str> = ["center", "grey", "sigma", "solarise"]
        .into_iter()
        .filter(|part| case.get(*part).is_some_and(|v| *v != Value::Bool(false)))
        .collect();
    if let Some(drawn) = case.get("jitter") {
        let neutral = [("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0)];
        let changed = neutral.iter().filter(|(name, one)| number(&drawn[*name]) != *one);
        parts.extend(changed.map(|(name, _)| *name));
        parts.extend(policy.jitter.as_ref().filter(|j| j.hue > 0.0).map(|_| "hue"));
        parts.push("jitter");
    }
    match parts.as_slice() {
        [] => format!("{:?}", policy.filter),
        ["jitter"] => "neutral jitter".into(),
        [one] | [one, "jitter"] => (*one).into(),
        _ if case["image"][0] != "levels" && parts.len() > 3 => "chain".into(),
        several => several.join(" "),
    }
}

/// The file of cases.
pub fn goldens() -> Vec<u8> {
    let path = "tests/goldens/augmentation.safetensors";
    std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Checks every case of one arithmetic. Returns the number of cases and the largest difference for each subject.
fn check(
    pixels: Pixels,
    compare: impl Fn(&[f32], &[u8]) -> Result<f64, String>,
) -> BTreeMap<String, (usize, f64)> {
    let bytes = goldens();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (mut scratch, mut seen, mut wrong) = (Scratch::default(), BTreeMap::new(), Vec::new());
    for (name, golden) in file.iter() {
        let case: Value = serde_json::from_str(name).unwrap();
        let policy: Policy = serde_json::from_value(case["policy"].clone()).unwrap();
        policy.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        if policy.pixels != pixels {
            continue;
        }
        let dtype = if pixels == Pixels::U8 { Dtype::U8 } else { Dtype::F32 };
        assert_eq!(golden.dtype(), dtype, "{name}");
        assert_eq!(golden.shape(), [policy.size, policy.size, 3], "{name}");
        // Cases share scratch memory as samples do in a loader: leftovers of one must not affect the next.
        match compare(&view(&case, &policy, &mut scratch), golden.data()) {
            Ok(difference) => {
                let (cases, worst) = seen.entry(subject(&case, &policy)).or_insert((0, 0.0f64));
                *cases += 1;
                *worst = worst.max(difference);
            }
            Err(complaint) => wrong.push(format!("{name}: {complaint}")),
        }
    }
    assert!(wrong.is_empty(), "{} cases differ\n{}", wrong.len(), wrong.join("\n"));
    seen
}

fn counts(seen: &BTreeMap<String, (usize, f64)>) -> Vec<(&str, usize)> {
    seen.iter().map(|(about, (cases, _))| (about.as_str(), *cases)).collect()
}

#[test]
fn eight_bit_views_equal_pillows_and_torchvisions_bit_for_bit() {
    let seen = check(Pixels::U8, |got, golden| {
        // Multiples of 1/255 convert back to the original bytes.
        let got: Vec<u8> = got.iter().map(|v| (v * 255.0).round() as u8).collect();
        let differ = got.iter().zip(golden).filter(|(a, b)| a != b).count();
        let worst = got.iter().zip(golden).map(|(a, b)| a.abs_diff(*b)).max();
        match differ {
            0 => Ok(0.0),
            _ => Err(format!("{differ} of {} values differ, by up to {worst:?}", got.len())),
        }
    });
    let expected = [
        ("Bicubic", 20),
        ("Bilinear", 23),
        ("brightness", 6),
        ("center", 4),
        ("chain", 12),
        ("contrast", 6),
        ("grey", 2),
        ("hue", 10),
        ("neutral jitter", 2),
        ("saturation", 6),
        ("sigma", 60),
        ("solarise", 2),
    ];
    assert_eq!(counts(&seen), expected);
}

#[test]
fn float_views_agree_with_f64() {
    let seen = check(Pixels::Float, |got, golden| {
        let (mut worst, golden) = (0.0f64, golden.as_chunks::<4>().0);
        for (got, want) in got.iter().zip(golden.iter().map(|b| f32::from_le_bytes(*b))) {
            let difference = (f64::from(*got) - f64::from(want)).abs();
            if difference.is_nan() || difference > FLOAT {
                return Err(format!("got {got}, expected {want}"));
            }
            worst = worst.max(difference);
        }
        Ok(worst)
    });
    let expected = [
        ("Bicubic", 7),
        ("Bilinear", 1),
        ("brightness", 3),
        ("brightness hue jitter", 2),
        ("chain", 8),
        ("contrast", 3),
        ("grey", 1),
        ("hue", 2),
        ("saturation", 4),
        ("sigma", 4),
        ("solarise", 1),
    ];
    assert_eq!(counts(&seen), expected);
    let worst = seen.values().map(|(_, worst)| *worst).fold(0.0, f64::max);
    println!("float augmentation: worst difference {worst:.1e}");
}

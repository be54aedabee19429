//! Recipes for a folder of somebody's own images: each setting that follows from the images or from the machine, with its reason.
//!
//! What depends on measured time, the network and the number of epochs, is decided by [`plan`](crate::train::plan()).

use std::fmt::Display;

use super::Recipe;
use crate::data::Reading;
use crate::data::augment::{BlurKind, Noise, Normalise, Pixels, Policy};
use crate::error::{Error, Result};
use crate::nn::Stem;
use crate::optim::LrRule;

/// What is known about somebody's own images.
#[derive(Clone, Debug, PartialEq)]
pub struct OwnImages {
    /// Their folder.
    pub path: String,
    /// Training images.
    pub images: usize,
    /// The median of their shorter sides, in pixels.
    pub side: usize,
    /// Whether none has colour.
    pub grey: bool,
    /// Classes; 0 without labels.
    pub classes: usize,
    /// Whether there is a labelled held-out split.
    pub held_out: bool,
    /// The table that their classes are taken from, if they are.
    pub labels: Option<String>,
    /// How their files are read.
    pub reading: Reading,
    /// Mean of each channel, in `0..=1`.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, in `0..=1`.
    pub std: Vec<f64>,
}

/// One setting that was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What was chosen: `method`, `network`.
    pub what: &'static str,
    /// Its value.
    pub value: String,
    /// The reason, a part of a sentence.
    pub why: String,
}

impl Choice {
    /// A choice.
    pub fn new(what: &'static str, value: impl Display, why: impl Into<String>) -> Self {
        Self { what, value: value.to_string(), why: why.into() }
    }
}

/// The methods that a folder can be trained by.
pub const OWN_METHODS: [&str; 6] = ["simclr", "simclr-v2", "moco", "swav", "byol", "simsiam"];

/// The fewest images that a run on own images is planned for: fewer than two batches teach a network nothing.
pub const FEWEST_IMAGES: usize = 32;

/// Sides from which the stem for larger images is used, and what crops are then worth their time.
const LARGER: usize = 48;

/// Fails if a folder cannot be trained by a method of this name.
pub(crate) fn check_method(method: &str) -> Result<()> {
    match OWN_METHODS.contains(&method) {
        true => Ok(()),
        false => Err(Error::Config(format!(
            "unknown method {method}; a folder can be trained by {}",
            OWN_METHODS.join(", ")
        ))),
    }
}

/// The built-in recipe whose settings of method and optimiser are taken.
fn base(method: &str, on_gpu: bool, small: bool) -> Result<String> {
    check_method(method)?;
    let method = if method == "moco" { "moco-v2" } else { method };
    Ok(match (on_gpu, small) {
        (false, _) => format!("{method}-cifar10-small"),
        (true, true) => format!("{method}-cifar10"),
        (true, false) => format!("{method}-imagenette"),
    })
}

/// Side of the crops and the stem for images of that shorter side.
fn crops(side: usize, on_gpu: bool) -> (usize, Stem) {
    match side {
        0..LARGER => (32, Stem::Small),
        LARGER..96 => (64, Stem::Image),
        _ if !on_gpu => (96, Stem::Image),
        96..192 => (128, Stem::Image),
        _ => (224, Stem::Image),
    }
}

/// Widths of ResNet-18 that are worth trying on a set, the widest first; one for a GPU, which has time for the recipe's network.
pub(crate) fn widths(images: usize, on_gpu: bool) -> &'static [usize] {
    match (on_gpu, images) {
        (true, _) => &[64],
        (false, ..1000) => &[16],
        (false, ..10_000) => &[32, 16],
        (false, _) => &[64, 32, 16],
    }
}

/// Epochs that a set of that many images is worth: two million images seen, at least 50 passes, at most 400.
pub(crate) fn wished_epochs(images: usize) -> u32 {
    (2_000_000 / images.max(1)).clamp(50, 400) as u32
}

fn batch(images: usize, on_gpu: bool) -> usize {
    match (on_gpu, images) {
        (_, ..128) => 16,
        (_, ..512) => 32,
        (false, _) | (true, ..2048) => 64,
        (true, ..8192) => 128,
        (true, _) => 256,
    }
}

/// Returns a recipe for own images, with the reasons of its settings; its batch is at most `most_batch`.
///
/// # Errors
/// If there are too few images, or the method is unknown.
pub(crate) fn own_recipe(
    set: &OwnImages,
    method: Option<&str>,
    on_gpu: bool,
    width: usize,
    most_batch: usize,
) -> Result<(Recipe, Vec<Choice>)> {
    if set.images < FEWEST_IMAGES {
        return Err(Error::Config(format!(
            "{}: {} images are too few to learn from: at least {FEWEST_IMAGES} are needed, and a thousand are a beginning",
            set.path, set.images
        )));
    }
    let (size, stem) = crops(set.side, on_gpu);
    let name = method.unwrap_or("simclr");
    let mut recipe = Recipe::load(&base(name, on_gpu, stem == Stem::Small)?, &[])?;
    let mut choices = vec![match method {
        Some(method) => Choice::new("method", method, "as asked for"),
        None => Choice::new(
            "method",
            "simclr",
            "of the seven it learnt most from a small budget here (kNN 35.7% on CIFAR-10 after 4 epochs, the next one 29.4%); --method chooses another",
        ),
    }];
    recipe.data = super::DataSettings::all_of(&set.path, &set.reading);
    recipe.data.labels.clone_from(&set.labels);
    recipe.network.channels = recipe.data.channels;
    let side = set.side;
    recipe.network.stem = stem;
    choices.push(match stem {
        Stem::Small => Choice::new(
            "stem",
            "small",
            format!("a shorter side of {side} pixels leaves nothing to shrink before the first block"),
        ),
        Stem::Image => Choice::new(
            "stem",
            "image",
            format!("a shorter side of {side} pixels can be shrunk by four first, which saves most of the time"),
        ),
    });
    choices.push(Choice::new(
        "crops",
        format!("{size} pixels"),
        if size > side {
            format!("the smallest that the network takes; the images' shorter side is {side}")
        } else if size < side && !on_gpu {
            format!("of a shorter side of {side}: larger ones cost a processor too much time (augment.size)")
        } else {
            format!("for a shorter side of {side}")
        },
    ));
    views(&mut recipe.augment, size, set, &mut choices);
    let base_batch = recipe.train.batch;
    recipe.train.batch = batch(set.images, on_gpu).min(most_batch);
    let batch = recipe.train.batch;
    let why = if batch == most_batch {
        "the largest that fits into memory".to_owned()
    } else if set.images < 512 {
        format!("{} images give only few batches", set.images)
    } else if on_gpu {
        "keeps a GPU busy and leaves many steps".into()
    } else {
        "small batches make many steps, which is what a short run needs".into()
    };
    choices.push(Choice::new("batch", batch, why));
    if recipe.optim.lr_rule == LrRule::Fixed && !on_gpu {
        recipe.optim.lr *= batch as f64 / base_batch as f64;
    }
    if !on_gpu {
        (recipe.network.depth, recipe.network.width) = (18, width);
    }
    fit_method(&mut recipe, set.images);
    labels(&mut recipe, set, &mut choices);
    Ok((recipe, choices))
}

/// Fits the views to size, colour and statistics of the images.
fn views(policies: &mut [Policy], size: usize, set: &OwnImages, choices: &mut Vec<Choice>) {
    let first = policies.first().map_or(size, |policy| policy.size);
    for policy in &mut *policies {
        // SwAV's small crops keep their ratio to the large ones.
        policy.size = (policy.size * size / first).max(8);
        policy.normalise = Some(Normalise {
            mean: set.mean.iter().map(|&v| v as f32).collect(),
            std: set.std.iter().map(|v| v.max(1e-3) as f32).collect(),
        });
        if !set.reading.is_rgb() {
            for_channels(policy, set.reading.format.channels);
        }
        if set.grey {
            policy.grey = 0.0;
            if let Some(jitter) = &mut policy.jitter {
                (jitter.saturation, jitter.hue) = (0.0, 0.0);
            }
        }
    }
    let list =
        |values: &[f64]| values.iter().map(|v| format!("{v:.3}")).collect::<Vec<_>>().join(", ");
    choices.push(Choice::new(
        "normalise",
        format!("mean {}; deviation {}", list(&set.mean), list(&set.std)),
        "measured on these images",
    ));
    if !set.reading.is_rgb() {
        let format = set.reading.format;
        choices.push(Choice::new("images", format, "as their files have them"));
        if let Some([low, high]) = set.reading.range {
            choices.push(Choice::new(
                "range",
                format!("{low} to {high}"),
                "the least and the largest sample of some images become black and white (data.range)",
            ));
        }
        let what = match format.channels {
            1 => "float pixels; noise in place of saturation, hue and greyscale",
            3 => "float pixels",
            _ => {
                "float pixels; a dropped channel, and brightness and contrast of each, in place of saturation, hue and greyscale"
            }
        };
        let why = "8-bit arithmetic, hue and grey are those of 8-bit RGB";
        choices.push(Choice::new("augmentation", what, why));
    }
    if set.grey {
        choices.push(Choice::new(
            "augmentation",
            "no saturation, hue or greyscale",
            "no image has colour, so they would change nothing",
        ));
    }
}

/// Replaces what is defined for RGB of 8 bits alone.
fn for_channels(policy: &mut Policy, channels: usize) {
    policy.pixels = Pixels::Float;
    if let Some(blur) = &mut policy.blur {
        blur.kind = BlurKind::Gaussian;
    }
    if channels == 3 {
        return;
    }
    let lost = policy.grey;
    policy.grey = 0.0;
    if let Some(jitter) = &mut policy.jitter {
        (jitter.saturation, jitter.hue) = (0.0, 0.0);
        jitter.per_channel = channels > 1;
    }
    match channels {
        1 => policy.noise = Some(Noise { p: 0.5, std: [0.01, 0.1] }),
        _ => policy.channel_drop = lost,
    }
}

/// Fits a method's queue and clusters to a small set.
fn fit_method(recipe: &mut Recipe, images: usize) {
    let batch = recipe.train.batch;
    let table = &mut recipe.method.settings;
    let mut most = |key: &str, most: usize, multiple: usize| {
        let multiple = multiple.max(1);
        let value = table.get(key).and_then(toml::Value::as_integer).filter(|&value| value > 0);
        if let Some(value) = value {
            let fitted = (value as usize).min(most.max(multiple)) / multiple * multiple;
            table.insert(key.into(), toml::Value::Integer(fitted.max(multiple) as i64));
        }
    };
    match recipe.method.name.as_str() {
        // Keys of one image among the negatives of its own other view teach nothing: less than an epoch of them.
        "moco" => most("queue", images / 2, 2 * batch),
        "simclr-v2" => most("memory", images, 2 * batch),
        "swav" => {
            most("queue", images / 2, batch);
            most("prototypes", images / 5, 1);
            most("freeze_steps", images / batch, 1);
        }
        _ => {}
    }
}

/// Decides on what the best checkpoint is chosen.
fn labels(recipe: &mut Recipe, set: &OwnImages, choices: &mut Vec<Choice>) {
    let (value, why) = match (set.classes, set.held_out) {
        (0, _) => {
            ("by RankMe".to_owned(), "there are no labels to measure accuracy with".to_owned())
        }
        (1, _) => {
            ("by RankMe".into(), "all images have one class, so accuracy says nothing".into())
        }
        (_, true) => {
            ("by kNN on the held-out images".into(), "the set has labelled held-out images".into())
        }
        (classes, false) if set.images >= 20 * classes => {
            recipe.data.validation = 0.1;
            let share = "by kNN on a tenth of each class, which is not trained on".to_owned();
            (share, format!("there are {classes} classes and no held-out split"))
        }
        (classes, false) => (
            "by RankMe".into(),
            format!("{classes} classes have too few images each to hold some out"),
        ),
    };
    choices.push(Choice::new("best checkpoint", value, why));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(images: usize, side: usize) -> OwnImages {
        OwnImages {
            path: "photos".into(),
            images,
            side,
            grey: false,
            classes: 0,
            held_out: false,
            labels: None,
            reading: Reading::default(),
            mean: vec![0.5; 3],
            std: vec![0.25; 3],
        }
    }

    fn recipe(set: &OwnImages, method: Option<&str>, on_gpu: bool) -> Recipe {
        let (recipe, choices) = own_recipe(set, method, on_gpu, 16, usize::MAX).unwrap();
        assert!(choices.iter().all(|choice| !choice.why.is_empty()));
        // An ordinary recipe: its own text gives it back, and its method can be built.
        let again = Recipe::parse(&recipe.to_toml(), "own", &[]).unwrap();
        assert_eq!(recipe, again);
        again.build_method().unwrap();
        recipe
    }

    #[test]
    fn every_method_fits_small_and_large_sets_on_every_device() {
        for method in OWN_METHODS {
            for (images, side) in [(32, 8), (100, 40), (2000, 128), (1_000_000, 500)] {
                for on_gpu in [false, true] {
                    let recipe = recipe(&set(images, side), Some(method), on_gpu);
                    assert_eq!(recipe.method.name, method);
                    assert!(recipe.train.batch <= images / 2, "{method} {images}");
                    let views = recipe.build_method().unwrap().views();
                    assert!(recipe.policies(views).is_ok(), "{method}");
                    let keys = 2 * recipe.train.batch as i64;
                    for key in ["queue", "memory"] {
                        let value = recipe.method.settings.get(key);
                        let value = value.and_then(toml::Value::as_integer).unwrap_or(0);
                        let multiple = if method == "swav" { keys / 2 } else { keys };
                        assert!(
                            value % multiple == 0 && value <= images as i64,
                            "{method} {key} {value}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn sizes_and_colours_follow_the_images() {
        let small = recipe(&set(5000, 28), None, false);
        assert_eq!((small.network.stem, small.augment[0].size), (Stem::Small, 32));
        let photos = recipe(&set(5000, 375), None, false);
        assert_eq!((photos.network.stem, photos.augment[0].size), (Stem::Image, 96));
        assert_eq!(recipe(&set(5000, 375), None, true).augment[0].size, 224);
        let grey = recipe(&OwnImages { grey: true, ..set(5000, 28) }, None, false);
        let jitter = grey.augment[0].jitter.as_ref().unwrap();
        assert_eq!((grey.augment[0].grey, jitter.hue, jitter.saturation), (0.0, 0.0, 0.0));
        assert!(jitter.brightness > 0.0);
        let crops = recipe(&set(5000, 128), Some("swav"), false).augment;
        assert_eq!((crops[0].size, crops[1].size), (96, 48));
    }

    #[test]
    fn labels_decide_how_the_best_checkpoint_is_chosen() {
        let with = |classes, held_out| {
            let set = OwnImages { classes, held_out, ..set(1000, 64) };
            let (recipe, choices) = own_recipe(&set, None, false, 16, usize::MAX).unwrap();
            let choice = choices.into_iter().find(|choice| choice.what == "best checkpoint");
            (recipe.data.validation, choice.unwrap().value)
        };
        assert_eq!(with(0, false), (0.0, "by RankMe".into()));
        assert_eq!(with(1, false), (0.0, "by RankMe".into()));
        assert_eq!(with(500, false), (0.0, "by RankMe".into()));
        assert_eq!(with(10, true).0, 0.0);
        assert_eq!(with(10, false).0, 0.1);
    }

    #[test]
    fn too_few_images_and_unknown_methods_are_refused() {
        let said = |set: &OwnImages, method| {
            own_recipe(set, method, false, 16, usize::MAX).unwrap_err().to_string()
        };
        assert!(said(&set(3, 100), None).starts_with("photos: 3 images are too few"));
        assert!(said(&set(100, 100), Some("dino")).starts_with("unknown method dino; "));
    }
}

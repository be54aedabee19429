//! Fine-tuning: makes the recipe of a supervised run that starts from another run's weights.

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::optim::{Decay, Exclude, Lars, LrRule, Rule, Sgd};
use crate::recipes::{MethodSettings, Recipe};
use crate::weights::WeightFile;

/// Names of fine-tuning protocols.
pub const FINETUNES: [&str; 4] = ["lightly", "simclr-v2", "swav-1%", "swav-10%"];

/// The supervised method's settings in a recipe.
#[derive(Serialize)]
struct Settings {
    classes: usize,
    head_layers: usize,
    hidden: usize,
    new_classifier: bool,
    classifier_rate: f64,
}

/// Returns the recipe that fine-tunes `checkpoint`, from a run of `recipe`, to tell apart the `classes` classes of the same
/// images, by a protocol of [`FINETUNES`]. Under a new classifier it keeps the backbone and the first `head_layers` layers of
/// the projection head, as SimCLR v2 does; a classifier in the file is not taken.
///
/// # Errors
/// If the protocol is unknown (the message lists the valid names), or the checkpoint's head has fewer layers.
pub fn finetuning(
    recipe: &Recipe,
    checkpoint: &Path,
    protocol: &str,
    head_layers: usize,
    classes: usize,
) -> Result<Recipe> {
    let hidden = if head_layers > 0 { head_width(checkpoint, head_layers)? } else { 0 };
    let mut settings =
        Settings { classes, head_layers, hidden, new_classifier: true, classifier_rate: 1.0 };
    let mut tuned = recipe.clone();
    tuned.augment = vec![recipe.augment[0].crop_and_flip()];
    tuned.network.norm_groups = 1;
    let (optim, train) = (&mut tuned.optim, &mut tuned.train);
    (optim.warmup_epochs, optim.warmup_from, optim.end_lr) = (0.0, None, 0.0);
    optim.decay = Decay::Cosine;
    let plain =
        Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0, exclude: Exclude::Nothing };
    match protocol {
        // lightly:benchmarks/imagenet, finetune_eval.py
        "lightly" => {
            (optim.lr, optim.lr_rule, optim.rule) = (0.05, LrRule::Linear, Rule::Sgd(plain));
            (train.epochs, train.batch) = (30, 256);
        }
        // swav:eval_semisup.py and README: the classifier, initialised like any linear layer, at 5 and 0.2
        "swav-1%" | "swav-10%" => {
            let [lr, classifier_lr] = if protocol == "swav-1%" { [0.02, 5.0] } else { [0.01, 0.2] };
            (optim.lr, optim.lr_rule, optim.rule) = (lr, LrRule::Fixed, Rule::Sgd(plain));
            optim.decay = Decay::Steps { epochs: vec![12, 16], factor: 0.2 };
            (train.epochs, train.batch) = (20, 256);
            (settings.new_classifier, settings.classifier_rate) = (false, classifier_lr / lr);
        }
        // simclr:README.md, 1% of the labels
        "simclr-v2" => {
            (optim.lr, optim.lr_rule) = (0.005, LrRule::Sqrt);
            (train.epochs, train.batch) = (60, 1024);
            optim.rule = Rule::Lars(Lars::simclr(0.9, 0.0));
        }
        _ => {
            let known = FINETUNES.join(", ");
            let reason = format!("unknown protocol {protocol}; the protocols are: {known}");
            return Err(Error::Config(reason));
        }
    }
    let settings = toml::Table::try_from(settings).expect("numbers are TOML");
    tuned.method = MethodSettings { name: "supervised".into(), settings };
    (train.knn_every, train.checkpoint_every) = (0, 0);
    (train.init, train.init_classifier) = (Some(checkpoint.display().to_string()), false);
    Ok(tuned)
}

/// Returns the width of a head's hidden layers; the checkpoint must have the first `layers`, each with its batch norm.
fn head_width(checkpoint: &Path, layers: usize) -> Result<usize> {
    let file = WeightFile::open(checkpoint)?;
    let has = |i| file.shape(&format!("head.{i}.norm.weight"));
    match (0..layers).map(has).collect::<Option<Vec<_>>>() {
        Some(norms) => Ok(norms[0].iter().product()),
        None => Err(Error::Weights(format!(
            "{}: its head has fewer than {layers} layers of linear and batch norm: fine-tune with --head-layers 0",
            checkpoint.display()
        ))),
    }
}

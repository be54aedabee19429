//! The names under which public checkpoints hold a backbone.

use std::collections::BTreeSet;

use super::WeightFile;
use crate::error::{Error, Result};

/// Names under which public checkpoints hold a backbone: parts of the prefixes that are stripped.
const PREFIX_PARTS: [&str; 20] = [
    "_orig_mod",
    "backbone",
    "base_encoder",
    "convnet",
    "encoder",
    "encoder_q",
    "feature_extractor",
    "model",
    "module",
    "momentum_encoder",
    "net",
    "network",
    "online_encoder",
    "online_network",
    "resnet",
    "state_dict",
    "student",
    "target_encoder",
    "teacher",
    "trunk",
];

/// Pairs of which a file may hold both; the published evaluation uses the first: MoCo v3's main_lincls.py the base encoder,
/// BYOL's the online network, DINO's eval_linear.py the teacher.
const PREFERRED: [[&str; 2]; 5] = [
    ["base_encoder", "momentum_encoder"],
    ["encoder", "momentum_encoder"],
    ["online_encoder", "target_encoder"],
    ["online_network", "target_encoder"],
    ["teacher", "student"],
];

impl WeightFile {
    /// Returns what stands before the name of each of `slots` in the file: nothing, a chain of the prefixes that public
    /// checkpoints use, such as `module.encoder_q.`, or, without either, the only prefix under which all slots are there.
    pub(crate) fn common_prefix(&self, slots: &[&str]) -> Result<String> {
        let names: BTreeSet<String> = self.names().into_iter().collect();
        let Some(first) = slots.first() else { return Ok(String::new()) };
        let is_chain = |prefix: &str| {
            prefix.is_empty()
                || prefix
                    .strip_suffix('.')
                    .is_some_and(|parts| parts.split('.').all(|part| PREFIX_PARTS.contains(&part)))
        };
        let prefixes = names.iter().filter_map(|name| name.strip_suffix(first));
        let prefixes: Vec<&str> =
            prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')).collect();
        let found = |prefix: &str| {
            slots.iter().filter(|slot| names.contains(&format!("{prefix}{slot}"))).count()
        };
        let mut complete: Vec<&str> =
            prefixes.iter().copied().filter(|prefix| found(prefix) == slots.len()).collect();
        if complete.iter().any(|prefix| is_chain(prefix)) {
            complete.retain(|prefix| is_chain(prefix));
        }
        let has = |prefix: &str, part: &str| prefix.split('.').any(|own| own == part);
        let is_second = |prefix: &str| {
            PREFERRED.iter().any(|[preferred, other]| {
                has(prefix, other) && complete.iter().any(|one| has(one, preferred))
            })
        };
        let chosen: Vec<&str> =
            complete.iter().copied().filter(|prefix| !is_second(prefix)).collect();
        match (&*chosen, prefixes.iter().max_by_key(|prefix| found(prefix))) {
            ([prefix], _) => Ok((*prefix).to_owned()),
            // The message about the first missing tensor then names it as the file would.
            ([], Some(nearest)) if is_chain(nearest) || numbered(&names).is_none() => {
                Ok((*nearest).to_owned())
            }
            ([], _) => Err(Error::Weights(match numbered(&names) {
                Some(name) => format!(
                    "{}: has {name}: its layers are numbered, as those of torch.nn.Sequential(*resnet.children()); rename 0, 1, 4, 5, 6 \
                     and 7 to conv1, bn1, layer1, layer2, layer3 and layer4, and save it again",
                    self.path.display()
                ),
                None => format!(
                    "{}: has no tensor {first}, with or without a prefix such as module.; its first tensor is {}",
                    self.path.display(),
                    names.first().map_or("missing, too", String::as_str)
                ),
            })),
            (several, _) => Err(Error::Weights(format!(
                "{}: holds several backbones, under {}: keep one of them",
                self.path.display(),
                several
                    .iter()
                    .map(|prefix| format!("`{prefix}`"))
                    .collect::<Vec<_>>()
                    .join(" and ")
            ))),
        }
    }
}

/// A name under which a file holds a convolution of the first residual block, if it numbers the parts of a ResNet.
fn numbered(names: &BTreeSet<String>) -> Option<&str> {
    let block = names.iter().find(|name| name.ends_with("4.0.conv1.weight"))?;
    let prefix = block.strip_suffix("4.0.conv1.weight")?;
    let stem = names.contains(&format!("{prefix}0.weight"));
    (stem && (prefix.is_empty() || prefix.ends_with('.'))).then_some(block.as_str())
}

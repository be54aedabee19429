//! The built-in recipes and studies, by name.

macro_rules! files {
    ($folder:literal, $($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../recipes/", $folder, $name, ".toml")))),*]
    };
}

const RECIPES: &[(&str, &str)] = files![
    "",
    "byol-cifar10",
    "byol-cifar10-small",
    "byol-cifar100",
    "byol-imagenet",
    "byol-imagenet-100ep",
    "byol-imagenet-300ep",
    "byol-imagenet-40ep",
    "byol-imagenet100",
    "byol-imagenette",
    "demo",
    "moco-v1-imagenet",
    "moco-v2-cifar10",
    "moco-v2-cifar10-small",
    "moco-v2-cifar100",
    "moco-v2-imagenet",
    "moco-v2-imagenet-800ep",
    "moco-v2-imagenet100",
    "moco-v2-imagenette",
    "simclr-cifar10",
    "simclr-cifar10-cpu",
    "simclr-cifar10-small",
    "simclr-cifar100",
    "simclr-imagenet",
    "simclr-imagenet-100ep",
    "simclr-imagenet-256",
    "simclr-imagenet-2x",
    "simclr-imagenet-4x",
    "simclr-imagenet100",
    "simclr-imagenette",
    "simclr-v2-cifar10",
    "simclr-v2-cifar10-small",
    "simclr-v2-cifar100",
    "simclr-v2-distill-cifar10-small",
    "simclr-v2-distill-imagenet",
    "simclr-v2-finetune-cifar10-small",
    "simclr-v2-finetune-imagenet",
    "simclr-v2-imagenet-r152-3x",
    "simclr-v2-imagenet-r50",
    "simclr-v2-imagenet-r50-1x",
    "simclr-v2-imagenet100",
    "simclr-v2-imagenette",
    "simsiam-cifar10",
    "simsiam-cifar10-small",
    "simsiam-cifar100",
    "simsiam-imagenet",
    "simsiam-imagenet-256",
    "simsiam-imagenet100",
    "simsiam-imagenette",
    "supervised-cifar10",
    "supervised-cifar10-small",
    "supervised-cifar100",
    "supervised-imagenet",
    "supervised-imagenet100",
    "supervised-imagenette",
    "swav-cifar10",
    "swav-cifar10-small",
    "swav-cifar100",
    "swav-imagenet",
    "swav-imagenet-100ep",
    "swav-imagenet-200ep",
    "swav-imagenet-256",
    "swav-imagenet-256-200ep",
    "swav-imagenet-2x224",
    "swav-imagenet-400ep",
    "swav-imagenet100",
    "swav-imagenette",
];

const STUDIES: &[(&str, &str)] = files![
    "studies/",
    "byol-norm",
    "byol-target",
    "moco-dictionary",
    "moco-momentum",
    "moco-queue",
    "simclr-augmentation",
    "simclr-batch",
    "simclr-head",
    "simclr-loss",
    "simclr-temperature",
    "simclr-v2-head",
    "simsiam-alternation",
    "simsiam-parts",
    "swav-codes",
    "swav-crops",
    "towards-simsiam",
];

fn text(of: &'static [(&str, &str)], name: &str) -> Option<&'static str> {
    of.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// Returns the names of the built-in recipes, sorted.
pub fn builtin_names() -> impl Iterator<Item = &'static str> {
    RECIPES.iter().map(|(name, _)| *name)
}

/// Returns the TOML text of a built-in recipe.
pub fn builtin(name: &str) -> Option<&'static str> {
    text(RECIPES, name)
}

/// Returns the names of the built-in studies, sorted.
pub fn builtin_studies() -> impl Iterator<Item = &'static str> {
    STUDIES.iter().map(|(name, _)| *name)
}

/// Returns the TOML text of a built-in study.
pub fn builtin_study(name: &str) -> Option<&'static str> {
    text(STUDIES, name)
}

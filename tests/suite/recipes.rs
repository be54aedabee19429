//! Every recipe builds its whole description, and at a fraction of its width and size runs two steps.

use std::collections::BTreeSet;

use selfsup::device::{Device, DeviceKind, Precision};
use selfsup::methods::{self, Recipe};
use selfsup::train::Run;

use crate::driver::{gpu, unchecked};

/// What makes a step cheap, whatever the method; keys that a recipe lacks are left alone. An emulated GPU takes smaller images.
fn reduced(name: &str, device: &Device) -> Recipe {
    let side = if device.kind() == DeviceKind::Cuda { 8 } else { 16 };
    let mut recipe = Recipe::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    recipe.network.width = 2;
    recipe.network.norm_groups = recipe.network.norm_groups.min(2);
    recipe.data.path = "fashion-scattered".into();
    (recipe.data.limit, recipe.data.test_limit) = (16, 8);
    (recipe.train.batch, recipe.train.epochs) = (8, 1);
    (recipe.train.threads, recipe.train.loader_threads) = (1, 1);
    (recipe.train.knn_every, recipe.train.checkpoint_every) = (0, 0);
    for policy in &mut recipe.augment {
        policy.size = (policy.size / 7).max(side);
    }
    let settings = &mut recipe.method.settings;
    for (key, value) in [
        ("hidden", 8),
        ("embedding", 8),
        ("queue", 32),
        ("memory", 32),
        ("prototypes", 12),
        ("freeze_steps", 1),
        ("queue_from", 0),
        ("classes", 10),
    ] {
        if settings.get(key).and_then(toml::Value::as_integer).is_some_and(|old| old > 0) {
            settings.insert(key.into(), value.into());
        }
    }
    recipe
}

/// Two steps of each recipe and an evaluation; gives how many ran.
fn run<'a>(names: impl Iterator<Item = &'a str>, device: &Device) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let mut ran = 0;
    for name in names {
        let mut recipe = reduced(name, device);
        if recipe.method.name == "distill" {
            let file = teacher(&mut recipe, folder.path(), device);
            let teacher = recipe.method.settings["teacher"].as_table_mut().unwrap();
            teacher.insert("file".into(), file.into());
        }
        let mut run = Run::new(&recipe, device, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(run.schedule().total, 2, "{name}");
        let mut last = Last(f64::NAN, 0);
        run.train(&mut last).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(last.0.is_finite() && last.1 == 2, "{name}: loss {}, {} steps", last.0, last.1);
        ran += 1;
    }
    println!("recipes run on {device}: {ran}");
    ran
}

#[test]
fn every_recipe_runs_two_steps_at_reduced_width() {
    let ran = run(methods::builtin_names(), &Device::cpu(1).unwrap().poisoned());
    assert!(ran > 25, "{ran} recipes");
}

/// The small ones, which have every method, and one with selective kernels.
#[test]
fn every_method_runs_two_steps_on_a_gpu_at_reduced_width() {
    unchecked("recipes::every_method_runs_two_steps_on_a_gpu_at_reduced_width", || {
        let chosen = |name: &&str| name.ends_with("-small") || *name == "simclr-v2-cifar10";
        let names: Vec<&str> = methods::builtin_names().filter(chosen).collect();
        let gpu = gpu(Precision::Bf16);
        let method = |name: &&str| reduced(name, &gpu).method.name;
        let used: BTreeSet<String> = names.iter().map(method).collect();
        assert!(methods::ALL.iter().all(|(name, _)| used.contains(*name)), "{used:?}");
        run(names.into_iter(), &gpu);
    });
}

/// Trains a narrow teacher for a step or two, narrows the recipe's own to it, and returns its checkpoint.
fn teacher(recipe: &mut Recipe, folder: &std::path::Path, device: &Device) -> String {
    let settings = &mut recipe.method.settings;
    settings["student"].as_table_mut().unwrap().insert("classes".into(), 10.into());
    let teacher = settings["teacher"].as_table_mut().unwrap();
    teacher.insert("hidden".into(), 8.into());
    let network = teacher["network"].as_table_mut().unwrap();
    network.insert("width".into(), 2.into());
    let depth = network["depth"].as_integer().unwrap();
    let name = if depth == 18 {
        "simclr-v2-finetune-cifar10-small"
    } else {
        "simclr-v2-finetune-imagenet"
    };
    if let Some(student) = settings["student"].as_table_mut().filter(|s| s.contains_key("hidden")) {
        student.insert("hidden".into(), 8.into());
    }
    let out = folder.join(format!("{name}-{}", recipe.seed + depth as u64));
    let mut run = Run::new(&reduced(name, device), device, Some(&out)).unwrap();
    run.train(&mut Last(f64::NAN, 0)).unwrap();
    selfsup::train::newest(&out).unwrap().display().to_string()
}

/// The last step's loss, and how many there were.
struct Last(f64, u64);

impl selfsup::train::Watch for Last {
    fn step(&mut self, report: &selfsup::train::StepReport) {
        (self.0, self.1) = (report.loss, report.step);
    }
    fn epoch(&mut self, _: &selfsup::train::EpochReport) {}
    fn note(&mut self, _: &str) {}
}

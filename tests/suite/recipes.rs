//! Every recipe builds its whole description, and at a fraction of its width and size runs two steps.

use selfsup::device::Device;
use selfsup::methods::{self, Recipe};
use selfsup::train::Run;

/// What makes a step cheap, whatever the method; keys that a recipe lacks are left alone.
fn reduced(name: &str) -> Recipe {
    let mut recipe = Recipe::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    recipe.network.width = 2;
    recipe.network.norm_groups = recipe.network.norm_groups.min(2);
    recipe.data.path = "fashion-scattered".into();
    (recipe.data.limit, recipe.data.test_limit, recipe.data.labels) = (16, 8, None);
    (recipe.train.batch, recipe.train.epochs) = (8, 1);
    (recipe.train.threads, recipe.train.loader_threads) = (1, 1);
    (recipe.train.knn_every, recipe.train.checkpoint_every) = (0, 0);
    for policy in &mut recipe.augment {
        policy.size = (policy.size / 7).max(16);
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

#[test]
fn every_recipe_runs_two_steps_at_reduced_width() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu(1).unwrap().poisoned();
    let mut ran = 0;
    for name in methods::builtin_names() {
        let mut recipe = reduced(name);
        if recipe.method.name == "distill" {
            let file = teacher(&mut recipe, folder.path(), &device);
            let teacher = recipe.method.settings["teacher"].as_table_mut().unwrap();
            teacher.insert("file".into(), file.into());
        }
        let mut run = Run::new(&recipe, &device, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(run.schedule().total, 2, "{name}");
        let mut last = Last(f64::NAN, 0);
        run.train(&mut last).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(last.0.is_finite() && last.1 == 2, "{name}: loss {}, {} steps", last.0, last.1);
        ran += 1;
    }
    assert!(ran > 25, "{ran} recipes");
    println!("recipes run: {ran}");
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
    let mut run = Run::new(&reduced(name), device, Some(&out)).unwrap();
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

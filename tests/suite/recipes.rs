//! Every recipe builds its network and runs two steps at a fraction of its width and size.

use std::collections::BTreeSet;

use selfsup::arena::Arena;
use selfsup::device::{Device, DeviceKind, Precision};
use selfsup::methods::{self, RunInfo};
use selfsup::recipes::{self, Recipe};
use selfsup::tape;
use selfsup::tensor::Tensor;
use selfsup::train::Run;

use crate::driver::{gpu, unchecked};

/// Side of an image: smaller on an emulated GPU.
fn side(device: &Device) -> usize {
    if device.kind() == DeviceKind::Cuda { 8 } else { 16 }
}

pub fn reduced(name: &str, device: &Device) -> Recipe {
    let mut recipe = Recipe::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    reduce(&mut recipe, device);
    recipe
}

/// Makes a step cheap: a narrow network, few images, and the method's own tiny settings.
pub fn reduce(recipe: &mut Recipe, device: &Device) {
    recipe.network.width = 2;
    recipe.network.norm_groups = recipe.network.norm_groups.min(2);
    recipe.data.path = "fashion-scattered".into();
    (recipe.data.limit, recipe.data.test_limit, recipe.data.labels) = (16, 8, None);
    (recipe.train.batch, recipe.train.epochs) = (8, 1);
    (recipe.train.threads, recipe.train.loader_threads) = (1, 1);
    (recipe.train.knn_every, recipe.train.checkpoint_every) = (0, 0);
    recipe.watch.quality = false; // eight views of each image are many for a reference or a stand-in device
    for policy in &mut recipe.augment {
        policy.size = (policy.size / 7).max(side(device));
    }
    let entry = methods::ALL.iter().find(|entry| entry.name == recipe.method.name).unwrap();
    for (path, value) in entry.tiny {
        shrink(&mut recipe.method.settings, path, *value);
    }
}

/// Sets a dotted key, unless it is absent or 0.
fn shrink(settings: &mut toml::Table, path: &str, value: i64) {
    if let Some((table, rest)) = path.split_once('.') {
        if let Some(table) = settings.get_mut(table).and_then(toml::Value::as_table_mut) {
            shrink(table, rest, value);
        }
    } else if settings.get(path).and_then(toml::Value::as_integer).is_some_and(|old| old > 0) {
        settings.insert(path.into(), value.into());
    }
}

/// The recipe of a method that ends in `-small`: the one named after the method, or else the first that uses it.
pub fn small_recipe(method: &str) -> &'static str {
    let uses = |name: &&str| Recipe::load(name, &[]).unwrap().method.name == method;
    let mut names: Vec<&str> = recipes::builtin_names().filter(|n| n.ends_with("-small")).collect();
    names.retain(uses);
    names.sort_by_key(|name| !name.starts_with(method));
    names.first().unwrap_or_else(|| panic!("{method} has no recipe whose name ends in -small"))
}

/// Runs two steps of each recipe and an evaluation; returns how many recipes ran.
fn run<'a>(names: impl Iterator<Item = &'a str>, device: &Device) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let (mut ran, mut cut) = (0, 0);
    let on_gpu = device.kind() == DeviceKind::Cuda;
    for name in names {
        let mut recipe = reduced(name, device);
        if recipe.method.name == "distill" {
            teacher(&mut recipe, folder.path(), device);
        }
        let mut run = Run::new(&recipe, device, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(run.schedule().total, 2, "{name}");
        let mut last = Last(f64::NAN, 0);
        run.train(&mut last).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(last.0.is_finite() && last.1 == 2, "{name}: loss {}, {} steps", last.0, last.1);
        ran += 1;
        let method = recipe.build_method().unwrap();
        // On a GPU one method is enough: the one whose keys are split into micro-batches, too.
        let chosen = if on_gpu { name.starts_with("moco") } else { name.ends_with("-small") };
        recipe.train.micro_batches = 2;
        if chosen && methods::check_micro_batches(&*method, 8, 2).is_ok() {
            recipe.network.norm_groups = 1;
            let mut run = Run::new(&recipe, device, None).unwrap();
            run.train(&mut last).unwrap_or_else(|e| panic!("{name} in micro-batches: {e}"));
            assert!(last.0.is_finite(), "{name} in micro-batches: loss {}", last.0);
            cut += 1;
        }
        recipe.train.micro_batches = 1;
        if !on_gpu && Recipe::load(name, &[]).unwrap().data.path == "data/imagenet" {
            println!("{name}: {}", need(name, &recipe));
        }
    }
    println!("recipes run on {device}: {ran}, of them in micro-batches as well: {cut}");
    assert!(cut > if on_gpu { 0 } else { 4 }, "{cut} recipes in micro-batches");
    ran
}

#[test]
fn every_recipe_runs_two_steps_at_reduced_width() {
    let ran = run(recipes::builtin_names(), &Device::cpu(1).unwrap().poisoned());
    assert!(ran > 60, "{ran} recipes");
}

/// The small recipes, which cover every method, and one with selective kernels.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_method_runs_two_steps_on_a_gpu_at_reduced_width() {
    unchecked("recipes::every_method_runs_two_steps_on_a_gpu_at_reduced_width", || {
        let chosen = |name: &&str| name.ends_with("-small") || *name == "simclr-v2-cifar10";
        let gpu = gpu(Precision::Bf16);
        let mut names: Vec<&str> = recipes::builtin_names().filter(chosen).collect();
        let method = |name: &&str| reduced(name, &gpu).method.name;
        let used: BTreeSet<String> = names.iter().map(method).collect();
        for entry in methods::ALL {
            assert!(used.contains(entry.name), "{} has no recipe ending in -small", entry.name);
        }
        // A method without CUDA kernels says so, and runs on the CPU alone.
        names.retain(|name| {
            let without = reduced(name, &gpu).build_method().unwrap().without_cuda();
            without
                .inspect(|what| println!("{name} is left out: {what} has no CUDA kernels"))
                .is_none()
        });
        run(names.into_iter(), &gpu);
    });
}

/// Number of images in ImageNet's training set.
const IMAGENET: usize = 1_281_167;

/// Describes steps and memory of an ImageNet recipe. Memory is extrapolated from the operations of a step of `reduced`:
/// activations grow with the width, the pixels and the batch. They count in bf16, as on a GPU, and each weight with 14 bytes:
/// value, working copy, gradient and momentum.
fn need(name: &str, reduced: &Recipe) -> String {
    let full = Recipe::load(name, &[]).unwrap();
    let weights = full.build_method().unwrap().layout().weights();
    let (elements, networks, rows) = elements_of_a_step(reduced);
    let per_pixel = elements / pixels(reduced);
    let width = full.network.width as f64 / reduced.network.width as f64;
    let images = (full.train.batch / full.train.micro_batches) as f64;
    let activations = 2.0 * per_pixel * width * pixels(&full) * images;
    let setting = |key| full.method.settings.get(key).and_then(toml::Value::as_integer);
    let queue =
        setting("queue").or(setting("memory")).unwrap_or(0) * setting("embedding").unwrap_or(0);
    let kept = 14.0 * weights as f64 + 10.0 * networks * weights as f64 + 4.0 * rows * queue as f64;
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    let total = full.schedule(IMAGENET).total;
    assert!(total > 10_000 && activations > kept / 100.0 && rows * queue as f64 >= 0.0, "{name}");
    format!(
        "{total} steps of {} images, {:.1} million weights; about {:.1} GiB for weights, {:.0} for a step's activations, {:.2} for each image",
        full.train.batch,
        weights as f64 / 1e6,
        gib(kept),
        gib(activations),
        gib(activations / images)
    )
}

/// Number of pixels of all views of an image.
fn pixels(recipe: &Recipe) -> f64 {
    let views = recipe.build_method().unwrap().views();
    recipe.policies(views).unwrap().iter().map(|policy| (policy.size * policy.size) as f64).sum()
}

/// Returns the numbers that a step's operations produce per image, the count of second networks, and the count of queues.
fn elements_of_a_step(recipe: &Recipe) -> (f64, f64, f64) {
    const IMAGES: usize = 2;
    let device = Device::cpu(1).unwrap();
    let mut method = recipe.build_method().unwrap();
    let mut online = Arena::new(method.layout(), &device, 1);
    let run_info = RunInfo { seed: 1, batch: IMAGES, images: 4, per_epoch: 2, total: 4 };
    method.start(&online, &run_info).unwrap();
    let state = method.state();
    let networks = state.iter().filter(|(_, s)| matches!(s, methods::State::Network(_))).count();
    let rows = state.iter().filter(|(_, s)| matches!(s, methods::State::Rows(_))).count();
    method.labels(&[0, 1]).unwrap();
    method.prepare(0);
    method.before_step(&mut online);
    let mut sizes: Vec<(usize, usize)> = Vec::new();
    for policy in recipe.policies(method.views()).unwrap() {
        match sizes.iter_mut().find(|(size, _)| *size == policy.size) {
            Some((_, views)) => *views += 1,
            None => sizes.push((policy.size, 1)),
        }
    }
    let views: Vec<Tensor> = sizes
        .iter()
        .map(|&(size, views)| {
            let shape = [views * IMAGES, size, size, 4];
            let values = (0..shape.iter().product()).map(|i: usize| (i as f64 * 0.37).sin());
            Tensor::from_f64(&device, shape, &values.collect::<Vec<_>>())
        })
        .collect();
    let mut bytes = 0;
    tape::step(&mut online, |tape| {
        let loss = method.loss(tape, &views);
        bytes = tape.nodes().iter().map(|node| node.bytes).sum();
        loss
    })
    .unwrap();
    (bytes as f64 / 4.0 / IMAGES as f64, networks as f64, rows as f64)
}

/// The assumption behind the estimate.
#[test]
fn activations_grow_with_width_and_pixels() {
    let mut recipe = reduced("simclr-imagenet", &Device::reference());
    let small = elements_of_a_step(&recipe).0;
    recipe.network.width *= 2;
    recipe.augment.iter_mut().for_each(|policy| policy.size *= 2);
    let ratio = elements_of_a_step(&recipe).0 / small;
    assert!((ratio / 8.0 - 1.0).abs() < 0.1, "{ratio}");
}

#[test]
fn published_recipes_have_the_published_steps() {
    let steps = |name| Recipe::load(name, &[]).unwrap().schedule(IMAGENET).total;
    // 5,004 full batches of 256 per epoch, 312 of 4,096.
    assert_eq!(steps("moco-v2-imagenet"), 1_000_800);
    // With the images of incomplete batches: SimCLR's reference takes one step more, BYOL's as many.
    assert_eq!(steps("simclr-imagenet") + 1, 312_785);
    assert_eq!(steps("simclr-imagenet-100ep") + 1, 31_279);
    assert_eq!(steps("byol-imagenet"), 312_784);
    let few = |name, images| Recipe::load(name, &[]).unwrap().schedule(images).total;
    assert_eq!(few("simclr-cifar10", 50_000) + 1, 97_657);
    assert_eq!(few("byol-imagenette", 9_469), 36_988);
    assert_eq!(few("simclr-v2-finetune-imagenet", 12_811) + 1, 751);
    assert_eq!(Recipe::load("simclr-imagenet", &[]).unwrap().schedule(IMAGENET).warmup, 3_127);
    assert_eq!(steps("swav-imagenet-256"), 2_001_600);
}

/// Trains a narrow teacher on the recipe's images for a few steps, and makes the recipe use it.
pub fn teacher(recipe: &mut Recipe, folder: &std::path::Path, device: &Device) {
    let depth = recipe.method.settings["teacher"]["network"]["depth"].as_integer().unwrap();
    let name = if depth == 18 {
        "simclr-v2-finetune-cifar10-small"
    } else {
        "simclr-v2-finetune-imagenet"
    };
    let out = folder.join(format!("{name}-{}", recipe.seed + depth as u64));
    let mut own = reduced(name, device);
    own.data = recipe.data.clone();
    own.train.dump_views = 1;
    let mut run = Run::new(&own, device, Some(&out)).unwrap();
    run.train(&mut Last(f64::NAN, 0)).unwrap();
    check_dump(&out.join("parity"), own.augment[0].size);
    let file = selfsup::train::newest(&out).unwrap().display().to_string();
    let teacher = recipe.method.settings["teacher"].as_table_mut().unwrap();
    teacher.insert("file".into(), file.into());
}

/// Checks what `benches/peers/parity.py` reads: the initial weights, and one step's views without the fourth channel.
fn check_dump(folder: &std::path::Path, size: usize) {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["step-00000000.safetensors", "views-00000000.safetensors"]);
    let data = std::fs::read(folder.join("views-00000000.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&data).unwrap();
    assert_eq!(file.tensor("crops.0").unwrap().shape(), [8, size, size, 3]);
    assert_eq!(file.tensor("labels").unwrap().shape(), [8]);
    let pixels = file.tensor("crops.0").unwrap().data();
    assert!(pixels.iter().any(|&byte| byte != 0));
}

/// Keeps the last step's loss and number.
struct Last(f64, u64);

impl selfsup::train::Watch for Last {
    fn step(&mut self, report: &selfsup::train::StepReport) {
        (self.0, self.1) = (report.loss, report.step);
    }
    fn epoch(&mut self, _: &selfsup::train::EpochReport) {}
    fn note(&mut self, _: &str) {}
}

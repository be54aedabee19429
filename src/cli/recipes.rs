//! `recipes`: lists the built-in recipes, or prints one with where it comes from and what it takes.

use super::inspect::size;
use super::say;
use crate::data::Source as _;
use crate::data::{Split, fashion_scattered};
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::recipes::{self, MeasuredRun, Recipe, Source};
use crate::train;

/// Networks of more weights are not measured unasked: it takes minutes and tens of GiB.
const MOST_WEIGHTS: usize = 100_000_000;

/// The training images of the published sets, by the name of their folder.
const IMAGES: [(&str, usize); 5] = [
    ("cifar10", 50_000),
    ("cifar100", 50_000),
    ("imagenet", 1_281_167),
    ("imagenet100", 126_689),
    ("imagenette", 9_469),
];

pub(super) fn recipes(name: Option<&str>) -> Result<()> {
    let Some(name) = name else {
        return recipes::builtin_names().try_for_each(|name| {
            let recipe = Recipe::load(name, &[])?;
            say(&line(name, &recipe))
        });
    };
    let text = recipes::builtin(name).ok_or_else(|| {
        let known = recipes::builtin_names().collect::<Vec<_>>().join(", ");
        Error::Config(format!("unknown recipe {name}; built-in recipes: {known}"))
    })?;
    let recipe = Recipe::load(name, &[])?;
    // As comments, so that the output is a recipe.
    let comment = |sentence: &str| say(format!("# {sentence}").trim_end());
    about(&recipe).iter().try_for_each(|sentence| comment(sentence))?;
    cost(&recipe)?.iter().try_for_each(|sentence| comment(sentence))?;
    let runs = recipes::measured_runs();
    let own = runs.iter().filter(|run| run.recipe.as_deref() == Some(name)).map(measured);
    own.collect::<Vec<_>>().iter().try_for_each(|sentence| comment(sentence))?;
    comment("")?;
    say(text.trim_end())
}

fn line(name: &str, recipe: &Recipe) -> String {
    let network = format!("ResNet-{}, width {}", recipe.network.depth, recipe.network.width);
    let figure = recipe.source.as_ref().and_then(|source| source.figure.as_deref());
    let figure = figure.unwrap_or("no figure published");
    let row = format!(
        "{name:33} {:11} {:18} {network:22} {:4} epochs  {figure}",
        recipe.method.name, recipe.data.path, recipe.train.epochs
    );
    row.trim_end().to_owned()
}

/// The source, in sentences.
fn about(recipe: &Recipe) -> Vec<String> {
    let mut about = Vec::new();
    let Some(source) = &recipe.source else { return vec!["source: none".into()] };
    let Source { paper, code, figure, as_published, deviations } = source;
    for (what, text) in [("paper", paper), ("code", code), ("published", figure)] {
        about.extend(text.as_ref().map(|text| format!("{what}: {text}")));
    }
    if *as_published {
        about.push("deviations: none known".into());
    }
    about.extend(deviations.iter().map(|deviation| format!("deviation: {deviation}")));
    about
}

/// Steps, memory and time, in sentences.
fn cost(recipe: &Recipe) -> Result<Vec<String>> {
    let mut cost = Vec::new();
    let images = images(recipe);
    if let Some(images) = images {
        let schedule = recipe.schedule(images);
        cost.push(format!(
            "steps: {} of {} images, {} in an epoch of {images} images",
            schedule.total, recipe.train.batch, schedule.per_epoch
        ));
    }
    // A teacher that has not been trained yet makes a distillation impossible to measure, but its recipe can be read.
    let method = match recipe.build_method() {
        Ok(method) => method,
        Err(error) => {
            cost.push(format!("memory and time are not known: {error}"));
            return Ok(cost);
        }
    };
    let weights = method.layout().weights();
    if weights > MOST_WEIGHTS {
        cost.push(format!(
            "memory and time: not measured unasked for {:.0} million weights; `selfsup inspect NAME --memory` measures memory",
            weights as f64 / 1e6
        ));
        return Ok(cost);
    }
    let precision = recipe.train.precision_on(DeviceKind::Cpu)?;
    let measured = train::memory(recipe, precision).and_then(|need| {
        let seconds = train::seconds_per_image(recipe, precision)?;
        Ok((need, seconds))
    });
    match measured {
        Err(error) => cost.push(format!("memory and time cannot be measured: {error}")),
        Ok((need, seconds)) => {
            cost.push(format!(
                "memory in {precision}: {} at batch {}, of it {} for weights, gradients, the optimiser and state",
                size(need.in_all),
                recipe.train.batch,
                size(need.fixed)
            ));
            let rate = format!("{:.1} images a second", 1.0 / seconds);
            let threads = Device::cpu(recipe.train.threads)?.threads();
            let all = images.map(|images| {
                let total = recipe.schedule(images).total as f64 * recipe.train.batch as f64;
                format!(", {} for all epochs", duration(total * seconds))
            });
            cost.push(format!(
                "time on this processor in {precision} with {threads} threads: {rate}{}, by one step, without evaluation",
                all.unwrap_or_default()
            ));
        }
    }
    Ok(cost)
}

/// The number of training images, if the recipe's set is one of those that are known by name.
fn images(recipe: &Recipe) -> Option<usize> {
    let path = recipe.data.path.trim_end_matches('/');
    let name = path.rsplit('/').next().unwrap_or(path);
    let all = match name {
        "fashion-scattered" => fashion_scattered(Split::Train).len(),
        name => IMAGES.iter().find(|(known, _)| *known == name)?.1,
    };
    let all = if recipe.data.limit > 0 { all.min(recipe.data.limit) } else { all };
    let share = recipe.data.labels.as_deref().map(|labels| {
        labels.strip_suffix('%').and_then(|percent| percent.trim().parse::<f64>().ok())
    });
    match share {
        None => Some(all),
        Some(percent) => Some((all as f64 * percent? / 100.0) as usize),
    }
}

fn measured(run: &MeasuredRun) -> String {
    let MeasuredRun { what, figure, commit, date, machine, log, predates, .. } = run;
    let old = predates.as_ref().map_or(String::new(), |fix| format!(" (outdated: before {fix})"));
    format!("measured: {what}: {figure}{old}; {date}, {commit}, {machine}; {log}")
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.0} seconds"),
        120.0..7200.0 => format!("{:.0} minutes", seconds / 60.0),
        7200.0..172_800.0 => format!("{:.0} hours", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Precision;

    #[test]
    fn a_listing_names_method_data_network_epochs_and_figure() {
        let load = |name: &str| Recipe::load(name, &[]).unwrap();
        let row = line("byol-cifar10", &load("byol-cifar10"));
        for part in ["byol ", "data/cifar10", "ResNet-18", "1000 epochs", "92.6% online linear"] {
            assert!(row.contains(part), "{row}");
        }
        assert!(line("demo", &load("demo")).ends_with("no figure published"));
        assert_eq!(images(&load("simclr-cifar10")), Some(50_000));
        assert_eq!(images(&load("simclr-cifar10-small")), Some(10_000));
        assert_eq!(images(&load("simclr-v2-finetune-cifar10-small")), Some(1000));
        assert_eq!(
            images(&load("simclr-cifar10").with(&["data.path=photos".into()]).unwrap()),
            None
        );
        assert_eq!(duration(7300.0), "2 hours");
    }

    #[test]
    fn the_page_of_a_recipe_has_its_source_deviations_and_steps() {
        let recipe = Recipe::load("simclr-cifar10", &[]).unwrap();
        let about = about(&recipe).join("\n");
        for part in ["paper: arXiv:2002.05709", "published: ", "deviation: running variances"] {
            assert!(about.contains(part), "{about}");
        }
        let cost = cost(&Recipe::load("demo", &["network.width=2".into()]).unwrap()).unwrap();
        let precision = Precision::of_training(DeviceKind::Cpu, false).unwrap();
        assert!(cost[0].starts_with("steps: 780 of 64 images, 156 in an epoch"), "{cost:?}");
        assert!(cost[1].starts_with(&format!("memory in {precision}: ")), "{cost:?}");
        assert!(cost[2].contains(" for all epochs"), "{cost:?}");
        let exact = Recipe::load("simsiam-imagenet", &[]).unwrap();
        assert!(super::about(&exact).contains(&"deviations: none known".to_owned()));
    }

    #[test]
    fn measured_runs_belong_to_recipes_and_name_a_log() {
        for run in recipes::measured_runs() {
            if let Some(name) = &run.recipe {
                assert!(recipes::builtin(name).is_some(), "{name}");
            }
            assert!(std::path::Path::new(&run.log).is_file(), "{}", run.log);
        }
    }
}

//! Recipes against what their sources say: `scripts/goldens/published.py` reads the settings out of the repositories.

use std::collections::BTreeMap;

use selfsup::recipes::Recipe;
use toml::{Table, Value};

/// The published settings by recipe, each with its `source`.
fn published() -> BTreeMap<String, Table> {
    let text = std::fs::read_to_string("tests/goldens/published.toml").unwrap();
    let table: Table = text.parse().unwrap();
    table.into_iter().map(|(name, value)| (name, value.as_table().unwrap().clone())).collect()
}

/// The recipe as a table with all defaults, and with one `[[augment]]` table for each distribution of views.
fn table(name: &str) -> Table {
    Recipe::load(name, &[]).unwrap().to_toml().parse().unwrap()
}

fn at<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    let (first, rest) = key.split_once('.').unwrap_or((key, ""));
    let mut value = table.get(first)?;
    for part in rest.split('.').filter(|part| !part.is_empty()) {
        value = match value {
            Value::Array(items) => items.get(part.parse::<usize>().ok()?)?,
            value => value.get(part)?,
        };
    }
    Some(value)
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or(value.as_integer().map(|v| v as f64))
}

/// Whether two settings are the same; an absent one is off. Recipes store some numbers in f32.
fn same(own: Option<&Value>, theirs: &Value) -> bool {
    match (own, theirs) {
        (None, Value::Boolean(value)) => !value,
        (None, value) => number(value) == Some(0.0),
        (Some(Value::Array(own)), Value::Array(theirs)) => {
            own.len() == theirs.len() && own.iter().zip(theirs).all(|(a, b)| same(Some(a), b))
        }
        (Some(own), theirs) => match (number(own), number(theirs)) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * b.abs(),
            _ => own == theirs,
        },
    }
}

/// Defaults that a recipe does not write.
fn default(name: &str, key: &str) -> Option<Value> {
    match key {
        // A policy stands for all views unless it says otherwise.
        "augment.0.repeat" => Some(Value::Integer(1)),
        "method.head_layers" if name.starts_with("simclr-") => Some(Value::Integer(2)),
        _ => None,
    }
}

fn differences(name: &str, settings: &Table, recipe: &Table) -> Vec<String> {
    let differs = |(key, theirs): (&String, &Value)| {
        let key = &**key;
        let default = default(name, key);
        let own = at(recipe, key).or(default.as_ref());
        (key != "source" && !same(own, theirs))
            .then(|| format!("{name}: {key} is {own:?}, published as {theirs}"))
    };
    settings.iter().filter_map(differs).collect()
}

#[test]
fn recipes_have_the_settings_of_their_sources() {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (name, settings) in published() {
        wrong.extend(differences(&name, &settings, &table(&name)));
        count += settings.len() - 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("published settings that recipes have: {count}, of {} recipes", published().len());
}

/// The comparison sees a wrong value, a missing one and another rule.
#[test]
fn a_setting_unlike_its_source_is_caught() {
    let all = published();
    let caught = |name: &str, setting: &str| {
        let recipe = Recipe::load(name, &[setting.into()]).unwrap().to_toml().parse().unwrap();
        differences(name, &all[name], &recipe).len()
    };
    assert_eq!(caught("swav-cifar10", "optim.lr=0.5"), 1);
    assert_eq!(caught("simclr-cifar10", "method.head_layers=3"), 1);
    assert_eq!(caught("simclr-cifar10", "augment.jitter.additive_brightness=false"), 1);
    assert_eq!(caught("simsiam-imagenette", "optim.lr_rule=linear"), 1);
    assert_eq!(caught("swav-imagenet", "augment.1.size=64"), 1);
}

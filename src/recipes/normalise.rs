//! Writes the mean and standard deviation of a set's channels into the text of a recipe.

use toml_edit::{Array, DocumentMut, InlineTable, Item, Table, TableLike, Value, value};

use crate::error::{Error, Result};

/// Returns the text of a recipe, whose name is `origin` in messages, with `normalise` of every view set to these values, `mean` and `std`
/// of each channel in `0..=1`. Comments and all other settings stay as they are. A recipe that takes its views from a base gets an
/// `[augment]` table, which applies to all of them.
///
/// # Errors
/// If the text is not TOML, or has no views and no base.
pub fn with_normalise(text: &str, origin: &str, mean: &[f64], std: &[f64]) -> Result<String> {
    let mut recipe: DocumentMut = text
        .parse()
        .map_err(|error: toml_edit::TomlError| Error::format(origin, error.to_string()))?;
    let has_base = recipe.contains_key("base");
    if has_base && !recipe.contains_key("augment") {
        recipe.insert("augment", Item::Table(Table::new()));
    }
    let mut set = |policy: &mut dyn TableLike| set_in(policy, mean, std);
    match recipe.get_mut("augment") {
        Some(Item::ArrayOfTables(policies)) => {
            policies.iter_mut().for_each(|policy| set(policy));
        }
        Some(Item::Value(Value::Array(policies))) => {
            policies
                .iter_mut()
                .filter_map(Value::as_inline_table_mut)
                .for_each(|policy| set(policy));
        }
        Some(item) if item.as_table_like().is_some() => {
            item.as_table_like_mut().into_iter().for_each(&mut set);
        }
        _ => {
            return Err(Error::format(
                origin,
                "has no [[augment]] table, which mean and deviation are written into",
            ));
        }
    }
    Ok(recipe.to_string())
}

fn set_in(policy: &mut dyn TableLike, mean: &[f64], std: &[f64]) {
    let list = |numbers: &[f64]| -> Value { numbers.iter().copied().collect::<Array>().into() };
    if let Some(old) = policy.get_mut("normalise").and_then(Item::as_table_like_mut) {
        for (key, numbers) in [("mean", mean), ("std", std)] {
            let mut new = list(numbers);
            // What stands around the old value: spaces, and a comment behind it.
            if let Some(old) = old.get(key).and_then(Item::as_value) {
                *new.decor_mut() = old.decor().clone();
            }
            old.insert(key, Item::Value(new));
        }
        return;
    }
    let mut new = InlineTable::new();
    new.insert("mean", list(mean));
    new.insert("std", list(std));
    policy.insert("normalise", value(new));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::{Recipe, builtin};

    fn written(text: &str) -> String {
        with_normalise(text, "my.toml", &[0.5, 0.25, 0.125], &[0.2, 0.3, 0.4]).unwrap()
    }

    #[test]
    fn every_view_gets_the_values_and_the_rest_stays() {
        for name in ["simclr-cifar10-small", "byol-cifar10-small", "swav-cifar10-small"] {
            let text = builtin(name).unwrap();
            let new = written(text);
            let recipe = Recipe::parse(&new, name, &[]).unwrap();
            for policy in &recipe.augment {
                let normalise = policy.normalise.as_ref().unwrap();
                assert_eq!(
                    (&normalise.mean[..], &normalise.std[..]),
                    (&[0.5, 0.25, 0.125][..], &[0.2, 0.3, 0.4][..])
                );
            }
            // Only the lines of `normalise` differ.
            let differing: Vec<(&str, &str)> =
                text.lines().zip(new.lines()).filter(|(old, new)| old != new).collect();
            assert_eq!(text.lines().count(), new.lines().count());
            assert_eq!(differing.len(), recipe.augment.len(), "{differing:?}");
            assert!(
                differing.iter().all(|(old, _)| old.starts_with("normalise = ")),
                "{differing:?}"
            );
        }
    }

    #[test]
    fn tables_of_every_form_keep_their_comments() {
        let pretty = "# mine\n[[augment]] # a view\nsize = 32 # small\n\n[augment.normalise] # of the set\nmean = [\n    0.1,\n    0.1, # green\n    0.1,\n] # measured\nstd = [1, 1, 1]\n";
        assert_eq!(
            written(pretty),
            "# mine\n[[augment]] # a view\nsize = 32 # small\n\n[augment.normalise] # of the set\nmean = [0.5, 0.25, 0.125] # measured\nstd = [0.2, 0.3, 0.4]\n"
        );
        let of_base = "base = \"simclr-cifar10-small\" # quick\n";
        assert_eq!(
            written(of_base),
            "base = \"simclr-cifar10-small\" # quick\n\n[augment]\nnormalise = { mean = [0.5, 0.25, 0.125], std = [0.2, 0.3, 0.4] }\n"
        );
        assert_eq!(
            written("base = \"x\"\n[augment]\nsize = 8 # tiny\n"),
            "base = \"x\"\n[augment]\nsize = 8 # tiny\nnormalise = { mean = [0.5, 0.25, 0.125], std = [0.2, 0.3, 0.4] }\n"
        );
        assert_eq!(
            written("augment = [{ size = 8 }] # inline\n"),
            "augment = [{ size = 8 , normalise = { mean = [0.5, 0.25, 0.125], std = [0.2, 0.3, 0.4] } }] # inline\n"
        );
        let error =
            with_normalise("seed = 1\n", "my.toml", &[0.5], &[0.1]).unwrap_err().to_string();
        assert!(error.contains("my.toml: has no [[augment]] table"), "{error}");
        assert!(with_normalise("seed = \n", "my.toml", &[0.5], &[0.1]).is_err());
    }
}

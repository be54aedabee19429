//! What may differ between a run and the recipe that it was begun with.

use crate::error::{Error, Result};
use crate::recipes::Recipe;

/// The settings that a resumed run may change, because none of them changes its weights.
const CHANGEABLE: &str = "data.path, data.max_skipped, data.gpu_memory, watch.* and, of train, threads, loader_threads, recompute, keep, \
     dump_views, knn_every, checkpoint_every, checkpoint_every_steps and checkpoint_every_minutes";

/// Fails unless a run goes on as another recipe began it: only [`CHANGEABLE`] settings may differ.
pub(super) fn same_run(now: &Recipe, then: &Recipe) -> Result<()> {
    let Some((key, now, then)) = changed(now, then) else { return Ok(()) };
    Err(Error::Config(format!(
        "{key} was {then} and is now {now}, which makes another run: start it with --out; a resumed run may change only {CHANGEABLE}"
    )))
}

/// Returns the first key of a run that differs from the recipe that it was begun with, and its value now and then;
/// [`CHANGEABLE`] ones apart.
pub(super) fn changed(now: &Recipe, then: &Recipe) -> Option<(String, String, String)> {
    let mut same = now.clone();
    same.source.clone_from(&then.source); // describes settings and is none
    same.data.path.clone_from(&then.data.path);
    same.data.max_skipped = then.data.max_skipped;
    same.data.gpu_memory.clone_from(&then.data.gpu_memory);
    same.watch = then.watch;
    let (own, old) = (&mut same.train, &then.train);
    (own.threads, own.loader_threads) = (old.threads, old.loader_threads);
    own.recompute = old.recompute;
    (own.keep, own.dump_views, own.knn_every) = (old.keep, old.dump_views, old.knn_every);
    own.checkpoint_every = old.checkpoint_every;
    own.checkpoint_every_steps = old.checkpoint_every_steps;
    own.checkpoint_every_minutes = old.checkpoint_every_minutes;
    let tables = [same, then.clone()].map(|recipe| recipe.to_toml().parse::<toml::Table>());
    let [Ok(now), Ok(then)] = tables else { unreachable!("a recipe can be read back") };
    difference("", &now.into(), &then.into())
}

/// Returns the first key in which two values differ, and its value in both.
pub(super) fn difference(
    key: &str,
    a: &toml::Value,
    b: &toml::Value,
) -> Option<(String, String, String)> {
    let within = |name: &str| if key.is_empty() { name.into() } else { format!("{key}.{name}") };
    match (a, b) {
        (toml::Value::Table(a), toml::Value::Table(b)) => {
            a.keys().chain(b.keys()).find_map(|name| {
                let nothing = toml::Value::String("not set".into());
                let of = |table: &toml::Table| table.get(name).cloned().unwrap_or(nothing.clone());
                difference(&within(name), &of(a), &of(b))
            })
        }
        (toml::Value::Array(a), toml::Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(i, (a, b))| difference(&within(&i.to_string()), a, b))
        }
        _ if a == b => None,
        _ => Some((key.to_owned(), a.to_string(), b.to_string())),
    }
}

//! The built-in recipes and studies, by name: `build.rs` embeds every file of `recipes/`.

include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

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

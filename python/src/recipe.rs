//! Recipes as TOML texts and as dictionaries.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pythonize::{depythonize, pythonize};
use selfsup::data::Policy;
use selfsup::recipes::{self, Recipe};

use crate::error::raised;

/// The names of the built-in recipes.
#[pyfunction]
pub fn recipe_names() -> Vec<&'static str> {
    recipes::builtin_names().collect()
}

/// A built-in recipe or a recipe file as TOML, with settings on top.
#[pyfunction]
pub fn load_recipe(name: &str, settings: Vec<String>) -> PyResult<String> {
    Ok(Recipe::load(name, &settings).map_err(|e| raised(&e))?.to_toml())
}

/// A complete recipe in a dictionary as TOML, with settings on top.
#[pyfunction]
pub fn recipe_of_dict(dict: &Bound<'_, PyAny>, settings: Vec<String>) -> PyResult<String> {
    let table: toml::Table = depythonize(dict)
        .map_err(|e| PyValueError::new_err(format!("a recipe is a dictionary of settings: {e}")))?;
    let text = table.to_string();
    Ok(Recipe::parse(&text, "the recipe", &settings).map_err(|e| raised(&e))?.to_toml())
}

/// A recipe as a dictionary.
#[pyfunction]
pub fn recipe_dict<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    Ok(pythonize(py, &parsed(text)?)?)
}

/// The policy of each view that a recipe's method takes, as dictionaries.
#[pyfunction]
pub fn recipe_policies<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyAny>> {
    let recipe = parsed(text)?;
    let policies = recipe.build_method().and_then(|method| recipe.policies(method.views()));
    let once = |policy| Policy { repeat: 1, ..policy };
    let policies: Vec<_> = policies.map_err(|e| raised(&e))?.into_iter().map(once).collect();
    Ok(pythonize(py, &policies)?)
}

/// Reads a recipe that this module wrote.
pub fn parsed(text: &str) -> PyResult<Recipe> {
    Recipe::parse(text, "the recipe", &[]).map_err(|e| raised(&e))
}

/// Reads policies from dictionaries.
pub fn policies(dicts: &Bound<'_, PyAny>) -> PyResult<Vec<Policy>> {
    let policies: Vec<Policy> = depythonize(dicts)
        .map_err(|e| PyValueError::new_err(format!("a policy of augmentation: {e}")))?;
    policies.iter().try_for_each(Policy::check).map_err(|e| raised(&e))?;
    Ok(policies.into_iter().flat_map(repeated).collect())
}

/// A policy once for each of its views.
fn repeated(policy: Policy) -> impl Iterator<Item = Policy> {
    let times = policy.repeat;
    std::iter::repeat_n(Policy { repeat: 1, ..policy }, times)
}

//! The engine for Python: the module `selfsup._native`, which the package `selfsup` wraps. Shapes and types of arguments are
//! checked here or there before the engine sees them; a panic of the engine is an exception of the class `Bug`.

mod arrays;
mod device;
mod dlpack;
mod error;
mod evaluate;
mod images;
mod loader;
mod losses;
mod reading;
mod recipe;
mod source;
mod train;

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the program `selfsup` with these words, its name first, and returns its exit code.
#[pyfunction]
fn main(py: Python<'_>, words: Vec<OsString>) -> PyResult<u8> {
    error::released(py, || Ok(selfsup::cli::main_with(words)))
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::dlpack::GpuArray;
    #[pymodule_export]
    use super::error::{Bug, Error};
    #[pymodule_export]
    use super::evaluate::{Encoder, export, few_label_probe, knn, report, run_knn, run_linear};
    #[pymodule_export]
    use super::loader::{Augmentation, Loader};
    #[pymodule_export]
    use super::losses::{loss_and_gradients, loss_and_gradients_on_gpu, sinkhorn, sinkhorn_on_gpu};
    #[pymodule_export]
    use super::main;
    #[pymodule_export]
    use super::recipe::{load_recipe, recipe_dict, recipe_names, recipe_of_dict, recipe_policies};
    #[pymodule_export]
    use super::source::{Source, native_reading};
    #[pymodule_export]
    use super::train::{resume, train};

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("VERSION", env!("CARGO_PKG_VERSION"))
    }
}

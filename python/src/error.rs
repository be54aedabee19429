//! Errors and panics of the engine as exceptions.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(
    selfsup,
    Error,
    PyException,
    "A failure outside the program: a file, a recipe, a device, a run that diverged. The message says what to do."
);
create_exception!(
    selfsup,
    Bug,
    Error,
    "The engine panicked. This is a fault of selfsup: please report it with the message and what was called."
);

/// Runs `work` without the interpreter's lock, so that other threads of Python go on.
///
/// # Errors
/// The engine's error as [`Error`], a panic as [`Bug`].
pub fn released<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> selfsup::Result<T> + Send,
) -> PyResult<T> {
    let done = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    finished(done)
}

/// What a piece of work returned, as Python has it.
///
/// # Errors
/// As [`released`].
pub fn finished<T>(done: Result<selfsup::Result<T>, Box<dyn Any + Send>>) -> PyResult<T> {
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(raised(&error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text =
                text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Bug::new_err(format!(
                "selfsup panicked, which is a bug; please report it with what was called: {text}"
            )))
        }
    }
}

/// The exception of an error.
pub fn raised(error: &selfsup::Error) -> PyErr {
    Error::new_err(error.to_string())
}

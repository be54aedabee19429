//! How images are read: the keys that a recipe's `data` has for it, as a dictionary.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pythonize::depythonize;
use selfsup::data::{Axes, Format, Pages, Reading};
use serde::{Deserialize, Serialize};

/// Keys of a recipe's `data` that say how images are read; what is absent follows from the images.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReadingKeys {
    channels: Option<usize>,
    bits: Option<usize>,
    range: Option<[f64; 2]>,
    pages: Option<Pages>,
    axes: Option<Axes>,
}

impl ReadingKeys {
    /// Reads the keys of a dictionary; none of them without one.
    pub fn of(dict: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let keys = dict.map(|dict| depythonize(dict)).transpose();
        keys.map(Option::unwrap_or_default).map_err(|e| {
            PyValueError::new_err(format!(
                "reading is a dictionary of channels, bits, range, pages and axes, as in a recipe's data: {e}"
            ))
        })
    }

    /// The keys that a reading has.
    pub fn in_full(reading: &Reading) -> Self {
        let Reading { format: Format { channels, bits }, range, pages, axes } = *reading;
        Self { channels: Some(channels), bits: Some(bits), range, pages, axes }
    }

    /// The reading of images that have a format: RGB of 8 bits for files.
    pub fn for_format(&self, native: Format) -> selfsup::Result<Reading> {
        let &Self { channels, bits, range, pages, axes } = self;
        let channels = channels.unwrap_or(native.channels);
        let format = Format { channels, bits: bits.unwrap_or(native.bits) };
        let reading = Reading { format, range, pages, axes };
        reading.check().map(|()| reading)
    }
}

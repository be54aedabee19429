//! Sets of images: folders and files as the program reads them, and arrays of the caller.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pythonize::pythonize;
use selfsup::data::{self, Folder, Format, Image, Source as _, Split};
use selfsup::train;

use crate::error::{raised, released};
use crate::images::{Array, Arrays};
use crate::reading::ReadingKeys;

/// A set of images.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Source(pub Arc<dyn data::Source>);

/// Training images, and held-out ones if there are any.
pub type Given<'py> = (PyRef<'py, Source>, Option<PyRef<'py, Source>>);

/// The same, for the engine.
pub type Sources = (Arc<dyn data::Source>, Option<Arc<dyn data::Source>>);

/// What the engine reads of images that were given.
pub fn sources((train, held_out): Given<'_>) -> Sources {
    (train.0.clone(), held_out.map(|held_out| held_out.0.clone()))
}

/// The names of the classes, at least `classes` of them, where `images` images have these labels; none without labels.
fn classes(labels: Option<&[u32]>, classes: u32, images: usize) -> PyResult<Vec<String>> {
    if labels.is_some_and(|labels| labels.len() != images) {
        return Err(PyValueError::new_err("as many labels as images are needed"));
    }
    let most = labels.and_then(|labels| labels.iter().max());
    let classes = most.map_or(0, |most| most.saturating_add(1).max(classes));
    Ok((0..classes).map(|class| class.to_string()).collect())
}

/// Image files with a class each.
struct Labelled {
    files: Folder,
    labels: Vec<u32>,
    classes: Vec<String>,
}

impl data::Source for Labelled {
    fn format(&self) -> Format {
        self.files.format()
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> selfsup::Result<()> {
        self.files.read(index, into)
    }

    fn size(&self, index: usize) -> selfsup::Result<[usize; 2]> {
        self.files.size(index)
    }

    fn file_bytes(&self, index: usize) -> Option<u64> {
        self.files.file_bytes(index)
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(self.labels[index])
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        self.files.name(index)
    }
}

#[pymethods]
impl Source {
    /// The images of a split of the data set at a path.
    #[staticmethod]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        split: &str,
        reading: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let keys = ReadingKeys::of(reading)?;
        released(py, || {
            let reading = keys.for_format(Format::RGB)?;
            let source = data::open_as(&path, Split::from_str(split)?, &reading)?;
            Ok(Self(source.into()))
        })
    }

    /// Image files in this order, with a class each, or without; `keep` says whether decoded images stay in memory, up to the engine's
    /// limit. There are at least `classes` classes.
    #[staticmethod]
    fn of_files(
        py: Python<'_>,
        files: Vec<PathBuf>,
        labels: Option<Vec<u32>>,
        classes: u32,
        keep: bool,
        reading: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let keys = ReadingKeys::of(reading)?;
        let files = released(py, || {
            let files = Folder::of_files(files, &keys.for_format(Format::RGB)?)?;
            Ok(if keep { files } else { files.with_cache(0) })
        })?;
        let Some(labels) = labels else { return Ok(Self(Arc::new(files))) };
        let classes = self::classes(Some(&labels), classes, files.len())?;
        Ok(Self(Arc::new(Labelled { files, labels, classes })))
    }

    /// Arrays `[h, w, c]` of u8, u16 or f32, contiguous, with a class each, or without. They are not copied. There are at least
    /// `classes` classes.
    #[staticmethod]
    fn of_arrays(
        arrays: Vec<Bound<'_, PyAny>>,
        labels: Option<Vec<u32>>,
        classes: u32,
        reading: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let keys = ReadingKeys::of(reading)?;
        let images = arrays.iter().map(Array::of).collect::<PyResult<Vec<_>>>()?;
        let native = images.first().map_or(Format::RGB, Array::format);
        let reading = keys.for_format(native).map_err(|e| raised(&e))?;
        for (i, image) in images.iter().enumerate() {
            if let Err(reason) = image.check(&reading) {
                return Err(PyValueError::new_err(format!("image {i} {reason}")));
            }
        }
        let classes = self::classes(labels.as_deref(), classes, images.len())?;
        Ok(Self(Arc::new(Arrays { images, reading, labels, classes })))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// The names of the classes.
    #[getter]
    fn classes(&self) -> Vec<String> {
        self.0.classes().to_vec()
    }

    /// Channels of the images, and bits of a sample.
    #[getter]
    fn format(&self) -> (usize, usize) {
        let Format { channels, bits } = self.0.format();
        (channels, bits)
    }
}

/// How the files of a folder are read if all is left to them, as keys of a recipe's `data`.
#[pyfunction]
pub fn native_reading<'py>(py: Python<'py>, folder: PathBuf) -> PyResult<Bound<'py, PyAny>> {
    let reading = released(py, || train::own_reading(Path::new(&folder), &[]))?;
    Ok(pythonize(py, &ReadingKeys::in_full(&reading))?)
}

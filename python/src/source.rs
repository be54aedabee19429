//! Sets of images: folders and files as the program reads them, and arrays of the caller.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use numpy::{PyArray3, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use selfsup::data::{self, Folder, Image, Split};

use crate::error::released;

/// A set of images.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Source(pub Arc<dyn data::Source>);

#[pymethods]
impl Source {
    /// The images of a split of the data set at a path.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, split: &str) -> PyResult<Self> {
        released(py, || {
            let source = data::open(&path, Split::from_str(split)?)?;
            Ok(Self(source.into()))
        })
    }

    /// Image files, without labels, in this order; `keep` says whether decoded images stay in memory, up to the engine's limit.
    #[staticmethod]
    fn of_files(files: Vec<PathBuf>, keep: bool) -> Self {
        let files = Folder::of_files(files);
        Self(Arc::new(if keep { files } else { files.with_cache(0) }))
    }

    /// Arrays `[h, w, 3]` of u8, contiguous, with a class each, or without. They are not copied.
    #[staticmethod]
    fn of_arrays(images: Vec<Bound<'_, PyArray3<u8>>>, labels: Option<Vec<u32>>) -> PyResult<Self> {
        let mut pixels = Vec::with_capacity(images.len());
        for image in &images {
            let &[height, width, channels] = image.shape() else { unreachable!("a PyArray3") };
            if channels != 3 || height == 0 || width == 0 || !image.is_c_contiguous() {
                return Err(PyValueError::new_err(format!(
                    "an image is {:?}, not a contiguous [height, width, 3]",
                    image.shape()
                )));
            }
            pixels.push(Pixels { first: image.data(), width, height });
        }
        if labels.as_ref().is_some_and(|labels| labels.len() != pixels.len()) {
            return Err(PyValueError::new_err("as many labels as images are needed"));
        }
        let most = labels.iter().flatten().max();
        let classes = most.map_or(0, |most| most + 1);
        let classes = (0..classes).map(|class| class.to_string()).collect();
        let _arrays = images.into_iter().map(Bound::unbind).collect();
        Ok(Self(Arc::new(Arrays { pixels, labels, classes, _arrays })))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// The names of the classes.
    #[getter]
    fn classes(&self) -> Vec<String> {
        self.0.classes().to_vec()
    }
}

/// The pixels of an array.
struct Pixels {
    first: *const u8,
    width: usize,
    height: usize,
}

/// Images in arrays.
struct Arrays {
    pixels: Vec<Pixels>,
    labels: Option<Vec<u32>>,
    classes: Vec<String>,
    /// What the pixels lie in.
    _arrays: Vec<Py<PyArray3<u8>>>,
}

// SAFETY: the pointers are only read, and what they point to lives as long as `_arrays`.
unsafe impl Send for Arrays {}
// SAFETY: as above.
unsafe impl Sync for Arrays {}

impl data::Source for Arrays {
    fn len(&self) -> usize {
        self.pixels.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> selfsup::Result<()> {
        let &Pixels { first, width, height } = &self.pixels[index];
        into.resize(width, height);
        // SAFETY: the array has `height * width * 3` bytes in a row, as was checked, and lives as long as `_arrays`. Python that
        // writes to it meanwhile changes which bytes are copied, as it does under NumPy's own functions that release the lock.
        unsafe {
            std::ptr::copy_nonoverlapping(first, into.pixels.as_mut_ptr(), into.pixels.len());
        }
        Ok(())
    }

    fn size(&self, index: usize) -> selfsup::Result<[usize; 2]> {
        Ok([self.pixels[index].width, self.pixels[index].height])
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.as_ref().map(|labels| labels[index])
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }
}

//! Arrays of the caller as a set of images. They are not copied.

use numpy::{Element, PyArray3, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use selfsup::data::{self, Format, Image, Reading, Samples, Values};

/// The type of an array's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    U16,
    F32,
}

/// A type of samples.
trait Sample: Element + Copy + Default {
    const KIND: Kind;
}

impl Sample for u8 {
    const KIND: Kind = Kind::U8;
}

impl Sample for u16 {
    const KIND: Kind = Kind::U16;
}

impl Sample for f32 {
    const KIND: Kind = Kind::F32;
}

/// An image in an array.
pub struct Array {
    first: *const u8,
    kind: Kind,
    size: [usize; 2],
    channels: usize,
    /// What the samples lie in.
    _array: Py<PyAny>,
}

// SAFETY: the pointer is only read, and what it points to lives as long as `_array`.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

impl Array {
    /// An array `[height, width, channels]` of u8, u16 or f32, contiguous.
    pub fn of(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let none = || {
            let message =
                "an image is no array [height, width, channels] of uint8, uint16 or float32";
            PyTypeError::new_err(message)
        };
        of_type::<u8>(array)
            .or_else(|| of_type::<u16>(array))
            .or_else(|| of_type::<f32>(array))
            .unwrap_or_else(|| Err(none()))
    }

    /// Channels, and bits of what it becomes unless a reading says otherwise: floats become 16 bits.
    pub fn format(&self) -> Format {
        let bits = if self.kind == Kind::U8 { 8 } else { 16 };
        Format { channels: self.channels, bits }
    }

    /// Fails unless images like this one can be read so; the error is the end of a sentence about it.
    pub fn check(&self, reading: &Reading) -> Result<(), String> {
        let values = match self.kind {
            Kind::U8 => Values::U8(vec![0; self.channels]),
            Kind::U16 => Values::U16(vec![0; self.channels]),
            Kind::F32 => Values::F32(vec![0.0; self.channels]),
        };
        self.samples([1, 1], values).convert(reading, &mut Image::default())
    }

    /// Width and height in pixels.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// Writes the image as a reading asks for. The error is the end of a sentence about it.
    pub fn read(&self, reading: &Reading, into: &mut Image) -> Result<(), String> {
        let [width, height] = self.size;
        // Images of 16 bits are little-endian.
        let copied = match self.kind {
            Kind::U8 => true,
            Kind::U16 => cfg!(target_endian = "little") && reading.range.is_none(),
            Kind::F32 => false,
        };
        if copied && self.format() == reading.format {
            into.reshape(width, height, reading.format);
            // SAFETY: the array has samples of these channels and bits in a row, as was checked, and lives as long as `_array`. Python
            // that writes to it meanwhile changes which bytes are copied, as it does under NumPy's own functions that release the lock.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    self.first,
                    into.pixels.as_mut_ptr(),
                    into.pixels.len(),
                );
            }
            return Ok(());
        }
        let values = match self.kind {
            Kind::U8 => Values::U8(self.copied()),
            Kind::U16 => Values::U16(self.copied()),
            Kind::F32 => Values::F32(self.copied()),
        };
        self.samples(self.size, values).convert(reading, into)
    }

    /// The samples.
    ///
    /// # Panics
    /// If they are of another type.
    fn copied<T: Sample>(&self) -> Vec<T> {
        assert_eq!(self.kind, T::KIND, "samples of an array");
        let [width, height] = self.size;
        let mut values = vec![T::default(); width * height * self.channels];
        let bytes = size_of_val(values.as_slice());
        // SAFETY: as in `read`; and all bytes are samples of u8, u16 and f32. Bytes, since the array need not be aligned.
        unsafe { std::ptr::copy_nonoverlapping(self.first, values.as_mut_ptr().cast(), bytes) };
        values
    }

    fn samples(&self, size: [usize; 2], values: Values) -> Samples {
        Samples { size, channels: self.channels, alpha: false, premultiplied: false, values }
    }
}

/// An array of this type; `None` if it has another one.
fn of_type<T: Sample>(array: &Bound<'_, PyAny>) -> Option<PyResult<Array>> {
    let image = array.cast::<PyArray3<T>>().ok()?;
    let &[height, width, channels] = image.shape() else { unreachable!("a PyArray3") };
    if width == 0 || height == 0 || channels == 0 || !image.is_c_contiguous() {
        let shape = image.shape();
        return Some(Err(PyValueError::new_err(format!(
            "an image is {shape:?}, not a contiguous [height, width, channels]"
        ))));
    }
    let (first, size) = (image.data().cast_const().cast(), [width, height]);
    let _array = array.clone().unbind();
    Some(Ok(Array { first, kind: T::KIND, size, channels, _array }))
}

/// Images in arrays, all read as one format.
pub struct Arrays {
    /// The images.
    pub images: Vec<Array>,
    /// How they are read.
    pub reading: Reading,
    /// A class for each, or none.
    pub labels: Option<Vec<u32>>,
    /// The names of the classes.
    pub classes: Vec<String>,
}

impl data::Source for Arrays {
    fn format(&self) -> Format {
        self.reading.format
    }

    fn len(&self) -> usize {
        self.images.len()
    }

    fn read(&self, index: usize, into: &mut Image) -> selfsup::Result<()> {
        let read = self.images[index].read(&self.reading, into);
        read.map_err(|reason| selfsup::Error::format(self.name(index), reason))
    }

    fn size(&self, index: usize) -> selfsup::Result<[usize; 2]> {
        Ok(self.images[index].size())
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

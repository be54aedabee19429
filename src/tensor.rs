//! Tensors: a shape, a dtype and a piece of a device's memory (floor 2).
//!
//! Tensors are contiguous and row-major; images are `[n, h, w, c]`. Clones and slices of rows share memory. Writing
//! needs the only handle: [`Tensor::data_mut`] panics while another tensor still looks at the same memory, so that a
//! value saved for the backward pass cannot change under it.

use std::fmt;
use std::sync::Arc;

use crate::device::{Device, DeviceKind, Memory};

/// The type of a tensor's elements, known at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float; the reference device only.
    F64,
    /// 32-bit signed integer: labels and indices.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F64 => 8,
        }
    }

    /// The float type that a device computes in.
    pub fn of(device: &Device) -> Self {
        match device.kind() {
            DeviceKind::Cpu => DType::F32,
            DeviceKind::Reference => DType::F64,
        }
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug {
    /// Its dtype.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// f32 or f64: what generic loops over both widen to and narrow from.
pub(crate) trait Float: Element {
    fn widen(self) -> f64;
    fn narrow(value: f64) -> Self;
}

impl Float for f32 {
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn narrow(value: f64) -> Self {
        value as f32
    }
}

impl Float for f64 {
    fn widen(self) -> f64 {
        self
    }
    fn narrow(value: f64) -> Self {
        value
    }
}

/// Up to four sizes, outermost first; no sizes is a scalar.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The product of the sizes: 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.iter().product()
    }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl From<&[usize]> for Shape {
    #[track_caller]
    fn from(sizes: &[usize]) -> Self {
        assert!(sizes.len() <= 4, "shape {sizes:?} has more than four sizes");
        let mut dims = [1; 4];
        dims[..sizes.len()].copy_from_slice(sizes);
        Self { dims, rank: sizes.len() }
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    #[track_caller]
    fn from(sizes: [usize; N]) -> Self {
        sizes.as_slice().into()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A contiguous array on a device.
#[derive(Clone)]
pub struct Tensor {
    memory: Arc<Memory>,
    /// In elements, from the start of `memory`.
    offset: usize,
    shape: Shape,
    dtype: DType,
}

impl Tensor {
    /// Memory for `shape` whose contents are unspecified: write all of it before reading any.
    pub fn empty(device: &Device, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let memory = Memory::new(device, shape.elements() * dtype.size());
        Self { memory: Arc::new(memory), offset: 0, shape, dtype }
    }

    /// A tensor like this one in device, dtype and shape, contents unspecified.
    pub fn empty_like(&self) -> Self {
        Self::empty(self.device(), self.dtype, self.shape)
    }

    /// Floats of the device's own type with unspecified contents.
    pub fn floats(device: &Device, shape: impl Into<Shape>) -> Self {
        Self::empty(device, DType::of(device), shape)
    }

    /// All zeros, in the device's float type.
    pub fn zeros(device: &Device, shape: impl Into<Shape>) -> Self {
        let mut tensor = Self::floats(device, shape);
        tensor.view_mut().fill(0.0);
        tensor
    }

    /// A copy of `values` with their own dtype.
    ///
    /// # Panics
    /// When the number of values is not the shape's.
    #[track_caller]
    pub fn from_slice<T: Element>(device: &Device, shape: impl Into<Shape>, values: &[T]) -> Self {
        let mut tensor = Self::empty(device, T::DTYPE, shape);
        assert_eq!(
            tensor.len(),
            values.len(),
            "tensor: shape {:?} does not hold {} values",
            tensor.shape,
            values.len()
        );
        tensor.data_mut().copy_from_slice(values);
        tensor
    }

    /// A copy of `values` in the device's float type.
    #[track_caller]
    pub fn from_f64(device: &Device, shape: impl Into<Shape>, values: &[f64]) -> Self {
        match DType::of(device) {
            DType::F32 => {
                let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                Self::from_slice(device, shape, &values)
            }
            _ => Self::from_slice(device, shape, values),
        }
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of elements.
    #[allow(clippy::len_without_is_empty)] // a scalar is never empty, and an empty tensor is no special case
    pub fn len(&self) -> usize {
        self.shape.elements()
    }

    /// Bytes of its elements.
    pub fn size_in_bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Sizes of a tensor of rank `N`, named by the caller.
    ///
    /// # Panics
    /// When the rank is another, naming `what`.
    #[track_caller]
    pub fn dims<const N: usize>(&self, what: &str) -> [usize; N] {
        (**self.shape())
            .try_into()
            .unwrap_or_else(|_| panic!("{what} must have {N} sizes, not {:?}", self.shape))
    }

    /// The elements.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype.
    #[track_caller]
    pub fn data<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "tensor holds another dtype than was asked for");
        &bytemuck::cast_slice(self.memory.bytes())[self.offset..self.offset + self.len()]
    }

    /// The elements, to write.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype, or another tensor shares the memory.
    #[track_caller]
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        self.view_mut().into_data()
    }

    /// A mutable view of the whole tensor.
    ///
    /// # Panics
    /// When another tensor shares the memory.
    #[track_caller]
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        let (offset, shape, dtype) = (self.offset, self.shape, self.dtype);
        let memory = Arc::get_mut(&mut self.memory).unwrap_or_else(|| {
            panic!("tensor {shape:?} cannot be written: another tensor still shares its memory")
        });
        TensorMut { memory, offset, shape, dtype }
    }

    /// Whether this is the only handle on its memory.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.memory) == 1
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert_eq!(
            shape.elements(),
            self.len(),
            "reshape: {:?} and {shape:?} differ in size",
            self.shape
        );
        Self { shape, ..self.clone() }
    }

    /// `shape` elements from `offset` on, sharing memory.
    ///
    /// # Panics
    /// When they do not lie inside the tensor.
    #[track_caller]
    pub fn slice(&self, offset: usize, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        assert!(
            offset + shape.elements() <= self.len(),
            "slice of {shape:?} at element {offset} does not lie in {:?}",
            self.shape
        );
        Self { memory: self.memory.clone(), offset: self.offset + offset, shape, dtype: self.dtype }
    }

    /// Rows `from..from + count` of the outermost size, sharing memory.
    #[track_caller]
    pub fn rows(&self, from: usize, count: usize) -> Self {
        let (rows, inner) = (self.shape[0], &self.shape[1..]);
        assert!(from + count <= rows, "rows {from}..{} of {rows} rows", from + count);
        let mut shape = self.shape;
        shape.dims[0] = count;
        self.slice(from * inner.iter().product::<usize>(), shape)
    }

    /// A copy in memory of its own.
    pub fn copy(&self) -> Self {
        let mut copy = self.empty_like();
        match self.dtype {
            DType::F32 => copy.data_mut::<f32>().copy_from_slice(self.data()),
            DType::F64 => copy.data_mut::<f64>().copy_from_slice(self.data()),
            DType::I32 => copy.data_mut::<i32>().copy_from_slice(self.data()),
        }
        copy
    }

    /// The elements as f64, whatever the dtype. Waits for the device: not for use inside a step.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::F32 => self.data::<f32>().iter().map(|&v| f64::from(v)).collect(),
            DType::F64 => self.data::<f64>().to_vec(),
            DType::I32 => self.data::<i32>().iter().map(|&v| f64::from(v)).collect(),
        }
    }

    /// The one element of a tensor of length 1. Waits for the device: not for use inside a step.
    #[track_caller]
    pub fn scalar(&self) -> f64 {
        assert_eq!(self.len(), 1, "scalar of a tensor {:?}", self.shape);
        self.to_f64()[0]
    }

    /// The values on another device, in its float type (integers stay integers).
    pub fn to_device(&self, device: &Device) -> Self {
        match self.dtype {
            DType::I32 => Self::from_slice(device, self.shape, self.data::<i32>()),
            DType::F32 if DType::of(device) == DType::F32 => {
                Self::from_slice(device, self.shape, self.data::<f32>())
            }
            _ => Self::from_f64(device, self.shape, &self.to_f64()),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.to_f64();
        let shown = &values[..values.len().min(8)];
        write!(f, "Tensor {:?} {:?} {shown:?}", self.dtype, self.shape)?;
        if values.len() > 8 { f.write_str("…") } else { Ok(()) }
    }
}

/// A unique, borrowed view of a tensor or of a part of one: what an operation writes to.
#[derive(Debug)]
pub struct TensorMut<'a> {
    memory: &'a mut Memory,
    offset: usize,
    shape: Shape,
    dtype: DType,
}

impl<'a> TensorMut<'a> {
    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The elements, to write.
    ///
    /// # Panics
    /// When `T` is not the dtype.
    #[track_caller]
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        self.reborrow().into_data()
    }

    /// Sets every element of a float tensor.
    #[track_caller]
    pub fn fill(&mut self, value: f64) {
        match self.dtype {
            DType::F32 => self.data_mut::<f32>().fill(value as f32),
            DType::F64 => self.data_mut::<f64>().fill(value),
            DType::I32 => panic!("fill of an integer tensor"),
        }
    }

    /// `shape` elements from `offset` on.
    #[track_caller]
    pub fn slice(self, offset: usize, shape: Shape) -> TensorMut<'a> {
        assert!(
            offset + shape.elements() <= self.shape.elements(),
            "slice of {shape:?} at element {offset} does not lie in {:?}",
            self.shape
        );
        TensorMut { offset: self.offset + offset, shape, ..self }
    }

    fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { memory: self.memory, offset: self.offset, shape: self.shape, dtype: self.dtype }
    }

    #[track_caller]
    fn into_data<T: Element>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "tensor holds another dtype than was asked for");
        let range = self.offset..self.offset + self.shape.elements();
        &mut bytemuck::cast_slice_mut(self.memory.bytes_mut())[range]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "another tensor still shares its memory")]
    fn a_shared_tensor_cannot_be_written() {
        let mut x = Tensor::zeros(&Device::reference(), [2, 3]);
        let _kept = x.clone();
        x.data_mut::<f64>()[0] = 1.0;
    }

    #[test]
    fn rows_share_memory_and_know_their_place() {
        let values: Vec<f64> = (0..12).map(f64::from).collect();
        let x = Tensor::from_f64(&Device::reference(), [4, 3], &values);
        let middle = x.rows(1, 2);
        assert_eq!(**middle.shape(), [2, 3]);
        assert_eq!(middle.data::<f64>(), &values[3..9]);
        assert!(!x.is_unique());
        assert_eq!(middle.rows(1, 1).data::<f64>(), &values[6..9]);
    }

    #[test]
    #[should_panic(expected = "does not hold 5 values")]
    fn a_wrong_number_of_values_is_named() {
        let _ = Tensor::from_f64(&Device::reference(), [2, 3], &[0.0; 5]);
    }
}

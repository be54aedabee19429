//! Tensors: a shape, a dtype and a piece of a device's memory.
//!
//! Tensors are contiguous and row-major; images are `[n, h, w, c]`. Clones and slices of rows share memory. Writing
//! needs the only handle: [`Tensor::view_mut`] panics while another tensor still looks at the same memory, so that a
//! value saved for the backward pass cannot change under it.
//!
//! [`Tensor::data`] and [`Tensor::data_mut`] are for the host's own memory; [`Tensor::to_vec`], [`Tensor::from_slice`] and
//! [`TensorMut::write`] copy to and from any device.

mod arithmetic;
mod dtype;
mod numbers;
mod views;

use std::fmt;
use std::sync::Arc;

use half::bf16;

use crate::device::cuda::{self, In, Launch, Out};
use crate::device::{Device, DeviceKind, Memory};
pub(crate) use arithmetic::{CHUNK, add_into, fill};
pub(crate) use dtype::Float;
pub use dtype::{DType, Element, Shape};
pub use numbers::Numbers;
pub(crate) use views::{interleave_views, pick_views, row_shape};

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
    #[track_caller]
    pub fn empty(device: &Device, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let memory = Memory::new(device, shape.elements() * dtype.size());
        Self { memory: Arc::new(memory), offset: 0, shape, dtype }
    }

    /// A tensor like this one in device, dtype and shape, contents unspecified.
    #[track_caller]
    pub fn empty_like(&self) -> Self {
        Self::empty(self.device(), self.dtype, self.shape)
    }

    /// Floats of the device's own type with unspecified contents.
    #[track_caller]
    pub fn floats(device: &Device, shape: impl Into<Shape>) -> Self {
        Self::empty(device, DType::of(device), shape)
    }

    /// All zeros, in the device's float type.
    #[track_caller]
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
        tensor.view_mut().write(values);
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
    /// When `T` is not the tensor's dtype, or the tensor is on a GPU.
    #[track_caller]
    pub fn data<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "tensor holds another dtype than was asked for");
        &bytemuck::cast_slice(self.memory.bytes())[self.offset..self.offset + self.len()]
    }

    /// The elements, to write.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype, the tensor is on a GPU, or another tensor shares the memory.
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
    #[track_caller]
    pub fn copy(&self) -> Self {
        let mut copy = self.empty_like();
        copy.view_mut().copy_from(self);
        copy
    }

    /// The elements in host memory. Waits for the device: not for use inside a step.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype.
    #[track_caller]
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE, "tensor holds another dtype than was asked for");
        let mut values = vec![T::zeroed(); self.len()];
        self.memory.read(self.offset * self.dtype.size(), bytemuck::cast_slice_mut(&mut values));
        values
    }

    /// The elements as f64, whatever the dtype. Waits for the device: not for use inside a step.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::Bf16 => self.to_vec::<bf16>().into_iter().map(f64::from).collect(),
            DType::F32 => self.to_vec::<f32>().into_iter().map(f64::from).collect(),
            DType::F64 => self.to_vec(),
            DType::I32 => self.to_vec::<i32>().into_iter().map(f64::from).collect(),
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
            DType::I32 => Self::from_slice(device, self.shape, &self.to_vec::<i32>()),
            DType::F32 if DType::of(device) == DType::F32 => {
                Self::from_slice(device, self.shape, &self.to_vec::<f32>())
            }
            _ => Self::from_f64(device, self.shape, &self.to_f64()),
        }
    }

    /// The values in another float type, rounded to nearest even; shares memory where it is the same type already.
    ///
    /// # Panics
    /// When either is no float type, or a GPU is asked for f64.
    #[track_caller]
    pub fn cast(&self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self.clone();
        }
        let mut to = Self::empty(self.device(), dtype, self.shape);
        to.view_mut().cast_from(self);
        to
    }

    /// Where a kernel reads the elements.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype.
    #[track_caller]
    pub(crate) fn device_in<T: Element>(&self) -> In<'_, T> {
        assert_eq!(self.dtype, T::DTYPE, "a kernel reads another dtype than the tensor holds");
        In::new(self.memory.address() + (self.offset * self.dtype.size()) as u64)
    }

    /// Where a kernel writes the elements.
    ///
    /// # Panics
    /// When `T` is not the tensor's dtype, or another tensor shares the memory.
    #[track_caller]
    pub(crate) fn device_out<T: Element>(&mut self) -> Out<'_, T> {
        self.view_mut().into_out()
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
    /// When `T` is not the dtype, or the tensor is on a GPU.
    #[track_caller]
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        self.reborrow().into_data()
    }

    /// Copies a tensor of the same device, dtype and number of elements into it.
    #[track_caller]
    pub(crate) fn copy_from(&mut self, x: &Tensor) {
        assert_eq!(self.dtype, x.dtype, "copy between two dtypes");
        assert_eq!(self.shape.elements(), x.len(), "copy: {:?} into {:?}", x.shape, self.shape);
        let size = self.dtype.size();
        self.memory.copy_from(self.offset * size, &x.memory, x.offset * size, x.size_in_bytes());
    }

    /// Copies values of its own dtype into it.
    ///
    /// # Panics
    /// When `T` is not the dtype, or the number of values differs.
    #[track_caller]
    pub fn write<T: Element>(&mut self, values: &[T]) {
        assert_eq!(self.dtype, T::DTYPE, "tensor holds another dtype than is written");
        assert_eq!(self.shape.elements(), values.len(), "write: into {:?}", self.shape);
        self.memory.write(self.offset * self.dtype.size(), bytemuck::cast_slice(values));
    }

    /// Copies values into it, rounded to its dtype.
    ///
    /// # Panics
    /// When the number of values differs.
    #[track_caller]
    pub fn write_f64(&mut self, values: &[f64]) {
        match self.dtype {
            DType::Bf16 => {
                self.write(&values.iter().map(|&v| bf16::from_f64(v)).collect::<Vec<_>>())
            }
            DType::F32 => self.write(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            DType::F64 => self.write(values),
            DType::I32 => self.write(&values.iter().map(|&v| v as i32).collect::<Vec<_>>()),
        }
    }

    /// Sets every element of a float tensor.
    #[track_caller]
    pub fn fill(&mut self, value: f64) {
        if self.memory.device().kind() == DeviceKind::Cuda {
            return self.fill_on_gpu(value as f32);
        }
        match self.dtype {
            DType::Bf16 => self.data_mut().fill(bf16::from_f64(value)),
            DType::F32 => self.data_mut::<f32>().fill(value as f32),
            DType::F64 => self.data_mut::<f64>().fill(value),
            DType::I32 => panic!("fill of an integer tensor"),
        }
    }

    #[track_caller]
    fn fill_on_gpu(&mut self, value: f32) {
        let (device, n) = (self.memory.device().clone(), self.shape.elements());
        let launch = Launch::over(device.gpu(), n, 16 / self.dtype.size());
        // SAFETY: the view has `n` elements.
        unsafe {
            match self.dtype {
                DType::Bf16 => cuda::fill_bf16(launch, self.device_out(), value, n as i64),
                DType::F32 => cuda::fill_f32(launch, self.device_out(), value, n as i64),
                other => panic!("fill of a tensor of {other:?} on a GPU"),
            }
        }
    }

    /// Rounds floats of another type into it.
    #[track_caller]
    pub(crate) fn cast_from(&mut self, x: &Tensor) {
        assert_eq!(&self.shape, x.shape(), "cast: the shapes differ");
        if self.memory.device().kind() != DeviceKind::Cuda {
            return self.write_f64(&x.to_f64());
        }
        let (device, n) = (x.device().clone(), x.len());
        let launch = Launch::over(device.gpu(), n, 8);
        // SAFETY: both have `n` elements.
        unsafe {
            match (x.dtype(), self.dtype) {
                (DType::F32, DType::Bf16) => {
                    cuda::cast_f32_to_bf16(launch, self.device_out(), x.device_in(), n as i64);
                }
                (DType::Bf16, DType::F32) => {
                    cuda::cast_bf16_to_f32(launch, self.device_out(), x.device_in(), n as i64);
                }
                (from, to) => panic!("no cast from {from:?} to {to:?} on a GPU"),
            }
        }
    }

    /// Where a kernel writes the elements.
    #[track_caller]
    pub(crate) fn device_out<T: Element>(&mut self) -> Out<'_, T> {
        self.reborrow().into_out()
    }

    #[track_caller]
    fn into_out<T: Element>(self) -> Out<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "a kernel writes another dtype than the tensor holds");
        Out::new(self.memory.address() + (self.offset * self.dtype.size()) as u64)
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
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

//! Tensors: a shape, a dtype and a piece of a device's memory.
//!
//! Tensors are contiguous and row-major; images are `[n, h, w, c]`. Clones and slices of rows share memory. Writing needs
//! the only handle: [`Tensor::view_mut`] panics while another tensor shares the memory, so a value saved for the backward
//! pass cannot change.
//!
//! [`Tensor::data`] and [`Tensor::data_mut`] give access to host memory; [`Tensor::to_vec`], [`Tensor::from_slice`] and
//! [`TensorMut::write`] copy from and to any device. [`Tensor::adopt`] and [`Tensor::lend`] share a GPU's memory with another library.

mod arithmetic;
mod dtype;
mod foreign;
mod numbers;
mod views;
mod writing;

use std::fmt;
use std::sync::Arc;

use half::bf16;

use crate::device::cuda::{In, Out};
use crate::device::peer::Operand;
use crate::device::{Device, DeviceKind, Memory};
pub(crate) use arithmetic::{CHUNK, add_into, fill};
pub(crate) use dtype::{Activation, Float, by_activation};
pub use dtype::{DType, Element, Shape};
pub use foreign::Lent;
pub use numbers::Numbers;
pub(crate) use views::{
    gather_views, interleave_views, mean_over_ranks, pick_views, reduce_over_ranks, row_shape,
    sum_over_ranks,
};
pub use writing::TensorMut;

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
    /// A tensor with unspecified contents: write all elements before reading any.
    #[track_caller]
    pub fn empty(device: &Device, dtype: DType, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        let memory = Memory::new(device, shape.elements() * dtype.size());
        Self { memory: Arc::new(memory), offset: 0, shape, dtype }
    }

    /// A tensor with this one's device, dtype and shape, and unspecified contents.
    #[track_caller]
    pub fn empty_like(&self) -> Self {
        Self::empty(self.device(), self.dtype, self.shape)
    }

    /// A tensor of the device's float type with unspecified contents.
    #[track_caller]
    pub fn floats(device: &Device, shape: impl Into<Shape>) -> Self {
        Self::empty(device, DType::of(device), shape)
    }

    /// A tensor of zeros, in the device's float type.
    #[track_caller]
    pub fn zeros(device: &Device, shape: impl Into<Shape>) -> Self {
        let mut tensor = Self::floats(device, shape);
        tensor.view_mut().fill(0.0);
        tensor
    }

    /// A tensor with a copy of `values`, in their own dtype.
    ///
    /// ```
    /// use selfsup::{device::Device, tensor::Tensor};
    /// let device = Device::cpu(1)?;
    /// let x = Tensor::from_slice(&device, [2, 3], &[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    /// assert_eq!(x.rows(1, 1).to_vec::<f32>(), [4.0, 5.0, 6.0]);
    /// # Ok::<(), selfsup::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the shape does not hold this number of values.
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

    /// A tensor with a copy of `values`, converted to the device's float type.
    ///
    /// # Panics
    /// If the shape does not hold this number of values.
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
    #[allow(clippy::len_without_is_empty)] // an empty tensor is not a special case
    pub fn len(&self) -> usize {
        self.shape.elements()
    }

    /// The size of its elements in bytes.
    pub fn size_in_bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// The sizes of a tensor of rank `N`. `what` names the tensor in the panic message.
    ///
    /// # Panics
    /// If the rank is not `N`.
    #[track_caller]
    pub fn dims<const N: usize>(&self, what: &str) -> [usize; N] {
        (**self.shape())
            .try_into()
            .unwrap_or_else(|_| panic!("{what} must have {N} sizes, not {:?}", self.shape))
    }

    /// The elements.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype or the tensor is on a GPU.
    #[track_caller]
    pub fn data<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "the tensor's dtype is not the requested one");
        &bytemuck::cast_slice(self.memory.bytes())[self.offset..self.offset + self.len()]
    }

    /// The elements, for writing.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype, the tensor is on a GPU, or another tensor shares its memory.
    #[track_caller]
    pub fn data_mut<T: Element>(&mut self) -> &mut [T] {
        self.view_mut().into_data()
    }

    /// A mutable view of all elements.
    ///
    /// # Panics
    /// If another tensor shares the memory.
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
    /// If the number of elements differs.
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

    /// A view of the elements from `offset` on under `shape`, sharing memory.
    ///
    /// # Panics
    /// If the view does not lie inside the tensor.
    #[track_caller]
    pub fn slice(&self, offset: usize, shape: impl Into<Shape>) -> Self {
        let shape = shape.into();
        check_slice(offset, &shape, &self.shape);
        Self { memory: self.memory.clone(), offset: self.offset + offset, shape, dtype: self.dtype }
    }

    /// Rows `from..from + count` along the outermost dimension, sharing memory.
    ///
    /// # Panics
    /// If the tensor is a scalar or has fewer rows.
    #[track_caller]
    pub fn rows(&self, from: usize, count: usize) -> Self {
        let Some((&rows, inner)) = self.shape.split_first() else {
            panic!("rows {from} and {count} more of a scalar")
        };
        assert!(
            from.checked_add(count).is_some_and(|end| end <= rows),
            "{count} rows from row {from} on do not lie in {rows} rows"
        );
        let mut shape = self.shape;
        shape.dims[0] = count;
        self.slice(from * inner.iter().product::<usize>(), shape)
    }

    /// A copy that shares no memory.
    #[track_caller]
    pub fn copy(&self) -> Self {
        let mut copy = self.empty_like();
        copy.view_mut().copy_from(self);
        copy
    }

    /// Copies the elements to the host. Waits for the device, so not for use inside a step.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype.
    #[track_caller]
    pub fn to_vec<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE, "the tensor's dtype is not the requested one");
        let mut values = vec![T::zeroed(); self.len()];
        self.memory.read(self.offset * self.dtype.size(), bytemuck::cast_slice_mut(&mut values));
        values
    }

    /// Copies the elements of any dtype to the host as f64. Waits for the device, so not for use inside a step.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::Bf16 => self.to_vec::<bf16>().into_iter().map(f64::from).collect(),
            DType::F32 => self.to_vec::<f32>().into_iter().map(f64::from).collect(),
            DType::F64 => self.to_vec(),
            DType::I32 => self.to_vec::<i32>().into_iter().map(f64::from).collect(),
        }
    }

    /// The sum of the squares of all elements in f64, in an order that depends on their number only. A GPU is waited for, so this
    /// is not for use inside a step; it copies only sums of parts to the host.
    ///
    /// # Panics
    /// If the tensor is not f32, or f64 on a reference device.
    #[track_caller]
    pub fn squared_norm(&self) -> f64 {
        arithmetic::squares(self, None)
    }

    /// The sum of the squares of the differences to another tensor, as [`Tensor::squared_norm`].
    ///
    /// # Panics
    /// As for [`Tensor::squared_norm`], or if the tensors differ in size or device.
    #[track_caller]
    pub fn squared_distance(&self, other: &Tensor) -> f64 {
        assert_eq!(
            self.len(),
            other.len(),
            "squared distance: {:?}, {:?}",
            self.shape(),
            other.shape()
        );
        other.expect_on(self.device(), "squared distance");
        arithmetic::squares(self, Some(other))
    }

    /// The only element of a tensor of length 1. Waits for the device, so not for use inside a step.
    ///
    /// # Panics
    /// If the length is not 1.
    #[track_caller]
    pub fn scalar(&self) -> f64 {
        assert_eq!(self.len(), 1, "scalar of a tensor {:?}", self.shape);
        self.to_f64()[0]
    }

    /// A copy on another device, in that device's float type (integers stay integers).
    pub fn to_device(&self, device: &Device) -> Self {
        match self.dtype {
            DType::I32 => Self::from_slice(device, self.shape, &self.to_vec::<i32>()),
            DType::F32 if DType::of(device) == DType::F32 => {
                Self::from_slice(device, self.shape, &self.to_vec::<f32>())
            }
            _ => Self::from_f64(device, self.shape, &self.to_f64()),
        }
    }

    /// Converts to another float type, rounding to nearest even. Shares memory if the type is the same.
    ///
    /// # Panics
    /// If either type is not a float type, or f64 is requested on a GPU.
    #[track_caller]
    pub fn cast(&self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self.clone();
        }
        let mut to = Self::empty(self.device(), dtype, self.shape);
        to.view_mut().cast_from(self);
        to
    }

    /// Panics unless the tensor lives on `device`; `operation` names what needs it there.
    #[track_caller]
    pub(crate) fn expect_on(&self, device: &Device, operation: &str) {
        assert!(
            self.device().same(device),
            "{operation}: a tensor {:?} is on another device: copy it with to_device",
            self.shape
        );
    }

    /// Where a reference library finds the elements, which on a host are f32.
    pub(crate) fn operand(&self) -> Operand<'_> {
        match self.device().kind() {
            DeviceKind::Cuda => Operand::Gpu(&self.memory, self.offset * self.dtype.size()),
            DeviceKind::Cpu | DeviceKind::Reference => Operand::Host(self.data()),
        }
    }

    /// The address of the elements on their device.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address() + (self.offset * self.dtype.size()) as u64
    }

    /// The address of the elements, for a kernel to read.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype or the tensor is not on a GPU.
    #[track_caller]
    pub(crate) fn device_in<T: Element>(&self) -> In<'_, T> {
        assert_eq!(self.dtype, T::DTYPE, "a kernel reads a dtype that is not the tensor's");
        let _ = self.device().gpu();
        In::new(self.address(), self.len() * self.dtype.size())
    }

    /// The address of the elements, for a kernel to write.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype, or another tensor shares the memory.
    #[track_caller]
    pub(crate) fn device_out<T: Element>(&mut self) -> Out<'_, T> {
        self.view_mut().into_out()
    }
}

/// Panics unless `shape` elements from `offset` on lie inside a tensor of shape `of`.
#[track_caller]
fn check_slice(offset: usize, shape: &Shape, of: &Shape) {
    assert!(
        offset.checked_add(shape.elements()).is_some_and(|end| end <= of.elements()),
        "slice of {shape:?} at element {offset} does not lie in {of:?}"
    );
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.to_f64();
        let shown = &values[..values.len().min(8)];
        write!(f, "Tensor {:?} {:?} {shown:?}", self.dtype, self.shape)?;
        if values.len() > 8 { f.write_str("…") } else { Ok(()) }
    }
}

/// Channels that images of so many channels have on a device, which pads them with zeros: 4, or a multiple of 8.
pub fn device_channels(channels: usize) -> usize {
    if channels <= 4 { 4 } else { channels.next_multiple_of(8) }
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
    fn rows_share_memory_and_keep_their_offset() {
        let values: Vec<f64> = (0..12).map(f64::from).collect();
        let x = Tensor::from_f64(&Device::reference(), [4, 3], &values);
        let middle = x.rows(1, 2);
        assert_eq!(**middle.shape(), [2, 3]);
        assert_eq!(middle.data::<f64>(), &values[3..9]);
        assert!(!x.is_unique());
        assert_eq!(middle.rows(1, 1).data::<f64>(), &values[6..9]);
    }

    #[test]
    fn ranges_that_wrap_around_are_refused() {
        let device = Device::reference();
        let x = Tensor::from_f64(&device, [4, 2], &[0.0; 8]);
        let (part, rows) = (x.slice(4, [4]), x.rows(2, 2));
        let refused = |what: &str, f: &dyn Fn()| {
            let f = std::panic::AssertUnwindSafe(f);
            let panic = std::panic::catch_unwind(f).expect_err(what);
            let message = panic.downcast_ref::<String>().unwrap();
            assert!(message.contains(what), "{message}");
        };
        for offset in [usize::MAX, usize::MAX - 3, 4, 1 << 62] {
            refused("does not lie in", &|| drop(part.slice(offset, [1])));
            refused("do not lie in", &|| drop(rows.rows(offset, 1)));
            refused("does not lie in", &|| {
                let mut y = Tensor::zeros(&device, [4]);
                y.view_mut().slice(offset, [1].into()).fill(1.0);
            });
        }
        refused("of a scalar", &|| drop(Tensor::zeros(&device, []).rows(0, 1)));
        refused("more elements than memory can hold", &|| {
            drop(Tensor::zeros(&device, [3, 12_297_829_382_473_034_411]));
        });
        refused("more elements than memory can hold", &|| drop(x.reshape([1 << 32, 1 << 32, 8])));
    }

    #[test]
    #[should_panic(expected = "does not hold 5 values")]
    fn a_wrong_number_of_values_is_named() {
        let _ = Tensor::from_f64(&Device::reference(), [2, 3], &[0.0; 5]);
    }
}

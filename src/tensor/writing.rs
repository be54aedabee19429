//! Writing to tensors, through exclusive views.

use half::bf16;

use super::arithmetic::cast_on_host;
use super::{DType, Element, Shape, Tensor, check_slice};
use crate::device::cuda::{self, Launch, Out};
use crate::device::{DeviceKind, Memory};

/// An exclusive view of a tensor or of a part of one, for writing.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(super) memory: &'a mut Memory,
    pub(super) offset: usize,
    pub(super) shape: Shape,
    pub(super) dtype: DType,
}

impl<'a> TensorMut<'a> {
    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The elements, for writing.
    ///
    /// # Panics
    /// If `T` is not the dtype or the tensor is on a GPU.
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

    /// Copies values of the view's dtype into it.
    ///
    /// # Panics
    /// If `T` is not the dtype, or the number of values differs.
    #[track_caller]
    pub fn write<T: Element>(&mut self, values: &[T]) {
        assert_eq!(self.dtype, T::DTYPE, "write: the tensor's dtype is not that of the values");
        assert_eq!(self.shape.elements(), values.len(), "write: into {:?}", self.shape);
        self.memory.write(self.offset * self.dtype.size(), bytemuck::cast_slice(values));
    }

    /// Copies values into it, converted to its dtype.
    ///
    /// # Panics
    /// If the number of values differs.
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
    ///
    /// # Panics
    /// If the elements are integers.
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

    /// Copies floats of another type into it, rounding.
    #[track_caller]
    pub(crate) fn cast_from(&mut self, x: &Tensor) {
        assert_eq!(&self.shape, x.shape(), "cast: the shapes differ");
        let (device, n) = (x.device().clone(), x.len());
        if device.kind() != DeviceKind::Cuda {
            return cast_on_host(&device, self, x);
        }
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
                (from, to) => panic!("cast: {from:?} to {to:?} is not supported on a GPU"),
            }
        }
    }

    /// The address of the elements, for a kernel to write.
    #[track_caller]
    pub(crate) fn device_out<T: Element>(&mut self) -> Out<'_, T> {
        self.reborrow().into_out()
    }

    #[track_caller]
    pub(super) fn into_out<T: Element>(self) -> Out<'a, T> {
        assert_eq!(self.dtype, T::DTYPE, "a kernel writes a dtype that is not the tensor's");
        let _ = self.memory.device().gpu();
        let (at, bytes) =
            (self.offset * self.dtype.size(), self.shape.elements() * self.dtype.size());
        Out::new(self.memory.address() + at as u64, bytes)
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements from `offset` on under `shape`.
    ///
    /// # Panics
    /// If they do not lie inside the view.
    #[track_caller]
    pub fn slice(self, offset: usize, shape: Shape) -> TensorMut<'a> {
        check_slice(offset, &shape, &self.shape);
        TensorMut { offset: self.offset + offset, shape, ..self }
    }

    fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { memory: self.memory, offset: self.offset, shape: self.shape, dtype: self.dtype }
    }

    #[track_caller]
    pub(super) fn into_data<T: Element>(self) -> &'a mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "the tensor's dtype is not the requested one");
        let range = self.offset..self.offset + self.shape.elements();
        &mut bytemuck::cast_slice_mut(self.memory.bytes_mut())[range]
    }
}

//! Numbers that the host sets from step to step and kernels read on the device.

use std::sync::Arc;

use super::{Element, Tensor};
use crate::device::{Device, DeviceKind, Memory};

/// Numbers that change from step to step and that operations read on their device: a learning rate, a momentum, the rows of a
/// shuffle, labels. Set them before a step, never inside one: the replay of a captured step runs no host code and reads the
/// numbers from their fixed address. All numbers of a GPU are sent in one copy.
#[derive(Debug)]
pub struct Numbers<T> {
    values: Vec<T>,
    tensor: Tensor,
}

impl<T: Element> Numbers<T> {
    /// Numbers on a device, initially `values`.
    #[track_caller]
    pub fn new(device: &Device, values: &[T]) -> Self {
        let shape = [values.len()];
        let tensor = if device.kind() == DeviceKind::Cuda {
            let memory = Arc::new(Memory::for_numbers(device, size_of_val(values)));
            memory.set_numbers(bytemuck::cast_slice(values));
            Tensor { memory, offset: 0, shape: shape.into(), dtype: T::DTYPE }
        } else {
            Tensor::from_slice(device, shape, values)
        };
        Self { values: values.to_vec(), tensor }
    }

    /// Sets all numbers for later operations; operations already queued on a GPU keep the earlier values.
    ///
    /// # Panics
    /// If the count changes.
    #[track_caller]
    pub fn set(&mut self, values: &[T]) {
        assert_eq!(self.values.len(), values.len(), "numbers: the count cannot change");
        self.values.copy_from_slice(values);
        if self.tensor.device().kind() == DeviceKind::Cuda {
            self.tensor.memory.set_numbers(bytemuck::cast_slice(values));
        } else {
            // A new tensor, because a backward pass may still hold the old one.
            self.tensor = Tensor::from_slice(self.tensor.device(), [values.len()], values);
        }
    }

    /// The current values.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// The tensor `[n]` that operations read. Call this again after [`Numbers::set`].
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

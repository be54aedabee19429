//! Numbers that the host sets from step to step.

use std::sync::Arc;

use super::{Element, Tensor};
use crate::device::{Device, DeviceKind, Memory};

/// Numbers that change from step to step and that operations read on their device: a learning rate, a momentum, the rows of a
/// shuffle, labels. They are set before a step, never inside one: a step that a GPU has recorded runs none of the host's code
/// when it is replayed, and finds them where they were. All that a GPU's numbers were set to goes there in one copy.
#[derive(Debug)]
pub struct Numbers<T> {
    values: Vec<T>,
    tensor: Tensor,
}

impl<T: Element> Numbers<T> {
    /// Numbers on a device, `values` at first.
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

    /// Sets all of them, for operations from now on; those that a GPU has queued keep what they had.
    ///
    /// # Panics
    /// When there are more or fewer than there were.
    #[track_caller]
    pub fn set(&mut self, values: &[T]) {
        assert_eq!(self.values.len(), values.len(), "numbers: there are as many as at first");
        self.values.copy_from_slice(values);
        if self.tensor.device().kind() == DeviceKind::Cuda {
            self.tensor.memory.set_numbers(bytemuck::cast_slice(values));
        } else {
            // A new tensor: somebody may have kept the old one for a backward pass.
            self.tensor = Tensor::from_slice(self.tensor.device(), [values.len()], values);
        }
    }

    /// What they are.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// Where operations read them: `[n]`. Ask again after they were set.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
}

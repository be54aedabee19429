//! Arrays in GPU memory that are not tensors. A launch reads them each time it runs, so a replayed launch sees new values.

use std::marker::PhantomData;

use super::{In, Out};
use crate::device::{Device, Memory};

/// An array written by the host and read by kernels.
#[derive(Debug)]
pub(crate) struct Table<T> {
    memory: Memory,
    len: usize,
    element: PhantomData<T>,
}

impl<T: bytemuck::Pod> Table<T> {
    /// A table of `values` on a GPU.
    #[track_caller]
    pub(crate) fn new(gpu: &Device, values: &[T]) -> Self {
        let memory = Memory::new(gpu, size_of_val(values));
        let mut table = Self { memory, len: values.len(), element: PhantomData };
        table.write(values);
        table
    }

    /// A table of `len` unspecified values.
    #[track_caller]
    pub(crate) fn room(gpu: &Device, len: usize) -> Self {
        Self { memory: Memory::new(gpu, len * size_of::<T>()), len, element: PhantomData }
    }

    /// The GPU that holds it.
    pub(crate) fn device(&self) -> &Device {
        self.memory.device()
    }

    /// The number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Replaces the values from index `at` on, behind all queued work.
    ///
    /// # Panics
    /// If they do not fit.
    #[track_caller]
    pub(crate) fn write_at(&mut self, at: usize, values: &[T]) {
        assert!(
            at.checked_add(values.len()).is_some_and(|end| end <= self.len),
            "a write beyond the table's end"
        );
        self.memory.write(at * size_of::<T>(), bytemuck::cast_slice(values));
    }

    /// Replaces all values, behind all queued work.
    ///
    /// # Panics
    /// If the number of values changes.
    #[track_caller]
    pub(crate) fn write(&mut self, values: &[T]) {
        assert_eq!(self.len, values.len(), "table: the length cannot change");
        self.memory.write(0, bytemuck::cast_slice(values));
    }

    /// Its address, for a kernel to read.
    pub(crate) fn device_in(&self) -> In<'_, T> {
        In::new(self.memory.address(), self.len * size_of::<T>())
    }

    /// Its address, for a kernel to write.
    pub(crate) fn device_out(&mut self) -> Out<'_, T> {
        Out::new(self.memory.address(), self.len * size_of::<T>())
    }

    /// Its values. Waits for the GPU, so not for use inside a step.
    pub(crate) fn read(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.len];
        self.memory.read(0, bytemuck::cast_slice_mut(&mut values));
        values
    }
}

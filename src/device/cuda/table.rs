//! Numbers in a GPU's memory that are no tensor: what a launch reads anew each time, so that a captured one follows them.

use std::marker::PhantomData;

use super::{In, Out};
use crate::device::{Device, Memory};

/// Numbers of one type, written by the host and read by kernels.
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

    /// Room for `len` values, which are unspecified.
    #[track_caller]
    pub(crate) fn room(gpu: &Device, len: usize) -> Self {
        Self { memory: Memory::new(gpu, len * size_of::<T>()), len, element: PhantomData }
    }

    /// The number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Replaces the values from place `at` on, behind whatever is queued.
    ///
    /// # Panics
    /// When they do not lie in it.
    #[track_caller]
    pub(crate) fn write_at(&mut self, at: usize, values: &[T]) {
        assert!(at + values.len() <= self.len, "a write beyond the table's end");
        self.memory.write(at * size_of::<T>(), bytemuck::cast_slice(values));
    }

    /// Replaces all of it, behind whatever is queued.
    ///
    /// # Panics
    /// When there are more or fewer values than there were.
    #[track_caller]
    pub(crate) fn write(&mut self, values: &[T]) {
        assert_eq!(self.len, values.len(), "a table keeps its length");
        self.memory.write(0, bytemuck::cast_slice(values));
    }

    /// Where a kernel reads it.
    pub(crate) fn device_in(&self) -> In<'_, T> {
        In::new(self.memory.address())
    }

    /// Where a kernel writes it.
    pub(crate) fn device_out(&mut self) -> Out<'_, T> {
        Out::new(self.memory.address())
    }

    /// What it holds. Waits for the GPU: not for use inside a step.
    pub(crate) fn read(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.len];
        self.memory.read(0, bytemuck::cast_slice_mut(&mut values));
        values
    }
}

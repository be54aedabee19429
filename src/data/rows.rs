//! Rows of a tensor of images, written from f32 whatever the float type of the device.

use crate::tensor::{DType, Tensor};

/// The row of one view of one sample: `s * s * channels` values.
pub enum Row<'a> {
    /// On an f32 device.
    F32(&'a mut [f32]),
    /// On the reference device.
    F64(&'a mut [f64]),
}

impl Row<'_> {
    /// Lets `write` fill the row; `buffer` is used for rows that are not f32.
    pub fn fill(self, buffer: &mut Vec<f32>, write: impl FnOnce(&mut [f32])) {
        match self {
            Row::F32(values) => write(values),
            Row::F64(values) => {
                buffer.resize(values.len(), 0.0);
                write(buffer);
                values.iter_mut().zip(buffer).for_each(|(to, &mut from)| *to = f64::from(from));
            }
        }
    }
}

/// Splits a float tensor into rows of `length` values.
pub fn rows_of(tensor: &mut Tensor, length: usize) -> Vec<Row<'_>> {
    match tensor.dtype() {
        DType::F64 => tensor.data_mut().chunks_exact_mut(length).map(Row::F64).collect(),
        _ => tensor.data_mut().chunks_exact_mut(length).map(Row::F32).collect(),
    }
}

//! Moves of rows, without arithmetic: by index, and into queues.

mod cuda;
mod gather;

pub use gather::{concat_rows, gather_rows, push_rows, slice_rows, write_rows};

//! Moving rows: by index, and in and out of queues; no arithmetic.

mod cuda;
mod gather;

pub use gather::{concat_rows, gather_rows, push_rows, slice_rows, write_rows};

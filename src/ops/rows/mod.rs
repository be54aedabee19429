//! Moves of rows, without arithmetic: by index, and into queues.

mod cuda;
mod gather;
mod ranks;

pub use gather::{concat_rows, gather_rows, push_rows, slice_rows, write_rows};
pub(crate) use ranks::gather_ranks;

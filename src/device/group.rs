//! The interface for multi-process training.
//!
//! Everything that sums over the batch (batch statistics, gathered negatives, Sinkhorn's sums, gradients) goes through a
//! [`Group`]. Only groups of one process exist today, whose calls return their input. Multi-process training will be
//! implemented here and nowhere else; N processes must agree with one up to rounding.

/// A group of processes that share one batch.
#[derive(Clone, Debug, Default)]
pub struct Group {
    _private: (),
}

impl Group {
    /// A group of one process.
    pub fn alone() -> Self {
        Self::default()
    }

    /// The rank of this process, in `0..size`.
    pub fn rank(&self) -> usize {
        0
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        1
    }

    /// Replaces `values` by their sum over the group, in rank order.
    pub fn all_reduce_sum<T>(&self, values: &mut [T]) {
        let _ = values;
    }

    /// Replaces `values` by their maximum over the group.
    pub fn all_reduce_max<T>(&self, values: &mut [T]) {
        let _ = values;
    }

    /// Gathers the rows of every rank, in rank order. Returns `None` in a group of one, where `rows` are all the rows.
    pub fn all_gather<T>(&self, rows: &[T]) -> Option<Vec<T>> {
        let _ = rows;
        None
    }
}

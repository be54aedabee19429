//! The seam between processes.
//!
//! Whatever sums over the batch (batch statistics, gathered negatives, Sinkhorn's sums, gradients) asks a [`Group`].
//! Alone, which is all there is today, every call returns what it was given. Several processes will answer here and
//! nowhere else, and N of them must equal one to rounding.

/// The processes that share one batch.
#[derive(Clone, Debug, Default)]
pub struct Group {
    _private: (),
}

impl Group {
    /// A group of one.
    pub fn alone() -> Self {
        Self::default()
    }

    /// This process's number, `0..size`.
    pub fn rank(&self) -> usize {
        0
    }

    /// How many processes there are.
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

    /// The rows of every rank, rank after rank; `None` when the caller's own rows are all there are.
    pub fn all_gather<T>(&self, rows: &[T]) -> Option<Vec<T>> {
        let _ = rows;
        None
    }
}

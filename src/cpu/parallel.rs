//! Parallel loops whose body is compiled once.

use rayon::iter::ParallelIterator;

/// Parallel loops over chunks of slices.
pub(crate) trait Each: ParallelIterator {
    /// [`for_each`](ParallelIterator::for_each) with the body behind a pointer. rayon copies a body to each place where work starts,
    /// is split, stolen and joined, six to eight of them; loops over the same kinds of slices share these places here. The call
    /// through the pointer is made for each item, which should be a chunk of hundreds of elements.
    fn each(self, body: impl Fn(Self::Item) + Send + Sync) {
        let body: &(dyn Fn(Self::Item) + Send + Sync) = &body;
        self.for_each(body);
    }
}

impl<I: ParallelIterator> Each for I {}

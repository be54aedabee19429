//! Parallel loops whose body is compiled once.

use std::panic::Location;

use rayon::iter::ParallelIterator;

use super::scaling;

/// Parallel loops over chunks of slices.
pub(crate) trait Each: ParallelIterator {
    /// [`for_each`](ParallelIterator::for_each) with the body behind a pointer. rayon copies a body to each place where work starts,
    /// is split, stolen and joined, six to eight of them; loops over the same kinds of slices share these places here. The call
    /// through the pointer is made for each item, which should be a chunk of hundreds of elements. [`scaling`] records the loop if
    /// the thread is asked to.
    #[track_caller]
    fn each(self, body: impl Fn(Self::Item) + Send + Sync) {
        let recorded = |item| scaling::recorded_task(|| body(item));
        let body: &(dyn Fn(Self::Item) + Send + Sync) =
            if scaling::is_on() { &recorded } else { &body };
        scaling::recorded_loop(Location::caller(), || self.for_each(body));
    }
}

impl<I: ParallelIterator> Each for I {}

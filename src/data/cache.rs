//! Decoded images in memory, up to a budget: a small set of JPEG files is decoded once, not once per epoch.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::source::Image;

/// Bytes of decoded images kept in memory per set: CIFAR-10 takes 184 MB of it, Imagenette at 128 pixels 465 MB.
const BUDGET: usize = 1 << 30;

/// The decoded images of a set.
pub struct Cache {
    /// One per image; set on the first read while the budget lasts.
    kept: Vec<OnceLock<Image>>,
    budget_left: AtomicUsize,
}

impl Cache {
    /// Creates a cache for `images` images within the default budget.
    pub fn new(images: usize) -> Self {
        let kept = (0..images).map(|_| OnceLock::new()).collect();
        Self { kept, budget_left: AtomicUsize::new(BUDGET) }
    }

    /// Sets how many bytes are kept; 0 keeps none.
    pub fn limit(&mut self, bytes: usize) {
        self.budget_left = AtomicUsize::new(bytes);
    }

    /// Returns an image if it is kept.
    pub fn get(&self, index: usize) -> Option<&Image> {
        self.kept[index].get()
    }

    /// Keeps a copy of a decoded image if the budget allows it.
    pub fn keep(&self, index: usize, image: &Image) {
        let size = image.pixels.len();
        let taken = self
            .budget_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(size));
        // Two threads may have decoded the same image: the second returns its share of the budget.
        if taken.is_ok() && self.kept[index].set(image.clone()).is_err() {
            self.budget_left.fetch_add(size, Ordering::Relaxed);
        }
    }
}

//! The table of cases.

mod arenas;
mod convolutions;
mod layers;
mod losses;

use super::case::{Case, Extent};
use crate::tensor::DType;

/// Returns the cases whose names contain every word of `filter`, for activations of `dtype`.
pub fn cases(extent: &Extent, dtype: DType, filter: &str) -> Vec<Case> {
    let mut all = convolutions::cases(extent, dtype);
    all.extend(layers::cases(extent, dtype));
    all.extend(losses::cases(extent, dtype));
    all.extend(arenas::cases(extent, dtype));
    all.retain(|case| filter.split_whitespace().all(|word| case.name.contains(word)));
    all
}

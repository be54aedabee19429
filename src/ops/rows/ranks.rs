//! The rows of all ranks, with a gradient.

use crate::tape::Var;
use crate::tensor::{gather_views, pick_views, sum_over_ranks};

/// Gathers the rows `[views * m, …]` of every rank into those of the batch, `[views * n, …]`, view after view: for losses that
/// couple rows of different ranks. On one rank, returns `x`.
///
/// Each rank's loss depends on the rows of all ranks, so the gradient of a rank's own rows is the sum of what all ranks found for
/// them. Taking only one's own part of one's own gradient would train on a different loss.
pub(crate) fn gather_ranks<'t>(x: &Var<'t>, views: usize) -> Var<'t> {
    let group = x.tape().group().clone();
    if group.size() == 1 {
        return x.clone();
    }
    let all = gather_views(x.value(), views, &group, "rows");
    let id = x.id();
    x.tape().record("gather_ranks", all, &[x], move |dy, gradients| {
        let mut dy = if dy.is_unique() { dy } else { dy.copy() };
        sum_over_ranks(&mut dy, &group, "gradients of rows");
        gradients.add(id, pick_views(&dy, views, group.size(), group.rank()));
    })
}

//! Forward and backward pass of one training step, over the complete batch at once or in micro-batches.

use std::cell::RefCell;

use super::{Coupling, Method};
use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::ops::scale;
use crate::tape;
use crate::tensor::Tensor;
use crate::tensor::pick_views;

/// Runs forward and backward of a batch of `images` images in `micro_batches` equal parts, leaves the gradients in the arena
/// and returns the loss. `views` holds one tensor for each resolution.
///
/// The gradients equal those of one batch whose batch norm normalises each part separately. Running statistics are updated
/// once per part.
///
/// # Errors
/// If the device fails, or the batch cannot be split ([`check_micro_batches`]).
pub fn step(
    method: &mut dyn Method,
    online: &mut Arena,
    views: &[Tensor],
    images: usize,
    micro_batches: usize,
) -> Result<Tensor> {
    if micro_batches == 1 {
        return tape::step(online, |tape| method.loss(tape, views));
    }
    check_micro_batches(method, images, micro_batches)?;
    let part = |i: usize| -> Vec<Tensor> {
        let of = |crops: &Tensor| pick_views(crops, crops.shape()[0] / images, micro_batches, i);
        views.iter().map(of).collect()
    };
    let share = 1.0 / micro_batches as f64;
    match method.coupling() {
        Coupling::Whole => unreachable!("checked above"),
        Coupling::Images => tape::summed_step(online, micro_batches, |tape, i| {
            scale(&method.loss(tape, &part(i)), share)
        }),
        Coupling::Batch { views: rows } => {
            let method = RefCell::new(method); // both closures borrow it, one after the other
            tape::cached_step(
                online,
                micro_batches,
                rows,
                |tape, i| method.borrow_mut().embed_part(tape, &part(i)),
                |z| method.borrow_mut().couple(z, views),
            )
        }
    }
}

/// Checks that a batch of `images` images can be split into `micro_batches` parts.
///
/// # Errors
/// If the parts would not be equal, a part would hold fewer than two images, or the method's loss cannot be split.
pub fn check_micro_batches(method: &dyn Method, images: usize, micro_batches: usize) -> Result<()> {
    if micro_batches == 1 {
        return Ok(());
    }
    if micro_batches == 0 || !images.is_multiple_of(micro_batches) || images / micro_batches < 2 {
        return Err(Error::Config(format!(
            "train.micro_batches is {micro_batches}, which does not split a batch of {images} into equal parts of 2 images or more"
        )));
    }
    if method.coupling() == Coupling::Whole {
        return Err(Error::config(
            "this method's step cannot be split: leave train.micro_batches at 1",
        ));
    }
    Ok(())
}

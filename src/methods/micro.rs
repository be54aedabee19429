//! A step's forward and backward pass, of the whole batch at once or in micro-batches.

use std::cell::RefCell;

use super::{Coupling, Method};
use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::ops::scale;
use crate::tape;
use crate::tensor::Tensor;
use crate::tensor::pick_views;

/// Forward and backward pass of a batch of `images` images, whose `views` hold a tensor for each resolution, in
/// `micro_batches` equal parts; gradients are then in the arena. Returns the loss.
///
/// Gradients are those of one batch whose batch norm treats the parts apart. Running statistics move once for each part.
///
/// # Errors
/// When the device fails, or the method cannot be cut ([`check_micro_batches`]).
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
            let method = RefCell::new(method); // both closures need it, one after the other
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

/// Whether a batch of `images` can be cut into `micro_batches`.
///
/// # Errors
/// When parts would not be equal, would hold one image, or the method's loss cannot be cut.
pub fn check_micro_batches(method: &dyn Method, images: usize, micro_batches: usize) -> Result<()> {
    if micro_batches == 1 {
        return Ok(());
    }
    if micro_batches == 0 || !images.is_multiple_of(micro_batches) || images / micro_batches < 2 {
        return Err(Error::Config(format!(
            "train.micro_batches is {micro_batches}, which does not cut a batch of {images} into equal parts of 2 images or more"
        )));
    }
    if method.coupling() == Coupling::Whole {
        return Err(Error::config(
            "this method's step cannot be cut: leave train.micro_batches at 1",
        ));
    }
    Ok(())
}

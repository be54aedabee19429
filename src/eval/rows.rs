//! What a network computes of images, a row each, in the source's order.

use std::collections::VecDeque;
use std::ops::Range;

use super::features::check_finite;
use crate::data::augment::Policy;
use crate::data::{Skipped, Source, Transform, each_batch};
use crate::device::cuda::Ring;
use crate::device::{Device, DeviceKind};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Batches whose rows a GPU has yet to return when the host queues the next one.
const AHEAD: usize = 2;

/// Which images, and how they are presented.
pub struct Images<'a> {
    pub source: &'a dyn Source,
    pub range: Range<usize>,
    /// Images of a forward pass.
    pub batch: usize,
    pub by: Transform,
    pub policy: &'a Policy,
    pub device: &'a Device,
}

/// The rows of a batch.
pub struct Rows {
    /// `[n, d]`, row-major.
    pub values: Vec<f32>,
    /// The index of each row's image.
    pub indices: Vec<u32>,
    /// The class of each; -1 if it has none.
    pub labels: Vec<i32>,
    /// Images that could not be read.
    pub skipped: Vec<Skipped>,
}

impl Images<'_> {
    /// Calls `done` with the rows of each batch: `d` values an image, which `forward` computes. `what` names them for messages. The
    /// host does not wait for a GPU before it has queued the batches that follow.
    ///
    /// # Errors
    /// If images cannot be read, rows are NaN or infinite, the device fails, `forward` fails or `done` does.
    pub fn rows(
        self,
        (what, d): (&str, usize),
        mut forward: impl FnMut(&Tensor) -> Result<Tensor>,
        mut done: impl FnMut(Rows) -> Result<()>,
    ) -> Result<()> {
        let Self { source, range, batch, by, policy, device } = self;
        let mut finish = |mut rows: Rows, values: Option<Vec<f32>>| {
            device.check()?; // a failed device yields NaN, not features
            rows.values = values.unwrap_or_default();
            let name = |row: usize| source.name(rows.indices[row] as usize);
            check_finite(&rows.values, d, what, name)?;
            done(rows)
        };
        let on_gpu = device.kind() == DeviceKind::Cuda;
        let most = batch.min(range.len()) * d;
        let mut returned = on_gpu.then(|| Ring::of_rows(device, AHEAD + 1, most));
        let mut pending: VecDeque<Rows> = VecDeque::new();
        each_batch(by, source, (range, batch), policy, device, &mut |batch, skipped| {
            let (indices, labels) = (batch.indices, batch.labels);
            let rows = Rows { values: Vec::new(), indices, labels, skipped };
            let count = rows.indices.len() * d;
            let found = match count {
                0 => None,
                _ => Some(forward(&batch.crops[0])?),
            };
            let Some(ring) = &mut returned else {
                let values = found.map(|found| found.to_f64().iter().map(|&v| v as f32).collect());
                return finish(rows, values);
            };
            if let Some(found) = found {
                ring.send_row(found.cast(DType::F32).device_in(), count);
            }
            pending.push_back(rows);
            match pending.len() > AHEAD {
                true => finish_oldest(&mut pending, ring, d, &mut finish),
                false => Ok(()),
            }
        })?;
        while let Some(ring) = returned.as_mut().filter(|_| !pending.is_empty()) {
            finish_oldest(&mut pending, ring, d, &mut finish)?;
        }
        Ok(())
    }
}

/// Waits for the rows of the batch that was queued first.
fn finish_oldest(
    pending: &mut VecDeque<Rows>,
    ring: &mut Ring,
    d: usize,
    finish: &mut impl FnMut(Rows, Option<Vec<f32>>) -> Result<()>,
) -> Result<()> {
    let Some(rows) = pending.pop_front() else { return Ok(()) };
    let count = rows.indices.len() * d;
    let values = if count == 0 { None } else { ring.wait(count) };
    finish(rows, values)
}

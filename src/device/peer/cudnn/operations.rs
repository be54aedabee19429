//! The operations as calls of cuDNN.

use std::ffi::c_int;
use std::ptr::null_mut;

use super::super::queued::{Queued, size_of};
use super::super::{Convolution, Direction, Lack, Operand, Peer, Pooling, Prepared};
use super::{
    ADD, BF16, CHANNELS_LAST, CROSS_CORRELATION, Cudnn, F32, FMA, Handle, KEEP_NAN,
    NORM_PER_CHANNEL, POOLING_MAX, POOLING_MEAN, RELU, SOFTMAX_ACCURATE, SOFTMAX_OF_IMAGE,
    TENSOR_CORES, Trial,
};
use crate::device::Precision;

/// Results replace what was there.
const ONE: *const std::ffi::c_void = (&raw const FACTORS[0]).cast();
const ZERO: *const std::ffi::c_void = (&raw const FACTORS[1]).cast();
static FACTORS: [f32; 2] = [1.0, 0.0];

/// How many trials of algorithms to hear of; the fastest come first.
const TRIALS: usize = 8;

impl Cudnn {
    fn precision(&self) -> Precision {
        self.device.gpu().precision()
    }

    fn bytes(&self, shape: [usize; 4]) -> usize {
        elements(shape) * size_of(self.precision())
    }

    /// Filters `[k, r, s, c]`.
    fn filters(&self, job: &mut Queued<'_>, [k, r, s, c]: [usize; 4]) -> Result<Handle, Lack> {
        let calls = self.calls;
        // SAFETY: the function fills in a handle.
        let handle = job
            .describe("filter", calls.filter_destroy, |to| unsafe { (calls.filter_create)(to) })?;
        let [k, r, s, c] = [k, r, s, c].map(|size| size as c_int);
        // SAFETY: the handle is the one just made.
        let status = unsafe { (calls.filter_set)(handle, self.kind(), CHANNELS_LAST, k, c, r, s) };
        job.check("filter", status)?;
        Ok(handle)
    }

    /// Stride, padding and arithmetic of a convolution.
    fn convolving(&self, job: &mut Queued<'_>, d: &Convolution) -> Result<Handle, Lack> {
        let calls = self.calls;
        // SAFETY: the function fills in a handle.
        let handle = job
            .describe("convolution", calls.conv_destroy, |to| unsafe { (calls.conv_create)(to) })?;
        let [stride, pad] = [d.stride, d.pad].map(|size| size as c_int);
        let math = if self.kind() == BF16 { TENSOR_CORES } else { FMA };
        // SAFETY: the handle is the one just made.
        let status = unsafe {
            match (calls.conv_set)(handle, pad, pad, stride, stride, 1, 1, CROSS_CORRELATION, F32) {
                0 => (calls.conv_math)(handle, math),
                status => status,
            }
        };
        job.check("convolution", status)?;
        Ok(handle)
    }

    /// A ReLU that keeps NaN.
    fn relu(&self, job: &mut Queued<'_>) -> Result<Handle, Lack> {
        let calls = self.calls;
        // SAFETY: the function fills in a handle.
        let handle =
            job.describe("ReLU", calls.relu_destroy, |to| unsafe { (calls.relu_create)(to) })?;
        // SAFETY: the handle is the one just made.
        job.check("ReLU", unsafe { (calls.relu_set)(handle, RELU, KEEP_NAN, 0.0) })?;
        Ok(handle)
    }

    fn sum(&self, job: &mut Queued<'_>) -> Result<Handle, Lack> {
        let calls = self.calls;
        // SAFETY: the function fills in a handle.
        let handle =
            job.describe("addition", calls.sum_destroy, |to| unsafe { (calls.sum_create)(to) })?;
        // SAFETY: the handle is the one just made.
        job.check("addition", unsafe { (calls.sum_set)(handle, ADD, F32, KEEP_NAN) })?;
        Ok(handle)
    }
}

// SAFETY, of all calls below: handle and descriptions live as long as the job. Operands, which the job borrows, have the sizes that
// `address` has checked against their descriptions; results and scratch memory were allocated with them.
impl Peer for Cudnn {
    fn name(&self) -> &str {
        &self.name
    }

    fn convolution<'a>(
        &'a self,
        d: &Convolution,
        direction: Direction,
        a: Operand<'a>,
        b: Operand<'a>,
    ) -> Prepared<'a> {
        let (mut job, calls, handle) = (self.job(), self.calls, self.handle);
        let (x, y) =
            (self.tensor(&mut job, self.kind(), d.x)?, self.tensor(&mut job, self.kind(), d.y)?);
        let (w, convolution) = (self.filters(&mut job, d.filters)?, self.convolving(&mut job, d)?);
        let sized = |a: [usize; 4], b: [usize; 4]| [self.bytes(a), self.bytes(b)];
        // In the library's order: both operands, and the result.
        let (which, what, sizes, [first, second, to], len) = match direction {
            Direction::Forward => {
                (0, "convolution", sized(d.x, d.filters), [x, w, y], elements(d.y))
            }
            Direction::DataGradient => {
                (1, "data gradient", sized(d.filters, d.y), [w, y, x], elements(d.x))
            }
            Direction::WeightGradient => {
                (2, "weight gradient", sized(d.x, d.y), [x, y, w], elements(d.filters))
            }
        };
        let (a, b) = if direction == Direction::DataGradient { (b, a) } else { (a, b) };
        let (a, b) = (a.address(sizes[0]), b.address(sizes[1]));
        let find = self.directions.find[which];
        let (mut trials, mut count, mut status) = ([Trial::default(); TRIALS], 0, 0);
        // SAFETY: there is room for the trials that are asked for.
        self.device.gpu().on_stream(|_| unsafe {
            let (most, to_fill) = (TRIALS as c_int, trials.as_mut_ptr());
            status = find(handle, first, second, convolution, to, most, &mut count, to_fill);
        });
        job.check(what, status)?;
        let trials = &trials[..(count as usize).min(TRIALS)];
        let Some(&best) = trials.iter().find(|trial| trial.status == 0) else {
            return Err(format!("{} has no algorithm for this {what}", self.name));
        };
        // SAFETY: see above.
        job.check(what, unsafe { (calls.conv_math)(convolution, best.math) })?;
        let (space, result) = (job.scratch(best.memory), job.result(len, self.precision()));
        let run = self.directions.run[which];
        // SAFETY: see above.
        job.step(move || unsafe {
            let (algorithm, size) = (best.algorithm, best.memory);
            run(
                handle,
                ONE,
                first,
                a,
                second,
                b,
                convolution,
                algorithm,
                space,
                size,
                ZERO,
                to,
                result,
            )
        });
        job.prepared(what)
    }

    fn batch_norm<'a>(
        &'a self,
        shape: [usize; 4],
        epsilon: f32,
        x: Operand<'a>,
        residual: Option<Operand<'a>>,
        dy: Option<Operand<'a>>,
    ) -> Prepared<'a> {
        let (mut job, calls, handle) = (self.job(), self.calls, self.handle);
        let (channels, bytes) = (shape[3], self.bytes(shape));
        let all = self.tensor(&mut job, self.kind(), shape)?;
        let each = self.tensor(&mut job, F32, [1, 1, 1, channels])?;
        let (relu, sum) = (self.relu(&mut job)?, self.sum(&mut job)?);
        let [ones, zeros] = [1.0, 0.0].map(|value| job.constants(channels, value));
        let [mean, deviation, d_scale, d_shift] = [(); 4].map(|()| job.scratch(4 * channels));
        let (x, epsilon) = (x.address(bytes), f64::from(epsilon));
        let y = job.result(elements(shape), self.precision());
        // SAFETY: see above.
        job.step(move || unsafe {
            let (mode, running) = (NORM_PER_CHANNEL, null_mut());
            (calls.norm_forward)(
                handle, mode, ONE, ZERO, all, x, all, y, each, ones, zeros, 0.0, running, running,
                epsilon, mean, deviation,
            )
        });
        if let Some(residual) = residual {
            let residual = residual.address(bytes);
            // SAFETY: see above; the sum may be where its first term is.
            job.step(move || unsafe {
                (calls.sum)(handle, sum, ONE, all, y, ONE, all, residual, ZERO, all, y)
            });
        }
        // SAFETY: see above; a ReLU may be where its operand is.
        job.step(move || unsafe { (calls.relu_forward)(handle, relu, ONE, all, y, ZERO, all, y) });
        if let Some(dy) = dy {
            let (dy, masked) = (dy.address(bytes), job.scratch(bytes));
            let dx = job.result(elements(shape), self.precision());
            // SAFETY: see above; of a ReLU only the signs of its results are read.
            job.step(move || unsafe {
                (calls.relu_backward)(handle, relu, ONE, all, y, all, dy, all, y, ZERO, all, masked)
            });
            // SAFETY: see above.
            job.step(move || unsafe {
                let mode = NORM_PER_CHANNEL;
                (calls.norm_backward)(
                    handle, mode, ONE, ZERO, ONE, ZERO, all, x, all, masked, all, dx, each, ones,
                    d_scale, d_shift, epsilon, mean, deviation,
                )
            });
        }
        job.prepared("batch norm")
    }

    fn pooling<'a>(&'a self, d: &Pooling, x: Operand<'a>, dy: Option<Operand<'a>>) -> Prepared<'a> {
        let (mut job, calls, handle) = (self.job(), self.calls, self.handle);
        // SAFETY: the function fills in a handle.
        let pooling =
            job.describe("pooling", calls.pool_destroy, |to| unsafe { (calls.pool_create)(to) })?;
        let mode = if d.max { POOLING_MAX } else { POOLING_MEAN };
        let [height, width] = d.size.map(|size| size as c_int);
        let [stride, pad] = [d.stride, d.pad].map(|size| size as c_int);
        // SAFETY: the handle is the one just made.
        let status = unsafe {
            (calls.pool_set)(pooling, mode, KEEP_NAN, height, width, pad, pad, stride, stride)
        };
        job.check("pooling", status)?;
        let from = self.tensor(&mut job, self.kind(), d.x)?;
        let to = self.tensor(&mut job, self.kind(), d.y)?;
        let x = x.address(self.bytes(d.x));
        let y = job.result(elements(d.y), self.precision());
        // SAFETY: see above.
        job.step(move || unsafe {
            (calls.pool_forward)(handle, pooling, ONE, from, x, ZERO, to, y)
        });
        if let Some(dy) = dy {
            let dy = dy.address(self.bytes(d.y));
            let dx = job.result(elements(d.x), self.precision());
            // SAFETY: see above.
            job.step(move || unsafe {
                (calls.pool_backward)(handle, pooling, ONE, to, y, to, dy, from, x, ZERO, from, dx)
            });
        }
        job.prepared("pooling")
    }

    fn softmax<'a>(&'a self, rows: usize, columns: usize, x: Operand<'a>) -> Prepared<'a> {
        let (mut job, calls, handle) = (self.job(), self.calls, self.handle);
        let shape = [rows, 1, 1, columns];
        let all = self.tensor(&mut job, self.kind(), shape)?;
        let (x, y) = (x.address(self.bytes(shape)), job.result(elements(shape), self.precision()));
        // SAFETY: see above.
        job.step(move || unsafe {
            let (algorithm, mode) = (SOFTMAX_ACCURATE, SOFTMAX_OF_IMAGE);
            (calls.softmax)(handle, algorithm, mode, ONE, all, x, ZERO, all, y)
        });
        job.prepared("softmax")
    }

    fn add<'a>(&'a self, shape: [usize; 4], a: Operand<'a>, b: Operand<'a>) -> Prepared<'a> {
        let (mut job, calls, handle) = (self.job(), self.calls, self.handle);
        let all = self.tensor(&mut job, self.kind(), shape)?;
        let sum = self.sum(&mut job)?;
        let [a, b] = [a, b].map(|operand| operand.address(self.bytes(shape)));
        let y = job.result(elements(shape), self.precision());
        // SAFETY: see above.
        job.step(move || unsafe {
            (calls.sum)(handle, sum, ONE, all, a, ONE, all, b, ZERO, all, y)
        });
        job.prepared("addition")
    }
}

fn elements(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

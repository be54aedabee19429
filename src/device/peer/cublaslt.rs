//! cuBLASLt: products of matrices on a GPU.
//!
//! Numbers and types are those of `cublasLt.h`, which has kept them since version 11. Matrices of this program are row-major and
//! the library's column-major, so that it computes `cᵀ = op(b)ᵀ op(a)ᵀ`.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;

use libloading::Library;

use super::queued::{Queued, Status, Words, size_of};
use super::{Convolution, Direction, Operand, Peer, Prepared, Product, table};
use crate::device::{Device, Precision};
use crate::error::{Error, Result};

const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
/// The oldest version that says what a status means.
const OLDEST: usize = 11_04_02;

type Handle = *mut c_void;

const F32: c_int = 0;
const BF16: c_int = 14;
/// Sums in f32, and f32 operands multiplied as f32.
const COMPUTE_F32: c_int = 68;
const TRANSPOSE_A: c_int = 3;
const TRANSPOSE_B: c_int = 4;
const TRANSPOSED: c_int = 1;
const WORKSPACE_LIMIT: c_int = 1;
/// What NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `cublasLtMatmulHeuristicResult_t`
#[derive(Clone, Copy)]
#[repr(C)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

table! {
    #[derive(Clone, Copy, Debug)]
    Calls {
        version: "cublasLtGetVersion" () -> usize;
        words: "cublasLtGetStatusString" (Status) -> *const c_char;
        create: "cublasLtCreate" (*mut Handle) -> Status;
        destroy: "cublasLtDestroy" (Handle) -> Status;
        product_create: "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int) -> Status;
        product_set: "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
        product_destroy: "cublasLtMatmulDescDestroy" (Handle) -> Status;
        layout_create: "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64) -> Status;
        layout_destroy: "cublasLtMatrixLayoutDestroy" (Handle) -> Status;
        preference_create: "cublasLtMatmulPreferenceCreate" (*mut Handle) -> Status;
        preference_set: "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
        preference_destroy: "cublasLtMatmulPreferenceDestroy" (Handle) -> Status;
        choose: "cublasLtMatmulAlgoGetHeuristic"
            (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Choice, *mut c_int) -> Status;
        product: "cublasLtMatmul"
            (Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
             Handle, *mut c_void, Handle, *const [u64; 8], *mut c_void, usize, *mut c_void) -> Status;
    }
}

/// An open cuBLASLt.
#[derive(Debug)]
pub(crate) struct CublasLt {
    calls: Calls,
    words: Words,
    handle: Handle,
    name: String,
    device: Device,
    /// Holds the functions; dropped last.
    _library: Library,
}

impl CublasLt {
    pub(super) fn open(path: Option<&Path>, device: &Device) -> Result<Self> {
        let (library, path) = super::find("cuBLASLt", &NAMES, path)?;
        let calls = Calls::of(&library).map_err(|function| {
            let path = path.display();
            Error::Device(format!(
                "{path} lacks `{function}`: it is no cuBLASLt, or one older than 11.4.2"
            ))
        })?;
        // SAFETY: the function has no arguments.
        let version = unsafe { (calls.version)() };
        // 130002 is 13.0.2.
        let [major, minor, patch] = [version / 10_000, version / 100 % 100, version % 100];
        let name = format!("cuBLASLt {major}.{minor}.{patch}");
        if version < OLDEST {
            return Err(Error::Device(format!(
                "{} is {name}; this program speaks to 11.4.2 and later",
                path.display()
            )));
        }
        let (mut handle, mut status) = (null_mut(), 0);
        // SAFETY: the argument is a handle to fill in, and the context is current.
        device.gpu().on_stream(|_| status = unsafe { (calls.create)(&mut handle) });
        device.check()?;
        // SAFETY: the library's texts live for ever.
        let words = unsafe { Words::new(calls.words) };
        if status != 0 {
            return Err(Error::Device(format!("{name} cannot use {device}: {}", words.of(status))));
        }
        Ok(Self { calls, words, handle, name, device: device.clone(), _library: library })
    }

    /// The product with results in `precision`.
    fn multiply<'a>(
        &'a self,
        p: &Product,
        precision: Precision,
        a: Operand<'a>,
        b: Operand<'a>,
    ) -> Prepared<'a> {
        let (calls, handle) = (self.calls, self.handle);
        let mut job = Queued::new(&self.device, &self.name, self.words);
        let own = self.device.gpu().precision();
        let kind = |precision| if precision == Precision::Bf16 { BF16 } else { F32 };
        let Product { m, n, k, transpose_a, transpose_b } = *p;
        let (a, b) = (a.address(m * k * size_of(own)), b.address(k * n * size_of(own)));
        // SAFETY: here and below, the functions fill in handles, or read values that outlive the call.
        let product = job.describe("product", calls.product_destroy, |to| unsafe {
            (calls.product_create)(to, COMPUTE_F32, F32)
        })?;
        for (which, transposed) in [(TRANSPOSE_A, transpose_b), (TRANSPOSE_B, transpose_a)] {
            if transposed {
                let value = TRANSPOSED;
                // SAFETY: as above.
                let status = unsafe {
                    (calls.product_set)(
                        product,
                        which,
                        (&raw const value).cast(),
                        size_of_val(&value),
                    )
                };
                job.check("product", status)?;
            }
        }
        // A row-major matrix of `rows` and `columns` is a column-major one of `columns` and `rows`.
        let mut layout = |[rows, columns]: [usize; 2], precision| {
            job.describe("matrix", calls.layout_destroy, |to| {
                // SAFETY: as above.
                unsafe {
                    (calls.layout_create)(
                        to,
                        kind(precision),
                        columns as u64,
                        rows as u64,
                        columns as i64,
                    )
                }
            })
        };
        let left = layout(if transpose_b { [n, k] } else { [k, n] }, own)?;
        let right = layout(if transpose_a { [k, m] } else { [m, k] }, own)?;
        let to = layout([m, n], precision)?;
        let preference = job.describe("preference", calls.preference_destroy, |to| {
            // SAFETY: as above.
            unsafe { (calls.preference_create)(to) }
        })?;
        let limit = WORKSPACE;
        // SAFETY: as above.
        let status = unsafe {
            (calls.preference_set)(
                preference,
                WORKSPACE_LIMIT,
                (&raw const limit).cast(),
                size_of_val(&limit),
            )
        };
        job.check("preference", status)?;
        let mut choice =
            Choice { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let (mut found, mut status) = (0, 0);
        // SAFETY: as above; there is room for the one choice that is asked for.
        self.device.gpu().on_stream(|_| unsafe {
            status = (calls.choose)(
                handle,
                product,
                left,
                right,
                to,
                to,
                preference,
                1,
                &mut choice,
                &mut found,
            );
        });
        job.check("product", status)?;
        if found == 0 {
            return Err(format!("{} has no algorithm for this product", self.name));
        }
        let workspace = job.scratch(choice.workspace);
        let result = job.result(m * n, precision);
        let stream = self.stream();
        job.step(move || {
            let (one, zero) = (1.0_f32, 0.0_f32);
            // SAFETY: handle and descriptions live as long as the job; the operands, which the job borrows, have the sizes that
            // `address` has checked, result and workspace those that were allocated.
            unsafe {
                (calls.product)(
                    handle,
                    product,
                    (&raw const one).cast(),
                    b,
                    left,
                    a,
                    right,
                    (&raw const zero).cast(),
                    result,
                    to,
                    result,
                    to,
                    &choice.algorithm,
                    workspace,
                    choice.workspace,
                    stream,
                )
            }
        });
        job.prepared("product")
    }

    fn stream(&self) -> *mut c_void {
        let mut stream = null_mut();
        self.device.gpu().on_stream(|it| stream = it);
        stream
    }
}

impl Peer for CublasLt {
    fn name(&self) -> &str {
        &self.name
    }

    fn product<'a>(&'a self, p: &Product, a: Operand<'a>, b: Operand<'a>) -> Prepared<'a> {
        self.multiply(p, self.device.gpu().precision(), a, b)
    }

    /// A convolution of 1x1 filters and stride 1. Weight gradients are f32, like this program's.
    fn convolution<'a>(
        &'a self,
        d: &Convolution,
        direction: Direction,
        a: Operand<'a>,
        b: Operand<'a>,
    ) -> Prepared<'a> {
        let Some((product, swapped)) = d.as_product(direction) else {
            return self.lacks("convolution but products");
        };
        let (a, b) = if swapped { (b, a) } else { (a, b) };
        let precision = match direction {
            Direction::WeightGradient => Precision::F32,
            _ => self.device.gpu().precision(),
        };
        self.multiply(&product, precision, a, b)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: created by `open`; jobs, which use it, borrow this struct.
        self.device.gpu().on_stream(|_| unsafe {
            (self.calls.destroy)(self.handle);
        });
    }
}

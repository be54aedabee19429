//! Reference libraries that benchmarks compare with, opened at run time: on the CPU oneDNN, and a BLAS through its C interface;
//! on a GPU cuDNN and cuBLASLt.
//!
//! A [`Peer`] turns a description of an operation into a [`Job`]: it reads the caller's operands where they lie and owns its
//! results. An operation that the library lacks is a [`Lack`], not an error.

mod blas;
mod cublaslt;
mod cudnn;
mod onednn;
mod queued;

use std::path::{Path, PathBuf};

use libloading::Library;

use crate::device::{Device, DeviceKind, Memory, Precision, loader_says};
use crate::error::{Error, Result};

/// A library. Operations come in the layouts of this program, channels last and row-major, and in the precision of the device.
pub(crate) trait Peer: std::fmt::Debug {
    /// The library and its version.
    fn name(&self) -> &str;

    /// `a` and `b` are `x` and `w` forward, `dy` and `w` for the data gradient, `x` and `dy` for the weight gradient.
    fn convolution<'a>(
        &'a self,
        _: &Convolution,
        _: Direction,
        _a: Operand<'a>,
        _b: Operand<'a>,
    ) -> Prepared<'a> {
        self.lacks("convolution")
    }

    fn product<'a>(&'a self, _: &Product, _a: Operand<'a>, _b: Operand<'a>) -> Prepared<'a> {
        self.lacks("product")
    }

    /// Normalises `x [n, h, w, c]` by the statistics of the batch, adds `residual` and applies a ReLU; with `dy` also the backward
    /// pass. The results are `y` and `dx`.
    fn batch_norm<'a>(
        &'a self,
        _shape: [usize; 4],
        _epsilon: f32,
        _x: Operand<'a>,
        _residual: Option<Operand<'a>>,
        _dy: Option<Operand<'a>>,
    ) -> Prepared<'a> {
        self.lacks("batch norm")
    }

    /// Pools `x`; with `dy` also the backward pass. The results are `y` and `dx`.
    fn pooling<'a>(
        &'a self,
        _: &Pooling,
        _x: Operand<'a>,
        _dy: Option<Operand<'a>>,
    ) -> Prepared<'a> {
        self.lacks("pooling")
    }

    /// The softmax of each row of `x [rows, columns]`.
    fn softmax<'a>(&'a self, _rows: usize, _columns: usize, _x: Operand<'a>) -> Prepared<'a> {
        self.lacks("softmax")
    }

    /// The sum of two tensors of a shape.
    fn add<'a>(&'a self, _shape: [usize; 4], _a: Operand<'a>, _b: Operand<'a>) -> Prepared<'a> {
        self.lacks("addition")
    }

    fn lacks(&self, what: &str) -> Prepared<'_> {
        Err(format!("{} has no {what}", self.name()))
    }
}

/// Where an operand lies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operand<'a> {
    Host(&'a [f32]),
    /// In memory of a GPU, from this byte on.
    Gpu(&'a Memory, usize),
}

impl<'a> Operand<'a> {
    /// # Panics
    /// If it lies on a GPU: [`open`] gives no library of the CPU to a GPU.
    fn host(self) -> &'a [f32] {
        match self {
            Self::Host(slice) => slice,
            Self::Gpu(..) => panic!("a library of the CPU was given an operand on a GPU"),
        }
    }

    /// # Panics
    /// If it lies on the host, or ends before `bytes`.
    fn address(self, bytes: usize) -> *const std::ffi::c_void {
        match self {
            Self::Gpu(memory, from) => {
                assert!(memory.holds(from, bytes), "an operand of fewer than {bytes} bytes");
                queued::pointer(memory.address() + from as u64)
            }
            Self::Host(_) => panic!("a library of the GPU was given an operand on the host"),
        }
    }
}

/// Why a library has no such operation.
pub(crate) type Lack = String;

/// An operation of a library, ready to run over the caller's buffers.
pub(crate) trait Job {
    /// Runs it once, to the end; on a GPU queues it.
    fn run(&mut self);

    /// The results of the last run, in the layouts of this program.
    fn outputs(&self) -> Vec<Vec<f32>>;
}

/// A boxed job over the caller's operands.
pub(crate) type Prepared<'a> = std::result::Result<Box<dyn Job + 'a>, Lack>;

/// A direction of a convolution: `y` from `x` and `w`, `dx` from `dy` and `w`, `dw` from `x` and `dy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    DataGradient,
    WeightGradient,
}

/// The sizes of a convolution, channels last: `x [n, h, w, c]`, filters `[k, r, s, c]`, `y [n, p, q, k]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convolution {
    pub x: [usize; 4],
    pub filters: [usize; 4],
    pub y: [usize; 4],
    pub stride: usize,
    pub pad: usize,
}

/// `c [m, n] = op(a) op(b)` of row-major matrices, where `op` transposes if asked to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub transpose_a: bool,
    pub transpose_b: bool,
}

/// A pooling of windows of `size`, or of the whole image if it is 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pooling {
    pub x: [usize; 4],
    pub y: [usize; 4],
    pub size: [usize; 2],
    pub stride: usize,
    pub pad: usize,
    pub max: bool,
}

impl Convolution {
    /// As a product of `a` and `b`, or of `b` and `a` where the second value says so, if its filters are 1x1 and its stride is 1.
    fn as_product(&self, direction: Direction) -> Option<(Product, bool)> {
        let [n, p, q, k] = self.y;
        let (rows, c) = (n * p * q, self.x[3]);
        let of = |m, n, k, transpose_a, transpose_b| Product { m, n, k, transpose_a, transpose_b };
        let product = match direction {
            Direction::Forward => (of(rows, k, c, false, true), false),
            Direction::DataGradient => (of(rows, c, k, false, false), false),
            // dw [k, c] = dyᵀ x
            Direction::WeightGradient => (of(k, c, rows, true, false), true),
        };
        (self.filters[1..3] == [1, 1] && self.stride == 1 && self.pad == 0).then_some(product)
    }
}

/// Opens `NAME` or `NAME=PATH` for a device and calls from this thread.
///
/// # Errors
/// If the name is unknown or that of a library for other devices, or the library is missing, cannot be opened, is too old, lacks a
/// function, or cannot use the device.
pub(crate) fn open(named: &str, device: &Device) -> Result<Box<dyn Peer>> {
    let (name, path) = match named.split_once('=') {
        Some((name, path)) => (name, Some(Path::new(path))),
        None => (named, None),
    };
    let (kind, f32_only) = match name {
        "onednn" | "blas" => (DeviceKind::Cpu, true),
        "cudnn" | "cublaslt" => (DeviceKind::Cuda, false),
        _ => {
            return Err(Error::Config(format!(
                "--against {named}: the reference libraries are `onednn` and `blas` for the CPU and `cudnn` and `cublaslt` for a \
                 GPU, each with `=PATH` or without; an earlier result is a file that ends in .json"
            )));
        }
    };
    if device.kind() != kind || f32_only && device.precision() != Precision::F32 {
        let (runs, add) = match kind {
            DeviceKind::Cpu => ("on the CPU in f32", "--device cpu and leave out --bf16"),
            _ => ("on a GPU", "--device cuda"),
        };
        return Err(Error::Config(format!(
            "--against {name} compares {runs}, and this is {device}: add {add}"
        )));
    }
    Ok(match name {
        "onednn" => Box::new(onednn::OneDnn::open(path, device.threads())?),
        "blas" => Box::new(blas::Blas::open(path, device.threads())?),
        "cudnn" => Box::new(cudnn::Cudnn::open(path, device)?),
        _ => Box::new(cublaslt::CublasLt::open(path, device)?),
    })
}

/// A library of one of these names: in `.peers`, where `scripts/fetch-peers` puts them, or where the system looks; or the one
/// at `path`.
fn find(what: &str, names: &[&str], path: Option<&Path>) -> Result<(Library, PathBuf)> {
    if let Some(path) = path {
        if !path.is_file() {
            return Err(Error::Device(format!("{what}: there is no file {}", path.display())));
        }
        // A name without a slash would be looked up in the system's folders.
        let path = std::path::absolute(path).map_err(Error::io(path))?;
        return match load(&path) {
            Ok(library) => Ok((library, path)),
            Err(reason) => Err(Error::Device(format!("{what} cannot be opened: {reason}"))),
        };
    }
    let fetched = names.iter().map(|name| Path::new(".peers").join(name));
    let fetched = fetched.filter(|path| path.is_file()).filter_map(|p| std::path::absolute(p).ok());
    let mut reason = None;
    for path in fetched.chain(names.iter().map(PathBuf::from)) {
        match load(&path) {
            Ok(library) => return Ok((library, path)),
            // That a name is not known is no news; that a file which is there does not open is.
            Err(why) if path.is_absolute() => reason = Some(why),
            Err(_) => {}
        }
    }
    Err(Error::Device(match reason {
        Some(reason) => format!("{what} cannot be opened: {reason}"),
        None => format!(
            "{what} was not found (looked for {} in .peers and where the system has its libraries): run \
             scripts/fetch-peers, or name the file, as in `--against NAME=PATH`",
            names.join(", ")
        ),
    }))
}

fn load(path: &Path) -> std::result::Result<Library, String> {
    // SAFETY: the initialisers of these libraries only detect the processor; a file that is something else is the user's
    // choice, as with `LD_PRELOAD`.
    unsafe { Library::new(path) }.map_err(|e| loader_says(&e))
}

/// Declares a table of C functions and a constructor that looks them up by name.
macro_rules! table {
    ($(#[$about:meta])* $table:ident { $($field:ident: $name:literal ($($arg:ty),* $(,)?) $(-> $result:ty)?;)* }) => {
        $(#[$about])*
        struct $table { $($field: unsafe extern "C" fn($($arg),*) $(-> $result)?,)* }

        impl $table {
            /// Returns the name of the first function that the library lacks.
            fn of(library: &libloading::Library) -> std::result::Result<Self, &'static str> {
                Ok(Self { $($field: {
                    // SAFETY: the function has this type in the versions that this table is for.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) $(-> $result)?>($name)
                    };
                    *found.map_err(|_| $name)?
                },)* })
            }
        }
    };
}
use table;

#[cfg(test)]
mod tests {
    use super::*;

    fn said(named: &str) -> String {
        open(named, &Device::cpu(1).unwrap()).expect_err("no library").to_string()
    }

    /// Compiles C to a shared object.
    fn library(folder: &Path, name: &str, text: &str) -> PathBuf {
        let (source, file) = (folder.join("library.c"), folder.join(name));
        std::fs::write(&source, text).unwrap();
        let built = std::process::Command::new("gcc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&file, &source])
            .status();
        assert!(built.expect("gcc, which cargo links with").success());
        file
    }

    #[test]
    fn a_library_that_cannot_serve_is_refused_in_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let at = |file: &Path| format!("onednn={}", file.display());
        assert!(
            said("cublas").contains("the reference libraries are `onednn` and `blas` for the CPU")
        );
        let elsewhere = "--against cudnn compares on a GPU, and this is CPU";
        assert!(said("cudnn").contains(elsewhere), "{}", said("cudnn"));
        let missing = folder.path().join("libdnnl.so");
        assert!(
            said(&at(&missing)).contains("oneDNN: there is no file /"),
            "{}",
            said(&at(&missing))
        );
        let text = folder.path().join("text.so");
        std::fs::write(&text, "no library").unwrap();
        assert!(said(&at(&text)).contains("oneDNN cannot be opened: "), "{}", said(&at(&text)));
        let other = library(folder.path(), "other.so", "int other;");
        assert!(said(&at(&other)).contains("lacks `dnnl_version`"), "{}", said(&at(&other)));
        let blas = format!("blas={}", other.display());
        assert!(said(&blas).contains("lacks `cblas_sgemm`"), "{}", said(&blas));
        let version = |major: i32| {
            format!(
                "static const int v[8] = {{{major}, 7, 1}}; const int* dnnl_version(void) {{ return v; }}"
            )
        };
        let old = library(folder.path(), "old.so", &version(1));
        assert!(said(&at(&old)).contains("oneDNN 1.7.1; this program speaks to 2 and 3"));
        let cut = library(folder.path(), "cut.so", &version(3));
        assert!(said(&at(&cut)).contains("oneDNN 3.7.1, but lacks `dnnl_"), "{}", said(&at(&cut)));
    }
}
